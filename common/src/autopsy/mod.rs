//! Introduced by stage 03: why a guest died, in words.
//!
//! A guest that dies leaves registers, memory, and the exits that it made. What killed it is in them: an
//! [`Autopsy`] decodes the instruction at which it ended, checks it as a processor does ([`Scene`]), and follows the exception to the
//! handler that it didn't reach ([`Chain`]). Where the registers are lost, the guest is run again ([`replay()`]).
//! The [`Watchdog`] finds guests that hang.
//!
//! The result is text of 80 columns, for a person: the most likely cause in one sentence, and what it was read from.

mod delivery;
mod fault;
mod replay;
mod report;
mod state;
#[cfg(test)]
mod tests;
mod watchdog;

use std::fmt;

use kvm_bindings::KVM_EXIT_SHUTDOWN;

pub use self::delivery::{Chain, Failure, Handler, Then};
pub use self::fault::{Exception, Next, Scene};
pub use self::replay::{Again, Replay, Unknown, replay};
pub use self::watchdog::{Hang, Watchdog};
use crate::last_exits::{LastExit, Request, Space};
use crate::memory::Ram;
use crate::regs::Registers;
use crate::vcpu::{Error, Exit, InternalError, Vcpu};

/// What a vCPU could not go on from, as `KVM_RUN` reports it.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// `KVM_EXIT_SHUTDOWN`.
    TripleFault,
    /// `KVM_EXIT_HLT` without an irqchip that could wake the vCPU.
    Halted,
    /// `KVM_EXIT_FAIL_ENTRY` with the hardware's reason.
    FailEntry(u64),
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError(InternalError),
    /// It wants something of a device, in a machine that has none there and takes that for an end.
    NoDevice(Request),
    /// It gets nowhere: found by a [`Watchdog`].
    Hang(Hang),
    /// An exit that this machine has no answer to, by its number.
    Unexpected(u32),
}

impl Cause {
    /// The cause that an exit is, if a guest does not go on from it.
    pub fn of(exit: &Exit) -> Option<Self> {
        Some(match exit {
            Exit::Shutdown => Self::TripleFault,
            Exit::Hlt => Self::Halted,
            Exit::FailEntry { reason, .. } => Self::FailEntry(*reason),
            Exit::InternalError(error) => Self::InternalError(error.clone()),
            Exit::Hang(hang) => Self::Hang(hang.clone()),
            Exit::IoOut { port, size, data } => {
                Self::NoDevice(Request::new(Space::Port, (*port).into(), *size, true, data.len()))
            }
            Exit::IoIn { port, size, data } => {
                Self::NoDevice(Request::new(Space::Port, (*port).into(), *size, false, data.len()))
            }
            Exit::MmioWrite { addr, data } => {
                Self::NoDevice(Request::new(Space::Memory, *addr, data.len(), true, data.len()))
            }
            Exit::MmioRead { addr, data } => {
                Self::NoDevice(Request::new(Space::Memory, *addr, data.len(), false, data.len()))
            }
            Exit::Other(reason) => Self::Unexpected(*reason),
            Exit::Debug(_) => Self::Unexpected(kvm_bindings::KVM_EXIT_DEBUG),
            Exit::SystemEvent { .. } => Self::Unexpected(kvm_bindings::KVM_EXIT_SYSTEM_EVENT),
            _ => return None,
        })
    }
}

/// In one line, without what led to it.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => write!(
                f,
                "triple fault: an exception, another one while it was delivered, and a third while \
                 that was"
            ),
            Self::Halted => write!(f, "HLT, and nothing that could wake it"),
            Self::FailEntry(reason) => {
                write!(f, "the processor refused the guest's state (hardware reason {reason:#x})")
            }
            Self::InternalError(error) => {
                write!(f, "{}, KVM could not go on", error.name())?;
                error.data.iter().try_for_each(|word| write!(f, " {word:#x}"))
            }
            Self::NoDevice(request) => write!(f, "{}", report::no_device(request)),
            Self::Hang(hang) => write!(f, "it hangs, {hang}"),
            Self::Unexpected(reason) => write!(f, "an exit nobody handles, reason {reason}"),
        }
    }
}

/// What was found out about a guest that died.
#[derive(Debug)]
pub struct Autopsy {
    vcpu: u8,
    cause: Cause,
    /// The registers at its end, unless they are lost.
    registers: Option<Registers>,
    ram: Ram,
    /// The second run, or why there is none, if one was needed.
    replay: Option<Result<Replay, Unknown>>,
    exits: Vec<LastExit>,
    /// What else was found to be wrong.
    finding: Option<String>,
}

/// How many of the last exits are told.
const EXITS: usize = 8;

impl Autopsy {
    /// Of a guest whose `vcpu` has ended by `cause`, or hangs. `again` makes its machine once more as it was before its
    /// first instruction; without it, what happened stays unknown where the registers are lost.
    pub fn of(vcpu: &Vcpu, cause: Cause, again: Option<&mut Again>) -> Result<Self, Error> {
        let registers = Registers::of(vcpu)?;
        let lost = cause == Cause::TripleFault && registers.is_reset();
        let second = lost.then(|| match again {
            Some(again) => replay(vcpu.journal(), again),
            None => Err(Unknown::NotRepeatable),
        });
        let (registers, ram) = match &second {
            None => (Some(registers), vcpu.vm().ram()),
            Some(Ok(second)) => (Some(second.registers), second.ram.clone()),
            Some(Err(_)) => (None, vcpu.vm().ram()),
        };
        // The end itself is none of them: its RIP may be that of the reset state.
        let before = vcpu.last_exits().iter().rev().filter(|exit| exit.reason != KVM_EXIT_SHUTDOWN);
        let mut exits: Vec<_> = before.take(EXITS).copied().collect();
        exits.reverse();
        Ok(Self { vcpu: vcpu.id(), cause, registers, ram, replay: second, exits, finding: None })
    }

    /// With something that is wrong with what the guest was given: more likely a cause than what came of it.
    pub fn with_finding(self, finding: Option<String>) -> Self {
        Self { finding, ..self }
    }

    /// The registers at the guest's end, unless they are lost.
    pub fn registers(&self) -> Option<&Registers> {
        self.registers.as_ref()
    }

    /// The exception that killed it and what came of it, if it was one.
    pub fn chain(&self) -> Option<Chain> {
        let scene = Scene::new(&self.ram, self.registers.as_ref()?);
        match (&self.cause, scene.next()) {
            (Cause::Hang(_) | Cause::NoDevice(_), _) => None,
            (_, Next::Raises(exception)) => Some(Chain::of(&scene, exception)),
            _ => None,
        }
    }

    /// The most likely cause, in one sentence.
    pub fn sentence(&self) -> String {
        let end = self.end();
        self.finding.as_ref().map_or(end.clone(), |finding| format!("{finding}; then {end}"))
    }

    /// How it ended.
    fn end(&self) -> String {
        let Some(registers) = &self.registers else {
            let why = match &self.replay {
                Some(Err(why)) => why.to_string(),
                _ => String::new(),
            };
            return format!("not known, for the registers are lost with the triple fault; {why}");
        };
        let scene = Scene::new(&self.ram, registers);
        let place = report::place(registers);
        let text = scene.instruction().map_or_else(String::new, |it| format!(" `{}`", it.text));
        match &self.cause {
            Cause::Hang(hang) => return report::hang(&scene, hang),
            Cause::NoDevice(request) => {
                return format!("{}; it stands at {place}{text}", report::no_device(request));
            }
            Cause::FailEntry(_) => {
                return state::inconsistency(registers).unwrap_or_else(|| {
                    "none of the rules that KVM leaves to the processor is broken, as far as they \
                     are known here"
                        .into()
                });
            }
            _ => {}
        }
        let end = match scene.next() {
            Next::NoMemory(physical) => format!(
                "the instruction at {place} would come from guest-physical {physical:#x}, where \
                 no memory is"
            ),
            Next::Raises(exception) => {
                let chain = Chain::of(&scene, exception);
                match (&chain.handler, &self.cause) {
                    (Some(handler), Cause::TripleFault) => format!(
                        "{chain}; its handler at {:#x} seems in order, and why it was not reached is \
                         not known",
                        handler.rip
                    ),
                    _ => chain.to_string(),
                }
            }
            Next::Executes => match &self.cause {
                Cause::InternalError(_) => {
                    format!("KVM has to emulate{text} at {place}, and cannot")
                }
                Cause::Halted => {
                    format!("HLT before {place}, and no interrupt controller that could wake it")
                }
                _ => format!("at {place}{text}, where nothing is found to be wrong"),
            },
        };
        self.before().map_or(end.clone(), |before| format!("{before}; {end}"))
    }

    /// The exception in whose handler it died.
    fn before(&self) -> Option<String> {
        let Some(Ok(second)) = &self.replay else { return None };
        let chain = second.handled.first()?;
        let rip = chain.handler?.rip;
        let more = second.handled.len() + second.more_handled - 1;
        Some(match more {
            0 => format!("{chain}, and in its handler at {rip:#x}"),
            _ => {
                format!("{chain}, and in its handler at {rip:#x} {more} more before that returned")
            }
        })
    }
}
