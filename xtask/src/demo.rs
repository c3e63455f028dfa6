//! `cargo xtask demo`: from whatever is there to a Linux shell.

use std::io::{IsTerminal, Write, stdin};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::workspace::{self, STAGES};

/// What is typed into the guest when nobody is there to type. The shell's end powers it off.
const SCRIPT: &str = "\
uname -a
echo \"CPUs: $(grep -c ^processor /proc/cpuinfo)\"
grep -E 'MemTotal|MemFree' /proc/meminfo
poweroff -f
";

/// Sets up what is missing, builds stage 08 and boots Linux with it: to an interactive shell on a
/// terminal, through a short script elsewhere. The exit code is the stage's.
pub fn run() -> Result<ExitCode> {
    crate::setup::run(&crate::setup::Args::default())?;
    let stage = STAGES[7];
    let build = Command::new(env!("CARGO"))
        .args(["build", "--bin", stage])
        .current_dir(workspace::root())
        .status()
        .context("cannot start cargo")?;
    ensure!(build.success(), "{stage} does not build");

    let mut program = Command::new(workspace::root().join("lab/run"));
    program.arg(workspace::target().join("debug").join(stage));
    if stdin().is_terminal() {
        eprintln!("Booting Linux: leave its shell with `exit`, or the monitor with Ctrl-A x.");
        return exit_code(program.status());
    }
    let mut child = program.stdin(Stdio::piped()).spawn().context("cannot start lab/run")?;
    let mut typed = child.stdin.take().expect("stdin is a pipe");
    // A guest that is gone before it has read everything says so by its exit code.
    let _ = typed.write_all(SCRIPT.as_bytes());
    drop(typed);
    exit_code(child.wait())
}

/// The child's exit code as ours.
fn exit_code(status: std::io::Result<std::process::ExitStatus>) -> Result<ExitCode> {
    let code = status.context("cannot run lab/run")?.code().context("killed by a signal")?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
