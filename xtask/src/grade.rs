//! `cargo xtask grade`: what each stage is worth, and what the grader is worth.
//!
//! The package `grader` does it. Its guests are assembled by NASM, which set-up brings first, so it is a program of its
//! own.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;

use crate::workspace;

/// The program that grades.
const PROGRAM: &str = "mini-kvm-grade";

/// Sets up what is missing, builds the program and runs it with its own options. The exit code is the program's.
pub fn run(options: &[OsString]) -> Result<ExitCode> {
    crate::setup::run(&crate::setup::Args::default())?;
    workspace::run(PROGRAM, &[], options)
}
