//! Introduced by stage 07: disks, sectors in a file.
//!
//! A drive reads and writes sectors of 512 bytes by number, and from time to time is told to see to it that
//! they would survive a power cut. [`Sectors`] is that and no more, so a drive does not know what
//! is behind it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// Where a disk's sectors are kept.
pub trait Sectors: Send {
    /// How many there are.
    fn count(&self) -> u64;
    /// Reads sectors from `lba` on: as many as `data`, whose length is a multiple of [`SECTOR`], has room for. All
    /// of them are below [`Sectors::count`].
    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes sectors in the same manner. They can be read from then on.
    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()>;
    /// Returns when all that was written would survive a power cut.
    fn flush(&mut self) -> io::Result<()>;
}

/// Where sector `lba` begins, in bytes.
fn offset(lba: u64) -> u64 {
    lba * SECTOR as u64
}

/// A disk in a file: sector n is at byte 512 × n.
pub struct FileSectors {
    file: File,
    count: u64,
}

impl FileSectors {
    /// A disk of `len` bytes. Bytes behind the last whole sector are not part of it.
    pub fn new(file: File, len: u64) -> Self {
        Self { file, count: len / SECTOR as u64 }
    }
}

impl Sectors for FileSectors {
    fn count(&self) -> u64 {
        self.count
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset(lba))
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset(lba))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A disk in memory, gone with the machine.
impl Sectors for Vec<u8> {
    fn count(&self) -> u64 {
        (self.len() / SECTOR) as u64
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self[offset(lba) as usize..][..data.len()]);
        Ok(())
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        self[offset(lba) as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
