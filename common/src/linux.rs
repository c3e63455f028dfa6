//! Introduced by stage 08: what a boot loader does for Linux.
//!
//! A kernel file is either a *bzImage* (the compressed kernel behind the code that unpacks it, with a
//! header that tells a loader everything) or a *vmlinux* (the ELF file that the linker made). The loader
//! puts the kernel and the *initrd*, an archive with the first root file system, into RAM, writes a page
//! of parameters (`struct boot_params`, the "zero page"), and jumps.
//!
//! ```text
//! 0        1 MiB      pref_address                                     end of low RAM
//! +--------+----------+----------------------------+-----------+--------+
//! | layout |          | kernel, room to unpack it  |           | initrd |
//! +--------+----------+----------------------------+-----------+--------+
//!                     '------- init_size ----------'
//! ```
//!
//! Everything here follows Linux's `Documentation/arch/x86/boot.rst`, the "Linux boot protocol". Files
//! are read straight into guest memory, and nothing in them is believed before it has been checked.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use kvm_bindings::kvm_regs;
use linux_loader::loader::bootparam::{
    LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use thiserror::Error;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
};

use crate::error::{Blame, Blamed};
use crate::layout::{BOOT_PARAMS, CMDLINE, CMDLINE_SIZE, HIGH_MEMORY, PAGE_SIZE};
use crate::memory::{Ram, read_exact};
use crate::vcpu::Vcpu;
use crate::{e820, elf, file, long_mode};

/// A command line for a machine such as ours, with the console on the serial port.
///
/// - `quiet loglevel=3`: each printed character costs two exits, and `dmesg` has the messages anyway. At level
///   4, which `quiet` alone means, Linux would complain that there is no PCI bus;
/// - `pci=off`: there is none, and looking for it costs a distribution's kernel thousands of exits;
/// - `panic=-1`: restart at once after a panic, which [`crate::panic_watch`] tells from a restart that was wanted.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 quiet loglevel=3 pci=off panic=-1";

/// Where the setup header begins in a bzImage (Linux boot protocol, 1.2).
const SETUP_HEADER: u64 = 0x1F1;

/// "HdrS", in the `header` field.
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// The magic number of a boot sector, in `boot_flag`.
const BOOT_FLAG: u16 = 0xAA55;

/// Version 2.12 of the protocol, Linux 3.8, brought `xloadflags`, which says that there is a 64-bit entry.
const OLDEST_PROTOCOL: u16 = 0x020C;

/// `type_of_loader` for a loader that has no number of its own.
const OTHER_LOADER: u8 = 0xFF;

/// What a vmlinux, which has no setup header, is given for `cmdline_size` and `initrd_addr_max`: the
/// values of x86-64 kernels.
const VMLINUX_CMDLINE_SIZE: u32 = 2047;
const VMLINUX_INITRD_ADDR_MAX: u32 = 0x7FFF_FFFF;

/// The 64-bit entry lies this far behind the start of a bzImage's protected-mode part (Linux boot
/// protocol, 1.15).
const ENTRY_64: u64 = 0x200;

/// Why Linux could not be loaded.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error(transparent)]
    File(#[from] file::Error),
    /// It is neither a bzImage nor an ELF file.
    #[error(
        "this is no Linux kernel: expected \"HdrS\" at byte 0x202 (a bzImage) or 7f 45 4c 46 at the \
         start (a vmlinux), found {found:02x?} and {start:02x?}; give a vmlinuz or a vmlinux"
    )]
    NotAKernel {
        /// The four bytes at 0x202, as far as the file has them.
        found: Vec<u8>,
        /// The first four bytes, as far as the file has them.
        start: Vec<u8>,
    },
    /// The file ends before what its header promises.
    #[error(
        "the kernel is truncated: its header says {expected} bytes, the file has {found}; fetch it again"
    )]
    Truncated {
        /// Bytes that the header says.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// The kernel is older than the 64-bit entry's announcement in the header.
    #[error(
        "the kernel speaks boot protocol {}.{:02}, expected 2.12 (Linux 3.8) or later",
        found >> 8, found & 0xFF
    )]
    Protocol {
        /// The header's `version`.
        found: u16,
    },
    /// A kernel for a machine that this isn't.
    #[error("the kernel has no {0}: expected a 64-bit x86 bzImage")]
    NoEntry(&'static str),
    /// The header names a load address where no kernel can be.
    #[error("the kernel wants to be loaded at {found:#x}, expected 1 MiB (0x100000) or above")]
    LoadAddress {
        /// The header's `pref_address`.
        found: u64,
    },
    /// A vmlinux that cannot be loaded.
    #[error(transparent)]
    Elf(#[from] elf::Error),
    /// The guest's memory ends before the kernel does.
    #[error(
        "the kernel needs {} MiB of memory to unpack itself, the guest has {} MiB; give a larger --memory",
        needed.div_ceil(MIB), found / MIB
    )]
    KernelTooBig {
        /// How far memory would have to reach, in bytes.
        needed: u64,
        /// How far it reaches.
        found: u64,
    },
    /// The guest's memory has no room for the initrd behind the kernel.
    #[error(
        "the initrd has {size} bytes, but between the kernel and {} MiB only {room} are free; give a \
         larger --memory or a smaller initrd",
        end / MIB
    )]
    InitrdTooBig {
        /// Its size in bytes.
        size: u64,
        /// Where free memory ends that the kernel accepts an initrd in.
        end: u64,
        /// Bytes between the kernel and there.
        room: u64,
    },
    /// The kernel would cut off the command line.
    #[error("the command line has {found} bytes, this kernel takes at most {limit}; shorten it")]
    CmdlineTooLong {
        /// Its length in bytes.
        found: usize,
        /// The header's `cmdline_size`.
        limit: usize,
    },
    /// A NUL would end the command line early.
    #[error("the command line has a NUL byte at {0}, expected text")]
    CmdlineNul(usize),
    /// Reading a file into the guest's memory failed.
    #[error("cannot read the file into the guest's memory: {0}")]
    Read(#[source] GuestMemoryError),
    /// The guest's memory cannot be written where the loader's own things belong.
    #[error("the guest's memory is too small to boot Linux: {0}; give a larger --memory")]
    Memory(#[from] GuestMemoryError),
    /// The vCPU could not be put into 64-bit mode.
    #[error(transparent)]
    LongMode(#[from] long_mode::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::LongMode(error) => error.blame(),
            _ => Blame::Input,
        }
    }
}

const MIB: u64 = 1 << 20;

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its first instruction, in 64-bit mode.
    pub entry: GuestAddress,
    /// The guest memory that it needs until it manages memory by itself. Nothing else may be here.
    pub range: Range<u64>,
    /// What it says of itself: a bzImage's setup header, or its equivalent for a vmlinux.
    header: setup_header,
}

/// Loads the bzImage or vmlinux at `path`.
pub fn load_kernel(ram: &Ram, path: &Path) -> Result<Kernel, Error> {
    let (mut file, len) = file::open(path)?;
    let start = read_up_to::<4>(&mut file, 0)?;
    if start == elf::MAGIC {
        return load_vmlinux(ram, &mut file);
    }
    load_bzimage(ram, &mut file, len, start)
}

/// A vmlinux: its segments say where they belong, the ELF header where the 64-bit entry is.
fn load_vmlinux(ram: &Ram, file: &mut File) -> Result<Kernel, Error> {
    let low = low_ram_end(ram);
    let elf::Image { entry, range } = elf::load(ram, file, HIGH_MEMORY.0..low).map_err(too_big)?;
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: OLDEST_PROTOCOL,
        loadflags: LOADED_HIGH,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: VMLINUX_CMDLINE_SIZE,
        initrd_addr_max: VMLINUX_INITRD_ADDR_MAX,
        ..Default::default()
    };
    Ok(Kernel { entry, range, header })
}

/// A segment beyond the end of RAM is a question of `--memory`, if any size could be large enough.
fn too_big(error: elf::Error) -> Error {
    match error {
        elf::Error::Place { start, size, allowed } if start >= allowed.start => {
            match start.checked_add(size) {
                Some(needed) if needed <= crate::layout::MMIO_HOLE.0 => {
                    Error::KernelTooBig { needed, found: allowed.end }
                }
                _ => Error::Elf(elf::Error::Place { start, size, allowed }),
            }
        }
        error => Error::Elf(error),
    }
}

/// A bzImage: a boot sector and setup code for real mode, which a 64-bit loader skips except for the
/// header in it, and then the part for protected mode.
fn load_bzimage(ram: &Ram, file: &mut File, len: u64, start: Vec<u8>) -> Result<Kernel, Error> {
    let mut bytes = read_up_to::<{ size_of::<setup_header>() }>(file, SETUP_HEADER)?;
    let field = |offset: u64, size: u64| {
        let at = (offset - SETUP_HEADER) as usize;
        bytes.get(at..at + size as usize)
    };
    if field(0x202, 4) != Some(&HEADER_MAGIC.to_le_bytes()) {
        let found = field(0x202, 4).unwrap_or_default().to_vec();
        return Err(Error::NotAKernel { found, start });
    }
    // The header is as long as the jump across it says; what follows in the file is code.
    let end = field(0x201, 1).map_or(0, |jump| 0x202 + u64::from(jump[0]));
    bytes.resize(size_of::<setup_header>(), 0);
    let known = (end.max(0x202 + 4) - SETUP_HEADER) as usize;
    if let Some(code) = bytes.get_mut(known..) {
        code.fill(0);
    }
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(&bytes);

    let (version, loadflags, xloadflags) = (header.version, header.loadflags, header.xloadflags);
    if version < OLDEST_PROTOCOL {
        return Err(Error::Protocol { found: version });
    }
    if u64::from(header.syssize) * 16 <= ENTRY_64 {
        return Err(Error::NoEntry("code at its 64-bit entry point"));
    }
    if loadflags & LOADED_HIGH == 0 {
        return Err(Error::NoEntry("part that loads above 1 MiB (it is a zImage)"));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::NoEntry("64-bit entry point"));
    }

    // 0 stands for 4 in `setup_sects`, for history's sake; the boot sector is not counted.
    let setup = (1 + if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) }) * 512;
    let payload = u64::from(header.syssize) * 16;
    // Behind the payload there may be a signature.
    if setup + payload > len {
        return Err(Error::Truncated { expected: setup + payload, found: len });
    }

    // Loaded at the address that it prefers, even a kernel that cannot be moved runs. There it wants
    // `init_size` bytes, into which it unpacks itself.
    let at = header.pref_address;
    if at < HIGH_MEMORY.0 {
        return Err(Error::LoadAddress { found: at });
    }
    let size = payload.max(header.init_size.into());
    let low = low_ram_end(ram);
    let range = match at.checked_add(size) {
        Some(end) if end <= low => at..end,
        end => return Err(Error::KernelTooBig { needed: end.unwrap_or(u64::MAX), found: low }),
    };
    file.seek(SeekFrom::Start(setup)).map_err(file::Error::Read)?;
    read_exact(ram, GuestAddress(at), file, payload as usize).map_err(Error::Read)?;
    Ok(Kernel { entry: GuestAddress(at + ENTRY_64), range, header })
}

/// Loads the initrd at `path` behind `kernel`. Returns where it is.
pub fn load_initrd(ram: &Ram, kernel: &Kernel, path: &Path) -> Result<Range<u64>, Error> {
    let (mut file, len) = file::open(path)?;
    let initrd = place_initrd(len, kernel, low_ram_end(ram))?;
    read_exact(ram, GuestAddress(initrd.start), &mut file, len as usize).map_err(Error::Read)?;
    Ok(initrd)
}

/// The initrd goes as high as `initrd_addr_max` and RAM allow, at a page's start, and never into the
/// kernel's memory.
fn place_initrd(size: u64, kernel: &Kernel, low_ram_end: u64) -> Result<Range<u64>, Error> {
    let end = low_ram_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let room = end.saturating_sub(kernel.range.end);
    match end.checked_sub(size).map(|start| start / PAGE_SIZE * PAGE_SIZE) {
        Some(start) if start >= kernel.range.end => Ok(start..start + size),
        _ => Err(Error::InitrdTooBig { size, end, room }),
    }
}

/// Writes the command line and `struct boot_params`: what the kernel is told about its machine.
///
/// `rsdp` is where the ACPI tables begin.
pub fn write_boot_params(
    ram: &Ram,
    kernel: &Kernel,
    initrd: Option<Range<u64>>,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<(), Error> {
    let limit = u64::from(kernel.header.cmdline_size).min(CMDLINE_SIZE - 1) as usize;
    if cmdline.len() > limit {
        return Err(Error::CmdlineTooLong { found: cmdline.len(), limit });
    }
    if let Some(at) = cmdline.find('\0') {
        return Err(Error::CmdlineNul(at));
    }
    ram.write_slice(&[cmdline.as_bytes(), b"\0"].concat(), CMDLINE)?;

    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    params.hdr.type_of_loader = OTHER_LOADER;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(initrd) = initrd {
        // Both fit: an initrd lies below `initrd_addr_max`, which has 32 bits.
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    params.acpi_rsdp_addr = rsdp.0;
    let entries = e820::map(ram);
    params.e820_entries = entries.len() as u8;
    for (to, e820::Entry { range, kind }) in params.e820_table.iter_mut().zip(entries) {
        *to = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            r#type: kind as u32,
        };
    }
    ram.write_obj(params, BOOT_PARAMS)?;
    Ok(())
}

/// Puts the vCPU at the kernel's 64-bit entry: paging on, identity-mapped, `RSI` at the boot_params
/// (Linux boot protocol, 1.15 "64-bit Boot Protocol").
pub fn enter(vcpu: &Vcpu, ram: &Ram, kernel: &Kernel) -> Result<(), Error> {
    let regs = kvm_regs { rip: kernel.entry.0, rsi: BOOT_PARAMS.0, ..Default::default() };
    Ok(long_mode::enter(vcpu, ram, regs)?)
}

/// Where the RAM that begins at 0 ends.
fn low_ram_end(ram: &Ram) -> u64 {
    ram.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Up to `N` bytes of the file from `offset` on; fewer if it ends before.
fn read_up_to<const N: usize>(file: &mut File, offset: u64) -> Result<Vec<u8>, file::Error> {
    let mut bytes = Vec::with_capacity(N);
    file.seek(SeekFrom::Start(offset)).map_err(file::Error::Read)?;
    Read::by_ref(file).take(N as u64).read_to_end(&mut bytes).map_err(file::Error::Read)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::*;

    fn ram(mib: u64) -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).unwrap()
    }

    /// A setup header such as Debian's kernels have, but for a kernel of 4 KiB.
    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            // A short jump across the header, whose last byte is at 0x26B.
            jump: 0x6AEB,
            header: HEADER_MAGIC,
            version: 0x020F,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            syssize: 0x1000 / 16,
            cmdline_size: 2047,
            initrd_addr_max: 0x7FFF_FFFF,
            pref_address: 16 * MIB,
            init_size: 4 << 20,
            ..Default::default()
        }
    }

    fn bzimage(header: setup_header) -> Vec<u8> {
        let mut image = vec![0xAA; 2 * 512];
        image[0x1F1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image.extend([0x5A; 0x1000]);
        image
    }

    fn file(bytes: &[u8]) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        file
    }

    fn load(ram: &Ram, image: &[u8]) -> Result<Kernel, Error> {
        load_kernel(ram, file(image).path())
    }

    #[test]
    fn a_bzimage_goes_to_the_address_that_it_prefers() {
        let ram = ram(64);
        // A signature may follow the kernel.
        let image = [bzimage(header()), b"signature".to_vec()].concat();
        let kernel = load(&ram, &image).unwrap();
        assert_eq!(kernel.entry.0, 16 * MIB + 0x200);
        assert_eq!(kernel.range, 16 * MIB..20 * MIB);
        let edges: [u8; 4] = [0, 0x1000 - 1, 0x1000, 0x1000 + 8]
            .map(|at| ram.read_obj(GuestAddress(16 * MIB + at)).unwrap());
        assert_eq!(edges, [0x5A, 0x5A, 0, 0]);
    }

    #[test]
    fn what_follows_a_short_header_is_not_taken_for_fields() {
        // Protocol 2.12's header ends at 0x268, before `kernel_info_offset`.
        let old = setup_header { jump: 0x66EB, version: 0x020C, kernel_info_offset: 7, ..header() };
        let kernel = load(&ram(64), &bzimage(old)).unwrap();
        assert_eq!({ kernel.header.kernel_info_offset }, 0);
        assert_eq!({ kernel.header.init_size }, 4 << 20);
    }

    #[test]
    fn wrong_headers_get_a_reason() {
        for (header, text) in [
            (setup_header { header: 0, ..header() }, "this is no Linux kernel"),
            (setup_header { version: 0x020B, ..header() }, "boot protocol 2.11, expected 2.12"),
            (setup_header { syssize: 0x20, ..header() }, "no code at its 64-bit entry point"),
            (setup_header { loadflags: 0, ..header() }, "it is a zImage"),
            (setup_header { xloadflags: 0, ..header() }, "no 64-bit entry point"),
            (setup_header { pref_address: 0x1000, ..header() }, "to be loaded at 0x1000"),
            (setup_header { pref_address: u64::MAX, ..header() }, "give a larger --memory"),
            (setup_header { init_size: u32::MAX, ..header() }, "needs 4112 MiB of memory"),
            (setup_header { syssize: u32::MAX, ..header() }, "is truncated: its header says"),
            (setup_header { setup_sects: 255, ..header() }, "is truncated: its header says"),
        ] {
            let error = load(&ram(64), &bzimage(header)).unwrap_err();
            assert_eq!(error.blame(), Blame::Input);
            assert!(error.to_string().contains(text), "{text}: {error}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let image = bzimage(header());
        let ram = ram(64);
        for len in (1..image.len()).step_by(7) {
            let error = load(&ram, &image[..len]).unwrap_err();
            let fits = if len < 0x206 {
                matches!(error, Error::NotAKernel { .. })
            } else {
                // Before the header's end its fields read as zeros, and none of them fits.
                !matches!(error, Error::NotAKernel { .. } | Error::Memory(_) | Error::File(_))
            };
            assert!(fits, "{len}: {error}");
        }
    }

    #[test]
    fn files_that_are_no_kernels_are_refused() {
        for (bytes, text) in [
            (&b""[..], "the file is empty"),
            (b"x", "found [] and [78]"),
            (b"#!/bin/sh\n", "found [] and [23, 21, 2f, 62]"),
            (b"\x7FELF", "truncated: the ELF header ends at byte 0x40"),
        ] {
            let error = load(&ram(64), bytes).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let huge = NamedTempFile::new().unwrap();
        huge.as_file().set_len(1 << 40).unwrap();
        let error = load_kernel(&ram(64), huge.path()).unwrap_err();
        assert!(matches!(error, Error::NotAKernel { .. }), "{error}");
    }

    #[test]
    fn memory_too_small_for_the_kernel_says_how_much_it_needs() {
        let error = load(&ram(16), &bzimage(header())).unwrap_err().to_string();
        assert!(error.contains("needs 20 MiB of memory to unpack itself, the guest has 16 MiB"));
    }

    #[test]
    fn the_initrd_is_in_memory_byte_by_byte() {
        let ram = ram(64);
        let kernel = load(&ram, &bzimage(header())).unwrap();
        let content: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
        let initrd = load_initrd(&ram, &kernel, file(&content).path()).unwrap();
        assert_eq!(initrd, 64 * MIB - 0x3000..64 * MIB - 0x3000 + 10_000);
        let mut loaded = vec![0; content.len()];
        ram.read_slice(&mut loaded, GuestAddress(initrd.start)).unwrap();
        assert_eq!(loaded, content);
    }

    #[test]
    fn a_file_that_is_shorter_than_it_says_is_told_from_little_memory() {
        let ram = ram(64);
        let kernel = load(&ram, &bzimage(header())).unwrap();
        // The kernel says 4096 bytes of each file there.
        let error = load_initrd(&ram, &kernel, Path::new("/sys/devices/system/cpu/online"));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("cannot read the file") && error.contains("of 4096 bytes"),
            "{error}"
        );
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused_before_it_is_read() {
        let ram = ram(64);
        let kernel = load(&ram, &bzimage(header())).unwrap();
        let huge = NamedTempFile::new().unwrap();
        huge.as_file().set_len(1 << 40).unwrap();
        let error = load_initrd(&ram, &kernel, huge.path()).unwrap_err();
        let room = 44 * MIB;
        assert!(matches!(error, Error::InitrdTooBig { room: r, .. } if r == room), "{error}");
    }

    proptest! {
        #[test]
        fn the_initrd_never_meets_the_kernel_and_never_leaves_what_it_may_use(
            size in 1u64..u64::MAX,
            small in any::<bool>(),
            kernel_end in MIB..(4 << 30),
            low_ram_end in MIB..(4 << 30),
            initrd_addr_max: u32,
        ) {
            let size = if small { size % (64 * MIB) + 1 } else { size };
            let kernel = Kernel {
                entry: GuestAddress(0),
                range: MIB..kernel_end,
                header: setup_header { initrd_addr_max, ..header() },
            };
            match place_initrd(size, &kernel, low_ram_end) {
                Ok(initrd) => {
                    prop_assert_eq!(initrd.end - initrd.start, size);
                    prop_assert!(initrd.start >= kernel_end && initrd.end <= low_ram_end);
                    prop_assert!(initrd.end - 1 <= u64::from(initrd_addr_max));
                    prop_assert_eq!(initrd.start % PAGE_SIZE, 0);
                    // As high as possible: a page higher would be too high.
                    let top = low_ram_end.min(u64::from(initrd_addr_max) + 1);
                    prop_assert!(initrd.end + PAGE_SIZE > top);
                }
                Err(_) => {
                    let top = low_ram_end.min(u64::from(initrd_addr_max) + 1);
                    prop_assert!(top.saturating_sub(kernel_end) < size.saturating_add(PAGE_SIZE));
                }
            }
        }

        #[test]
        fn no_header_brings_the_loader_down(
            changes in prop::collection::vec((0x1F1usize..0x26C, any::<u8>()), 0..10),
            cmdline in 0..70_000_usize,
        ) {
            let (ram, initrd) = (ram(32), file(&[7; 5000]));
            let mut image = bzimage(header());
            for (at, value) in changes {
                image[at] = value;
            }
            if let Ok(kernel) = load(&ram, &image) {
                prop_assert!(kernel.range.start >= MIB && kernel.range.end <= 32 * MIB);
                prop_assert!(kernel.range.contains(&kernel.entry.0));
                let initrd = load_initrd(&ram, &kernel, initrd.path());
                if let Ok(initrd) = &initrd {
                    prop_assert!(initrd.start >= kernel.range.end && initrd.end <= 32 * MIB);
                }
                let cmdline = "x".repeat(cmdline);
                let rsdp = crate::acpi::write_tables(&ram, 255).unwrap();
                let limit = kernel.header.cmdline_size as usize;
                match write_boot_params(&ram, &kernel, initrd.ok(), &cmdline, rsdp) {
                    Ok(()) => prop_assert!(cmdline.len() <= limit),
                    Err(Error::CmdlineTooLong { .. }) => {}
                    Err(error) => prop_assert!(false, "{error}"),
                }
            }
        }
    }

    #[test]
    fn the_zero_page_has_what_the_protocol_says_where_it_says() {
        let ram = ram(64);
        let kernel = load(&ram, &bzimage(header())).unwrap();
        let initrd = Some(0x200_0000..0x200_1234);
        write_boot_params(&ram, &kernel, initrd, "console=ttyS0", GuestAddress(0xE0000)).unwrap();
        let u8_at = |at: u64| ram.read_obj::<u8>(GuestAddress(BOOT_PARAMS.0 + at)).unwrap();
        let u32_at = |at: u64| ram.read_obj::<u32>(GuestAddress(BOOT_PARAMS.0 + at)).unwrap();
        let u64_at = |at: u64| ram.read_obj::<u64>(GuestAddress(BOOT_PARAMS.0 + at)).unwrap();
        // Offsets from the protocol's own tables (boot.rst 1.4, zero-page.rst).
        assert_eq!(u64_at(0x070), 0xE0000, "acpi_rsdp_addr");
        assert_eq!(u8_at(0x1E8), 4, "e820_entries");
        assert_eq!(u32_at(0x202), HEADER_MAGIC);
        assert_eq!(u8_at(0x210), 0xFF, "type_of_loader");
        assert_eq!((u32_at(0x218), u32_at(0x21C)), (0x200_0000, 0x1234), "ramdisk");
        assert_eq!(u32_at(0x228), CMDLINE.0 as u32, "cmd_line_ptr");
        assert_eq!((u64_at(0x2D0), u64_at(0x2D8), u32_at(0x2E0)), (0, 0x9_FC00, 1), "e820[0]");
        assert_eq!((u64_at(0x2E4), u32_at(0x2F4)), (0x9_FC00, 2), "e820[1]");
        let mut text = [0; 14];
        ram.read_slice(&mut text, CMDLINE).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_off_is_refused() {
        let ram = ram(64);
        let kernel = load(&ram, &bzimage(header())).unwrap();
        let write = |text: &str| write_boot_params(&ram, &kernel, None, text, GuestAddress(0));
        write(&"x".repeat(2047)).unwrap();
        let error = write(&"x".repeat(2048)).unwrap_err();
        assert!(matches!(error, Error::CmdlineTooLong { found: 2048, limit: 2047 }), "{error}");
        assert!(matches!(write("a\0b").unwrap_err(), Error::CmdlineNul(1)));
    }
}
