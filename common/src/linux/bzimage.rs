//! Introduced by stage 08: the bzImage, a compressed kernel with all that a loader has to know of it.
//!
//! ```text
//! 0            0x1F1           (setup_sects + 1) * 512
//! +-------------+--------------+---------------------------------------------------+
//! | boot sector | setup header | part for protected mode: entries, decompressor,   |
//! |             | and code for | and the payload, at payload_offset, payload_length |
//! |             | real mode    | 32-bit entry at its start, 64-bit entry at 0x200  |
//! +-------------+--------------+---------------------------------------------------+
//! ```
//!
//! The header has grown with the versions of the boot protocol. What an old kernel's lacks is filled in here with
//! the value that the protocol gives for it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::{Error, HEADER_MAGIC, read_up_to};
use crate::file;
use crate::layout::{HIGH_MEMORY, PAGE_SIZE};
use crate::memory::{Ram, read_exact};

/// Where the setup header begins (Linux boot protocol, 1.2).
const SETUP_HEADER: u64 = 0x1F1;

/// The 64-bit entry lies this far behind the start of the protected-mode part (Linux boot protocol, 1.15).
const ENTRY_64: u64 = 0x200;

// Versions of the protocol, by what they brought.
/// The command line anywhere in memory: the oldest that is taken (Linux 2.4).
const OLDEST: u16 = 0x0202;
const INITRD_ADDR_MAX: u16 = 0x0203;
const SYSSIZE_OF_32_BITS: u16 = 0x0204;
const CMDLINE_SIZE: u16 = 0x0206;
const PAYLOAD: u16 = 0x0208;
const PREF_ADDRESS: u16 = 0x020A;
const XLOADFLAGS: u16 = 0x020C;

/// The most bytes of the version's text that are read.
const VERSION_TEXT: usize = 128;

/// A bzImage whose header makes sense.
pub(super) struct BzImage {
    /// Its header, with what an old one lacks filled in.
    pub header: setup_header,
    /// How many bytes of the file stand before the protected-mode part.
    setup: u64,
    /// How many bytes that part has.
    len: u64,
}

impl BzImage {
    /// Reads the header of a file of `file_len` bytes, the first of which are `start`.
    pub fn read(file: &mut File, file_len: u64, start: Vec<u8>) -> Result<Self, Error> {
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

        let version = header.version;
        if version < OLDEST {
            return Err(Error::Protocol { found: version });
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(Error::NoEntry("part that loads above 1 MiB (it is a zImage)"));
        }
        // 0 stands for 4 in `setup_sects`, for history's sake; the boot sector is not counted.
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let setup = (1 + sectors) * 512;
        let len = match version {
            SYSSIZE_OF_32_BITS.. => u64::from(header.syssize) * 16,
            _ => file_len.saturating_sub(setup),
        };
        if len <= ENTRY_64 {
            return Err(Error::NoEntry("code at its entry points"));
        }
        // `syssize` counts 16 bytes at a time, and the last ones may be missing. Behind it there may be a signature.
        let found = file_len.saturating_sub(setup);
        if found.next_multiple_of(16) < len {
            return Err(Error::Truncated { expected: setup + len, found: file_len });
        }
        let len = len.min(found);
        fill_in(&mut header, len);
        Ok(Self { header, setup, len })
    }

    /// What it says of its version: the release first, then who built it and when. Empty if it says nothing.
    pub fn version(&self, file: &mut File) -> Result<String, file::Error> {
        if self.header.kernel_version == 0 {
            return Ok(String::new());
        }
        let at = u64::from(self.header.kernel_version) + 0x200;
        let bytes = read_up_to::<VERSION_TEXT>(file, at)?;
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect())
    }

    /// Whether it has a 64-bit entry.
    pub fn has_entry_64(&self) -> bool {
        self.header.xloadflags & XLF_KERNEL_64 != 0
    }

    /// The memory that the kernel needs. Loaded at the address that it prefers, even one that cannot be moved runs;
    /// from there on it wants `init_size` bytes, for itself and to unpack itself in.
    pub fn range(&self, low_ram_end: u64) -> Result<Range<u64>, Error> {
        let at = self.header.pref_address;
        if at < HIGH_MEMORY.0 || !at.is_multiple_of(PAGE_SIZE) {
            return Err(Error::LoadAddress { found: at });
        }
        let size = self.len.max(self.header.init_size.into());
        match at.checked_add(size) {
            Some(end) if end <= low_ram_end => Ok(at..end),
            end => Err(Error::KernelTooBig { needed: end.unwrap_or(u64::MAX), found: low_ram_end }),
        }
    }

    /// The compressed kernel, if the header says where it is.
    pub fn payload(&self, file: &mut File) -> Result<Option<Vec<u8>>, Error> {
        let (offset, len) =
            (u64::from(self.header.payload_offset), u64::from(self.header.payload_length));
        if self.header.version < PAYLOAD || len == 0 {
            return Ok(None);
        }
        if offset + len > self.len {
            return Err(Error::PayloadPlace { end: offset + len, part: self.len });
        }
        file.seek(SeekFrom::Start(self.setup + offset)).map_err(file::Error::Read)?;
        let mut payload = Vec::with_capacity(len as usize);
        file.take(len).read_to_end(&mut payload).map_err(file::Error::Read)?;
        Ok(Some(payload))
    }

    /// Puts the protected-mode part at `at`. Returns its 32-bit and its 64-bit entry.
    pub fn load(
        &self,
        ram: &Ram,
        file: &mut File,
        at: u64,
    ) -> Result<(GuestAddress, GuestAddress), Error> {
        file.seek(SeekFrom::Start(self.setup)).map_err(file::Error::Read)?;
        read_exact(ram, GuestAddress(at), file, self.len as usize).map_err(Error::Read)?;
        Ok((GuestAddress(at), GuestAddress(at + ENTRY_64)))
    }
}

/// Sets the fields that an old header lacks (Linux boot protocol, 1.3 "Details of Header Fields").
fn fill_in(header: &mut setup_header, len: u64) {
    let version = header.version;
    if version < INITRD_ADDR_MAX {
        header.initrd_addr_max = 0x37FF_FFFF;
    }
    if version < CMDLINE_SIZE {
        header.cmdline_size = 255;
    }
    if version < PREF_ADDRESS {
        header.pref_address = HIGH_MEMORY.0;
        // Nothing says how much; other loaders take three times the compressed size as well.
        header.init_size = (len * 3).try_into().unwrap_or(u32::MAX);
    }
    if version < XLOADFLAGS {
        header.xloadflags = 0;
    }
}
