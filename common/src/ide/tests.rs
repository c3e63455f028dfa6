//! A guest at the ports of a channel.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::bus::CountedLine;
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

/// A guest at a channel's ports.
struct Guest {
    channel: Shared<Channel>,
    control: Control,
    line: CountedLine,
    /// How many of its interrupts have been asked for.
    seen: u32,
}

impl Guest {
    fn new(device_0: impl Sectors + 'static) -> Self {
        Self::with_drives(Drive::new(device_0, "1"), None)
    }

    fn with_drives(device_0: Drive, device_1: Option<Drive>) -> Self {
        let line = CountedLine::default();
        let channel = shared(Channel::new(device_0, device_1, line.clone()));
        Self { control: Control(channel.clone()), channel, line, seen: 0 }
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
        let before = mem::replace(&mut self.seen, self.line.count());
        self.seen - before
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

/// What a disk was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
}

/// A disk of 100 sectors that notes what it is asked for, and of which some sectors are bad.
#[derive(Clone, Default)]
struct Noted {
    calls: Arc<Mutex<Vec<Call>>>,
    bad: Range<u64>,
    cannot_flush: bool,
}

impl Noted {
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn call(&mut self, call: Call, at: Range<u64>) -> io::Result<()> {
        assert!(at.end <= 100, "{at:?} is beyond the end");
        self.calls.lock().unwrap().push(call);
        match at.start < self.bad.end && self.bad.start < at.end {
            true => Err(io::ErrorKind::Other.into()),
            false => Ok(()),
        }
    }
}

impl Sectors for Noted {
    fn count(&self) -> u64 {
        100
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        let count = (data.len() / SECTOR) as u64;
        self.call(Call::Read(lba, count), lba..lba + count)
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        let count = (data.len() / SECTOR) as u64;
        self.call(Call::Write(lba, count), lba..lba + count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call(Call::Flush, 0..0)?;
        if self.cannot_flush { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

const READ_MULTIPLE: u8 = 0xC4;
const WRITE_MULTIPLE: u8 = 0xC5;
const SET_MULTIPLE: u8 = 0xC6;
const VERIFY: u8 = 0x40;
const FLUSH: u8 = 0xE7;
const SET_FEATURES: u8 = 0xEF;
const IDENTIFY: u8 = 0xEC;
const SET_GEOMETRY: u8 = 0x91;

impl Guest {
    /// A command with 48-bit address and 16-bit count: upper halves first.
    fn command_ext(&mut self, command: u8, lba: u64, count: u16) {
        let [b0, b1, b2, b3, b4, b5, ..] = lba.to_le_bytes();
        let [c0, c1] = count.to_le_bytes();
        for (offset, value) in
            [(2, c1), (3, b3), (4, b4), (5, b5), (2, c0), (3, b0), (4, b1), (5, b2)]
        {
            self.outb(offset, value);
        }
        self.outb(DEVICE, 0x40);
        self.outb(COMMAND, command);
    }

    /// A command for one sector by cylinder, head and sector.
    fn command_chs(&mut self, command: u8, cylinder: u16, head: u8, sector: u8) {
        let [low, high] = cylinder.to_le_bytes();
        for (offset, value) in [(2, 1), (3, sector), (4, low), (5, high), (6, 0xA0 | head)] {
            self.outb(offset, value);
        }
        self.outb(COMMAND, command);
    }

    fn features(&mut self, feature: u8, count: u8) {
        self.outb(ERROR, feature);
        self.outb(COUNT, count);
        self.outb(COMMAND, SET_FEATURES);
    }

    fn identify(&mut self) -> Vec<u16> {
        self.outb(COMMAND, IDENTIFY);
        self.words(256).chunks(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect()
    }

    /// The address registers: bits 0 to 23, and with HOB what they were before.
    fn address(&mut self) -> [u8; 6] {
        let now = [3, 4, 5].map(|offset| self.inb(offset));
        self.control.write(0, &[control::HOB]);
        let before = [3, 4, 5].map(|offset| self.inb(offset));
        [now, before].concat().try_into().unwrap()
    }
}

#[test]
fn a_flush_reaches_the_disk_behind_what_was_written() {
    let disk = Noted::default();
    let mut guest = Guest::new(disk.clone());
    guest.command(WRITE, 5, 1);
    guest.send(&[1; SECTOR]);
    assert_eq!(disk.calls(), [Call::Write(5, 1)]);
    for flush in [FLUSH, 0xEA, 0xE0, 0xE2, 0xE6] {
        guest.outb(COMMAND, flush);
        assert_eq!((guest.status(), disk.calls()), (READY, vec![Call::Flush]), "{flush:#x}");
    }
    // Without a cache each write is flushed before it ends, and it fails if that fails.
    guest.features(0x82, 0);
    assert_eq!(disk.calls(), [Call::Flush]);
    guest.command(WRITE, 5, 2);
    guest.send(&[1; 2 * SECTOR]);
    assert_eq!(disk.calls(), [Call::Write(5, 1), Call::Write(6, 1), Call::Flush]);
    guest.features(0x02, 0);
    guest.command(WRITE, 5, 1);
    guest.send(&[1; SECTOR]);
    assert_eq!(disk.calls(), [Call::Write(5, 1)]);
}

#[test]
fn a_flush_that_fails_is_told() {
    let mut guest = Guest::new(Noted { cannot_flush: true, ..Noted::default() });
    guest.outb(COMMAND, FLUSH);
    assert_eq!(guest.failed(), (READY | ERR, ABRT));
    guest.features(0x82, 0);
    assert_eq!(guest.failed(), (READY | ERR, ABRT));
}

#[test]
fn many_sectors_are_read_by_one_call() {
    let disk = Noted::default();
    let mut guest = Guest::new(disk.clone());
    guest.command(READ, 10, 50);
    guest.words(50 * 256);
    assert_eq!((guest.status(), disk.calls()), (READY, vec![Call::Read(10, 50)]));
}

#[test]
fn an_address_of_48_bits_goes_into_registers_that_remember() {
    let mut guest = Guest::new(ten_sectors());
    guest.command_ext(0x24, 4, 2);
    assert_eq!(guest.words(512), [[4; SECTOR], [5; SECTOR]].concat());
    guest.command_ext(0x34, 4, 1);
    guest.send(&[0xA5; SECTOR]);
    guest.command_ext(0x24, 4, 1);
    assert_eq!(guest.words(256), [0xA5; SECTOR]);
    // Each of its bytes counts.
    for bit in 0..48 {
        guest.command_ext(0x24, 1 << bit, 1);
        let expected =
            if bit < 4 && 1 << bit < 10 { (READY | DRQ, 0) } else { (READY | ERR, IDNF) };
        assert_eq!(guest.failed(), expected, "bit {bit}");
    }
    // As do those of the count. 0 is 65536.
    for count in [0x200, 0] {
        let mut guest = Guest::new(vec![7; 10 * SECTOR]);
        guest.command_ext(0x42, 0, count);
        assert_eq!(guest.failed(), (READY | ERR, IDNF));
        assert_eq!(guest.address(), [10, 0, 0, 0, 0, 0]);
    }
}

/// 2^32 + 10 sectors, of which nobody has to keep any.
struct Huge;

impl Sectors for Huge {
    fn count(&self) -> u64 {
        (1 << 32) + 10
    }
    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill((lba >> 28) as u8);
        Ok(())
    }
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_may_be_larger_than_28_bits_can_say() {
    let mut guest = Guest::new(Huge);
    guest.command(READ, 0x0FFF_FFFE, 2);
    assert_eq!(guest.words(256), [0; SECTOR]);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
    assert_eq!(guest.address()[..3], [0xFF; 3]);
    assert_eq!(guest.inb(DEVICE) & 0x0F, 0x0F);
    guest.command_ext(0x24, (1 << 32) + 9, 2);
    assert_eq!(guest.words(256), [16; SECTOR]);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
    assert_eq!(guest.address(), [10, 0, 0, 0, 1, 0]);
    let words = guest.identify();
    assert_eq!(words[60..62], [0xFFFF, 0x0FFF]);
    assert_eq!(words[100..104], [10, 0, 1, 0]);
    assert_eq!((words[1], words[3], words[6]), (16383, 16, 63));
}

#[test]
fn sectors_have_a_cylinder_and_a_head_for_who_counts_so() {
    let mut guest = Guest::new((0..4000u32).flat_map(|n| [n as u8; SECTOR]).collect::<Vec<u8>>());
    let words = guest.identify();
    assert_eq!((words[1], words[3], words[6]), (3, 16, 63));
    guest.command_chs(READ, 2, 15, 63);
    assert_eq!(guest.words(256), [(3 * 16 * 63 - 1) as u8; SECTOR]);
    for (cylinder, head, sector) in [(3, 0, 1), (0, 0, 0), (0, 0, 64)] {
        guest.command_chs(READ, cylinder, head, sector);
        assert_eq!(guest.failed(), (READY | ERR, IDNF));
    }
    // Four heads with 10 sectors: 100 cylinders.
    guest.outb(COUNT, 10);
    guest.outb(DEVICE, 3);
    guest.outb(COMMAND, SET_GEOMETRY);
    assert_eq!(guest.status(), READY);
    let words = guest.identify();
    assert_eq!(words[54..59], [100, 4, 10, 4000, 0]);
    assert_eq!((words[1], words[3], words[6]), (3, 16, 63), "the drive's own is the same");
    guest.command_chs(READ, 99, 3, 10);
    assert_eq!(guest.words(256), [3999u32 as u8; SECTOR]);
    // An error is told in the same terms.
    guest.command_chs(0x70, 99, 3, 10);
    assert_eq!(guest.status(), READY);
    guest.outb(COUNT, 2);
    guest.outb(COMMAND, VERIFY);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
    assert_eq!((guest.address()[..3].to_vec(), guest.inb(DEVICE)), (vec![1, 100, 0], 0xA0));
    guest.outb(COUNT, 0);
    guest.outb(COMMAND, SET_GEOMETRY);
    assert_eq!(guest.failed(), (READY | ERR, ABRT), "a track without sectors");
}

#[test]
fn multiple_moves_a_block_for_each_interrupt() {
    let disk = Noted::default();
    let mut guest = Guest::new(disk.clone());
    guest.command(READ_MULTIPLE, 0, 10);
    assert_eq!(guest.failed(), (READY | ERR, ABRT), "no size of a block has been set");
    for (count, accepted) in [(3, false), (32, false), (0, true), (16, true), (4, true)] {
        guest.outb(COUNT, count);
        guest.outb(COMMAND, SET_MULTIPLE);
        let expected = if accepted { (READY, 0) } else { (READY | ERR, ABRT) };
        assert_eq!(guest.failed(), expected, "{count}");
    }
    assert_eq!(guest.identify()[59], 0x0104);
    guest.interrupts();

    // 4, 4 and 2.
    guest.command(READ_MULTIPLE, 20, 10);
    for sectors in [4, 4, 2] {
        assert_eq!((guest.interrupts(), guest.status()), (1, READY | DRQ));
        guest.words(sectors * 256);
    }
    assert_eq!((guest.interrupts(), guest.status()), (0, READY));
    assert_eq!(disk.calls(), [Call::Read(20, 10)]);

    guest.command(WRITE_MULTIPLE, 20, 10);
    for sectors in [4, 4, 2] {
        assert_eq!((guest.interrupts(), guest.status()), (0, READY | DRQ));
        guest.send(&vec![1; sectors * SECTOR]);
        assert_eq!(guest.interrupts(), 1);
    }
    assert_eq!(guest.status(), READY);
    assert_eq!(disk.calls(), [Call::Write(20, 4), Call::Write(24, 4), Call::Write(28, 2)]);

    // Of a block that reaches beyond the end nothing is read, and what exists is written.
    guest.command(READ_MULTIPLE, 94, 8);
    guest.words(4 * 256);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
    assert_eq!(guest.inb(LBA_LOW), 100);
    disk.calls();
    guest.command(WRITE_MULTIPLE, 98, 4);
    guest.send(&[1; 4 * SECTOR]);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
    assert_eq!((guest.inb(LBA_LOW), disk.calls()), (100, vec![Call::Write(98, 2)]));
    guest.command_ext(0x29, 96, 4);
    guest.words(4 * 256);
    guest.command_ext(0x39, 96, 4);
    guest.send(&[1; 4 * SECTOR]);
    assert_eq!(
        (guest.status(), disk.calls()),
        (READY, vec![Call::Read(96, 4), Call::Write(96, 4)])
    );
}

#[test]
fn a_bad_sector_is_named_and_those_before_it_are_not_lost() {
    let disk = Noted { bad: 23..24, ..Noted::default() };
    let mut guest = Guest::new(disk.clone());
    guest.command(READ, 20, 10);
    guest.words(3 * 256);
    assert_eq!(guest.failed(), (READY | ERR, UNC));
    assert_eq!(guest.inb(LBA_LOW), 23);
    guest.command(VERIFY, 20, 10);
    assert_eq!(guest.failed(), (READY | ERR, UNC));
    assert_eq!(guest.inb(LBA_LOW), 23);
    guest.command(WRITE, 22, 3);
    guest.send(&[1; 3 * SECTOR]);
    assert_eq!(guest.failed(), (READY | ERR, ABRT));
    assert_eq!(guest.inb(LBA_LOW), 23);

    guest.outb(COUNT, 4);
    guest.outb(COMMAND, SET_MULTIPLE);
    disk.calls();
    guest.command(WRITE_MULTIPLE, 20, 8);
    guest.send(&[1; 4 * SECTOR]);
    assert_eq!(guest.failed(), (READY | ERR, ABRT));
    assert_eq!(guest.inb(LBA_LOW), 23);
    // The block, then its sectors up to the bad one.
    let calls = [(20, 4), (20, 1), (21, 1), (22, 1), (23, 1)].map(|(lba, n)| Call::Write(lba, n));
    assert_eq!(disk.calls(), calls);
}

#[test]
fn a_write_protected_disk_takes_no_data() {
    struct Protected(Vec<u8>);
    impl Sectors for Protected {
        fn count(&self) -> u64 {
            self.0.count()
        }
        fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
            self.0.read(lba, data)
        }
        fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
            panic!("the drive should know");
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn write_protected(&self) -> bool {
            true
        }
    }
    let mut guest = Guest::new(Protected(ten_sectors()));
    guest.command(WRITE, 1, 1);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.failed(), (READY | ERR, ABRT | UNC), "UNC's bit is WP here");
    guest.send(&[0; SECTOR]);
    guest.command(READ, 1, 1);
    assert_eq!(guest.words(256), [1; SECTOR]);
}

#[test]
fn identify_tells_what_there_is() {
    let mut guest = Guest::new(ten_sectors());
    let words = guest.identify();
    let text = |range: Range<usize>| {
        let bytes: Vec<u8> = words[range].iter().flat_map(|word| word.to_be_bytes()).collect();
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(text(10..20), format!("{:20}", "1"));
    assert_eq!(text(23..27), format!("{:8}", env!("CARGO_PKG_VERSION")));
    assert_eq!(text(27..47), format!("{:40}", "mini-kvm disk"));
    assert_eq!(words[60..62], [10, 0]);
    assert_eq!(words[100..104], [10, 0, 0, 0]);
    assert_eq!(words[49] & 1 << 9, 1 << 9, "LBA");
    assert_eq!((words[47], words[59]), (0x8010, 0));
    for (supported, enabled, bit) in [(82, 85, 5), (83, 86, 10), (83, 86, 12), (83, 86, 13)] {
        assert_eq!((words[supported] & 1 << bit, words[enabled] & 1 << bit), (1 << bit, 1 << bit));
    }
    let sum = words.iter().flat_map(|word| word.to_le_bytes()).fold(0u8, u8::wrapping_add);
    assert_eq!((words[255] as u8, sum), (0xA5, 0));
    guest.features(0x82, 0);
    assert_eq!(guest.identify()[85] & 1 << 5, 0, "the write cache is off");
}

#[test]
fn settings_that_a_drive_without_dma_has() {
    let mut guest = Guest::new(ten_sectors());
    for (feature, count, accepted) in [
        (0x02, 0, true),
        (0x03, 0x00, true),
        (0x03, 0x0C, true),
        (0x03, 0x0D, false),
        (0x03, 0x22, false),
        (0x03, 0x45, false),
        (0x55, 0, true),
        (0xAA, 0, true),
        (0x66, 0, true),
        (0x05, 0, false),
    ] {
        guest.features(feature, count);
        let expected = if accepted { (READY, 0) } else { (READY | ERR, ABRT) };
        assert_eq!(guest.failed(), expected, "{feature:#x} {count:#x}");
    }
    // DMA, packets, and NOP, which is there to fail.
    for command in [0x00, 0xC8, 0xCA, 0x25, 0x35, 0xA0, 0xA1, 0x08, 0xB0, 0xF8] {
        guest.outb(COMMAND, command);
        assert_eq!(guest.failed(), (READY | ERR, ABRT), "{command:#x}");
    }
    for command in [0x10, 0xE1, 0xE3, 0xE5] {
        guest.outb(COMMAND, command);
        assert_eq!((guest.interrupts() > 0, guest.status()), (true, READY), "{command:#x}");
    }
    assert_eq!(guest.inb(COUNT), 0xFF, "the drive is not in standby");
    guest.command(0x70, 9, 1);
    assert_eq!(guest.status(), READY);
    guest.command(0x70, 10, 1);
    assert_eq!(guest.failed(), (READY | ERR, IDNF));
}

#[test]
fn both_drives_take_part_in_a_diagnostic() {
    let second = Drive::new(ten_sectors(), "2");
    let mut guest = Guest::with_drives(Drive::new(ten_sectors(), "1"), Some(second));
    guest.command_to(DEVICE_1, EXECUTE_DEVICE_DIAGNOSTIC, 5, 5);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.inb(DEVICE), 0, "the first drive is selected");
    for device in [0, DEVICE_1] {
        guest.outb(DEVICE, device);
        assert_eq!((guest.status(), guest.inb(ERROR), guest.inb(LBA_LOW)), (READY, 0x01, 1));
    }
}

#[test]
fn a_wide_access_to_registers_of_8_bits_is_one_to_each() {
    let mut guest = Guest::new(ten_sectors());
    guest.channel.lock().unwrap().write(COUNT, &[1, 7]);
    guest.channel.lock().unwrap().write(4, &[0, 0, 0xE0, READ]);
    let mut data = [0xFF; 4];
    guest.channel.lock().unwrap().read(LBA_LOW, &mut data);
    assert_eq!(data, [7, 0, 0, 0xE0]);
    assert_eq!(guest.words(256), [7; SECTOR]);
}

#[test]
fn drives_are_put_on_cables_two_by_two() {
    let drives = |count| cables((0..count).map(|_| Drive::new(Huge, "")).collect());
    let seconds =
        |count| drives(count).iter().map(|(_, slave)| slave.is_some()).collect::<Vec<_>>();
    assert!(seconds(0).is_empty());
    assert_eq!(seconds(1), [false]);
    assert_eq!(seconds(3), [true, false]);
    assert_eq!(seconds(4), [true, true]);
}

/// A transfer as a driver makes it.
#[derive(Clone, Debug)]
struct Transfer {
    device: u8,
    write: bool,
    multiple: bool,
    addressing: u8,
    lba: u32,
    count: u8,
    byte: u8,
}

fn transfer() -> impl Strategy<Value = Transfer> {
    let lba = prop_oneof![0..1100u32, 1000..1040u32];
    (0..2u8, any::<bool>(), any::<bool>(), 0..3u8, lba, 1..70u8, any::<u8>()).prop_map(
        |(device, write, multiple, addressing, lba, count, byte)| Transfer {
            device: device * DEVICE_1,
            write,
            multiple,
            addressing,
            lba,
            count,
            byte,
        },
    )
}

/// Sectors of the first drive in the test below; the second has half as many.
const SECTORS: usize = 1030;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn disks_hold_what_was_written_to_them(
        blocks in prop::sample::subsequence(vec![2u8, 8, 16], 2),
        transfers in prop::collection::vec(transfer(), 1..60),
    ) {
        let mut model = [vec![1; SECTORS * SECTOR], vec![2; SECTORS / 2 * SECTOR]];
        let [first, second] = model.clone();
        let mut guest = Guest::with_drives(Drive::new(first, "1"), Some(Drive::new(second, "2")));
        for (device, block) in [0, DEVICE_1].into_iter().zip(&blocks) {
            guest.command_to(device, SET_MULTIPLE, 0, *block);
        }
        for transfer in transfers {
            let Transfer { device, write, multiple, addressing, lba, count, byte } = transfer;
            let second = usize::from(device != 0);
            let model = &mut model[second];
            let block = if multiple { usize::from(blocks[second]) } else { 1 };
            let command = match (addressing, multiple, write) {
                (2, false, false) => 0x24,
                (2, false, true) => 0x34,
                (2, true, false) => 0x29,
                (2, true, true) => 0x39,
                (_, false, false) => READ,
                (_, false, true) => WRITE,
                (_, true, false) => READ_MULTIPLE,
                (_, true, true) => WRITE_MULTIPLE,
            };
            // By cylinder, by 28 bits, by 48: the drives' geometry has 16 heads and 63 sectors.
            let [mut low, mut mid, mut high, top] = lba.to_le_bytes();
            let mut select = device | 0xE0 | top;
            if addressing == 0 {
                let [track, sector] = [lba / 63, lba % 63 + 1];
                [low, mid, high] = [sector as u8, (track / 16) as u8, 0];
                select = device | 0xA0 | (track % 16) as u8;
            }
            for (offset, value) in [(2, 0), (3, top), (4, 0), (5, 0), (2, count), (3, low), (4, mid), (5, high)] {
                guest.outb(offset, value);
            }
            guest.outb(DEVICE, select);
            guest.outb(COMMAND, command);

            let (lba, count, sectors) = (lba as usize, usize::from(count), model.len() / SECTOR);
            // The geometry names whole cylinders, of which there is at least one.
            let named = if addressing == 0 { 1008.min(sectors) } else { sectors };
            let whole_blocks = sectors.saturating_sub(lba) / block * block;
            let expected = match lba + count <= sectors {
                _ if lba >= named => 0,
                true => count,
                false if write => count.min(whole_blocks + block),
                false => whole_blocks,
            };
            let mut moved = 0;
            while guest.status() & DRQ != 0 {
                prop_assert!(lba < named);
                let now = block.min(count - moved);
                let bytes = (lba + moved) * SECTOR..(lba + moved + now) * SECTOR;
                if write {
                    guest.send(&vec![byte; now * SECTOR]);
                    let end = bytes.end.min(model.len());
                    model[bytes.start.min(end)..end].fill(byte);
                } else {
                    prop_assert_eq!(&guest.words(now * 256), &model[bytes]);
                }
                moved += now;
            }
            prop_assert_eq!(moved, expected);
            let ended = match lba < named && lba + count <= sectors {
                true => (READY, 0),
                false => (READY | ERR, IDNF),
            };
            prop_assert_eq!(guest.failed(), ended);
        }
    }
}

/// One exit of a guest that does what it likes.
#[derive(Clone, Debug)]
enum Access {
    Register(u64, u8),
    Command(u8),
    Control(u8),
    /// Words from and to the data port.
    Read(usize),
    Write(usize),
    Status,
}

fn access() -> impl Strategy<Value = Access> {
    let commands = vec![
        0x10u8, 0x20, 0x24, 0x29, 0x30, 0x34, 0x39, 0x40, 0x42, 0x70, 0x90, 0x91, 0xC4, 0xC5, 0xC6,
        0xE5, 0xE7, 0xEA, 0xEC, 0xEF,
    ];
    // Most numbers are small, or most commands would fail at once.
    let value = || prop_oneof![4 => 0..4u8, 2 => 90..110u8, 1 => any::<u8>()];
    prop_oneof![
        6 => (1..6u64, value()).prop_map(|(register, value)| Access::Register(register, value)),
        2 => prop::sample::select(vec![0x00u8, 0x10, 0x40, 0x50])
            .prop_map(|device| Access::Register(DEVICE, device)),
        4 => prop::sample::select(commands).prop_map(Access::Command),
        1 => any::<u8>().prop_map(Access::Command),
        1 => prop::sample::select(vec![0u8, 0, 2, 4, 0x80]).prop_map(Access::Control),
        3 => (1..2048usize).prop_map(Access::Read),
        3 => (1..2048usize).prop_map(Access::Write),
        1 => Just(Access::Status),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Nor does it reach a sector that is not there: the disk would panic. And a drive that can be spoken to is ready.
    #[test]
    fn no_guest_brings_a_channel_down(
        accesses in prop::collection::vec(access(), 1..300),
        bad in 0..100u64,
    ) {
        let noted = |bad| Noted { bad, ..Noted::default() };
        let second = Drive::new(noted(bad..bad + 1), "2");
        let mut guest = Guest::with_drives(Drive::new(noted(0..0), "1"), Some(second));
        for access in accesses {
            match access {
                Access::Register(register, value) => guest.outb(register, value),
                Access::Command(command) => guest.outb(COMMAND, command),
                Access::Control(value) => guest.control.write(0, &[value]),
                Access::Read(count) => drop(guest.words(count)),
                Access::Write(count) => guest.send(&vec![0x5A; 2 * count]),
                Access::Status => drop(guest.status()),
            }
        }
        guest.control.write(0, &[0]);
        for device in [0, DEVICE_1] {
            guest.outb(DEVICE, device);
            prop_assert_eq!(guest.status() & !(DRQ | ERR), READY);
            prop_assert_eq!(guest.identify()[60], 100);
        }
    }
}
