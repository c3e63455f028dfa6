//! The entry contract: what a loader leaves in memory and registers for the kernel.
//!
//! A loader, be it the VMM itself, a climb from real mode or a boot loader on a disk,
//!
//! 1. copies each `PT_LOAD` segment of the kernel's ELF file to its physical address (`p_paddr`; the
//!    first is at [`KERNEL_START`], and all end below [`KERNEL_LIMIT`]). The bytes between
//!    `p_filesz` and `p_memsz` need no clearing: the kernel clears its own `.bss`;
//! 2. puts a [`BootInfo`] and its array of [`E820Entry`] anywhere below 1 GiB outside
//!    `KERNEL_START..KERNEL_LIMIT`; the kernel copies both before it reuses memory;
//! 3. enters the ELF entry point in **64-bit long mode**: paging on, with any tables that map
//!    `KERNEL_START..KERNEL_LIMIT` (writable and executable), the boot info and the entries
//!    to themselves; `CS` a 64-bit ring-0 code segment (any selector); interrupts off (`RFLAGS.IF`
//!    = 0); **`RDI` = address of the [`BootInfo`]**.
//!
//! `RSP`, the other segments and registers, GDT, IDT and the PICs may hold anything: the kernel
//! sets up its own. It ends the machine by writing one byte to [`DEBUG_EXIT_PORT`].

use core::mem::{offset_of, size_of};

/// Where the kernel is linked and loaded: 1 MiB, the first byte above the old PC's memory.
pub const KERNEL_START: u64 = 0x10_0000;

/// The kernel's image with its `.bss` ends below this address.
pub const KERNEL_LIMIT: u64 = 0x20_0000;

/// The port (QEMU's isa-debug-exit) that ends the machine: one byte, 0 if all went well, else why
/// not.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// What the kernel writes to [`DEBUG_EXIT_PORT`] when it panics.
pub const PANIC_EXIT: u8 = 101;

/// [`BootInfo::magic`]: "mini-kvm" read as a little-endian number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"mini-kvm");

/// How many [`E820Entry`]s the kernel looks at.
pub const MAX_E820: usize = 32;

/// The one structure that a loader hands over, in `RDI`. 24 bytes, little endian.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// [`MAGIC`], so that a loader that forgot `RDI` is told so instead of crashing.
    pub magic: u64,
    /// Physical address of the first [`E820Entry`].
    pub e820: u64,
    /// How many entries there are: 1 to [`MAX_E820`].
    pub e820_count: u32,
    /// Who loaded the kernel, one of [`loader`]; only shown.
    pub loader: u32,
}

/// Values of [`BootInfo::loader`].
pub mod loader {
    /// The VMM set long mode up itself, through `KVM_SET_SREGS`.
    pub const HOST: u32 = 1;
    /// A guest program climbed from real mode.
    pub const CLIMB: u32 = 2;
    /// A boot loader read the kernel from a disk.
    pub const DISK: u32 = 3;
}

/// One range of guest-physical memory, in the form that `INT 15h, EAX=E820h` returns (ACPI 6.5,
/// 15.1), 24 bytes with the extended attributes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct E820Entry {
    /// First byte of the range.
    pub base: u64,
    /// Its length in bytes.
    pub length: u64,
    /// [`E820_RAM`], or anything else for memory to keep away from.
    pub kind: u32,
    /// Extended attributes; not looked at.
    pub attributes: u32,
}

/// [`E820Entry::kind`] of memory that the kernel may use.
pub const E820_RAM: u32 = 1;

// A boot loader in assembly fills these by offset, so they may not move.
const _: () = assert!(size_of::<BootInfo>() == 24);
const _: () = assert!(offset_of!(BootInfo, magic) == 0);
const _: () = assert!(offset_of!(BootInfo, e820) == 8);
const _: () = assert!(offset_of!(BootInfo, e820_count) == 16);
const _: () = assert!(offset_of!(BootInfo, loader) == 20);
const _: () = assert!(size_of::<E820Entry>() == 24);
const _: () = assert!(offset_of!(E820Entry, base) == 0);
const _: () = assert!(offset_of!(E820Entry, length) == 8);
const _: () = assert!(offset_of!(E820Entry, kind) == 16);

impl BootInfo {
    /// The bytes that a loader writes.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..8].copy_from_slice(&self.magic.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.e820.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.e820_count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.loader.to_le_bytes());
        bytes
    }
}

impl E820Entry {
    /// The bytes that a loader writes.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..8].copy_from_slice(&self.base.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.length.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.kind.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.attributes.to_le_bytes());
        bytes
    }
}
