//! A disk with a partition table and one FAT file system, made as bytes: without root, and without a loop device.
//!
//! ```text
//!  sector 0       the boot sector's code, the partition table, 55 AA
//!  sector 1       the gap: nobody's by convention, so that boot loaders have it for what does not fit above
//!  sector 2048    partition 1, active, up to the disk's end
//! ```

use std::io::{Cursor, Write};

use anyhow::{Result, ensure};
use common::disk_image::{SECTOR, SIGNATURE};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

/// Where the partition begins, as every tool has done it since sectors of 4 KiB came: at 1 MiB.
const PARTITION: usize = 2048;

/// Where the table of partitions begins in sector 0.
const TABLE: usize = 446;

/// FAT16 with addresses by LBA, in the table's byte for the kind of a partition.
const FAT16_LBA: u8 = 0x0E;

const MIB: usize = 1 << 20;

/// What a file occupies beyond its bytes, at most: the rest of a cluster, and its share of folders.
const FILE_OVERHEAD: usize = 8 << 10;

/// The smallest partition: below it FAT16 has too few clusters, and is taken for FAT12.
const PARTITION_MIN: usize = 16 * MIB;

/// The longest, at which FAT16 still has its 65524 clusters in sizes that everyone reads.
const PARTITION_MAX: usize = 512 * MIB;

/// A file for the partition: its path, with `/` between folders, and its bytes.
pub type File = (String, Vec<u8>);

/// Puts a disk together: `code` goes into sector 0, `gap` behind it, `files` into the file system.
pub fn build(code: &[u8; 440], gap: &[u8], files: &[File]) -> Result<Vec<u8>> {
    ensure!(
        gap.len() <= (PARTITION - 1) * SECTOR,
        "the boot loader has {} bytes, and {} fit in front of the partition",
        gap.len(),
        (PARTITION - 1) * SECTOR
    );
    // With another MiB for the file allocation tables, and for what a person adds.
    let content: usize = files.iter().map(|(_, bytes)| bytes.len() + FILE_OVERHEAD).sum();
    let size = (content.next_multiple_of(MIB) + MIB).max(PARTITION_MIN);
    ensure!(size <= PARTITION_MAX, "{content} bytes of files, and FAT16 holds {PARTITION_MAX}");
    let mut disk = vec![0; PARTITION * SECTOR + size];

    disk[..code.len()].copy_from_slice(code);
    disk[TABLE..TABLE + 16].copy_from_slice(&table_entry(size));
    disk[SECTOR - 2..SECTOR].copy_from_slice(&SIGNATURE);
    disk[SECTOR..SECTOR + gap.len()].copy_from_slice(gap);

    let (_, partition) = disk.split_at_mut(PARTITION * SECTOR);
    let options = FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat16);
    fatfs::format_volume(Cursor::new(&mut *partition), options)?;
    let volume = FileSystem::new(Cursor::new(partition), FsOptions::new())?;
    for (path, bytes) in files {
        for (end, _) in path.match_indices('/') {
            volume.root_dir().create_dir(&path[..end])?;
        }
        volume.root_dir().create_file(path)?.write_all(bytes)?;
    }
    volume.unmount()?;
    Ok(disk)
}

/// The partition's entry in the table: active, and its sectors by number only. (UEFI 2.10, 5.2.1.)
fn table_entry(size: usize) -> [u8; 16] {
    /// What stands where cylinder, head and sector would, when these don't reach or don't count.
    const NO_CHS: [u8; 3] = [0xFE, 0xFF, 0xFF];
    const ACTIVE: u8 = 0x80;
    let mut entry = [0; 16];
    entry[0] = ACTIVE;
    entry[1..4].copy_from_slice(&NO_CHS);
    entry[4] = FAT16_LBA;
    entry[5..8].copy_from_slice(&NO_CHS);
    entry[8..12].copy_from_slice(&(PARTITION as u32).to_le_bytes());
    entry[12..].copy_from_slice(&((size / SECTOR) as u32).to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_was_put_on_a_disk_is_found_by_its_partition_table() {
        let files = [
            ("a/b/long name.txt".to_owned(), b"text".to_vec()),
            ("big".to_owned(), vec![7; 3 * MIB]),
        ];
        let mut disk = build(&[0x90; 440], b"gap", &files).unwrap();
        assert_eq!((disk[0], &disk[510..515]), (0x90, &[0x55, 0xAA, b'g', b'a', b'p'][..]));
        let number = |at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().unwrap()) as usize;
        let (start, sectors) = (number(446 + 8), number(446 + 12));
        assert_eq!((disk[446], disk[446 + 4]), (0x80, 0x0E));
        assert_eq!((start + sectors) * SECTOR, disk.len());
        let partition = &mut disk[start * SECTOR..];
        let volume = FileSystem::new(Cursor::new(partition), FsOptions::new()).unwrap();
        assert_eq!(volume.fat_type(), fatfs::FatType::Fat16);
        for (path, expected) in files {
            let mut bytes = Vec::new();
            volume.root_dir().open_file(&path).unwrap().read_to_end(&mut bytes).unwrap();
            assert!(bytes == expected, "{path}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let gap = vec![0; PARTITION * SECTOR];
        assert!(build(&[0; 440], &gap, &[]).unwrap_err().to_string().contains("1048064 fit"));
        let files = [("big".to_owned(), vec![0; PARTITION_MAX])];
        assert!(build(&[0; 440], &[], &files).unwrap_err().to_string().contains("FAT16 holds"));
    }
}
