//! What the kernel agrees on with others: with its loaders ([`boot`]) and with its user programs
//! ([`syscall`]).
//!
//! Host programs use this crate too, so it has no dependency and nothing that needs an operating
//! system.

#![no_std]

pub mod boot;
pub mod syscall;
