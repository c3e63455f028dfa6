//! Introduced by stage 08: PVH, the boot protocol that Xen made for kernels that know they are guests.
//!
//! A vmlinux names its PVH entry in an ELF note. It is 32-bit code, entered in protected mode without paging, with
//! EBX at a page that says all: no part of it is left from the days of real mode. Other kernels than Linux have such
//! a note, too. (Xen's `docs/misc/pvh.pandoc`, "x86/HVM direct boot ABI", and `xen/include/public/arch-x86/hvm/start_info.h`.)

use std::io::{Read, Seek};
use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Error;
use crate::layout::{BOOT_PARAMS, CMDLINE};
use crate::memory::Ram;
use crate::{e820, elf};

/// XEN_ELFNOTE_PHYS32_ENTRY: the note's content is the guest-physical address of the entry.
const PHYS32_ENTRY: u32 = 18;

/// The start info stands where other kernels have their boot_params, its tables behind it.
pub(super) const START_INFO: GuestAddress = BOOT_PARAMS;

/// The first version with a memory map.
const VERSION: u32 = 1;

/// Where a vmlinux wants to be entered by PVH, if it has a note that says it.
pub(super) fn entry<F: Read + Seek>(file: &mut F) -> Result<Option<u64>, Error> {
    let Some(note) = elf::find_note(file, b"Xen\0", PHYS32_ENTRY)? else { return Ok(None) };
    let word = |bytes: &[u8; 4]| u64::from(u32::from_le_bytes(*bytes));
    // As long as an address of the kernel: the upper half of 8 bytes is 0.
    Ok(note.first_chunk().map(word))
}

/// Writes the start info, with the memory map and the initrd as the one module. The command line is in its place.
pub(super) fn write_start_info(
    ram: &Ram,
    initrd: Option<Range<u64>>,
    rsdp: GuestAddress,
) -> Result<(), Error> {
    let modules = Vec::from_iter(initrd.map(|initrd| hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..Default::default()
    }));
    // The types of both maps have the same numbers.
    let entry = |e820::Entry { range, kind }| hvm_memmap_table_entry {
        addr: range.start,
        size: range.end - range.start,
        type_: kind as u32,
        ..Default::default()
    };
    let map: Vec<_> = e820::map(ram).into_iter().map(entry).collect();
    let modlist_paddr = START_INFO.0 + size_of::<hvm_start_info>() as u64;
    let memmap_paddr = modlist_paddr + size_of_val(&modules[..]) as u64;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { modlist_paddr },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: rsdp.0,
        memmap_paddr,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut bytes = info.as_slice().to_vec();
    modules.iter().for_each(|module| bytes.extend(module.as_slice()));
    map.iter().for_each(|entry| bytes.extend(entry.as_slice()));
    ram.write_slice(&bytes, START_INFO)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_info_has_what_the_protocol_says_where_it_says() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let u32_at = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        let u64_at = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        // Offsets from the picture in start_info.h.
        for initrd in [Some(0x200_0000..0x200_1234), None] {
            write_start_info(&ram, initrd.clone(), GuestAddress(0xE_0000)).unwrap();
            assert_eq!(u32_at(0x7000), 0x336E_C578, "xEn3, with the top bit of its E set");
            assert_eq!(u32_at(0x7004), 1, "version");
            assert_eq!(u32_at(0x700C), u32::from(initrd.is_some()), "nr_modules");
            if initrd.is_some() {
                let module = u64_at(0x7010);
                assert_eq!((u64_at(module), u64_at(module + 8)), (0x200_0000, 0x1234));
            }
            assert_eq!((u64_at(0x7018), u64_at(0x7020)), (CMDLINE.0, 0xE_0000));
            let (map, entries) = (u64_at(0x7028), u32_at(0x7030));
            assert_eq!(entries, 4);
            assert_eq!((u64_at(map), u64_at(map + 8), u32_at(map + 16)), (0, 0x9_FC00, 1));
            let last = map + 3 * 24;
            assert_eq!((u64_at(last), u64_at(last + 8)), (0x10_0000, 63 << 20));
        }
    }
}
