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
use crate::memory::Ram;
use crate::vcpu::Vcpu;
use crate::{e820, elf, file, long_mode};

/// Where the setup header begins in a bzImage (Linux boot protocol, 1.3).
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
        mib(*.needed), mib(*.found)
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
        .end >> 20
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

/// Bytes in MiB, rounded up.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

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
    ram.read_exact_volatile_from(GuestAddress(at), file, payload as usize)?;
    Ok(Kernel { entry: GuestAddress(at + ENTRY_64), range, header })
}

/// Loads the initrd at `path` behind `kernel`. Returns where it is.
pub fn load_initrd(ram: &Ram, kernel: &Kernel, path: &Path) -> Result<Range<u64>, Error> {
    let (mut file, len) = file::open(path)?;
    let initrd = place_initrd(len, kernel, low_ram_end(ram))?;
    ram.read_exact_volatile_from(GuestAddress(initrd.start), &mut file, len as usize)?;
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
