//! A pseudo-terminal with a program on it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// A program that runs on a terminal of its own, as its session's controlling one: Ctrl-C and changes of
/// the window's size reach it as signals. It is killed when this is dropped.
pub struct Terminal {
    child: Child,
    // The end of the terminal where the keyboard and the screen would be.
    screen: File,
    // The program's end, held open so that the terminal's modes can be read after its end.
    end: OwnedFd,
}

impl Terminal {
    /// Starts `command` on a terminal of this size.
    #[expect(unsafe_code, reason = "a controlling terminal is set between fork and exec")]
    pub fn start(
        command: &mut Command,
        rows: NonZero<u16>,
        columns: NonZero<u16>,
    ) -> io::Result<Self> {
        let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&screen)?;
        unlockpt(&screen)?;
        let end = ioctl_tiocgptpeer(
            &screen,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )?;
        tcsetwinsize(&screen, winsize(rows, columns))?;
        let stdio = || end.try_clone().map(Stdio::from);
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?).env("TERM", "xterm-256color");
        // SAFETY: between fork and exec only these two system calls are made, which allocate nothing and
        // take no lock.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        Ok(Self { child: command.spawn()?, screen: screen.into(), end })
    }

    /// What the program has printed since the last call; waits for it for up to `limit`.
    pub fn read(&mut self, limit: Duration) -> Vec<u8> {
        let limit = Timespec::try_from(limit).expect("no limit is as long");
        let mut fds = [PollFd::new(&self.screen, PollFlags::IN)];
        let mut bytes = vec![0; 4096];
        let len = match poll(&mut fds, Some(&limit)) {
            Ok(1..) => self.screen.read(&mut bytes).unwrap_or_else(|_| {
                // EIO: the program has closed its end.
                thread::sleep(crate::TICK);
                0
            }),
            _ => 0,
        };
        bytes.truncate(len);
        bytes
    }

    /// Types `keys`.
    pub fn type_in(&mut self, keys: &[u8]) -> io::Result<()> {
        self.screen.write_all(keys)
    }

    /// Changes the size of the window; the program gets `SIGWINCH`.
    pub fn resize(&self, rows: NonZero<u16>, columns: NonZero<u16>) -> io::Result<()> {
        Ok(tcsetwinsize(&self.screen, winsize(rows, columns))?)
    }

    /// Whether keys are neither echoed nor gathered to lines.
    pub fn is_raw(&self) -> io::Result<bool> {
        let modes = tcgetattr(&self.end)?.local_modes;
        Ok(!modes.intersects(LocalModes::ICANON | LocalModes::ECHO))
    }

    /// The program's process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How the program ended, if it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.status().is_some()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn winsize(rows: NonZero<u16>, columns: NonZero<u16>) -> Winsize {
    Winsize { ws_row: rows.get(), ws_col: columns.get(), ws_xpixel: 0, ws_ypixel: 0 }
}
