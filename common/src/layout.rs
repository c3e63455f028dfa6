//! Introduced by stage 02: every guest-physical address that the project relies on.
//!
//! ```text
//!  guest-physical
//!  0x0_0000_0000  +--------------------------+
//!                 | real-mode IVT, BDA       |
//!          0x500  | GDT                      |  BOOT_GDT          06 to 08: entered from the host
//!         0x1000  | flat guests of 03 to 05  |  PROGRAM
//!         0x6000  | what a guest recorded    |  RECORDS           06: the climb and its like
//!         0x7000  | boot info, boot_params   |  BOOT_INFO         06: the Rust kernel
//!                 |                          |  MULTIBOOT_INFO    07: multiboot kernels
//!                 |                          |  BOOT_PARAMS       08: Linux
//!         0x7C00  | boot sector              |  BOOT_SECTOR       07: what a BIOS loads
//!         0x9000  | page tables              |  BOOT_PAGE_TABLES  06, 08: long mode
//!        0x2_0000 | kernel command line      |  CMDLINE           07: multiboot, 08: Linux
//!        0x9_FC00 | extended BIOS data       |  EBDA
//!        0xA_0000 +--------------------------+  VGA_HOLE, SCRATCH  05: MMIO
//!        0xB_8000 | text screen              |  TEXT_SCREEN        05: MMIO
//!        0xD_0000 | a device with a doorbell |  DOORBELL           05: MMIO
//!        0xE_0000 | ACPI tables              |  ACPI_TABLES       08: Linux
//!        0xF_0000 | BIOS area                |  ROM                05, 07: read-only
//!       0x10_0000 +--------------------------+
//!                 | RAM below the hole       |  HIGH_MEMORY
//!     0xD000_0000 +--------------------------+  MMIO_HOLE
//!                 | devices: no memslot      |
//!     0xD000_0000 |   virtio devices         |  VIRTIO_MMIO        08: a page for each
//!     0xFEC0_0000 |   IOAPIC                 |
//!     0xFEE0_0000 |   local APIC             |
//!     0xFFFB_C000 |   identity map, TSS      |  KVM's own pages on Intel
//!     0xFFFF_0000 |   BIOS, reset vector     |  RESET_ROM          02, 07: read-only
//!   0x1_0000_0000 +--------------------------+  MMIO_HOLE_END
//!                 | the rest of RAM          |
//!                 +--------------------------+
//! ```
//!
//! What a single guest and the code that talks to it agree on within their own memory stands with them: the
//! results of a probe, the sums of stage 03.

use std::ops::Range;

use vm_memory::GuestAddress;

/// The unit in which KVM maps memory: 4 KiB.
pub const PAGE_SIZE: u64 = 0x1000;

/// What a processor maps with one entry of a page directory: 2 MiB (Intel SDM vol. 3, 5.5 "4-Level Paging").
pub const LARGE_PAGE: u64 = 2 << 20;

/// Where the flat guests of stages 03 to 05 are loaded: above the real-mode IVT (0 to 0x3FF) and the
/// BIOS data area, at a segment boundary that a 16-bit program reaches as 0x0100:0.
pub const PROGRAM: GuestAddress = GuestAddress(0x1000);

/// The descriptor table with which a 64-bit guest starts: 4 entries of 8 bytes, behind the BIOS data
/// area.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);

/// The page tables with which a 64-bit guest starts: 6 pages.
pub const BOOT_PAGE_TABLES: GuestAddress = GuestAddress(0x9000);

/// Where the assembly guests of stage 06 leave what they saw, for the host to read.
pub const RECORDS: GuestAddress = GuestAddress(0x6000);

/// What the Rust kernel of stage 06 is told about its machine, with the memory map behind it.
pub const BOOT_INFO: GuestAddress = GuestAddress(0x7000);

/// What a multiboot kernel (stage 07) is told about its machine, with the memory map behind it.
pub const MULTIBOOT_INFO: GuestAddress = GuestAddress(0x7000);

/// The page of parameters that a boot loader fills for Linux: `struct boot_params`, the "zero page".
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);

/// Where a BIOS loads the first sector of a disk, and jumps to (stage 07).
pub const BOOT_SECTOR: GuestAddress = GuestAddress(0x7C00);

/// A kernel's command line, up to [`CMDLINE_SIZE`] bytes with its NUL.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);

/// How much room there is for it.
pub const CMDLINE_SIZE: u64 = 0x1_0000;

/// The BIOS data area, which a BIOS fills for the programs that it starts.
pub const BDA: GuestAddress = GuestAddress(0x400);

/// End of the RAM below 1 MiB that a PC gives to its software: here the extended BIOS data area begins.
pub const EBDA: GuestAddress = GuestAddress(0x9_FC00);

/// Where a PC has no RAM, but its video card.
pub const VGA_HOLE: GuestAddress = GuestAddress(0xA_0000);

/// Stage 05's registers without a meaning: the first addresses behind the RAM.
pub const SCRATCH: GuestAddress = VGA_HOLE;

/// The text screen of a PC's colour card.
pub const TEXT_SCREEN: GuestAddress = GuestAddress(0xB_8000);

/// Stage 05's device with a doorbell, where a PC has its adapter cards.
pub const DOORBELL: GuestAddress = GuestAddress(0xD_0000);

/// The line of its interrupt, one that a PC leaves free.
pub const DOORBELL_GSI: u32 = 5;

/// The ROM in which a PC has its BIOS: the last 64 KiB of the first megabyte.
pub const ROM: GuestAddress = GuestAddress(0xF_0000);

/// How long it is.
pub const ROM_SIZE: usize = 0x1_0000;

/// Where a PC's firmware begins if it needs more than [`ROM`]: the last 128 KiB of the first megabyte.
pub const FIRMWARE_AREA: GuestAddress = GuestAddress(0xE_0000);

/// The ACPI tables, where a kernel that is told nothing looks for them as well (ACPI 6.5, 5.2.5.1
/// "Finding the RSDP on IA-PC Systems").
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xE_0000);

/// How much room there is for them.
pub const ACPI_TABLES_SIZE: u64 = 0x1_0000;

/// The first address above the first megabyte, where an ISA PC's "extended memory" begins.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// Start of the hole below 4 GiB that is kept free of RAM so that devices have addresses which
/// 32-bit code reaches.
pub const MMIO_HOLE: GuestAddress = GuestAddress(0xD000_0000);

/// End of the hole: RAM goes on here.
pub const MMIO_HOLE_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// The registers of the first virtio device, at the start of the hole (stage 08). [`virtio_mmio`] says where the
/// others are.
pub const VIRTIO_MMIO: GuestAddress = MMIO_HOLE;

/// How many virtio devices there is room for.
pub const VIRTIO_MMIO_DEVICES: usize = 32;

/// The first of the IOAPIC's pins that a PC's ISA devices leave free, up to [`IOAPIC_PINS`].
const FIRST_FREE_PIN: u32 = 16;

/// How many pins KVM's IOAPIC has: pin n for GSI n.
pub const IOAPIC_PINS: u32 = 24;

/// The registers of virtio device `n`, as a range of guest-physical addresses, and its GSI. From the ninth on,
/// devices share the pins of those before.
///
/// # Panics
///
/// If `n` is not below [`VIRTIO_MMIO_DEVICES`].
pub fn virtio_mmio(n: usize) -> (Range<u64>, u32) {
    assert!(n < VIRTIO_MMIO_DEVICES, "there are {VIRTIO_MMIO_DEVICES} places for virtio devices");
    let start = VIRTIO_MMIO.0 + n as u64 * PAGE_SIZE;
    let gsi = FIRST_FREE_PIN + n as u32 % (IOAPIC_PINS - FIRST_FREE_PIN);
    (start..start + PAGE_SIZE, gsi)
}

/// The IOAPIC's registers, which KVM's irqchip has here.
pub const IOAPIC: GuestAddress = GuestAddress(0xFEC0_0000);

/// The local APIC's registers.
pub const LOCAL_APIC: GuestAddress = GuestAddress(0xFEE0_0000);

/// Three pages that KVM uses on Intel hosts to run real mode without "unrestricted guest"
/// (`KVM_SET_TSS_ADDR`, KVM API 4.36). They must lie outside guest RAM.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// One page that KVM uses next to it (`KVM_SET_IDENTITY_MAP_ADDR`, KVM API 4.40).
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// The ROM from which a processor takes its first instruction, 16 bytes below 4 GiB (Intel SDM vol. 3,
/// 11.1.4 "First Instruction Executed"): the last 64 KiB of the hole.
pub const RESET_ROM: GuestAddress = GuestAddress(0xFFFF_0000);

/// How long it is.
pub const RESET_ROM_SIZE: usize = 0x1_0000;

// ANCHOR: ram_ranges
/// How `size` bytes of RAM are laid out: below the hole, and what doesn't fit there from 4 GiB up.
///
/// The ranges are given as (start, length in bytes), never empty.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let below = size.min(MMIO_HOLE.0);
    let above = size - below;
    [(GuestAddress(0), below), (MMIO_HOLE_END, above)]
        .into_iter()
        .filter(|&(_, len)| len > 0)
        .map(|(start, len)| (start, len as usize))
        .collect()
}
// ANCHOR_END: ram_ranges

/// The same for a machine with a ROM: there is no RAM in the last 128 KiB of the first megabyte. What the video
/// card has below is RAM like any other here: nothing has to watch it. The second megabyte is a range of its own,
/// so that the others can be mapped by large pages from their start.
pub fn pc_ram_ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let parts = [0..FIRMWARE_AREA.0, HIGH_MEMORY.0..LARGE_PAGE, LARGE_PAGE..u64::MAX];
    let ranges = ram_ranges(size).into_iter().flat_map(|(start, len)| {
        parts.clone().map(|part| part.start.max(start.0)..part.end.min(start.0 + len as u64))
    });
    ranges
        .filter(|range| !range.is_empty())
        .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
        .collect()
}

/// The hole as a range of addresses.
pub const fn mmio_hole() -> Range<u64> {
    MMIO_HOLE.0..MMIO_HOLE_END.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole_and_loses_nothing() {
        assert_eq!(ram_ranges(0), []);
        assert_eq!(ram_ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_ranges(MMIO_HOLE.0), [(GuestAddress(0), MMIO_HOLE.0 as usize)]);
        assert_eq!(
            ram_ranges(MMIO_HOLE.0 + 0x1000),
            [(GuestAddress(0), MMIO_HOLE.0 as usize), (MMIO_HOLE_END, 0x1000)]
        );
    }

    #[test]
    fn a_pc_has_no_ram_where_its_rom_is() {
        let (low, second) = ((GuestAddress(0), 0xE_0000), (HIGH_MEMORY, 1 << 20));
        let high = |len| (GuestAddress(LARGE_PAGE), len);
        assert_eq!(pc_ram_ranges(0), []);
        assert_eq!(pc_ram_ranges(0x1000), [(GuestAddress(0), 0x1000)]);
        assert_eq!(pc_ram_ranges(1 << 20), [low]);
        assert_eq!(pc_ram_ranges(0x14_0000), [low, (HIGH_MEMORY, 0x4_0000)]);
        assert_eq!(pc_ram_ranges(64 << 20), [low, second, high(62 << 20)]);
        let below = MMIO_HOLE.0 as usize - (2 << 20);
        assert_eq!(
            pc_ram_ranges(MMIO_HOLE.0 + 0x1000),
            [low, second, high(below), (MMIO_HOLE_END, 0x1000)]
        );
    }

    #[test]
    fn virtio_devices_have_a_page_each_and_share_eight_pins() {
        assert_eq!(virtio_mmio(0), (0xD000_0000..0xD000_1000, 16));
        assert_eq!(virtio_mmio(7), (0xD000_7000..0xD000_8000, 23));
        assert_eq!(virtio_mmio(8), (0xD000_8000..0xD000_9000, 16));
        let last = virtio_mmio(VIRTIO_MMIO_DEVICES - 1);
        assert!(last.0.end <= IOAPIC.0 && last.1 < IOAPIC_PINS);
    }

    #[test]
    fn kvm_keeps_its_pages_in_the_hole() {
        assert!(mmio_hole().contains(&KVM_IDENTITY_MAP));
        assert_eq!(KVM_IDENTITY_MAP + PAGE_SIZE, KVM_TSS);
        assert!(mmio_hole().contains(&(KVM_TSS + 3 * PAGE_SIZE - 1)));
    }
}
