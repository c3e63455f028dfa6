//! What the eight programs share at their edges: exit codes, error lines, folders.
//!
//! `common` is the virtual machine and knows no terminal; this crate is where a program meets a
//! person. stdout belongs to the guest, stderr to the program.

#[cfg(feature = "stage03")]
pub mod autopsy;
pub mod cache;
#[cfg(feature = "cast")]
pub mod cast;
#[cfg(feature = "stage08")]
pub mod config;
#[cfg(feature = "stage06")]
pub mod console;
#[cfg(feature = "stage03")]
pub mod debug;
#[cfg(feature = "stage03")]
pub mod gdb;
#[cfg(feature = "stage07")]
pub mod keys;
#[cfg(feature = "stage07")]
pub mod list;
#[cfg(feature = "stage08")]
pub mod manual;
#[cfg(feature = "stage05")]
pub mod screen;
pub mod size;
#[cfg(feature = "stage03")]
mod trace;

use std::fmt::Arguments;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::error::ErrorKind;
use clap::{Command, Parser};
use common::error::Blame;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

/// The eight stages, which are packages' folders and programs' names alike.
pub const STAGES: [&str; 8] = [
    "01_create_vm",
    "02_memory",
    "03_vcpu",
    "04_pio",
    "05_mmio",
    "06_long_mode",
    "07_bootloader",
    "08_boot_linux",
];

/// What is to be printed cannot be: the disk is full, for instance.
#[derive(Debug, Error)]
#[error("cannot write to stdout: {0}; free some space, or print to another place")]
pub struct CannotPrint(#[from] pub io::Error);

/// How a program ended, as its exit code. The same for all stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ended {
    /// The guest ended as a guest should.
    Well = 0,
    /// The guest crashed, or said itself that it failed.
    GuestCrashed = 1,
    /// A file, a number or an option that was given cannot be used.
    BadInput = 2,
    /// This host cannot do it.
    HostCannot = 3,
    /// `--timeout` ran out before the guest ended.
    TimedOut = 4,
}

/// What `--help` of every stage ends with, and of those that have `--timeout`.
const EXIT_CODES: &str = "\
Exit codes: 0 the guest ended well, 1 it crashed or says that it failed,
2 bad input or usage, 3 this host cannot do it";
const TIMEOUT_CODE: &str = ", 4 --timeout ran out";

/// Parses the command line, runs `program`, and turns how it ended into the exit code; an error
/// becomes one line on stderr.
pub fn main<Args: Parser>(program: impl FnOnce(Args) -> anyhow::Result<Ended>) -> ExitCode {
    end_with_our_reader();
    let mut command = command::<Args>();
    let line = std::env::args_os().collect::<Vec<_>>();
    #[cfg(not(feature = "stage08"))]
    let parsed = command.try_get_matches_from_mut(line).map_err(anyhow::Error::from);
    #[cfg(feature = "stage08")]
    let parsed = config::matches(&mut command, line);
    #[cfg(feature = "stage08")]
    let parsed = parsed.and_then(|matches| {
        let asked = config::print(&command, &matches);
        if let Some(text) = asked.or_else(|| manual::print(&command, &matches)) {
            print(format_args!("{}", text?));
            std::process::exit(Ended::Well as i32);
        }
        Ok(matches)
    });
    let parsed = parsed.and_then(|matches| Ok(Args::from_arg_matches(&matches)?));
    let args = parsed.unwrap_or_else(|error| {
        match error.downcast_ref::<clap::Error>() {
            Some(asked) if !asked.use_stderr() => asked.exit(),
            Some(misuse) => print_error(&anyhow::anyhow!(usage(misuse))),
            None => print_error(&error),
        }
        std::process::exit(blamed(&error) as i32);
    });
    let ended = program(args).unwrap_or_else(|error| {
        print_error(&error);
        blamed(&error)
    });
    ExitCode::from(ended as u8)
}

/// What is wrong with a command line, in one line: everything before the advice on usage, with what clap suggests.
fn usage(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let parts = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let parts = parts.filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let mut line = String::new();
    for part in parts {
        let part = part.trim_start_matches("error: ");
        let between = match line.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) => "; ",
        };
        line = line + between + part;
    }
    match error.kind() {
        // That says itself what is expected.
        ErrorKind::ValueValidation => line,
        _ => line + "; --help has what there is",
    }
}

/// The command line of a stage with what all of them share: `--version`, lines that can be read on a wide
/// terminal, and the end of `--help`.
fn command<Args: Parser>() -> Command {
    let command =
        Args::command().name("mini-kvm").version(env!("CARGO_PKG_VERSION")).max_term_width(100);
    let has = |option| command.get_arguments().any(|argument| argument.get_id() == option);
    let mut help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    #[cfg(feature = "stage06")]
    if has("exit_when") {
        help = help + "\n\n" + console::HELP;
    }
    #[cfg(feature = "stage03")]
    if has("trace") {
        help = help + "\n\n" + trace::HELP;
    }
    #[cfg(feature = "stage03")]
    if has("gdb") {
        help = help + "\n\n" + gdb::HELP;
    }
    #[cfg(feature = "stage08")]
    let has_manual = has("man");
    help = help + "\n\n" + EXIT_CODES + if has("timeout") { TIMEOUT_CODE } else { "" } + ".";
    let command = command.after_help(help);
    #[cfg(feature = "stage08")]
    let command = if has_manual { manual::with_help(command) } else { command };
    command
}

/// Prints an error with its causes as one line on stderr.
pub fn print_error(error: &anyhow::Error) {
    let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
    eprintln!("{red}error:{red:#} {}{}", one_line(error), way_out(error));
}

/// Where an error says that this host's KVM cannot do something, and not what to do: another KVM may be able to.
fn way_out(error: &anyhow::Error) -> &'static str {
    const LAB: &str = "MINI_KVM=lab";
    let refused = error.chain().any(common::error::is_of_kvm);
    match refused && blamed(error) == Ended::HostCannot && !one_line(error).contains(LAB) {
        true => "; run with MINI_KVM=lab instead, or see 01_create_vm --doctor",
        false => "",
    }
}

/// [`std::println`] for programs that may lose their stdout: where it cannot be written, the program ends
/// with [`CannotPrint`] as its error, and does not panic. Colours are left out where they are not wanted.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {
        $crate::print(format_args!("{}\n", format_args!($($text)*)))
    };
}

/// [`std::eprintln`] for programs that may lose their stderr: a line that cannot be written is lost.
#[macro_export]
macro_rules! eprintln {
    ($($text:tt)*) => {
        $crate::eprint(format_args!("{}\n", format_args!($($text)*)))
    };
}

/// Prints on stdout, as [`println!`](crate::println) does.
pub fn print(text: Arguments<'_>) {
    if let Err(error) = anstream::stdout().write_fmt(text) {
        print_error(&CannotPrint(error).into());
        std::process::exit(Ended::HostCannot as i32);
    }
}

/// Prints on stderr, as [`eprintln!`](crate::eprintln) does.
pub fn eprint(text: Arguments<'_>) {
    // There is nobody to tell.
    let _ = try_eprint(text);
}

/// The same, for who has more to print and wants to know whether it makes sense.
pub(crate) fn try_eprint(text: Arguments<'_>) -> io::Result<()> {
    // A pipe that nobody empties would hold us for ever, after --timeout as well.
    let stderr = io::stderr();
    let mut writable = [PollFd::new(&stderr, PollFlags::OUT)];
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut writable, Some(&patience)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        _ => {
            // In one piece, for the guest's output may go to the same place.
            let text = text.to_string();
            match anstream::AutoStream::choice(&stderr) {
                anstream::ColorChoice::Never => {
                    let plain = anstream::adapter::strip_str(&text).to_string();
                    stderr.lock().write_all(plain.as_bytes())
                }
                _ => stderr.lock().write_all(text.as_bytes()),
            }
        }
    }
}

/// How long is waited for somebody to read what was printed before the time was over.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs `program`, which ends by itself when `limit` is over, and gives it up if it doesn't: a guest may
/// print into a pipe that nobody reads. Its thread is left behind then, and nothing is returned.
pub fn within<T: Send + 'static>(
    limit: Option<Duration>,
    program: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (sender, receiver) = channel();
    let thread = thread::Builder::new().name("program".into()).spawn(move || {
        // Nobody listens any more when it was given up.
        let _ = sender.send(program());
    })?;
    let result = match limit {
        Some(limit) => receiver.recv_timeout(limit + PATIENCE),
        None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
    };
    match result {
        Ok(result) => Ok(Some(result)),
        Err(RecvTimeoutError::Timeout) => {
            eprintln!("the time given with --timeout ran out, and nobody reads what was printed");
            Ok(None)
        }
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("a thread that ends has sent"),
        },
    }
}

/// An error and its causes, from the outermost in. A cause that the line before it already tells is
/// not told twice.
fn one_line(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |line, cause| {
        let cause = cause.to_string().replace('\n', " ");
        match line.as_str() {
            "" => cause,
            told if told.contains(&cause) => line,
            _ => format!("{line}: {cause}"),
        }
    })
}

/// The value of a `--timeout`: a time in seconds, of which there may be fractions.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        // Not longer than a century, so that it can be added to any point in time.
        Ok(time) if !time.is_zero() && seconds <= 3e9 => Ok(time),
        _ => Err("expected more than 0 seconds, and less than a century".to_owned()),
    }
}

/// Has `03_vcpu | head` end when `head` does, as every Unix tool ends: by SIGPIPE. Rust's runtime ignores
/// that signal, so that a `println!` into a closed pipe panics instead.
fn end_with_our_reader() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE, and no code of ours runs in a handler.
    #[expect(unsafe_code, reason = "the standard library has no call for a signal's disposition")]
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// The exit code that an error stands for: what `common` says of it, else bad input, for what is
/// not an error of `common` comes from opening and reading what the user named.
fn blamed(error: &anyhow::Error) -> Ended {
    if error.chain().any(|cause| cause.is::<CannotPrint>()) {
        return Ended::HostCannot;
    }
    match error.chain().find_map(common::error::blame) {
        Some(Blame::Host) => Ended::HostCannot,
        Some(Blame::Guest) => Ended::GuestCrashed,
        Some(Blame::Input) | None => Ended::BadInput,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_positive_and_not_endless() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["0", "-1", "x", "", "inf", "NaN", "1e99", "1e-99"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_full_disk_is_no_bad_input() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = anyhow::Error::from(CannotPrint(full())).context("demo");
        assert_eq!(blamed(&error), Ended::HostCannot);
        assert!(one_line(&error).starts_with("demo: cannot write to stdout: "));
        assert_eq!(blamed(&full().into()), Ended::BadInput);
    }

    #[test]
    fn a_program_that_does_not_end_in_time_is_given_up() {
        assert_eq!(within(None, || 7).unwrap(), Some(7));
        assert_eq!(within(Some(Duration::from_secs(60)), || 7).unwrap(), Some(7));
        let (never, waits) = channel::<()>();
        let stuck = within(Some(Duration::from_millis(1)), move || waits.recv());
        assert_eq!(stuck.unwrap(), None);
        drop(never);
    }

    #[test]
    fn causes_are_told_once_and_in_one_line() {
        let error = anyhow::anyhow!("no such file\nor folder")
            .context("cannot read a.bin: no such file or folder")
            .context("no program");
        assert_eq!(one_line(&error), "no program: cannot read a.bin: no such file or folder");
    }
}
