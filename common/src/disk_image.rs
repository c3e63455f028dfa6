//! Introduced by stage 07: a boot disk, put together from a boot sector, a second stage and a kernel.
//!
//! ```text
//!  sector 0     the boot sector (asm/boot/sector.asm): 512 bytes that end in 55 AA
//!  sector 1     the second stage (asm/boot/stage2.asm), which begins with a header
//!  behind it    the kernel, an ELF64 file
//! ```
//!
//! There is no file system: the header says where the kernel is, how long it is, and two checksums.

use thiserror::Error;

use crate::error::{Blame, Blamed};

pub use crate::disk::SECTOR;

/// What the last two bytes of a boot sector are, on disk.
pub const SIGNATURE: [u8; 2] = [0x55, 0xAA];

/// What the second stage's header begins with.
const MAGIC: &[u8; 4] = b"MKS2";

// The header's fields (asm/include/disk.inc).
const SECTORS_AT: usize = 4;
const SUM_AT: usize = 6;
const KERNEL_LBA_AT: usize = 8;
const KERNEL_SIZE_AT: usize = 12;
const KERNEL_SUM_AT: usize = 16;

/// The most that the boot sector loads of the second stage, in sectors.
const STAGE2_MAX: usize = 16;

/// The most that the second stage loads of a kernel, in bytes.
pub const KERNEL_MAX: usize = 2 << 20;

/// Why this is no boot disk.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Firmware would not boot from it.
    #[error(
        "the disk's first sector ends in {:02x} {:02x}, a boot sector ends in 55 aa: this disk cannot be \
         booted",
        found[0], found[1]
    )]
    Signature {
        /// Its last two bytes.
        found: [u8; 2],
    },
    /// A part that a disk is made of is too long, or is something else.
    #[error("{part} has {found} bytes, expected {expected}")]
    Part {
        /// Which one.
        part: &'static str,
        /// Its length in bytes.
        found: usize,
        /// What fits.
        expected: &'static str,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Input
    }
}

/// Checks what firmware checks before it jumps into a disk's first sector.
pub fn check_boot_sector(sector: &[u8; SECTOR]) -> Result<(), Error> {
    let found = [sector[SECTOR - 2], sector[SECTOR - 1]];
    if found == SIGNATURE { Ok(()) } else { Err(Error::Signature { found }) }
}

/// Puts a disk together. The boot sector comes with its signature, the second stage with room for its
/// header.
pub fn build(boot_sector: &[u8], second_stage: &[u8], kernel: &[u8]) -> Result<Vec<u8>, Error> {
    let part = |part, bytes: &[u8], fits, expected| match fits {
        true => Ok(()),
        false => Err(Error::Part { part, found: bytes.len(), expected }),
    };
    let stage2_fits = (KERNEL_SUM_AT + 4..=STAGE2_MAX * SECTOR).contains(&second_stage.len())
        && second_stage.starts_with(MAGIC);
    part("the boot sector", boot_sector, boot_sector.len() == SECTOR, "512")?;
    part("the second stage", second_stage, stage2_fits, "a header and at most 8192")?;
    let kernel_fits = (1..=KERNEL_MAX).contains(&kernel.len());
    part("the kernel", kernel, kernel_fits, "1 to 2097152")?;

    let mut stage2 = second_stage.to_vec();
    stage2.resize(stage2.len().next_multiple_of(SECTOR), 0);
    let sectors = stage2.len() / SECTOR;
    let mut padded = kernel.to_vec();
    padded.resize(padded.len().next_multiple_of(SECTOR), 0);

    let mut field = |at: usize, value: &[u8]| stage2[at..at + value.len()].copy_from_slice(value);
    field(SECTORS_AT, &(sectors as u16).to_le_bytes());
    field(KERNEL_LBA_AT, &(1 + sectors as u32).to_le_bytes());
    field(KERNEL_SIZE_AT, &(kernel.len() as u32).to_le_bytes());
    let sum = padded
        .as_chunks()
        .0
        .iter()
        .fold(0, |sum: u32, word| sum.wrapping_add(u32::from_le_bytes(*word)));
    field(KERNEL_SUM_AT, &sum.wrapping_neg().to_le_bytes());
    field(SUM_AT, &[0, 0]);
    // Last, for it counts all the others.
    let sum = stage2
        .as_chunks()
        .0
        .iter()
        .fold(0, |sum: u16, word| sum.wrapping_add(u16::from_le_bytes(*word)));
    stage2[SUM_AT..SUM_AT + 2].copy_from_slice(&sum.wrapping_neg().to_le_bytes());

    let disk = [boot_sector, &stage2, &padded].concat();
    let first =
        disk[..SECTOR].try_into().expect("a boot sector has been checked to have 512 bytes");
    check_boot_sector(first)?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot_sector() -> Vec<u8> {
        let mut sector = vec![0x90; SECTOR - 2];
        sector.extend(SIGNATURE);
        sector
    }

    #[test]
    fn every_part_is_where_the_header_says() {
        let stage2 = [&MAGIC[..], &[0x11; 1000]].concat();
        let kernel: Vec<u8> = (0..3000u32).map(|i| (i * 13) as u8).collect();
        let disk = build(&boot_sector(), &stage2, &kernel).unwrap();
        assert_eq!(disk.len(), (1 + 2 + 6) * SECTOR);
        assert_eq!(disk[..SECTOR], boot_sector());
        let header = &disk[SECTOR..];
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(&header[..4], MAGIC);
        assert_eq!(header[SECTORS_AT..][..2], [2, 0]);
        assert_eq!((u32_at(KERNEL_LBA_AT), u32_at(KERNEL_SIZE_AT)), (3, 3000));
        assert_eq!(&disk[3 * SECTOR..][..3000], kernel);
        // Both sums come out as zero, as the boot code adds them up.
        let words = disk[SECTOR..3 * SECTOR].chunks(2);
        assert_eq!(words.fold(0u16, |s, w| s.wrapping_add(u16::from_le_bytes([w[0], w[1]]))), 0);
        let sum = disk[3 * SECTOR..].chunks(4).fold(u32_at(KERNEL_SUM_AT), |s, w| {
            s.wrapping_add(u32::from_le_bytes(w.try_into().unwrap()))
        });
        assert_eq!(sum, 0);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let stage2 = [&MAGIC[..], &[0; 100]].concat();
        let long = [&MAGIC[..], &vec![0; 16 * SECTOR]].concat();
        for (sector, stage2, kernel) in [
            (&boot_sector()[1..], &stage2[..], &[1u8][..]),
            (&boot_sector(), &long, &[1]),
            (&boot_sector(), b"MKS", &[1]),
            (&boot_sector(), &[0; 100], &[1]),
            (&boot_sector(), &stage2, &[]),
            (&boot_sector(), &stage2, &vec![1; KERNEL_MAX + 1]),
        ] {
            let error = build(sector, stage2, kernel).unwrap_err();
            assert!(matches!(error, Error::Part { .. }), "{error}");
        }
        let error = build(&[0; SECTOR], &stage2, &[1]).unwrap_err();
        assert_eq!(error, Error::Signature { found: [0, 0] });
    }

    #[test]
    fn only_a_sector_with_a_signature_boots() {
        let good: [u8; SECTOR] = boot_sector().try_into().unwrap();
        assert_eq!(check_boot_sector(&good), Ok(()));
        let error = check_boot_sector(&[0xAA; SECTOR]).unwrap_err();
        assert_eq!(error, Error::Signature { found: [0xAA, 0xAA] });
    }
}
