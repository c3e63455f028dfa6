//! Introduced by stage 07: an ATA disk behind eight ports, read and written by the processor itself.
//!
//! The guest writes a sector's address and a count into the *task file* (ports 0x1F2 to 0x1F6), then a
//! command (0x1F7), waits until the status says DRQ, and moves the data through port 0x1F0, 16 bits at a
//! time: "PIO", programmed input and output. (ATA/ATAPI-6: 5 "Interface register definitions", 9 "Command
//! protocol".)
//!
//! One drive, linear addresses of 28 bits, and no interrupt. It runs on the thread of the vCPU that
//! touches the port, so a transfer has ended when the `out` has, and BSY is never seen.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::bus::Device;
use crate::disk_image::SECTOR;

/// First port of the primary channel's task file.
pub const PORT: u16 = 0x1F0;

/// How many ports it has.
pub const PORTS: u16 = 8;

/// The primary channel's control port: writing resets the drive or masks its interrupt, reading gives the
/// status once more.
pub const CONTROL_PORT: u16 = 0x3F6;

/// What 28 bits of address reach, in sectors: 128 GiB.
const LBA28_SECTORS: u64 = 1 << 28;

// Offsets from PORT.
const DATA: u64 = 0;
const ERROR: u64 = 1;
const COUNT: u64 = 2;
const LBA_LOW: u64 = 3;
const LBA_HIGH: u64 = 5;
const DEVICE: u64 = 6;
const STATUS: u64 = 7;

/// The status register's bits (ATA/ATAPI-6, 7.15).
mod status {
    /// The command failed; the error register says how.
    pub const ERR: u8 = 1 << 0;
    /// The drive wants data to be moved.
    pub const DRQ: u8 = 1 << 3;
    /// Always set on a drive without seeks: the heads are where they should be.
    pub const DSC: u8 = 1 << 4;
    /// The drive is ready for a command.
    pub const DRDY: u8 = 1 << 6;
}

/// The error register's bits (ATA/ATAPI-6, 7.9).
mod error {
    /// The command is unknown or cannot be carried out.
    pub const ABRT: u8 = 1 << 2;
    /// There is no such sector.
    pub const IDNF: u8 = 1 << 4;
    /// The sector cannot be read.
    pub const UNC: u8 = 1 << 6;
}

/// In the device register: a linear address, not cylinder, head and sector.
const DEVICE_LBA: u8 = 1 << 6;
/// In the device register: the second drive of the channel, which isn't there.
const DEVICE_SLAVE: u8 = 1 << 4;
/// In the control register: reset while set.
const SRST: u8 = 1 << 2;

/// Where a disk's sectors are kept.
pub trait Sectors: Send {
    /// How many there are.
    fn count(&self) -> u64;
    /// Reads sector `lba`, which is less than [`Sectors::count`].
    fn read(&mut self, lba: u64, sector: &mut [u8; SECTOR]) -> io::Result<()>;
    /// Writes sector `lba`.
    fn write(&mut self, lba: u64, sector: &[u8; SECTOR]) -> io::Result<()>;
    /// Returns when all that was written would survive a power cut.
    fn flush(&mut self) -> io::Result<()>;
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

    fn read(&mut self, lba: u64, sector: &mut [u8; SECTOR]) -> io::Result<()> {
        self.file.read_exact_at(sector, lba * SECTOR as u64)
    }

    fn write(&mut self, lba: u64, sector: &[u8; SECTOR]) -> io::Result<()> {
        self.file.write_all_at(sector, lba * SECTOR as u64)
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

    fn read(&mut self, lba: u64, sector: &mut [u8; SECTOR]) -> io::Result<()> {
        sector.copy_from_slice(&self[lba as usize * SECTOR..][..SECTOR]);
        Ok(())
    }

    fn write(&mut self, lba: u64, sector: &[u8; SECTOR]) -> io::Result<()> {
        self[lba as usize * SECTOR..][..SECTOR].copy_from_slice(sector);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the data port is for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transfer {
    /// Nothing.
    Idle,
    /// To the guest; when the buffer is empty, so many more sectors follow from this address on.
    In { next: u64, more: u64 },
    /// From the guest, into this sector when the buffer is full, and so many after it.
    Out { lba: u64, more: u64 },
}

/// An ATA channel with one drive.
pub struct Ata {
    sectors: Box<dyn Sectors>,
    /// ERROR (what the guest reads there; what it writes are "features", of which there are none), COUNT,
    /// the three bytes of the address, DEVICE: the task file as the guest wrote it.
    task_file: [u8; 7],
    error: u8,
    failed: bool,
    resetting: bool,
    transfer: Transfer,
    buffer: [u8; SECTOR],
    /// How much of the buffer has been moved.
    moved: usize,
}

impl Ata {
    /// A channel whose first drive has these sectors.
    pub fn new(sectors: impl Sectors + 'static) -> Self {
        let mut ata = Self {
            sectors: Box::new(sectors),
            task_file: [0; 7],
            error: 0,
            failed: false,
            resetting: false,
            transfer: Transfer::Idle,
            buffer: [0; SECTOR],
            moved: 0,
        };
        ata.reset();
        ata
    }

    /// The state after power-on and reset: the signature of a drive that is no CD-ROM (ATA/ATAPI-6, 9.12).
    fn reset(&mut self) {
        self.task_file = [0, 0, 1, 1, 0, 0, 0];
        // "No error detected", which here is a code and not a set of bits.
        self.error = 0x01;
        self.failed = false;
        self.transfer = Transfer::Idle;
    }

    fn status(&self) -> u8 {
        if self.task_file[DEVICE as usize] & DEVICE_SLAVE != 0 || self.resetting {
            return 0;
        }
        let drq = if self.transfer == Transfer::Idle { 0 } else { status::DRQ };
        let err = if self.failed { status::ERR } else { 0 };
        status::DRDY | status::DSC | drq | err
    }

    fn fail(&mut self, error: u8) {
        self.error = error;
        self.failed = true;
        self.transfer = Transfer::Idle;
    }

    /// How many sectors the guest can address.
    fn count(&self) -> u64 {
        self.sectors.count().min(LBA28_SECTORS)
    }

    fn lba(&self) -> u64 {
        let [_, _, _, low, middle, high, device] = self.task_file;
        u32::from_le_bytes([low, middle, high, device & 0x0F]).into()
    }

    fn set_lba(&mut self, lba: u64) {
        let [low, middle, high, top, ..] = lba.to_le_bytes();
        self.task_file[LBA_LOW as usize..=LBA_HIGH as usize].copy_from_slice(&[low, middle, high]);
        let device = &mut self.task_file[DEVICE as usize];
        *device = *device & 0xF0 | top & 0x0F;
    }

    fn command(&mut self, command: u8) {
        if self.task_file[DEVICE as usize] & DEVICE_SLAVE != 0 || self.resetting {
            return;
        }
        self.failed = false;
        self.error = 0;
        self.transfer = Transfer::Idle;
        match command {
            // READ SECTORS, and what was its form without retries.
            0x20 | 0x21 => {
                if let Some((lba, count)) = self.range() {
                    self.fetch(lba, count);
                }
            }
            // WRITE SECTORS.
            0x30 | 0x31 => {
                if let Some((lba, count)) = self.range() {
                    self.transfer = Transfer::Out { lba, more: count - 1 };
                    self.moved = 0;
                }
            }
            // FLUSH CACHE.
            0xE7 => {
                if self.sectors.flush().is_err() {
                    self.fail(error::ABRT);
                }
            }
            // IDENTIFY DEVICE.
            0xEC => {
                self.buffer = identity(self.count());
                self.moved = 0;
                self.transfer = Transfer::In { next: 0, more: 0 };
            }
            _ => self.fail(error::ABRT),
        }
    }

    /// The sectors that a command is about: address and count, of which at least the first exists.
    fn range(&mut self) -> Option<(u64, u64)> {
        if self.task_file[DEVICE as usize] & DEVICE_LBA == 0 {
            // Cylinders, heads and sectors: since 1994 drives have no need of them.
            self.fail(error::ABRT);
            return None;
        }
        let count = match self.task_file[COUNT as usize] {
            0 => 256,
            count => count.into(),
        };
        if self.lba() >= self.count() {
            self.fail(error::IDNF);
            return None;
        }
        Some((self.lba(), count))
    }

    /// Gets sector `lba` into the buffer; it is the first of `count`. The task file names the sector that
    /// the drive is at, which is how the guest learns where an error was.
    fn fetch(&mut self, lba: u64, count: u64) {
        self.set_lba(lba);
        if lba >= self.count() {
            return self.fail(error::IDNF);
        }
        if self.sectors.read(lba, &mut self.buffer).is_err() {
            return self.fail(error::UNC);
        }
        self.moved = 0;
        self.transfer = Transfer::In { next: lba + 1, more: count - 1 };
    }

    /// The buffer has been moved: what comes next.
    fn turn(&mut self) {
        self.moved = 0;
        match std::mem::replace(&mut self.transfer, Transfer::Idle) {
            Transfer::Idle | Transfer::In { more: 0, .. } => {}
            Transfer::In { next, more } => self.fetch(next, more),
            Transfer::Out { lba, more } => {
                self.set_lba(lba);
                if lba >= self.count() {
                    self.fail(error::IDNF);
                } else if self.sectors.write(lba, &self.buffer).is_err() {
                    self.fail(error::ABRT);
                } else if more > 0 {
                    self.transfer = Transfer::Out { lba: lba + 1, more: more - 1 };
                }
            }
        }
    }
}

impl Device for Ata {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            DATA => {
                if let Transfer::In { .. } = self.transfer {
                    // A buffer has an even number of words of 32 bits, so no access crosses its end.
                    for byte in data {
                        *byte = self.buffer.get(self.moved).copied().unwrap_or(0xFF);
                        self.moved += 1;
                    }
                    if self.moved >= SECTOR {
                        self.turn();
                    }
                }
            }
            ERROR => data[0] = self.error,
            STATUS => data[0] = self.status(),
            offset => data[0] = self.task_file[offset as usize],
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            DATA => {
                if let Transfer::Out { .. } = self.transfer {
                    for byte in data {
                        if let Some(to) = self.buffer.get_mut(self.moved) {
                            *to = *byte;
                        }
                        self.moved += 1;
                    }
                    if self.moved >= SECTOR {
                        self.turn();
                    }
                }
            }
            STATUS => self.command(data[0]),
            offset => self.task_file[offset as usize] = data[0],
        }
    }
}

/// The control port of a channel: a second address of the same device.
pub struct Control(pub crate::bus::Shared<Ata>);

impl Device for Control {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).status();
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut ata = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let resetting = data[0] & SRST != 0;
        if resetting && !ata.resetting {
            ata.reset();
        }
        ata.resetting = resetting;
    }
}

/// What IDENTIFY DEVICE tells: 256 words, most of them 0 (ATA/ATAPI-6, table 27).
fn identity(count: u64) -> [u8; SECTOR] {
    let mut words = [0u16; SECTOR / 2];
    // A geometry for who asks for one: 16 heads, 63 sectors a track.
    let cylinders = (count / (16 * 63)).min(16383) as u16;
    (words[1], words[3], words[6]) = (cylinders, 16, 63);
    // Text has two characters in a word, the first in the upper byte.
    let mut text = |first: usize, len: usize, text: &str| {
        let padded = format!("{text:len$}");
        for (word, pair) in words[first..].iter_mut().zip(padded.as_bytes().as_chunks().0) {
            *word = u16::from_be_bytes(*pair);
        }
    };
    text(10, 20, "1");
    text(23, 8, env!("CARGO_PKG_VERSION"));
    text(27, 40, "mini-kvm disk");
    words[49] = 1 << 9; // linear addresses
    (words[60], words[61]) = (count as u16, (count >> 16) as u16);
    words[80] = 1 << 6; // ATA/ATAPI-6
    words[83] = 1 << 14 | 1 << 12; // FLUSH CACHE
    words[86] = 1 << 12;
    let mut bytes = [0; SECTOR];
    for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ten sectors, each filled with its number.
    fn ata() -> Ata {
        Ata::new((0..10u8).flat_map(|n| [n; SECTOR]).collect::<Vec<u8>>())
    }

    fn inb(ata: &mut Ata, offset: u64) -> u8 {
        let mut data = [0xFF];
        ata.read(offset, &mut data);
        data[0]
    }

    fn address(ata: &mut Ata, lba: u32, count: u8) {
        let [low, middle, high, top] = lba.to_le_bytes();
        for (offset, value) in [(2, count), (3, low), (4, middle), (5, high), (6, 0xE0 | top)] {
            ata.write(offset, &[value]);
        }
    }

    fn words(ata: &mut Ata, count: usize) -> Vec<u8> {
        let mut bytes = vec![0xFF; count * 2];
        bytes.chunks_mut(2).for_each(|word| ata.read(DATA, word));
        bytes
    }

    const READY: u8 = status::DRDY | status::DSC;

    #[test]
    fn sectors_are_read_one_after_the_other() {
        let mut ata = ata();
        assert_eq!(inb(&mut ata, STATUS), READY);
        address(&mut ata, 3, 2);
        ata.write(STATUS, &[0x20]);
        assert_eq!(inb(&mut ata, STATUS), READY | status::DRQ);
        assert_eq!(words(&mut ata, 256), [3; SECTOR]);
        assert_eq!(inb(&mut ata, STATUS), READY | status::DRQ);
        assert_eq!(words(&mut ata, 256), [4; SECTOR]);
        assert_eq!(inb(&mut ata, STATUS), READY);
        assert_eq!(words(&mut ata, 1), [0xFF; 2], "nothing is left");
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut ata = ata();
        address(&mut ata, 8, 2);
        ata.write(STATUS, &[0x30]);
        for byte in [0xA5, 0x5A] {
            assert_eq!(inb(&mut ata, STATUS), READY | status::DRQ);
            (0..128).for_each(|_| ata.write(DATA, &[byte; 4]));
        }
        assert_eq!(inb(&mut ata, STATUS), READY);
        address(&mut ata, 8, 2);
        ata.write(STATUS, &[0x20]);
        assert_eq!(words(&mut ata, 512), [[0xA5; SECTOR], [0x5A; SECTOR]].concat());
    }

    #[test]
    fn a_transfer_beyond_the_end_fails_at_the_sector_that_is_not_there() {
        for command in [0x20, 0x30] {
            let mut ata = ata();
            address(&mut ata, 10, 1);
            ata.write(STATUS, &[command]);
            assert_eq!((inb(&mut ata, STATUS), inb(&mut ata, ERROR)), (READY | 1, error::IDNF));

            address(&mut ata, 9, 2);
            ata.write(STATUS, &[command]);
            assert_eq!(inb(&mut ata, STATUS), READY | status::DRQ);
            if command == 0x20 {
                words(&mut ata, 256);
            } else {
                (0..512).for_each(|_| ata.write(DATA, &[0; 2]));
            }
            assert_eq!((inb(&mut ata, STATUS), inb(&mut ata, ERROR)), (READY | 1, error::IDNF));
            assert_eq!(inb(&mut ata, LBA_LOW), 10);
        }
    }

    #[test]
    fn a_count_of_zero_is_256_sectors() {
        let mut ata = Ata::new(vec![7; 300 * SECTOR]);
        address(&mut ata, 0, 0);
        ata.write(STATUS, &[0x20]);
        assert_eq!(words(&mut ata, 256 * 256), vec![7; 256 * SECTOR]);
        assert_eq!(inb(&mut ata, STATUS), READY);
    }

    #[test]
    fn identify_says_how_large_the_disk_is() {
        let mut ata = ata();
        ata.write(STATUS, &[0xEC]);
        let bytes = words(&mut ata, 256);
        let word = |n: usize| u16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]]);
        assert_eq!((word(60), word(61)), (10, 0));
        assert_eq!(word(49) & 1 << 9, 1 << 9, "LBA");
        assert_eq!(&bytes[54..58], b"imin", "text has its bytes swapped");
    }

    #[test]
    fn unknown_commands_and_addresses_by_cylinder_are_aborted() {
        let mut ata = ata();
        ata.write(STATUS, &[0x99]);
        assert_eq!((inb(&mut ata, STATUS), inb(&mut ata, ERROR)), (READY | 1, error::ABRT));
        ata.write(DEVICE, &[0xA0]);
        ata.write(STATUS, &[0x20]);
        assert_eq!((inb(&mut ata, STATUS), inb(&mut ata, ERROR)), (READY | 1, error::ABRT));
    }

    #[test]
    fn there_is_no_second_drive() {
        let mut ata = ata();
        ata.write(DEVICE, &[0xF0]);
        assert_eq!(inb(&mut ata, STATUS), 0);
        ata.write(STATUS, &[0xEC]);
        ata.write(DEVICE, &[0xE0]);
        assert_eq!(inb(&mut ata, STATUS), READY, "the command was the other drive's");
    }

    #[test]
    fn a_reset_ends_a_transfer() {
        let ata = crate::bus::shared(ata());
        let mut control = Control(ata.clone());
        ata.lock().unwrap().write(STATUS, &[0xEC]);
        control.write(0, &[SRST]);
        let mut data = [0xFF];
        control.read(0, &mut data);
        assert_eq!(data, [0]);
        control.write(0, &[0]);
        assert_eq!(inb(&mut ata.lock().unwrap(), STATUS), READY);
    }

    #[test]
    fn a_file_that_shrinks_is_a_disk_with_unreadable_sectors() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * SECTOR as u64).unwrap();
        let mut ata = Ata::new(FileSectors::new(file.try_clone().unwrap(), 4 * SECTOR as u64));
        file.set_len(0).unwrap();
        address(&mut ata, 1, 1);
        ata.write(STATUS, &[0x20]);
        assert_eq!((inb(&mut ata, STATUS), inb(&mut ata, ERROR)), (READY | 1, error::UNC));
    }

    proptest! {
        #[test]
        fn no_guest_brings_the_drive_down(
            accesses in prop::collection::vec((any::<bool>(), 0u64..8, any::<u32>(), 0usize..3), 0..400),
        ) {
            let mut ata = ata();
            for (write, offset, value, size) in accesses {
                let mut data = value.to_le_bytes();
                // The bus lets no access reach past the last port.
                let size = [1, 2, 4][size].min(8 - offset as usize);
                match write {
                    true => ata.write(offset, &data[..size]),
                    false => ata.read(offset, &mut data[..size]),
                }
            }
        }
    }
}
