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

/// The end of the shell's prompt.
const PROMPT: &[u8] = b"# ";

/// What the shell asks its terminal behind the prompt: where is the cursor (ECMA-48: DSR)? It is not shown: our
/// terminal would answer, and as what the person types next.
const QUESTION: &[u8] = b"\x1b[6n";

/// No boot takes as long, not even in the lab on a busy machine.
const LIMIT_SECS: &str = "300";

/// Sets up what is missing, builds stage 08 and boots Linux with it: to an interactive shell on a
/// terminal, through a short script elsewhere. The exit code is the stage's.
pub fn run() -> Result<ExitCode> {
    crate::setup::run(&crate::setup::Args::default())?;
    let stage = STAGES[7];
    let build = workspace::cargo()
        // With the runner: what lab/run builds itself, it builds without a word.
        .args(["build", "--bin", stage, "--bin", "mini-kvm-runner"])
        .status()
        .context("cannot start cargo")?;
    ensure!(build.success(), "{stage} does not build");

    let mut program = Command::new(workspace::root().join("lab/run"));
    program.arg(workspace::target().join("debug").join(stage));
    if stdin().is_terminal() {
        eprintln!("Booting Linux: leave its shell with `exit`, or the monitor with Ctrl-A x.");
        return workspace::exit_code(program.status(), "lab/run");
    }
    program.args(["--timeout", LIMIT_SECS]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = program.spawn().context("cannot start lab/run")?;
    let keys = child.stdin.take().expect("stdin is a pipe");
    let screen = child.stdout.take().expect("stdout is a pipe");
    play(screen, keys, &mut stdout())?;
    workspace::exit_code(child.wait(), "lab/run")
}

/// Copies what the guest prints to `out`, except for its questions to the terminal, and types the next line of
/// the script at each prompt.
fn play(mut screen: impl Read, mut keys: impl Write, out: &mut impl Write) -> Result<()> {
    let mut script = SCRIPT.iter();
    let (mut unseen, mut printed) = (Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    loop {
        let read = screen.read(&mut buffer).context("cannot read what the guest prints")?;
        if read == 0 {
            return out.write_all(&unseen).context("cannot print");
        }
        unseen.extend(&buffer[..read]);
        while let Some(at) = unseen.windows(QUESTION.len()).position(|bytes| bytes == QUESTION) {
            unseen.drain(at..at + QUESTION.len());
        }
        // The beginning of a question waits for what follows.
        let begun = (1..QUESTION.len()).rev().find(|&len| unseen.ends_with(&QUESTION[..len]));
        let whole: Vec<_> = unseen.drain(..unseen.len() - begun.unwrap_or(0)).collect();
        out.write_all(&whole).and_then(|()| out.flush()).context("cannot print")?;
        printed.extend(whole);
        if printed.windows(PROMPT.len()).any(|end| end == PROMPT)
            && let Some(line) = script.next()
        {
            // A guest that is gone says so by its exit code.
            let _ = writeln!(keys, "{line}").and_then(|()| keys.flush());
            printed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A screen that hands over one byte at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(&mut buffer[..1])
        }
    }

    #[test]
    fn questions_to_the_terminal_are_not_shown_and_prompts_get_their_lines() {
        let screen = b"hello\n~# \x1b[6n\x1b[1mbold\x1b[6\n/# \x1b[6n\x1b";
        let shown = b"hello\n~# \x1b[1mbold\x1b[6\n/# \x1b";
        let typed = format!("{}\n{}\n", SCRIPT[0], SCRIPT[1]);
        for slow in [false, true] {
            let (mut out, mut keys) = (Vec::new(), Vec::new());
            if slow {
                play(Slow(screen), &mut keys, &mut out).unwrap();
            } else {
                // In one piece there is one prompt to answer.
                play(&screen[..], &mut keys, &mut out).unwrap();
            }
            assert_eq!(out, shown);
            assert!(typed.as_bytes().starts_with(&keys) && !keys.is_empty());
            assert_eq!(slow, keys == typed.as_bytes());
        }
    }
}
