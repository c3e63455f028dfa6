//! Introduced by stage 08: mistakes in what a kernel is told about its machine.
//!
//! A kernel believes its boot loader. If the loader says something wrong, the kernel dies later, somewhere else, and
//! as a rule before it can print. What was said still can be checked: before the kernel's first instruction.

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BOOT_FLAG, HEADER_MAGIC, Kernel, Mode};
use crate::layout::{BOOT_PARAMS, HIGH_MEMORY};
use crate::memory::Ram;

/// E820_TYPE_RAM.
const E820_RAM: u32 = 1;

/// What is wrong with the boot_params of a kernel that has not begun yet, in a sentence; nothing if they are in order, or if
/// the kernel has none.
pub fn check_boot_params(ram: &Ram, kernel: &Kernel) -> Option<String> {
    if kernel.mode == Mode::Pvh {
        return None;
    }
    let at = BOOT_PARAMS.0;
    let says = |what: String| Some(format!("the boot_params at {at:#x} are wrong: {what}"));
    let Ok(params) = ram.read_obj::<boot_params>(BOOT_PARAMS) else {
        return says("they are not in RAM".into());
    };
    let (header, boot_flag) = (params.hdr.header, params.hdr.boot_flag);
    if header != HEADER_MAGIC || boot_flag != BOOT_FLAG {
        return says(format!(
            "the setup header has the magic {header:#x} and the boot flag {boot_flag:#x}, not \
             {HEADER_MAGIC:#x} and {BOOT_FLAG:#x}"
        ));
    }
    if params.hdr.type_of_loader == 0 {
        return says("type_of_loader is 0, which says that there was no loader".into());
    }
    let count = usize::from(params.e820_entries).min(params.e820_table.len());
    let map = params.e820_table[..count].iter().map(|entry| {
        let (addr, size, kind) = (entry.addr, entry.size, entry.r#type);
        (kind == E820_RAM).then_some(addr..addr.saturating_add(size))
    });
    let map: Vec<_> = map.flatten().collect();
    if !map.iter().any(|range| range.end > HIGH_MEMORY.0) {
        return says(format!(
            "of the {count} entries of its memory map (e820) none is RAM above 1 MiB"
        ));
    }
    let is_ram = |address: u64| ram.address_in_range(GuestAddress(address));
    for range in map.iter().filter(|range| !range.is_empty()) {
        let (start, end) = (range.start, range.end);
        let missing = match ram.find_region(GuestAddress(start)) {
            Some(region) => region.start_addr().0 + region.len(),
            None => start,
        };
        if missing < end && !is_ram(missing) {
            return says(format!(
                "its memory map (e820) calls {start:#x} to {end:#x} RAM, where the machine has \
                 none from {missing:#x} on"
            ));
        }
    }
    let inside = |range: &std::ops::Range<u64>| {
        map.iter().any(|ram| ram.start <= range.start && range.end <= ram.end)
    };
    if !inside(&kernel.range) {
        let (start, end) = (kernel.range.start, kernel.range.end);
        return says(format!("the kernel's {start:#x} to {end:#x} are no RAM in its memory map"));
    }
    let (start, size) = (params.hdr.ramdisk_image.into(), u64::from(params.hdr.ramdisk_size));
    let end: u64 = start + size;
    if size > 0 && start < kernel.range.end && kernel.range.start < end {
        let (kernel_start, kernel_end) = (kernel.range.start, kernel.range.end);
        return says(format!(
            "the initrd, {start:#x} to {end:#x}, is in the kernel's memory, {kernel_start:#x} to \
             {kernel_end:#x}"
        ));
    }
    if size > 0 && !inside(&(start..end)) {
        return says(format!("the initrd, {start:#x} to {end:#x}, is not in RAM"));
    }
    let cmdline = params.hdr.cmd_line_ptr.into();
    if !is_ram(cmdline) {
        return says(format!("the command line is at {cmdline:#x}, where no RAM is"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::{DEFAULT_CMDLINE, VMLINUX_PROTOCOL, write_boot_params};

    const MEMORY: u64 = 64 << 20;

    /// Where fields of `struct boot_params` stand (Linux boot protocol, "The Real-Mode Kernel Header" and "zero page").
    const E820_ENTRIES: u64 = 0x1E8;
    const MAGIC: u64 = 0x202;
    const RAMDISK_IMAGE: u64 = 0x218;
    const RAMDISK_SIZE: u64 = 0x21C;
    const CMD_LINE_PTR: u64 = 0x228;
    const E820_TABLE: u64 = 0x2D0;
    const E820_ENTRY: u64 = 20;

    fn write<T: vm_memory::ByteValued>(ram: &Ram, at: u64, value: T) {
        ram.write_obj(value, GuestAddress(BOOT_PARAMS.0 + at)).unwrap();
    }

    /// What is found when `spoil` has changed boot_params that were right.
    fn found(spoil: impl FnOnce(&Ram)) -> Option<String> {
        let ram = Ram::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let header = linux_loader::loader::bootparam::setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: VMLINUX_PROTOCOL,
            cmdline_size: 2047,
            ..Default::default()
        };
        let kernel = Kernel {
            entry: GuestAddress(0x100_0000),
            mode: Mode::Long,
            range: 0x100_0000..0x200_0000,
            notes: Vec::new(),
            header,
        };
        let (initrd, rsdp) = (Some(0x300_0000..0x300_1234), GuestAddress(0xE_0000));
        write_boot_params(&ram, &kernel, initrd, DEFAULT_CMDLINE, rsdp).unwrap();
        spoil(&ram);
        check_boot_params(&ram, &kernel)
    }

    #[test]
    fn each_mistake_is_named_and_what_is_right_is_not() {
        assert_eq!(found(|_| ()), None);
        let told = |spoil: fn(&Ram)| {
            let text = found(spoil).unwrap();
            text.strip_prefix("the boot_params at 0x7000 are wrong: ").unwrap().to_owned()
        };
        assert_eq!(
            told(|ram| write(ram, E820_ENTRIES, 0_u8)),
            "of the 0 entries of its memory map (e820) none is RAM above 1 MiB"
        );
        assert_eq!(
            told(|ram| write(ram, MAGIC, 0_u32)),
            "the setup header has the magic 0x0 and the boot flag 0xaa55, not 0x53726448 and 0xaa55"
        );
        // Of the last entry, the size.
        assert_eq!(
            told(|ram| {
                let count: u8 = ram.read_obj(GuestAddress(BOOT_PARAMS.0 + E820_ENTRIES)).unwrap();
                write(ram, E820_TABLE + E820_ENTRY * (u64::from(count) - 1) + 8, 3_u64 << 30);
            }),
            "its memory map (e820) calls 0x100000 to 0xc0100000 RAM, where the machine has none \
             from 0x4000000 on"
        );
        assert_eq!(
            told(|ram| write(ram, RAMDISK_IMAGE, 0x1FF_F000_u32)),
            "the initrd, 0x1fff000 to 0x2000234, is in the kernel's memory, 0x1000000 to 0x2000000"
        );
        assert_eq!(
            told(|ram| write(ram, RAMDISK_SIZE, u32::MAX)),
            "the initrd, 0x3000000 to 0x102ffffff, is not in RAM"
        );
        assert_eq!(
            told(|ram| write(ram, CMD_LINE_PTR, u32::MAX)),
            "the command line is at 0xffffffff, where no RAM is"
        );
    }
}
