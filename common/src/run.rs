//! Introduced by stage 06: the run loop, one thread for each vCPU, and how a machine ends.
//!
//! Stages 03 to 05 have the loop in sight: `KVM_RUN`, and a `match` over the exits. From here on it is this
//! one. A device that the guest uses to end the machine holds a [`Stop`], as does whoever watches from
//! outside; the first one to ask says how the machine ended.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub use crate::autopsy::Cause;
use crate::bus::Bus;
use crate::error::{Blame, Blamed};
use crate::gdb::Gdb;
use crate::hypercall::End;
use crate::vcpu::{self, Exit, Vcpu};

/// Why the vCPUs could not be run.
#[derive(Debug, Error)]
pub enum Error {
    /// The signal that interrupts `KVM_RUN` could not be set up.
    #[error("cannot handle the signal that stops the vCPUs: {0}")]
    Signal(errno::Error),
    /// The host gave no thread.
    #[error("cannot start the thread of vCPU {vcpu}: {source}")]
    Thread {
        /// The vCPU's number.
        vcpu: u8,
        /// What the system said.
        source: std::io::Error,
    },
    /// A device panicked: a mistake of ours, which must not leave the machine waiting for ever.
    #[error("the thread of {0} panicked; this is a mistake in the monitor, please report it")]
    Panic(String),
    /// `KVM_RUN` itself failed.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// The guest turned its machine off.
    PowerOff,
    /// The guest restarted its machine.
    Reset,
    /// The guest wrote this byte to the debug-exit port.
    Exited(u8),
    /// Somebody outside wanted to have it saved, to go on another time.
    Saved,
    /// Somebody outside wanted it to end: the person at the console, or what waits for a text.
    Left,
    /// The time given ran out.
    TimedOut,
    /// The guest did what no machine can go on from.
    Crashed(Crash),
    /// The guest's operating system gave up, and said why.
    Panicked(String),
}

/// What a vCPU could not go on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Crash {
    /// The vCPU's number.
    pub vcpu: u8,
    /// Its instruction pointer then.
    pub rip: u64,
    /// What happened.
    pub cause: Cause,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, rip, cause } = self;
        // KVM has put the vCPU back to the reset state, or may have done so.
        if *cause == Cause::TripleFault {
            return write!(f, "{cause} (vCPU {vcpu})");
        }
        write!(f, "{cause} (vCPU {vcpu} at rip {rip:#x})")
    }
}

/// Ends the machine, from a device or from outside. Clones ask for the same machine's end.
#[derive(Clone, Debug)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    sender: Sender<Result<Ending, Error>>,
}

impl Stop {
    /// Asks for the end. The first one to ask is heard; the vCPU that asks runs no further instruction.
    pub fn now(&self, ending: Ending) {
        self.send(Ok(ending));
    }

    fn send(&self, ending: Result<Ending, Error>) {
        self.asked.store(true, Ordering::Release);
        // Nobody listens any more once the machine has ended.
        let _ = self.sender.send(ending);
    }

    fn asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }
}

/// The debug-exit port ends a machine. Exit codes have 8 bits: a greater one is no success either.
impl End for Stop {
    fn end(&self, code: u32) {
        self.now(Ending::Exited(u8::try_from(code).unwrap_or(u8::MAX)));
    }
}

/// The other end of [`Stop`]: where [`run`] learns that the machine shall end.
#[derive(Debug)]
pub struct Stopped {
    stop: Stop,
    gdb: Gdb,
    receiver: Receiver<Result<Ending, Error>>,
}

impl Stopped {
    /// Has a debugger let go of the vCPUs that it holds, too.
    pub fn under(self, gdb: &Gdb) -> Self {
        Self { gdb: gdb.clone(), ..self }
    }

    /// How the machine ended, if it has; for who runs no vCPU, such as a test of a device.
    pub fn ending(&self) -> Option<Ending> {
        self.receiver.try_recv().ok()?.ok()
    }
}

/// A machine's two ends of its end.
pub fn stop() -> (Stop, Stopped) {
    let (sender, receiver) = channel();
    let stop = Stop { asked: Arc::default(), sender };
    (stop.clone(), Stopped { stop, gdb: Gdb::default(), receiver })
}

/// How long a vCPU may take to leave once the machine has ended.
const PATIENCE: Duration = Duration::from_secs(1);

/// A machine that has ended.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub ending: Ending,
    /// The vCPUs, all that stand between two instructions: whose state is whole.
    pub vcpus: Vec<Vcpu>,
}

/// A thread's stack. Where the host gives huge pages unasked (`transparent_hugepage=always`), the first byte of a stack of 2 MiB, Rust's
/// own size, may take all 2 MiB at once. None fits into this one.
const STACK: usize = 1 << 20;

/// A thread of a machine that is to be started.
pub fn thread_named(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

/// Runs the vCPUs, each on a thread of its own, until the machine ends or `timeout` has passed.
///
/// All vCPUs have left `KVM_RUN` when this returns, except one whose device cannot finish a write, such as
/// to a pipe that nobody reads: after `PATIENCE` such a thread is left behind.
pub fn run(
    vcpus: Vec<Vcpu>,
    ports: Bus,
    mmio: Bus,
    stopped: Stopped,
    timeout: Option<Duration>,
) -> Result<Ran, Error> {
    // Its handler does nothing: that the signal came is what makes KVM_RUN return with EINTR.
    let kick = SIGRTMIN();
    register_signal_handler(kick, interrupt).map_err(Error::Signal)?;

    let buses = Arc::new((ports, mmio));
    let Stopped { stop, gdb, receiver } = stopped;
    let mut threads = Vec::new();
    for vcpu in vcpus {
        let id = vcpu.id();
        let (buses, its_stop) = (Arc::clone(&buses), stop.clone());
        let mut vcpu = vcpu;
        // ANCHOR: thread
        let thread = thread_named(format!("vcpu{id}")).spawn(move || {
            let _report = ReportPanic::new(format!("vCPU {id}"), &its_stop);
            let (ports, mmio) = (&buses.0, &buses.1);
            if let Err(error) = run_one(&mut vcpu, ports, mmio, &its_stop) {
                its_stop.send(Err(error));
            }
            finish(vcpu, &buses.0, &buses.1).ok()
        });
        // ANCHOR_END: thread
        match thread {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                stop.send(Err(Error::Thread { vcpu: id, source }));
                break;
            }
        }
    }

    let ending = match timeout.map(|timeout| Instant::now() + timeout) {
        Some(deadline) => receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
    };
    // `stop` itself is a sender, so the channel is never disconnected.
    let ending = ending.unwrap_or(Ok(Ending::TimedOut));
    stop.asked.store(true, Ordering::Release);
    gdb.release();

    let mut vcpus = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    for thread in threads {
        // A signal that comes just before KVM_RUN is lost on it, so there may have to be another.
        while !thread.is_finished() && Instant::now() < deadline {
            let _ = thread.kill(kick);
            thread::sleep(Duration::from_micros(200));
        }
        if !thread.is_finished() {
            continue;
        }
        vcpus.extend(thread.join().unwrap_or_default());
    }
    Ok(Ran { ending: ending?, vcpus })
}

/// Ends the machine if the thread that holds it panics.
pub(crate) struct ReportPanic {
    whose: String,
    stop: Stop,
}

impl ReportPanic {
    /// For the thread of `whose`.
    pub(crate) fn new(whose: impl Into<String>, stop: &Stop) -> Self {
        Self { whose: whose.into(), stop: stop.clone() }
    }
}

// ANCHOR: report_panic
impl Drop for ReportPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.stop.send(Err(Error::Panic(mem::take(&mut self.whose))));
        }
    }
}
// ANCHOR_END: report_panic

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// One vCPU's loop.
fn run_one(vcpu: &mut Vcpu, ports: &Bus, mmio: &Bus, stop: &Stop) -> Result<(), Error> {
    while !stop.asked() {
        if let Some(cause) = answer(&mut vcpu.run()?, ports, mmio) {
            let rip = vcpu.regs().map_or(0, |regs| regs.rip);
            vcpu.leave()?;
            stop.now(Ending::Crashed(Crash { vcpu: vcpu.id(), rip, cause }));
        }
    }
    Ok(())
}

/// Has KVM finish the instruction behind the last exit, which has been answered: it does so when `KVM_RUN` is called
/// again. An access that crosses from one page to another takes one more exit.
fn finish(mut vcpu: Vcpu, ports: &Bus, mmio: &Bus) -> Result<Vcpu, vcpu::Error> {
    vcpu.leave()?;
    vcpu.set_immediate_exit(true);
    loop {
        match vcpu.run()? {
            Exit::Interrupted => break,
            mut exit => answer(&mut exit, ports, mmio),
        };
    }
    vcpu.set_immediate_exit(false);
    Ok(vcpu)
}

/// Has the device that an exit is for answer it. Returns why the guest can't go on if so.
fn answer(exit: &mut Exit, ports: &Bus, mmio: &Bus) -> Option<Cause> {
    match exit {
        Exit::IoOut { port, size, data } => ports.write_each((*port).into(), *size, data),
        Exit::IoIn { port, size, data } => ports.read_each((*port).into(), *size, data),
        Exit::MmioRead { addr, data } => mmio.read(*addr, data),
        Exit::MmioWrite { addr, data } => mmio.write(*addr, data),
        exit => return Cause::of(exit),
    };
    None
}
