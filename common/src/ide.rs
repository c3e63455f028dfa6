//! Introduced by stage 07: IDE, the PC's disk controller, with up to two drives on each of two channels.
//!
//! The guest writes a sector's address and a count into the *task file*, a drive's registers at ports 0x1F2 to
//! 0x1F6, then a command (0x1F7). It waits for an interrupt, or reads the status until it says DRQ, and
//! moves the data through port 0x1F0: "PIO", programmed input and output.
//!
//! "IDE" is a drive with its controller on board: what a PC adds are a few gates that give each channel its
//! ports. So this module is only those: which drive is spoken to, its registers' ports, and its interrupt
//! line. What the drives do is [`Drive`]. All of it is ATA/ATAPI-6 (T13 1410D), whose headings the comments
//! here cite.
//!
//! A command runs on the thread of the vCPU that wrote it and has ended when its `out` has: BSY is seen only
//! while a reset lasts.

mod drive;
mod identify;
mod task_file;
#[cfg(test)]
mod tests;

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

/// The bits of the "Device Control register".
mod control {
    /// No interrupts.
    pub const NIEN: u8 = 1 << 1;
    /// Reset while set.
    pub const SRST: u8 = 1 << 2;
    /// The task file shows what was written to each register before the last time.
    pub const HOB: u8 = 1 << 7;
}

/// The one command that both drives carry out, whichever is selected ("EXECUTE DEVICE DIAGNOSTIC command protocol").
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
struct Channel {
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
    fn new(device_0: Drive, device_1: Option<Drive>, line: impl Interrupt + 'static) -> Self {
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

    /// The drive that answers: device 0 speaks for a device 1 that isn't there ("Device 0 only
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

/// The control port of a channel: the status without acknowledging an interrupt ("Alternate Status register"),
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
