//! `cargo xtask book` and `cargo xtask reports`: the research notes as a book, and their reports on paper.
//!
//! The package `book` does both. It is a program of its own, so that nobody waits for mdBook to be built who wants
//! something else.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;

use crate::workspace;

/// Runs its `task` with that one's own options.
pub fn run(task: &str, options: &[OsString]) -> Result<ExitCode> {
    let status = workspace::cargo()
        .args(["run", "--quiet", "--package", "book", "--", task])
        .args(options)
        .status();
    workspace::exit_code(status, "cargo")
}
