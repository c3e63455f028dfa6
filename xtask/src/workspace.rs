//! Where things stand in the workspace.

use std::path::{Path, PathBuf};

/// The eight stages, which are packages' folders and programs' names alike.
pub const STAGES: [&str; 8] = [
    "01_create_vm",
    "02_memory",
    "03_vcpu",
    "04_pio",
    "05_mmio",
    "06_long_mode",
    "07_bootloader",
    "08_boot_linux",
];

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target folder, which the user may have moved.
pub fn target() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}
