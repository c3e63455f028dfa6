//! Introduced by stage 03: how a vCPU is called back from a guest that never exits.
//!
//! `KVM_RUN` returns when the guest needs something, which may be never. A signal to the thread that is in
//! it makes it return with `EINTR`, which is [`Exit::Interrupted`](crate::vcpu::Exit::Interrupted).

use std::io;
use std::os::raw::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::siginfo_t;
use thiserror::Error;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::{Blame, Blamed};

/// A signal that comes between two `KVM_RUN`s is lost, so it is sent until somebody has noticed.
pub(crate) const AGAIN: Duration = Duration::from_millis(1);

/// Why there is no deadline.
#[derive(Debug, Error)]
pub enum Error {
    /// The signal's handler could not be installed.
    #[error("cannot install the signal handler that calls a vCPU back: {0}")]
    Handler(vmm_sys_util::errno::Error),
    /// No thread could be started.
    #[error("cannot start the thread that calls a vCPU back: {0}")]
    Thread(#[from] io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// A time after which the `KVM_RUN` of one thread is interrupted.
#[derive(Debug)]
pub struct Deadline {
    passed: Arc<AtomicBool>,
    waiter: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Deadline {
    // ANCHOR: new
    /// Interrupts the calling thread's `KVM_RUN` when `limit` has passed from now on, and keeps doing so
    /// until this is dropped; without a limit it never does.
    pub fn new(limit: Option<Duration>) -> Result<Self, Error> {
        let passed = Arc::new(AtomicBool::new(false));
        let Some(limit) = limit else { return Ok(Self { passed, waiter: None }) };
        handle_signal()?;
        let vcpu = ThreadId::current();
        let (done, dropped) = mpsc::channel();
        let flag = Arc::clone(&passed);
        let thread = thread::Builder::new().name("deadline".into()).spawn(move || {
            let mut wait = limit;
            while dropped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::Relaxed);
                vcpu.interrupt();
                wait = AGAIN;
            }
        })?;
        Ok(Self { passed, waiter: Some((done, thread)) })
    }
    // ANCHOR_END: new

    /// Whether the time is over: what the loop around `KVM_RUN` asks after an interruption.
    pub fn passed(&self) -> bool {
        self.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        end(self.waiter.take());
    }
}

/// Interrupts the `KVM_RUN` of one thread again and again.
#[derive(Debug)]
pub struct Ticker(Option<(Sender<()>, JoinHandle<()>)>);

impl Ticker {
    /// Interrupts the calling thread's `KVM_RUN` each time that `every` has passed, until this is dropped.
    pub fn new(every: Duration) -> Result<Self, Error> {
        register_signal_handler(SIGRTMIN(), ignore).map_err(Error::Handler)?;
        let vcpu = ThreadId::current();
        let (done, dropped) = mpsc::channel();
        let thread = thread::Builder::new().name("ticker".into()).spawn(move || {
            while dropped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                vcpu.interrupt();
            }
        })?;
        Ok(Self(Some((done, thread))))
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        end(self.0.take());
    }
}

/// Has a waiting thread end.
fn end(waiter: Option<(Sender<()>, JoinHandle<()>)>) {
    if let Some((done, thread)) = waiter {
        drop(done);
        // It has nothing to tell: it ends as soon as it sees the channel closed.
        let _ = thread.join();
    }
}

/// Has the signal that calls a vCPU back do that and nothing else.
pub(crate) fn handle_signal() -> Result<(), Error> {
    register_signal_handler(SIGRTMIN(), ignore).map_err(Error::Handler)
}

/// A handler has to exist, for otherwise the signal would end the process; it has nothing to do.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// A thread of this process, by the number that the kernel knows it by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadId {
    process: libc::pid_t,
    thread: libc::pid_t,
}

#[expect(unsafe_code, reason = "the standard library sends no signals to threads")]
impl ThreadId {
    pub(crate) fn current() -> Self {
        // SAFETY: neither takes an argument or can fail.
        unsafe { Self { process: libc::getpid(), thread: libc::gettid() } }
    }

    /// Has its `KVM_RUN` return. The signal is lost if it is not in one.
    pub(crate) fn interrupt(self) {
        // SAFETY: the arguments are numbers. Where the thread is gone, the call fails and does nothing.
        unsafe { libc::tgkill(self.process, self.thread, SIGRTMIN()) };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_deadline_interrupts_a_blocking_call_of_its_thread() {
        let (read, _write) = io::pipe().unwrap();
        let start = Instant::now();
        let deadline = Deadline::new(Some(Duration::from_millis(20))).unwrap();
        assert!(!deadline.passed());
        let mut byte = [0];
        let error = io::Read::read(&mut &read, &mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        assert!(deadline.passed() && start.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn without_a_limit_it_never_passes_and_dropping_does_not_wait() {
        assert!(!Deadline::new(None).unwrap().passed());
        let start = Instant::now();
        drop(Deadline::new(Some(Duration::from_secs(3600))).unwrap());
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
