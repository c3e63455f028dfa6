//! Introduced by stage 07: a kernel entered as a boot loader does by the *Multiboot* specification (0.6.96).
//!
//! A PC's boot loaders and kernels once came in pairs. Multiboot is the contract that lets any of the one start any
//! of the other: the kernel's file begins with a header of three words; the loader puts the kernel where its file
//! says, above 1 MiB, and enters it in 32-bit protected mode without paging, with a magic number in EAX and, in
//! EBX, the address of what it tells of the machine. xv6's kernel has such a header, and so has many a small one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::mem::offset_of;
use std::ops::Range;
use std::path::Path;

use kvm_bindings::kvm_regs;
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::error::{Blame, Blamed};
use crate::layout::{
    BDA, CMDLINE, CMDLINE_SIZE, EBDA, HIGH_MEMORY, MMIO_HOLE, MULTIBOOT_INFO, VGA_HOLE, ram_ranges,
};
use crate::memory::{Ram, read_exact};
use crate::vcpu::Vcpu;
use crate::{e820, elf, file, long_mode, protected_mode};

/// The code segment's selector. The specification leaves it open, but xv6 goes on with it when it has loaded its own
/// table, in which its code is here.
const CODE: u16 = 0x08;

/// The header's first word. All three words add up to 0.
const HEADER_MAGIC: u32 = 0x1BAD_B002;

/// The header lies at a multiple of four within this many bytes of the file (3.1 "OS image format").
const SEARCHED: u64 = 8192;

/// What the kernel finds in EAX.
pub const MAGIC: u32 = 0x2BAD_B002;

// What a kernel asks for in its header's second word (3.1.2 "The magic fields"). A loader that doesn't know one of
// the lower 16 bits must refuse.
/// Modules begin at pages. There are none.
const PAGE_ALIGN: u32 = 1 << 0;
/// The memory's sizes are told.
const MEMORY_INFO: u32 = 1 << 1;
/// A video mode is told.
const VIDEO_MODE: u32 = 1 << 2;
const REQUIREMENTS: u32 = 0xFFFF;
/// The header says itself where the kernel goes: its file need not be ELF.
const ADDRESSES: u32 = 1 << 16;

// Which fields of [`Info`] mean something (3.3 "Boot information format").
const HAS_MEMORY: u32 = 1 << 0;
const HAS_CMDLINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MMAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

const LOADER_NAME: &[u8] = b"mini-kvm\0";

/// Why a file cannot be entered as a kernel.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error(transparent)]
    File(#[from] file::Error),
    /// It has no header.
    #[error(
        "this is no Multiboot kernel: expected the words 1badb002, flags, and the checksum of both at a \
         multiple of 4 in its first 8192 bytes"
    )]
    NoHeader,
    /// It wants what this machine doesn't have.
    #[error(
        "the kernel's Multiboot header asks for {what} (flags {flags:#x}), which this loader cannot give"
    )]
    Required {
        /// In words.
        what: &'static str,
        /// The header's second word.
        flags: u32,
    },
    /// The addresses in the header contradict each other or the file.
    #[error("the kernel's Multiboot header makes no sense: {what} is {found:#x}, expected {:#x} to {:#x}",
        expected.start(), expected.end())]
    Address {
        /// The field, as the specification calls it.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What would have been possible.
        expected: std::ops::RangeInclusive<u64>,
    },
    /// The file ends before what its header promises.
    #[error(
        "the kernel is truncated: its Multiboot header says {expected} bytes, the file has {found}"
    )]
    Truncated {
        /// Bytes that the header says.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// The ELF file cannot be loaded.
    #[error(transparent)]
    Elf(#[from] elf::Error),
    /// There is too little room for the command line.
    #[error("the command line has {found} bytes, expected at most {most}; shorten it")]
    CmdlineTooLong {
        /// Its length in bytes.
        found: usize,
        /// The most that fits.
        most: u64,
    },
    /// The file or the tables don't get into the guest's memory.
    #[error("cannot write to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The vCPU could not be put into protected mode.
    #[error(transparent)]
    Enter(#[from] long_mode::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Enter(error) => error.blame(),
            Self::File(error) => error.blame(),
            Self::Elf(error) => error.blame(),
            _ => Blame::Input,
        }
    }
}

/// The header: the three words, and the addresses that follow if [`ADDRESSES`] says so (3.1.1 "The layout of
/// Multiboot header").
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    magic: u32,
    flags: u32,
    checksum: u32,
    /// Where the header itself will be in memory: from that follows which byte of the file goes to `load`.
    header: u32,
    load: u32,
    /// 0 means up to the file's end.
    load_end: u32,
    /// 0 means that nothing is to be cleared behind.
    bss_end: u32,
    entry: u32,
}

/// Only these are always there.
const MAGIC_FIELDS: usize = offset_of!(Header, header);

/// What the kernel is told (3.3 "Boot information format").
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Info {
    flags: u32,
    /// KiB from 0 on.
    mem_lower: u32,
    /// KiB from 1 MiB on, up to the first hole.
    mem_upper: u32,
    boot_device: u32,
    cmdline: u32,
    mods_count: u32,
    mods_addr: u32,
    syms: [u32; 4],
    mmap_length: u32,
    mmap_addr: u32,
    drives_length: u32,
    drives_addr: u32,
    config_table: u32,
    boot_loader_name: u32,
    apm_table: u32,
    vbe: [u32; 4],
}

/// An entry of the memory map. Its halves are in the order of 64-bit numbers, which need not be aligned here.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MmapEntry {
    /// Of what follows this field.
    size: u32,
    base: [u32; 2],
    length: [u32; 2],
    /// 1 is RAM.
    kind: u32,
}

// The sizes and offsets of the specification.
const _: () = {
    assert!(size_of::<Header>() == 32 && MAGIC_FIELDS == 12);
    assert!(size_of::<Info>() == 88 && offset_of!(Info, mmap_length) == 44);
    assert!(offset_of!(Info, boot_loader_name) == 64 && offset_of!(Info, vbe) == 72);
    assert!(size_of::<MmapEntry>() == 24 && offset_of!(MmapEntry, kind) == 20);
    assert!(cfg!(target_endian = "little"));
};

macro_rules! byte_valued {
    ($($name:ident),*) => {
        $(
            #[expect(unsafe_code, reason = "read and written as bytes")]
            // SAFETY: 32-bit integers without padding between them.
            unsafe impl ByteValued for $name {}
        )*
    };
}
byte_valued!(Header, Info, MmapEntry);

/// Puts the kernel in the file at `path` into the RAM of a guest that has `memory` bytes, tells it of its machine and
/// of `cmdline`, and has the vCPU begin with its first instruction. Expects fresh guest memory.
///
/// No BIOS runs, so this leaves in its data area what a kernel may look for there: how much memory there is below 640
/// KiB, and where the extended area begins. The interrupt controllers stay as they are after reset.
pub fn boot(vcpu: &Vcpu, ram: &Ram, memory: u64, path: &Path, cmdline: &str) -> Result<(), Error> {
    let (mut file, len) = file::open(path)?;
    let entry = load(ram, &mut file, len, HIGH_MEMORY.0..memory.min(MMIO_HOLE.0))?;
    write_info(ram, memory, cmdline)?;
    write_bios_data(ram)?;
    // 3.2 "Machine state".
    let (rax, rbx) = (MAGIC.into(), MULTIBOOT_INFO.0);
    let regs = kvm_regs { rip: entry.0, rax, rbx, ..kvm_regs::default() };
    protected_mode::enter(vcpu, ram, CODE, regs)?;
    Ok(())
}

/// Copies the kernel into guest memory, all of it inside `allowed`. Returns its entry point.
fn load(ram: &Ram, file: &mut File, len: u64, allowed: Range<u64>) -> Result<GuestAddress, Error> {
    let mut start = Vec::new();
    Read::take(&mut *file, SEARCHED).read_to_end(&mut start).map_err(file::Error::Read)?;
    let (at, header) = find_header(&start).ok_or(Error::NoHeader)?;
    let flags = header.flags;
    if flags & VIDEO_MODE != 0 {
        return Err(Error::Required { what: "a video mode", flags });
    }
    if flags & REQUIREMENTS & !(PAGE_ALIGN | MEMORY_INFO) != 0 {
        return Err(Error::Required { what: "what version 0.6.96 doesn't know", flags });
    }
    if flags & ADDRESSES == 0 {
        return Ok(elf::load_32(ram, file, allowed)?.entry);
    }
    let Placed { from, to, size, entry } = place(&header, at, len, allowed)?;
    file.seek(SeekFrom::Start(from)).map_err(file::Error::Read)?;
    read_exact(ram, to, file, size)?;
    Ok(entry)
}

/// The header and its offset in the file.
fn find_header(start: &[u8]) -> Option<(u64, Header)> {
    (0..start.len()).step_by(4).find_map(|at| {
        // What is missing behind the magic fields is 0; it only counts if the flags say so.
        let mut header = Header::default();
        let found = &start[at..start.len().min(at + size_of::<Header>())];
        header.as_mut_slice()[..found.len()].copy_from_slice(found);
        let sum = header.magic.wrapping_add(header.flags).wrapping_add(header.checksum);
        let whole = found.len()
            >= if header.flags & ADDRESSES == 0 { MAGIC_FIELDS } else { size_of::<Header>() };
        (header.magic == HEADER_MAGIC && sum == 0 && whole).then_some((at as u64, header))
    })
}

/// What a header with addresses asks for.
#[derive(Debug, PartialEq, Eq)]
struct Placed {
    /// Offset in the file.
    from: u64,
    to: GuestAddress,
    size: usize,
    entry: GuestAddress,
}

/// Checks the addresses of a header that is at `at` in a file of `len` bytes (3.1.3 "The address fields").
fn place(header: &Header, at: u64, len: u64, allowed: Range<u64>) -> Result<Placed, Error> {
    let inside = |what, found: u32, first: u64, last: u64| match u64::from(found) {
        found if (first..=last).contains(&found) => Ok(found),
        found => Err(Error::Address { what, found, expected: first..=last }),
    };
    let load = inside("load_addr", header.load, allowed.start, allowed.end)?;
    // The header is where its file has it, as far from the first byte that is loaded.
    let own = inside("header_addr", header.header, load, load + at)?;
    let from = at - (own - load);
    let load_end = match header.load_end {
        0 => load + (len - from),
        end => inside("load_end_addr", end, load, allowed.end)?,
    };
    let size = load_end - load;
    if size > len - from {
        return Err(Error::Truncated { expected: from + size, found: len });
    }
    if load_end > allowed.end {
        let expected = load..=allowed.end;
        return Err(Error::Address { what: "the file's end in memory", found: load_end, expected });
    }
    let end = match header.bss_end {
        0 => load_end,
        end => inside("bss_end_addr", end, load_end, allowed.end)?,
    };
    let entry = inside("entry_addr", header.entry, load, end.saturating_sub(1))?;
    Ok(Placed { from, to: GuestAddress(load), size: size as usize, entry: GuestAddress(entry) })
}

/// Writes [`Info`] and what it points to.
fn write_info(ram: &Ram, memory: u64, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() as u64 >= CMDLINE_SIZE {
        return Err(Error::CmdlineTooLong { found: cmdline.len(), most: CMDLINE_SIZE - 1 });
    }
    ram.write_slice(cmdline.as_bytes(), CMDLINE)?;
    ram.write_slice(&[0], GuestAddress(CMDLINE.0 + cmdline.len() as u64))?;

    let ranges = ram_ranges(memory);
    let ranges = ranges.iter().map(|&(start, len)| start.0..start.0 + len as u64);
    let halves = |number: u64| [number as u32, (number >> 32) as u32];
    let mut mmap = Vec::new();
    for e820::Entry { range, kind } in e820::map_ranges(ranges) {
        let entry = MmapEntry {
            size: (size_of::<MmapEntry>() - offset_of!(MmapEntry, base)) as u32,
            base: halves(range.start),
            length: halves(range.end - range.start),
            kind: kind as u32,
        };
        mmap.extend(entry.as_slice());
    }
    let mmap_addr = MULTIBOOT_INFO.0 + size_of::<Info>() as u64;
    let name = mmap_addr + mmap.len() as u64;
    let upper = memory.min(MMIO_HOLE.0).saturating_sub(HIGH_MEMORY.0);
    let info = Info {
        flags: HAS_MEMORY | HAS_CMDLINE | HAS_MODULES | HAS_MMAP | HAS_LOADER_NAME,
        mem_lower: (EBDA.0 >> 10) as u32,
        mem_upper: (upper >> 10) as u32,
        cmdline: CMDLINE.0 as u32,
        mmap_length: mmap.len() as u32,
        mmap_addr: mmap_addr as u32,
        boot_loader_name: name as u32,
        ..Info::default()
    };
    ram.write_slice(info.as_slice(), MULTIBOOT_INFO)?;
    ram.write_slice(&mmap, GuestAddress(mmap_addr))?;
    ram.write_slice(LOADER_NAME, GuestAddress(name))?;
    Ok(())
}

/// Writes the words by which a PC's programs find the end of the memory below 640 KiB.
fn write_bios_data(ram: &Ram) -> Result<(), Error> {
    let put = |offset, word: u64| ram.write_obj(word as u16, GuestAddress(BDA.0 + offset));
    put(0x0E, EBDA.0 >> 4)?;
    put(0x13, EBDA.0 >> 10)?;
    // The extended area begins with its own size in KiB.
    ram.write_obj(((VGA_HOLE.0 - EBDA.0) >> 10) as u8, EBDA)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    const ALLOWED: Range<u64> = 0x10_0000..0x40_0000;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
    }

    fn header(flags: u32) -> Header {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        Header { magic: HEADER_MAGIC, flags, checksum, ..Header::default() }
    }

    /// A header with addresses, 16 bytes behind the first byte that is loaded.
    fn placed() -> Header {
        Header {
            header: 0x20_0010,
            load: 0x20_0000,
            load_end: 0x20_0040,
            bss_end: 0x20_1000,
            entry: 0x20_0030,
            ..header(ADDRESSES)
        }
    }

    /// A file of `len` bytes, each with its offset's lowest 8 bits, and `header` at `at`.
    fn kernel(header: &Header, at: usize, len: usize) -> Vec<u8> {
        let mut file: Vec<u8> = (0..len).map(|at| at as u8).collect();
        file[at..at + 32].copy_from_slice(header.as_slice());
        file
    }

    fn load_into(ram: &Ram, bytes: &[u8]) -> Result<GuestAddress, Error> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        load(ram, &mut file, bytes.len() as u64, ALLOWED)
    }

    fn load_bytes(bytes: &[u8]) -> Result<GuestAddress, Error> {
        load_into(&ram(), bytes)
    }

    #[test]
    fn addresses_in_the_header_say_where_the_file_goes() {
        let (ram, file) = (ram(), kernel(&placed(), 0x110, 0x1000));
        assert_eq!(load_into(&ram, &file).unwrap().0, 0x20_0030);
        let mut bytes = [0; 0x41];
        ram.read_slice(&mut bytes, GuestAddress(0x20_0000)).unwrap();
        assert_eq!(bytes[..0x40], file[0x100..0x140]);
        assert_eq!(bytes[0x40], 0, "no more than was asked for");
        // Without an end, all of the file.
        let whole = Header { load_end: 0, bss_end: 0, ..placed() };
        assert_eq!(load_into(&ram, &kernel(&whole, 0x110, 0x1000)).unwrap().0, 0x20_0030);
        ram.read_slice(&mut bytes, GuestAddress(0x20_0EC0)).unwrap();
        assert_eq!(bytes[..0x40], file[0xFC0..0x1000]);
        assert_eq!(bytes[0x40], 0);
    }

    #[test]
    fn the_header_is_found_in_the_first_8_kib_at_a_multiple_of_4() {
        let found = |at, len| find_header(&kernel(&header(3), at, 0x4000)[..len]).map(|(at, _)| at);
        assert_eq!(found(0, 0x2000), Some(0));
        assert_eq!(found(0x1FF4, 0x2000), Some(0x1FF4));
        assert_eq!(found(0x1FF8, 0x2000), None, "its end is missing");
        assert_eq!(found(0x102, 0x2000), None);
        let mut wrong = header(3);
        wrong.checksum += 1;
        assert_eq!(find_header(&kernel(&wrong, 0, 0x2000)), None);
        // Of one with addresses, all of them must be there.
        let long = |at, len| find_header(&kernel(&placed(), at, 0x4000)[..len]).map(|(at, _)| at);
        assert_eq!(long(0x1FE0, 0x2000), Some(0x1FE0));
        assert_eq!(long(0x1FE4, 0x2000), None);
        assert!(matches!(load_bytes(&kernel(&header(0), 0x2000, 0x4000)), Err(Error::NoHeader)));
    }

    #[test]
    fn what_cannot_be_given_is_refused() {
        for (flags, text) in [(4, "a video mode"), (8, "0.6.96"), (0x8000, "0.6.96")] {
            let error = load_bytes(&kernel(&header(flags), 0, 0x100)).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        // Bits above are wishes. What has no addresses is ELF, and this isn't.
        let error = load_bytes(&kernel(&header(0x2_0003), 0, 0x100)).unwrap_err();
        assert!(matches!(error, Error::Elf(elf::Error::Magic { .. })), "{error}");
    }

    #[test]
    fn addresses_that_make_no_sense_are_named() {
        let good = placed();
        for (header, what) in [
            (Header { load: 0xF_FFFF, ..good }, "load_addr"),
            (Header { load: 0x40_0001, ..good }, "load_addr"),
            (Header { header: 0x1F_FFFF, ..good }, "header_addr"),
            (Header { header: 0x20_0111, ..good }, "header_addr"),
            (Header { load_end: 0x1F_FFFF, ..good }, "load_end_addr"),
            (Header { load_end: 0x40_0001, ..good }, "load_end_addr"),
            (Header { bss_end: 0x20_003F, ..good }, "bss_end_addr"),
            (Header { bss_end: u32::MAX, ..good }, "bss_end_addr"),
            (Header { entry: 0x20_1000, ..good }, "entry_addr"),
            (Header { entry: 0, ..good }, "entry_addr"),
        ] {
            let error = load_bytes(&kernel(&header, 0x110, 0x1000)).unwrap_err();
            let Error::Address { what: found, .. } = error else { panic!("{error}") };
            assert_eq!(found, what, "{header:x?}");
        }
        let truncated = kernel(&good, 0x110, 0x13F);
        assert!(matches!(load_bytes(&truncated), Err(Error::Truncated { expected: 0x140, .. })));
        let end = Header { load: 0x3F_FFF0, header: 0x40_0000, load_end: 0, bss_end: 0, ..good };
        let error = load_bytes(&kernel(&end, 0x110, 0x1000)).unwrap_err();
        assert!(error.to_string().contains("the file's end in memory is 0x400ef0"), "{error}");
    }

    #[test]
    fn the_kernel_is_told_what_the_machine_has() {
        let ram = ram();
        write_info(&ram, 6 << 30, "one two").unwrap();
        write_bios_data(&ram).unwrap();
        let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        let text = |at: u32| {
            let mut bytes = [0; 16];
            ram.read_slice(&mut bytes, GuestAddress(at.into())).unwrap();
            String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap()).into_owned()
        };
        assert_eq!(word(0x7000), 0b10_0100_1101);
        assert_eq!((word(0x7004), word(0x7008)), (639, (0xD000_0000 - 0x10_0000) >> 10));
        assert_eq!(text(word(0x7010)), "one two");
        assert_eq!(word(0x7014), 0, "modules");
        assert_eq!(text(word(0x7040)), "mini-kvm");
        let (mut at, end) = (word(0x7030), word(0x7030) + word(0x702C));
        let mut entries = Vec::new();
        while at < end {
            let number = |offset| {
                u64::from(word(u64::from(at) + offset))
                    | u64::from(word(u64::from(at) + offset + 4)) << 32
            };
            entries.push((number(4), number(12), word(u64::from(at) + 20)));
            at += 4 + word(at.into());
        }
        assert_eq!(
            entries,
            [
                (0, 0x9_FC00, 1),
                (0x9_FC00, 0x400, 2),
                (0xE_0000, 0x2_0000, 2),
                (0x10_0000, 0xCFF0_0000, 1),
                (1 << 32, (6 << 30) - 0xD000_0000, 1),
            ]
        );
        assert_eq!((word(0x40E) as u16, word(0x413) as u16), (0x9FC0, 639));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x9_FC00)).unwrap(), 1);
        let long = "x".repeat(0x1_0000);
        let error = write_info(&ram, 1 << 20, &long).unwrap_err();
        assert!(matches!(error, Error::CmdlineTooLong { found: 0x1_0000, most: 0xFFFF }));
        write_info(&ram, 1 << 20, &long[1..]).unwrap();
    }

    proptest! {
        #[test]
        fn no_header_brings_the_loader_down(words in prop::array::uniform5(any::<u32>()), at in 0..0x400usize) {
            let [own, load, load_end, bss_end, entry] = words;
            let near = |word: u32| 0x10_0000 + word % 0x31_0000;
            for near in [|word| word, near] {
                let header = Header {
                    header: near(load).wrapping_add(own % 0x800),
                    load: near(load),
                    load_end: if load_end % 3 == 0 { 0 } else { near(load_end) },
                    bss_end: if bss_end % 3 == 0 { 0 } else { near(bss_end) },
                    entry: near(entry),
                    ..header(ADDRESSES)
                };
                if let Ok(entry) = load_bytes(&kernel(&header, at * 4, 0x1100)) {
                    prop_assert!(ALLOWED.contains(&entry.0));
                }
            }
        }
    }
}
