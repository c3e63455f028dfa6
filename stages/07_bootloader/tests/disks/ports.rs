//! The disk controller as a guest sees it: asm/boot/ide.asm touches the ports that a test names.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::bus::shared;
use common::disk::{self, Access, SECTOR};
use common::ide::{CHANNELS, Drive, Socket};
use common::memory::Ram;
use common::run::{self, Ending};
use common::uart::Uart;
use vm_memory::{Bytes, GuestAddress};

use crate::Disks;
use crate::machine::{self, Setup};

/// Where the guest finds its list, and where each string instruction has its data: a segment of its own.
const LIST: GuestAddress = GuestAddress(0x1_0000);
const DATA: u64 = 0x2_0000;
const STEP: usize = 8;

/// What a guest shall do, step by step. Each gives the number by which one asks for what it has read.
#[derive(Default)]
struct Guest {
    steps: Vec<[u16; 4]>,
    data: Vec<(GuestAddress, Vec<u8>)>,
}

impl Guest {
    fn step(&mut self, what: u16, port: u16, value: u16, segment: u16) -> usize {
        self.steps.push([what, port, value, segment]);
        self.steps.len() - 1
    }

    fn write(&mut self, port: u16, value: u8) {
        self.step(1, port, value.into(), 0);
    }

    fn read(&mut self, port: u16) -> usize {
        self.step(2, port, 0, 0)
    }

    /// The segment for `bytes` bytes of data.
    fn segment(&mut self, bytes: Vec<u8>) -> u16 {
        let last = self.data.last().map(|(at, bytes)| at.0 + bytes.len() as u64);
        let at = last.unwrap_or(DATA).next_multiple_of(16);
        self.data.push((GuestAddress(at), bytes));
        (at / 16) as u16
    }

    /// Reads `sectors` sectors from the data port by one string instruction. Gives the number of the data.
    fn read_sectors(&mut self, socket: Socket, sectors: usize) -> usize {
        let segment = self.segment(vec![0xEE; sectors * SECTOR]);
        self.step(3, socket.port, (sectors * SECTOR / 2) as u16, segment);
        self.data.len() - 1
    }

    fn write_sectors(&mut self, socket: Socket, bytes: Vec<u8>) {
        let words = (bytes.len() / 2) as u16;
        let segment = self.segment(bytes);
        self.step(4, socket.port, words, segment);
    }

    /// Waits for so many interrupts of a channel, or for none.
    fn interrupts(&mut self, socket: Socket, count: u16) -> usize {
        self.step(5, socket.irq as u16, count, 0)
    }

    /// A command to device 0 or 1 for `count` sectors from `lba` on.
    fn command(&mut self, socket: Socket, device: u8, command: u8, lba: u32, count: u8) {
        let [low, mid, high, top] = lba.to_le_bytes();
        for (port, value) in (2..).zip([count, low, mid, high, 0xE0 | device << 4 | top, command]) {
            self.write(socket.port + port, value);
        }
    }

    fn status(&mut self, socket: Socket) -> usize {
        self.read(socket.port + 7)
    }

    /// The status, the error, and the sector's number as far as 24 bits go.
    fn outcome(&mut self, socket: Socket) -> [usize; 5] {
        [7, 1, 3, 4, 5].map(|register| self.read(socket.port + register))
    }

    /// Boots the guest from the first of these drives, and has it do all of it.
    fn run(mut self, drives: Vec<Drive>) -> Done {
        self.step(0, 0, 0, 0);
        let setup = Setup { drives, ..Setup::default() };
        let (parts, ending) = machine::run_with(setup, run::stop(), |parts, line| {
            let list: Vec<u8> = self.steps.iter().flatten().flat_map(|w| w.to_le_bytes()).collect();
            parts.ram.write_slice(&list, LIST).unwrap();
            for (at, bytes) in &self.data {
                parts.ram.write_slice(bytes, *at).unwrap();
            }
            shared(Uart::new(line, io::sink()))
        });
        assert_eq!(ending.unwrap(), Ending::Exited(0));
        Done { ram: parts.ram, data: self.data }
    }
}

/// What a guest has read.
struct Done {
    ram: Ram,
    data: Vec<(GuestAddress, Vec<u8>)>,
}

impl Done {
    fn value(&self, step: usize) -> u16 {
        self.ram.read_obj(GuestAddress(LIST.0 + (step * STEP + 4) as u64)).unwrap()
    }

    fn values<const N: usize>(&self, steps: [usize; N]) -> [u16; N] {
        steps.map(|step| self.value(step))
    }

    fn data(&self, number: usize) -> Vec<u8> {
        let (at, bytes) = &self.data[number];
        let mut read = vec![0; bytes.len()];
        self.ram.read_slice(&mut read, *at).unwrap();
        read
    }
}

const READY: u16 = 0x50;
const DRQ: u16 = 0x08;
const ERR: u16 = 0x01;
const ABRT: u16 = 0x04;
const IDNF: u16 = 0x10;
const WP: u16 = 0x40;

const READ: u8 = 0x20;
const WRITE: u8 = 0x30;

/// Sectors that each are filled with their number.
fn numbered(range: std::ops::Range<u8>) -> Vec<u8> {
    range.flat_map(|number| [number; SECTOR]).collect()
}

/// The disk that the guest is on; its first sector is the guest.
fn boot_disk() -> Vec<u8> {
    [asm::boot::IDE, &numbered(1..40)].concat()
}

fn open(path: &Path, access: Access) -> Drive {
    Drive::new(disk::open(path, access).unwrap(), "1")
}

#[test]
fn each_of_four_drives_answers_and_each_channel_has_its_line() {
    let [primary, secondary] = CHANNELS;
    let mut guest = Guest::default();
    let mut seen = Vec::new();
    for (socket, device) in [(primary, 0), (primary, 1), (secondary, 0), (secondary, 1)] {
        guest.write(socket.control_port, 0);
        // Two sectors with one interrupt each, as soon as they are there.
        guest.command(socket, device, READ, 5, 2);
        let first = (guest.interrupts(socket, 1), guest.read_sectors(socket, 1));
        let second = (guest.interrupts(socket, 1), guest.read_sectors(socket, 1));
        // A write interrupts when its data has been taken; nobody reads the status in between.
        guest.command(socket, device, WRITE, 7, 1);
        guest.write_sectors(socket, vec![0x70 + device; SECTOR]);
        let written = guest.interrupts(socket, 1);
        guest.command(socket, device, WRITE, 8, 1);
        guest.write_sectors(socket, vec![0x80 + device; SECTOR]);
        let again = guest.interrupts(socket, 1);
        // And none comes that isn't wanted.
        guest.write(socket.control_port, 2);
        guest.command(socket, device, READ, 7, 2);
        let status = guest.status(socket);
        let back = guest.read_sectors(socket, 2);
        let none = guest.interrupts(socket, 0);
        guest.status(socket); // acknowledges what would come now
        seen.push(([first.0, second.0, written, again, none, status], [first.1, second.1, back]));
    }
    let other = |first: u8| Drive::new(numbered(first..first + 10), "2");
    let done = guest.run(vec![Drive::new(boot_disk(), "1"), other(0x10), other(0x20), other(0x30)]);
    for (drive, (steps, data)) in (0u8..).zip(seen) {
        assert_eq!(done.values(steps), [1, 1, 1, 1, 0, READY | DRQ], "drive {drive}");
        let [first, second, back] = data.map(|number| done.data(number));
        assert_eq!(first, [drive * 0x10 + 5; SECTOR], "drive {drive}");
        assert_eq!(second, [drive * 0x10 + 6; SECTOR], "drive {drive}");
        let written = [[0x70 + drive % 2; SECTOR], [0x80 + drive % 2; SECTOR]].concat();
        assert_eq!(back, written, "drive {drive}");
    }
}

#[test]
fn what_is_not_there_answers_as_on_a_pc() {
    let [primary, secondary] = CHANNELS;
    let mut guest = Guest::default();
    // A slave beside which only the master is: no bit is set, and commands are lost.
    guest.command(primary, 1, READ, 5, 1);
    let slave = guest.status(primary);
    guest.write(primary.port + 6, 0xE0);
    let master = guest.status(primary);
    // A channel without drives: nobody drives the bus.
    guest.command(secondary, 0, READ, 5, 1);
    let channel = [2, 6, 7].map(|register| guest.read(secondary.port + register));
    let control = guest.read(secondary.control_port);
    // A reset, in which the drive is busy, and after which it shows that it is no CD-ROM.
    guest.write(primary.control_port, 4);
    let busy = guest.status(primary);
    guest.write(primary.control_port, 0);
    let outcome = guest.outcome(primary);
    // An unknown command.
    guest.write(primary.port + 7, 0xA1);
    let [status, error, ..] = guest.outcome(primary);
    let done = guest.run(vec![Drive::new(boot_disk(), "1")]);
    assert_eq!(done.values([slave, master]), [0, READY]);
    assert_eq!((done.values(channel), done.value(control)), ([0xFF; 3], 0xFF));
    assert_eq!(done.value(busy), 0x80);
    assert_eq!(done.values(outcome), [READY, 1, 1, 0, 0]);
    assert_eq!(done.values([status, error]), [READY | ERR, ABRT]);
}

#[test]
fn multiple_takes_one_interrupt_for_a_block() {
    let [primary, _] = CHANNELS;
    let mut guest = Guest::default();
    guest.write(primary.control_port, 0);
    guest.write(primary.port + 2, 8);
    guest.write(primary.port + 7, 0xC6);
    let set = (guest.interrupts(primary, 1), guest.status(primary));
    guest.command(primary, 0, 0xC4, 1, 20);
    let read = [8, 8, 4].map(|sectors| {
        (guest.interrupts(primary, 1), guest.status(primary), guest.read_sectors(primary, sectors))
    });
    let (more, end) = (guest.interrupts(primary, 0), guest.status(primary));
    guest.command(primary, 0, 0xC5, 1, 12);
    guest.write_sectors(primary, vec![0xAA; 8 * SECTOR]);
    let first = guest.interrupts(primary, 1);
    guest.write_sectors(primary, vec![0xBB; 4 * SECTOR]);
    let second = guest.interrupts(primary, 1);
    guest.command(primary, 0, READ, 1, 13);
    let back = guest.read_sectors(primary, 13);
    let done = guest.run(vec![Drive::new(boot_disk(), "1")]);
    assert_eq!(done.values([set.0, set.1]), [1, READY]);
    for ((interrupts, status, data), sectors) in read.into_iter().zip([1..9, 9..17, 17..21]) {
        assert_eq!(done.values([interrupts, status]), [1, READY | DRQ]);
        assert_eq!(done.data(data), numbered(sectors));
    }
    assert_eq!(done.values([more, end, first, second]), [0, READY, 1, 1]);
    let expected = [vec![0xAA; 8 * SECTOR], vec![0xBB; 4 * SECTOR], numbered(13..14)].concat();
    assert_eq!(done.data(back), expected);
}

#[test]
fn sectors_beyond_28_bits_and_beyond_the_end() {
    const FAR: u64 = (1 << 28) + 0x12345;
    let folder = Disks::new();
    let image = folder.write("huge", &boot_disk());
    let file = File::options().write(true).read(true).open(&image).unwrap();
    file.set_len((FAR + 10) * SECTOR as u64).unwrap();

    let [primary, _] = CHANNELS;
    let mut guest = Guest::default();
    // Each register is written twice, with the upper half first.
    let extended = |guest: &mut Guest, command, lba: u64, count: u16| {
        let [b0, b1, b2, b3, b4, b5, ..] = lba.to_le_bytes();
        let [c0, c1] = count.to_le_bytes();
        for half in [[c1, b3, b4, b5], [c0, b0, b1, b2]] {
            (2..).zip(half).for_each(|(port, byte)| guest.write(primary.port + port, byte));
        }
        guest.write(primary.port + 6, 0x40);
        guest.write(primary.port + 7, command);
    };
    extended(&mut guest, 0x34, FAR, 2);
    guest.write_sectors(primary, numbered(0x51..0x53));
    let written = guest.status(primary);
    extended(&mut guest, 0x24, FAR + 1, 1);
    let back = guest.read_sectors(primary, 1);
    // Two of three sectors exist.
    extended(&mut guest, 0x34, FAR + 8, 3);
    guest.write_sectors(primary, vec![0x61; 3 * SECTOR]);
    let beyond = guest.outcome(primary);
    guest.write(primary.control_port, 0x80);
    let upper = guest.read(primary.port + 3);
    // 28 bits end before.
    guest.command(primary, 0, READ, 0x0FFF_FFFF, 1);
    let outcome = guest.outcome(primary);
    let done = guest.run(vec![open(&image, Access::ReadWrite)]);
    assert_eq!(done.value(written), READY);
    assert_eq!(done.data(back), [0x52; SECTOR]);
    let end = FAR + 10;
    let address = [end & 0xFF, end >> 8 & 0xFF, end >> 16 & 0xFF].map(|byte| byte as u16);
    assert_eq!(done.values(beyond), [READY | ERR, IDNF, address[0], address[1], address[2]]);
    assert_eq!(done.value(upper), (end >> 24 & 0xFF) as u16);
    assert_eq!(done.values(outcome)[..2], [READY | ERR, IDNF]);

    let mut bytes = vec![0; 10 * SECTOR];
    file.read_exact_at(&mut bytes, FAR * SECTOR as u64).unwrap();
    let expected = [numbered(0x51..0x53), vec![0; 6 * SECTOR], vec![0x61; 2 * SECTOR]].concat();
    assert_eq!(bytes, expected);
    assert_eq!(file.metadata().unwrap().len(), end * SECTOR as u64, "no sector was added");
}

#[test]
fn writes_change_the_file_or_not_as_one_asked_for() {
    let folder = Disks::new();
    let [primary, _] = CHANNELS;
    for (access, outcome, read, kept) in [
        (Access::ReadWrite, [READY, 0], 0x77, 0x77),
        (Access::Snapshot, [READY, 0], 0x77, 3),
        (Access::ReadOnly, [READY | ERR, ABRT | WP], 3, 3),
    ] {
        let image = folder.write("image", &boot_disk());
        let mut guest = Guest::default();
        guest.command(primary, 0, WRITE, 3, 1);
        guest.write_sectors(primary, vec![0x77; SECTOR]);
        let [status, error, ..] = guest.outcome(primary);
        guest.write(primary.port + 7, 0xE7);
        let flushed = guest.status(primary);
        guest.command(primary, 0, READ, 3, 1);
        let back = guest.read_sectors(primary, 1);
        let done = guest.run(vec![open(&image, access)]);
        assert_eq!(done.values([status, error]), outcome, "{access:?}");
        assert_eq!((done.value(flushed), done.data(back)), (READY, vec![read; SECTOR]));
        let mut expected = boot_disk();
        expected[3 * SECTOR..4 * SECTOR].fill(kept);
        assert!(fs::read(&image).unwrap() == expected, "{access:?}");
    }
}
