//! Introduced by stage 03: a guest watched at work: each exit as a line, as an event in a file, in a table.
//!
//! An exit says what the guest wants: a port or an address, and bytes. What made the guest want that is not in
//! it. The vCPU's registers and the guest's memory are the rest of the story: in which mode it runs, where, and
//! which instruction it is. An [`Event`] has both, what the device answered, and how long the monitor took.
//!
//! Events are data. A [`Sink`] takes them; [`Lines`] is the one that writes a line for each. A [`File`] takes what
//! happened when, for a picture of it, and [`Stats`] count. A trace sits in each vCPU, around its `KVM_RUN`, so that a
//! run loop knows nothing of it. Without one nobody looks at the clock, and KVM is asked for nothing.

mod devices;
mod file;
mod follower;
mod lines;
mod origin;
mod stats;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use thiserror::Error;

pub use self::devices::Devices;
pub use self::file::{File, LEAST};
use self::follower::Follower;
pub use self::lines::{Lines, Marks};
pub use self::stats::{Row, Stats};
use crate::disasm::{self, Instruction};
use crate::error::{Blame, Blamed};
pub use crate::last_exits::Space;
use crate::memory::Vm;
use crate::regs::{Change, Registers};
use crate::vcpu::{self, Vcpu};

/// Why a trace cannot be what was asked for.
#[derive(Debug, Error)]
pub enum Error {
    /// Two commas, or nothing at all.
    #[error("a word is empty; give io, mmio, irq, nobody, every, step, or a device's name")]
    Empty,
    /// `rate:` is followed by something else than a number.
    #[error("rate:{0} is no number of lines; give rate:N with N lines a second, from 1 up")]
    Rate(String),
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
    /// The file for the trace cannot be made.
    #[error("cannot write a trace to {}: {source}", .path.display())]
    File {
        /// Its name.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a pipe or a device.
    #[error("cannot write a trace to {}: it is no file; name one, for its end is written again and again", .path.display())]
    NoFile {
        /// Its name.
        path: PathBuf,
    },
    /// It may have next to nothing in it.
    #[error("a trace of {most} bytes has room for nothing; give it at least {LEAST}")]
    Small {
        /// How much it may have.
        most: u64,
    },
    /// A vCPU did not say where it stands.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Vcpu(error) => error.blame(),
            _ => Blame::Input,
        }
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
    /// How long the monitor took, from the exit until it called `KVM_RUN` again.
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

    /// Whether it has room for one: what it has no room for isn't looked at any further.
    fn has_room(&mut self, at: Duration) -> bool {
        let _ = at;
        true
    }

    /// Takes the news that the interrupt line `gsi` was raised.
    fn raised(&mut self, at: Duration, gsi: u32) {
        let _ = (at, gsi);
    }

    /// No event comes any more.
    fn finish(&mut self) {}
}

/// How many instructions `step` shows if it isn't told.
const STEPS: u32 = 32;

/// How many lines a second there are at most if nobody says otherwise: no terminal shows, and nobody reads, more.
const RATE: u32 = 1000;

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
/// word for the devices which have it in their names. `irq` shows the interrupt lines that devices raise. `step` or
/// `step:N` shows the first 32 or N instructions of each vCPU. `rate:N` allows N lines a second instead of 1000, and
/// `every` all of them, even where the guest runs in a loop. Without a word that asks for accesses, lines or steps it
/// is all accesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    parts: Vec<Part>,
    irq: bool,
    steps: u32,
    every: bool,
    rate: u32,
}

impl FromStr for Filter {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut filter = Self { parts: Vec::new(), irq: false, steps: 0, every: false, rate: RATE };
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
                ("rate", count) if word.contains(':') => {
                    let rate = count.parse().ok().filter(|&rate| rate > 0);
                    filter.rate = rate.ok_or_else(|| Error::Rate(count.to_owned()))?;
                    continue;
                }
                ("irq", "") => {
                    filter.irq = true;
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
        if filter.parts.is_empty() && filter.steps == 0 && !filter.irq {
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

    /// How many lines a second there may be; as many as there are where each event is wanted.
    pub fn rate(&self) -> Option<u32> {
        (!self.every).then_some(self.rate)
    }

    /// Whether vCPUs go step by step, at first.
    pub fn steps(&self) -> bool {
        self.steps > 0
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

/// A machine's trace: what is wanted of it, and where it goes.
#[derive(Default)]
pub struct Trace {
    lines: Option<(Filter, Mutex<Box<dyn Sink>>)>,
    file: Option<File>,
    stats: Option<Mutex<Stats>>,
    /// When the first vCPU was first followed.
    began: OnceLock<Instant>,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let filter = self.lines.as_ref().map(|(filter, _)| filter);
        f.debug_struct("Trace").field("filter", &filter).finish_non_exhaustive()
    }
}

impl Trace {
    /// Has `sink` take what `filter` wants.
    pub fn with_lines(self, filter: Filter, sink: impl Sink + 'static) -> Self {
        Self { lines: Some((filter, Mutex::new(Box::new(sink)))), ..self }
    }

    /// Has `file` take everything.
    pub fn with_file(self, file: File) -> Self {
        Self { file: Some(file), ..self }
    }

    /// Has everything counted.
    pub fn with_stats(self) -> Self {
        Self { stats: Some(Mutex::default()), ..self }
    }

    /// Has the machine's interrupt lines and its devices' own threads traced, too: those that are made from now on.
    /// A machine has one trace at most.
    pub fn attach(self: &Arc<Self>, vm: &Vm) {
        vm.set_trace(Arc::clone(self));
    }

    /// Whether the machine has what the filter names.
    pub fn check(&self, devices: &Devices) -> Result<(), Error> {
        self.lines.as_ref().map_or(Ok(()), |(filter, _)| filter.check(&devices.names()))
    }

    /// Follows a vCPU, which is about to take its first instruction, to its end.
    pub fn follow(self: &Arc<Self>, vcpu: &mut Vcpu, devices: &Devices) -> Result<(), Error> {
        self.check(devices)?;
        let now = *self.began.get_or_init(Instant::now);
        let mut steps = 0;
        if let Some((filter, _)) = &self.lines {
            let state = vcpu.fd().get_mp_state();
            let state = state.map_or(KVM_MP_STATE_RUNNABLE, |state| state.mp_state);
            let registers = Registers::of(vcpu)?;
            // Where a vCPU that waits will start is up to who starts it.
            let runs = state == KVM_MP_STATE_RUNNABLE;
            let instruction = if runs { disasm::next(vcpu, &registers) } else { None };
            steps = filter.steps * u32::from(runs);
            let (at, what) = (self.since(now), What::Start { runs });
            self.take(&Event { at, vcpu: vcpu.id(), registers, instruction, what });
        }
        vcpu.add_watcher(Follower::new(Arc::clone(self), devices.clone(), steps));
        Ok(())
    }

    /// What was counted so far, if that is wanted.
    pub fn stats(&self) -> Option<Stats> {
        self.stats.as_ref().map(|stats| lock(stats).clone())
    }

    /// Writes what is still to be written: no vCPU runs any more.
    pub fn finish(&self) {
        if let Some((_, sink)) = &self.lines {
            lock(sink).finish();
        }
        if let Some(file) = &self.file {
            file.finish();
        }
    }

    /// An interrupt line was raised.
    #[cfg(feature = "stage05")]
    pub(crate) fn raised(&self, gsi: u32) {
        let at = self.since(Instant::now());
        if let Some((filter, sink)) = &self.lines
            && filter.irq
        {
            lock(sink).raised(at, gsi);
        }
        if let Some(file) = &self.file {
            file.record(file::Record::Line { at, gsi });
        }
    }

    /// The device `number` has worked on its own thread since `began`.
    #[cfg(feature = "stage08")]
    pub(crate) fn worked(&self, number: u32, name: &'static str, began: Instant) {
        if let Some(file) = &self.file {
            let (from, to) = (self.since(began), self.since(Instant::now()));
            file.record(file::Record::Work { number, name, from, to });
        }
    }

    fn take(&self, event: &Event) {
        if let Some((_, sink)) = &self.lines {
            lock(sink).take(event);
        }
    }

    /// How long after the start of the trace.
    fn since(&self, at: Instant) -> Duration {
        let began = *self.began.get_or_init(|| at);
        at.saturating_duration_since(began)
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

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
            ("irq", [false; 4]),
            ("rate:5", [true; 4]),
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
        assert!(filter("irq").irq && !filter("all").irq);
        let rates = ["io", "rate:7,io", "rate:7,every"].map(|words| filter(words).rate());
        assert_eq!(rates, [Some(1000), Some(7), None]);
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        let refused = |text: &str| Filter::from_str(text).unwrap_err().to_string();
        let empty = Error::Empty.to_string();
        assert_eq!([refused(""), refused("io,"), refused(" ")], [empty.as_str(); 3]);
        for count in ["", "0", "-1", "x", "99999999999", "1:2"] {
            let steps = Error::Steps(count.into()).to_string();
            assert_eq!(refused(&format!("step:{count}")), steps);
            assert_eq!(refused(&format!("rate:{count}")), Error::Rate(count.into()).to_string());
        }
    }

    #[test]
    fn a_device_that_the_machine_has_not_is_named_with_those_that_it_has() {
        let names = ["POST code", "disk"];
        for words in ["all", "post", "POST code", "io,mmio,nobody,step,every", "disk,io"] {
            assert!(filter(words).check(&names).is_ok(), "{words}");
        }
        let error = filter("io,Flop:py").check(&names).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"there is no device "flop:py" to trace; there are: POST code, disk"#
        );
        assert_eq!(error.blame(), Blame::Input);
    }
}
