//! Introduced by stage 08: the thread that serves a virtio device, and what it shares with the vCPUs.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG as INT_CONFIG, VIRTIO_MMIO_INT_VRING as INT_VRING,
};
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Broken, Device, Rings};
use crate::bus::Interrupt;
use crate::ioeventfd;
use crate::memory::{Ram, Vm};
use crate::run::{ReportPanic, Stop, thread_named};
use crate::trace::Trace;

/// What wakes a device's thread, and what it wakes the guest with. Clones belong to the same device.
#[derive(Clone)]
pub struct Wake(Arc<Signals>);

struct Signals {
    epoll: Epoll,
    /// Says "look": the driver's QueueNotify does, for whichever queue, and [`Wake::now`].
    bell: EventFd,
    line: Box<dyn Interrupt + Sync>,
    /// InterruptStatus: why the line was pulsed.
    interrupts: AtomicU32,
    /// ConfigGeneration: changes with the configuration.
    generation: AtomicU32,
}

impl Wake {
    fn new(line: Box<dyn Interrupt + Sync>) -> io::Result<Self> {
        let signals = Signals {
            epoll: Epoll::new()?,
            bell: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            line,
            interrupts: AtomicU32::new(0),
            generation: AtomicU32::new(0),
        };
        let wake = Self(Arc::new(signals));
        wake.watch(&wake.0.bell)?;
        Ok(wake)
    }

    /// Has the device served whenever `fd` becomes readable or writable, or its other end hangs up, until it is
    /// closed. Only that it *becomes* so wakes the thread (`EPOLLET`): a device that leaves data waiting, since the
    /// guest has given it no buffers, sleeps until the guest does.
    pub fn watch(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.0.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, 0))
    }

    /// Has the device served, from any thread.
    pub fn now(&self) {
        // A counter that is full wakes as well.
        let _ = self.0.bell.write(1);
    }

    /// Has KVM ring the bell when the guest writes to `addr`.
    pub(super) fn connect(&self, vm: &Vm, addr: u64) -> Result<(), ioeventfd::Error> {
        ioeventfd::connect(vm, addr, &self.0.bell)
    }

    /// Tells the driver to read the configuration again.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(INT_CONFIG);
    }

    /// InterruptStatus.
    pub(super) fn interrupts(&self) -> u32 {
        self.0.interrupts.load(Ordering::Acquire)
    }

    /// InterruptACK.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.0.interrupts.fetch_and(!bits, Ordering::AcqRel);
    }

    /// ConfigGeneration.
    pub(super) fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Both as a snapshot has them.
    pub(super) fn restore(&self, interrupts: u32, generation: u32) {
        self.0.interrupts.store(interrupts, Ordering::Release);
        self.0.generation.store(generation, Ordering::Release);
    }

    fn interrupt(&self, why: u32) {
        self.0.interrupts.fetch_or(why, Ordering::AcqRel);
        // An eventfd that KVM watches is never full: KVM takes what is in it.
        let _ = self.0.line.trigger();
    }
}

/// A device and its queues, as the transport on the vCPUs' side and the worker share them.
pub struct Core {
    state: Mutex<State>,
    /// The signals, which need no lock.
    pub(super) wake: Wake,
    ram: Ram,
    stop: AtomicBool,
}

/// What a lock guards: who has it, has the device to itself.
pub(super) struct State {
    pub device: Box<dyn Device>,
    pub queues: Vec<Queue>,
    /// The Status register.
    pub status: u32,
    /// How far the driver had come on each ring when they were looked at last.
    seen: Vec<u16>,
}

impl Core {
    /// `device`, told what it is woken with, and `line` for its interrupts.
    ///
    /// # Panics
    /// If a queue's size is no power of two: a mistake in the device.
    pub fn new(
        mut device: Box<dyn Device>,
        ram: Ram,
        line: Box<dyn Interrupt + Sync>,
    ) -> io::Result<Arc<Self>> {
        let wake = Wake::new(line)?;
        device.plug(wake.clone())?;
        let queue = |&size: &u16| Queue::new(size).expect("a power of two");
        let queues: Vec<_> = device.queues().iter().map(queue).collect();
        let seen = vec![0; queues.len()];
        let state = Mutex::new(State { device, queues, status: 0, seen });
        Ok(Arc::new(Self { state, wake, ram, stop: AtomicBool::new(false) }))
    }

    /// The device, for who may wait until it has been served. A worker that panicked ends the machine.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest memory.
    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Serves the device until nothing new is on its rings.
    pub(super) fn serve(&self) {
        // The lock is given back after each round: a vCPU may be waiting to reset the device.
        let mut more = true;
        while more && !self.stop.load(Ordering::Acquire) {
            more = self.round(&mut self.lock());
        }
    }

    /// Serves the device once. Returns whether the driver has put more on the rings meanwhile.
    fn round(&self, state: &mut State) -> bool {
        if state.status & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            return false;
        }
        self.try_round(state).unwrap_or_else(|Broken(_)| {
            state.status |= NEEDS_RESET;
            self.wake.interrupt(INT_CONFIG);
            false
        })
    }

    fn try_round(&self, state: &mut State) -> Result<bool, Broken> {
        const NOT_THERE: Broken = Broken("rings are not in its memory");
        let State { device, queues, seen, .. } = state;
        // Whoever looks needs no bell.
        for (queue, seen) in queues.iter_mut().zip(seen.iter_mut()).filter(|(q, _)| q.ready()) {
            queue.disable_notification(&self.ram).map_err(|_| NOT_THERE)?;
            *seen = queue.avail_idx(&self.ram, Ordering::Acquire).map_err(|_| NOT_THERE)?.0;
        }
        let mut rings =
            Rings { ram: &self.ram, queues, used: 0, interrupt: false, stop: &self.stop };
        let served = device.serve(&mut rings);
        let (used, mut wanted) = (rings.used, rings.interrupt);
        for (number, queue) in queues.iter_mut().enumerate() {
            if used & 1 << number != 0 {
                wanted |= queue.needs_notification(&self.ram).map_err(|_| NOT_THERE)?;
            }
        }
        if wanted {
            self.wake.interrupt(INT_VRING);
        }
        served?;
        let mut more = false;
        for (queue, seen) in queues.iter_mut().zip(seen).filter(|(q, _)| q.ready()) {
            queue.enable_notification(&self.ram).map_err(|_| NOT_THERE)?;
            // Between the last look and the bell, something may have come. What the device has left on a ring is not
            // new: it waits for something else.
            more |=
                queue.avail_idx(&self.ram, Ordering::Acquire).map_err(|_| NOT_THERE)?.0 != *seen;
        }
        Ok(more)
    }

    // ANCHOR: run
    /// Serves the device until the machine ends. A trace is told when.
    fn run(&self, trace: Option<impl Fn(Instant)>) {
        let mut events = [EpollEvent::default(); 16];
        while !self.stop.load(Ordering::Acquire) {
            // The only error that can come is a signal's EINTR.
            let _ = self.wake.0.epoll.wait(-1, &mut events);
            let began = trace.as_ref().map(|_| Instant::now());
            self.serve();
            if let (Some(trace), Some(began)) = (&trace, began) {
                trace(began);
            }
        }
    }
    // ANCHOR_END: run
}

/// The devices' threads. They end, each after what it is doing, when this is dropped.
#[derive(Default)]
pub struct Workers(Vec<(Arc<Core>, JoinHandle<()>)>);

impl Workers {
    pub(super) fn start(
        &mut self,
        core: Arc<Core>,
        stop: &Stop,
        trace: Option<Arc<Trace>>,
    ) -> io::Result<()> {
        let (name, number) = (core.lock().device.name(), self.0.len() as u32);
        let trace = trace.map(|trace| move |began| trace.worked(number, name, began));
        let report = ReportPanic::new(name, stop);
        let worker = Arc::clone(&core);
        let thread = thread_named(name).spawn(move || {
            let _report = report;
            worker.run(trace);
        })?;
        self.0.push((core, thread));
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for (core, _) in &self.0 {
            core.stop.store(true, Ordering::Release);
            core.wake.now();
        }
        for (_, thread) in self.0.drain(..) {
            // That it panicked, its report has said.
            let _ = thread.join();
        }
    }
}
