//! Introduced by stage 06: ELF, the file format of kernels: read the program headers, copy the segments.
//!
//! A linker leaves a list of *program headers* at the start of the file. Each `PT_LOAD` says: these
//! bytes of the file go to that address, and up to so many bytes after them are zero. (System V ABI,
//! "Program Loading".)

use std::io::{self, Read, Seek, SeekFrom};
use std::mem::offset_of;
use std::ops::Range;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS32, ELFCLASS64, ELFDATA2LSB, EM_386, EM_X86_64, ET_EXEC, Elf64_Ehdr,
    Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use thiserror::Error;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryError, ReadVolatile};

use crate::error::{Blame, Blamed};
use crate::memory::{Ram, read_exact};

/// The first four bytes of an ELF file.
pub const MAGIC: [u8; 4] = *b"\x7FELF";

/// The most program headers that are read. Kernels have 3 to 6.
pub const MAX_PROGRAM_HEADERS: u16 = 64;

/// The most bytes of a segment of notes that are read. Linux has 500 of them.
const MAX_NOTES: u64 = 0x1_0000;

/// Why a file is no program that can be loaded.
#[derive(Debug, Error)]
pub enum Error {
    /// It doesn't begin as ELF files do.
    #[error("an ELF file begins with 7f 45 4c 46, this one with {found:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// It is an ELF file of another kind.
    #[error("{what} is {found}, expected {expected}")]
    Header {
        /// The field, in words.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What this loader takes.
        expected: &'static str,
    },
    /// The file ends before what its headers promise.
    #[error("the file is truncated: {what} ends at byte {end:#x}, the file has {len:#x} bytes")]
    Truncated {
        /// Which part is missing.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// How long the file is.
        len: u64,
    },
    /// A segment makes no sense in itself.
    #[error("a segment has {filesz:#x} bytes in the file, but only {memsz:#x} in memory")]
    Segment {
        /// `p_filesz`.
        filesz: u64,
        /// `p_memsz`.
        memsz: u64,
    },
    /// A segment would lie where it may not.
    #[error(
        "a segment wants guest memory from {start:#x} on for {size:#x} bytes, allowed is {:#x} to {:#x}",
        allowed.start, allowed.end
    )]
    Place {
        /// `p_paddr`.
        start: u64,
        /// `p_memsz`.
        size: u64,
        /// Where segments may lie.
        allowed: Range<u64>,
    },
    /// Two segments would share memory.
    #[error("two segments want the guest memory at {0:#x}, expected each to have its own")]
    Overlap(u64),
    /// There is nothing to run.
    #[error("no loadable segment holds the entry point {0:#x}")]
    Entry(u64),
    /// Reading the file failed.
    #[error("cannot read the file: {0}")]
    Read(#[from] io::Error),
    /// Reading the file into guest memory failed.
    #[error("cannot read the file into guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Input
    }
}

/// The header of a 32-bit file (System V ABI, "ELF Header").
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Elf32Ehdr {
    e_ident: [u8; 16],
    e_type: u16,
    e_machine: u16,
    e_version: u32,
    e_entry: u32,
    e_phoff: u32,
    e_shoff: u32,
    e_flags: u32,
    e_ehsize: u16,
    e_phentsize: u16,
    e_phnum: u16,
    e_shentsize: u16,
    e_shnum: u16,
    e_shstrndx: u16,
}

/// A program header of a 32-bit file, whose fields are in another order than in a 64-bit one.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Elf32Phdr {
    p_type: u32,
    p_offset: u32,
    p_vaddr: u32,
    p_paddr: u32,
    p_filesz: u32,
    p_memsz: u32,
    p_flags: u32,
    p_align: u32,
}

const _: () = assert!(size_of::<Elf32Ehdr>() == 52 && offset_of!(Elf32Ehdr, e_phentsize) == 42);
const _: () = assert!(size_of::<Elf32Phdr>() == 32 && offset_of!(Elf32Phdr, p_memsz) == 20);

#[expect(unsafe_code, reason = "the header is read as bytes")]
// SAFETY: integers and an array of bytes without padding between them, as the size above says.
unsafe impl ByteValued for Elf32Ehdr {}
#[expect(unsafe_code, reason = "the header is read as bytes")]
// SAFETY: as above.
unsafe impl ByteValued for Elf32Phdr {}

/// What both kinds of header say.
struct Header {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    entry: u64,
    /// Where the program headers are, how many, and the size of one.
    table: u64,
    count: u16,
    size: u16,
}

impl From<Elf64_Ehdr> for Header {
    fn from(header: Elf64_Ehdr) -> Self {
        Self {
            ident: header.e_ident,
            kind: header.e_type,
            machine: header.e_machine,
            entry: header.e_entry,
            table: header.e_phoff,
            count: header.e_phnum,
            size: header.e_phentsize,
        }
    }
}

impl From<Elf32Ehdr> for Header {
    fn from(header: Elf32Ehdr) -> Self {
        Self {
            ident: header.e_ident,
            kind: header.e_type,
            machine: header.e_machine,
            entry: header.e_entry.into(),
            table: header.e_phoff.into(),
            count: header.e_phnum,
            size: header.e_phentsize,
        }
    }
}

/// What both kinds of program header say.
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

impl From<Elf64_Phdr> for Segment {
    fn from(header: Elf64_Phdr) -> Self {
        Self {
            kind: header.p_type,
            offset: header.p_offset,
            paddr: header.p_paddr,
            filesz: header.p_filesz,
            memsz: header.p_memsz,
        }
    }
}

impl From<Elf32Phdr> for Segment {
    fn from(header: Elf32Phdr) -> Self {
        Self {
            kind: header.p_type,
            offset: header.p_offset.into(),
            paddr: header.p_paddr.into(),
            filesz: header.p_filesz.into(),
            memsz: header.p_memsz.into(),
        }
    }
}

/// Numbers that tell the kinds of file apart, and how an error names them.
struct Format {
    class: (u64, &'static str),
    machine: (u16, &'static str),
    program_header: (u16, &'static str),
}

const X86_64: Format = Format {
    class: (ELFCLASS64 as u64, "2 (64-bit)"),
    machine: (EM_X86_64, "62 (x86-64)"),
    program_header: (size_of::<Elf64_Phdr>() as u16, "56"),
};

const I386: Format = Format {
    class: (ELFCLASS32 as u64, "1 (32-bit)"),
    machine: (EM_386, "3 (80386)"),
    program_header: (size_of::<Elf32Phdr>() as u16, "32"),
};

/// A program in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Guest-physical address of its first instruction.
    pub entry: GuestAddress,
    /// From its lowest segment's start to its highest one's end, with what is zero at run time.
    pub range: Range<u64>,
}

/// Copies the segments of an x86-64 ELF file to their physical addresses (`p_paddr`), all of which must
/// lie in `allowed`. Expects fresh guest memory, whose zeros are the segments' zeros.
///
/// The bytes go from the file into the guest without a copy in between.
pub fn load<F>(ram: &Ram, file: &mut F, allowed: Range<u64>) -> Result<Image, Error>
where
    F: Read + Seek + ReadVolatile,
{
    load_as::<F, Elf64_Ehdr, Elf64_Phdr>(ram, file, &X86_64, allowed, None)
}

/// The same for a file that is entered at `entry`, and not where its header says.
pub fn load_at<F>(ram: &Ram, file: &mut F, allowed: Range<u64>, entry: u64) -> Result<Image, Error>
where
    F: Read + Seek + ReadVolatile,
{
    load_as::<F, Elf64_Ehdr, Elf64_Phdr>(ram, file, &X86_64, allowed, Some(entry))
}

/// The same for a 32-bit file, for the 80386 and what came after it.
pub fn load_32<F>(ram: &Ram, file: &mut F, allowed: Range<u64>) -> Result<Image, Error>
where
    F: Read + Seek + ReadVolatile,
{
    load_as::<F, Elf32Ehdr, Elf32Phdr>(ram, file, &I386, allowed, None)
}

/// The content of the first note of this kind by `owner` in an x86-64 ELF file (System V ABI, "Note Section").
/// `owner` ends in a NUL, as it does in the file.
pub fn find_note<F>(file: &mut F, owner: &[u8], kind: u32) -> Result<Option<Vec<u8>>, Error>
where
    F: Read + Seek,
{
    let (_, segments, len) = read_headers::<F, Elf64_Ehdr, Elf64_Phdr>(file, &X86_64)?;
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        file.seek(SeekFrom::Start(inside("a note", segment.offset, segment.filesz, len)?))?;
        let mut notes = Vec::new();
        Read::by_ref(file).take(segment.filesz.min(MAX_NOTES)).read_to_end(&mut notes)?;
        let mut rest = &notes[..];
        while let Some((name, found, content)) = next_note(&mut rest) {
            if (name, found) == (owner, kind) {
                return Ok(Some(content.to_vec()));
            }
        }
    }
    Ok(None)
}

/// Takes a note: its owner's name, its kind, its content. All three begin at multiples of four bytes.
fn next_note<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], u32, &'a [u8])> {
    let mut word = || {
        let (word, behind) = rest.split_first_chunk()?;
        *rest = behind;
        Some(u32::from_le_bytes(*word))
    };
    let (name_len, content_len, kind) = (word()? as usize, word()? as usize, word()?);
    let mut take = |len: usize| {
        let bytes = rest.get(..len)?;
        *rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(bytes)
    };
    Some((take(name_len)?, kind, take(content_len)?))
}

/// Where `start` is, if `size` bytes from there on are in a file of `len` bytes.
fn inside(what: &'static str, start: u64, size: u64, len: u64) -> Result<u64, Error> {
    match start.checked_add(size) {
        Some(end) if end <= len => Ok(start),
        end => Err(Error::Truncated { what, end: end.unwrap_or(u64::MAX), len }),
    }
}

/// The header, all program headers, and the file's length.
fn read_headers<F, Ehdr, Phdr>(
    file: &mut F,
    format: &Format,
) -> Result<(Header, Vec<Segment>, u64), Error>
where
    F: Read + Seek,
    Ehdr: ByteValued + Default + Into<Header>,
    Phdr: ByteValued + Default + Into<Segment>,
{
    let len = file.seek(SeekFrom::End(0))?;
    let mut header = Ehdr::default();
    let start = inside("the ELF header", 0, size_of::<Ehdr>() as u64, len)?;
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(header.as_mut_slice())?;
    let header: Header = header.into();
    check(&header, format)?;

    let table = u64::from(header.count) * size_of::<Phdr>() as u64;
    file.seek(SeekFrom::Start(inside("the table of segments", header.table, table, len)?))?;
    let mut segments = Vec::new();
    for _ in 0..header.count {
        let mut segment = Phdr::default();
        file.read_exact(segment.as_mut_slice())?;
        segments.push(segment.into());
    }
    Ok((header, segments, len))
}

fn load_as<F, Ehdr, Phdr>(
    ram: &Ram,
    file: &mut F,
    format: &Format,
    allowed: Range<u64>,
    entry: Option<u64>,
) -> Result<Image, Error>
where
    F: Read + Seek + ReadVolatile,
    Ehdr: ByteValued + Default + Into<Header>,
    Phdr: ByteValued + Default + Into<Segment>,
{
    let (header, mut segments, len) = read_headers::<F, Ehdr, Phdr>(file, format)?;
    let entry = entry.unwrap_or(header.entry);
    segments.retain(|segment| segment.kind == PT_LOAD && segment.memsz > 0);

    let (mut lowest, mut highest) = (u64::MAX, 0);
    let mut has_entry = false;
    for segment in &segments {
        let Segment { paddr: start, offset, filesz, memsz, .. } = *segment;
        if filesz > memsz {
            return Err(Error::Segment { filesz, memsz });
        }
        inside("a segment", offset, filesz, len)?;
        let end = start.checked_add(memsz).filter(|end| *end <= allowed.end);
        let Some(end) = end.filter(|_| start >= allowed.start) else {
            return Err(Error::Place { start, size: memsz, allowed });
        };
        has_entry |= (start..end).contains(&entry);
        (lowest, highest) = (start.min(lowest), end.max(highest));
    }
    if !has_entry {
        return Err(Error::Entry(entry));
    }
    // So no more is read than there is memory, however many segments name the same part of the file.
    segments.sort_by_key(|segment| segment.paddr);
    for pair in segments.windows(2) {
        if pair[1].paddr - pair[0].paddr < pair[0].memsz {
            return Err(Error::Overlap(pair[1].paddr));
        }
    }
    for segment in &segments {
        file.seek(SeekFrom::Start(segment.offset))?;
        read_exact(ram, GuestAddress(segment.paddr), file, segment.filesz as usize)?;
    }
    Ok(Image { entry: GuestAddress(entry), range: lowest..highest })
}

/// Whether this is a little-endian executable of this format with program headers of the known size.
fn check(header: &Header, format: &Format) -> Result<(), Error> {
    let ident = header.ident;
    if ident[..4] != MAGIC {
        return Err(Error::Magic { found: [ident[0], ident[1], ident[2], ident[3]] });
    }
    let expect = |what, found: u64, ok: bool, expected| match ok {
        true => Ok(()),
        false => Err(Error::Header { what, found, expected }),
    };
    let class = ident[EI_CLASS].into();
    expect("the ELF class", class, class == format.class.0, format.class.1)?;
    let order = ident[EI_DATA].into();
    expect("the byte order", order, order == u64::from(ELFDATA2LSB), "1 (little-endian)")?;
    let (machine, known) = (header.machine, format.machine);
    expect("the machine", machine.into(), machine == known.0, known.1)?;
    let kind = header.kind;
    expect("the file type", kind.into(), kind == ET_EXEC, "2 (executable)")?;
    let (size, known) = (header.size, format.program_header);
    expect("a program header's size", size.into(), size == known.0, known.1)?;
    let count = header.count;
    let ok = (1..=MAX_PROGRAM_HEADERS).contains(&count);
    expect("the number of program headers", count.into(), ok, "1 to 64")
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const ALLOWED: Range<u64> = 0x10_0000..0x40_0000;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
    }

    /// An ELF file with one segment whose bytes are `content`.
    fn elf(content: &[u8], paddr: u64, memsz: u64) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_type: ET_EXEC,
            e_machine: EM_X86_64,
            e_entry: paddr,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..4].copy_from_slice(&MAGIC);
        header.e_ident[EI_CLASS] = ELFCLASS64;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        let segment = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: 64 + 56,
            p_paddr: paddr,
            p_filesz: content.len() as u64,
            p_memsz: memsz,
            ..Default::default()
        };
        [header.as_slice(), segment.as_slice(), content].concat()
    }

    fn load_bytes(bytes: &[u8]) -> Result<Image, Error> {
        load(&ram(), &mut Cursor::new(bytes), ALLOWED)
    }

    #[test]
    fn segments_go_where_they_say() {
        let ram = ram();
        let file = elf(b"kernel", 0x20_0000, 0x1000);
        let image = load(&ram, &mut Cursor::new(&file), ALLOWED).unwrap();
        assert_eq!(image, Image { entry: GuestAddress(0x20_0000), range: 0x20_0000..0x20_1000 });
        let mut bytes = [0; 8];
        ram.read_slice(&mut bytes, image.entry).unwrap();
        assert_eq!(&bytes, b"kernel\0\0");
    }

    #[test]
    fn an_entry_can_be_another_one() {
        let mut file = elf(b"kernel", 0x20_0000, 0x1000);
        file[24..32].fill(0xFF);
        assert!(matches!(load_bytes(&file).unwrap_err(), Error::Entry(u64::MAX)));
        let load = |entry| load_at(&ram(), &mut Cursor::new(&file), ALLOWED, entry);
        assert_eq!(load(0x20_0FFF).unwrap().entry.0, 0x20_0FFF);
        assert!(matches!(load(0x20_1000).unwrap_err(), Error::Entry(0x20_1000)));
    }

    /// An ELF file with these bytes as its notes.
    fn with_notes(notes: &[u8]) -> Vec<u8> {
        let mut file = elf(notes, 0x20_0000, 0x1000);
        file[64] = 4; // PT_NOTE
        file
    }

    #[test]
    fn a_note_is_found_by_its_owner_and_its_kind() {
        let note = |owner: &[u8], kind: u32, content: &[u8]| {
            let words = [owner.len() as u32, content.len() as u32, kind];
            let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
            for part in [owner, content] {
                bytes.extend(part);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            bytes
        };
        let others = [note(b"GNU\0", 18, b"no"), note(b"Xen\0", 5, b"12345")].concat();
        let entry = note(b"Xen\0", 18, b"entry");
        let notes = [&others[..], &entry, &note(b"Xen\0", 18, b"later")].concat();
        let find = |bytes: &[u8]| find_note(&mut Cursor::new(bytes), b"Xen\0", 18);
        let file = with_notes(&notes);
        assert_eq!(find(&file).unwrap().unwrap(), b"entry");
        assert_eq!(find(&elf(&notes, 0x20_0000, 0x1000)).unwrap(), None, "no notes");
        // The padding of the last one may be missing, and no more.
        let end = others.len() + 12 + 4 + 5;
        assert_eq!(find(&with_notes(&notes[..end])).unwrap().unwrap(), b"entry");
        for len in 0..end {
            assert_eq!(find(&with_notes(&notes[..len])).unwrap(), None, "{len}");
            // The header promises more than there is.
            assert!(matches!(find(&file[..120 + len]).unwrap_err(), Error::Truncated { .. }));
        }
    }

    #[test]
    fn segments_stay_inside_what_is_allowed() {
        for (paddr, memsz) in [
            (0x0F_FFFF, 16),
            (0x3F_FFFF, 16),
            (0x40_0000, 16),
            (u64::MAX - 4, 16),
            (0x10_0000, u64::MAX),
        ] {
            let error = load_bytes(&elf(b"kernel", paddr, memsz)).unwrap_err();
            assert!(matches!(error, Error::Place { .. }), "{paddr:#x} {memsz:#x}: {error}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let file = elf(b"kernel", 0x20_0000, 0x1000);
        for len in 0..file.len() {
            let error = load_bytes(&file[..len]).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn segments_that_share_memory_are_refused() {
        // Two entries of the same table, then the content of both.
        let two = |second: u64| {
            let one = elf(b"kernel", 0x20_0000, 0x1000);
            let other = elf(b"kernel", second, 0x1000);
            let mut file = [&one[..120], &other[64..120], b"kernel"].concat();
            file[56] = 2;
            file
        };
        for second in [0x20_0000, 0x20_0FFF, 0x1F_F001] {
            let error = load_bytes(&two(second)).unwrap_err();
            assert!(matches!(error, Error::Overlap(_)), "{second:#x}: {error}");
        }
        for second in [0x20_1000, 0x1F_F000] {
            assert_eq!(load_bytes(&two(second)).unwrap().entry.0, 0x20_0000);
        }
    }

    #[test]
    fn more_in_the_file_than_in_memory_is_refused() {
        let error = load_bytes(&elf(b"kernel", 0x20_0000, 5)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a segment has 0x6 bytes in the file, but only 0x5 in memory"
        );
    }

    #[test]
    fn foreign_files_are_named() {
        let file = elf(b"kernel", 0x20_0000, 0x1000);
        for (at, value, text) in [
            (0, b'M', "an ELF file begins with 7f 45 4c 46, this one with [4d, 45, 4c, 46]"),
            (4, 1, "the ELF class is 1, expected 2 (64-bit)"),
            (18, 183, "the machine is 183, expected 62 (x86-64)"),
            (16, 1, "the file type is 1, expected 2 (executable)"),
            (57, 255, "the number of program headers is 65281, expected 1 to 64"),
        ] {
            let mut file = file.clone();
            file[at] = value;
            assert_eq!(load_bytes(&file).unwrap_err().to_string(), text);
        }
    }

    /// A 32-bit file with one segment whose bytes are `content`.
    fn elf_32(content: &[u8], paddr: u32, memsz: u32) -> Vec<u8> {
        let mut header = Elf32Ehdr {
            e_type: ET_EXEC,
            e_machine: EM_386,
            e_entry: paddr,
            e_phoff: 52,
            e_phentsize: 32,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..4].copy_from_slice(&MAGIC);
        header.e_ident[EI_CLASS] = ELFCLASS32;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        let segment = Elf32Phdr {
            p_type: PT_LOAD,
            p_offset: 52 + 32,
            // Kernels run elsewhere than where they are loaded.
            p_vaddr: paddr | 1 << 31,
            p_paddr: paddr,
            p_filesz: content.len() as u32,
            p_memsz: memsz,
            ..Default::default()
        };
        [header.as_slice(), segment.as_slice(), content].concat()
    }

    #[test]
    fn a_32_bit_file_is_loaded_as_one_and_not_as_the_other() {
        let (ram, file) = (ram(), elf_32(b"kernel", 0x20_0000, 0x1000));
        let image = load_32(&ram, &mut Cursor::new(&file), ALLOWED).unwrap();
        assert_eq!(image, Image { entry: GuestAddress(0x20_0000), range: 0x20_0000..0x20_1000 });
        let mut bytes = [0; 8];
        ram.read_slice(&mut bytes, image.entry).unwrap();
        assert_eq!(&bytes, b"kernel\0\0");
        assert_eq!(
            load_bytes(&file).unwrap_err().to_string(),
            "the ELF class is 1, expected 2 (64-bit)"
        );
        let refused = |file: &[u8]| load_32(&ram, &mut Cursor::new(file), ALLOWED).unwrap_err();
        let other = elf(b"kernel", 0x20_0000, 0x1000);
        assert_eq!(refused(&other).to_string(), "the ELF class is 2, expected 1 (32-bit)");
        for len in 0..file.len() {
            assert!(matches!(refused(&file[..len]), Error::Truncated { .. }), "{len}");
        }
        for (paddr, memsz) in [(0xF_F000, 16), (0x3F_FFFF, 16), (u32::MAX, u32::MAX)] {
            let error = refused(&elf_32(b"kernel", paddr, memsz));
            assert!(matches!(error, Error::Place { .. }), "{paddr:#x}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_notes_bring_the_search_down(notes in prop::collection::vec(0_u8..20, 0..200)) {
            let _ = find_note(&mut Cursor::new(with_notes(&notes)), &[], 4);
        }

        #[test]
        fn no_32_bit_header_brings_the_loader_down(
            changes in prop::collection::vec((0usize..84, any::<u8>()), 0..12),
        ) {
            let mut file = elf_32(b"kernel", 0x20_0000, 0x1000);
            for (at, value) in changes {
                file[at] = value;
            }
            if let Ok(image) = load_32(&ram(), &mut Cursor::new(file), ALLOWED) {
                prop_assert!(ALLOWED.start <= image.range.start && image.range.end <= ALLOWED.end);
                prop_assert!(image.range.contains(&image.entry.0));
            }
        }

        #[test]
        fn no_header_brings_the_loader_down(
            changes in prop::collection::vec((0usize..120, any::<u8>()), 0..12),
        ) {
            let mut file = elf(b"kernel", 0x20_0000, 0x1000);
            for (at, value) in changes {
                file[at] = value;
            }
            if let Ok(image) = load_bytes(&file) {
                prop_assert!(ALLOWED.start <= image.range.start && image.range.end <= ALLOWED.end);
                prop_assert!(image.range.contains(&image.entry.0));
            }
        }
    }
}
