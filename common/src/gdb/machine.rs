//! Where vCPUs and debugger meet: who runs, who has stopped and why, and what is done with a vCPU that stands still.
//!
//! A vCPU belongs to its thread. When it is to stop, the thread comes back from `KVM_RUN` and waits, and while it waits it
//! does what the debugger asks it to do with its vCPU. So there is never a second thread at a vCPU, and no lock around one.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, kvm_debug_exit_arch, kvm_guest_debug,
};
use rustix::fd::OwnedFd;

use super::breakpoints::{Breakpoints, Hit, Trap, Watched};
use crate::deadline::{AGAIN, ThreadId};
use crate::disasm;
use crate::regs::Registers;
use crate::vcpu::{Error, Standing, Vcpu};

/// How long the debugger waits for a vCPU to stop. One that is in a device which waits, for a key for instance, takes
/// as long as that takes.
const PATIENCE: Duration = Duration::from_secs(1);

/// Exceptions that KVM tells the debugger of instead of the guest (Intel SDM vol. 3, 6.3.1).
const DEBUG: u32 = 1;
const BREAKPOINT: u32 = 3;

/// The bit of DR6 that tells a single step (Intel SDM vol. 3, 18.2.3).
const DR6_BS: u64 = 1 << 14;

/// HLT's only byte.
const HLT: u8 = 0xF4;

/// What a vCPU that goes on shall do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pace {
    /// Run.
    #[default]
    Continue,
    /// Execute one instruction.
    Step,
    /// Stand still while others run.
    Stay,
}

/// Why a vCPU has stopped by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The step that was asked for is done.
    Stepped,
    /// A software breakpoint.
    Breakpoint,
    /// A breakpoint of the debug registers.
    HardwareBreakpoint,
    /// A watchpoint.
    Watchpoint(Watched),
    /// It can't go on: a triple fault, or KVM has given up.
    Dead,
}

type Job = Box<dyn FnOnce(&Vcpu) + Send>;

/// What waits for a vCPU's thread.
enum Order {
    Do(Job),
    Go,
}

#[derive(Default)]
struct Cpu {
    /// It shall stop. Read before each `KVM_RUN`, without the lock.
    stop: AtomicBool,
}

#[derive(Default)]
struct CpuState {
    thread: Option<ThreadId>,
    /// Takes orders: it stands still.
    orders: Option<Sender<Order>>,
    pace: Pace,
    /// KVM has not been told yet what to stop at.
    stale: bool,
    /// Its last exit may be a breakpoint made of OUT.
    trapped: bool,
    /// Goes step by step, because of a breakpoint or watchpoint that this KVM can't have otherwise.
    watching: bool,
}

#[derive(Default)]
struct State {
    cpus: BTreeMap<u8, CpuState>,
    stops: VecDeque<(u8, Why)>,
    breakpoints: Breakpoints,
    /// A debugger is there, or is waited for: whoever stops, stays.
    attached: bool,
    /// A vCPU could not go on.
    crashed: bool,
    /// The machine has ended.
    ended: bool,
    /// The debugger has been told so.
    told: bool,
}

/// A machine under a debugger.
pub(super) struct Machine {
    cpus: BTreeMap<u8, Cpu>,
    state: Mutex<State>,
    changed: Condvar,
    /// Rings when a vCPU stops or the machine ends; the debugger's thread waits for it and for gdb at once.
    bell: OwnedFd,
}

impl Machine {
    /// With vCPUs 0 to `count` - 1, which all wait before their first instruction.
    pub(super) fn new(count: usize, bell: OwnedFd) -> Self {
        let ids = (0..=u8::MAX).take(count);
        let cpu = |id| (id, Cpu { stop: AtomicBool::new(true) });
        let state = State {
            cpus: ids.clone().map(|id| (id, CpuState::default())).collect(),
            attached: true,
            ..State::default()
        };
        Self {
            cpus: ids.map(cpu).collect(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            bell,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It fails only if it has rung 2^64 times.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// The bell, for `poll`.
    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// Has it fall silent.
    pub(super) fn heard(&self) {
        // It fails if it hasn't rung.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// The numbers of the vCPUs that have not left.
    pub(super) fn ids(&self) -> Vec<u8> {
        self.state().cpus.keys().copied().collect()
    }

    // What a vCPU's thread does.

    /// Comes before each `KVM_RUN`: waits here while the debugger has the vCPU stand still. Returns whether it has
    /// waited at all. `trapped` says that the last exit may be a breakpoint made of OUT.
    pub(super) fn before_run(&self, vcpu: &mut Vcpu, trapped: bool) -> Result<bool, Error> {
        let Some(cpu) = self.cpus.get(&vcpu.id()) else { return Ok(false) };
        let mut why = match vcpu.standing() {
            Standing::Debug(what) => self.judge(vcpu, what)?,
            _ => None,
        };
        let (mut trapped, mut waited) = (self.trapped(vcpu, trapped), false);
        while why.is_some() || trapped || cpu.stop.load(Ordering::Acquire) {
            if vcpu.standing() == Standing::Within {
                // KVM finishes the instruction and comes back at once, maybe with one more access.
                vcpu.set_immediate_exit(true);
                return Ok(false);
            }
            vcpu.set_immediate_exit(false);
            if mem::take(&mut trapped) {
                why = self.spring(vcpu)?.or(why);
                if why.is_none() {
                    continue;
                }
            }
            if !self.wait(vcpu, why.take()) {
                break;
            }
            waited = true;
        }
        vcpu.set_immediate_exit(false);
        if !waited {
            self.arm(vcpu)?;
        }
        Ok(waited)
    }

    /// Comes after a vCPU's last `KVM_RUN`. If it can't go on, the debugger may look at it before it is gone. `trapped` as
    /// before a run.
    pub(super) fn leave(&self, vcpu: &mut Vcpu, trapped: bool) -> Result<(), Error> {
        // The machine may be saved now, and go on without a debugger: at the guest's own instruction.
        let put_back = match self.trapped(vcpu, trapped) {
            true => self.put_back(vcpu),
            false => Ok(()),
        };
        let crashed = vcpu.standing() == Standing::Dead;
        if crashed {
            self.wait(vcpu, Some(Why::Dead));
        }
        let last = {
            let mut state = self.state();
            state.crashed |= crashed;
            state.cpus.remove(&vcpu.id());
            state.cpus.is_empty()
        };
        self.changed.notify_all();
        if last {
            self.end();
            let mut state = self.state();
            // Memory may be looked at, or saved, when the machine has ended.
            state.breakpoints.clear(&vcpu.vm().ram());
            let _ = self.changed.wait_timeout_while(state, PATIENCE / 2, |state| !state.told);
        }
        put_back
    }

    /// Has KVM finish what may be a breakpoint made of OUT, and springs it.
    fn put_back(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        if vcpu.standing() == Standing::Within {
            vcpu.set_immediate_exit(true);
            vcpu.run()?;
            vcpu.set_immediate_exit(false);
        }
        self.spring(vcpu).map(drop)
    }

    /// Does what the debugger asks for until it lets the vCPU go on. Returns whether it has waited at all.
    fn wait(&self, vcpu: &Vcpu, why: Option<Why>) -> bool {
        let id = vcpu.id();
        let orders: Receiver<Order> = {
            let mut state = self.state();
            if state.ended || !state.attached {
                return false;
            }
            let (sender, receiver) = channel();
            let Some(cpu) = state.cpus.get_mut(&id) else { return false };
            cpu.orders = Some(sender);
            cpu.thread = Some(ThreadId::current());
            state.stops.extend(why.map(|why| (id, why)));
            if why.is_some() {
                // Who debugs one, debugs all.
                self.cpus.values().for_each(|cpu| cpu.stop.store(true, Ordering::Release));
            }
            receiver
        };
        self.changed.notify_all();
        self.ring();
        while let Ok(Order::Do(job)) = orders.recv() {
            job(vcpu);
        }
        true
    }

    /// Whether a breakpoint made of OUT may be behind where the vCPU stands. The exit comes before the instruction is
    /// finished, so this is so until it is.
    fn trapped(&self, vcpu: &Vcpu, now: bool) -> bool {
        let mut state = self.state();
        let Some(cpu) = state.cpus.get_mut(&vcpu.id()) else { return false };
        if vcpu.standing() == Standing::Within {
            cpu.trapped = now;
        }
        cpu.trapped
    }

    /// If it is there, puts the vCPU back to where the guest's own instruction was.
    fn spring(&self, vcpu: &Vcpu) -> Result<Option<Why>, Error> {
        let mut state = self.state();
        if let Some(cpu) = state.cpus.get_mut(&vcpu.id()) {
            cpu.trapped = false;
        }
        let mut registers = Registers::of(vcpu)?;
        registers.regs.rip = registers.regs.rip.wrapping_sub(Trap::OUT_LEN);
        if !state.breakpoints.is_at(&vcpu.vm().ram(), &registers, registers.linear_rip()) {
            return Ok(None);
        }
        vcpu.set_regs(&registers.regs)?;
        Ok(Some(Why::Breakpoint))
    }

    /// What a `KVM_EXIT_DEBUG` is: a reason to stop, or something that is the guest's own business.
    fn judge(&self, vcpu: &Vcpu, what: kvm_debug_exit_arch) -> Result<Option<Why>, Error> {
        let mut state = self.state();
        let state = &mut *state;
        let Some(cpu) = state.cpus.get_mut(&vcpu.id()) else { return Ok(None) };
        let registers = Registers::of(vcpu)?;
        let (stepped, inject) = match what.exception {
            BREAKPOINT => (false, KVM_GUESTDBG_INJECT_BP),
            DEBUG => (what.dr6 & DR6_BS != 0, KVM_GUESTDBG_INJECT_DB),
            _ => (true, 0),
        };
        if what.exception == BREAKPOINT {
            if state.breakpoints.is_at(&vcpu.vm().ram(), &registers, registers.linear_rip()) {
                return Ok(Some(Why::Breakpoint));
            }
        } else if let Some(hit) = state.breakpoints.hit(what.dr6) {
            return Ok(Some(match hit {
                Hit::Execute => Why::HardwareBreakpoint,
                Hit::Access(watched) => Why::Watchpoint(watched),
            }));
        }
        if stepped && cpu.watching {
            if let Some(watched) = state.breakpoints.changed(&vcpu.vm().ram(), &registers) {
                return Ok(Some(Why::Watchpoint(watched)));
            }
            if state.breakpoints.is_stepped_to(&registers) {
                return Ok(Some(Why::Breakpoint));
            }
        }
        if stepped && cpu.pace == Pace::Step {
            return Ok(Some(Why::Stepped));
        }
        if stepped || state.ended {
            return Ok(None);
        }
        // An `int3` or a breakpoint of the guest's own: it gets the exception that it would have got.
        let control = state.breakpoints.control();
        cpu.stale = false;
        vcpu.set_guest_debug(&kvm_guest_debug { control: control.control | inject, ..control })?;
        Ok(None)
    }

    /// Tells KVM what to stop at: when that has changed, and before each step, which has to be asked for anew.
    fn arm(&self, vcpu: &Vcpu) -> Result<(), Error> {
        let mut state = self.state();
        if state.breakpoints.has_sticky() {
            state.breakpoints.refresh(&vcpu.vm().ram());
        }
        let mut debug = state.breakpoints.control();
        let Some(cpu) = state.cpus.get_mut(&vcpu.id()) else { return Ok(()) };
        let steps = cpu.pace == Pace::Step || cpu.watching;
        if !(steps || cpu.stale) {
            return Ok(());
        }
        cpu.stale = false;
        if steps {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        if cpu.pace == Pace::Step {
            // A step that ends in the timer's handler would be none: time has gone on while the guest stood still. Only
            // HLT waits for an interrupt.
            let next = disasm::fetch(vcpu, Registers::of(vcpu)?.linear_rip(), 1);
            let can = vcpu.vm().fd().check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
            if next != [HLT] {
                debug.control |= can as u32 & KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        vcpu.set_guest_debug(&debug)
    }

    /// The machine has ended: nobody waits any more.
    pub(super) fn end(&self) {
        {
            let mut state = self.state();
            state.ended = true;
            for cpu in state.cpus.values_mut() {
                if let Some(orders) = cpu.orders.take() {
                    let _ = orders.send(Order::Go);
                }
            }
        }
        self.cpus.values().for_each(|cpu| cpu.stop.store(false, Ordering::Release));
        self.changed.notify_all();
        self.ring();
    }

    // What the debugger's thread does.

    /// Whether the machine has ended, and if so whether it crashed.
    pub(super) fn ended(&self) -> Option<bool> {
        let state = self.state();
        state.ended.then_some(state.crashed)
    }

    /// gdb knows that it has, or nobody is there to be told.
    pub(super) fn told(&self) {
        self.state().told = true;
        self.changed.notify_all();
    }

    /// Has all vCPUs stop, and waits until they have.
    pub(super) fn stop_all(&self) {
        self.cpus.values().for_each(|cpu| cpu.stop.store(true, Ordering::Release));
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        state.attached = true;
        while !state.ended && Instant::now() < deadline {
            let running = || state.cpus.values().filter(|cpu| cpu.orders.is_none());
            if running().next().is_none() {
                break;
            }
            // The signal is lost on a thread that is not in KVM_RUN.
            running().filter_map(|cpu| cpu.thread).for_each(ThreadId::interrupt);
            (state, _) =
                self.changed.wait_timeout(state, AGAIN).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next vCPU that has stopped by itself, with all others stopped, too.
    pub(super) fn next_stop(&self) -> Option<(u8, Why)> {
        if self.state().stops.is_empty() {
            return None;
        }
        self.stop_all();
        self.state().stops.pop_front()
    }

    /// Has vCPU `id` do something, if it stands still, and returns what that gives.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        id: u8,
        job: impl FnOnce(&Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, answer) = channel();
        let job: Job = Box::new(move |vcpu| {
            // Who asked is waiting.
            let _ = sender.send(job(vcpu));
        });
        self.state().cpus.get(&id)?.orders.as_ref()?.send(Order::Do(job)).ok()?;
        answer.recv().ok()
    }

    /// Changes the breakpoints, while all vCPUs stand still.
    pub(super) fn breakpoints<T>(&self, change: impl FnOnce(&mut Breakpoints) -> T) -> T {
        change(&mut self.state().breakpoints)
    }

    /// Lets the vCPUs go on, each at its pace.
    pub(super) fn resume(&self, pace: impl Fn(u8) -> Pace) {
        let mut state = self.state();
        // Who stands at a breakpoint comes to it again; but what was written, was.
        state.stops.retain(|(_, why)| matches!(why, Why::Watchpoint(_)));
        if !state.stops.is_empty() {
            return self.ring();
        }
        let watching = state.breakpoints.is_watching();
        for (&id, cpu) in &mut state.cpus {
            cpu.pace = pace(id);
            (cpu.stale, cpu.watching) = (true, watching);
            if cpu.pace == Pace::Stay {
                continue;
            }
            self.cpus[&id].stop.store(false, Ordering::Release);
            if let Some(orders) = cpu.orders.take() {
                let _ = orders.send(Order::Go);
            }
        }
    }

    /// Lets all go on without a debugger.
    pub(super) fn detach(&self) {
        self.state().stops.clear();
        self.resume(|_| Pace::Continue);
        self.state().attached = false;
    }
}
