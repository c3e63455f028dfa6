//! One program in one resumed lab: its streams, its signals, its terminal, its end.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use cli::CannotPrint;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::process::{Signal, getegid, geteuid, getgroups, getpid, kill_process, umask};
use signal_hook::consts::signal::*;
use signal_hook::iterator::Signals;

use crate::MIN_TIMER_PERIOD_US;
use crate::parts::Progress;
use crate::protocol::{Decoder, Exec, Frame, MAX_DATA, Stream, WINDOW};
use crate::qemu::Machine;
use crate::state::State;
use crate::terminal::{self, Terminal};

/// How long a resumed lab may take until the program runs.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What to run, and as whom.
pub struct Program {
    /// The program and its arguments.
    pub argv: Vec<OsString>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its environment.
    pub env: Vec<(OsString, OsString)>,
    /// Its user, group and supplementary groups.
    pub user: (u32, u32, Vec<u32>),
    /// KVM's parameter `min_timer_period_us`, if it is not to stay as it is.
    pub min_timer_period_us: Option<u32>,
}

impl Program {
    /// A program with this process's own folder, environment and user.
    ///
    /// # Errors
    /// The working directory has been removed, or the variable [`crate::MIN_TIMER_PERIOD_US`] has no
    /// number.
    pub fn new(argv: Vec<OsString>) -> Result<Program> {
        let groups = getgroups()?.into_iter().map(|group| group.as_raw()).collect();
        Ok(Program {
            argv,
            cwd: std::env::current_dir().context("the working directory is gone")?,
            env: std::env::vars_os().collect(),
            user: (geteuid().as_raw(), getegid().as_raw(), groups),
            min_timer_period_us: min_timer_period_us(std::env::var_os(MIN_TIMER_PERIOD_US))?,
        })
    }

    fn request(&self, terminal: Option<&Terminal>) -> Exec {
        let (uid, gid, ref groups) = self.user;
        // There is no other way to read it; no other thread runs yet.
        let mask = umask(Mode::empty());
        umask(mask);
        Exec {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            uid,
            gid,
            groups: groups.clone(),
            umask: mask.as_raw_mode(),
            cwd: self.cwd.as_os_str().as_bytes().to_vec(),
            argv: self.argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
            env: self
                .env
                .iter()
                .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
                .collect(),
            min_timer_period_us: self.min_timer_period_us,
            terminals: terminal::terminals(),
            modes: terminal.map(Terminal::modes).unwrap_or_default(),
            size: terminal.map(Terminal::size).unwrap_or_default(),
        }
    }
}

/// What the variable asks for; `None` if it is not set, or empty.
fn min_timer_period_us(variable: Option<OsString>) -> Result<Option<u32>> {
    let Some(value) = variable.filter(|value| !value.is_empty()) else { return Ok(None) };
    let period = value.to_str().and_then(|digits| digits.parse().ok());
    period.map(Some).with_context(|| {
        format!(
            "{MIN_TIMER_PERIOD_US} is {value:?}: set it to a number of microseconds, such as 50000, \
             or unset it"
        )
    })
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

impl End {
    /// The exit code that a shell would show.
    pub fn code(self) -> u8 {
        match self {
            End::Exited(code) => code,
            End::Killed(signal) => 128u8.wrapping_add(signal as u8),
        }
    }
}

enum Event {
    Frame(Frame),
    /// The port is closed, or what came from it is no frame.
    Closed(String),
    Signal(i32),
}

/// Runs a program in the lab, with this process's own standard streams. A saved lab that QEMU cannot
/// resume is made anew once.
///
/// This takes signals and stdin over for the rest of the process, so it is meant to be called once,
/// and from a thread that lives as long as the lab should.
///
/// # Errors
/// The lab doesn't come up, or breaks down before the program has ended.
pub fn run(state: State, program: &Program, progress: Progress<'_>) -> Result<End> {
    let (events, inbox) = channel();
    let handled = [SIGWINCH, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGUSR1, SIGUSR2];
    let mut signals = Signals::new(handled)?;
    let to_inbox = events.clone();
    thread::spawn(move || {
        for signal in signals.forever() {
            if to_inbox.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
    let first = attempt(&state, program, &events, &inbox);
    let Some(why) = first.as_ref().err().and_then(|error| error.downcast_ref::<NotResumed>())
    else {
        return first;
    };
    progress(&format!("{why}; making it anew"));
    state.discard()?;
    drop(state);
    attempt(&State::ensure(progress)?, program, &events, &inbox)
}

/// The saved lab has come to nothing before the program ran: what was saved may have been damaged.
#[derive(Debug)]
struct NotResumed(String);

impl std::fmt::Display for NotResumed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the saved lab cannot be resumed: {}", self.0)
    }
}

impl std::error::Error for NotResumed {}

/// Resumes the lab and runs the program in it.
fn attempt(
    state: &State,
    program: &Program,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<End> {
    let terminal = Terminal::open();
    let request = program.request(terminal.as_ref());
    let machine = state.resume().map_err(|error| NotResumed(format!("{error:#}")))?;
    let port = Port::new(machine.port.try_clone()?);
    port.send(&Frame::Exec(request));
    let reader = machine.port.try_clone()?;
    let events = events.clone();
    thread::spawn(move || read_frames(reader, &events));
    Session {
        machine,
        port,
        terminal,
        inbox,
        state,
        started: false,
        writers: HashMap::new(),
        printed: Ok(()),
    }
    .run()
}

/// The port's sending side, for several threads.
#[derive(Clone)]
struct Port {
    stream: Arc<Mutex<UnixStream>>,
    /// How many bytes of stdin may be sent.
    credit: Arc<(Mutex<Credit>, Condvar)>,
}

struct Credit {
    bytes: usize,
    /// The program has closed its stdin.
    closed: bool,
}

impl Port {
    fn new(stream: UnixStream) -> Port {
        let credit = Credit { bytes: WINDOW, closed: false };
        Port {
            stream: Arc::new(Mutex::new(stream)),
            credit: Arc::new((Mutex::new(credit), Condvar::new())),
        }
    }

    /// Sends a frame. That the other side has gone shows at the receiving side.
    fn send(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.write_all(&bytes);
    }

    fn change_credit(&self, change: impl FnOnce(&mut Credit)) {
        change(&mut self.credit.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.credit.1.notify_all();
    }

    /// Waits until stdin may be sent; `None` if the program wants no more of it.
    fn wait_for_credit(&self) -> Option<usize> {
        let credit = self.credit.0.lock().unwrap_or_else(PoisonError::into_inner);
        let credit = self
            .credit
            .1
            .wait_while(credit, |credit| credit.bytes == 0 && !credit.closed)
            .unwrap_or_else(PoisonError::into_inner);
        (!credit.closed).then_some(credit.bytes)
    }
}

fn read_frames(mut port: UnixStream, events: &Sender<Event>) {
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 64 << 10];
    let closed = loop {
        match port.read(&mut buffer) {
            Ok(0) => break "the machine has ended".to_owned(),
            Ok(bytes) => decoder.push(&buffer[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break error.to_string(),
        }
        loop {
            match decoder.next_frame() {
                Ok(None) => break,
                Ok(Some(frame)) => {
                    if events.send(Event::Frame(frame)).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    let _ = events.send(Event::Closed(format!("it sent {error}")));
                    return;
                }
            }
        }
    };
    let _ = events.send(Event::Closed(closed));
}

/// Carries stdin to the program, as far as the program takes it.
fn read_stdin(port: &Port) {
    let Ok(mut stdin) = rustix::io::dup(io::stdin()).map(File::from) else { return };
    let mut buffer = vec![0; MAX_DATA];
    while let Some(room) = port.wait_for_credit() {
        match stdin.read(&mut buffer[..room.min(MAX_DATA)]) {
            Ok(0) => break,
            Ok(bytes) => {
                port.change_credit(|credit| credit.bytes -= bytes);
                port.send(&Frame::Data(Stream::Stdin, buffer[..bytes].to_vec()));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None);
            }
            Err(_) => break,
        }
    }
    port.send(&Frame::Eof(Stream::Stdin));
}

/// Writes one of the program's outputs, and gives credit for it. Returns why that was not possible to the
/// end, unless its reader has just left.
fn write_stream(
    stream: Stream,
    mut file: File,
    chunks: &Receiver<Vec<u8>>,
    port: &Port,
) -> io::Result<()> {
    let mut written = Ok(());
    for chunk in chunks {
        if written.is_ok() {
            written = write_all(&mut file, &chunk);
            if written.is_err() {
                port.send(&Frame::Eof(stream));
            }
        }
        port.send(&Frame::Credit(stream, chunk.len() as u32));
    }
    written.or_else(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

/// `write_all` for a file that another process may have made non-blocking.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How a stream's bytes reach the thread that writes them, and the thread.
type Writer = (Sender<Vec<u8>>, JoinHandle<io::Result<()>>);

struct Session<'lab> {
    // Dropped in this order: the terminal is restored before QEMU's end is waited for.
    terminal: Option<Terminal>,
    machine: Machine,
    port: Port,
    inbox: &'lab Receiver<Event>,
    state: &'lab State,
    started: bool,
    writers: HashMap<u8, Writer>,
    /// Whether all that came for stdout could be written.
    printed: io::Result<()>,
}

impl Session<'_> {
    fn run(mut self) -> Result<End> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let event = if self.started {
                self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            };
            match event {
                Ok(Event::Frame(frame)) => {
                    if let Some(end) = self.obey(frame)? {
                        return Ok(end);
                    }
                }
                Ok(Event::Signal(signal)) => {
                    if let Some(end) = self.signal(signal) {
                        return Ok(end);
                    }
                }
                Ok(Event::Closed(why)) if !self.started => {
                    return Err(NotResumed(why + &self.machine.last_words()).into());
                }
                Ok(Event::Closed(why)) => return self.broken(&why),
                Err(RecvTimeoutError::Timeout) => {
                    let limit = START_LIMIT.as_secs();
                    self.state.discard()?;
                    return self.broken(&format!(
                        "the program did not start within {limit} s; the next run makes the lab anew"
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => return self.broken("its reader is gone"),
            }
        }
    }

    fn broken(mut self, why: &str) -> Result<End> {
        drop(self.terminal.take());
        self.finish_output();
        let words = self.machine.last_words();
        bail!("the lab broke down: {why}{words}")
    }

    fn obey(&mut self, frame: Frame) -> Result<Option<End>> {
        match frame {
            Frame::Started => {
                self.started = true;
                let port = self.port.clone();
                if terminal::terminals()[0]
                    && let Some(terminal) = &mut self.terminal
                {
                    terminal.set_raw();
                }
                thread::spawn(move || read_stdin(&port));
            }
            Frame::Failed(why) => bail!("the lab cannot run the program: {why}"),
            Frame::Data(stream, bytes) => self.write(stream, bytes)?,
            Frame::Eof(Stream::Stdin) => self.port.change_credit(|credit| credit.closed = true),
            Frame::Credit(Stream::Stdin, bytes) => {
                self.port.change_credit(|credit| credit.bytes += bytes as usize);
            }
            Frame::Eof(stream) => self.close(stream),
            Frame::Exited(code) => {
                self.finish_output();
                self.printed().map_err(CannotPrint)?;
                return Ok(Some(End::Exited(code as u8)));
            }
            Frame::Killed(signal) => {
                self.finish_output();
                self.printed().map_err(CannotPrint)?;
                return Ok(Some(End::Killed(signal)));
            }
            frame @ (Frame::Ready(_)
            | Frame::Exec(_)
            | Frame::Credit(..)
            | Frame::Resize(_)
            | Frame::Signal(_)) => bail!("the lab sent what only the runner says: {frame:?}"),
        }
        Ok(None)
    }

    /// Hands bytes to the thread that writes this stream.
    fn write(&mut self, stream: Stream, bytes: Vec<u8>) -> Result<()> {
        if !self.writers.contains_key(&(stream as u8)) {
            let file: File = match (stream, &self.terminal) {
                (Stream::Stdout, _) => rustix::io::dup(io::stdout())?.into(),
                (Stream::Stderr, _) => rustix::io::dup(io::stderr())?.into(),
                (Stream::Terminal, Some(terminal)) => terminal.writer()?,
                (Stream::Terminal, None) | (Stream::Stdin, _) => {
                    bail!("the lab sent output for a stream that it hasn't")
                }
            };
            let (sender, chunks) = channel();
            let port = self.port.clone();
            let writer = thread::spawn(move || write_stream(stream, file, &chunks, &port));
            self.writers.insert(stream as u8, (sender, writer));
        }
        // Its thread lives until the sender goes.
        let _ = self.writers[&(stream as u8)].0.send(bytes);
        Ok(())
    }

    /// The program has closed an output: whoever reads ours sees its end, too.
    fn close(&mut self, stream: Stream) {
        if let Some(writer) = self.writers.remove(&(stream as u8)) {
            self.finish_stream(stream as u8, writer);
        }
        let Ok(null) = File::options().write(true).open("/dev/null").map(OwnedFd::from) else {
            return;
        };
        let _ = match stream {
            Stream::Stdout => rustix::stdio::dup2_stdout(null),
            // stderr stays: this process may still have something to say.
            Stream::Stdin | Stream::Stderr | Stream::Terminal => Ok(()),
        };
    }

    /// Waits until a stream's thread has written everything.
    fn finish_stream(&mut self, stream: u8, (sender, writer): Writer) {
        drop(sender);
        if let Ok(written) = writer.join()
            && stream == Stream::Stdout as u8
        {
            self.printed = written;
        }
    }

    fn printed(&mut self) -> io::Result<()> {
        mem::replace(&mut self.printed, Ok(()))
    }

    fn finish_output(&mut self) {
        for (stream, writer) in mem::take(&mut self.writers) {
            self.finish_stream(stream, writer);
        }
        let _ = self.machine.port.shutdown(Shutdown::Write);
    }

    /// A signal came to this process.
    fn signal(&mut self, signal: i32) -> Option<End> {
        match signal {
            SIGWINCH => {
                let size = self.terminal.as_ref().map(Terminal::size).unwrap_or_default();
                self.port.send(&Frame::Resize(size));
            }
            SIGTSTP => self.suspend(),
            // Nothing runs yet which could decide.
            _ if !self.started => return Some(End::Killed(signal)),
            _ => self.port.send(&Frame::Signal(signal)),
        }
        None
    }

    /// Stops the whole lab until this process is told to go on.
    fn suspend(&mut self) {
        let was_raw = self.terminal.as_mut().is_some_and(|terminal| {
            let raw = terminal.is_raw();
            terminal.restore();
            raw
        });
        self.machine.pause(true);
        let _ = kill_process(getpid(), Signal::STOP);
        self.machine.pause(false);
        if let Some(terminal) = &mut self.terminal {
            if was_raw {
                terminal.set_raw();
            }
            self.port.send(&Frame::Resize(terminal.size()));
        }
    }
}
