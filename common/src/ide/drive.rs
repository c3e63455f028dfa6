//! A drive and the commands that it understands: PIO, addresses by cylinder or of 28 or 48 bits, no DMA.
//!
//! The drive has a write cache, which is the host's page cache. A write command has ended when its sectors are
//! there, where everybody sees them, and where they survive the end of this program. That they survive the
//! host's is certain after FLUSH CACHE, or at the end of each write if the guest has turned the cache off.

use std::mem;

use super::identify::Identity;
use super::task_file::{Addressing, DEVICE_LBA, Geometry, TaskFile};
use crate::disk::{SECTOR, Sectors};

/// The bits of the "Status register".
pub(super) mod status {
    /// The command failed; the error register says how.
    pub const ERR: u8 = 1 << 0;
    /// The drive wants data to be moved.
    pub const DRQ: u8 = 1 << 3;
    /// Always set on a drive without heads: they are where they should be. Obsolete in ATA-6, looked at by older
    /// software.
    pub const DSC: u8 = 1 << 4;
    /// The drive is ready for a command.
    pub const DRDY: u8 = 1 << 6;
    /// The drive is at work, and no other bit counts.
    pub const BSY: u8 = 1 << 7;
}

/// The bits of the "Error register".
mod error {
    /// The command is unknown or cannot be carried out.
    pub const ABRT: u8 = 1 << 2;
    /// There is no such sector.
    pub const IDNF: u8 = 1 << 4;
    /// The sector cannot be read.
    pub const UNC: u8 = 1 << 6;
    /// After a write the same bit says that the disk is write-protected.
    pub const WP: u8 = UNC;
    /// After a diagnostic the register has a code instead: the device passed.
    pub const PASSED: u8 = 0x01;
}

/// The commands, by ATA/ATAPI-6's names for them; "Command descriptions" has them in alphabetical order. Those
/// without "EXT" that transfer data exist twice, from the days when a drive could be told not to try again; RECALIBRATE
/// and INITIALIZE DEVICE PARAMETERS, too, are older (ATA-3, ATA/ATAPI-5).
mod command {
    pub const RECALIBRATE: u8 = 0x10;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_ONCE: u8 = 0x21;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_ONCE: u8 = 0x31;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_ONCE: u8 = 0x41;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const SEEK: u8 = 0x70;
    pub const INITIALIZE_DEVICE_PARAMETERS: u8 = 0x91;
    pub const READ_MULTIPLE: u8 = 0xC4;
    pub const WRITE_MULTIPLE: u8 = 0xC5;
    pub const SET_MULTIPLE_MODE: u8 = 0xC6;
    pub const STANDBY_IMMEDIATE: u8 = 0xE0;
    pub const IDLE_IMMEDIATE: u8 = 0xE1;
    pub const STANDBY: u8 = 0xE2;
    pub const IDLE: u8 = 0xE3;
    pub const CHECK_POWER_MODE: u8 = 0xE5;
    pub const SLEEP: u8 = 0xE6;
    pub const FLUSH_CACHE: u8 = 0xE7;
    pub const FLUSH_CACHE_EXT: u8 = 0xEA;
    pub const IDENTIFY_DEVICE: u8 = 0xEC;
    pub const SET_FEATURES: u8 = 0xEF;
}

/// The most sectors in a block of READ MULTIPLE and WRITE MULTIPLE.
const MULTIPLE_MAX: u8 = 16;

/// How many sectors are read from the disk at once, if the guest asked for so many. A multiple of each size of a
/// block.
const READ_AT_ONCE: u64 = 128;

/// Why a command failed: bits of the error register, and the sector if it was about one.
struct Fault {
    error: u8,
    sector: Option<u64>,
}

impl Fault {
    fn at(error: u8, sector: u64) -> Self {
        Self { error, sector: Some(sector) }
    }
}

/// The command cannot be carried out.
const ABORTED: Fault = Fault { error: error::ABRT, sector: None };

/// A run of sectors.
#[derive(Clone, Copy, Debug)]
struct Run {
    next: u64,
    left: u64,
}

/// What the data port is for at the moment. DRQ is set for one block after the other.
#[derive(Clone, Copy, Debug)]
enum Transfer {
    /// Nothing.
    Idle,
    /// To the guest. When the buffer has been moved, this run follows.
    In { run: Run, block: u64 },
    /// From the guest. When the buffer is full it goes to the beginning of this run.
    Out { run: Run, block: u64 },
}

/// A drive.
pub struct Drive {
    disk: Box<dyn Sectors>,
    serial: String,
    pub(super) task_file: TaskFile,
    error: u8,
    failed: bool,
    transfer: Transfer,
    /// How the command in progress names sectors.
    addressing: Addressing,
    buffer: Vec<u8>,
    /// How many bytes of the buffer have been moved.
    moved: usize,
    /// Where in the buffer the block ends that is being moved.
    block_end: usize,
    /// Sectors in a block of READ MULTIPLE and WRITE MULTIPLE; 0 before SET MULTIPLE MODE.
    multiple: u8,
    /// What cylinders and heads mean.
    geometry: Geometry,
    write_cache: bool,
    /// There is an interrupt that the guest hasn't acknowledged.
    pending: bool,
    /// One has come since the channel last looked.
    interrupted: bool,
}

impl Drive {
    /// A drive with this disk, in the state after power-on. Guests tell drives apart by their serial number: up to 20
    /// characters of ASCII.
    pub fn new(disk: impl Sectors + 'static, serial: &str) -> Self {
        let geometry = Geometry::native(disk.count());
        Self {
            disk: Box::new(disk),
            serial: serial.to_owned(),
            task_file: TaskFile::signature(),
            error: error::PASSED,
            failed: false,
            transfer: Transfer::Idle,
            addressing: Addressing::Lba28,
            buffer: Vec::new(),
            moved: 0,
            block_end: 0,
            multiple: 0,
            geometry,
            write_cache: true,
            pending: false,
            interrupted: false,
        }
    }

    /// Software reset and diagnostic: what the drive was doing has ended, its settings stay ("Software reset
    /// protocol").
    pub(super) fn reset(&mut self) {
        self.task_file = TaskFile::signature();
        self.error = error::PASSED;
        self.failed = false;
        self.transfer = Transfer::Idle;
        self.acknowledge();
    }

    pub(super) fn status(&self) -> u8 {
        let drq = if matches!(self.transfer, Transfer::Idle) { 0 } else { status::DRQ };
        let err = if self.failed { status::ERR } else { 0 };
        status::DRDY | status::DSC | drq | err
    }

    pub(super) fn error(&self) -> u8 {
        self.error
    }

    pub(super) fn interrupt(&mut self) {
        self.pending = true;
        self.interrupted = true;
    }

    pub(super) fn acknowledge(&mut self) {
        self.pending = false;
        self.interrupted = false;
    }

    /// Whether there is an interrupt, and whether it is news.
    pub(super) fn take_interrupt(&mut self) -> (bool, bool) {
        (self.pending, mem::take(&mut self.interrupted))
    }

    /// Carries out a command, or begins with it. It interrupts at its end, or when its first data can be read; but
    /// not when its first data can be written, for the guest has those at hand ("Non-data command
    /// protocol", "PIO data-in" and "PIO data-out command protocol").
    pub(super) fn command(&mut self, command: u8) {
        self.acknowledge();
        self.failed = false;
        self.error = 0;
        self.transfer = Transfer::Idle;
        match self.execute(command) {
            Ok(()) if matches!(self.transfer, Transfer::Out { .. }) => {}
            Ok(()) => self.interrupt(),
            Err(fault) => self.fail(fault),
        }
    }

    fn execute(&mut self, command: u8) -> Result<(), Fault> {
        use command::*;
        self.addressing = match command {
            READ_SECTORS_EXT | READ_MULTIPLE_EXT | READ_VERIFY_EXT | WRITE_SECTORS_EXT
            | WRITE_MULTIPLE_EXT | FLUSH_CACHE_EXT => Addressing::Lba48,
            _ if self.task_file.device & DEVICE_LBA != 0 => Addressing::Lba28,
            _ => Addressing::Chs(self.geometry),
        };
        match command {
            READ_SECTORS | READ_SECTORS_ONCE | READ_SECTORS_EXT => self.start_read(1),
            READ_MULTIPLE | READ_MULTIPLE_EXT => self.start_read(self.multiple()?),
            WRITE_SECTORS | WRITE_SECTORS_ONCE | WRITE_SECTORS_EXT => self.start_write(1),
            WRITE_MULTIPLE | WRITE_MULTIPLE_EXT => self.start_write(self.multiple()?),
            READ_VERIFY | READ_VERIFY_ONCE | READ_VERIFY_EXT => self.verify(),
            FLUSH_CACHE | FLUSH_CACHE_EXT => self.flush(),
            IDENTIFY_DEVICE => {
                self.buffer = self.identity().to_vec();
                self.start(Transfer::In { run: Run { next: 0, left: 0 }, block: 1 });
                Ok(())
            }
            SET_MULTIPLE_MODE => match self.task_file.count.now {
                count @ 0..=MULTIPLE_MAX if count == 0 || count.is_power_of_two() => {
                    self.multiple = count;
                    Ok(())
                }
                _ => Err(ABORTED),
            },
            SET_FEATURES => self.set_features(),
            INITIALIZE_DEVICE_PARAMETERS => {
                let heads = (self.task_file.device & 0x0F) + 1;
                let track = self.task_file.count.now;
                if track == 0 {
                    return Err(ABORTED);
                }
                self.geometry = Geometry::new(self.disk.count(), heads, track, u16::MAX);
                Ok(())
            }
            // Its heads are there already.
            SEEK => self.run().map(drop),
            RECALIBRATE => Ok(()),
            // Nor has it a motor that could stop. But whoever stops a drive may be about to cut its power.
            IDLE | IDLE_IMMEDIATE => Ok(()),
            STANDBY | STANDBY_IMMEDIATE | SLEEP => self.flush(),
            CHECK_POWER_MODE => {
                self.task_file.count.now = 0xFF; // active or idle
                Ok(())
            }
            _ => Err(ABORTED),
        }
    }

    fn fail(&mut self, fault: Fault) {
        self.error = fault.error;
        self.failed = true;
        self.transfer = Transfer::Idle;
        if let Some(sector) = fault.sector {
            self.task_file.set_address(self.addressing, sector);
        }
        self.interrupt();
    }

    /// How many sectors the command in progress can reach.
    fn reach(&self) -> u64 {
        let count = self.disk.count();
        match self.addressing {
            Addressing::Lba28 => count.min(LBA28_SECTORS),
            Addressing::Lba48 => count.min(LBA48_SECTORS),
            Addressing::Chs(_) => count,
        }
    }

    /// The sectors that a command is about, of which at least the first exists.
    fn run(&self) -> Result<Run, Fault> {
        let next = self.task_file.address(self.addressing);
        match next {
            Some(next) if next < self.reach() => {
                Ok(Run { next, left: self.task_file.sectors(self.addressing) })
            }
            _ => Err(Fault { error: error::IDNF, sector: None }),
        }
    }

    /// The first `count` sectors of a run, if all of them exist.
    fn within(&self, run: Run, count: u64) -> Result<(), Fault> {
        match self.reach().saturating_sub(run.next) {
            there if there < count => Err(Fault::at(error::IDNF, run.next + there)),
            _ => Ok(()),
        }
    }

    fn multiple(&self) -> Result<u64, Fault> {
        match self.multiple {
            0 => Err(ABORTED),
            count => Ok(count.into()),
        }
    }

    fn start(&mut self, transfer: Transfer) {
        self.transfer = transfer;
        self.moved = 0;
        self.block_end = self.buffer.len();
        if let Transfer::In { block, .. } = transfer {
            self.block_end = self.block_end.min(block as usize * SECTOR);
        }
    }

    fn start_read(&mut self, block: u64) -> Result<(), Fault> {
        let run = self.run()?;
        self.fetch(run, block)
    }

    /// Gets the next blocks of a run into the buffer. A block of which a sector is missing or cannot be read is not
    /// given to the guest; it may read that sector's neighbours one by one.
    fn fetch(&mut self, mut run: Run, block: u64) -> Result<(), Fault> {
        let first = block.min(run.left);
        self.within(run, first)?;
        let whole_blocks = (self.reach() - run.next) / block * block;
        let count = run.left.min(READ_AT_ONCE).min(whole_blocks.max(first));
        let count = match self.load(run.next, count) {
            Ok(()) => count,
            Err(_) => {
                self.load(run.next, first)?;
                first
            }
        };
        run = Run { next: run.next + count, left: run.left - count };
        self.start(Transfer::In { run, block });
        Ok(())
    }

    /// Reads sectors into the buffer. Where that fails, it is for one of them.
    fn load(&mut self, lba: u64, count: u64) -> Result<(), Fault> {
        self.buffer.resize(count as usize * SECTOR, 0);
        if self.disk.read(lba, &mut self.buffer).is_ok() {
            return Ok(());
        }
        for (lba, sector) in (lba..).zip(self.buffer.chunks_exact_mut(SECTOR)) {
            self.disk.read(lba, sector).map_err(|_| Fault::at(error::UNC, lba))?;
        }
        Ok(())
    }

    fn start_write(&mut self, block: u64) -> Result<(), Fault> {
        let run = self.run()?;
        if self.disk.write_protected() {
            return Err(Fault { error: error::WP | error::ABRT, sector: None });
        }
        self.expect(run, block);
        Ok(())
    }

    /// Waits for the next block of a run.
    fn expect(&mut self, run: Run, block: u64) {
        self.buffer.resize(block.min(run.left) as usize * SECTOR, 0);
        self.start(Transfer::Out { run, block });
    }

    /// Writes the buffer to the beginning of a run, and waits for the next block if there is one.
    fn store(&mut self, run: Run, block: u64) -> Result<(), Fault> {
        let count = (self.buffer.len() / SECTOR) as u64;
        let within = self.within(run, count);
        let there = count.min(self.reach() - run.next) as usize * SECTOR;
        if self.disk.write(run.next, &self.buffer[..there]).is_err() {
            // All that can be written is, up to the sector whose number the guest gets.
            for (lba, sector) in (run.next..).zip(self.buffer[..there].chunks_exact(SECTOR)) {
                self.disk.write(lba, sector).map_err(|_| Fault::at(error::ABRT, lba))?;
            }
        }
        within?;
        let run = Run { next: run.next + count, left: run.left - count };
        if run.left > 0 {
            self.expect(run, block);
        } else if !self.write_cache {
            self.flush()?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<(), Fault> {
        let mut run = self.run()?;
        while run.left > 0 {
            let there = self.reach() - run.next;
            let count = run.left.min(READ_AT_ONCE).min(there.max(1));
            self.within(run, count)?;
            self.load(run.next, count)?;
            run = Run { next: run.next + count, left: run.left - count };
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.disk.flush().map_err(|_| ABORTED)
    }

    fn set_features(&mut self) -> Result<(), Fault> {
        match self.task_file.features.now {
            0x02 => self.write_cache = true,
            0x82 => {
                self.flush()?;
                self.write_cache = false;
            }
            // The transfer mode: PIO's default, with or without waiting for IORDY, or PIO modes 0 to 4. A wire's
            // speed, of which there is none here; but DMA there is not either.
            0x03 => match self.task_file.count.now {
                0x00 | 0x01 | 0x08..=0x0C => {}
                _ => return Err(ABORTED),
            },
            // Reading ahead is the host's business, and a reset leaves all settings as they are.
            0x55 | 0xAA | 0x66 => {}
            _ => return Err(ABORTED),
        }
        Ok(())
    }

    fn identity(&self) -> [u8; SECTOR] {
        let count = self.disk.count();
        Identity {
            serial: &self.serial,
            native: Geometry::native(count),
            current: self.geometry,
            sectors: count,
            multiple_max: MULTIPLE_MAX,
            multiple: self.multiple,
            write_cache: self.write_cache,
        }
        .bytes()
    }

    /// Moves bytes from the data port to the guest. What isn't there stays as it is.
    pub(super) fn read_data(&mut self, mut data: &mut [u8]) {
        while !data.is_empty()
            && let Transfer::In { run, block } = self.transfer
        {
            let count = data.len().min(self.block_end - self.moved);
            let (now, later) = data.split_at_mut(count);
            now.copy_from_slice(&self.buffer[self.moved..][..count]);
            self.moved += count;
            data = later;
            if self.moved == self.block_end {
                self.next_block(run, block);
            }
        }
    }

    /// The guest has read a block: here is the next one.
    fn next_block(&mut self, run: Run, block: u64) {
        if self.moved < self.buffer.len() {
            self.block_end = self.buffer.len().min(self.moved + block as usize * SECTOR);
        } else if run.left == 0 {
            self.transfer = Transfer::Idle;
            return;
        } else if let Err(fault) = self.fetch(run, block) {
            return self.fail(fault);
        }
        self.interrupt();
    }

    /// Moves bytes from the guest into the buffer. What nobody waits for is lost.
    pub(super) fn write_data(&mut self, mut data: &[u8]) {
        while !data.is_empty()
            && let Transfer::Out { run, block } = self.transfer
        {
            let count = data.len().min(self.block_end - self.moved);
            let (now, later) = data.split_at(count);
            self.buffer[self.moved..][..count].copy_from_slice(now);
            self.moved += count;
            data = later;
            if self.moved == self.block_end {
                self.transfer = Transfer::Idle;
                match self.store(run, block) {
                    Ok(()) => self.interrupt(),
                    Err(fault) => self.fail(fault),
                }
            }
        }
    }
}

/// What an address of 28 bits can name. The last one would make a count of 29 bits.
const LBA28_SECTORS: u64 = (1 << 28) - 1;
/// The same with 48 bits.
const LBA48_SECTORS: u64 = (1 << 48) - 1;

impl Geometry {
    /// The geometry that the drive was made with: 16 heads, 63 sectors a track, as any disk of the last
    /// three decades.
    fn native(count: u64) -> Self {
        Self::new(count, 16, 63, 16383)
    }
}
