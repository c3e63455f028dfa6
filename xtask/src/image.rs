//! `cargo xtask image`: stage 07's own boot disk as a file.
//!
//! What it is made of, assembled by NASM and compiled for the bare machine, would take long to be built with every
//! task. So a program of stage 07's package writes it.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::workspace;

/// The program that writes the image.
const PROGRAM: &str = "mini-kvm-image";

/// Options of `cargo xtask image`.
#[derive(clap::Args)]
pub struct Args {
    /// The image to write, of 4 MiB; a file of this name is replaced
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Builds the program and writes the image with it. The exit code is the program's.
pub fn run(args: &Args) -> Result<ExitCode> {
    let program = workspace::built(PROGRAM)?;
    workspace::exit_code(Command::new(program).arg(&args.file).status(), PROGRAM)
}
