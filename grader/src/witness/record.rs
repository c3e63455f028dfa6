//! What the witness has seen: calls and exits in their order, and the questions that a criterion asks about them.

use std::fmt;

use nix::errno::Errno;

use super::ioctl;

/// The descriptor that an ioctl was made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum On {
    /// `/dev/kvm`.
    System,
    /// A virtual machine. They are numbered in the order of their making.
    Vm(usize),
    /// A vCPU of a VM, by the number that `KVM_CREATE_VCPU` was given.
    Vcpu(usize, u64),
    /// Something else that is none of them.
    Other,
}

impl On {
    /// The VM that it belongs to.
    pub fn vm(self) -> Option<usize> {
        match self {
            Self::Vm(vm) | Self::Vcpu(vm, _) => Some(vm),
            Self::System | Self::Other => None,
        }
    }
}

/// One ioctl other than `KVM_RUN`.
#[derive(Clone, Debug)]
pub struct Call {
    /// When, among all calls and exits of the program.
    pub at: u64,
    /// Its name in the KVM API.
    pub name: &'static str,
    /// On what.
    pub on: On,
    /// The argument itself: a number or an address in the program.
    pub arg: u64,
    /// What the argument pointed to when the call began, if KVM reads it.
    pub given: Vec<u8>,
    /// What it pointed to when the call had ended; for `KVM_GET_DIRTY_LOG`, the bitmap.
    pub answer: Vec<u8>,
    /// What the ioctl returned.
    pub result: Result<i64, Errno>,
}

impl Call {
    /// 32 bits of [`Self::given`], 0 beyond its end.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array(&self.given, offset))
    }

    /// 64 bits of [`Self::given`], 0 beyond its end.
    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(array(&self.given, offset))
    }

    /// 32 bits of [`Self::answer`], 0 beyond its end.
    pub fn answer_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array(&self.answer, offset))
    }
}

pub(crate) fn array<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let there = bytes.get(offset..).unwrap_or_default();
    std::array::from_fn(|index| there.get(index).copied().unwrap_or(0))
}

/// Why a `KVM_RUN` returned (KVM API 5, "The kvm_run structure").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// `KVM_EXIT_IO` of an `in`: what the monitor answered, once it has.
    In {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: u8,
        /// All accesses, one after the other.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_IO` of an `out`.
    Out {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: u8,
        /// All accesses, one after the other.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_MMIO` of a read: what the monitor answered, once it has.
    Read {
        /// The guest-physical address.
        addr: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_MMIO` of a write.
    Write {
        /// The guest-physical address.
        addr: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_HLT`.
    Hlt,
    /// `KVM_EXIT_SHUTDOWN`: as a rule a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`.
    FailEntry {
        /// What the processor says.
        reason: u64,
    },
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError {
        /// Of which kind.
        suberror: u32,
    },
    /// `KVM_EXIT_DEBUG`.
    Debug {
        /// The exception's number: 1 for a step, 3 for a breakpoint.
        exception: u32,
        /// Where the guest stands.
        pc: u64,
        /// The register that says why.
        dr6: u64,
    },
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent {
        /// Of which kind.
        kind: u32,
    },
    /// `KVM_EXIT_IRQ_WINDOW_OPEN`.
    IrqWindowOpen,
    /// `KVM_EXIT_INTR`, or `EINTR`: a signal.
    Interrupted,
    /// The ioctl failed otherwise.
    Failed(Errno),
    /// Another reason, by its number.
    Other(u32),
}

/// One return of a `KVM_RUN`.
#[derive(Clone, Debug)]
pub struct Exit {
    /// When, among all calls and exits of the program.
    pub at: u64,
    /// The VM.
    pub vm: usize,
    /// The vCPU's number.
    pub vcpu: u64,
    /// Why.
    pub what: What,
}

impl Exit {
    /// Whether it is `KVM_EXIT_HLT`.
    pub fn is_hlt(&self) -> bool {
        self.what == What::Hlt
    }

    /// The bytes that the guest wrote to this port, if it did.
    pub fn out(&self, wanted: u16) -> Option<&[u8]> {
        match &self.what {
            What::Out { port, data, .. } if *port == wanted => Some(data),
            _ => None,
        }
    }
}

/// A `KVM_SET_USER_MEMORY_REGION`, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetSlot {
    /// When.
    pub at: u64,
    /// The VM.
    pub vm: usize,
    /// The slot's number.
    pub slot: u32,
    /// Its flags.
    pub flags: u32,
    /// First guest-physical address.
    pub start: u64,
    /// Bytes; 0 deletes the slot.
    pub size: u64,
    /// The same bytes' address in the monitor.
    pub host: u64,
    /// What KVM said.
    pub result: Result<i64, Errno>,
}

impl SetSlot {
    /// `KVM_MEM_LOG_DIRTY_PAGES`.
    pub const LOG_DIRTY: u32 = 1;
    /// `KVM_MEM_READONLY`.
    pub const READ_ONLY: u32 = 2;

    /// The address behind its last byte.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether it has this flag.
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// All that a program did with KVM.
#[derive(Debug, Default)]
pub struct Record {
    calls: Vec<Call>,
    exits: Vec<Exit>,
    /// Events so far.
    clock: u64,
    /// Exits that came when there was no room for more.
    beyond: u64,
    vms: usize,
}

/// More than any guest of the criteria causes; beyond, exits are only counted, so that one which never ends does not
/// fill the memory.
const MOST_EXITS: usize = 300_000;
const MOST_CALLS: usize = 300_000;

impl Record {
    pub(super) fn new_vm(&mut self) -> usize {
        self.vms += 1;
        self.vms - 1
    }

    pub(super) fn call(&mut self, call: Call) {
        self.clock += 1;
        if self.calls.len() < MOST_CALLS {
            self.calls.push(Call { at: self.clock, ..call });
        }
    }

    /// Adds an exit; gives its place, by which its answer comes later.
    pub(super) fn exit(&mut self, on: (usize, u64), what: What) -> Option<usize> {
        self.clock += 1;
        if self.exits.len() == MOST_EXITS {
            self.beyond += 1;
            return None;
        }
        self.exits.push(Exit { at: self.clock, vm: on.0, vcpu: on.1, what });
        Some(self.exits.len() - 1)
    }

    pub(super) fn answered(&mut self, exit: usize, answer: Vec<u8>) {
        if let What::In { data, .. } | What::Read { data, .. } = &mut self.exits[exit].what {
            *data = answer;
        }
    }

    /// All ioctls but `KVM_RUN`, in their order.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Those of this name.
    ///
    /// # Panics
    /// No ioctl has this name: the criterion has a slip of the pen.
    pub fn calls_of(&self, name: &str) -> impl Iterator<Item = &Call> {
        assert!(ioctl::ALL.iter().any(|known| known.name == name), "no ioctl is called {name}");
        self.calls.iter().filter(move |call| call.name == name)
    }

    /// Those of this name that KVM obeyed.
    ///
    /// # Panics
    /// See [`Self::calls_of`].
    pub fn obeyed(&self, name: &str) -> impl Iterator<Item = &Call> {
        self.calls_of(name).filter(|call| call.result.is_ok())
    }

    /// All exits that there was room for, in their order.
    pub fn exits(&self) -> &[Exit] {
        &self.exits
    }

    /// How many exits there were.
    pub fn exit_count(&self) -> u64 {
        self.exits.len() as u64 + self.beyond
    }

    /// How many virtual machines were made.
    pub fn vms(&self) -> usize {
        self.vms
    }

    /// All that guests wrote to a port.
    pub fn written(&self, port: u16) -> Vec<u8> {
        self.exits.iter().filter_map(|exit| exit.out(port)).flatten().copied().collect()
    }

    /// Every `KVM_SET_USER_MEMORY_REGION`, the refused ones as well.
    pub fn slots(&self) -> Vec<SetSlot> {
        let set = self.calls_of("KVM_SET_USER_MEMORY_REGION");
        set.map(|call| SetSlot {
            at: call.at,
            vm: call.on.vm().unwrap_or(usize::MAX),
            slot: call.u32(0),
            flags: call.u32(4),
            start: call.u64(8),
            size: call.u64(16),
            host: call.u64(24),
            result: call.result,
        })
        .collect()
    }

    /// Every dirty log that KVM gave: when, of which slot, and the numbers of its pages.
    pub fn dirty_logs(&self) -> Vec<(u64, u32, Vec<u64>)> {
        let pages = |bits: &[u8]| -> Vec<u64> {
            let count = bits.len() as u64 * 8;
            (0..count).filter(|&page| bits[page as usize / 8] >> (page % 8) & 1 == 1).collect()
        };
        let logs = self.obeyed("KVM_GET_DIRTY_LOG");
        logs.map(|call| (call.at, call.u32(0), pages(&call.answer))).collect()
    }
}

/// For people: a line an event, like strace.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut calls, mut exits) = (self.calls.iter().peekable(), self.exits.iter().peekable());
        loop {
            let call = match (calls.peek(), exits.peek()) {
                (None, None) => break,
                (Some(call), Some(exit)) => call.at < exit.at,
                (call, None) => call.is_some(),
                (None, _) => false,
            };
            match call {
                true => writeln!(f, "{}", calls.next().expect("it was there"))?,
                false => writeln!(f, "{}", exits.next().expect("it was there"))?,
            }
        }
        match self.beyond {
            0 => Ok(()),
            beyond => writeln!(f, "and {beyond} exits more"),
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, name, on, arg, .. } = self;
        write!(f, "{at:>6} {on:?} {name}({arg:#x}")?;
        for (what, bytes) in [("given", &self.given), ("answer", &self.answer)] {
            if !bytes.is_empty() {
                write!(f, ", {what} {}", hex(bytes))?;
            }
        }
        match self.result {
            Ok(value) => write!(f, ") = {value}"),
            Err(errno) => write!(f, ") = {errno:?}"),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, vm, vcpu, what } = self;
        write!(f, "{at:>6} Vcpu({vm}, {vcpu}) KVM_RUN: ")?;
        match what {
            What::In { port, size, data } => write!(f, "in {port:#x}, size {size}: {}", hex(data)),
            What::Out { port, size, data } => {
                write!(f, "out {port:#x}, size {size}: {}", hex(data))
            }
            What::Read { addr, data } => write!(f, "read {addr:#x}: {}", hex(data)),
            What::Write { addr, data } => write!(f, "write {addr:#x}: {}", hex(data)),
            other => write!(f, "{other:x?}"),
        }
    }
}

/// The first bytes, as a person reads them.
fn hex(bytes: &[u8]) -> String {
    const SHOWN: usize = 40;
    let mut text: String = bytes.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > SHOWN {
        text += &format!("… ({} bytes)", bytes.len());
    }
    text
}
