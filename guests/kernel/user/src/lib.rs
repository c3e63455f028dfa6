//! The parts of the user programs that make no system call, so that `cargo test` runs them on the
//! host.

#![cfg_attr(not(test), no_std)]

pub mod arithmetic;
pub mod calculator;
pub mod line;
