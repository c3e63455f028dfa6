//! Running one of the submission's programs, with the witness beside it or without.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::inner::Trouble;
use crate::look::Look;
use crate::witness::guest::Guest;
use crate::witness::record::{Call, Exit, Record};
use crate::witness::{self, Wishes, Witness};

/// How long a program may take when a criterion says nothing else: far above what any needs, since the lab on a busy
/// machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The most that is kept of each output.
const MOST_OUTPUT: usize = 16 << 20;

/// A program, what it is given, and what is done while it runs.
pub struct Program<'c> {
    launcher: PathBuf,
    path: PathBuf,
    args: Vec<OsString>,
    stdin: Vec<u8>,
    replies: Vec<(Vec<u8>, Vec<u8>)>,
    at_cue: Option<(Box<Cue<'c>>, Vec<u8>)>,
    hold_stdin: bool,
    patience: Duration,
    wishes: Wishes<'c>,
    descriptors: Option<u64>,
}

/// Whether this exit is the one at which something is typed.
type Cue<'c> = dyn FnMut(&Exit) -> bool + 'c;

/// A program that has ended, what it printed, and what the witness saw.
pub struct Ran {
    /// The command, as one would type it.
    pub command: String,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub status: Option<ExitStatus>,
    /// Whether it had to be killed because its time was up.
    pub timed_out: bool,
    /// From its start to its end.
    pub took: Duration,
    record: Record,
}

impl Deref for Ran {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl Ran {
    /// stdout as text; what is not UTF-8 is replaced.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text; what is not UTF-8 is replaced.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code; nothing if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }
}

impl<'c> Program<'c> {
    /// The program at `path`, started by way of `launcher`, the grader's binary.
    pub fn new<A: AsRef<OsStr>>(launcher: &Path, path: impl Into<PathBuf>, args: &[A]) -> Self {
        Self {
            launcher: launcher.to_owned(),
            path: path.into(),
            args: args.iter().map(|arg| arg.as_ref().to_owned()).collect(),
            stdin: Vec::new(),
            replies: Vec::new(),
            at_cue: None,
            hold_stdin: false,
            patience: PATIENCE,
            wishes: Wishes::default(),
            descriptors: None,
        }
    }

    /// What it reads from stdin, from the beginning. Without this and [`Self::reply`] stdin is empty.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Once it has printed `text`, behind what the reply before waited for, it is given these bytes.
    pub fn reply(mut self, text: impl Into<Vec<u8>>, bytes: impl Into<Vec<u8>>) -> Self {
        self.replies.push((text.into(), bytes.into()));
        self
    }

    /// Once the guest has had such an exit, behind all replies, it is given these bytes: for a guest that prints nothing
    /// when it begins to listen.
    pub fn type_at(
        mut self,
        cue: impl FnMut(&Exit) -> bool + 'c,
        bytes: impl Into<Vec<u8>>,
    ) -> Self {
        self.at_cue = Some((Box::new(cue), bytes.into()));
        self
    }

    /// Keeps stdin open when all of it has been given: for a program that ends when stdin does.
    pub fn hold_stdin(mut self) -> Self {
        self.hold_stdin = true;
        self
    }

    /// How long it may run, if not [`PATIENCE`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What to do at every exit of the guest, which stands still meanwhile: its memory and its registers can be read.
    pub fn at_exit(mut self, look: impl FnMut(&Exit, &mut Guest<'_>) -> Result<()> + 'c) -> Self {
        self.wishes.at_exit = Some(Box::new(look));
        self
    }

    /// For an ioctl that has just been made, what the program is told instead of what KVM said: a result, or an errno
    /// below zero. With values that are random, nobody can have known what the program is to say.
    pub fn pretend(mut self, pretend: impl FnMut(&Call) -> Option<i64> + 'c) -> Self {
        self.wishes.pretend = Some(Box::new(pretend));
        self
    }

    /// For an ioctl that KVM has just answered in what its argument points to, or in `struct kvm_run`: what stands there
    /// instead. The answer in the record is then the forged one.
    pub fn forge(mut self, forge: impl FnMut(&Call) -> Option<Vec<u8>> + 'c) -> Self {
        self.wishes.forge = Some(Box::new(forge));
        self
    }

    /// Leaves `KVM_RUN` alone: no exits are recorded, and the guest is as quick as it is without a witness.
    pub fn without_exits(mut self) -> Self {
        self.wishes.no_exits = true;
        self
    }

    /// How many descriptors it may have open (`ulimit -n`).
    pub fn descriptors(mut self, most: u64) -> Self {
        self.descriptors = Some(most);
        self
    }

    /// Runs it to its end under watch. That it has to be killed is a MISSING line; what was seen is there all the same.
    ///
    /// # Errors
    /// It cannot be started or watched.
    pub fn run(mut self, look: &mut Look) -> Result<Ran> {
        let mut command = witness::command(&self.launcher, self.wishes.no_exits);
        if let Some(most) = self.descriptors {
            // The launcher, which needs a few more itself, is gone by then.
            command.args(["/bin/sh", "-c", &format!(r#"ulimit -n {most}; exec "$0" "$@""#)]);
        }
        command.arg(&self.path);
        command.args(&self.args).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().map_err(|error| {
            Trouble(format!("cannot start {}: {error}", self.launcher.display()))
        })?;
        let group = Pid::from_raw(child.id() as i32);

        let out = Arc::new(Output::default());
        let collect = |pipe: Box<dyn Read + Send>, output: Arc<Output>| {
            thread::spawn(move || output.collect(pipe))
        };
        let stdout = collect(Box::new(child.stdout.take().context("stdout")?), Arc::clone(&out));
        let err = Arc::new(Output::default());
        let stderr = collect(Box::new(child.stderr.take().context("stderr")?), Arc::clone(&err));
        let stdin = child.stdin.take().context("stdin")?;
        let input = std::mem::take(&mut self.stdin);
        let replies = std::mem::take(&mut self.replies);
        let (printed, hold) = (Arc::clone(&out), self.hold_stdin);
        let at_cue = self.at_cue.take().map(|(mut cue, bytes)| {
            let (come, wait) = channel::<()>();
            let mut at_exit = self.wishes.at_exit.take();
            self.wishes.at_exit = Some(Box::new(move |exit, guest| {
                if cue(exit) {
                    let _ = come.send(());
                }
                at_exit.as_mut().map_or(Ok(()), |at_exit| at_exit(exit, guest))
            }));
            (wait, bytes)
        });
        thread::spawn(move || feed(stdin, &input, &replies, at_cue, &printed, hold));

        // Kills it all when its time is up; the witness then sees its end.
        let (ended, alarm) = channel::<()>();
        let patience = self.patience;
        let watchdog = thread::spawn(move || {
            let late = alarm.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            if late {
                // An error means that it has ended in this moment.
                let _ = killpg(group, Signal::SIGKILL);
            }
            late
        });
        let watched = Witness::new(child.id(), self.wishes).and_then(Witness::watch);
        drop(ended);
        let timed_out = watchdog.join().unwrap_or(false);
        // What it left running keeps its pipes open.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = (stdout.join(), stderr.join());
        out.close();

        let trouble = watched.as_ref().err().map(|error| format!("{error:#}"));
        let (record, status) = watched.unwrap_or_default();
        let words =
            std::iter::once(self.path.as_os_str()).chain(self.args.iter().map(|arg| &**arg));
        let ran = Ran {
            command: words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "),
            stdout: out.bytes(),
            stderr: err.bytes(),
            status,
            timed_out,
            took: started.elapsed(),
            record,
        };
        look.ran(&ran, &self.args);
        if timed_out {
            let text = format!("`{}` ends within {} s", ran.command, patience.as_secs());
            look.missing(&text, &tail(&ran));
        } else if let Some(signal) = ran.status.and_then(|status| status.signal()) {
            let text = format!("`{}` was killed by signal {signal}", ran.command);
            look.bad(&text, &tail(&ran));
        }
        match trouble {
            Some(why) => Err(anyhow::anyhow!("{why}")),
            None => Ok(ran),
        }
    }
}

/// The last lines that a program printed.
pub(crate) fn tail(ran: &Ran) -> Vec<String> {
    const LINES: usize = 6;
    let mut tail = Vec::new();
    for (what, text) in [("stdout", ran.out()), ("stderr", ran.err())] {
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(LINES)..];
        tail.extend(last.iter().map(|line| format!("{what}: {line}")));
    }
    tail
}

/// What comes out of a pipe, for one who waits for it.
#[derive(Default)]
struct Output {
    /// The bytes, and whether no more come.
    state: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

impl Output {
    fn collect(&self, mut pipe: Box<dyn Read + Send>) {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = pipe.read(&mut buffer) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.0.len() < MOST_OUTPUT {
                state.0.extend(&buffer[..len]);
            }
            self.more.notify_all();
        }
        self.close();
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.more.notify_all();
    }

    fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits for `text` behind `from`; gives the place behind it, nothing if the program ended before.
    fn wait_for(&self, text: &[u8], from: usize) -> Option<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let new = state.0.get(from..).unwrap_or_default();
            if text.is_empty() {
                return Some(from);
            }
            if let Some(at) = new.windows(text.len()).position(|window| window == text) {
                return Some(from + at + text.len());
            }
            if state.1 {
                return None;
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Gives a program its stdin. One that ends without having read everything is no failure.
fn feed(
    mut stdin: ChildStdin,
    input: &[u8],
    replies: &[(Vec<u8>, Vec<u8>)],
    at_cue: Option<(Receiver<()>, Vec<u8>)>,
    printed: &Output,
    hold: bool,
) {
    let feed = || -> io::Result<()> {
        stdin.write_all(input)?;
        let mut seen = 0;
        for (text, bytes) in replies {
            let Some(at) = printed.wait_for(text, seen) else { break };
            seen = at;
            stdin.write_all(bytes)?;
            stdin.flush()?;
        }
        if let Some((cue, bytes)) = at_cue
            && cue.recv().is_ok()
        {
            stdin.write_all(&bytes)?;
        }
        Ok(())
    };
    let _ = feed();
    if hold {
        printed.wait_for(b"\0nothing prints this", usize::MAX);
    }
}
