//! Every service of the BIOS, called by a boot sector (asm/boot/services.asm) that notes what comes back.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::bus::shared;
use common::cmos::BootFirst;
use common::disk::SECTOR;
use common::e820;
use common::ide::Drive;
use common::layout::{TEXT_SCREEN, ram_ranges};
use common::memory::Ram;
use common::run::{self, Ending};
use common::uart::{self, Uart};
use common::vga::Picture;
use testkit::Printed;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::machine::{self, AtPorts, Parts, Setup};

mod boot_order;
mod disks;
mod keyboard;
mod power;
mod serial;

/// A call: its interrupt, and the registers before or after it. As `services.asm` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Call {
    number: u16,
    flags: u16,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
    esi: u32,
    edi: u32,
    ebp: u32,
    ds: u16,
    es: u16,
}

#[expect(unsafe_code, reason = "the list of calls is written as bytes")]
// SAFETY: integers without padding between them.
unsafe impl ByteValued for Call {}

impl Call {
    fn carry(&self) -> bool {
        self.flags & CARRY != 0
    }

    fn zero(&self) -> bool {
        self.flags & ZERO != 0
    }

    fn ax(&self) -> u16 {
        self.eax as u16
    }

    fn ah(&self) -> u8 {
        (self.eax >> 8) as u8
    }
}

/// `int number` with AX, and interrupts enabled.
fn call(number: u16, ax: u16) -> Call {
    Call { number, eax: ax.into(), flags: INTERRUPTS, ..Call::default() }
}

// Bits of the flags.
const CARRY: u16 = 1 << 0;
const ZERO: u16 = 1 << 6;
const INTERRUPTS: u16 = 1 << 9;
/// String instructions go down.
const DOWN: u16 = 1 << 10;

const LIST: GuestAddress = GuestAddress(0x1_0000);

fn write_calls(ram: &Ram, calls: &[Call]) {
    let bytes: Vec<u8> = calls.iter().flat_map(|call| call.as_slice()).copied().collect();
    ram.write_slice(&bytes, LIST).unwrap();
}

fn read_calls(ram: &Ram, count: usize) -> Vec<Call> {
    let places = (LIST.0..).step_by(size_of::<Call>()).take(count);
    places.map(|at| ram.read_obj(GuestAddress(at)).unwrap()).collect()
}

/// Where calls may have their data.
const DATA: u64 = 0x2_0000;
const DATA_SEGMENT: u16 = 0x2000;

/// What a list of calls has done.
struct Done {
    calls: Vec<Call>,
    parts: Parts,
    /// What came out of the serial port, behind the BIOS's own greeting.
    printed: String,
}

impl Done {
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.parts.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Row and column of the cursor that one sees.
    fn cursor(&self) -> Option<(usize, usize)> {
        Picture::take(&self.parts.vga, &self.parts.ram).unwrap().cursor
    }

    /// Cells of the text screen.
    fn cells(&self, row: usize, column: usize, len: usize) -> Vec<u8> {
        self.bytes(TEXT_SCREEN.0 + (row * 80 + column) as u64 * 2, len * 2)
    }
}

/// A machine to make calls in.
struct Machine {
    memory: u64,
    /// Sectors of the disk behind the first.
    disk: Vec<u8>,
    /// Further drives. The disk is the first hard disk.
    drives: Vec<Drive>,
    /// Another device.
    other: Option<AtPorts>,
    keys: &'static [u8],
}

impl Default for Machine {
    fn default() -> Self {
        let drives = Vec::new();
        Self { memory: 64 << 20, disk: Vec::new(), drives, other: None, keys: b"" }
    }
}

impl Machine {
    /// Makes the calls, with `data` in memory at [`DATA`].
    fn make(self, data: &[u8], calls: &[Call]) -> Done {
        let screen = Printed::default();
        let mut drives = vec![Drive::new([asm::boot::SERVICES, &self.disk].concat(), "1")];
        drives.extend(self.drives);
        let (first, memory, other) = (BootFirst::Disks, self.memory, self.other);
        let setup = Setup { drives, first, memory, other };
        let (parts, ending) = machine::run_with(setup, run::stop(), |parts, line| {
            let ram = &parts.ram;
            ram.write_slice(data, GuestAddress(DATA)).unwrap();
            write_calls(ram, calls);
            let uart = shared(Uart::new(line, screen.clone()));
            if !self.keys.is_empty() {
                let uart = Arc::clone(&uart);
                thread::spawn(move || uart::type_in(&uart, self.keys));
            }
            uart
        });
        let printed = screen.text();
        assert_eq!(ending.unwrap(), Ending::Exited(0), "{printed}");
        let done = read_calls(&parts.ram, calls.len());
        let (_, printed) = printed.split_once("of memory\r\n").expect("the BIOS's greeting");
        Done { calls: done, parts, printed: printed.to_owned() }
    }
}

#[test]
fn int_10_writes_on_the_screen_and_on_the_serial_port() {
    let string = Call { ecx: 3, edx: 5 << 8 | 10, es: DATA_SEGMENT, ..call(0x10, 0x1303) };
    let done = Machine::default().make(
        b"a\x1Fb\x2Fc\x3F",
        &[
            call(0x10, 0x0E00 | u16::from(b'x')),
            call(0x10, 0x0F00),
            call(0x10, 0x0300),
            // The cursor to row 7, column 3; a character there, four times in bright red; the first is read.
            Call { edx: 7 << 8 | 3, ..call(0x10, 0x0200) },
            Call { ebx: 0x0C, ecx: 4, ..call(0x10, 0x0900 | u16::from(b'*')) },
            call(0x10, 0x0800),
            call(0x10, 0x0300),
            string,
            call(0x10, 0x0300),
            // Rows 5 to 7, columns 3 to 79, up by one; blanks in green.
            Call { ebx: 0x2000, ecx: 5 << 8 | 3, edx: 7 << 8 | 79, ..call(0x10, 0x0601) },
            // And row 6 down by as many rows as it has, which clears it.
            Call { ebx: 0x1000, ecx: 6 << 8, edx: 6 << 8 | 2, ..call(0x10, 0x0700) },
            // Row 30 is none: the cursor stays.
            Call { edx: 30 << 8, ..call(0x10, 0x0200) },
            call(0x10, 0x0300),
        ],
    );
    let c = &done.calls;
    assert_eq!((c[1].ax(), c[1].ebx), (80 << 8 | 3, 0));
    assert_eq!((c[2].edx, c[2].ecx), (1 << 8 | 1, 0x0607), "row 1 behind the greeting");
    assert_eq!(c[5].ax(), 0x0C00 | u16::from(b'*'));
    assert_eq!(c[6].edx, 7 << 8 | 3, "09h leaves the cursor where it is");
    assert_eq!(c[8].edx, 5 << 8 | 13);
    assert_eq!(c[12].edx, 5 << 8 | 13);
    assert_eq!(done.cursor(), Some((5, 13)));
    assert_eq!(done.cells(1, 0, 1), *b"x\x07");
    assert_eq!(done.cells(6, 3, 5), *b"*\x0C*\x0C*\x0C*\x0C \x07", "scrolled from row 7");
    assert_eq!(done.cells(7, 2, 3), *b" \x07 \x20 \x20", "what came free");
    assert_eq!(done.cells(6, 0, 3), *b" \x10 \x10 \x10");
    assert_eq!(done.cells(5, 10, 3), *b" \x07 \x07 \x07", "scrolled out of the window");
    // The terminal is told where to go when the cursor has moved otherwise than by printing.
    assert_eq!(done.printed, "x\x1b[08;04H****\x1b[06;11Habc");
}

#[test]
fn int_10_wraps_scrolls_and_clears() {
    let line = Call { ecx: 81, ..call(0x10, 0x0E00) };
    let mut calls: Vec<_> = (0..81).map(|_| Call { eax: 0x0E2D, ..line }).collect();
    calls.extend((0..30).map(|_| call(0x10, 0x0E0A)));
    calls.push(call(0x10, 0x0E00 | u16::from(b'z')));
    calls.push(call(0x10, 0x0E08));
    calls.push(call(0x10, 0x0300));
    let done = Machine::default().make(b"", &calls);
    assert_eq!(done.calls.last().unwrap().edx, 24 << 8 | 1);
    assert_eq!(done.cells(24, 1, 1), *b"z\x07");
    assert_eq!(done.cells(23, 0, 80), b" \x07".repeat(80));
    let wrapped = format!("{}\r\n-{}z\x08", "-".repeat(80), "\n".repeat(30));
    assert_eq!(done.printed, wrapped);

    // The cursor gets all lines of its cell, and none at last.
    let shape = |cx| Call { ecx: cx, ..call(0x10, 0x0100) };
    calls.extend([shape(0x0007), call(0x10, 0x0003), call(0x10, 0x0300)]);
    let done = Machine::default().make(b"", &calls);
    assert_eq!(done.calls.last().unwrap().edx, 0);
    assert_eq!(done.bytes(TEXT_SCREEN.0, 4000), b" \x07".repeat(2000));
    assert!(done.printed.ends_with("\x1b[H\x1b[2J"), "{:?}", done.printed);
    assert_eq!(done.cursor(), Some((0, 0)));
    calls.push(shape(0x2607));
    assert_eq!(Machine::default().make(b"", &calls).cursor(), None);
}

#[test]
fn a_service_leaves_what_is_its_callers() {
    let upper = 0xA5A5_0000;
    let made = [
        call(0x10, 0x0300),
        call(0x11, 0),
        call(0x12, 0),
        Call { ecx: 1, edx: 0x80, es: 0x5000, ..call(0x13, 0x0201) },
        Call { edx: 0x80, ..call(0x13, 0x0800) },
        Call { esi: 0x10, edx: 0x80, ds: DATA_SEGMENT, ..call(0x13, 0x4200) },
        call(0x14, 0x0300),
        Call { edx: 1000, ..call(0x15, 0x8600) },
        call(0x15, 0x8800),
        call(0x15, 0x2402),
        call(0x16, 0x0200),
        call(0x17, 0x0200),
        call(0x1A, 0x0000),
        call(0x1A, 0x0200),
    ];
    let mut calls = Vec::new();
    for flags in [INTERRUPTS, 0, INTERRUPTS | DOWN | CARRY] {
        calls.extend(made.map(|c| Call {
            flags,
            eax: c.eax | upper,
            ebx: c.ebx | upper,
            ecx: c.ecx | upper,
            edx: c.edx | upper,
            esi: c.esi | upper,
            edi: c.edi | upper,
            ebp: c.ebp | upper,
            ..c
        }));
    }
    let mut data = vec![0; 0x10];
    data.extend([0x10, 0, 1, 0, 0, 0, 0, 0x51]); // sector 0 to 5100:0000
    data.resize(0x20, 0);
    let done = Machine::default().make(&data, &calls);
    for (before, after) in calls.iter().zip(&done.calls) {
        let Call { eax, ebx, ecx, edx, esi, edi, ebp, .. } = after;
        for register in [eax, ebx, ecx, edx, esi, edi, ebp] {
            assert_eq!(register >> 16, 0xA5A5, "{before:x?} {after:x?}");
        }
        let kept = INTERRUPTS | DOWN;
        assert_eq!(after.flags & kept, before.flags & kept, "{before:x?} {after:x?}");
        // Those that report failures by it have cleared it.
        if matches!(before.number, 0x13 | 0x15 | 0x1A) {
            assert!(!after.carry(), "{before:x?} {after:x?}");
        }
    }
}

#[test]
fn int_11_and_12_say_what_there_is() {
    let done = Machine::default().make(b"", &[call(0x11, 0), call(0x12, 0)]);
    // One serial port, 80 columns in colour, a coprocessor, no floppy drive.
    assert_eq!((done.calls[0].ax(), done.calls[1].ax()), (0x0222, 639));
    assert_eq!(done.bytes(0x40E, 2), [0xC0, 0x9F], "the segment of the EBDA");
    assert_eq!(done.bytes(0x9_FC00, 1), [1], "which has 1 KiB");
    assert_eq!(done.bytes(0x475, 1), [1], "disks");
}

/// 299 sectors, each with its number in every word; with the boot sector they are 300.
fn sectors() -> Vec<u8> {
    (1..300u16).flat_map(|n| n.to_le_bytes().repeat(SECTOR / 2)).collect()
}

#[test]
fn int_15_gives_the_map_that_the_machine_has() {
    for memory in [1 << 20, 5 << 20, 64 << 20, (3 << 30) + (512 << 20), 40 << 30] {
        let map = |ebx| Call {
            ebx,
            ecx: 24,
            edx: u32::from_be_bytes(*b"SMAP"),
            edi: ebx * 24,
            es: DATA_SEGMENT,
            ..call(0x15, 0xE820)
        };
        let mut calls: Vec<_> = (0..7).map(map).collect();
        calls.push(Call { edx: 0, ..map(0) });
        calls.push(Call { ecx: 19, ..map(0) });
        // Who has room for 20 bytes gets 20.
        calls.push(Call { ecx: 23, edi: 0x800, ..map(1) });
        calls.extend([call(0x15, 0xE801), call(0x15, 0x8800), call(0x15, 0xBF00)]);
        let done = Machine { memory, ..Machine::default() }.make(&[0xEE; 0x900], &calls);

        let mut expected = e820::map(&Ram::from_ranges(&ram_ranges(memory)).unwrap());
        let rom = e820::Entry { range: 0xFFFF_0000..1 << 32, kind: e820::Kind::Reserved };
        let at = expected.partition_point(|entry| entry.range.start < rom.range.start);
        expected.insert(at, rom);
        let bytes = done.bytes(DATA, expected.len() * 24);
        for (n, (entry, bytes)) in expected.iter().zip(bytes.as_chunks::<24>().0).enumerate() {
            let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let range = number(0)..number(0) + number(8);
            assert_eq!((&range, bytes[16]), (&entry.range, entry.kind as u8), "{memory} {n}");
            assert_eq!(bytes[20..], [1, 0, 0, 0], "ACPI 3.0: the range counts");
            let (call, last) = (done.calls[n], n + 1 == expected.len());
            assert_eq!((call.carry(), call.ecx), (false, 24));
            assert_eq!(call.eax, u32::from_be_bytes(*b"SMAP"));
            assert_eq!(call.ebx as usize, if last { 0 } else { n + 1 });
        }
        for beyond in &done.calls[expected.len()..9] {
            assert!(beyond.carry() && beyond.ah() == 0x86, "{beyond:x?}");
        }
        assert_eq!((done.calls[9].carry(), done.calls[9].ecx), (false, 20));
        let short = [&bytes[24..44], &[0xEE; 4]].concat();
        assert_eq!(done.bytes(DATA + 0x800, 24), short, "{memory}");
        let [sizes, above, unknown] = done.calls[10..] else { unreachable!() };
        let below_hole = memory.min(0xD000_0000);
        let low = (below_hole - (1 << 20)).min(15 << 20) >> 10;
        let high = below_hole.saturating_sub(16 << 20) >> 16;
        assert_eq!(u64::from(sizes.eax), low);
        assert_eq!((u64::from(sizes.ebx), sizes.ecx, sizes.edx), (high, sizes.eax, sizes.ebx));
        assert_eq!(u64::from(above.eax), ((below_hole - (1 << 20)) >> 10).min(0xFFFF));
        assert!(unknown.carry() && unknown.ah() == 0x86);
    }
}

#[test]
fn int_15_copies_beyond_the_first_megabyte_and_knows_a20() {
    // A table of descriptors, of which the BIOS reads two: 0x20400 to 0x200000, and back to 0x20600.
    let descriptor = |base: u32| {
        let [a, b, c, d] = base.to_le_bytes();
        [0xFF, 0xFF, a, b, c, 0x93, 0, d]
    };
    let table = |from, to| [[0; 8], [0; 8], descriptor(from), descriptor(to), [0; 8], [0; 8]];
    let mut data = table(0x2_0400, 0x20_0000).concat();
    data.extend(table(0x20_0000, 0x2_0600).concat());
    data.resize(0x400, 0);
    data.extend(sectors().iter().take(2 * SECTOR));
    let copy = |si| Call { ecx: 100, esi: si, es: DATA_SEGMENT, ..call(0x15, 0x8700) };
    let done = Machine::default().make(
        &data,
        &[
            copy(0),
            copy(48),
            Call { ecx: 0x8001, ..copy(0) },
            call(0x15, 0x2402),
            call(0x15, 0x2400),
            call(0x15, 0x2402),
            call(0x15, 0x2401),
            call(0x15, 0x2402),
            call(0x15, 0x2403),
            call(0x15, 0x2404),
        ],
    );
    let c = &done.calls;
    assert!(!c[0].carry() && !c[1].carry() && c[0].ah() == 0, "{c:x?}");
    assert_eq!(done.bytes(0x20_0000, 200), data[0x400..0x400 + 200]);
    assert_eq!(done.bytes(0x20_0000 + 200, 8), [0; 8]);
    assert_eq!(done.bytes(0x2_0600, 200), data[0x400..0x400 + 200]);
    assert!(c[2].carry() && c[2].ah() == 2);
    // Open at the start; then as it was left.
    for (call, open) in c[3..].iter().zip([1, 0, 0, 1, 1]) {
        assert!(!call.carry() && call.ah() == 0, "{call:x?}");
        assert!(call.eax & 0xFF == open, "{call:x?}");
    }
    assert!(!c[8].carry() && c[8].ebx == 3, "by the keyboard controller and by port 92h");
    assert!(c[9].carry() && c[9].ah() == 0x86);
}

#[test]
fn time_passes_at_its_rate() {
    let wait = 500_000u32;
    let start = Instant::now();
    let done = Machine::default().make(
        b"",
        &[
            Call { ecx: 0x12, edx: 0x3456, ..call(0x1A, 0x0100) },
            Call { ecx: wait >> 16, edx: wait & 0xFFFF, ..call(0x15, 0x8600) },
            call(0x1A, 0x0000),
            call(0x1A, 0x7700),
        ],
    );
    let c = &done.calls;
    assert!(!c[1].carry() && start.elapsed() > Duration::from_micros(wait.into()));
    let ticks = (c[2].ecx << 16 | c[2].edx) - 0x12_3456;
    // 9.1 ticks are half a second. A busy host may take longer.
    assert!((9..100).contains(&ticks) && c[2].ax() == 0, "{ticks} ticks");
    assert!(c[3].carry() && c[3].ah() == 0x86);
}

#[test]
fn int_1a_reads_the_clock_and_the_ticks_begin_with_it() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let before = now();
    let calls = [call(0x1A, 0x0400), call(0x1A, 0x0200), call(0x1A, 0x0000)];
    let done = Machine::default().make(b"", &calls);
    let c = &done.calls;
    assert!(c.iter().all(|call| !call.carry()), "{c:x?}");
    let bcd = |byte: u32| u64::from(byte >> 4 & 0xF) * 10 + u64::from(byte & 0xF);
    let [time, ticks] = [c[1], c[2]];
    let seconds = bcd(time.ecx >> 8) * 3600 + bcd(time.ecx) * 60 + bcd(time.edx >> 8);
    let told = (seconds + 86400 - before % 86400) % 86400;
    assert!(told <= now() - before, "{seconds} s since midnight, {told} s after {before}");
    let ticked = u64::from(ticks.ecx << 16 | ticks.edx) * 65536 / 1_193_182;
    assert!((ticked + 86400 - before % 86400 + 1) % 86400 <= now() - before + 1, "{ticked}");
    // The date by another way: days are counted up to the one that was told.
    let (year, month, day) =
        (bcd(c[0].ecx >> 8) * 100 + bcd(c[0].ecx), bcd(c[0].edx >> 8), bcd(c[0].edx));
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let february = if leap(year) { 29 } else { 28 };
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let days = (1970..year).map(|year| if leap(year) { 366 } else { 365 }).sum::<u64>()
        + months[..month as usize - 1].iter().sum::<u64>()
        + day
        - 1;
    assert!((before / 86400..=now() / 86400).contains(&days), "{year}-{month}-{day}");
}

#[test]
fn int_1a_sets_the_clock() {
    let date =
        |century_year, month_day| Call { ecx: century_year, edx: month_day, ..Call::default() };
    let calls = [
        Call { number: 0x1A, eax: 0x0500, ..date(0x1999, 0x1231) },
        Call { ecx: 0x2358, edx: 0x3400, ..call(0x1A, 0x0300) },
        call(0x1A, 0x0400),
        call(0x1A, 0x0200),
        // An hour that is none: the clock goes on as it was.
        Call { ecx: 0x2500, ..call(0x1A, 0x0300) },
        call(0x1A, 0x0400),
        Call { number: 0x1A, eax: 0x0500, ..date(0x2024, 0x0229) },
        call(0x1A, 0x0400),
    ];
    let done = Machine::default().make(b"", &calls);
    let c = &done.calls;
    assert!(c.iter().all(|call| !call.carry()), "{c:x?}");
    assert_eq!((c[2].ecx, c[2].edx), (0x1999, 0x1231));
    assert_eq!(c[3].ecx, 0x2358);
    assert!((0x3400..=0x5900).contains(&c[3].edx), "{:x}", c[3].edx);
    assert_eq!((c[5].ecx, c[5].edx), (0x1999, 0x1231));
    assert_eq!((c[7].ecx, c[7].edx), (0x2024, 0x0229));
}

#[test]
fn int_16_takes_what_is_typed() {
    let keys = b"aZ1 \r\n\x7f\x1b\x04\xE4";
    let mut calls = vec![call(0x16, 0x0200)];
    calls.extend(keys.iter().enumerate().map(|(n, _)| call(0x16, [0x0000, 0x1000][n % 2])));
    calls.extend([call(0x16, 0x0100), call(0x16, 0x1100)]);
    let done = Machine { keys, ..Machine::default() }.make(b"", &calls);
    assert_eq!(done.calls[0].ax(), 0);
    let typed: Vec<_> = done.calls[1..=keys.len()].iter().map(Call::ax).collect();
    assert_eq!(
        typed,
        [0x1E61, 0x2C5A, 0x0231, 0x3920, 0x1C0D, 0x1C0D, 0x0E08, 0x011B, 0x2004, 0x00E4]
    );
    for none in &done.calls[keys.len() + 1..] {
        assert!(none.zero(), "{none:x?}");
    }

    // A terminal's cursor keys; one that a PC has not is none. Esc itself, and what follows it.
    let keys = b"\x1b[A\x1b[B\x1bOC\x1b[D\x1b[H\x1b[4~\x1b[5~\x1b[Zx\x1bx\x1b";
    let wanted =
        [0x48E0, 0x50E0, 0x4DE0, 0x4BE0, 0x47E0, 0x4FE0, 0x49E0, 0x2D78, 0x011B, 0x2D78, 0x011B];
    let calls = [call(0x16, 0x1000)].repeat(wanted.len());
    let done = Machine { keys, ..Machine::default() }.make(b"", &calls);
    assert_eq!(done.calls.iter().map(Call::ax).collect::<Vec<_>>(), wanted);

    // A key that was seen is there until it is read. More are typed than the ring holds: none is lost.
    let keys = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let wait = Call { edx: 50_000, ..call(0x15, 0x8600) };
    let mut calls = vec![call(0x16, 0x0100), wait, call(0x16, 0x0100), call(0x16, 0x1100)];
    calls.extend([call(0x16, 0)].repeat(keys.len()));
    let done = Machine { keys, ..Machine::default() }.make(b"", &calls);
    for seen in &done.calls[2..4] {
        assert!(!seen.zero() && seen.ax() == 0x1E61, "{seen:x?}");
    }
    let typed: Vec<_> = done.calls[4..].iter().map(|call| call.eax as u8).collect();
    assert_eq!(typed, keys);
}

/// What the BIOS says of a boot sector of this code.
fn said_of(code: &[u8], signature: [u8; 2]) -> String {
    let mut disk = code.to_vec();
    disk.resize(SECTOR - 2, 0);
    disk.extend(signature);
    boot_order::said(vec![Drive::new(disk, "1")], BootFirst::Floppies)
}

#[test]
fn what_cannot_go_on_ends_with_a_line() {
    let boots = [0x55, 0xAA];
    let unsigned = "Disk 80h: its first sector does not end in 55 AA.\r\nNo bootable disk.\r\n";
    assert_eq!(said_of(&[0xF4], [0xAA, 0x55]), unsigned);
    // int 18h
    let gave_up = "Disk 80h: its program gave up.\r\nNo bootable disk.\r\n";
    assert_eq!(said_of(&[0xCD, 0x18], boots), gave_up);
    // Sector 0 is overwritten from 0x7A00, and then int 19h: mov ax, 0x301; mov bx, 0x7A00; mov cx, 1; mov dx, 0x80.
    let again = [0xB8, 1, 3, 0xBB, 0, 0x7A, 0xB9, 1, 0, 0xBA, 0x80, 0, 0xCD, 0x13, 0xCD, 0x19];
    assert_eq!(said_of(&again, boots), unsigned);
    // xor cx, cx; div cx. And ud2.
    let divided = "\r\nBIOS: division by zero at 0000:7C02\r\n";
    assert_eq!(said_of(&[0x31, 0xC9, 0xF7, 0xF1], boots), divided);
    assert_eq!(said_of(&[0x0F, 0x0B], boots), "\r\nBIOS: invalid instruction at 0000:7C00\r\n");
}

#[test]
fn writes_to_the_rom_change_nothing() {
    let done = Machine::default().make(
        b"",
        // The boot sector to F000:0000, over the BIOS's code.
        &[Call { ecx: 1, edx: 0x80, es: 0xF000, ..call(0x13, 0x0201) }, call(0x12, 0)],
    );
    assert_eq!(done.calls[1].ax(), 639);
    assert_eq!(done.bytes(0xF_0000, 0x1_0000), asm::bios::BIOS);
    assert_eq!(done.bytes(0xFFFF_0000, 0x1_0000), asm::bios::BIOS);
}
