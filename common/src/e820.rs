//! Introduced by stage 06: e820, the memory map that a PC's firmware hands to its operating system.
//!
//! The name is the BIOS call that returns it: INT 15h with EAX = E820h (ACPI 6.5, 15.1). A kernel may use
//! the ranges marked as RAM, keeps away from the reserved ones, and takes what no entry names for holes.

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::layout::{ACPI_TABLES, EBDA, HIGH_MEMORY, VGA_HOLE};
use crate::memory::Ram;

/// What a range may be used for (ACPI 6.5, table 15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// AddressRangeMemory: RAM that the operating system may use.
    Ram = 1,
    /// AddressRangeReserved: not to be used.
    Reserved = 2,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical addresses, never empty.
    pub range: Range<u64>,
    /// What they may be used for.
    pub kind: Kind,
}

// ANCHOR: first_megabyte
/// The first megabyte of a PC, where RAM has been shared with firmware and video since 1981. Between
/// the VGA hole and the BIOS no entry stands: a hole.
const FIRST_MEGABYTE: [Entry; 3] = [
    Entry { range: 0..EBDA.0, kind: Kind::Ram },
    Entry { range: EBDA.0..VGA_HOLE.0, kind: Kind::Reserved },
    Entry { range: ACPI_TABLES.0..HIGH_MEMORY.0, kind: Kind::Reserved },
];
// ANCHOR_END: first_megabyte

/// The map of a guest's RAM: all of it, without the parts of the first megabyte that belong to firmware.
/// Sorted by address, without overlap.
pub fn map(ram: &Ram) -> Vec<Entry> {
    let region =
        |region: &GuestRegionMmap| region.start_addr().0..region.start_addr().0 + region.len();
    map_ranges(ram.iter().map(region))
}

/// The same for a guest whose RAM is known by its ranges alone, in the order of their addresses.
pub fn map_ranges(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Entry> {
    let high = [Entry { range: HIGH_MEMORY.0..u64::MAX, kind: Kind::Ram }];
    let mut entries = Vec::new();
    for region in ranges {
        for Entry { range, kind } in FIRST_MEGABYTE.iter().chain(&high) {
            let range = range.start.max(region.start)..range.end.min(region.end);
            if !range.is_empty() {
                entries.push(Entry { range, kind: *kind });
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::layout::{MMIO_HOLE, PAGE_SIZE, ram_ranges};

    fn ram(size: u64) -> Ram {
        Ram::from_ranges(&ram_ranges(size)).unwrap()
    }

    #[test]
    fn a_small_guest_has_the_map_of_a_pc() {
        let reserved = |range| Entry { range, kind: Kind::Reserved };
        let usable = |range| Entry { range, kind: Kind::Ram };
        assert_eq!(
            map(&ram(64 << 20)),
            [
                usable(0..0x9_FC00),
                reserved(0x9_FC00..0xA_0000),
                reserved(0xE_0000..0x10_0000),
                usable(0x10_0000..64 << 20),
            ]
        );
        assert_eq!(map(&ram(0x8000)), [usable(0..0x8000)]);
    }

    #[test]
    fn ram_above_the_hole_has_an_entry_of_its_own() {
        let entries = map(&ram(MMIO_HOLE.0 + (1 << 30)));
        let last = entries.last().unwrap();
        assert_eq!(last.range, 1 << 32..(1 << 32) + (1 << 30));
        assert_eq!(entries[entries.len() - 2].range, 0x10_0000..MMIO_HOLE.0);
    }

    proptest! {
        #[test]
        fn entries_never_overlap_and_lie_in_ram(pages in 1u64..(8 << 30) / PAGE_SIZE) {
            let ram = ram(pages * PAGE_SIZE);
            let entries = map(&ram);
            for pair in entries.windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            for Entry { range, .. } in &entries {
                prop_assert!(!range.is_empty());
                let len = (range.end - range.start) as usize;
                prop_assert!(ram.check_range(GuestAddress(range.start), len));
            }
            // What is missing is the hole between VGA and BIOS, and nothing else.
            let covered: u64 = entries.iter().map(|e| e.range.end - e.range.start).sum();
            let hole = (pages * PAGE_SIZE).clamp(VGA_HOLE.0, ACPI_TABLES.0) - VGA_HOLE.0;
            prop_assert_eq!(covered + hole, pages * PAGE_SIZE);
        }
    }
}
