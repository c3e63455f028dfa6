//! The parts of the kernel that touch no hardware, so that `cargo test` runs them on the host.

#![cfg_attr(not(test), no_std)]

pub mod elf;
pub mod exception;
pub mod frame;
pub mod input;
