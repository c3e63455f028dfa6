//! The strongest cheat: a program that prints what an honest one printed for the same arguments and ends with the same
//! exit code, without ever opening `/dev/kvm`.
//!
//! This very binary is the cheat when it is called by a stage's name. What the honest program printed stands in files
//! beside it, put there by a grading of the honest project with the same random numbers.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::program::Ran;
use crate::rubric::STAGES;

/// What a program printed, and how it ended.
#[derive(Serialize, Deserialize)]
struct Recording {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: Option<i32>,
}

/// The name of the folder beside the cheats where the recordings are.
pub const RECORDINGS: &str = "recordings";

/// Keeps what an honest program printed.
///
/// # Errors
/// The file cannot be written.
pub fn record(folder: &Path, program: &Path, args: &[OsString], ran: &Ran) -> Result<()> {
    fs::create_dir_all(folder)?;
    let recording =
        Recording { stdout: ran.stdout.clone(), stderr: ran.stderr.clone(), code: ran.code() };
    let number = (0..).find(|&number| !path(folder, program, args, number).exists());
    let path = path(folder, program, args, number.context("no number is left")?);
    fs::write(&path, serde_json::to_vec(&recording)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Where the output of a program's call with these arguments is: the `number`th one, for a criterion may call it twice.
fn path(folder: &Path, program: &Path, args: &[OsString], number: u32) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    args.hash(&mut hasher);
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    folder.join(format!("{name}-{:016x}-{number}", hasher.finish()))
}

/// The cheat, if this process was started by a stage's name.
pub fn main(name: &OsStr, args: &[OsString]) -> Option<ExitCode> {
    let path = Path::new(name);
    let stage = path.file_name()?;
    STAGES
        .iter()
        .any(|known| stage.as_bytes() == known.as_bytes())
        .then(|| replay(path, args).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn replay(program: &Path, args: &[OsString]) -> Option<u8> {
    let folder = program.parent()?.join(RECORDINGS);
    // A recording that has been played is taken away, so that the next call plays the next one.
    let found =
        (0..64).map(|number| path(&folder, program, args, number)).find(|path| path.exists())?;
    let recording: Recording = serde_json::from_slice(&fs::read(&found).ok()?).ok()?;
    fs::remove_file(found).ok()?;
    std::io::stdout().write_all(&recording.stdout).ok()?;
    std::io::stderr().write_all(&recording.stderr).ok()?;
    Some(recording.code.unwrap_or(1) as u8)
}
