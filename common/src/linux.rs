//! Introduced by stage 08: what a boot loader does for Linux.
//!
//! A kernel file is either a *bzImage* (the compressed kernel behind the code that unpacks it, with a
//! header that tells a loader everything) or a *vmlinux* (the ELF file that the linker made, and what is
//! compressed in a bzImage). The loader unpacks the kernel, puts it and the *initrd*, an archive with the first root
//! file system, into RAM, writes a page of parameters (`struct boot_params`, the "zero page"), and jumps.
//!
//! ```text
//! 0        1 MiB      pref_address                                     end of low RAM
//! +--------+----------+----------------------------+-----------+--------+
//! | layout |          | kernel, room to start in   |           | initrd |
//! +--------+----------+----------------------------+-----------+--------+
//!                     '------- init_size ----------'
//! ```
//!
//! Everything here follows Linux's `Documentation/arch/x86/boot.rst`, the "Linux boot protocol". Nothing in a file
//! is believed before it has been checked, and no file makes the host allocate more than the guest has memory.

mod bzimage;
mod cache;
mod check;
mod payload;
mod pvh;

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use kvm_bindings::kvm_regs;
use linux_loader::loader::bootparam::{
    LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, ReadVolatile,
};

use bzimage::BzImage;
pub use cache::Cache;
pub use check::check_boot_params;
pub use payload::{Error as PayloadError, Format, unpack};

use crate::error::{Blame, Blamed};
use crate::layout::{BOOT_PARAMS, CMDLINE, CMDLINE_SIZE, HIGH_MEMORY, PAGE_SIZE};
use crate::long_mode::CODE;
use crate::memory::{Ram, read_exact};
use crate::vcpu::Vcpu;
use crate::{e820, elf, file, long_mode, protected_mode};

/// A command line for a machine such as ours, with the console on the serial port.
///
/// - `quiet loglevel=3`: each printed character costs two exits, and `dmesg` has the messages anyway. At level
///   4, which `quiet` alone means, Linux would complain that there is no PCI bus;
/// - `pci=off`: there is none, and looking for it costs a distribution's kernel thousands of exits;
/// - `panic=-1`: restart at once after a panic, which [`crate::panic_watch`] tells from a restart that was wanted.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 quiet loglevel=3 pci=off panic=-1";

/// The same with the console on the first virtio console.
///
/// That one works only when the kernel has found its driver. What it says before comes by the serial port, which it
/// leaves then: a boot console (`earlycon`), not a second console, on which all would be printed twice. It begins
/// when its word is read, with the loglevel that stands before.
pub const HVC_CMDLINE: &str =
    "quiet loglevel=3 earlycon=uart8250,io,0x3f8 console=hvc0 pci=off panic=-1";

/// "HdrS", in the `header` field.
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// The magic number of a boot sector, in `boot_flag`.
const BOOT_FLAG: u16 = 0xAA55;

/// `type_of_loader` for a loader that has no number of its own.
const OTHER_LOADER: u8 = 0xFF;

/// What a vmlinux, which has no setup header, is given for `version`, `cmdline_size` and `initrd_addr_max`: the
/// values of x86-64 kernels.
const VMLINUX_PROTOCOL: u16 = 0x020C;
const VMLINUX_CMDLINE_SIZE: u32 = 2047;
const VMLINUX_INITRD_ADDR_MAX: u32 = 0x7FFF_FFFF;

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
    /// The kernel is older than the protocol that this loader speaks.
    #[error(
        "the kernel speaks boot protocol {}.{:02}, expected 2.02 (Linux 2.4) or later",
        found >> 8, found & 0xFF
    )]
    Protocol {
        /// The header's `version`.
        found: u16,
    },
    /// A part that the kernel would have to be entered by is missing.
    #[error("the kernel has no {0}; expected a bzImage")]
    NoEntry(&'static str),
    /// It was to be entered in a way that it doesn't have.
    #[error("the kernel has no {way}: {why}; leave --entry away")]
    NoWay {
        /// The way in.
        way: &'static str,
        /// Why not.
        why: String,
    },
    /// The header names a load address where no kernel can be.
    #[error(
        "the kernel wants to be loaded at {found:#x}, expected a page's start at 1 MiB (0x100000) or above"
    )]
    LoadAddress {
        /// The header's `pref_address`.
        found: u64,
    },
    /// The header names no compressed kernel: it is older than that field, or no Linux (memtest86+).
    #[error("its header names no compressed kernel")]
    NoPayload,
    /// The header names bytes for the compressed kernel that it has not.
    #[error("its compressed kernel would end at byte {end:#x} of a part with {part:#x} bytes")]
    PayloadPlace {
        /// `payload_offset` and `payload_length` together.
        end: u64,
        /// The protected-mode part's length.
        part: u64,
    },
    /// The compressed kernel cannot be unpacked.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// A vmlinux that cannot be loaded.
    #[error(transparent)]
    Elf(#[from] elf::Error),
    /// The guest's memory ends before the kernel does.
    #[error(
        "the kernel needs {} MiB of memory to start, the guest has {} MiB; give a larger --memory",
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

/// Which way a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// The quickest one that it has: [`Way::Elf`], else [`Way::Pvh`], else [`Way::Packed`], else [`Way::Packed32`].
    #[default]
    Auto,
    /// The entry of the ELF file: of a vmlinux, or of the one in a bzImage, which is unpacked for that.
    Elf,
    /// The 64-bit entry of a bzImage, which unpacks itself.
    Packed,
    /// Its 32-bit entry, which all bzImages have.
    Packed32,
    /// The PVH entry that a vmlinux has in a note, or the one in a bzImage.
    Pvh,
}

/// How [`load_kernel`] is to do its work.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which way the kernel is to be entered.
    pub way: Way,
    /// Where unpacked kernels are kept; without it, none is.
    pub cache: Option<Cache>,
}

/// The state in which a kernel expects the processor, and what it finds there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode, `RSI` at the boot_params (Linux boot protocol, 1.15 "64-bit Boot Protocol").
    Long,
    /// 32-bit protected mode without paging, `ESI` at the boot_params (1.14 "32-bit Boot Protocol").
    Protected,
    /// The same mode, `EBX` at the start info (Xen's PVH).
    Pvh,
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its first instruction.
    pub entry: GuestAddress,
    /// The mode in which it is entered.
    pub mode: Mode,
    /// The guest memory that it needs until it manages memory by itself. Nothing else may be here.
    pub range: Range<u64>,
    /// What was found and done, in lines for a person.
    pub notes: Vec<String>,
    /// What it says of itself: a bzImage's setup header, or its equivalent for a vmlinux.
    header: setup_header,
}

/// Loads the bzImage or vmlinux at `path`.
pub fn load_kernel(ram: &Ram, path: &Path, options: &Options) -> Result<Kernel, Error> {
    let (mut file, len) = file::open(path)?;
    let start = read_up_to::<4>(&mut file, 0)?;
    let mut kernel = match start == elf::MAGIC {
        true => load_vmlinux(ram, &mut file, options.way)?,
        false => load_bzimage(ram, &mut file, len, start, options)?,
    };
    let (mode, Range { start, end }) = (kernel.mode, kernel.range.clone());
    let mode = match mode {
        Mode::Long => "64-bit mode",
        Mode::Protected => "32-bit protected mode",
        Mode::Pvh => "32-bit protected mode, by PVH",
    };
    kernel.notes.push(format!("is entered at {:#x} in {mode}", kernel.entry.0));
    kernel.notes.push(format!("has the memory from {start:#x} to {end:#x}"));
    Ok(kernel)
}

/// A vmlinux: its segments say where they belong, the ELF header where the 64-bit entry is.
fn load_vmlinux(ram: &Ram, file: &mut File, way: Way) -> Result<Kernel, Error> {
    if matches!(way, Way::Packed | Way::Packed32) {
        return Err(Error::NoWay {
            way: "decompressor",
            why: "it is an ELF file, and not compressed".into(),
        });
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VMLINUX_PROTOCOL,
        loadflags: LOADED_HIGH,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: VMLINUX_CMDLINE_SIZE,
        initrd_addr_max: VMLINUX_INITRD_ADDR_MAX,
        ..Default::default()
    };
    let (elf::Image { entry, range }, mode) = load_elf(ram, file, way)?;
    Ok(Kernel { entry, mode, range, notes: vec!["is a vmlinux".into()], header })
}

/// Loads a vmlinux by the entry in its header or, where that is none or was not asked for, by its PVH entry.
fn load_elf<F>(ram: &Ram, file: &mut F, way: Way) -> Result<(elf::Image, Mode), Error>
where
    F: Read + Seek + ReadVolatile,
{
    let allowed = HIGH_MEMORY.0..low_ram_end(ram);
    if way != Way::Pvh {
        match elf::load(ram, file, allowed.clone()) {
            Ok(image) => return Ok((image, Mode::Long)),
            // Kernels that begin at a virtual address can be entered by PVH only.
            Err(elf::Error::Entry(_)) if way == Way::Auto && pvh::entry(file)?.is_some() => {}
            Err(error) => return Err(too_big(error)),
        }
    }
    let Some(entry) = pvh::entry(file)? else {
        let why = "it has no ELF note of Xen's that names one".into();
        return Err(Error::NoWay { way: "PVH entry", why });
    };
    Ok((elf::load_at(ram, file, allowed, entry).map_err(too_big)?, Mode::Pvh))
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

/// A bzImage: a boot sector and setup code for real mode, which we skip except for the header in it, and then
/// the part for protected mode, which is a decompressor with the kernel as its data.
fn load_bzimage(
    ram: &Ram,
    file: &mut File,
    len: u64,
    start: Vec<u8>,
    options: &Options,
) -> Result<Kernel, Error> {
    let image = BzImage::read(file, len, start)?;
    let range = image.range(low_ram_end(ram))?;
    let header = image.header;
    let (version, release) = ({ header.version }, image.version(file)?);
    let release = release.split(' ').next().unwrap_or_default();
    let mut notes = vec![format!(
        "is a bzImage of boot protocol {}.{:02}, release {}",
        version >> 8,
        version & 0xFF,
        if release.is_empty() { "unknown" } else { release },
    )];

    if matches!(options.way, Way::Auto | Way::Elf | Way::Pvh) {
        match load_payload(ram, file, &image, options, &mut notes) {
            Ok((elf::Image { entry, range: segments }, mode)) => {
                let range = range.start.min(segments.start)..range.end.max(segments.end);
                return Ok(Kernel { entry, mode, range, notes, header });
            }
            Err(why) if options.way == Way::Auto => {
                notes.push(format!("is loaded as it is: {why}"));
            }
            Err(why @ Error::NoWay { .. }) => return Err(why),
            Err(why) => {
                return Err(Error::NoWay { way: "ELF file inside", why: why.to_string() });
            }
        }
    }
    let (entry_32, entry_64) = image.load(ram, file, range.start)?;
    let (entry, mode) = match options.way {
        Way::Packed if !image.has_entry_64() => {
            let why = "its header doesn't name one".into();
            return Err(Error::NoWay { way: "64-bit entry", why });
        }
        Way::Packed32 => (entry_32, Mode::Protected),
        _ if !image.has_entry_64() => (entry_32, Mode::Protected),
        _ => (entry_64, Mode::Long),
    };
    Ok(Kernel { entry, mode, range, notes, header })
}

/// Unpacks the kernel in a bzImage, or takes it from the cache, and loads it.
fn load_payload(
    ram: &Ram,
    file: &mut File,
    image: &BzImage,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<(elf::Image, Mode), Error> {
    let began = Instant::now();
    let Some(payload) = image.payload(file)? else {
        return Err(Error::NoPayload);
    };
    let format = Format::of(&payload)?;
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / MIB as f64);
    let packed = mib(payload.len());
    // Reading what LZ4 unpacks to takes as long as unpacking it.
    let cache = options.cache.as_ref().filter(|_| format != Format::Lz4);
    let path = cache.map(|cache| cache.path(&payload));
    if let Some((cache, path)) = cache.zip(path.as_ref())
        && let Some(mut kept) = cache.find(path)
    {
        let loaded = load_elf(ram, &mut kept, options.way)?;
        notes.push(format!(
            "has {packed} of {format} data, known from an earlier boot: loaded from {} in {} ms",
            path.display(),
            began.elapsed().as_millis(),
        ));
        return Ok(loaded);
    }
    let unpacked = unpack(&payload, image.header.init_size.into())?;
    let loaded = load_elf(ram, &mut Cursor::new(&unpacked), options.way)?;
    notes.push(format!(
        "has {packed} of {format} data, unpacked by the host to {} in {} ms",
        mib(unpacked.len()),
        began.elapsed().as_millis(),
    ));
    if let Some((cache, path)) = cache.zip(path.as_ref()) {
        notes.push(match cache.keep(path, &unpacked) {
            Ok(()) => format!("is kept unpacked as {}", path.display()),
            Err(error) => format!("cannot be kept unpacked in the cache: {error}"),
        });
    }
    Ok(loaded)
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
// ANCHOR: place_initrd
fn place_initrd(size: u64, kernel: &Kernel, low_ram_end: u64) -> Result<Range<u64>, Error> {
    let end = low_ram_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let room = end.saturating_sub(kernel.range.end);
    match end.checked_sub(size).map(|start| start / PAGE_SIZE * PAGE_SIZE) {
        Some(start) if start >= kernel.range.end => Ok(start..start + size),
        _ => Err(Error::InitrdTooBig { size, end, room }),
    }
}
// ANCHOR_END: place_initrd

/// Writes the command line and `struct boot_params`, or PVH's start info: what the kernel is told about its machine.
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
    if kernel.mode == Mode::Pvh {
        return pvh::write_start_info(ram, initrd, rsdp);
    }

    // ANCHOR: boot_params
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
    // ANCHOR_END: boot_params
}

/// Puts the vCPU at the kernel's entry, in the mode that it expects, and with what it expects in its registers.
// ANCHOR: enter
pub fn enter(vcpu: &Vcpu, ram: &Ram, kernel: &Kernel) -> Result<(), Error> {
    let regs = kvm_regs { rip: kernel.entry.0, ..Default::default() };
    let rsi = BOOT_PARAMS.0;
    match kernel.mode {
        Mode::Long => long_mode::enter(vcpu, ram, kvm_regs { rsi, ..regs })?,
        Mode::Protected => protected_mode::enter(vcpu, ram, CODE, kvm_regs { rsi, ..regs })?,
        Mode::Pvh => {
            protected_mode::enter(vcpu, ram, CODE, kvm_regs { rbx: pvh::START_INFO.0, ..regs })?;
        }
    }
    Ok(())
}
// ANCHOR_END: enter

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
    use vm_memory::ByteValued;

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
        load_kernel(ram, file(image).path(), &Options::default())
    }

    fn load_by(way: Way, image: &[u8]) -> Result<Kernel, Error> {
        load_kernel(&ram(64), file(image).path(), &Options { way, cache: None })
    }

    /// A vmlinux of a few KiB: one segment at 16 MiB, whose entry is at its byte 0x40.
    fn vmlinux() -> Vec<u8> {
        let content = payload::tests::content(9000);
        let mut elf = vec![0; 64 + 56];
        elf[..20].copy_from_slice(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0");
        let mut put = |at: usize, value: u64| {
            elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(24, 16 * MIB + 0x40); // e_entry
        put(32, 64); // e_phoff
        put(54, 56 | 1 << 16); // e_phentsize, e_phnum
        put(64, 1); // PT_LOAD
        put(72, 64 + 56); // p_offset
        put(88, 16 * MIB); // p_paddr
        put(96, 9000); // p_filesz
        put(104, 20_000); // p_memsz
        [elf, content].concat()
    }

    /// The same with this entry, and a note that names a PVH entry at its byte 0x1230.
    fn vmlinux_with_pvh(entry: u64) -> Vec<u8> {
        let mut elf = vmlinux();
        let mut note: Vec<u8> = [4, 8, 18].into_iter().flat_map(u32::to_le_bytes).collect();
        note.extend(b"Xen\0");
        note.extend((16 * MIB + 0x1230).to_le_bytes());
        let mut header = vec![0; 56];
        header[0] = 4; // PT_NOTE
        header[8..16].copy_from_slice(&(64 + 2 * 56_u64).to_le_bytes());
        header[32..40].copy_from_slice(&(note.len() as u64).to_le_bytes());
        elf[24..32].copy_from_slice(&entry.to_le_bytes());
        elf[56] = 2; // e_phnum
        elf[72..80].copy_from_slice(&(64 + 2 * 56 + note.len() as u64).to_le_bytes());
        [&elf[..120], &header, &note, &elf[120..]].concat()
    }

    /// A bzImage with this payload behind its entries.
    fn bzimage_with(header: setup_header, payload: &[u8]) -> Vec<u8> {
        let mut part = [&[0x5A; 0x300], payload].concat();
        part.resize(part.len().next_multiple_of(16), 0);
        let mut image = bzimage(setup_header {
            syssize: part.len() as u32 / 16,
            payload_offset: 0x300,
            payload_length: payload.len() as u32,
            ..header
        });
        image.truncate(2 * 512);
        [image, part].concat()
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
    fn the_kernel_inside_is_unpacked_and_entered() {
        for format in payload::tests::FORMATS {
            let ram = ram(64);
            let image = bzimage_with(header(), &payload::tests::pack(format, &vmlinux()));
            let kernel = load(&ram, &image).unwrap();
            assert_eq!((kernel.entry.0, kernel.mode), (16 * MIB + 0x40, Mode::Long), "{format}");
            // Not only its segments: it begins its life with all that the header asks for.
            assert_eq!(kernel.range, 16 * MIB..20 * MIB);
            let mut loaded = vec![0; 9001];
            ram.read_slice(&mut loaded, GuestAddress(16 * MIB)).unwrap();
            assert_eq!(loaded[..9000], vmlinux()[64 + 56..]);
            assert_eq!(loaded[9000], 0);
            let told = format!("of {format} data, unpacked by the host to 0.0 MiB in");
            assert!(kernel.notes.iter().any(|note| note.contains(&told)), "{:?}", kernel.notes);
        }
    }

    #[test]
    fn what_cannot_be_unpacked_is_left_to_the_guest() {
        let gzip = || payload::tests::pack(Format::Gzip, &vmlinux());
        let mut damaged = gzip();
        // A kind of block that there is not.
        damaged[10] = 0xFF;
        let mut too_long = gzip();
        let at = too_long.len() - 4;
        too_long[at..].copy_from_slice(&(4 << 20 | 1_u32).to_le_bytes());
        let not_64_bit = {
            let mut elf = vmlinux();
            elf[4] = 1;
            payload::tests::pack(Format::Gzip, &elf)
        };
        for (payload, why) in [
            (damaged, "its gzip data are damaged"),
            (too_long, "4194305 bytes unpacked, but its header says room for 4194304"),
            (not_64_bit, "the ELF class is 1, expected 2"),
            (b"new format".to_vec(), "its compression is none of"),
            (vec![], "its header names no compressed kernel"),
        ] {
            let image = bzimage_with(header(), &payload);
            let kernel = load(&ram(64), &image).unwrap();
            assert_eq!((kernel.entry.0, kernel.mode), (16 * MIB + 0x200, Mode::Long));
            let note = &kernel.notes[1];
            assert!(note.starts_with("is loaded as it is: ") && note.contains(why), "{note}");
            let error = load_by(Way::Elf, &image).unwrap_err().to_string();
            assert!(error.starts_with("the kernel has no ELF file inside: "), "{error}");
            assert!(error.contains(why), "{error}");
        }
        // Behind the end of its part of the file.
        let image = bzimage_with(header(), &gzip());
        for (offset, length) in [(0x301, 0x10_0000), (u32::MAX, u32::MAX)] {
            let mut image = image.clone();
            image[0x248..0x24C].copy_from_slice(&u32::to_le_bytes(offset));
            image[0x24C..0x250].copy_from_slice(&u32::to_le_bytes(length));
            let kernel = load(&ram(64), &image).unwrap();
            assert!(kernel.notes[1].contains("its compressed kernel would end at"));
        }
    }

    #[test]
    fn the_way_that_was_asked_for_is_taken_or_refused() {
        let image = bzimage_with(header(), &payload::tests::pack(Format::Xz, &vmlinux()));
        for (way, entry, mode) in [
            (Way::Elf, 0x40, Mode::Long),
            (Way::Packed, 0x200, Mode::Long),
            (Way::Packed32, 0, Mode::Protected),
        ] {
            let kernel = load_by(way, &image).unwrap();
            assert_eq!((kernel.entry.0, kernel.mode), (16 * MIB + entry, mode));
        }
        let old = bzimage(setup_header { xloadflags: 0, ..header() });
        for (way, image, text) in [
            (Way::Pvh, &image, "no PVH entry: it has no ELF note of Xen's that names one"),
            (Way::Pvh, &vmlinux(), "no PVH entry"),
            (Way::Pvh, &old, "no ELF file inside: its header names no compressed kernel"),
            (Way::Packed, &old, "no 64-bit entry: its header doesn't name one; leave --entry away"),
            (Way::Packed, &vmlinux(), "no decompressor: it is an ELF file, and not compressed"),
            (Way::Packed32, &vmlinux(), "no decompressor"),
        ] {
            let error = load_by(way, image).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_pvh_entry_is_taken_where_it_is_asked_for_or_the_only_one() {
        let pvh = vmlinux_with_pvh(16 * MIB + 0x40);
        let only_pvh = vmlinux_with_pvh(0xFFFF_FFFF_8100_0040);
        let packed = |elf: &[u8]| bzimage_with(header(), &payload::tests::pack(Format::Xz, elf));
        for (way, image, mode) in [
            (Way::Auto, &pvh, Mode::Long),
            (Way::Pvh, &pvh, Mode::Pvh),
            (Way::Pvh, &packed(&pvh), Mode::Pvh),
            (Way::Auto, &only_pvh, Mode::Pvh),
            (Way::Auto, &packed(&only_pvh), Mode::Pvh),
        ] {
            let kernel = load_by(way, image).unwrap();
            let entry = 16 * MIB + if mode == Mode::Pvh { 0x1230 } else { 0x40 };
            assert_eq!((kernel.entry.0, kernel.mode), (entry, mode));
        }
        let error = load_by(Way::Elf, &only_pvh).unwrap_err();
        assert!(matches!(error, Error::Elf(elf::Error::Entry(_))), "{error}");
    }

    #[test]
    fn a_kernel_without_a_64_bit_entry_is_entered_in_protected_mode() {
        let kernel = load(&ram(64), &bzimage(setup_header { xloadflags: 0, ..header() })).unwrap();
        assert_eq!((kernel.entry.0, kernel.mode), (16 * MIB, Mode::Protected));
    }

    #[test]
    fn what_an_old_header_lacks_has_the_value_of_its_time() {
        // A header of 2.02 ends at 0x228, and its jump says so. What follows is code.
        let code = |version| setup_header {
            jump: 0x26EB,
            version,
            initrd_addr_max: 0x9090_9090,
            cmdline_size: 0x9090_9090,
            pref_address: 0x9090_9090_9090_9090,
            xloadflags: 0x9090 | XLF_KERNEL_64,
            ..header()
        };
        let kernel = load(&ram(64), &bzimage(code(0x0202))).unwrap();
        assert_eq!((kernel.entry.0, kernel.mode), (MIB, Mode::Protected));
        assert_eq!(kernel.range, MIB..MIB + 3 * 0x1000);
        assert_eq!({ kernel.header.initrd_addr_max }, 0x37FF_FFFF);
        assert_eq!({ kernel.header.cmdline_size }, 255);
        // Before 2.04 the length of the file is the better word.
        let mut longer = code(0x0203);
        longer.syssize = u32::MAX;
        load(&ram(64), &bzimage(longer)).unwrap();
        longer.version = 0x0204;
        let error = load(&ram(64), &bzimage(longer)).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{error}");
    }

    #[test]
    fn an_unpacked_kernel_is_taken_from_the_cache_the_second_time() {
        let dir = tempfile::tempdir().unwrap();
        let image = file(&bzimage_with(header(), &payload::tests::pack(Format::Xz, &vmlinux())));
        let options = Options { way: Way::Elf, cache: Some(Cache::new(dir.path())) };
        let load = || {
            let ram = ram(64);
            let kernel = load_kernel(&ram, image.path(), &options).unwrap();
            assert_eq!(kernel.entry.0, 16 * MIB + 0x40);
            assert_eq!(kernel.range, 16 * MIB..20 * MIB);
            let mut loaded = vec![0; 9001];
            ram.read_slice(&mut loaded, GuestAddress(16 * MIB)).unwrap();
            assert_eq!(loaded[..9000], vmlinux()[64 + 56..]);
            assert_eq!(loaded[9000], 0);
            kernel.notes.join("\n")
        };
        let first = load();
        assert!(first.contains("is kept unpacked as "), "{first}");
        let second = load();
        assert!(second.contains("known from an earlier boot"), "{second}");
        // What is damaged is unpacked once more.
        let kept = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut damaged = fs::read(&kept).unwrap();
        damaged[5000] ^= 1;
        fs::write(&kept, damaged).unwrap();
        let third = load();
        assert!(third.contains("is kept unpacked as "), "{third}");
        // A cache that cannot be written to costs the time, and not the boot.
        let nowhere = Options { cache: Some(Cache::new(image.path())), ..options.clone() };
        let kernel = load_kernel(&ram(64), image.path(), &nowhere).unwrap();
        assert!(kernel.notes.join("\n").contains("cannot be kept unpacked in the cache"));
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
            (setup_header { version: 0x0201, ..header() }, "boot protocol 2.01, expected 2.02"),
            (setup_header { syssize: 0x20, ..header() }, "no code at its entry points"),
            (setup_header { loadflags: 0, ..header() }, "it is a zImage"),
            (setup_header { pref_address: 0x1000, ..header() }, "to be loaded at 0x1000"),
            (setup_header { pref_address: 0x10_0001, ..header() }, "expected a page's start"),
            (setup_header { pref_address: u64::MAX << 12, ..header() }, "give a larger --memory"),
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
        // The last paragraph of 16 bytes need not be whole.
        for len in (1..image.len() - 15).step_by(7) {
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
        let error = load_kernel(&ram(64), huge.path(), &Options::default()).unwrap_err();
        assert!(matches!(error, Error::NotAKernel { .. }), "{error}");
    }

    #[test]
    fn memory_too_small_for_the_kernel_says_how_much_it_needs() {
        let error = load(&ram(16), &bzimage(header())).unwrap_err().to_string();
        assert!(error.contains("needs 20 MiB of memory to start, the guest has 16 MiB"));
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
                mode: Mode::Long,
                range: MIB..kernel_end,
                notes: vec![],
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
            let mut image = bzimage_with(header(), &payload::tests::pack(Format::Gzip, &vmlinux()));
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
                let rsdp = crate::acpi::write_tables(&ram, 255, 0).unwrap();
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
