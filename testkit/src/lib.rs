//! What milestone tests share: running a program to its end, and talking to one on a terminal.
//!
//! ```no_run
//! use testkit::Program;
//!
//! // In a stage's tests the path is `env!("CARGO_BIN_EXE_03_vcpu")`.
//! let ran = Program::new("target/debug/03_vcpu").args(["--step"]).run();
//! ran.ended(0).stdout_has("hlt");
//! ```
//!
//! Nothing that a program printed is lost: a check that fails names the command, how it ended and both
//! of its outputs, and keeps these as files under `target/failed/`. A program which does not end is
//! killed, and what it printed until then is shown in the same way.

mod dialogue;
mod gdb;
mod printed;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fmt, fs};

pub use dialogue::Dialogue;
pub use printed::Printed;
pub use terminal::Terminal;

/// How long a program may take, and a terminal may stay silent, when a test says nothing else. Far
/// above what anything needs, since the lab on a busy machine may be ten times slower than a host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a program's end is looked for.
const TICK: Duration = Duration::from_millis(2);

/// A program with its arguments and its input, to be run to its end or on a terminal.
#[derive(Debug)]
pub struct Program {
    command: Command,
    stdin: Vec<u8>,
    patience: Duration,
    unread: bool,
}

impl Program {
    /// The program at `path`, which a test has from `env!("CARGO_BIN_EXE_…")`.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(path), stdin: Vec::new(), patience: PATIENCE, unread: false }
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it in `dir`.
    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// What it reads from stdin, followed by the end of the file. Without this stdin is empty. On a
    /// terminal this is not used: there a test types with [`Dialogue::send`].
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// How long it may run, or on a terminal: how long to wait for each thing that is expected.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs it to its end. Panics, with all that it printed, if it does not end in time; then it is killed.
    #[track_caller]
    pub fn run(self) -> Ran {
        self.start().finish()
    }

    #[track_caller]
    fn start(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let unread = self.unread.then(|| io::pipe().expect("a pipe"));
        if let Some((_, writer)) = &unread {
            self.command.stdout(writer.try_clone().expect("a descriptor"));
        }
        let started = Instant::now();
        let mut child = self.spawn();
        let stdout = match child.stdout.take() {
            Some(stdout) => Collected::from(stdout),
            None => Collected::from(io::empty()),
        };
        let stderr = Collected::from(child.stderr.take().expect("stderr is a pipe"));
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let input = std::mem::take(&mut self.stdin);
        // In a thread of its own: a program may print more than a pipe holds before it reads. One that
        // ends without having read everything is no failure.
        thread::spawn(move || stdin.write_all(&input));
        Running { program: self, child, stdout, stderr, started, _unread: unread }
    }

    /// Makes a shell start it with its outputs redirected, as in `> /dev/full`.
    pub fn redirected(self, redirection: &str) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", &format!(r#"exec "$0" "$@" {redirection}"#)]);
        command.arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(dir) = self.command.get_current_dir() {
            command.current_dir(dir);
        }
        Self { command, ..self }
    }

    /// Gives it a pipe that nobody reads as its stdout.
    pub fn unread(mut self) -> Self {
        self.unread = true;
        self
    }

    /// What every program owes a user whose disk is full: one line and exit code 3 where stdout is on it,
    /// and no panic where stderr is.
    #[track_caller]
    pub fn full_disk(program: impl AsRef<OsStr>, args: &[&str]) {
        let new = || Self::new(&program).args(args);
        new().redirected("> /dev/full").run().refused(3, "cannot write to stdout: No space left");
        new().redirected("2> /dev/full").run().ended(0);
        new().redirected("> /dev/full 2> /dev/full").run().ended(3);
    }

    /// Starts it on a terminal of its own of 24 rows and 80 columns.
    #[track_caller]
    pub fn on_terminal(self) -> Dialogue {
        Dialogue::start(self)
    }

    #[track_caller]
    fn spawn(&mut self) -> Child {
        match self.command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("{}: {error}", described(&self.command)),
        }
    }
}

/// A program that has been started.
struct Running {
    program: Program,
    child: Child,
    stdout: Collected,
    stderr: Collected,
    started: Instant,
    /// Both ends of the pipe that nobody reads.
    _unread: Option<(io::PipeReader, io::PipeWriter)>,
}

impl Running {
    /// Waits for its end, as [`Program::run`] says.
    #[track_caller]
    fn finish(mut self) -> Ran {
        let patience = self.program.patience;
        let deadline = self.started + patience;
        let status = wait(&mut self.child, deadline);
        // What the program left running keeps its pipes open: it is waited for, but not for ever.
        while !(self.stdout.ended() && self.stderr.ended()) && Instant::now() < deadline {
            thread::sleep(TICK);
        }
        let ran = Ran {
            command: described(&self.program.command),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            took: self.started.elapsed(),
        };
        if status.is_none() {
            ran.fail(&format!("did not end within {patience:?} and was killed"));
        }
        ran
    }
}

/// The command as one would type it, for messages.
fn described(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// How a child ended, or nothing if it had to be killed at `deadline`.
fn wait(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            // Errors mean that it ended in this moment.
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(TICK);
    }
}

/// What comes out of a pipe, collected by a thread of its own.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: thread::JoinHandle<()>,
}

impl Collected {
    fn from(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let shared = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = pipe.read(&mut buffer) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..len]);
            }
        });
        Self { bytes, thread }
    }

    fn ended(&self) -> bool {
        self.thread.is_finished()
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A program that has ended, and what it printed. Its checks can be chained.
#[derive(Debug)]
pub struct Ran {
    command: String,
    status: Option<ExitStatus>,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
}

impl Ran {
    /// The exit code, or nothing if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// stdout as text; what is not UTF-8 is replaced.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text; what is not UTF-8 is replaced.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// What the guest sent through its first serial port, as the lines of `--trace=serial,every` on stderr say.
    pub fn traced_serial(&self) -> Vec<u8> {
        let (mut sent, mut divisor) = (Vec::new(), false);
        for line in self.err().lines() {
            let Some((_, written)) = line.split_once(" serial port: ") else { continue };
            let Some((port, value)) = written.split_once(" <- ") else { continue };
            let value = value.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
            match (port, value) {
                // The line control register's DLAB puts the divisor in the place of the data.
                ("3FB", Some(control)) => divisor = control & 0x80 != 0,
                ("3F8", Some(byte)) if !divisor => sent.push(byte),
                _ => {}
            }
        }
        sent
    }

    /// How many exits for `what`, a reason, a device or an address, the table of `--stats` on stderr has; for `all`, all
    /// that there were.
    pub fn exits(&self, what: &str) -> u64 {
        let count = |line: &str| {
            let (label, numbers) = line.split_at_checked(35)?;
            let label = label.trim();
            let is_it = label == what || what == "all" && label.starts_with("all, in ");
            is_it.then(|| numbers.split_whitespace().next()?.parse().ok()).flatten()
        };
        self.err().lines().find_map(count).unwrap_or(0)
    }

    /// It ended by itself with this exit code.
    #[track_caller]
    pub fn ended(&self, code: i32) -> &Self {
        if self.code() != Some(code) {
            self.fail(&format!("exit code {code} was expected"));
        }
        self
    }

    /// stdout contains `text`.
    #[track_caller]
    pub fn stdout_has(&self, text: &str) -> &Self {
        if !self.out().contains(text) {
            self.fail(&format!("{text:?} is missing from stdout"));
        }
        self
    }

    /// stderr contains `text`.
    #[track_caller]
    pub fn stderr_has(&self, text: &str) -> &Self {
        if !self.err().contains(text) {
            self.fail(&format!("{text:?} is missing from stderr"));
        }
        self
    }

    /// What every program owes a user whose input it cannot use: nothing on stdout, one line on stderr
    /// that begins with `error:` and contains `text`, and this exit code.
    #[track_caller]
    pub fn refused(&self, code: i32, text: &str) -> &Self {
        self.ended(code).stderr_has(text);
        if !self.stdout.is_empty() {
            self.fail("nothing on stdout was expected");
        }
        if self.err().trim_end().lines().count() != 1 || !self.err().starts_with("error:") {
            self.fail("one line on stderr was expected, beginning with `error:`");
        }
        self
    }

    /// Fails the test with all that the program printed.
    #[track_caller]
    pub fn fail(&self, why: &str) -> ! {
        panic!("{why}\n{self}\n{}", keep(&[("stdout", &self.stdout), ("stderr", &self.stderr)]));
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  command: {}", self.command)?;
        match self.status {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => writeln!(f, "  ended:   exit code {code}, {:?}", self.took)?,
                (None, signal) => writeln!(f, "  ended:   signal {signal:?}, {:?}", self.took)?,
            },
            None => writeln!(f, "  ended:   killed, {:?}", self.took)?,
        }
        write!(f, "  stdout:\n{}\n  stderr:\n{}", indented(&self.out()), indented(&self.err()))
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// Keeps the outputs of a failed check as files and says where.
fn keep(outputs: &[(&str, &[u8])]) -> String {
    // `target/debug/deps/stage_01-hash` is the test that runs: three folders up is `target`.
    let target = env::current_exe().ok().and_then(|exe| Some(exe.ancestors().nth(3)?.to_owned()));
    let dir = target.unwrap_or_else(env::temp_dir).join("failed");
    let test = thread::current().name().unwrap_or("test").replace("::", "-");
    let kept = |(what, bytes): &(&str, &[u8])| -> Option<PathBuf> {
        let mut name = OsString::from(&test);
        name.push(format!(".{what}"));
        let path = dir.join(name);
        fs::create_dir_all(&dir).and_then(|()| fs::write(&path, bytes)).ok()?;
        Some(path)
    };
    let paths: Vec<_> =
        outputs.iter().filter_map(kept).map(|path| path.display().to_string()).collect();
    format!("  kept in: {}", paths.join(", "))
}
