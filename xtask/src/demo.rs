//! `cargo xtask demo`: from whatever is there to a Linux shell.

use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::workspace::{self, STAGES};

/// What is typed into the guest when nobody is there to type: a line whenever the shell asks for one.
const SCRIPT: [&str; 4] = [
    "uname -a",
    "echo \"CPUs: $(grep -c ^processor /proc/cpuinfo)\"",
    "grep -E 'MemTotal|MemFree' /proc/meminfo",
    "poweroff -f",
];

/// The end of the shell's prompt. A question to the terminal for its width may follow.
const PROMPT: &[u8] = b"# ";

/// No boot takes as long, not even in the lab on a busy machine.
const LIMIT_SECS: &str = "300";

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
    program.args(["--timeout", LIMIT_SECS]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = program.spawn().context("cannot start lab/run")?;
    let keys = child.stdin.take().expect("stdin is a pipe");
    let screen = child.stdout.take().expect("stdout is a pipe");
    play(screen, keys, &mut stdout())?;
    exit_code(child.wait())
}

/// Copies what the guest prints to `out`, and types the next line of the script at each prompt.
fn play(mut screen: impl Read, mut keys: impl Write, out: &mut impl Write) -> Result<()> {
    let mut script = SCRIPT.iter();
    let mut printed: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = screen.read(&mut buffer).context("cannot read what the guest prints")?;
        if read == 0 {
            return Ok(());
        }
        out.write_all(&buffer[..read]).and_then(|()| out.flush()).context("cannot print")?;
        printed.extend(&buffer[..read]);
        if printed.windows(PROMPT.len()).any(|end| end == PROMPT)
            && let Some(line) = script.next()
        {
            // A guest that is gone says so by its exit code.
            let _ = writeln!(keys, "{line}").and_then(|()| keys.flush());
            printed.clear();
        }
    }
}

/// The child's exit code as ours.
fn exit_code(status: std::io::Result<std::process::ExitStatus>) -> Result<ExitCode> {
    let code = status.context("cannot run lab/run")?.code().context("killed by a signal")?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
