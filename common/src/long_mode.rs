//! Introduced by stage 06: 64-bit mode, entered from the host.
//!
//! A processor wakes up in real mode and climbs to long mode through a dozen instructions. A monitor
//! need not watch that: it may write the state in which the climb ends. That state is page tables and
//! a descriptor table in guest memory, and a few registers that name them and agree with each other.

use std::iter::repeat_n;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::descriptor::encode;
use crate::error::{Blame, Blamed};
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, LARGE_PAGE, PAGE_SIZE};
use crate::memory::Ram;
use crate::vcpu::{self, Vcpu};

/// Selector of the 64-bit code segment: the one that Linux calls `__BOOT_CS` and asks for (Linux boot
/// protocol, 1.15 "64-bit Boot Protocol"). The data segment's is the next one, as Linux's `__BOOT_DS` is.
pub const CODE: u16 = 0x10;

/// Bytes of a descriptor, by which selectors count.
const DESCRIPTOR: u16 = 8;

/// How much of the start of guest-physical memory [`enter`] maps to itself: 4 GiB.
pub const IDENTITY_MAPPED: u64 = 4 << 30;

/// Why long mode could not be prepared.
#[derive(Debug, Error)]
pub enum Error {
    /// The page tables or the GDT don't fit into the guest's RAM.
    #[error("the GDT and page tables that a guest starts with need RAM from 0x500 to 0xF000: {0}")]
    Ram(#[from] GuestMemoryError),
    /// An ioctl of the vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Ram(_) => Blame::Input,
            Self::Vcpu(error) => error.blame(),
        }
    }
}

// Entries of page tables (Intel SDM vol. 3, 5.5 "4-Level Paging"; AMD APM vol. 2, 5.3).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// In a page directory: the entry maps 2 MiB itself.
const LARGE: u64 = 1 << 7;

const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = IDENTITY_MAPPED / (ENTRIES * LARGE_PAGE);
/// One PML4, one page-directory-pointer table, and a page directory for each GiB.
const TABLES_SIZE: u64 = (2 + DIRECTORIES) * PAGE_SIZE;
const _: () = assert!(BOOT_GDT.0 == 0x500 && BOOT_PAGE_TABLES.0 + TABLES_SIZE == 0xF000);

// Control registers and EFER (Intel SDM vol. 3, 2.5 and 2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes page tables that map the first 4 GiB of guest-physical memory to themselves, in pages of
/// 2 MiB, at [`BOOT_PAGE_TABLES`]. Returns the PML4's address, for CR3.
pub fn write_identity_map(ram: &Ram) -> Result<GuestAddress, Error> {
    // ANCHOR: identity_map
    let pml4 = BOOT_PAGE_TABLES.0;
    let pdpt = pml4 + PAGE_SIZE;
    let first_directory = pdpt + PAGE_SIZE;
    let table = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        let mut bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        bytes.resize(PAGE_SIZE as usize, 0);
        bytes
    };
    let pointer = |to: u64| to | PRESENT | WRITABLE;
    ram.write_slice(&table(&mut [pointer(pdpt)].into_iter()), GuestAddress(pml4))?;
    let directories = (0..DIRECTORIES).map(|i| first_directory + i * PAGE_SIZE);
    ram.write_slice(&table(&mut directories.clone().map(pointer)), GuestAddress(pdpt))?;
    for (gib, directory) in (0..).zip(directories) {
        let pages = (gib * ENTRIES..(gib + 1) * ENTRIES).map(|page| page * LARGE_PAGE);
        let mut entries = pages.map(|page| page | PRESENT | WRITABLE | LARGE);
        ram.write_slice(&table(&mut entries), GuestAddress(directory))?;
    }
    Ok(GuestAddress(pml4))
    // ANCHOR_END: identity_map
}

/// Puts the vCPU into 64-bit mode, ring 0, interrupts off, with the first 4 GiB mapped to themselves,
/// and with `regs`, whose `rip` is where the guest starts.
///
/// Uses guest memory at [`BOOT_GDT`] and [`BOOT_PAGE_TABLES`]; the guest may reuse it once it has
/// tables of its own. The vCPU's CPUID must have been set: without it, it has no long mode.
///
/// KVM checks that the bits agree: EFER.LME and LMA, CR4.PAE, CR0.PE and PG, and a code segment with L
/// set (Intel SDM vol. 3, 11.8.5 "Initializing IA-32e Mode").
// ANCHOR: enter
pub fn enter(vcpu: &Vcpu, ram: &Ram, regs: kvm_regs) -> Result<(), Error> {
    let mut sregs = vcpu.sregs()?;
    set_flat_segments(&mut sregs, ram, segment(CODE, true))?;
    sregs.cr3 = write_identity_map(ram)?.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)?;
    // Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3); IF is clear.
    vcpu.set_regs(&kvm_regs { rflags: 0x2, ..regs })?;
    Ok(())
}
// ANCHOR_END: enter

/// Writes a GDT with the segment `code` and, behind it, a flat data segment, at [`BOOT_GDT`], and has all segment
/// registers hold them. There is no IDT: until the guest has its own, an exception is a triple fault.
pub(crate) fn set_flat_segments(
    sregs: &mut kvm_sregs,
    ram: &Ram,
    code: kvm_segment,
) -> Result<(), Error> {
    let data = segment(code.selector + DESCRIPTOR, false);
    let unused = usize::from(code.selector / DESCRIPTOR);
    let gdt = repeat_n(0, unused).chain([encode(&code), encode(&data)]);
    let gdt_bytes: Vec<u8> = gdt.flat_map(u64::to_le_bytes).collect();
    ram.write_slice(&gdt_bytes, BOOT_GDT)?;
    sregs.gdt.base = BOOT_GDT.0;
    sregs.gdt.limit = gdt_bytes.len() as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    Ok(())
}

/// A flat segment of ring 0, as the processor holds it once a selector is loaded.
pub(crate) fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        // Accessed, and readable code or writable data (Intel SDM vol. 3, 3.4.5.1).
        type_: if code { 0xB } else { 0x3 },
        present: 1,
        dpl: 0,
        // In 64-bit code, L is set and D must not be.
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_too_small_for_the_tables_is_an_error() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x9000)]).unwrap();
        assert!(matches!(write_identity_map(&ram), Err(Error::Ram(_))));
    }

    #[test]
    fn descriptors_are_the_ones_that_linux_uses() {
        // GDT_ENTRY_BOOT_CS and _DS of Linux's arch/x86/boot/compressed/head_64.S.
        assert_eq!(encode(&segment(CODE, true)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(encode(&segment(CODE + DESCRIPTOR, false)), 0x00CF_9300_0000_FFFF);
    }
}
