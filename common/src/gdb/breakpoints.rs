//! Breakpoints and watchpoints: `int3` in the guest's code, and the debug registers.
//!
//! A *software breakpoint* is the byte 0xCC, `int3`, in place of an instruction's first; with
//! `KVM_GUESTDBG_USE_SW_BP` its exception comes to us (KVM API 4.87 `KVM_SET_GUEST_DEBUG`). *Hardware* ones are four
//! addresses in DR0 to DR3 and what they stand for in DR7 (Intel SDM vol. 3, 18.2 "Debug Registers"), which KVM loads
//! in place of the guest's own with `KVM_GUESTDBG_USE_HW_BP`.
//!
//! Not every KVM has both: see [`super::probe`]. In place of `int3` there can be `out` to a port without a device, which exits
//! everywhere. What is left beyond that is a guest that goes step by step, and a look at where it stands and what its memory
//! holds after each.

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
    kvm_guest_debug_arch,
};
use vm_memory::{Bytes, GuestAddress};

use crate::last_exits::{Request, Space};
use crate::layout::PAGE_SIZE;
use crate::memory::Ram;
use crate::page_walk::{Paging, Scheme};
use crate::regs::Registers;

/// The port that a breakpoint writes to where this KVM keeps `int3` to itself: one that no device of ours has.
const TRAP_PORT: u16 = 0xEB;

/// Whether an exit may come from such a breakpoint.
pub(super) fn may_be_trap(request: &Request) -> bool {
    request.write && request.space == Space::Port && request.addr == u64::from(TRAP_PORT)
}

/// What a software breakpoint puts into the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trap {
    /// `int3`: a byte, everywhere.
    Int3,
    /// `out 0xEB, al`, two bytes: an exit that no KVM can keep to itself, in code that may use ports.
    Out,
}

impl Trap {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Int3 => &[0xCC],
            Self::Out => &[0xE6, TRAP_PORT as u8],
        }
    }

    /// How far RIP has moved on when [`Self::Out`] has been executed.
    pub(super) const OUT_LEN: u64 = 2;
}

/// A byte of the guest's that a software breakpoint has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Byte {
    there: u8,
    ours: u8,
}

/// How many addresses there are in debug registers.
const SLOTS: usize = 4;

/// Where Linux maps its own code and data from physical address 0 on: `__START_KERNEL_map` (Linux,
/// Documentation/arch/x86/x86_64/mm.rst).
const LINUX_MAP: std::ops::Range<u64> = 0xFFFF_FFFF_8000_0000..0xFFFF_FFFF_C000_0000;

/// What is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Writes.
    Write,
    /// Reads. The hardware has no such kind and stops at writes as well.
    Read,
    /// Both.
    Any,
}

/// A watched piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watched {
    /// Its linear address, as gdb gave it.
    pub(super) addr: u64,
    /// How many bytes.
    pub(super) len: u64,
    /// What is watched for.
    pub(super) access: Access,
}

/// What a debug register stopped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hit {
    /// The instruction that comes next.
    Execute,
    /// An access by the instruction before.
    Access(Watched),
}

/// What a debug register is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    addr: u64,
    len: u64,
    /// Nothing: an instruction.
    watched: Option<Watched>,
}

/// Why a breakpoint can't be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// All that are set.
#[derive(Debug, Default)]
pub(super) struct Breakpoints {
    /// By guest-physical address.
    software: BTreeMap<u64, Byte>,
    /// By linear address: the guest-physical one of each breakpoint, which may be another by the time when it is taken
    /// away, and its length.
    placed: BTreeMap<u64, (u64, u64)>,
    /// Those that come back when the guest has written over them, as a hardware breakpoint would.
    sticky: BTreeSet<(u64, u64)>,
    slots: [Option<Slot>; SLOTS],
    /// Where a vCPU that goes step by step stops.
    stepped: BTreeSet<u64>,
    /// What is looked at after each step, and what stood there.
    looked_at: Vec<(Watched, Vec<u8>)>,
}

impl Breakpoints {
    /// Puts `trap` at a linear address of a vCPU with `paging`. With `early` it stands in for a hardware breakpoint, for code
    /// that may not be there yet: an address that is not mapped is taken for one of Linux's kernel, which has not made its
    /// page tables, and [`refresh`](Self::refresh) puts it into what is loaded over it.
    pub(super) fn insert(
        &mut self,
        ram: &Ram,
        paging: &Paging,
        linear: u64,
        trap: Trap,
        early: bool,
    ) -> Result<(), Refused> {
        if self.placed.contains_key(&linear) {
            return Ok(());
        }
        let at = match paging.walk(ram, linear).page {
            // Ring 3 has no right to ports.
            Ok(page) if trap == Trap::Out && page.rights.user && paging.scheme != Scheme::Off => {
                return Err(Refused);
            }
            Ok(page) => page.physical.0,
            Err(_) if early && LINUX_MAP.contains(&linear) => linear - LINUX_MAP.start,
            Err(_) => return Err(Refused),
        };
        let ours = trap.bytes();
        let place = (at, ours.len() as u64);
        let taken = (at..).take(ours.len()).any(|at| self.software.contains_key(&at));
        if taken {
            // The same place by another address is no other breakpoint; what only overlaps is.
            self.placed.values().find(|other| **other == place).ok_or(Refused)?;
        } else {
            let mut there = vec![0; ours.len()];
            if at % PAGE_SIZE + place.1 > PAGE_SIZE
                || ram.read_slice(&mut there, GuestAddress(at)).is_err()
                || ram.write_slice(ours, GuestAddress(at)).is_err()
            {
                return Err(Refused);
            }
            let bytes = there.into_iter().zip(ours).map(|(there, &ours)| Byte { there, ours });
            self.software.extend((at..).zip(bytes));
        }
        self.placed.insert(linear, place);
        if early {
            self.sticky.insert(place);
        }
        Ok(())
    }

    /// Whether there are any for [`refresh`](Self::refresh).
    pub(super) fn has_sticky(&self) -> bool {
        !self.sticky.is_empty()
    }

    /// Puts those back that stand in for hardware breakpoints and that the guest has written over.
    pub(super) fn refresh(&mut self, ram: &Ram) {
        for &(start, len) in &self.sticky {
            for at in start..start + len {
                if let Some(byte) = self.software.get_mut(&at)
                    && let Ok(now) = ram.read_obj::<u8>(GuestAddress(at))
                    && now != byte.ours
                    && ram.write_obj(byte.ours, GuestAddress(at)).is_ok()
                {
                    byte.there = now;
                }
            }
        }
    }

    /// Takes it away again.
    pub(super) fn remove(&mut self, ram: &Ram, linear: u64) -> Result<(), Refused> {
        let place = self.placed.remove(&linear).ok_or(Refused)?;
        if !self.placed.values().any(|other| *other == place) {
            self.restore(ram, place);
        }
        Ok(())
    }

    fn restore(&mut self, ram: &Ram, (start, len): (u64, u64)) {
        self.sticky.remove(&(start, len));
        for at in start..start + len {
            if let Some(Byte { there, ours }) = self.software.remove(&at)
                // Unless the guest has written something else there.
                && ram.read_obj(GuestAddress(at)).is_ok_and(|now: u8| now == ours)
            {
                // It was written to before.
                let _ = ram.write_obj(there, GuestAddress(at));
            }
        }
    }

    /// Takes all away: nobody debugs any more.
    pub(super) fn clear(&mut self, ram: &Ram) {
        for place in std::mem::take(&mut self.placed).into_values() {
            self.restore(ram, place);
        }
        *self = Self::default();
    }

    /// Whether one of ours is at a linear address of a vCPU.
    pub(super) fn is_at(&self, ram: &Ram, registers: &Registers, linear: u64) -> bool {
        let page = Paging::of(&registers.sregs).walk(ram, linear).page;
        page.is_ok_and(|page| self.placed.values().any(|&(start, _)| start == page.physical.0))
    }

    /// Reads memory as if there were no breakpoints. Returns how many bytes could be read.
    pub(super) fn read(&self, ram: &Ram, paging: &Paging, linear: u64, bytes: &mut [u8]) -> usize {
        let read = paging.read(ram, linear, bytes);
        for (at, byte) in self.within(ram, paging, linear, read) {
            bytes[at] = byte.there;
        }
        read
    }

    /// Writes memory and leaves breakpoints where they are. Returns how many bytes could be written.
    pub(super) fn write(&mut self, ram: &Ram, paging: &Paging, linear: u64, bytes: &[u8]) -> usize {
        let written = paging.write(ram, linear, bytes);
        for (at, _) in self.within(ram, paging, linear, written) {
            let Ok(page) = paging.walk(ram, linear.wrapping_add(at as u64)).page else { continue };
            if let Some(byte) = self.software.get_mut(&page.physical.0) {
                byte.there = bytes[at];
                // It could be written a moment ago.
                let _ = ram.write_obj(byte.ours, page.physical);
            }
        }
        written
    }

    /// The breakpoints among `len` bytes from `linear` on, by their offset there.
    fn within(&self, ram: &Ram, paging: &Paging, linear: u64, len: usize) -> Vec<(usize, Byte)> {
        let mut found = Vec::new();
        let mut done = 0;
        while done < len && !self.software.is_empty() {
            let at = linear.wrapping_add(done as u64);
            let part = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
            if let Ok(page) = paging.walk(ram, at).page {
                let start = page.physical.0;
                let here = self.software.range(start..start + part as u64);
                found.extend(
                    here.map(|(physical, what)| (done + (physical - start) as usize, *what)),
                );
            }
            done += part;
        }
        found
    }

    /// Has a debug register stop at an instruction.
    pub(super) fn insert_hardware(&mut self, addr: u64) -> Result<(), Refused> {
        self.take(Slot { addr, len: 1, watched: None })
    }

    /// And no longer.
    pub(super) fn remove_hardware(&mut self, addr: u64) -> Result<(), Refused> {
        self.free(|slot| slot.watched.is_none() && slot.addr == addr)
    }

    /// Has debug registers watch memory: one for each piece of 1, 2, 4 or 8 aligned bytes.
    pub(super) fn watch(&mut self, watched: Watched) -> Result<(), Refused> {
        for (addr, len) in pieces(watched.addr, watched.len)? {
            if self.take(Slot { addr, len, watched: Some(watched) }).is_err() {
                // Pieces that were taken are given back.
                let _ = self.unwatch(watched);
                return Err(Refused);
            }
        }
        Ok(())
    }

    /// Has vCPUs go step by step, and stop at an instruction.
    pub(super) fn step_to(&mut self, addr: u64) {
        self.stepped.insert(addr);
    }

    /// And no longer. Returns whether they did.
    pub(super) fn stop_stepping_to(&mut self, addr: u64) -> bool {
        self.stepped.remove(&addr)
    }

    /// Looks at memory after each instruction. Only a change can be seen.
    pub(super) fn look_at(
        &mut self,
        ram: &Ram,
        paging: &Paging,
        watched: Watched,
    ) -> Result<(), Refused> {
        let mut bytes =
            vec![0; usize::try_from(watched.len).ok().filter(|len| *len <= 64).ok_or(Refused)?];
        if watched.access != Access::Write
            || paging.read(ram, watched.addr, &mut bytes) < bytes.len()
        {
            return Err(Refused);
        }
        self.looked_at.push((watched, bytes));
        Ok(())
    }

    /// Watches it no longer.
    pub(super) fn unwatch(&mut self, watched: Watched) -> Result<(), Refused> {
        if let Some(at) = self.looked_at.iter().position(|(other, _)| *other == watched) {
            self.looked_at.remove(at);
            return Ok(());
        }
        self.free(|slot| slot.watched == Some(watched))
    }

    /// Whether vCPUs have to go step by step.
    pub(super) fn is_watching(&self) -> bool {
        !self.looked_at.is_empty() || !self.stepped.is_empty()
    }

    /// Whether a step has led to where vCPUs stop.
    pub(super) fn is_stepped_to(&self, registers: &Registers) -> bool {
        self.stepped.contains(&registers.linear_rip())
    }

    /// What has changed since the last look.
    pub(super) fn changed(&mut self, ram: &Ram, registers: &Registers) -> Option<Watched> {
        let paging = Paging::of(&registers.sregs);
        for (watched, before) in &mut self.looked_at {
            let mut now = vec![0; before.len()];
            if paging.read(ram, watched.addr, &mut now) == now.len() && now != *before {
                *before = now;
                return Some(*watched);
            }
        }
        None
    }

    fn take(&mut self, slot: Slot) -> Result<(), Refused> {
        let free = self.slots.iter_mut().find(|slot| slot.is_none()).ok_or(Refused)?;
        *free = Some(slot);
        Ok(())
    }

    fn free(&mut self, which: impl Fn(&Slot) -> bool) -> Result<(), Refused> {
        let mut found = Err(Refused);
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(&which) {
                *slot = None;
                found = Ok(());
            }
        }
        found
    }

    /// What DR6 says: the register that it names is one of ours.
    pub(super) fn hit(&self, dr6: u64) -> Option<Hit> {
        let named = |(number, _): &(usize, &Option<Slot>)| dr6 >> number & 1 == 1;
        let (_, slot) =
            self.slots.iter().enumerate().filter(named).find(|(_, slot)| slot.is_some())?;
        Some(slot.as_ref()?.watched.map_or(Hit::Execute, Hit::Access))
    }

    /// What `KVM_SET_GUEST_DEBUG` is told.
    pub(super) fn control(&self) -> kvm_guest_debug {
        let (mut control, mut debugreg) = (0, [0; 8]);
        if !self.software.is_empty() {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        }
        for (number, slot) in self.slots.iter().enumerate() {
            let Some(Slot { addr, len, watched }) = slot else { continue };
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debugreg[number] = *addr;
            let kind = match watched.map(|watched| watched.access) {
                None => 0b00,
                Some(Access::Write) => 0b01,
                Some(Access::Read | Access::Any) => 0b11,
            };
            let len = match len {
                1 => 0b00,
                2 => 0b01,
                4 => 0b11,
                _ => 0b10,
            };
            // G of this register; R/W and LEN.
            debugreg[7] |= 1 << (2 * number + 1) | (kind | len << 2) << (16 + 4 * number);
        }
        kvm_guest_debug { control, arch: kvm_guest_debug_arch { debugreg }, ..Default::default() }
    }
}

/// A range as pieces that a debug register can hold: 1, 2, 4 or 8 bytes, aligned to their size.
fn pieces(mut addr: u64, mut len: u64) -> Result<Vec<(u64, u64)>, Refused> {
    const MOST: u64 = 8;
    let mut pieces = Vec::new();
    while len > 0 {
        if pieces.len() == SLOTS {
            return Err(Refused);
        }
        let aligned = 1 << addr.trailing_zeros().min(MOST.trailing_zeros());
        let piece = [8, 4, 2, 1].into_iter().find(|&piece| piece <= aligned && piece <= len);
        let piece = piece.ok_or(Refused)?;
        pieces.push((addr, piece));
        (addr, len) = (addr.wrapping_add(piece), len - piece);
    }
    if pieces.is_empty() { Err(Refused) } else { Ok(pieces) }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;

    const INT3: u8 = 0xCC;

    fn ram() -> Ram {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        ram.write_slice(&[1, 2, 3, 4], GuestAddress(0xFFE)).unwrap();
        ram
    }

    fn paging() -> Paging {
        Paging::of(&kvm_sregs::default())
    }

    #[test]
    fn a_breakpoint_is_in_memory_and_not_in_what_is_read() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        breakpoints.insert(&ram, &paging, 0x1000, Trap::Int3, false).unwrap();
        breakpoints.insert(&ram, &paging, 0xFFF, Trap::Int3, false).unwrap();
        let raw = || ram.read_obj::<[u8; 4]>(GuestAddress(0xFFE)).unwrap();
        assert_eq!(raw(), [1, INT3, INT3, 4]);
        let mut bytes = [0; 4];
        assert_eq!(breakpoints.read(&ram, &paging, 0xFFE, &mut bytes), 4);
        assert_eq!(bytes, [1, 2, 3, 4]);
        // What is written below one comes out when it goes.
        assert_eq!(breakpoints.write(&ram, &paging, 0xFFE, &[5, 6, 7, 8]), 4);
        assert_eq!(raw(), [5, INT3, INT3, 8]);
        breakpoints.remove(&ram, 0x1000).unwrap();
        assert_eq!(raw(), [5, INT3, 7, 8]);
        assert_eq!(breakpoints.remove(&ram, 0x1000), Err(Refused));
        breakpoints.clear(&ram);
        assert_eq!(raw(), [5, 6, 7, 8]);
        assert_eq!(breakpoints.control().control, 0);
    }

    #[test]
    fn one_place_can_have_two_addresses() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        // Without paging an address has 32 bits.
        for linear in [0x1000, 0x1_0000_1000] {
            breakpoints.insert(&ram, &paging, linear, Trap::Int3, false).unwrap();
        }
        breakpoints.remove(&ram, 0x1000).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), INT3);
        breakpoints.remove(&ram, 0x1_0000_1000).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 3);
    }

    #[test]
    fn a_trap_of_two_bytes_takes_both_and_shares_none() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        breakpoints.insert(&ram, &paging, 0x1000, Trap::Out, false).unwrap();
        let raw = || ram.read_obj::<[u8; 4]>(GuestAddress(0xFFE)).unwrap();
        assert_eq!(raw(), [1, 2, 0xE6, 0xEB]);
        for overlapping in [0x1001, 0xFFF] {
            let refused = breakpoints.insert(&ram, &paging, overlapping, Trap::Out, false);
            assert_eq!(refused, Err(Refused));
        }
        let mut bytes = [0; 2];
        assert_eq!(breakpoints.read(&ram, &paging, 0x1000, &mut bytes), 2);
        assert_eq!(bytes, [3, 4]);
        breakpoints.clear(&ram);
        assert_eq!(raw(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_the_guest_has_written_over_one_stays() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        breakpoints.insert(&ram, &paging, 0x1000, Trap::Int3, false).unwrap();
        ram.write_obj(9u8, GuestAddress(0x1000)).unwrap();
        breakpoints.clear(&ram);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 9);
    }

    #[test]
    fn what_stands_in_for_a_hardware_breakpoint_comes_back() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        breakpoints.insert(&ram, &paging, 0x1000, Trap::Out, true).unwrap();
        ram.write_slice(&[7, 8], GuestAddress(0x1000)).unwrap();
        breakpoints.refresh(&ram);
        let raw = || ram.read_obj::<[u8; 2]>(GuestAddress(0x1000)).unwrap();
        assert_eq!(raw(), [0xE6, 0xEB]);
        breakpoints.remove(&ram, 0x1000).unwrap();
        assert_eq!(raw(), [7, 8]);
        breakpoints.refresh(&ram);
        assert_eq!(raw(), [7, 8]);
    }

    #[test]
    fn where_no_ram_is_there_is_no_breakpoint() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        assert_eq!(breakpoints.insert(&ram, &paging, 0x3000, Trap::Int3, false), Err(Refused));
        // Linux's addresses before it has mapped them.
        let linux = kvm_sregs { cr0: 1 << 31 | 1, efer: 0x500, ..Default::default() };
        let linux = Paging::of(&linux);
        let at = LINUX_MAP.start + 0x1000;
        assert_eq!(breakpoints.insert(&ram, &linux, at, Trap::Int3, false), Err(Refused));
        breakpoints.insert(&ram, &linux, at, Trap::Int3, true).unwrap();
        let regs = kvm_regs { rip: 0x1000, ..Default::default() };
        let registers = Registers { regs, sregs: kvm_sregs::default() };
        assert!(breakpoints.is_at(&ram, &registers, 0x1000));
        assert!(!breakpoints.is_at(&ram, &registers, 0x1001));
    }

    #[test]
    fn debug_registers_are_filled_as_the_manual_has_them() {
        let mut breakpoints = Breakpoints::default();
        breakpoints.insert_hardware(0x1000).unwrap();
        let watched = Watched { addr: 0x2004, len: 4, access: Access::Write };
        breakpoints.watch(watched).unwrap();
        let debug = breakpoints.control();
        assert_eq!(debug.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(debug.arch.debugreg[..2], [0x1000, 0x2004]);
        assert_eq!(debug.arch.debugreg[7], 0b1010 | 0b1101 << 20);
        assert_eq!(breakpoints.hit(1), Some(Hit::Execute));
        assert_eq!(breakpoints.hit(2), Some(Hit::Access(watched)));
        assert_eq!(breakpoints.hit(4), None);
        breakpoints.unwatch(watched).unwrap();
        breakpoints.remove_hardware(0x1000).unwrap();
        assert_eq!(breakpoints.remove_hardware(0x1000), Err(Refused));
        assert_eq!(breakpoints.control(), kvm_guest_debug::default());
    }

    #[test]
    fn there_are_four_debug_registers() {
        let mut breakpoints = Breakpoints::default();
        assert_eq!(pieces(0x1001, 8), Ok(vec![(0x1001, 1), (0x1002, 2), (0x1004, 4), (0x1008, 1)]));
        assert_eq!(pieces(0x1000, 0), Err(Refused));
        assert_eq!(pieces(0x1000, u64::MAX), Err(Refused));
        breakpoints.insert_hardware(0x1000).unwrap();
        let watched = Watched { addr: 0x1001, len: 8, access: Access::Any };
        assert_eq!(breakpoints.watch(watched), Err(Refused));
        for addr in 1..SLOTS as u64 {
            breakpoints.insert_hardware(addr).unwrap();
        }
        assert_eq!(breakpoints.insert_hardware(0x1000), Err(Refused));
    }

    #[test]
    fn memory_that_is_looked_at_is_seen_to_change() {
        let (ram, paging) = (ram(), paging());
        let mut breakpoints = Breakpoints::default();
        let registers = Registers { regs: kvm_regs::default(), sregs: kvm_sregs::default() };
        let watched = Watched { addr: 0x1000, len: 2, access: Access::Write };
        let read = Watched { access: Access::Read, ..watched };
        assert_eq!(breakpoints.look_at(&ram, &paging, read), Err(Refused));
        breakpoints.look_at(&ram, &paging, watched).unwrap();
        assert!(breakpoints.is_watching());
        assert_eq!(breakpoints.changed(&ram, &registers), None);
        ram.write_obj(9u8, GuestAddress(0x1001)).unwrap();
        assert_eq!(breakpoints.changed(&ram, &registers), Some(watched));
        assert_eq!(breakpoints.changed(&ram, &registers), None);
        breakpoints.unwatch(watched).unwrap();
        assert!(!breakpoints.is_watching());
    }

    #[test]
    fn where_steps_lead_is_seen() {
        let mut breakpoints = Breakpoints::default();
        breakpoints.step_to(0x1000);
        let at = |rip| {
            let regs = kvm_regs { rip, ..Default::default() };
            Registers { regs, sregs: kvm_sregs::default() }
        };
        assert!(breakpoints.is_watching() && breakpoints.is_stepped_to(&at(0x1000)));
        assert!(!breakpoints.is_stepped_to(&at(0x1001)));
        assert!(breakpoints.stop_stepping_to(0x1000) && !breakpoints.stop_stepping_to(0x1000));
        assert!(!breakpoints.is_watching());
    }
}
