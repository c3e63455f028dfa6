//! Writes the stage's built-in disk to a file: what `cargo xtask image` runs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use cli::Ended;
use common::{boot_disk, file};

/// Writes stage 07's boot disk: MBR, second stage, and the Rust kernel in a FAT16 partition
#[derive(Parser)]
struct Args {
    /// Where to write the image, 4 MiB; a file that is there is replaced
    file: PathBuf,
}

fn main() -> ExitCode {
    cli::main(|args: Args| {
        let disk = boot_disk::build(asm::boot::MBR, asm::boot::STAGE2, guests::KERNEL)?;
        file::write(&args.file, &disk).with_context(|| args.file.display().to_string())?;
        Ok(Ended::Well)
    })
}
