//! Introduced by stage 07: IDE, the PC's disk controller, with up to two drives on each of two channels.
//!
//! The guest writes a sector's address and a count into the *task file*, a drive's registers at ports 0x1F2 to
//! 0x1F6, then a command (0x1F7). It waits for an interrupt, or reads the status until it says DRQ, and
//! moves the data through port 0x1F0: "PIO", programmed input and output.
//!
//! "IDE" is a drive with its controller on board: what a PC adds are a few gates that give each channel its
//! ports. So this module is only those: which drive is spoken to, its registers' ports, and its interrupt
//! line. What the drives do is [`drive`]. All of it is ATA/ATAPI-6 (T13 1410D), whose numbers and command
//! names the comments here give.
//!
//! A command runs on the thread of the vCPU that wrote it and has ended when its `out` has: BSY is seen only
//! while a reset lasts.

pub mod drive;
mod identify;
mod task_file;

use std::sync::PoisonError;

use crate::bus::{self, Bus, Device, Interrupt, Shared, shared};
pub use drive::Drive;
use drive::status::BSY;
use task_file::DEVICE_1;

/// Where a channel is: its ports and its interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// First of the eight ports of the task file, the "command block".
    pub port: u16,
    /// The one port of the "control block".
    pub control_port: u16,
    /// The interrupt line.
    pub irq: u32,
}

/// A PC's two channels, the primary one first. They are there since the AT, and so need no bus to be found.
pub const CHANNELS: [Socket; 2] = [
    Socket { port: 0x1F0, control_port: 0x3F6, irq: 14 },
    Socket { port: 0x170, control_port: 0x376, irq: 15 },
];

/// How many drives they take.
pub const DRIVES: usize = 4;

/// How many ports a task file has.
const PORTS: u16 = 8;

// Their offsets, besides those of the registers that are the task file's alone.
const DATA: u64 = 0;
const ERROR: u64 = 1;
const COMMAND: u64 = 7;
const STATUS: u64 = 7;

/// The bits of the device control register (7.8).
mod control {
    /// No interrupts.
    pub const NIEN: u8 = 1 << 1;
    /// Reset while set.
    pub const SRST: u8 = 1 << 2;
    /// The task file shows what was written to each register before the last time.
    pub const HOB: u8 = 1 << 7;
}

/// The one command that both drives carry out, whichever is selected.
const EXECUTE_DEVICE_DIAGNOSTIC: u8 = 0x90;

/// Drives as they come on cables: the first is the primary channel's device 0, its "master", the second that
/// channel's device 1, its "slave", and so on.
pub fn cables(drives: Vec<Drive>) -> Vec<(Drive, Option<Drive>)> {
    let mut drives = drives.into_iter();
    std::iter::from_fn(|| Some((drives.next()?, drives.next()))).collect()
}

/// Puts a channel with its drives at its ports. A channel without drives is not put anywhere: as there is nobody to
/// drive the bus its registers read as ones, from which all firmware and drivers see that it is empty.
pub fn insert(
    ports: &mut Bus,
    socket: Socket,
    (device_0, device_1): (Drive, Option<Drive>),
    line: impl Interrupt + 'static,
) -> Result<(), bus::Error> {
    let channel = shared(Channel::new(device_0, device_1, line));
    let control = shared(Control(channel.clone()));
    ports.insert("disk control", bus::ports(socket.control_port, 1), control)?;
    ports.insert("disk", bus::ports(socket.port, PORTS), channel)
}

/// A channel: a cable with one drive or two, which share its ports and its interrupt line.
pub struct Channel {
    device_0: Drive,
    device_1: Option<Drive>,
    /// The device control register.
    control: u8,
    line: Box<dyn Interrupt>,
    /// Whether INTRQ, the interrupt line, was asserted when it was last looked at.
    asserted: bool,
}

impl Channel {
    /// A channel whose interrupts go to `line`.
    pub fn new(
        mut device_0: Drive,
        mut device_1: Option<Drive>,
        line: impl Interrupt + 'static,
    ) -> Self {
        device_0.reset();
        if let Some(drive) = &mut device_1 {
            drive.reset();
        }
        Self { device_0, device_1, control: 0, line: Box::new(line), asserted: false }
    }

    fn drives(&mut self) -> impl Iterator<Item = &mut Drive> {
        [&mut self.device_0].into_iter().chain(&mut self.device_1)
    }

    /// Whether the guest speaks to device 1. Both drives hear what is written to the task file.
    fn device_1_selected(&self) -> bool {
        self.device_0.task_file.device & DEVICE_1 != 0
    }

    /// The drive that the guest has selected, if there is one.
    fn selected(&mut self) -> Option<&mut Drive> {
        match self.device_1_selected() {
            false => Some(&mut self.device_0),
            true => self.device_1.as_mut(),
        }
    }

    /// The drive that answers: device 0 speaks for a device 1 that isn't there (9.16.1 "Device 0 only
    /// configurations").
    fn answering(&mut self) -> &mut Drive {
        match (self.device_1_selected(), &mut self.device_1) {
            (true, Some(drive)) => drive,
            _ => &mut self.device_0,
        }
    }

    /// The status register. A drive that isn't there has none of the bits, DRDY among them.
    fn status(&mut self) -> u8 {
        match self.control & control::SRST {
            0 => self.selected().map_or(0, |drive| drive.status()),
            _ => BSY,
        }
    }

    fn command(&mut self, command: u8) {
        if command == EXECUTE_DEVICE_DIAGNOSTIC {
            self.drives().for_each(Drive::reset);
            self.device_0.interrupt();
        } else if let Some(drive) = self.selected() {
            drive.command(command);
        }
    }

    /// Asserts INTRQ, or doesn't: it follows the selected drive, unless the guest wants no interrupts. A line
    /// of the ISA bus interrupts by its rising edge. An interrupt that the guest hasn't acknowledged when the
    /// next comes doesn't swallow that one.
    fn drive_line(&mut self) {
        let wanted = self.control & control::NIEN == 0;
        let (pending, new) = self.selected().map_or((false, false), Drive::take_interrupt);
        let asserted = pending && wanted;
        if asserted && (new || !self.asserted) {
            // A full eventfd means that the interrupt is on its way already.
            let _ = self.line.trigger();
        }
        self.asserted = asserted;
    }

    fn write_control(&mut self, value: u8) {
        let resets = value & !self.control & control::SRST != 0;
        self.control = value;
        if resets {
            self.drives().for_each(Drive::reset);
        }
        self.drive_line();
    }
}

impl Device for Channel {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == DATA {
            self.answering().read_data(data);
            return self.drive_line();
        }
        // All other registers have 8 bits: a wider access is one to each.
        for (offset, byte) in (offset..).zip(data) {
            let previous = self.control & control::HOB != 0;
            *byte = match offset {
                ERROR => self.answering().error(),
                STATUS => {
                    let status = self.status();
                    // To read it acknowledges the interrupt.
                    if let Some(drive) = self.selected() {
                        drive.acknowledge();
                    }
                    self.drive_line();
                    status
                }
                register => self.answering().task_file.read(register, previous),
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == DATA {
            self.answering().write_data(data);
            return self.drive_line();
        }
        if self.control & control::SRST != 0 {
            return;
        }
        for (offset, byte) in (offset..).zip(data) {
            self.control &= !control::HOB;
            match offset {
                COMMAND => self.command(*byte),
                register => self.drives().for_each(|drive| drive.task_file.write(register, *byte)),
            }
            self.drive_line();
        }
    }

    /// What comes through the data port by one string instruction comes as one piece.
    fn read_each(&mut self, offset: u64, size: usize, data: &mut [u8]) {
        match offset {
            DATA => self.read(DATA, data),
            _ => data.chunks_mut(size).for_each(|access| self.read(offset, access)),
        }
    }
}

/// The control port of a channel: the status without acknowledging an interrupt (7.3 "Alternate Status register"),
/// and the device control register.
struct Control(Shared<Channel>);

impl Device for Control {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.0.lock().unwrap_or_else(PoisonError::into_inner).status();
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_control(data[0]);
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::disk::{FileSectors, SECTOR, Sectors};

    const COUNT: u64 = 2;
    const LBA_LOW: u64 = 3;
    const DEVICE: u64 = 6;

    /// The status of a drive that has nothing to do: DRDY and DSC.
    const READY: u8 = 0x50;
    const DRQ: u8 = 0x08;
    const ERR: u8 = 0x01;

    const ABRT: u8 = 0x04;
    const IDNF: u8 = 0x10;
    const UNC: u8 = 0x40;

    const READ: u8 = 0x20;
    const WRITE: u8 = 0x30;

    #[derive(Clone, Default)]
    struct Line(Arc<AtomicU32>);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    /// A guest at a channel's ports.
    struct Guest {
        channel: Shared<Channel>,
        control: Control,
        line: Line,
    }

    impl Guest {
        fn new(device_0: impl Sectors + 'static) -> Self {
            Self::with_drives(Drive::new(device_0, "1"), None)
        }

        fn with_drives(device_0: Drive, device_1: Option<Drive>) -> Self {
            let line = Line::default();
            let channel = shared(Channel::new(device_0, device_1, line.clone()));
            Self { control: Control(channel.clone()), channel, line }
        }

        fn inb(&mut self, offset: u64) -> u8 {
            let mut data = [0xFF];
            self.channel.lock().unwrap().read(offset, &mut data);
            data[0]
        }

        fn outb(&mut self, offset: u64, value: u8) {
            self.channel.lock().unwrap().write(offset, &[value]);
        }

        fn status(&mut self) -> u8 {
            self.inb(STATUS)
        }

        /// The status and the error register: what a failed command leaves.
        fn failed(&mut self) -> (u8, u8) {
            (self.status(), self.inb(ERROR))
        }

        /// A command for `count` sectors from `lba` on, of the drive that `device` says.
        fn command_to(&mut self, device: u8, command: u8, lba: u32, count: u8) {
            let [low, mid, high, top] = lba.to_le_bytes();
            let registers = [(2, count), (3, low), (4, mid), (5, high), (6, device | 0xE0 | top)];
            for (offset, value) in registers {
                self.outb(offset, value);
            }
            self.outb(COMMAND, command);
        }

        fn command(&mut self, command: u8, lba: u32, count: u8) {
            self.command_to(0, command, lba, count);
        }

        /// `rep insw` with a count of words.
        fn words(&mut self, count: usize) -> Vec<u8> {
            let mut bytes = vec![0xFF; count * 2];
            self.channel.lock().unwrap().read_each(DATA, 2, &mut bytes);
            bytes
        }

        /// `rep outsw`, which the device gets word by word.
        fn send(&mut self, bytes: &[u8]) {
            bytes.chunks(2).for_each(|word| self.channel.lock().unwrap().write(DATA, word));
        }

        /// How many interrupts there have been since the last time.
        fn interrupts(&mut self) -> u32 {
            self.line.0.swap(0, Ordering::Relaxed)
        }
    }

    /// Ten sectors, each filled with its number.
    fn ten_sectors() -> Vec<u8> {
        (0..10u8).flat_map(|n| [n; SECTOR]).collect()
    }

    #[test]
    fn sectors_are_read_one_after_the_other() {
        let mut guest = Guest::new(ten_sectors());
        assert_eq!(guest.status(), READY);
        guest.command(READ, 3, 2);
        for sector in [3, 4] {
            assert_eq!(guest.interrupts(), 1, "the sector is there");
            assert_eq!(guest.status(), READY | DRQ);
            assert_eq!(guest.words(256), [sector; SECTOR]);
        }
        assert_eq!(guest.status(), READY);
        assert_eq!(guest.interrupts(), 0, "none says that all has been read");
        assert_eq!(guest.words(1), [0xFF; 2], "nothing is left");
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut guest = Guest::new(ten_sectors());
        guest.command(WRITE, 8, 2);
        assert_eq!(guest.interrupts(), 0, "the guest has the data at hand");
        for byte in [0xA5, 0x5A] {
            assert_eq!(guest.status(), READY | DRQ);
            guest.send(&[byte; SECTOR]);
            assert_eq!(guest.interrupts(), 1, "the sector was taken");
        }
        assert_eq!(guest.status(), READY);
        guest.command(READ, 8, 2);
        assert_eq!(guest.words(512), [[0xA5; SECTOR], [0x5A; SECTOR]].concat());
    }

    #[test]
    fn an_interrupt_that_nobody_acknowledges_hides_no_other() {
        let mut guest = Guest::new(ten_sectors());
        for sector in 0..3 {
            guest.command(WRITE, sector, 1);
            guest.send(&[0; SECTOR]);
            assert_eq!(guest.interrupts(), 1);
        }
        guest.command(READ, 0, 3);
        for _ in 0..3 {
            assert_eq!(guest.interrupts(), 1);
            guest.words(256);
        }
    }

    #[test]
    fn interrupts_wait_while_the_guest_wants_none() {
        let mut guest = Guest::new(ten_sectors());
        guest.control.write(0, &[control::NIEN]);
        guest.command(READ, 0, 1);
        assert_eq!(guest.interrupts(), 0);
        guest.control.write(0, &[0]);
        assert_eq!(guest.interrupts(), 1);
        guest.control.write(0, &[0]);
        assert_eq!(guest.interrupts(), 0, "the line is up already");

        guest.control.write(0, &[control::NIEN]);
        let mut alternate = [0];
        guest.control.read(0, &mut alternate);
        assert_eq!(alternate, [READY | DRQ]);
        guest.control.write(0, &[0]);
        assert_eq!(guest.interrupts(), 1, "the alternate status acknowledges nothing");

        guest.control.write(0, &[control::NIEN]);
        assert_eq!(guest.status(), READY | DRQ);
        guest.control.write(0, &[0]);
        assert_eq!(guest.interrupts(), 0, "but the status does");
    }

    #[test]
    fn a_transfer_beyond_the_end_fails_at_the_sector_that_is_not_there() {
        for command in [READ, WRITE] {
            let mut guest = Guest::new(ten_sectors());
            guest.command(command, 10, 1);
            assert_eq!(guest.interrupts(), 1);
            assert_eq!(guest.failed(), (READY | ERR, IDNF));

            guest.command(command, 9, 2);
            assert_eq!(guest.status(), READY | DRQ);
            if command == READ {
                guest.words(256);
            } else {
                guest.send(&[0; 2 * SECTOR]);
            }
            assert_eq!(guest.failed(), (READY | ERR, IDNF));
            assert_eq!(guest.inb(LBA_LOW), 10);
        }
    }

    #[test]
    fn a_count_of_zero_is_256_sectors() {
        let mut guest = Guest::new(vec![7; 300 * SECTOR]);
        guest.command(READ, 0, 0);
        assert_eq!(guest.words(256 * 256), vec![7; 256 * SECTOR]);
        assert_eq!(guest.status(), READY);
    }

    #[test]
    fn unknown_commands_are_aborted() {
        let mut guest = Guest::new(ten_sectors());
        guest.outb(COMMAND, 0x99);
        assert_eq!(guest.failed(), (READY | ERR, ABRT));
    }

    #[test]
    fn a_channel_has_two_drives() {
        let slave = (10..20u8).flat_map(|n| [n; SECTOR]).collect::<Vec<u8>>();
        let mut guest =
            Guest::with_drives(Drive::new(ten_sectors(), "1"), Some(Drive::new(slave, "2")));
        // Each reads its own sector, and the other one's data can wait.
        guest.command_to(0, READ, 2, 1);
        guest.command_to(DEVICE_1, READ, 3, 1);
        assert_eq!(guest.words(256), [13; SECTOR]);
        assert_eq!(guest.status(), READY);
        guest.outb(DEVICE, 0xE0);
        assert_eq!(guest.status(), READY | DRQ);
        assert_eq!(guest.words(256), [2; SECTOR]);
    }

    #[test]
    fn a_drive_that_is_not_there_has_no_status_and_takes_no_command() {
        let mut guest = Guest::new(ten_sectors());
        guest.command_to(DEVICE_1, READ, 0, 1);
        assert_eq!(guest.status(), 0);
        assert_eq!(guest.interrupts(), 0);
        assert_eq!(guest.inb(COUNT), 1, "the other one answers for it");
        guest.outb(DEVICE, 0xE0);
        assert_eq!(guest.status(), READY, "and did not take its command");
    }

    #[test]
    fn a_reset_ends_what_both_drives_do() {
        let second = Drive::new(ten_sectors(), "2");
        let mut guest = Guest::with_drives(Drive::new(ten_sectors(), "1"), Some(second));
        guest.command_to(0, READ, 0, 1);
        guest.command_to(DEVICE_1, READ, 0, 1);
        guest.control.write(0, &[control::SRST]);
        assert_eq!(guest.status(), BSY);
        guest.outb(COMMAND, READ);
        guest.control.write(0, &[0]);
        guest.interrupts();
        for device in [0, DEVICE_1] {
            guest.outb(DEVICE, device);
            assert_eq!((guest.status(), guest.inb(ERROR)), (READY, 0x01));
            let signature = [2, 3, 4, 5].map(|offset| guest.inb(offset));
            assert_eq!(signature, [1, 1, 0, 0]);
        }
        assert_eq!(guest.interrupts(), 0);
    }

    #[test]
    fn a_file_that_shrinks_is_a_disk_with_unreadable_sectors() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * SECTOR as u64).unwrap();
        let mut guest = Guest::new(FileSectors::new(file.try_clone().unwrap(), 4 * SECTOR as u64));
        file.set_len(SECTOR as u64).unwrap();
        guest.command(READ, 0, 4);
        assert_eq!(guest.words(256), [0; SECTOR]);
        assert_eq!(guest.failed(), (READY | ERR, UNC));
        assert_eq!(guest.inb(LBA_LOW), 1);
    }
}
