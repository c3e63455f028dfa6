//! The memory map that the loader left: copied first of all, for the frames that it lies in will be
//! used for something else.

use kernel::frame::LIMIT;
use kernel_abi::boot::{BootInfo, E820_RAM, E820Entry, MAGIC, MAX_E820};

use crate::single::Single;

static MAP: Single<([E820Entry; MAX_E820], usize)> =
    Single::new(([E820Entry { base: 0, length: 0, kind: 0, attributes: 0 }; MAX_E820], 0));

/// Checks the boot info and copies it, and the memory map that it points to.
///
/// # Panics
/// If it breaks the entry contract (`abi/src/boot.rs`).
///
/// # Safety
/// Memory must still be mapped as the contract says.
pub unsafe fn copy(boot_info: *const BootInfo) -> BootInfo {
    assert!(!boot_info.is_null() && boot_info.is_aligned(), "RDI is no boot info: {boot_info:p}");
    // SAFETY: the caller's promise.
    let info = unsafe { boot_info.read() };
    let magic = info.magic;
    assert!(
        magic == MAGIC,
        "the boot info at {boot_info:p} starts with {magic:#x}, not {MAGIC:#x}"
    );
    let count = info.e820_count as usize;
    assert!((1..=MAX_E820).contains(&count), "{count} memory ranges, expected 1 to {MAX_E820}");
    let entries = info.e820 as *const E820Entry;
    let mut map = MAP.borrow();
    for index in 0..count {
        // SAFETY: the caller's promise; a boot loader need not have aligned its buffer.
        map.0[index] = unsafe { entries.add(index).read_unaligned() };
    }
    map.1 = count;
    info
}

/// The map's entry number `index`.
pub fn entry(index: usize) -> Option<E820Entry> {
    let map = MAP.borrow();
    map.0[..map.1].get(index).copied()
}

/// All entries; those past the end of the map are empty.
pub fn entries() -> [E820Entry; MAX_E820] {
    MAP.borrow().0
}

/// Whether any of `start..end` is RAM below the kernel's [`LIMIT`].
pub fn has_ram(start: u64, end: u64) -> bool {
    entries().iter().filter(|entry| entry.kind == E820_RAM).any(|entry| {
        let entry_end = entry.base.saturating_add(entry.length).min(LIMIT);
        entry.base < end && start < entry_end && entry.base < entry_end
    })
}
