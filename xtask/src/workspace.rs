//! Where things stand in the workspace.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result, ensure};
pub use cli::STAGES;

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target folder, which the user may have moved by a variable or in a configuration file: the
/// one that this very program was built in.
pub fn target() -> PathBuf {
    let built = std::env::current_exe().ok();
    let target = built.as_deref().and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
    target.unwrap_or_else(|| root().join("target"))
}

/// Cargo at the repository's root, building into [`target`].
pub fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).env("CARGO_TARGET_DIR", target());
    cargo
}

/// Builds one of the workspace's programs that take long, and so are not a part of this one. Gives its path.
pub fn built(program: &str) -> Result<PathBuf> {
    let build = cargo().args(["build", "--quiet", "--bin", program]).status();
    ensure!(build.context("cannot start cargo")?.success(), "{program} does not build");
    Ok(target().join("debug").join(program))
}

/// Builds such a program, and runs it with `words` and then with its own `options`.
pub fn run(program: &str, words: &[&str], options: &[OsString]) -> Result<ExitCode> {
    let status = Command::new(built(program)?).args(words).args(options).status();
    exit_code(status, program)
}

/// The exit code of `program`, which was run, as ours.
pub fn exit_code(status: io::Result<ExitStatus>, program: &str) -> Result<ExitCode> {
    let status = status.with_context(|| format!("cannot run {program}"))?;
    let code = status.code().with_context(|| format!("{program} was killed by a signal"))?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
