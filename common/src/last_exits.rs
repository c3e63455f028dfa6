//! Introduced by stage 03: the last exits of a vCPU, for whoever asks what led to where it is.
//!
//! Each [`Vcpu`](crate::vcpu::Vcpu) keeps them, always: a guest that dies without a word has left a trail. It costs no
//! ioctl and no look at the clock, for KVM leaves all that is in it in `struct kvm_run`, which is at hand anyway.
//! What asks for more, such as the time and the instruction, is the trace.

use std::fmt;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
};

/// How many exits are kept.
pub const KEPT: usize = 64;

/// How many bytes of an exit's data are kept.
pub const DATA: usize = 8;

/// An address space with devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Ports, reached by IN and OUT.
    Port,
    /// Guest-physical addresses where no memslot is, or a read-only one.
    Memory,
}

/// What the guest wanted of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where `addr` counts.
    pub space: Space,
    /// The port or the guest-physical address.
    pub addr: u64,
    /// Bytes of one access.
    pub size: u8,
    /// Whether the guest writes.
    pub write: bool,
    /// Bytes in all: a string instruction exits once for several accesses.
    pub len: u32,
}

impl Request {
    /// One of `len` bytes, by accesses of `size` bytes each.
    #[cfg(feature = "stage03")]
    pub(crate) fn new(space: Space, addr: u64, size: usize, write: bool, len: usize) -> Self {
        // KVM's own fields are as small.
        Self { space, addr, size: size as u8, write, len: len as u32 }
    }
}

/// What is asked, for a sentence: `port 0x64`.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.space {
            Space::Port => write!(f, "port {:#x}", self.addr),
            Space::Memory => write!(f, "address {:#x}", self.addr),
        }
    }
}

/// One exit that the guest made, as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastExit {
    /// Counts the vCPU's exits, from 1 on; 0 for one that is not among them.
    pub number: u64,
    /// RIP then, as an offset into CS: at the instruction, or behind it where KVM had moved on (which, the trace
    /// finds out). Nothing if this KVM does not tell (`KVM_CAP_SYNC_REGS`).
    pub rip: Option<u64>,
    /// `KVM_EXIT_*`.
    pub reason: u32,
    /// What it was for, if it was for a device.
    pub request: Option<Request>,
    /// What was written, or what the device answered: the first bytes, up to [`DATA`]. Nothing while a read has not
    /// been answered.
    pub data: Option<[u8; DATA]>,
}

impl LastExit {
    /// One of which nothing but the reason is known.
    pub(crate) const fn of(reason: u32) -> Self {
        Self { number: 0, rip: None, reason, request: None, data: None }
    }
}

/// `out 3F8 <- 41, rip 0x1007`, or the exit's name in the KVM API.
impl fmt::Display for LastExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.request {
            None => f.write_str(name(self.reason))?,
            Some(Request { space, addr, size, write, len }) => {
                match (space, write) {
                    (Space::Port, true) => write!(f, "out {addr:X} <-"),
                    (Space::Port, false) => write!(f, "in {addr:X} ->"),
                    (Space::Memory, true) => write!(f, "write {addr:08X} <-"),
                    (Space::Memory, false) => write!(f, "read {addr:08X} ->"),
                }?;
                let (size, len) = (usize::from(size.max(1)), len as usize);
                if len > size {
                    write!(f, " {} x", len / size)?;
                }
                match &self.data {
                    None => f.write_str(" (not answered)")?,
                    Some(data) => {
                        // Numbers are little-endian on this machine.
                        for element in data[..len.min(DATA)].chunks(size) {
                            f.write_str(" ")?;
                            element.iter().rev().try_for_each(|byte| write!(f, "{byte:02X}"))?;
                        }
                        if len > DATA {
                            f.write_str(" ...")?;
                        }
                    }
                }
            }
        }
        self.rip.map_or(Ok(()), |rip| write!(f, ", rip {rip:#x}"))
    }
}

/// An exit reason's name in the KVM API.
pub fn name(reason: u32) -> &'static str {
    match reason {
        KVM_EXIT_UNKNOWN => "KVM_EXIT_UNKNOWN",
        KVM_EXIT_EXCEPTION => "KVM_EXIT_EXCEPTION",
        KVM_EXIT_IO => "KVM_EXIT_IO",
        KVM_EXIT_HYPERCALL => "KVM_EXIT_HYPERCALL",
        KVM_EXIT_DEBUG => "KVM_EXIT_DEBUG",
        KVM_EXIT_HLT => "KVM_EXIT_HLT",
        KVM_EXIT_MMIO => "KVM_EXIT_MMIO",
        KVM_EXIT_SHUTDOWN => "KVM_EXIT_SHUTDOWN",
        KVM_EXIT_FAIL_ENTRY => "KVM_EXIT_FAIL_ENTRY",
        KVM_EXIT_INTR => "KVM_EXIT_INTR",
        KVM_EXIT_INTERNAL_ERROR => "KVM_EXIT_INTERNAL_ERROR",
        KVM_EXIT_SYSTEM_EVENT => "KVM_EXIT_SYSTEM_EVENT",
        KVM_EXIT_IOAPIC_EOI => "KVM_EXIT_IOAPIC_EOI",
        KVM_EXIT_X86_RDMSR => "KVM_EXIT_X86_RDMSR",
        KVM_EXIT_X86_WRMSR => "KVM_EXIT_X86_WRMSR",
        KVM_EXIT_X86_BUS_LOCK => "KVM_EXIT_X86_BUS_LOCK",
        KVM_EXIT_MEMORY_FAULT => "KVM_EXIT_MEMORY_FAULT",
        _ => "an exit that no stage knows",
    }
}

/// A ring of the last [`KEPT`] exits. Single steps and signals, which are ours and not the guest's doing, are not in it.
#[derive(Debug)]
pub struct LastExits {
    ring: Box<[LastExit; KEPT]>,
    /// How many there have been.
    count: u64,
}

impl Default for LastExits {
    fn default() -> Self {
        Self { ring: Box::new([LastExit::of(KVM_EXIT_UNKNOWN); KEPT]), count: 0 }
    }
}

impl LastExits {
    /// How many exits there have been.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Those that are kept, the oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &LastExit> {
        let kept = self.count.min(KEPT as u64);
        (self.count - kept..self.count).map(|at| &self.ring[at as usize % KEPT])
    }

    /// Adds one, and gives it its number.
    pub(crate) fn push(&mut self, exit: LastExit) {
        let number = self.count + 1;
        self.ring[self.count as usize % KEPT] = LastExit { number, ..exit };
        self.count = number;
    }

    /// The last one, if it is a read that still waits for its answer.
    pub(crate) fn unanswered(&mut self) -> Option<&mut LastExit> {
        let last = &mut self.ring[self.count.wrapping_sub(1) as usize % KEPT];
        (last.request.is_some() && last.data.is_none()).then_some(last)
    }
}

/// As much of `bytes` as is kept.
pub(crate) fn kept(bytes: &[u8]) -> [u8; DATA] {
    let mut data = [0; DATA];
    let len = bytes.len().min(DATA);
    data[..len].copy_from_slice(&bytes[..len]);
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(addr: u64, data: &[u8]) -> LastExit {
        let (size, len) = (1, data.len() as u32);
        let request = Some(Request { space: Space::Port, addr, size, write: true, len });
        let (rip, data) = (Some(0x1007), Some(kept(data)));
        LastExit { number: 0, rip, reason: KVM_EXIT_IO, request, data }
    }

    #[test]
    fn the_last_exits_are_kept_in_order_and_older_ones_go() {
        let mut exits = LastExits::default();
        assert_eq!(exits.iter().count(), 0);
        assert!(exits.unanswered().is_none());
        for at in 0..KEPT as u64 + 6 {
            exits.push(out(at, b"x"));
        }
        let kept: Vec<_> =
            exits.iter().map(|exit| (exit.number, exit.request.unwrap().addr)).collect();
        let expected: Vec<_> = (6..KEPT as u64 + 6).map(|at| (at + 1, at)).collect();
        assert_eq!((kept, exits.count()), (expected, KEPT as u64 + 6));
    }

    #[test]
    fn a_read_waits_for_its_answer() {
        let mut exits = LastExits::default();
        let mut read = out(0x3FD, &[]);
        read.request.as_mut().unwrap().write = false;
        read.request.as_mut().unwrap().len = 1;
        read.data = None;
        exits.push(read);
        let text = |exits: &LastExits| exits.iter().next_back().unwrap().to_string();
        assert_eq!(text(&exits), "in 3FD -> (not answered), rip 0x1007");
        exits.unanswered().unwrap().data = Some(kept(&[0x60]));
        assert_eq!(text(&exits), "in 3FD -> 60, rip 0x1007");
        assert!(exits.unanswered().is_none());
    }

    #[test]
    fn an_exit_is_told_in_one_line() {
        assert_eq!(out(0x3F8, b"A").to_string(), "out 3F8 <- 41, rip 0x1007");
        assert_eq!(
            out(0x3F8, b"123456789").to_string(),
            "out 3F8 <- 9 x 31 32 33 34 35 36 37 38 ..., rip 0x1007"
        );
        let mut write = out(0xD_0004, &[0x78, 0x56, 0x34, 0x12]);
        let request = write.request.as_mut().unwrap();
        (request.space, request.size) = (Space::Memory, 4);
        write.rip = None;
        assert_eq!(write.to_string(), "write 000D0004 <- 12345678");
        let shutdown = LastExit { rip: Some(0), ..LastExit::of(KVM_EXIT_SHUTDOWN) };
        assert_eq!(shutdown.to_string(), "KVM_EXIT_SHUTDOWN, rip 0x0");
    }
}
