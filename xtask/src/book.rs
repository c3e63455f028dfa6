//! `cargo xtask book`: the research notes as a book.
//!
//! The package `book` does it. It is a program of its own, so that nobody waits for mdBook to be built who wants
//! something else.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;

use crate::workspace;

/// Runs it with its own options.
pub fn run(options: &[OsString]) -> Result<ExitCode> {
    let status = workspace::cargo()
        .args(["run", "--quiet", "--package", "book", "--"])
        .args(options)
        .status();
    workspace::exit_code(status, "cargo")
}
