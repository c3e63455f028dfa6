//! Ctrl-C in the middle of a long command: the command ends first, then what is half made is removed, then we end.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Whether a signal has asked us to end.
static CAME: AtomicBool = AtomicBool::new(false);

/// The command that runs now.
static RUNNING: Mutex<Option<Pid>> = Mutex::new(None);

/// From now on the signals that would end this process end the command that it waits for, which then fails. A person's
/// Ctrl-C reaches that command as well, but a signal for this process alone would leave it at work.
pub fn end_commands_first() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        for _ in signals.forever() {
            if !CAME.swap(true, Ordering::Relaxed) {
                // Some bring what they are at to its end, such as a package that is being unpacked.
                eprintln!("\nInterrupted: waiting for what runs to end.");
            }
            if let Some(running) = *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) {
                // An error means that it has ended in this moment.
                let _ = kill_process(running, Signal::TERM);
            }
        }
    });
    Ok(())
}

/// Whether a signal has come since [`end_commands_first`].
pub fn came() -> bool {
    CAME.load(Ordering::Relaxed)
}

/// As long as this lives, `child` is the command that a signal ends.
pub struct Running(());

impl Running {
    /// A signal may have come before it was started: it ends at once then.
    pub fn new(child: &Child) -> Self {
        let pid = Pid::from_child(child);
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
        if came() {
            let _ = kill_process(pid, Signal::TERM);
        }
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
