//! The bigger guests of mini-kvm.

use std::path::Path;

/// How a loader enters [`KERNEL`]: the boot info and the state of the processor.
pub use kernel_abi::boot;

/// A small x86-64 kernel in Rust, with a shell and its programs in ring 3: an ELF64 executable for
/// 1 MiB, with its symbols. Its source is in `guests/kernel/`.
pub const KERNEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernel.elf"));

/// The file from which [`KERNEL`] was made, with line tables for gdb. It is there where this was built, and may not be
/// where this runs.
pub fn kernel_symbols() -> Option<&'static Path> {
    Some(Path::new(env!("KERNEL_SYMBOLS"))).filter(|file| file.exists())
}
