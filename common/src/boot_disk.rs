//! Introduced by stage 07: a PC's boot disk, put together from boot code and files, without root or a loop device.
//!
//! ```text
//!  sector 0      the master boot record (MBR): 440 bytes of code, the disk's signature, the table of partitions, 55 AA
//!  sector 1      the gap: nobody's by convention, so boot loaders have it for what does not fit above
//!  sector 2048   partition 1, active, up to the disk's end: a FAT16 file system
//!    0             its boot sector: the file system's description in the midst of code
//!    1 …           more of that code, in sectors that FAT reserves behind the boot sector
//!    …             two FATs, the root directory, and the clusters with the files
//! ```
//!
//! Our own disk has asm/boot/mbr.asm for the MBR, asm/boot/stage2.asm for the partition's code, and one file,
//! KERNEL.ELF. (Microsoft, "FAT: General Overview of On-Disk Format"; UEFI 2.10, 5.2.1 "Legacy Master Boot Record".)

use std::io::{self, Cursor, Write};

use fatfs::{
    Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider,
};
use thiserror::Error;

use crate::disk::SECTOR;
use crate::error::{Blame, Blamed};

/// What the last two bytes of a boot sector are, on disk.
pub const SIGNATURE: [u8; 2] = [0x55, 0xAA];

/// The partition's first sector, where every tool has put it since there are sectors of 4 KiB: at 1 MiB.
pub const PARTITION: usize = 2048;

/// Bytes of code in an MBR; the disk's signature and the table follow.
pub const CODE: usize = 440;

/// Where the table of partitions begins in the MBR.
pub const TABLE: usize = 446;

const MIB: usize = 1 << 20;

/// The smallest partition: with fewer clusters it would be a FAT12.
const PARTITION_MIN: usize = 3 * MIB;

/// The longest at which FAT16 has no more than its 65524 clusters, in a size that everyone reads.
const PARTITION_MAX: usize = 512 * MIB;

/// What a file occupies beyond its bytes, at most: the rest of a cluster, and its share of folders.
const FILE_OVERHEAD: usize = 8 << 10;

/// The most that there may be of a partition's code: at 0x7C00 and behind, it ends below 64 KiB.
const BOOT_MAX: usize = 58 * SECTOR;

/// The disk's signature, by which systems tell disks apart, and the file system's serial number: the same at each
/// build.
const SERIAL: u32 = 0x6B76_6D07;

// The FAT's boot sector: a jump and the description, 62 bytes; some fields of it.
const DESCRIPTION: usize = 62;
const RESERVED: usize = 14;
const TOTAL_16: usize = 19;
const HIDDEN: usize = 28;
const TOTAL_32: usize = 32;

/// Why this is no boot disk, or none can be made of these parts.
#[derive(Debug, Error)]
pub enum Error {
    /// A part is too long or too short.
    #[error("{part} has {found} bytes, expected {expected}")]
    Length {
        /// Which one.
        part: &'static str,
        /// Its length in bytes.
        found: usize,
        /// What fits.
        expected: &'static str,
    },
    /// Firmware would not boot from it, or the MBR not from the partition.
    #[error("{sector} ends in {:02x} {:02x}, a boot sector ends in 55 aa", found[0], found[1])]
    Signature {
        /// Which sector.
        sector: &'static str,
        /// Its last two bytes.
        found: [u8; 2],
    },
    /// The file system cannot be made, for instance because of a file's name.
    #[error("the FAT16 file system cannot be made: {0}")]
    FileSystem(#[from] io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Input
    }
}

/// What goes onto a boot disk. The same parts make the same bytes.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The MBR; of its 512 bytes the first [`CODE`] are taken.
    pub mbr: &'a [u8],
    /// What goes into the gap.
    pub gap: &'a [u8],
    /// The partition's code, in whole sectors of which the first is its boot sector, with 62 bytes of room at
    /// its beginning. Without any the partition cannot be booted by itself.
    pub boot: &'a [u8],
    /// The files: paths with `/` between folders, and contents.
    pub files: &'a [(&'a str, &'a [u8])],
}

/// Our own disk: the MBR, the second stage, and the kernel's ELF file.
pub fn build(mbr: &[u8], stage2: &[u8], kernel: &[u8]) -> Result<Vec<u8>, Error> {
    Parts { mbr, gap: &[], boot: stage2, files: &[("KERNEL.ELF", kernel)] }.build()
}

impl Parts<'_> {
    /// Puts the disk together, as large as the files want it.
    pub fn build(&self) -> Result<Vec<u8>, Error> {
        let Self { mbr, gap, boot, files } = *self;
        let content: usize = files.iter().map(|(_, bytes)| bytes.len() + FILE_OVERHEAD).sum();
        // With another MiB for the FATs, and for what a person adds.
        let size = (content.next_multiple_of(MIB) + MIB).max(PARTITION_MIN);
        let boot_fits = boot.len().is_multiple_of(SECTOR) && boot.len() <= BOOT_MAX;
        for (part, found, fits, expected) in [
            ("the MBR", mbr.len(), mbr.len() == SECTOR, "512"),
            (
                "what is to be in the gap",
                gap.len(),
                gap.len() < PARTITION * SECTOR,
                "up to 1048064",
            ),
            ("the partition's code", boot.len(), boot_fits, "up to 58 sectors of 512"),
            ("the file system", size, size <= PARTITION_MAX, "up to 536870912 for a FAT16"),
        ] {
            if !fits {
                return Err(Error::Length { part, found, expected });
            }
        }
        if let Some(sector) = boot.first_chunk() {
            check_signature("the partition's first sector", sector)?;
        }

        let mut disk = vec![0; PARTITION * SECTOR + size];
        disk[..CODE].copy_from_slice(&mbr[..CODE]);
        put(&mut disk, CODE, &SERIAL.to_le_bytes());
        put(&mut disk, TABLE, &table_entry((size / SECTOR) as u32));
        put(&mut disk, SECTOR - SIGNATURE.len(), &SIGNATURE);
        put(&mut disk, SECTOR, gap);

        // The crate reserves one sector, the boot sector. It gets a place that leaves room for the others in front of
        // it; then all of them are said to be reserved, and what it wrote is moved to the beginning.
        let volume = &mut disk[PARTITION * SECTOR..];
        let reserved = (boot.len() / SECTOR).max(1);
        let made = (reserved - 1) * SECTOR;
        format(&mut volume[made..], files)?;
        let mut first = [0; SECTOR];
        first.copy_from_slice(&volume[made..made + SECTOR]);
        put(volume, 0, &first);
        if boot.len() > DESCRIPTION {
            put(volume, DESCRIPTION, &boot[DESCRIPTION..]);
        }
        put(volume, RESERVED, &(reserved as u16).to_le_bytes());
        put(volume, HIDDEN, &(PARTITION as u32).to_le_bytes());
        // A field of 16 bits, where they suffice, and else one of 32.
        let sectors = (size / SECTOR) as u32;
        let short = u16::try_from(sectors).unwrap_or(0);
        put(volume, TOTAL_16, &short.to_le_bytes());
        put(volume, TOTAL_32, &(if short == 0 { sectors } else { 0 }).to_le_bytes());
        Ok(disk)
    }
}

/// Checks what firmware checks before it jumps into a disk's first sector.
pub fn check_boot_sector(sector: &[u8; SECTOR]) -> Result<(), Error> {
    check_signature("the disk's first sector", sector)
}

fn check_signature(name: &'static str, sector: &[u8; SECTOR]) -> Result<(), Error> {
    let found = [sector[SECTOR - 2], sector[SECTOR - 1]];
    if found == SIGNATURE { Ok(()) } else { Err(Error::Signature { sector: name, found }) }
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The partition's entry in the table: active, its sectors by number only.
fn table_entry(sectors: u32) -> [u8; 16] {
    /// What stands where cylinder, head and sector would, when these don't reach or don't count.
    const NO_CHS: [u8; 3] = [0xFE, 0xFF, 0xFF];
    const ACTIVE: u8 = 0x80;
    const FAT16_LBA: u8 = 0x0E;
    let mut entry = [0; 16];
    entry[0] = ACTIVE;
    put(&mut entry, 1, &NO_CHS);
    entry[4] = FAT16_LBA;
    put(&mut entry, 5, &NO_CHS);
    put(&mut entry, 8, &(PARTITION as u32).to_le_bytes());
    put(&mut entry, 12, &sectors.to_le_bytes());
    entry
}

/// What time it is for every file, so that the same parts make the same bytes: the beginning of FAT's calendar.
#[derive(Debug)]
struct Midnight;

impl TimeProvider for Midnight {
    fn get_current_date(&self) -> Date {
        Date { year: 1980, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: Time { hour: 0, min: 0, sec: 0, millis: 0 },
        }
    }
}

/// Makes a FAT16 file system with files in it.
fn format(volume: &mut [u8], files: &[(&str, &[u8])]) -> io::Result<()> {
    // The smallest clusters of which there are not too many.
    let cluster = volume.len().div_ceil(65_000).next_power_of_two().max(SECTOR);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .bytes_per_cluster(cluster as u32)
        .drive_num(0x80)
        .volume_id(SERIAL)
        .volume_label(*b"MINI-KVM   ");
    fatfs::format_volume(Cursor::new(&mut *volume), options)?;
    let options = FsOptions::new().time_provider(&Midnight);
    let file_system = FileSystem::new(Cursor::new(volume), options)?;
    let root = file_system.root_dir();
    for (path, bytes) in files {
        for (end, _) in path.match_indices('/') {
            root.create_dir(&path[..end])?;
        }
        root.create_file(path)?.write_all(bytes)?;
    }
    drop(root);
    file_system.unmount()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn code(sectors: usize) -> Vec<u8> {
        let mut code: Vec<u8> = (0..sectors * SECTOR).map(|i| (i * 7 / 3) as u8).collect();
        if sectors > 0 {
            put(&mut code, SECTOR - 2, &SIGNATURE);
        }
        code
    }

    fn content(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 13 / 5) as u8).collect()
    }

    #[test]
    fn what_was_put_on_a_disk_is_found_by_its_partition_table() {
        let (small, large) = (content(80_000), content(70 * MIB));
        let one = [("KERNEL.ELF", &small[..])];
        let two = [("a/b/long name.txt", &small[..]), ("a/big", &large)];
        for (sectors, files, len) in [(0, &two[..], 73), (1, &one, 4), (7, &one, 4), (58, &two, 73)]
        {
            let (mbr, boot, gap) = (code(1), code(sectors), content(5000));
            let disk = Parts { mbr: &mbr, gap: &gap, boot: &boot, files }.build().unwrap();
            assert_eq!(disk.len(), len * MIB);
            assert_eq!(disk[..CODE], mbr[..CODE]);
            assert_eq!(disk[SECTOR - 2..SECTOR], SIGNATURE);
            assert_eq!(disk[SECTOR..][..gap.len()], gap);
            assert_eq!((disk[TABLE], disk[TABLE + 4]), (0x80, 0x0E));
            assert_eq!(disk[TABLE + 16..SECTOR - 2], [0; 48], "no other partition");
            let number =
                |at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().unwrap()) as usize;
            let (start, count) = (number(TABLE + 8), number(TABLE + 12));
            assert_eq!((start, (start + count) * SECTOR), (PARTITION, disk.len()));

            let mut volume = disk[start * SECTOR..].to_vec();
            assert_eq!(volume[HIDDEN..][..4], 2048u32.to_le_bytes());
            assert_eq!(volume[SECTOR - 2..SECTOR], SIGNATURE);
            if sectors > 0 {
                assert_eq!(volume[DESCRIPTION..sectors * SECTOR], boot[DESCRIPTION..]);
            }
            let fs = FileSystem::new(Cursor::new(&mut volume), FsOptions::new()).unwrap();
            assert_eq!(fs.fat_type(), FatType::Fat16);
            for entry in fs.root_dir().iter() {
                assert_eq!(entry.unwrap().modified().date.month, 1);
            }
            for (path, expected) in files {
                let mut found = Vec::new();
                fs.root_dir().open_file(path).unwrap().read_to_end(&mut found).unwrap();
                assert!(found == *expected, "{path}");
            }
        }
    }

    #[test]
    fn the_same_parts_make_the_same_disk() {
        let disk = || build(&code(1), &code(7), &content(5000)).unwrap();
        assert!(disk() == disk());
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let (sector, long) = (code(1), vec![0; PARTITION_MAX]);
        let parts = Parts { mbr: &sector, gap: &[], boot: &sector, files: &[] };
        for (parts, why) in [
            (Parts { mbr: &sector[1..], ..parts }, "the MBR has 511 bytes, expected 512"),
            (Parts { gap: &long[..MIB], ..parts }, "gap has 1048576 bytes, expected up to 1048064"),
            (Parts { boot: &sector[..100], ..parts }, "code has 100 bytes, expected up to 58"),
            (Parts { boot: &code(59), ..parts }, "code has 30208 bytes, expected up to 58"),
            (Parts { files: &[("big", &long)], ..parts }, "has 538968064 bytes, expected up to"),
            (
                Parts { boot: &long[..SECTOR], ..parts },
                "sector ends in 00 00, a boot sector ends in 55 aa",
            ),
            (Parts { files: &[("a:b", &[1])], ..parts }, "the FAT16 file system cannot be made"),
        ] {
            let error = parts.build().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn only_a_sector_with_a_signature_boots() {
        let mut sector = [0xAA; SECTOR];
        let error = check_boot_sector(&sector).unwrap_err().to_string();
        assert!(
            error.ends_with("first sector ends in aa aa, a boot sector ends in 55 aa"),
            "{error}"
        );
        put(&mut sector, SECTOR - 2, &SIGNATURE);
        check_boot_sector(&sector).unwrap();
    }
}
