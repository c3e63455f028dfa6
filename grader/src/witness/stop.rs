//! Waiting for the stops of watched threads, and letting them go on.
//!
//! `nix` knows no signals beyond the 31 old ones, and a program may well use one of the others to get a vCPU out of
//! `KVM_RUN`. So here signals are plain numbers.

use std::process::ExitStatus;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::unistd::Pid;
use rustix::process::{WaitOptions, WaitStatus};
use std::os::unix::process::ExitStatusExt;

/// Why a thread stands still (ptrace(2), "Stopped states").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It has ended.
    Ended(ExitStatus),
    /// The filter has caught a system call that begins.
    Begins,
    /// A system call begins or ends, after [`How::ToCall`].
    Call,
    /// Another `PTRACE_EVENT_…`.
    Event(i32),
    /// It is to get this signal.
    Signal(i32),
}

/// How far a thread is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// To its next signal or event.
    On,
    /// To the beginning or end of a system call as well.
    ToCall,
}

/// Waits for a stop of a thread, or of any that this thread has started; nothing if there is none any more.
pub(super) fn wait(thread: Option<Pid>) -> Result<Option<(Pid, Stop)>> {
    // Threads as well as processes, and nobody else's.
    let options = WaitOptions::from_bits_retain((libc::__WALL | libc::__WNOTHREAD) as u32);
    loop {
        let waited = match thread {
            None => rustix::process::wait(options),
            Some(thread) => {
                rustix::process::waitpid(rustix::process::Pid::from_raw(thread.as_raw()), options)
            }
        };
        return match waited {
            Ok(Some((pid, status))) => {
                Ok(Some((Pid::from_raw(pid.as_raw_nonzero().get()), Stop::of(status))))
            }
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => Err(error).context("cannot wait for the program"),
        };
    }
}

impl Stop {
    fn of(status: WaitStatus) -> Self {
        const CALL: i32 = libc::SIGTRAP | 0x80;
        let Some(signal) = status.stopping_signal() else {
            return Self::Ended(ExitStatus::from_raw(status.as_raw()));
        };
        match (signal, status.as_raw() >> 16) {
            (CALL, _) => Self::Call,
            (libc::SIGTRAP, libc::PTRACE_EVENT_SECCOMP) => Self::Begins,
            (libc::SIGTRAP, event @ 1..) => Self::Event(event),
            (signal, _) => Self::Signal(signal),
        }
    }
}

/// Lets a stopped thread go on, and get a signal, or none if that is 0. That it has been killed meanwhile is no error:
/// its end is what is waited for next.
#[expect(unsafe_code, reason = "the crate nix lets only the 31 old signals through")]
pub(super) fn go_on(thread: Pid, how: How, signal: i32) -> Result<()> {
    let request = match how {
        How::On => libc::PTRACE_CONT,
        How::ToCall => libc::PTRACE_SYSCALL,
    };
    // SAFETY: both requests take two numbers and no address of ours.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), 0, i64::from(signal)) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).context("cannot let the program go on"),
    }
}
