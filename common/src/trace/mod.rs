//! Introduced by stage 06: a guest watched at work, an event for each of its exits.
//!
//! An exit says what the guest wants: a port or an address, and bytes. What made the guest want that is not in
//! it. The vCPU's registers and the guest's memory are the rest of the story: in which mode it runs, where, and
//! which instruction it is. An [`Event`] has both, and what the device answered.
//!
//! Events are data. A [`Sink`] takes them; [`Lines`] is the one that writes a line for each. Without a trace the
//! run loop asks KVM for nothing that it doesn't ask for anyway, and copies nothing.

mod lines;
mod origin;

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use thiserror::Error;

pub use self::lines::{Lines, Marks};
use crate::disasm::{self, Instruction};
use crate::error::{Blame, Blamed};
pub use crate::last_exits::Space;
use crate::regs::{Change, Registers};
use crate::step;
use crate::vcpu::{self, Exit, Vcpu};

/// Why a trace cannot be what was asked for.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Two commas, or nothing at all.
    #[error("a word is empty; give io, mmio, nobody, every, step, or a device's name")]
    Empty,
    /// `step:` is followed by something else than a number.
    #[error("step:{0} is no number of instructions; give step:N with N from 1 up")]
    Steps(String),
    /// The machine has no such device.
    #[error("there is no device {word:?} to trace; there are: {known}")]
    NoDevice {
        /// What was asked for.
        word: String,
        /// The names of all devices.
        known: String,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Input
    }
}

/// An access of the guest to a device, with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where `addr` counts.
    pub space: Space,
    /// The port or the guest-physical address.
    pub addr: u64,
    /// Bytes of one access.
    pub size: usize,
    /// Whether the guest writes.
    pub write: bool,
    /// What it wrote, or what it was given: one access, or for a string instruction several.
    pub data: Vec<u8>,
    /// The device's name, if there is one.
    pub device: Option<&'static str>,
    /// How long the device took.
    pub took: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// The vCPU is about to run for the first time, or to wait for another one that starts it (INIT and
    /// SIPI; AMD APM vol. 2, 15.21.8).
    Start {
        /// Whether it runs at once.
        runs: bool,
    },
    /// One instruction, executed by a single step, and the registers that it changed.
    Step(Vec<Change>),
    /// An access to a device.
    Access(Access),
    /// An exit from which the guest does not go on, by its name.
    End(&'static str),
}

/// Something that a vCPU did.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When, since the first vCPU's start.
    pub at: Duration,
    /// The vCPU's number.
    pub vcpu: u8,
    /// Its registers. RIP is that of the instruction in question, also where KVM had moved on.
    pub registers: Registers,
    /// That instruction, if it can be told.
    pub instruction: Option<Instruction>,
    /// What it did.
    pub what: What,
}

/// Where events go.
pub trait Sink: Send {
    /// Takes an event. One vCPU's events come in order, those of several mixed.
    fn take(&mut self, event: &Event);

    /// No event comes any more.
    fn finish(&mut self) {}
}

/// How many instructions `step` shows if it isn't told.
const STEPS: u32 = 32;

/// A part of the accesses.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    All,
    Space(Space),
    /// Those that no device answers.
    Nobody,
    /// Those of devices with this in their names, which is in lower case.
    Device(String),
}

/// Which events are wanted: words with commas between them.
///
/// `io` and `mmio` stand for accesses to ports and to memory, `nobody` for those that no device answers, any other
/// word for the devices which have it in their names. `step` or `step:N` shows the first 32 or N
/// instructions of each vCPU, `every` each event even where the guest runs in a loop. Without a word that asks for
/// accesses or steps it is all accesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    parts: Vec<Part>,
    steps: u32,
    every: bool,
}

impl FromStr for Filter {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut filter = Self { parts: Vec::new(), steps: 0, every: false };
        for word in text.split(',').map(|word| word.trim().to_lowercase()) {
            let part = match word.split_once(':').unwrap_or((&word, "")) {
                ("step", "") if !word.ends_with(':') => {
                    filter.steps = STEPS;
                    continue;
                }
                ("step", count) => {
                    let steps = count.parse().ok().filter(|&count| count > 0);
                    filter.steps = steps.ok_or_else(|| Error::Steps(count.to_owned()))?;
                    continue;
                }
                ("every", "") => {
                    filter.every = true;
                    continue;
                }
                ("", _) => return Err(Error::Empty),
                ("all", "") => Part::All,
                ("io", "") => Part::Space(Space::Port),
                ("mmio", "") => Part::Space(Space::Memory),
                ("nobody", "") => Part::Nobody,
                _ => Part::Device(word),
            };
            filter.parts.push(part);
        }
        if filter.parts.is_empty() && filter.steps == 0 {
            filter.parts.push(Part::All);
        }
        Ok(filter)
    }
}

impl Filter {
    /// Whether each event is wanted, also where the guest runs in a loop.
    pub fn every(&self) -> bool {
        self.every
    }

    fn wants(&self, space: Space, device: Option<&str>) -> bool {
        self.parts.iter().any(|part| match part {
            Part::All => true,
            Part::Space(part) => *part == space,
            Part::Nobody => device.is_none(),
            Part::Device(word) => device.is_some_and(|name| name.to_lowercase().contains(word)),
        })
    }

    /// Whether each word that is to be a device's name is in one of `names`.
    fn check(&self, names: &[&str]) -> Result<(), Error> {
        for part in &self.parts {
            if let Part::Device(word) = part
                && !names.iter().any(|name| name.to_lowercase().contains(word))
            {
                return Err(Error::NoDevice { word: word.clone(), known: names.join(", ") });
            }
        }
        Ok(())
    }
}

/// A machine's trace: what is wanted, and where it goes.
pub struct Trace {
    filter: Filter,
    sink: Mutex<Box<dyn Sink>>,
    /// When the first vCPU was first followed.
    began: OnceLock<Instant>,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("filter", &self.filter).finish_non_exhaustive()
    }
}

impl Trace {
    /// Has `sink` take what `filter` wants.
    pub fn new(filter: Filter, sink: impl Sink + 'static) -> Self {
        Self { filter, sink: Mutex::new(Box::new(sink)), began: OnceLock::new() }
    }

    /// Whether the machine has what the filter names: `names` are all devices' names.
    pub fn check(&self, names: &[&str]) -> Result<(), Error> {
        self.filter.check(names)
    }

    /// Follows a vCPU from its first instruction on.
    pub fn follow(&self, vcpu: &Vcpu) -> Result<Follower<'_>, vcpu::Error> {
        let mut follower = Follower {
            trace: self,
            steps: self.filter.steps,
            before: None,
            told: false,
            habit: origin::Habit::default(),
        };
        let state = vcpu.fd().get_mp_state().map_or(KVM_MP_STATE_RUNNABLE, |state| state.mp_state);
        let registers = Registers::of(vcpu)?;
        let runs = state == KVM_MP_STATE_RUNNABLE;
        // Where a vCPU that waits will start is up to who starts it.
        let instruction = if runs { disasm::next(vcpu, &registers) } else { None };
        follower.steps *= u32::from(runs);
        follower.send(vcpu, Instant::now(), registers, instruction, What::Start { runs });
        Ok(follower)
    }

    /// Has the sink finish.
    pub fn finish(&self) {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner).finish();
    }
}

/// What an exit was, kept from the moment when it is answered to the one when the vCPU can be asked where it stands.
#[derive(Debug)]
pub struct Seen {
    at: Instant,
    what: Kind,
}

#[derive(Debug)]
enum Kind {
    Access(Access),
    Step,
    End(&'static str),
}

/// The trace of one vCPU.
#[derive(Debug)]
pub struct Follower<'a> {
    trace: &'a Trace,
    /// How many instructions are still to be shown.
    steps: u32,
    /// The vCPU before the instruction that is being stepped over.
    before: Option<(Registers, Option<Instruction>)>,
    /// An event has shown that instruction already.
    told: bool,
    habit: origin::Habit,
}

impl Follower<'_> {
    /// Comes before each `KVM_RUN`: asks for a single step if one is to be shown.
    pub fn before_run(&mut self, vcpu: &Vcpu) -> Result<(), vcpu::Error> {
        if self.steps == 0 {
            return Ok(());
        }
        if self.before.is_none() {
            let registers = Registers::of(vcpu)?;
            self.before = Some((registers, disasm::next(vcpu, &registers)));
        }
        vcpu.set_single_step(true)
    }

    /// Whether `exit` is one that this has asked for.
    pub fn asked_for(&self, exit: &Exit) -> bool {
        self.steps > 0 && matches!(exit, Exit::Debug(_))
    }

    /// Takes down `exit`, which came at `at` and has just been answered, if it is wanted. `name` is the
    /// device's, or that of an exit which ends the guest.
    pub fn see(&self, exit: &Exit, name: &'static str, at: Instant) -> Option<Seen> {
        let took = at.elapsed();
        let access = |space, addr: u64, size, write, data: &[u8]| {
            let device = (!NOBODY.contains(&name)).then_some(name);
            let wanted = self.trace.filter.wants(space, device);
            wanted.then(|| {
                let data = data.to_vec();
                Kind::Access(Access { space, addr, size, write, data, device, took })
            })
        };
        let what = match exit {
            Exit::IoOut { port, size, data } => {
                access(Space::Port, (*port).into(), *size, true, data)
            }
            Exit::IoIn { port, size, data } => {
                access(Space::Port, (*port).into(), *size, false, data)
            }
            Exit::MmioWrite { addr, data } => access(Space::Memory, *addr, data.len(), true, data),
            Exit::MmioRead { addr, data } => access(Space::Memory, *addr, data.len(), false, data),
            Exit::Debug(_) if self.steps > 0 => Some(Kind::Step),
            // The signal that ends us is no doing of the guest's.
            Exit::Interrupted => None,
            _ => Some(Kind::End(name)),
        };
        what.map(|what| Seen { at, what })
    }

    /// Tells what was seen, with the vCPU outside `KVM_RUN` since then.
    pub fn tell(&mut self, vcpu: &Vcpu, seen: Seen) -> Result<(), vcpu::Error> {
        let registers = Registers::of(vcpu)?;
        let (registers, instruction, what) = match seen.what {
            Kind::Access(access) => {
                let (registers, instruction) = self.habit.origin(vcpu, registers, &access);
                self.told = true;
                (registers, instruction, What::Access(access))
            }
            Kind::Step => {
                let Some((before, instruction)) = self.before.take() else { return Ok(()) };
                self.steps_to(vcpu, &before, &registers, instruction.as_ref())?;
                if std::mem::take(&mut self.told) {
                    return Ok(());
                }
                let changes = step::changes(&before, instruction.as_ref(), &registers);
                (before, instruction, What::Step(changes))
            }
            Kind::End(name) => (registers, disasm::next(vcpu, &registers), What::End(name)),
        };
        self.send(vcpu, seen.at, registers, instruction, what);
        Ok(())
    }

    /// Counts a step. A string instruction is stepped through element by element, and is still one instruction.
    fn steps_to(
        &mut self,
        vcpu: &Vcpu,
        before: &Registers,
        after: &Registers,
        instruction: Option<&Instruction>,
    ) -> Result<(), vcpu::Error> {
        let repeats = instruction.is_some_and(|it| it.text.starts_with("rep"));
        if repeats && before.linear_rip() == after.linear_rip() {
            return Ok(());
        }
        self.steps -= 1;
        if self.steps == 0 { vcpu.set_single_step(false) } else { Ok(()) }
    }

    fn send(
        &self,
        vcpu: &Vcpu,
        at: Instant,
        registers: Registers,
        instruction: Option<Instruction>,
        what: What,
    ) {
        let began = *self.trace.began.get_or_init(|| at);
        let at = at.saturating_duration_since(began);
        let event = Event { at, vcpu: vcpu.id(), registers, instruction, what };
        self.trace.sink.lock().unwrap_or_else(PoisonError::into_inner).take(&event);
    }
}

/// What the run loop calls an access that no device answers.
pub(crate) const NOBODY: [&str; 2] = ["port without a device", "address without a device"];

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> Filter {
        text.parse().unwrap()
    }

    #[test]
    fn words_choose_accesses() {
        for (words, chosen) in [
            ("all", [true, true, true, true]),
            ("every", [true, true, true, true]),
            ("io", [true, true, true, false]),
            ("mmio", [false, false, false, true]),
            ("nobody", [false, false, true, false]),
            ("disk", [true, true, false, false]),
            (" Control , mmio", [false, true, false, true]),
            ("step", [false; 4]),
            ("step:7,every,io", [true, true, true, false]),
        ] {
            let filter = filter(words);
            let accesses = [
                (Space::Port, Some("disk")),
                (Space::Port, Some("Disk control")),
                (Space::Port, None),
                (Space::Memory, Some("virtio")),
            ];
            assert_eq!(accesses.map(|(space, name)| filter.wants(space, name)), chosen, "{words}");
        }
        assert_eq!(
            [filter("step").steps, filter("io,step:7").steps, filter("io").steps],
            [32, 7, 0]
        );
        assert!(filter("io,every").every() && !filter("io").every());
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        let refused = |text: &str| Filter::from_str(text).unwrap_err();
        assert_eq!([refused(""), refused("io,"), refused(" ")], [const { Error::Empty }; 3]);
        for count in ["0", "-1", "x", "99999999999", "1:2"] {
            assert_eq!(refused(&format!("step:{count}")), Error::Steps(count.into()));
        }
        assert_eq!(refused("step:"), Error::Steps(String::new()));
    }

    #[test]
    fn a_device_that_the_machine_has_not_is_named_with_those_that_it_has() {
        let names = ["POST code", "disk"];
        for words in ["all", "post", "POST code", "io,mmio,nobody,step,every", "disk,io"] {
            assert_eq!(filter(words).check(&names), Ok(()), "{words}");
        }
        let error = filter("io,Flop:py").check(&names).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"there is no device "flop:py" to trace; there are: POST code, disk"#
        );
        assert_eq!(error.blame(), Blame::Input);
    }
}
