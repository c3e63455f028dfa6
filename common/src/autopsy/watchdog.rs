//! Introduced by stage 03: whether a guest still gets anywhere.
//!
//! A guest that hangs makes no exit, or the same one for ever. The [`Watchdog`] calls each vCPU back every now and then
//! and looks at its registers. One that computes has others each time; one that waits in a loop for what never comes
//! has the same few again and again. One that halts with interrupts on is idle, which is no hang.

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_INTR, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_regs};

use crate::deadline::Ticker;
use crate::last_exits::LastExit;
use crate::trace::Devices;
use crate::vcpu::{Error, Exit, Vcpu, Watcher};

/// How often each vCPU is looked at in the time that it may stand still.
const LOOKS: u32 = 64;

/// And at least how long it runs in between.
const LEAST: Duration = Duration::from_millis(2);

/// How many different states, or exits, in turn are still no progress.
const FEW: usize = 16;

/// How often that must have been seen, for a host may be too busy to look as often as it should.
const ENOUGH: usize = 2 * FEW;

/// RFLAGS.IF (Intel SDM vol. 1, 3.4.3).
const IF: u64 = 1 << 9;

/// How a guest hangs.
#[derive(Clone, Debug, PartialEq)]
pub enum Hang {
    /// HLT with interrupts off.
    Halted,
    /// It goes around in a loop: the registers that it was seen with.
    Loop(Vec<kvm_regs>),
    /// It asks devices the same again and again, and always gets the same answer: the exits that it was seen with, and
    /// the names of the devices, none where there is none.
    Polls(Vec<(LastExit, Option<&'static str>)>),
}

/// What a vCPU was doing when it was looked at.
#[derive(Clone, Debug)]
enum State {
    /// It gets somewhere, or has not stood still for long enough.
    Runs,
    /// HLT with interrupts on.
    Idle,
    /// It was not started yet.
    Waits,
    /// It stands still.
    Hangs(Hang),
}

/// How long a machine may stand still, and what its vCPUs do.
#[derive(Clone, Debug)]
pub struct Watchdog {
    limit: Duration,
    states: Arc<Mutex<BTreeMap<u8, State>>>,
}

impl Watchdog {
    /// For a machine that may stand still for `limit`.
    pub fn new(limit: Duration) -> Self {
        Self { limit, states: Arc::default() }
    }

    /// Watches a vCPU. `devices` are its machine's, for their names.
    pub fn follow(&self, vcpu: &mut Vcpu, devices: &Devices) {
        self.states().insert(vcpu.id(), State::Runs);
        vcpu.add_watcher(Watch {
            watchdog: self.clone(),
            devices: devices.clone(),
            ticker: None,
            is_due: false,
            progress: Instant::now(),
            seen: Vec::new(),
            exits: Vec::new(),
            since: 0,
            looks: 0,
            polls: 0,
            count: 0,
        });
    }

    fn states(&self) -> std::sync::MutexGuard<'_, BTreeMap<u8, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU that hangs, if none gets anywhere or is merely idle.
    fn hung(&self) -> Option<u8> {
        let states = self.states();
        let still = states.values().all(|state| matches!(state, State::Waits | State::Hangs(_)));
        let hangs = |(&id, state): (&u8, &State)| matches!(state, State::Hangs(_)).then_some(id);
        if still { states.iter().find_map(hangs) } else { None }
    }
}

/// The watch over one vCPU.
#[derive(Debug)]
struct Watch {
    watchdog: Watchdog,
    devices: Devices,
    /// Interrupts `KVM_RUN`, from the first one on: it belongs to the thread that calls it.
    ticker: Option<Ticker>,
    /// `KVM_RUN` was interrupted.
    is_due: bool,
    /// When the vCPU was last found to get anywhere.
    progress: Instant,
    /// The registers that it has had since.
    seen: Vec<kvm_regs>,
    /// The exits that it has made since.
    exits: Vec<LastExit>,
    /// How many exits it had made at that time.
    since: u64,
    /// How often it has been looked at since.
    looks: usize,
    /// At how many of these looks it had made more exits than at the one before.
    polls: usize,
    /// How many it had made at the last one.
    count: u64,
}

impl Watch {
    /// How the machine hangs, if it does, and this is the vCPU which shows it.
    fn look(&mut self, vcpu: &Vcpu) -> Result<Option<Hang>, Error> {
        let regs = vcpu.regs()?;
        let state = vcpu.fd().get_mp_state().map_or(KVM_MP_STATE_RUNNABLE, |state| state.mp_state);
        let fresh = vcpu.last_exits().iter().filter(|exit| exit.number > self.since);
        for exit in fresh.filter(|exit| exit.data.is_some() || exit.request.is_none()) {
            let same = |known: &LastExit| LastExit { number: known.number, ..*exit } == *known;
            if !self.exits.iter().any(same) {
                self.exits.push(*exit);
            }
        }
        if !self.seen.contains(&regs) {
            self.seen.push(regs);
        }
        self.looks += 1;
        let count = vcpu.last_exits().count();
        self.polls += usize::from(count > self.count);
        self.count = count;
        if self.exits.len() > FEW || self.seen.len() > FEW {
            self.got_somewhere(vcpu);
        }
        let state = match state {
            KVM_MP_STATE_HALTED if regs.rflags & IF != 0 => State::Idle,
            KVM_MP_STATE_HALTED | KVM_MP_STATE_RUNNABLE
                if self.progress.elapsed() < self.watchdog.limit || self.looks < ENOUGH =>
            {
                State::Runs
            }
            KVM_MP_STATE_HALTED => State::Hangs(Hang::Halted),
            KVM_MP_STATE_RUNNABLE if self.polls * 2 > self.looks && !self.exits.is_empty() => {
                let device = |exit: &LastExit| self.devices.find(exit.request.as_ref()?);
                let named = |exit: &LastExit| (*exit, device(exit));
                State::Hangs(Hang::Polls(self.exits.iter().map(named).collect()))
            }
            KVM_MP_STATE_RUNNABLE => State::Hangs(Hang::Loop(self.seen.clone())),
            _ => State::Waits,
        };
        if matches!(state, State::Idle | State::Waits) {
            self.got_somewhere(vcpu);
        }
        let hang = if let State::Hangs(hang) = &state { Some(hang.clone()) } else { None };
        self.watchdog.states().insert(vcpu.id(), state);
        Ok(hang.filter(|_| self.watchdog.hung() == Some(vcpu.id())))
    }

    fn got_somewhere(&mut self, vcpu: &Vcpu) {
        self.progress = Instant::now();
        self.seen.clear();
        self.exits.clear();
        self.since = vcpu.last_exits().count();
        (self.looks, self.polls) = (0, 0);
    }
}

impl Watcher for Watch {
    fn before_run(&mut self, vcpu: &mut Vcpu, _: &[u8]) -> Result<Option<Exit<'static>>, Error> {
        if self.ticker.is_none() {
            self.ticker = Some(Ticker::new((self.watchdog.limit / LOOKS).max(LEAST))?);
            self.progress = Instant::now();
        }
        let hang = if mem::take(&mut self.is_due) { self.look(vcpu)? } else { None };
        Ok(hang.map(Exit::Hang))
    }

    fn after_run(&mut self, exit: &LastExit) -> bool {
        self.is_due = exit.reason == KVM_EXIT_INTR;
        false
    }

    fn leave(&mut self, _: &mut Vcpu, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

/// In a few words.
impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Halted => write!(f, "halted with interrupts off"),
            Self::Loop(_) => write!(f, "in a loop that gets nowhere"),
            Self::Polls(_) => write!(f, "asking devices the same again and again"),
        }
    }
}
