//! The console of stages 06 to 08: a person's terminal, or a pipe, becomes the guest's.
//!
//! On a terminal the keys go to the guest one by one, Ctrl-C included, and `Ctrl-A` followed by a
//! letter talks to the program instead. What is piped in is typed into the guest as fast as it
//! reads, and followed by Ctrl-D, which ends a shell. The terminal's modes are restored whatever
//! happens.

#[cfg(feature = "stage07")]
mod display;
#[cfg(feature = "stage08")]
mod record;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use std::{panic, thread};

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use common::run::{Ending, Stop, thread_named};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{CannotPrint, Ended, print_error};

/// Ctrl-A, which begins a command to the program itself.
const ESCAPE: u8 = 0x01;
/// Ctrl-D, which a terminal's end of file is.
const END: u8 = 0x04;

const KEYS: &str = "\
Ctrl-A x       leave: end the machine
Ctrl-A h       this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest";

/// A key that a machine adds.
struct Command {
    key: u8,
    /// What it does, in a few words.
    help: &'static str,
    /// Does it, and returns what is to be told.
    act: Box<dyn Fn() -> String + Send>,
}

/// What Ctrl-A h says.
fn help_text(commands: &[Command]) -> String {
    let line =
        |Command { key, help, .. }: &Command| format!("Ctrl-A {}       {help}\n", *key as char);
    commands.iter().map(line).chain([KEYS.to_owned()]).collect()
}

/// What `--help` says of the console.
pub(crate) const HELP: &str = "\
Console: every key goes to the guest, Ctrl-C too. Ctrl-A x leaves, Ctrl-A h
helps, Ctrl-A Ctrl-A sends Ctrl-A. What is piped into stdin is typed into the
guest, and then Ctrl-D.";

/// The command line's part of the console.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Console")]
pub struct Flags {
    /// End with exit code 0 as soon as the console has printed TEXT
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub exit_when: Option<String>,

    /// End with exit code 4 if the guest has not ended after SECS seconds
    #[arg(long, value_name = "SECS", allow_hyphen_values = true, value_parser = crate::seconds)]
    pub timeout: Option<Duration>,
}

/// Ends the drawing, and gives what is to be printed when the machine has ended.
type LastPicture = Box<dyn FnOnce() -> String + Send>;

/// The console, from the machine's start to its end.
pub struct Console {
    screen: Screen,
    stop: Stop,
    raw: bool,
    /// When the time given is over.
    deadline: Option<Instant>,
    /// While the guest's text screen is drawn.
    last_picture: Option<LastPicture>,
    /// Whether the drawing has help above it.
    notice: Option<Arc<AtomicBool>>,
    /// What the machine adds to Ctrl-A.
    commands: Arc<Mutex<Vec<Command>>>,
}

/// Refuses an option whose lines, on stderr, would be written into the picture of a text screen.
#[cfg(feature = "stage07")]
pub fn check_beside_picture(option: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        !(io::stdout().is_terminal() && io::stderr().is_terminal()),
        "{option} would write into the text screen; send it to a file: 2> log.txt"
    );
    Ok(())
}

impl Console {
    /// Takes over stdin and stdout. If stdin is a terminal, it is in raw mode from here on until
    /// this is dropped. `stop` ends the machine when somebody leaves.
    pub fn open(flags: &Flags, stop: Stop) -> io::Result<Self> {
        // Where stdout is closed, a write shall fail, not kill us with the terminal still in raw
        // mode.
        signal_hook::flag::register(SIGPIPE, Arc::default())?;
        let leave = stop.clone();
        let screen = Screen::new(io::stdout(), flags.exit_when.as_deref(), move || {
            leave.now(Ending::Left);
        })?;
        let raw = io::stdin().is_terminal();
        if raw {
            terminal::take()?;
        }
        let deadline = flags.timeout.map(|timeout| Instant::now() + timeout);
        Ok(Self {
            screen,
            stop,
            raw,
            deadline,
            last_picture: None,
            notice: None,
            commands: Arc::default(),
        })
    }

    /// Has the terminal begin a line for a line feed alone, as it does for other programs: there are guests, xv6 for
    /// one, that send no carriage return.
    #[cfg(feature = "stage07")]
    pub fn return_carriages(&self) -> io::Result<()> {
        if self.raw { terminal::return_carriages() } else { Ok(()) }
    }

    /// Where the guest's output goes. What has come together is written at once, by a thread of its
    /// own: a console that is slow to print does not slow the guest down, up to 64 KiB.
    pub fn screen(&self) -> Screen {
        self.screen.clone()
    }

    /// Has all that is printed from here on written to a new file, too, with its times: an asciicast v2.
    #[cfg(feature = "stage08")]
    pub fn record(&self, path: &std::path::Path) -> anyhow::Result<()> {
        let recorder = record::Recorder::start(path, self.size())?;
        *lock(&self.screen.shared.recorder) = Some(recorder);
        let shared = Arc::clone(&self.screen.shared);
        Ok(self.when_resized(move |columns, rows| {
            if let Some(recorder) = &mut *lock(&shared.recorder) {
                recorder.resized(columns, rows);
            }
        })?)
    }

    /// Has `f` called whenever a [`Hurried`] screen has room again that it hadn't.
    #[cfg(feature = "stage08")]
    pub fn when_printed(&self, f: impl Fn() + Send + 'static) {
        lock(&self.screen.shared.output).room = Some(Box::new(f));
    }

    /// How large the window is, in columns and rows, if stdout is a terminal that knows.
    #[cfg(feature = "stage08")]
    pub fn size(&self) -> Option<(u16, u16)> {
        terminal::size()
    }

    /// Has `f` called with the window's new size whenever it changes.
    #[cfg(feature = "stage08")]
    pub fn when_resized(&self, f: impl Fn(u16, u16) + Send + 'static) -> io::Result<()> {
        let mut signals = Signals::new([signal_hook::consts::SIGWINCH])?;
        spawn("window", move || {
            for _ in signals.forever() {
                if let Some((columns, rows)) = terminal::size() {
                    f(columns, rows);
                }
            }
        })
    }

    /// Has Ctrl-A s, or SIGUSR1, end the machine to have it saved.
    #[cfg(feature = "stage08")]
    pub fn let_save(&self) -> io::Result<()> {
        let key = self.stop.clone();
        self.on_key(b's', "save the machine, and end it", move || {
            key.now(Ending::Saved);
            String::new()
        });
        let stop = self.stop.clone();
        let mut signals = Signals::new([signal_hook::consts::SIGUSR1])?;
        spawn("save", move || signals.forever().for_each(|_| stop.now(Ending::Saved)))
    }

    /// Has Ctrl-A and `key` call `act` and print what it returns, if that is something. `help` says in a few words what
    /// it does.
    #[cfg(feature = "stage08")]
    pub fn on_key(&self, key: u8, help: &'static str, act: impl Fn() -> String + Send + 'static) {
        lock(&self.commands).push(Command { key, help, act: Box::new(act) });
    }

    /// Starts typing: `guest` gets the keys, and may block for as long as it has no room for them.
    pub fn type_into(&self, mut guest: impl FnMut(&[u8]) + Send + 'static) -> io::Result<()> {
        // The reader has to see Ctrl-A x even while the guest takes no keys, so typing has a
        // thread, too.
        let (sender, keys): (SyncSender<Vec<u8>>, Receiver<_>) = sync_channel(64);
        spawn("typist", move || keys.iter().for_each(|keys| guest(&keys)))?;
        let (stop, screen, raw) = (self.stop.clone(), self.screen(), self.raw);
        let leave = move |ending| {
            if ending == Ending::Left {
                screen.hurry();
            }
            stop.now(ending);
        };
        let (notice, commands) = (self.notice.clone(), Arc::clone(&self.commands));
        let help = move |wanted| match &notice {
            Some(notice) => notice.store(wanted, Ordering::Relaxed),
            // In raw mode the carriage return is ours to print.
            None if wanted => {
                say(&format!("\r\n{}\r\n", help_text(&lock(&commands)).replace('\n', "\r\n")));
            }
            None => {}
        };
        let commands = Arc::clone(&self.commands);
        let read = move || match raw {
            true => read_keys(&sender, leave, help, &commands),
            false => read_pipe(&sender),
        };
        spawn("stdin", read)
    }

    /// Has the first `SIGTERM` ask the guest to shut down by `press`, which says whether the guest listens. The second
    /// one, or the first if it doesn't, ends the program.
    #[cfg(feature = "stage08")]
    pub fn on_sigterm(&self, press: impl Fn() -> bool + Send + 'static) -> io::Result<()> {
        terminal::on_sigterm(Box::new(press))
    }

    /// Prints what the guest has left, gives the terminal back, and says how a machine ended that
    /// did not end well.
    pub fn finish(mut self, ending: &Ending) -> Ended {
        let drawn = self.last_picture.take().map(|end| {
            let text = end();
            self.screen.drain_while_read(PATIENCE);
            terminal::leave_screen();
            // As all that the guest prints: `error` below tells why it failed.
            let _ = self.screen.write_all(text.as_bytes());
        });
        let ended = !matches!(ending, Ending::Left | Ending::Saved | Ending::TimedOut);
        let late = ended && !self.screen.drain(self.deadline);
        let (raw, screen) = (self.raw, self.screen());
        drop(self);
        // The guest was cut off, as a rule behind its prompt: what comes next begins a line of its own.
        if raw && !ended && drawn.is_none() {
            say("\n");
        }
        #[cfg(feature = "stage08")]
        if let Some(recorder) = lock(&screen.shared.recorder).take() {
            recorder.tell();
        }
        match ending {
            Ending::PowerOff | Ending::Reset | Ending::Exited(0) | Ending::Left if late => {
                crate::eprintln!("the time given with --timeout ran out: nobody reads the console");
                Ended::TimedOut
            }
            Ending::PowerOff | Ending::Reset | Ending::Exited(0) | Ending::Left | Ending::Saved => {
                match screen.error() {
                    None => Ended::Well,
                    Some(error) => {
                        print_error(&CannotPrint(error).into());
                        Ended::HostCannot
                    }
                }
            }
            Ending::TimedOut => {
                crate::eprintln!("the time given with --timeout ran out: the guest was stopped");
                Ended::TimedOut
            }
            Ending::Exited(code) => {
                crate::eprintln!("the guest ended with code {code}: it says that it failed");
                Ended::GuestCrashed
            }
            Ending::Panicked(reason) => {
                crate::eprintln!("the guest's kernel panicked: {reason}");
                Ended::GuestCrashed
            }
            Ending::Crashed(crash) => {
                crate::eprintln!("the guest crashed: {crash}");
                Ended::GuestCrashed
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Whoever reads stdout may have stopped doing so: no progress for a second is the end.
        self.screen.drain_while_read(PATIENCE);
        if self.raw {
            terminal::restore();
        }
    }
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread_named(name).spawn(f).map(drop)
}

/// Reads a terminal until its end.
fn read_keys(
    guest: &SyncSender<Vec<u8>>,
    leave: impl Fn(Ending),
    help: impl Fn(bool),
    commands: &Mutex<Vec<Command>>,
) {
    let mut keyboard = Keyboard::default();
    let mut buffer = [0; 256];
    loop {
        let read = match io::stdin().read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read.unwrap_or(0),
        };
        if read == 0 {
            // The terminal is gone; nobody can leave the machine any more.
            return leave(Ending::Left);
        }
        let mut keys = Vec::new();
        for &byte in &buffer[..read] {
            match keyboard.press(byte) {
                Press::Key(key) => {
                    help(false);
                    keys.push(key);
                }
                Press::Leave => return leave(Ending::Left),
                Press::Help => help(true),
                Press::Other(key) => {
                    let commands = lock(commands);
                    match commands.iter().find(|command| command.key == key) {
                        Some(command) => match (command.act)().as_str() {
                            "" => {}
                            text => say(&format!("\r\n{text}\r\n")),
                        },
                        None => say("\x07"),
                    }
                }
                Press::Nothing => {}
            }
        }
        if keys.is_empty() {
            continue;
        }
        match guest.try_send(keys) {
            Ok(()) => {}
            // The guest takes nothing, and the person types on: ring the bell.
            Err(TrySendError::Full(_)) => say("\x07"),
            Err(TrySendError::Disconnected(_)) => return,
        }
    }
}

fn say(text: &str) {
    crate::eprint(format_args!("{text}"));
}

/// How long is waited for stdout's reader to take anything.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often Ctrl-D is typed at the end of a pipe.
const END_EVERY: Duration = Duration::from_millis(500);

/// Reads a pipe or a file until its end, and types Ctrl-D then, again and again: a guest that is
/// still starting forgets the first one, and a program which reads until the end takes one for
/// itself.
fn read_pipe(guest: &SyncSender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    loop {
        let read = match io::stdin().read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read.unwrap_or(0),
        };
        let keys = if read == 0 { vec![END] } else { buffer[..read].to_vec() };
        // It fails when the machine has ended.
        if guest.send(keys).is_err() {
            return;
        }
        if read == 0 {
            thread::sleep(END_EVERY);
        }
    }
}

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Press {
    Key(u8),
    Leave,
    Help,
    /// What the machine adds, if it does.
    Other(u8),
    Nothing,
}

/// Knows whether the last key was Ctrl-A.
#[derive(Debug, Default)]
struct Keyboard {
    escaped: bool,
}

impl Keyboard {
    fn press(&mut self, byte: u8) -> Press {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                Press::Nothing
            }
            (false, key) => Press::Key(key),
            (true, ESCAPE) => Press::Key(ESCAPE),
            (true, b'x' | b'X') => Press::Leave,
            (true, b'h' | b'H' | b'?') => Press::Help,
            (true, key) => Press::Other(key.to_ascii_lowercase()),
        }
    }
}

/// How much output may wait to be printed.
const WAITING: usize = 64 << 10;

/// A guest's output on its way to stdout. Clones print to the same place.
#[derive(Clone, Debug)]
pub struct Screen {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    output: Mutex<Output>,
    /// What else gets all that is printed.
    #[cfg(feature = "stage08")]
    recorder: Mutex<Option<record::Recorder>>,
    /// Something was added or printed.
    changed: Condvar,
}

#[derive(Default)]
struct Output {
    waiting: VecDeque<u8>,
    /// A thread is printing what it has taken.
    printing: bool,
    /// How much has been printed: whether this grows is whether somebody reads.
    printed: u64,
    /// Nothing more is to be printed: the text came, or stdout is closed.
    closed: bool,
    /// Why stdout took no more, if its reader has not just left.
    error: Option<io::Error>,
    /// Somebody has left: nobody waits any more until all is printed.
    hurry: bool,
    wanted: Option<Wanted>,
    /// A [`Hurried`] screen had no room.
    starved: bool,
    /// What is called when it has room again.
    room: Option<Box<dyn Fn() + Send>>,
    leave: Option<Box<dyn Fn() + Send>>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

impl Screen {
    /// Prints to `out`, and calls `leave` when it has taken `wanted` or can print no more.
    fn new(
        mut out: impl Write + Send + 'static,
        wanted: Option<&str>,
        leave: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        {
            let mut output = lock(&shared.output);
            output.wanted = wanted.map(Wanted::new);
            output.leave = Some(Box::new(leave));
        }
        let printer = Arc::clone(&shared);
        spawn("stdout", move || {
            loop {
                let mut bytes = {
                    let mut output = lock(&printer.output);
                    while output.waiting.is_empty() {
                        output = wait(&printer.changed, output);
                    }
                    output.printing = true;
                    std::mem::take(&mut output.waiting)
                };
                let bytes = bytes.make_contiguous();
                let printed = out.write_all(bytes).and_then(|()| out.flush());
                #[cfg(feature = "stage08")]
                if let Some(recorder) = &mut *lock(&printer.recorder) {
                    recorder.printed(bytes);
                }
                let mut output = lock(&printer.output);
                output.printing = false;
                output.printed += bytes.len() as u64;
                if let Err(error) = printed {
                    if error.kind() != ErrorKind::BrokenPipe {
                        output.error.get_or_insert(error);
                    }
                    output.close();
                }
                if std::mem::take(&mut output.starved)
                    && let Some(room) = &output.room
                {
                    room();
                }
                printer.changed.notify_all();
            }
        })?;
        Ok(Self { shared })
    }

    /// Waits until all is printed or somebody has left. False if it was not before `deadline`.
    fn drain(&self, deadline: Option<Instant>) -> bool {
        let mut output = lock(&self.shared.output);
        while output.is_pending() && !output.hurry {
            output = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => wait(&self.shared.changed, output),
                Some(Duration::ZERO) => return false,
                Some(left) => wait_for(&self.shared.changed, output, left).0,
            };
        }
        true
    }

    /// Waits until all is printed or nothing has been printed for so long.
    fn drain_while_read(&self, patience: Duration) {
        let mut output = lock(&self.shared.output);
        while output.is_pending() {
            let before = output.printed;
            let timed_out;
            (output, timed_out) = wait_for(&self.shared.changed, output, patience);
            if timed_out && output.printed == before {
                return;
            }
        }
    }

    /// Whether something is still to be printed.
    #[cfg(feature = "stage07")]
    fn is_pending(&self) -> bool {
        lock(&self.shared.output).is_pending()
    }

    /// Ends [`Screen::drain`].
    fn hurry(&self) {
        lock(&self.shared.output).hurry = true;
        self.shared.changed.notify_all();
    }

    /// Why stdout took no more, except that its reader has left.
    fn error(&self) -> Option<io::Error> {
        lock(&self.shared.output).error.take()
    }
}

impl Output {
    fn is_pending(&self) -> bool {
        self.printing || !self.waiting.is_empty()
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING && !self.closed
    }

    fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true)
            && let Some(leave) = &self.leave
        {
            leave();
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.shared.output);
        while output.is_full() {
            output = wait(&self.shared.changed, output);
        }
        self.add(&mut output, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    /// Has `bytes` printed, unless nothing more is to be.
    fn add(&self, output: &mut Output, bytes: &[u8]) {
        if output.closed {
            return;
        }
        // The printer looks again by itself when it has printed what it took, and waking it costs a
        // system call: a guest prints byte by byte.
        let asleep = output.waiting.is_empty() && !output.printing;
        let end = output.wanted.as_mut().and_then(|wanted| wanted.find(bytes));
        output.waiting.extend(&bytes[..end.unwrap_or(bytes.len())]);
        if end.is_some() {
            output.close();
        }
        if asleep {
            self.shared.changed.notify_all();
        }
    }

    /// The same for a device that may not wait.
    #[cfg(feature = "stage08")]
    pub fn hurried(&self) -> Hurried {
        Hurried(self.clone())
    }
}

/// A [`Screen`] that says [`ErrorKind::WouldBlock`] where the other one waits. [`Console::when_printed`] tells when
/// there is room.
#[cfg(feature = "stage08")]
pub struct Hurried(Screen);

#[cfg(feature = "stage08")]
impl Write for Hurried {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.0.shared.output);
        if output.is_full() {
            output.starved = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        self.0.add(&mut output, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// The same for `limit` at most, and whether it was so long.
fn wait_for<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> (MutexGuard<'a, T>, bool) {
    let waited = changed.wait_timeout(guard, limit);
    let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
    (guard, timeout.timed_out())
}

/// The text of `--exit-when`, which may come in pieces.
#[derive(Debug)]
struct Wanted {
    text: Vec<u8>,
    /// The end of what was printed, shorter than `text`.
    tail: Vec<u8>,
}

impl Wanted {
    fn new(text: &str) -> Self {
        Self { text: text.into(), tail: Vec::new() }
    }

    /// Where in `bytes` the text ends, if it does.
    fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.tail.len();
        self.tail.extend(bytes);
        let found = self.tail.windows(self.text.len()).position(|window| window == self.text);
        if let Some(start) = found {
            return Some(start + self.text.len() - before);
        }
        let keep = self.tail.len().min(self.text.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        None
    }
}

/// The terminal's modes and screens, of which a process has one.
mod terminal {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    /// What brings the alternate screen up, and down again, while it is up.
    static SCREEN: Mutex<Option<(String, String)>> = Mutex::new(None);
    /// What is on it is not what was drawn there.
    static SPOILT: AtomicBool = AtomicBool::new(false);

    /// The modes as they were, while they are changed.
    static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
    static WATCH: Once = Once::new();
    static WATCHED: AtomicBool = AtomicBool::new(false);
    /// What is printed is treated as it was before.
    static OUTPUT_AS_BEFORE: AtomicBool = AtomicBool::new(false);

    /// What the next `SIGTERM` does instead of ending the program, and whether it could.
    static ON_SIGTERM: Mutex<Option<Box<dyn Fn() -> bool + Send>>> = Mutex::new(None);

    #[cfg(feature = "stage08")]
    pub fn on_sigterm(press: Box<dyn Fn() -> bool + Send>) -> io::Result<()> {
        *lock(&ON_SIGTERM) = Some(press);
        watch()
    }

    /// Raw mode: keys are neither echoed nor gathered to lines, and none makes a signal.
    pub fn take() -> io::Result<()> {
        watch()?;
        let modes = tcgetattr(io::stdin())?;
        *lock(&BEFORE) = Some(modes.clone());
        set_raw(modes)
    }

    #[cfg(feature = "stage07")]
    pub fn return_carriages() -> io::Result<()> {
        OUTPUT_AS_BEFORE.store(true, Ordering::Relaxed);
        lock(&BEFORE).clone().map_or(Ok(()), set_raw)
    }

    fn set_raw(mut modes: Termios) -> io::Result<()> {
        let output = modes.output_modes;
        modes.make_raw();
        if OUTPUT_AS_BEFORE.load(Ordering::Relaxed) {
            modes.output_modes = output;
        }
        Ok(tcsetattr(io::stdin(), OptionalActions::Now, &modes)?)
    }

    /// Brings up the alternate screen by sending `enter`; `leave` will bring back the other one.
    #[cfg(feature = "stage07")]
    pub fn take_screen(enter: String, leave: String) -> io::Result<()> {
        watch()?;
        send(&enter);
        *lock(&SCREEN) = Some((enter, leave));
        Ok(())
    }

    /// The window's columns and rows.
    #[cfg(feature = "stage08")]
    pub fn size() -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }

    /// Whether the screen was lost since the last call.
    #[cfg(feature = "stage07")]
    pub fn is_spoilt() -> bool {
        SPOILT.swap(false, Ordering::Relaxed)
    }

    pub fn leave_screen() {
        if let Some((_, leave)) = lock(&SCREEN).take() {
            send(&leave);
        }
    }

    /// Sends a control sequence at once, unless the terminal takes nothing: nobody sees its screen then.
    fn send(text: &str) {
        let stdout = io::stdout();
        let mut writable = [PollFd::new(&stdout, PollFlags::OUT)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut writable, Some(&patience)) != Ok(0) {
            // Not by way of the standard library, whose lock may be held by a thread that waits for the terminal.
            let _ = rustix::io::write(rustix::stdio::stdout(), text.as_bytes());
        }
    }

    /// Gives the terminal back as it was.
    pub fn restore() {
        leave_screen();
        if let Some(modes) = lock(&BEFORE).take() {
            // If the terminal is gone, there is nothing to restore.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &modes);
        }
    }

    /// Restores the modes before a panic is reported and before a signal ends the process.
    fn watch() -> io::Result<()> {
        let mut result = Ok(());
        WATCH.call_once(|| {
            let report = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                report(info);
            }));
            let handled = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGCONT]);
            result = handled.and_then(|mut signals| {
                spawn("signals", move || signals.forever().for_each(on_signal))
            });
            WATCHED.store(result.is_ok(), Ordering::Relaxed);
        });
        if result.is_ok() && !WATCHED.load(Ordering::Relaxed) {
            return Err(ErrorKind::Other.into());
        }
        result
    }

    fn on_signal(signal: i32) {
        if signal == SIGCONT {
            // While we were stopped, the shell set the modes that it likes.
            if let Some(modes) = lock(&BEFORE).clone() {
                let _ = set_raw(modes);
            }
            if let Some((enter, _)) = &*lock(&SCREEN) {
                send(enter);
                SPOILT.store(true, Ordering::Relaxed);
            }
            return;
        }
        if signal == SIGTERM && lock(&ON_SIGTERM).take().is_some_and(|press| press()) {
            // In raw mode the guest's line has not been ended, and the carriage return is ours to print.
            let (before, after) =
                if lock(&BEFORE).is_some() { ("\r\n", "\r\n") } else { ("", "\n") };
            let text = "the guest was asked to shut down; a second SIGTERM ends it";
            say(&format!("{before}{text}{after}"));
            return;
        }
        restore();
        // Ends the process as the signal would have done.
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::channel;

    use proptest::prelude::*;
    use testkit::Printed;

    use super::*;

    fn presses(keys: &[u8]) -> Vec<Press> {
        let mut keyboard = Keyboard::default();
        keys.iter().map(|&key| keyboard.press(key)).filter(|&p| p != Press::Nothing).collect()
    }

    #[test]
    fn ctrl_a_begins_a_command() {
        use Press::*;
        assert_eq!(presses(b"x\x03"), [Key(b'x'), Key(3)]);
        assert_eq!(presses(b"\x01x"), [Leave]);
        assert_eq!(presses(b"\x01h\x01?"), [Help, Help]);
        assert_eq!(presses(b"\x01s\x01S"), [Other(b's'), Other(b's')]);
        assert_eq!(presses(b"\x01\x01x"), [Key(1), Key(b'x')]);
        assert_eq!(presses(b"\x01+x"), [Other(b'+'), Key(b'x')]);
    }

    #[test]
    fn the_text_ends_it_and_nothing_follows() {
        let paper = Printed::default();
        let left = Arc::new(AtomicU32::new(0));
        let leave = {
            let left = Arc::clone(&left);
            move || {
                left.fetch_add(1, Ordering::Relaxed);
            }
        };
        let mut screen = Screen::new(paper.clone(), Some("abc"), leave).unwrap();
        for piece in ["xxaba", "bcyy", "abc"] {
            screen.write_all(piece.as_bytes()).unwrap();
        }
        screen.drain(None);
        assert_eq!(paper.bytes(), b"xxababc");
        assert_eq!(left.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_closed_stdout_ends_the_machine() {
        let (pipe, out) = io::pipe().unwrap();
        drop(pipe);
        let (sender, left) = channel();
        let leave = move || sender.send(()).unwrap();
        let mut screen = Screen::new(out, None, leave).unwrap();
        screen.write_all(b"nobody reads this").unwrap();
        left.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_stdout_that_nobody_reads_is_given_up() {
        let (_pipe, out) = io::pipe().unwrap();
        let mut screen = Screen::new(out, None, || ()).unwrap();
        // More than a pipe holds.
        screen.write_all(&vec![b'x'; 1 << 20]).unwrap();
        screen.drain_while_read(Duration::from_millis(50));
        // Neither the time given nor a person who leaves has to wait for it.
        assert!(!screen.drain(Some(Instant::now() + Duration::from_millis(50))));
        let other = screen.clone();
        let drained = thread::spawn(move || other.drain(None));
        screen.hurry();
        assert!(drained.join().unwrap());
        assert!(screen.error().is_none());
    }

    #[cfg(feature = "stage08")]
    #[test]
    fn a_screen_in_a_hurry_does_not_wait_and_says_when_there_is_room() {
        let (mut pipe, out) = io::pipe().unwrap();
        let screen = Screen::new(out, None, || ()).unwrap();
        let (sender, room) = channel();
        lock(&screen.shared.output).room = Some(Box::new(move || sender.send(()).unwrap()));
        let mut hurried = screen.hurried();
        let mut written = 0;
        // More than a pipe and all buffers hold.
        while written < 1 << 20 && hurried.write(&[b'x'; 1024]).is_ok() {
            written += 1024;
        }
        assert!((WAITING..1 << 20).contains(&written), "{written}");
        assert!(room.try_recv().is_err());
        pipe.read_exact(&mut vec![0; written]).unwrap();
        room.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(hurried.write(b"more").unwrap(), 4);
    }

    #[test]
    fn a_full_disk_ends_the_machine_with_a_reason() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let (sender, left) = channel();
        let mut screen = Screen::new(full, None, move || sender.send(()).unwrap()).unwrap();
        screen.write_all(b"for nobody").unwrap();
        left.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(screen.error().unwrap().kind(), ErrorKind::StorageFull);
    }

    proptest! {
        #[test]
        fn a_text_in_pieces_is_found_where_it_ends(
            bytes in proptest::collection::vec(0..3_u8, 0..40),
            text in proptest::collection::vec(0..3_u8, 1..4),
            cuts in proptest::collection::vec(1..5_usize, 1..40),
        ) {
            let text = String::from_utf8(text).unwrap();
            let whole = bytes.windows(text.len()).position(|window| window == text.as_bytes());
            let mut wanted = Wanted::new(&text);
            let (mut start, mut found) = (0, None);
            for cut in cuts.iter().cycle() {
                let end = (start + cut).min(bytes.len());
                found = wanted.find(&bytes[start..end]).map(|at| start + at);
                start = end;
                if found.is_some() || start == bytes.len() {
                    break;
                }
            }
            prop_assert_eq!(found, whole.map(|at| at + text.len()));
        }
    }
}
