//! Introduced by stage 01: the host's check-up, by tiny guests that try what the stages need.
//!
//! A `/dev/kvm` that opens is not yet one that works: KVM inside a virtual machine or on top of another
//! hypervisor's kernel may run ring 3 and not ring 0, or real mode and not paging, and no capability
//! tells. So the check-up runs probes (`asm/probes/`), each in a virtual machine of its own, and looks at
//! what they did: a number that it draws has to come back by the way that the probe is to prove. A probe
//! which never comes back is stopped when its time is up.
//!
//! How a guest is given memory is stage 02's subject and how it is run is stage 03's; here both are a
//! black box.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_pit_config;
use kvm_ioctls::Kvm;
use serde::{Serialize, Serializer};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::deadline::{self, Deadline};
use crate::kvm::Capability;
use crate::layout::{PAGE_SIZE, PROGRAM, TEXT_SCREEN, VGA_HOLE};
use crate::memory::{self, SlotFlags, Vm};
use crate::vcpu::{self, Exit, Vcpu};

/// Instructions a second below which ring 0 is too slow for the stages that run a kernel, 06 to 08.
///
/// Linux executes in the order of a thousand million instructions until its first user-space line: a minute
/// at this speed. Hardware and emulated SVM are more than ten times faster than this, a KVM that interprets
/// ring 0 more than ten times slower, so a busy machine does not change the verdict.
pub const RING0_SPEED: f64 = 20e6;

/// How long one probe may take. On a working host each needs a few milliseconds.
const LIMIT: Duration = Duration::from_secs(2);

/// Exits that one probe may cause. The busiest needs a few dozen.
const EXITS: u32 = 10_000;

/// The probes' RAM: all of the first 640 KiB, as in a PC.
const RAM: usize = VGA_HOLE.0 as usize;

// The other end of asm/include/probe.inc.
const NONCE: u16 = 0x10;
const ANSWER: u16 = 0x14;
const STEP: u16 = 0x80;
const DONE: u8 = 0xFF;
const RESULT: u64 = 0x600;
const TARGET: u64 = 0x2_0000;

/// Instructions in one turn of the loop in `asm/probes/speed.asm`.
const LOOP_INSTRUCTIONS: u32 = 3;

/// The probes as flat binaries. The crate `asm` assembles them and fills this in.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "each is the file of that name in asm/probes")]
pub struct Probes {
    pub real16: &'static [u8],
    pub protected32: &'static [u8],
    pub paging32: &'static [u8],
    pub long_mode: &'static [u8],
    pub speed: &'static [u8],
    pub irqchip: &'static [u8],
    pub smp: &'static [u8],
    pub single_step: &'static [u8],
    pub ring3: &'static [u8],
    pub cmpxchg16b: &'static [u8],
    pub fpu_state: &'static [u8],
    pub mmio: &'static [u8],
    pub rom: &'static [u8],
    pub touch: &'static [u8],
}

/// What a probe tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Real mode, ports, HLT.
    Real16,
    /// 32-bit protected mode without paging, a software interrupt.
    Protected32,
    /// 32-bit paging with 4 MiB and 4 KiB pages.
    Paging32,
    /// Long mode with 4-level paging.
    LongMode,
    /// Ring 3 and back: IRETQ, INT, SYSCALL, SYSRET, a refused instruction.
    Ring3,
    /// How fast ring 0 is, against [`RING0_SPEED`].
    Ring0Speed,
    /// CMPXCHG16B in ring 0.
    Cmpxchg16b,
    /// FXSAVE, FXRSTOR, XSAVE, XRSTOR in ring 0.
    FpuState,
    /// One exit an instruction with `KVM_GUESTDBG_SINGLESTEP`.
    SingleStep,
    /// Accesses where no memory is.
    Mmio,
    /// A read-only memslot.
    ReadOnlySlot,
    /// The log of written pages.
    DirtyLog,
    /// In-kernel PIC and PIT, an irqfd.
    Irqchip,
    /// A second vCPU, started by INIT and STARTUP.
    Smp,
}

type Try = fn(&Kvm, &Probes, &mut Report) -> Result<(), Failure>;

impl Probe {
    /// All of them, in the order in which they are run.
    pub const ALL: [Self; 14] = [
        Self::Real16,
        Self::Protected32,
        Self::Paging32,
        Self::LongMode,
        Self::Ring3,
        Self::Ring0Speed,
        Self::Cmpxchg16b,
        Self::FpuState,
        Self::SingleStep,
        Self::Mmio,
        Self::ReadOnlySlot,
        Self::DirtyLog,
        Self::Irqchip,
        Self::Smp,
    ];

    // ANCHOR: needed_by
    /// The probes without which `stage` (1 to 8) cannot do what it shows, in the order of [`Self::ALL`].
    pub fn needed_by(stage: u8) -> &'static [Self] {
        use Probe::*;
        match stage {
            2 => &[Real16, ReadOnlySlot, DirtyLog],
            3 => &[Real16, SingleStep],
            4 => &[Real16],
            5 => &[Real16, Mmio, ReadOnlySlot, Irqchip],
            6 => &[Real16, Protected32, Paging32, LongMode, Ring3, Ring0Speed, Irqchip],
            7 => &[Real16, Protected32, Paging32, LongMode, Ring3, Ring0Speed, Irqchip, Smp],
            8 => &[LongMode, Ring3, Ring0Speed, Cmpxchg16b, FpuState, Mmio, Irqchip, Smp],
            _ => &[],
        }
    }
    // ANCHOR_END: needed_by

    /// What it tries, in a few words for a person.
    pub fn what(self) -> &'static str {
        self.entry().0
    }

    fn entry(self) -> (&'static str, Try) {
        match self {
            Self::Real16 => ("16-bit real mode, ports, HLT", real16),
            Self::Protected32 => ("32-bit protected mode", protected32),
            Self::Paging32 => ("32-bit paging", paging32),
            Self::LongMode => ("long mode, 4-level paging", long_mode),
            Self::Ring3 => ("ring 3 and back", ring3),
            Self::Ring0Speed => ("speed of ring 0", speed),
            Self::Cmpxchg16b => ("CMPXCHG16B in ring 0", cmpxchg16b),
            Self::FpuState => ("FXRSTOR and XRSTOR in ring 0", fpu_state),
            Self::SingleStep => ("single step", single_step),
            Self::Mmio => ("memory-mapped I/O", mmio),
            Self::ReadOnlySlot => ("read-only memslot", rom),
            Self::DirtyLog => ("dirty log", dirty_log),
            Self::Irqchip => ("in-kernel irqchip, PIT, irqfd", irqchip),
            Self::Smp => ("second vCPU by INIT and STARTUP", smp),
        }
    }
}

/// Why a probe did not get through.
#[derive(Debug, Error)]
pub enum Failure {
    /// KVM refused memory or a VM ioctl.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// KVM refused a vCPU ioctl.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// No time limit could be set.
    #[error(transparent)]
    Deadline(#[from] deadline::Error),
    /// Another ioctl, or a resource that the host has run out of.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// An exit that the probe does not cause on a working host.
    #[error("{exit} {}", after(*.step))]
    Exit {
        /// Which, and where the guest was.
        exit: String,
        /// The last step that the probe had said it reached; 0 if none.
        step: u8,
    },
    /// It neither ended nor failed in time.
    #[error("no end within {LIMIT:?} {}", after(*.step))]
    Time {
        /// As in `Exit`.
        step: u8,
    },
    /// It kept leaving the guest.
    #[error("no end after {EXITS} exits")]
    Exits,
    /// It ended, and what it left behind is not what it should be.
    #[error("{what}: found {found}, expected {expected}")]
    Result {
        /// What was looked at.
        what: &'static str,
        /// What was there.
        found: String,
        /// What a working host leaves there.
        expected: String,
    },
    /// Ring 0 is slower than [`RING0_SPEED`].
    #[error("{} instructions/s, {} wanted", Millions(*.0), Millions(RING0_SPEED))]
    Slow(f64),
}

fn after(step: u8) -> String {
    if step == 0 { "before its first step".into() } else { format!("after step {step}") }
}

/// A number in millions, with one decimal where that says something.
struct Millions(f64);

impl fmt::Display for Millions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = self.0 / 1e6;
        write!(f, "{millions:.*} M", if millions < 10.0 { 1 } else { 0 })
    }
}

/// How one probe went.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Which.
    pub probe: Probe,
    /// Nothing if it passed.
    #[serde(serialize_with = "in_words")]
    pub failure: Option<Failure>,
    /// How long it took, in microseconds.
    pub micros: u64,
}

fn in_words<S: Serializer>(failure: &Option<Failure>, to: S) -> Result<S::Ok, S::Error> {
    match failure {
        Some(failure) => to.collect_str(failure),
        None => to.serialize_none(),
    }
}

/// Whether this host can do what a stage shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// 1 to 8.
    pub stage: u8,
    /// Whether it can.
    pub able: bool,
    /// The capabilities and the probes that it lacks, by name; empty if it can.
    pub lacks: Vec<&'static str>,
    /// Why it cannot, in full words; empty if it can.
    pub reason: String,
}

/// What the check-up found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The probes in the order in which they ran.
    pub outcomes: Vec<Outcome>,
    /// The speed of ring 0 in instructions a second, if it could be measured.
    pub ring0_speed: Option<f64>,
    /// One verdict a stage, 1 to 8.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// Whether this host can do what `stage` (1 to 8) shows.
    ///
    /// # Panics
    /// For other numbers.
    pub fn verdict(&self, stage: u8) -> &Verdict {
        self.verdicts.iter().find(|verdict| verdict.stage == stage).expect("there are eight stages")
    }

    /// How `probe` went; nothing if it was not run.
    pub fn outcome(&self, probe: Probe) -> Option<&Outcome> {
        self.outcomes.iter().find(|outcome| outcome.probe == probe)
    }

    fn run(&mut self, kvm: &Kvm, probes: &Probes, which: &[Probe]) {
        for &probe in which {
            let started = Instant::now();
            let failure = probe.entry().1(kvm, probes, self).err();
            let micros = started.elapsed().as_micros() as u64;
            self.outcomes.push(Outcome { probe, failure, micros });
        }
    }

    /// What is missing for `stage`, from the capabilities and from the outcomes so far.
    fn judge(&self, kvm: &Kvm, stage: u8) -> Verdict {
        let capabilities = Capability::needed_by(stage)
            .filter(|capability| capability.value(kvm) <= 0)
            .map(|capability| (capability.name, format!("no {}", capability.name)));
        let probes = self
            .outcomes
            .iter()
            .filter(|outcome| Probe::needed_by(stage).contains(&outcome.probe))
            .filter_map(|outcome| Some((outcome.probe.what(), outcome.failure.as_ref()?)))
            .map(|(what, failure)| (what, format!("{what}: {failure}")));
        let (lacks, reasons): (Vec<_>, Vec<_>) = capabilities.chain(probes).unzip();
        Verdict { stage, able: lacks.is_empty(), lacks, reason: reasons.join("; ") }
    }
}

/// The whole check-up: all probes, and a verdict for each stage.
pub fn run(kvm: &Kvm, probes: &Probes) -> Report {
    let mut report = Report::default();
    report.run(kvm, probes, &Probe::ALL);
    report.verdicts = (1..=8).map(|stage| report.judge(kvm, stage)).collect();
    report
}

/// Only the probes that `stage` (1 to 8) needs, and its verdict.
pub fn run_for(kvm: &Kvm, probes: &Probes, stage: u8) -> Verdict {
    let mut report = Report::default();
    report.run(kvm, probes, Probe::needed_by(stage));
    report.judge(kvm, stage)
}

/// What a probe's own handler makes of an exit.
enum Reply {
    /// It has dealt with it.
    GoOn,
    /// It leaves it to what all probes have in common: steps, the end by HLT or DONE, failures.
    Common,
}

fn nothing_own(_: &mut Exit<'_>) -> Reply {
    Reply::Common
}

/// A virtual machine with a probe in its memory.
struct Guest {
    vm: Arc<Vm>,
    nonce: u32,
}

impl Guest {
    fn new(kvm: &Kvm, program: &[u8]) -> Result<Self, Failure> {
        let vm = Vm::new(kvm)?;
        vm.add_slot(0, GuestAddress(0), RAM, SlotFlags::default())?;
        let written = vm.ram().write_slice(program, PROGRAM);
        written.map_err(|error| Failure::Host {
            what: "the probe does not fit into its RAM",
            source: io::Error::other(error),
        })?;
        // Never 0, which is what untouched memory holds.
        let nonce = RandomState::new().build_hasher().finish() as u32 | 1;
        Ok(Self { vm, nonce })
    }

    /// A vCPU that begins at the probe's first byte in real mode.
    fn vcpu(&self, kvm: &Kvm) -> Result<Vcpu, Failure> {
        let vcpu = Vcpu::new(&self.vm, 0)?;
        vcpu.set_supported_cpuid(kvm)?;
        vcpu.start_real_mode(PROGRAM)?;
        Ok(vcpu)
    }

    /// Runs the probe to its end, with a handler for the exits that are its own.
    fn run(&self, kvm: &Kvm, on_exit: impl FnMut(&mut Exit<'_>) -> Reply) -> Result<(), Failure> {
        self.follow(self.vcpu(kvm)?, on_exit)
    }

    /// The run loop, with what all probes have in common.
    fn follow(
        &self,
        mut vcpu: Vcpu,
        mut on_exit: impl FnMut(&mut Exit<'_>) -> Reply,
    ) -> Result<(), Failure> {
        let deadline = Deadline::new(Some(LIMIT))?;
        let mut step = 0;
        for _ in 0..EXITS {
            let exit = match vcpu.run()? {
                Exit::IoIn { port: NONCE, size: 4, data } if data.len() == 4 => {
                    data.copy_from_slice(&self.nonce.to_le_bytes());
                    continue;
                }
                Exit::Interrupted if deadline.passed() => return Err(Failure::Time { step }),
                Exit::Interrupted => continue,
                mut exit => {
                    if let Exit::IoOut { port: STEP, data: &[now], .. } = exit {
                        step = now;
                    }
                    match (on_exit(&mut exit), &exit) {
                        (Reply::GoOn, _) => continue,
                        (_, Exit::Hlt) => return Ok(()),
                        (_, Exit::IoOut { port: STEP, .. }) if step == DONE => return Ok(()),
                        (_, Exit::IoOut { port: STEP, .. }) => continue,
                        (_, exit) => Unexpected::from(exit),
                    }
                }
            };
            return Err(Failure::Exit { exit: exit.at(vcpu.regs()?.rip), step });
        }
        Err(Failure::Exits)
    }

    /// What the probe left at `addr`.
    fn read(&self, what: &'static str, addr: u64) -> Result<u32, Failure> {
        let read = self.vm.ram().read_obj(GuestAddress(addr));
        read.map_err(|error| Failure::Host { what, source: io::Error::other(error) })
    }

    /// Compares that with what is expected.
    fn check(&self, what: &'static str, addr: u64, expected: u32) -> Result<(), Failure> {
        let found = self.read(what, addr)?;
        compare(what, format!("{found:#x}"), format!("{expected:#x}"))
    }
}

fn compare(what: &'static str, found: String, expected: String) -> Result<(), Failure> {
    if found == expected { Ok(()) } else { Err(Failure::Result { what, found, expected }) }
}

/// An exit that should not have happened.
enum Unexpected {
    /// A triple fault. Where, is not known: on AMD, KVM has reset the registers by then.
    Shutdown,
    Other(String),
}

impl Unexpected {
    fn from(exit: &Exit<'_>) -> Self {
        Self::Other(match exit {
            Exit::Shutdown => return Self::Shutdown,
            Exit::FailEntry { reason, .. } => format!("KVM_EXIT_FAIL_ENTRY, reason {reason:#x},"),
            Exit::InternalError(error) => error.name().into(),
            other => format!("unexpected {other:x?}"),
        })
    }

    /// In words, with the guest's instruction pointer.
    fn at(self, rip: u64) -> String {
        match self {
            Self::Shutdown => "KVM_EXIT_SHUTDOWN (a triple fault)".into(),
            Self::Other(exit) => format!("{exit} at {rip:#x}"),
        }
    }
}

fn triple(nonce: u32) -> u32 {
    nonce.wrapping_mul(3)
}

fn real16(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.real16)?;
    guest.run(kvm, nothing_own)?;
    guest.check("three times the number, by calls", RESULT, triple(guest.nonce))?;
    guest.check("the number in a far segment", TARGET + 0x10, guest.nonce)
}

fn protected32(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.protected32)?;
    guest.run(kvm, nothing_own)?;
    guest.check("the number through a segment's base", TARGET + 0x10, guest.nonce)?;
    guest.check("three times the number, by an interrupt", RESULT, triple(guest.nonce))
}

fn paging32(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.paging32)?;
    guest.run(kvm, nothing_own)?;
    guest.check("the number through a page table", TARGET + 0x10, guest.nonce)?;
    guest.check("the number after INVLPG", TARGET + PAGE_SIZE + 0x10, triple(guest.nonce))
}

fn long_mode(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.long_mode)?;
    guest.run(kvm, nothing_own)?;
    guest.check("the low half through page tables", TARGET + 0x10, guest.nonce)?;
    guest.check("the high half through page tables", TARGET + 0x14, guest.nonce)?;
    guest.check("three times the number, by a call", RESULT, triple(guest.nonce))
}

fn ring3(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.ring3)?;
    guest.run(kvm, nothing_own)?;
    guest.check("CS in ring 3", RESULT, 0x23)?;
    guest.check("CS that INT left", RESULT + 4, 0x23)?;
    guest.check("the number that SYSCALL brought", RESULT + 8, guest.nonce)?;
    guest.check("CS of the refused HLT", RESULT + 12, 0x23)
}

fn cmpxchg16b(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.cmpxchg16b)?;
    guest.run(kvm, nothing_own)?;
    guest.check("ZF", RESULT, 1)?;
    guest.check("the number that was exchanged", TARGET, guest.nonce)
}

fn fpu_state(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.fpu_state)?;
    guest.run(kvm, nothing_own)?;
    guest.check("XMM0 after FXRSTOR", RESULT, guest.nonce)?;
    guest.check("XMM0 after XRSTOR", RESULT + 4, guest.nonce)
}

/// Rounds of the counted loop, longer ones until they can be timed.
struct Rounds {
    turns: u32,
    total: u64,
    long_ones: u32,
    started: Instant,
    best: f64,
}

impl Rounds {
    /// From here on a round's length drowns what an exit costs.
    const LONG: Duration = Duration::from_millis(2);
    const MOST_TURNS: u32 = 1 << 28;

    fn on_exit(&mut self, exit: &mut Exit<'_>) -> Reply {
        match exit {
            Exit::IoIn { port: ANSWER, size: 4, data } if data.len() == 4 => {
                let turns = if self.long_ones < 2 { self.turns } else { 0 };
                data.copy_from_slice(&turns.to_le_bytes());
                self.total += u64::from(turns);
                self.started = Instant::now();
                Reply::GoOn
            }
            Exit::IoOut { port: STEP, .. } => {
                let took = self.started.elapsed();
                let instructions = f64::from(self.turns) * f64::from(LOOP_INSTRUCTIONS);
                // The best of several: a busy machine makes a round longer, nothing makes it shorter.
                self.best = self.best.max(instructions / took.as_secs_f64());
                if took >= Self::LONG || self.turns >= Self::MOST_TURNS {
                    self.long_ones += 1;
                } else {
                    self.turns *= 8;
                }
                Reply::GoOn
            }
            _ => Reply::Common,
        }
    }
}

fn speed(kvm: &Kvm, probes: &Probes, report: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.speed)?;
    let mut rounds =
        Rounds { turns: 1 << 10, total: 0, long_ones: 0, started: Instant::now(), best: 0.0 };
    guest.run(kvm, |exit| rounds.on_exit(exit))?;
    guest.check("turns that were counted", RESULT, rounds.total as u32)?;
    report.ring0_speed = Some(rounds.best);
    if rounds.best < RING0_SPEED { Err(Failure::Slow(rounds.best)) } else { Ok(()) }
}

fn single_step(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.single_step)?;
    let vcpu = guest.vcpu(kvm)?;
    vcpu.set_single_step(true)?;
    let mut stops = Vec::new();
    guest.follow(vcpu, |exit| {
        let Exit::Debug(what) = exit else { return Reply::Common };
        stops.push(what.pc);
        Reply::GoOn
    })?;
    // What comes after the eight says that it is done, and stops too.
    let expected: Vec<_> = (1..=8).map(|bytes| PROGRAM.0 + bytes).collect();
    let found = stops.get(..8).unwrap_or(&stops);
    compare("where it stopped", format!("{found:x?}"), format!("{expected:x?}"))
}

/// Runs `guest`, answers its MMIO reads with the number, and compares its MMIO writes with `expected`.
fn run_mmio(kvm: &Kvm, guest: &Guest, expected: &[(u64, &[u8])]) -> Result<(), Failure> {
    let mut writes = Vec::new();
    guest.run(kvm, |exit| {
        match exit {
            Exit::MmioRead { data, .. } if data.len() == 4 => {
                data.copy_from_slice(&guest.nonce.to_le_bytes());
            }
            Exit::MmioWrite { addr, data } => writes.push((*addr, data.to_vec())),
            _ => return Reply::Common,
        }
        Reply::GoOn
    })?;
    compare("the writes", format!("{writes:x?}"), format!("{expected:x?}"))
}

fn mmio(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.mmio)?;
    let number = guest.nonce.to_le_bytes();
    let expected: [(u64, &[u8]); 7] = [
        (TEXT_SCREEN.0 + 0x04, &number[..1]),
        (TEXT_SCREEN.0 + 0x06, &number[..2]),
        (TEXT_SCREEN.0 + 0x08, &number),
        (TEXT_SCREEN.0 + 0x10, &[0x11, 0x11]),
        (TEXT_SCREEN.0 + 0x12, &[0x22, 0x22]),
        (TEXT_SCREEN.0 + 0x14, &[0x33, 0x33]),
        (TEXT_SCREEN.0 + 0x16, &[0x44, 0x44]),
    ];
    run_mmio(kvm, &guest, &expected)?;
    guest.check("the number that was read", RESULT, guest.nonce)
}

fn rom(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    const ROM: GuestAddress = VGA_HOLE;
    let guest = Guest::new(kvm, probes.rom)?;
    let flags = SlotFlags { read_only: true, ..Default::default() };
    guest.vm.add_slot(1, ROM, PAGE_SIZE as usize, flags)?;
    let written = guest.vm.ram().write_obj(guest.nonce, ROM);
    written.map_err(|error| Failure::Host {
        what: "the host's own write to the ROM",
        source: io::Error::other(error),
    })?;
    run_mmio(kvm, &guest, &[(ROM.0, &(!guest.nonce).to_le_bytes())])?;
    guest.check("the number that was read", RESULT, guest.nonce)?;
    guest.check("the number after the write", RESULT + 4, guest.nonce)
}

fn dirty_log(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    // A slot of its own, from page 0xA0, for the probe dirties its own pages too.
    const START: u64 = RAM as u64 / PAGE_SIZE;
    const PAGES: [u64; 5] = [0, 3, 0x1F, 0x21, 0x2F];
    let guest = Guest::new(kvm, probes.touch)?;
    let flags = SlotFlags { log_dirty: true, ..Default::default() };
    guest.vm.add_slot(1, GuestAddress(RAM as u64), 0x30 * PAGE_SIZE as usize, flags)?;
    let mut pages = PAGES.iter();
    guest.run(kvm, |exit| {
        let Exit::IoIn { port: ANSWER, size: 4, data } = exit else { return Reply::Common };
        let page = pages.next().map_or(0, |page| START + page) as u32;
        data.copy_from_slice(&page.to_le_bytes());
        Reply::GoOn
    })?;
    let found = guest.vm.dirty_log(1)?;
    compare("pages in the log", format!("{found:x?}"), format!("{PAGES:x?}"))
}

/// An in-kernel irqchip with a timer. Comes after memory and before vCPUs.
fn add_irqchip(guest: &Guest) -> Result<(), memory::Error> {
    let failed = |ioctl| move |source| memory::Error::Ioctl { ioctl, source };
    let fd = guest.vm.fd();
    fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    fd.create_pit2(kvm_pit_config::default()).map_err(failed("KVM_CREATE_PIT2"))
}

fn irqchip(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.irqchip)?;
    add_irqchip(&guest)?;
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| Failure::Host { what: "eventfd", source })?;
    guest
        .vm
        .fd()
        .register_irqfd(&line, 5)
        .map_err(|source| memory::Error::Ioctl { ioctl: "KVM_IRQFD", source })?;
    guest.run(kvm, |exit| {
        if matches!(exit, Exit::IoOut { port: STEP, data: [1], .. }) {
            // It fails only if the counter is full, and nothing was written before.
            let _ = line.write(1);
        }
        Reply::Common
    })?;
    guest.check("the number that IRQ 5's handler left", RESULT, guest.nonce)?;
    // A third one may have been on its way.
    match guest.read("ticks of the timer", RESULT + 4)? {
        2.. => Ok(()),
        found => compare("ticks of the timer", found.to_string(), "2 or more".into()),
    }
}

fn smp(kvm: &Kvm, probes: &Probes, _: &mut Report) -> Result<(), Failure> {
    let guest = Guest::new(kvm, probes.smp)?;
    add_irqchip(&guest)?;
    let first = guest.vcpu(kvm)?;
    let second = Vcpu::new(&guest.vm, 1)?;
    second.set_supported_cpuid(kvm)?;
    thread::scope(|scope| {
        // Spawned first, but it waits in KVM_RUN until the first one starts it, or until its time is up.
        let second = thread::Builder::new()
            .spawn_scoped(scope, || guest.follow(second, nothing_own))
            .map_err(|source| Failure::Host { what: "a thread for a vCPU", source })?;
        let ended = guest.follow(first, nothing_own);
        let started = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.and(started)
    })?;
    guest.check("the number that the second vCPU left", RESULT, guest.nonce)
}
