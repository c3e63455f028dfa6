//! The host's terminal: raw while a program in the lab has it, and as it was afterwards.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::protocol::{Modes, Size};

/// Which of the three standard streams are terminals.
pub fn terminals() -> [bool; 3] {
    [io::stdin().is_terminal(), io::stdout().is_terminal(), io::stderr().is_terminal()]
}

/// The terminal that this process was started on.
pub struct Terminal {
    fd: OwnedFd,
    before: Termios,
    raw: bool,
}

impl Terminal {
    /// The terminal among the standard streams, if one of them is one.
    pub fn open() -> Option<Terminal> {
        let [stdin, stdout, stderr] = terminals();
        let fd = if stdin {
            rustix::io::dup(io::stdin())
        } else if stdout {
            rustix::io::dup(io::stdout())
        } else if stderr {
            rustix::io::dup(io::stderr())
        } else {
            return None;
        };
        let fd = fd.ok()?;
        let before = tcgetattr(&fd).ok()?;
        Some(Terminal { fd, before, raw: false })
    }

    /// A second descriptor of it, to write to.
    ///
    /// # Errors
    /// Too many open files.
    pub fn writer(&self) -> io::Result<std::fs::File> {
        Ok(self.fd.try_clone()?.into())
    }

    /// Whether it goes on making CR LF of LF itself. It isn't raw while the keyboard is someone else's, and where stdout
    /// is a pipe, what comes out at its other end may be shown here without having passed the lab's terminal.
    fn ends_lines() -> bool {
        !matches!(terminals(), [true, true, _])
    }

    /// How the lab's is to be set: as this one was when this process started, but lines are ended once.
    pub fn modes(&self) -> Modes {
        let mut output = self.before.output_modes;
        if Self::ends_lines() {
            output.remove(OutputModes::OPOST);
        }
        Modes {
            input: self.before.input_modes.bits(),
            output: output.bits(),
            control: self.before.control_modes.bits(),
            local: self.before.local_modes.bits(),
        }
    }

    /// Its size now.
    pub fn size(&self) -> Size {
        tcgetwinsize(&self.fd).map_or_else(
            |_| Size::default(),
            |size| Size { rows: size.ws_row, columns: size.ws_col },
        )
    }

    /// Hands every key through as it is, Ctrl-C too: the lab's terminal makes a signal of it.
    pub fn set_raw(&mut self) {
        let mut raw = self.before.clone();
        raw.make_raw();
        if Self::ends_lines() {
            raw.output_modes = self.before.output_modes;
        }
        self.raw = tcsetattr(&self.fd, OptionalActions::Now, &raw).is_ok();
    }

    /// Whether keys are handed through now.
    pub fn is_raw(&self) -> bool {
        self.raw
    }

    /// As it was before. Happens by itself when this is dropped, also in a panic.
    pub fn restore(&mut self) {
        if std::mem::take(&mut self.raw) {
            let _ = tcsetattr(&self.fd, OptionalActions::Drain, &self.before);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.restore();
    }
}
