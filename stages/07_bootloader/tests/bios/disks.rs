//! int 13h: floppies and disks, against what the images hold.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use common::bus::{Device, shared};
use common::disk::SECTOR;
use common::disk::Sectors;
use common::ide::{CHANNELS, Drive};

use super::{Call, DATA, DATA_SEGMENT, Machine, call, sectors};

/// The sectors of a floppy of 1.44 MB.
const FLOPPY: u64 = 2880;

/// A disk of any size: what nobody has written yet is each sector's number, over and over.
#[derive(Default)]
struct Numbered {
    count: u64,
    /// These cannot be read, nor written.
    bad: Range<u64>,
    protected: bool,
    written: Arc<Mutex<Written>>,
}

/// What has become of it.
#[derive(Default)]
struct Written {
    sectors: BTreeMap<u64, [u8; SECTOR]>,
    /// How many sectors were there, each time that it was flushed.
    flushed: Vec<usize>,
}

impl Numbered {
    fn new(count: u64) -> Self {
        Self { count, ..Self::default() }
    }

    fn drive(self) -> Drive {
        Drive::new(self, "numbered")
    }
}

fn number(lba: u64) -> [u8; SECTOR] {
    lba.to_le_bytes().repeat(SECTOR / 8).try_into().unwrap()
}

fn numbers(range: Range<u64>) -> Vec<u8> {
    range.flat_map(number).collect()
}

impl Sectors for Numbered {
    fn count(&self) -> u64 {
        self.count
    }
    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        let written = self.written.lock().unwrap();
        for (lba, sector) in (lba..).zip(data.as_chunks_mut().0) {
            if self.bad.contains(&lba) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            *sector = written.sectors.get(&lba).copied().unwrap_or_else(|| number(lba));
        }
        Ok(())
    }
    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        for (lba, sector) in (lba..).zip(data.as_chunks().0) {
            if self.bad.contains(&lba) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.written.lock().unwrap().sectors.insert(lba, *sector);
        }
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        let mut written = self.written.lock().unwrap();
        let count = written.sectors.len();
        written.flushed.push(count);
        Ok(())
    }
    fn write_protected(&self) -> bool {
        self.protected
    }
}

/// `int 13h` with AX, for cylinder, head and sector, with the data at ES:0.
fn chs(ax: u16, drive: u32, (cylinder, head, sector): (u32, u32, u32), es: u16) -> Call {
    let ecx = (cylinder & 0xFF) << 8 | cylinder >> 8 << 6 | sector;
    Call { ecx, edx: head << 8 | drive, es, ..call(0x13, ax) }
}

/// `int 13h`, function `function`, with the packet at DATA_SEGMENT:`at`.
fn by_packet(function: u16, drive: u32, at: u32) -> Call {
    Call { edx: drive, esi: at, ds: DATA_SEGMENT, ..call(0x13, function << 8) }
}

fn well(call: &Call) -> bool {
    !call.carry() && call.ah() == 0
}

fn failed(call: &Call, status: u8) -> bool {
    call.carry() && call.ah() == status
}

/// A packet for 42h and 43h.
fn packet(count: u16, offset: u16, segment: u16, lba: u64) -> Vec<u8> {
    let words = [0x10, count, offset, segment].map(u16::to_le_bytes);
    [words.as_flattened(), &lba.to_le_bytes()].concat()
}

#[test]
fn int_13_reads_what_the_image_holds() {
    let disk = sectors();
    let packets = [
        packet(200, 0xFFF0, 0x3000, 50), // runs over the end of a segment
        packet(2, 0, 0x6000, 299),       // the second one does not exist
        packet(1, 0, 0x6000, 1 << 28),
        packet(1, 0, 0x6000, 1 << 32),
    ]
    .concat();
    let by_packet = |at| Call { edx: 0x80, esi: at, ds: DATA_SEGMENT, ..call(0x13, 0x4200) };
    let chs = |ax, cx, dx, es| Call { ecx: cx, edx: dx, es, ..call(0x13, ax) };
    let done = Machine { disk: disk.clone(), ..Machine::default() }.make(
        &packets,
        &[
            by_packet(0),
            chs(0x0201, 0x0002, 0x0080, 0x5A00), // sector 2 of head 0
            chs(0x0203, 0x003F, 0x0180, 0x5B00), // the last of head 1 and two of head 2
            by_packet(16),
            Call { edx: 0x80, ..call(0x13, 0x0100) },
            call(0x13, 0x0100), // of a drive that isn't there
            by_packet(32),
            by_packet(48),
            chs(0x0201, 0x0000, 0x0080, 0x6000), // there is no sector 0
            chs(0x0201, 0x0101, 0x0080, 0x6000), // nor cylinder 1
            chs(0x0200, 0x0001, 0x0080, 0x6000), // and none is too few
            chs(0x0201, 0x0001, 0x0081, 0x6000), // another disk
            chs(0x0201, 0x0001, 0x0000, 0x6000), // a floppy
            Call { edx: 0x80, ..call(0x13, 0x0000) },
            Call { edx: 0x80, ..call(0x13, 0xEE00) },
        ],
    );
    let c = &done.calls;
    let sector = |n: usize| &disk[(n - 1) * SECTOR..][..SECTOR];
    assert!(!c[0].carry() && c[0].ah() == 0, "{:x?}", c[0]);
    assert_eq!(done.bytes(0x3_FFF0, 200 * SECTOR), disk[49 * SECTOR..249 * SECTOR]);
    assert!(!c[1].carry() && c[1].ax() == 1, "{:x?}", c[1]);
    assert_eq!(done.bytes(0x5_A000, SECTOR), sector(1));
    assert!(!c[2].carry() && c[2].ax() == 3, "{:x?}", c[2]);
    assert_eq!(done.bytes(0x5_B000, 3 * SECTOR), disk[124 * SECTOR..127 * SECTOR]);
    // Sector 299 came, the one behind it did not: the packet says so.
    assert!(c[3].carry() && c[3].ah() == 4, "{:x?}", c[3]);
    assert_eq!(done.bytes(0x6_0000, SECTOR), sector(299));
    assert_eq!(done.bytes(DATA + 16 + 2, 2), [1, 0]);
    assert!(c[4].carry() && c[4].ax() == 0x0404, "{:x?}", c[4]);
    assert!(c[5].carry() && c[5].ah() == 1, "{:x?}", c[5]);
    for beyond in &c[6..8] {
        assert!(beyond.carry() && beyond.ah() == 4, "{beyond:x?}");
    }
    for bad in c[8..13].iter().chain(&c[14..]) {
        assert!(bad.carry() && bad.ah() == 1, "{bad:x?}");
    }
    assert!(!c[13].carry() && c[13].ah() == 0, "{:x?}", c[13]);
}

#[test]
fn int_13_writes_sectors_that_can_be_read_back() {
    let mut data = packet(1, 0x400, DATA_SEGMENT, 298);
    data.resize(0x400, 0);
    data.extend([0xC3; SECTOR]);
    data.extend([0x3C; 2 * SECTOR]);
    let write = Call { edx: 0x80, es: DATA_SEGMENT, ..call(0x13, 0) };
    let done = Machine { disk: sectors(), ..Machine::default() }.make(
        &data,
        &[
            Call { eax: 0x4300, ds: DATA_SEGMENT, ..write },
            Call { eax: 0x0302, ebx: 0x600, ecx: 0x0003, ..write },
            Call { eax: 0x0204, ebx: 0x2000, ecx: 0x0002, ..write },
            Call { eax: 0x0201, ebx: 0x3000, ecx: 299 - 4 * 63, edx: 0x0480, ..write },
        ],
    );
    for done in &done.calls {
        assert!(!done.carry() && done.ah() == 0, "{done:x?}");
    }
    let read = done.bytes(DATA + 0x2000, 4 * SECTOR);
    assert_eq!(read[..SECTOR], [1, 0].repeat(SECTOR / 2));
    assert_eq!(read[SECTOR..3 * SECTOR], [0x3C; 2 * SECTOR]);
    assert_eq!(read[3 * SECTOR..], [4, 0].repeat(SECTOR / 2));
    assert_eq!(done.bytes(DATA + 0x3000, SECTOR), [0xC3; SECTOR]);
}

#[test]
fn int_13_describes_the_disk() {
    let disk =
        |sectors: usize| Machine { disk: vec![0; (sectors - 1) * SECTOR], ..Machine::default() };
    let calls = [
        Call { edx: 0x80, ..call(0x13, 0x0800) },
        Call { edx: 0x80, ..call(0x13, 0x1500) },
        Call { edx: 0x80, ebx: 0x55AA, ..call(0x13, 0x4100) },
        Call { edx: 0x80, ds: DATA_SEGMENT, ..call(0x13, 0x4800) },
        Call { edx: 0x80, ds: DATA_SEGMENT, esi: 0x100, ..call(0x13, 0x4800) },
        Call { edx: 0x81, ..call(0x13, 0x1500) },
        Call { edx: 0x80, ebx: 0x1234, ..call(0x13, 0x4100) },
    ];
    // Cylinders, heads: of 16 heads as long as the cylinders' number has 10 bits, then of twice as many.
    for (count, cylinders, heads) in
        [(300usize, 1u32, 16u32), (16 * 63 * 5 + 1, 6, 16), (16 * 63 * 1024 + 1, 513, 32)]
    {
        let done = disk(count).make(&[26, 0], &calls);
        let c = &done.calls;
        assert!(c.iter().take(4).all(|call| !call.carry()), "{c:x?}");
        let (last, low) = (cylinders - 1, |n: u32| n & 0xFF);
        assert_eq!(c[0].ecx, low(last) << 8 | last >> 8 << 6 | 63);
        assert_eq!(c[0].edx, (heads - 1) << 8 | 1);
        assert_eq!((c[1].ah(), c[1].ecx << 16 | c[1].edx), (3, count as u32));
        assert_eq!((c[2].ax(), c[2].ebx, c[2].ecx), (0x3000, 0xAA55, 5));
        let told = done.bytes(DATA, 26);
        let word = |at: usize| u32::from_le_bytes(told[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4), word(8), word(12)), (3 << 16 | 26, cylinders, heads, 63));
        assert_eq!((word(16) as usize, word(20), told[24..].to_vec()), (count, 0, vec![0, 2]));
        assert!(c[4].carry() && c[4].ah() == 1, "a buffer without room");
        assert!(!c[5].carry() && c[5].ah() == 0, "no such drive");
        assert!(c[6].carry());
    }
}

#[test]
fn a_disk_of_1_44_mb_is_a_floppy() {
    let first = Numbered::new(FLOPPY);
    let written = Arc::clone(&first.written);
    let second = Numbered { protected: true, bad: 30..31, ..Numbered::new(FLOPPY) };
    let last = (79, 1, 18);
    let calls = [
        chs(0x0201, 0, last, 0x5000),
        chs(0x0224, 1, (0, 0, 1), 0x6000), // two tracks, on drive 1: sector 30 is bad
        chs(0x0301, 0, (2, 1, 18), DATA_SEGMENT),
        chs(0x0301, 1, (2, 1, 18), DATA_SEGMENT),
        chs(0x0424, 0, (0, 0, 1), 0),
        chs(0x0424, 1, (0, 0, 1), 0),
        Call { number: 0x40, ..chs(0x0201, 0, (1, 0, 1), 0x5100) },
        chs(0x0500, 0, (10, 1, 0), 0),
        chs(0x0202, 0, (10, 0, 18), 0x5200),
        chs(0x0C00, 0, (79, 0, 0), 0),
        chs(0x0201, 0, (80, 0, 1), 0x5000),
        chs(0x0201, 0, (0, 2, 1), 0x5000),
        chs(0x0201, 0, (0, 0, 19), 0x5000),
        chs(0x0202, 0, last, 0x5300), // and one beyond the end
        chs(0x1800, 0, (79, 0, 18), 0),
        chs(0x1800, 0, (79, 0, 9), 0),
        Call { edx: 0, ..call(0x13, 0x0800) },
        Call { edx: 1, ..call(0x13, 0x1500) },
        Call { edx: 2, ..call(0x13, 0x1500) },
        Call { edx: 0, ..call(0x13, 0x1600) },
        Call { edx: 1, ..call(0x13, 0x0000) },
        Call { edx: 1, ..call(0x13, 0x1000) },
        Call { edx: 0, ebx: 0x55AA, ..call(0x13, 0x4100) },
        call(0x11, 0),
        chs(0x0201, 0, (80, 0, 1), 0x5000),
        Call { edx: 0, ..call(0x13, 0x0100) },
        Call { edx: 0x80, ..call(0x13, 0x0100) },
    ];
    let drives = vec![first.drive(), second.drive()];
    let data = [0xC3; SECTOR];
    let done = Machine { drives, ..Machine::default() }.make(&data, &calls);
    let c = &done.calls;
    for n in [0, 2, 4, 6, 7, 8, 9, 14, 19, 20, 21] {
        assert!(well(&c[n]), "{n}: {:x?}", c[n]);
    }
    assert_eq!(done.bytes(0x5_0000, SECTOR), number(2879));
    assert!(failed(&c[1], 0x10) && c[1].ax() & 0xFF == 30, "{:x?}", c[1]);
    assert_eq!(done.bytes(0x6_0000, 30 * SECTOR), numbers(0..30));
    assert!(failed(&c[3], 0x03) && c[3].ax() & 0xFF == 0, "{:x?}", c[3]);
    assert_eq!((c[2].ax(), c[4].ax()), (1, 36));
    assert!(failed(&c[5], 0x10) && c[5].ax() & 0xFF == 30, "{:x?}", c[5]);
    assert_eq!(done.bytes(0x5_1000, SECTOR), number(36));
    // The last sector of head 0, and the first one of head 1, whose track was formatted.
    let formatted = (10 * 2 + 1) * 18;
    let track = [number(formatted - 1), [0xF6; SECTOR]].concat();
    assert_eq!(done.bytes(0x5_2000, 2 * SECTOR), track);
    for n in [10, 11, 12, 24] {
        assert!(failed(&c[n], 0x01), "{n}: {:x?}", c[n]);
    }
    assert!(failed(&c[13], 0x04) && c[13].ax() & 0xFF == 1, "{:x?}", c[13]);
    assert_eq!(done.bytes(0x5_3000, SECTOR), number(2879));
    assert!(failed(&c[15], 0x0C));
    // 80 cylinders, 2 heads, 18 sectors, 2 drives of kind 4; the table is the one of vector 1Eh.
    assert_eq!((c[16].ecx, c[16].edx, c[16].ebx), (0x4F12, 0x0102, 4));
    let table = done.bytes(0x1E * 4, 4);
    assert_eq!([c[16].edi as u16, c[16].es].map(u16::to_le_bytes).as_flattened(), table);
    let table = done.bytes(0xF_0000 + u64::from(c[16].edi), 11);
    assert_eq!((table[3], table[4], table[8]), (2, 18, 0xF6));
    assert!(!c[17].carry() && c[17].ah() == 2 && !c[18].carry() && c[18].ah() == 0);
    assert!(failed(&c[22], 0x01), "no linear addresses");
    assert_eq!(c[23].ax() & 0x00C1, 0x0041, "two floppy drives");
    assert!(failed(&c[25], 0x01) && well(&c[26]), "a status for each kind");
    assert_eq!(done.bytes(0x475, 1), [1], "hard disks");

    let written = written.lock().unwrap();
    let sectors: Vec<_> = written.sectors.keys().copied().collect();
    let expected: Vec<_> = [107].into_iter().chain(formatted..formatted + 18).collect();
    assert_eq!(sectors, expected);
    assert_eq!(written.sectors[&107], [0xC3; SECTOR]);
    assert_eq!(written.flushed, [1, 19], "once for each call");
}

#[test]
fn four_drives_have_numbers_and_tables() {
    // Primary slave, secondary master and slave. The second one is a floppy, so its neighbour is disk 82h.
    let drives = [200_000, FLOPPY, 4_000_000].map(|count| Numbered::new(count).drive());
    let drive = |edx, ax| Call { edx, ..call(0x13, ax) };
    let calls = [
        chs(0x0201, 0x81, (100, 3, 5), 0x5000),
        chs(0x0201, 0x82, (200, 60, 63), 0x5100),
        chs(0x0201, 0x00, (0, 1, 1), 0x5200),
        drive(0x81, 0x0800),
        drive(0x82, 0x0800),
        drive(0x83, 0x0800),
        drive(0x83, 0x1500),
        Call { esi: 0, ds: DATA_SEGMENT, ..drive(0x81, 0x4800) },
        Call { esi: 0x100, ds: DATA_SEGMENT, ..drive(0x82, 0x4800) },
        drive(0x82, 0x0000),
        drive(0x82, 0x0D00),
        drive(0x81, 0x0900),
        drive(0x81, 0x1000),
        drive(0x81, 0x1100),
        drive(0x81, 0x1400),
        chs(0x0C00, 0x81, (198, 0, 1), 0),
        chs(0x0C00, 0x81, (199, 0, 1), 0),
        drive(0x81, 0x0500), // tracks of a hard disk
        drive(0x81, 0x1600), // change line of one
        drive(0x81, 0x4500),
        drive(0x81, 0x4900),
        drive(0x81, 0x4B01),
        drive(0x81, 0x4E00),
        chs(0x0240, 0x82, (0, 0, 1), 0x6000), // the reset did no harm
    ];
    let mut data = vec![0; 0x200];
    data[0] = 74;
    data[0x100] = 30;
    let done = Machine { drives: drives.into(), ..Machine::default() }.make(&data, &calls);
    let c = &done.calls;
    for n in [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 23] {
        assert!(well(&c[n]), "{n}: {:x?}", c[n]);
    }
    for n in [5, 16, 17, 18, 19, 20, 21, 22] {
        assert!(failed(&c[n], 0x01), "{n}: {:x?}", c[n]);
    }
    assert!(!c[6].carry() && c[6].ah() == 0);
    assert_eq!(done.bytes(0x475, 1), [3]);
    // 16 heads; and 64, which 4 million sectors ask for.
    assert_eq!(done.bytes(0x5_0000, SECTOR), number((100 * 16 + 3) * 63 + 4));
    assert_eq!(done.bytes(0x5_1000, SECTOR), number((200 * 64 + 60) * 63 + 62));
    assert_eq!(done.bytes(0x5_2000, SECTOR), number(18));
    assert_eq!(done.bytes(0x6_0000, 64 * SECTOR), numbers(0..64));
    assert_eq!((c[3].ecx, c[3].edx), (198 << 8 | 63, 15 << 8 | 3), "199 cylinders, 3 disks");
    assert_eq!((c[4].ecx, c[4].edx), (0xE0FF, 63 << 8 | 3), "993 cylinders");

    // Vectors 41h and 46h: tables of 16 bytes for disks 80h and 81h.
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let far =
        |bytes: &[u8], at: usize| u64::from(word(bytes, at + 2)) * 16 + u64::from(word(bytes, at));
    for (vector, cylinders) in [(0x41, 1), (0x46, 199)] {
        let table = done.bytes(far(&done.bytes(vector * 4, 4), 0), 16);
        assert_eq!((word(&table, 0), table[2], table[14]), (cylinders, 16, 63), "{vector:x}h");
    }

    // 48h tells where a disk is, to who has room for it.
    let told = done.bytes(DATA, 74);
    assert_eq!((word(&told, 0), word(&told, 30), told[32]), (74, 0xBEDD, 44));
    assert_eq!(told[36..48], *b"ISA ATA     ");
    assert_eq!((word(&told, 48), told[56]), (0x1F0, 1), "primary slave");
    assert_eq!(told[30..].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let short = done.bytes(DATA + 0x100, 34);
    assert_eq!((word(&short, 0), &short[30..]), (30, &[0; 4][..]));
    for (at, base, control, device, irq) in
        [(DATA, 0x1F0, 0x3F6, 0xF0, 14), (DATA + 0x100, 0x170, 0x376, 0xF0, 15)]
    {
        let table = done.bytes(far(&done.bytes(at + 26, 4), 0), 16);
        assert_eq!((word(&table, 0), word(&table, 2)), (base, control));
        assert_eq!((table[4], table[6], table[7], table[14]), (device, irq, 16, 0x11));
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }
}

#[test]
fn addresses_have_48_bits_where_they_must() {
    let disk = Numbered::new(1 << 40);
    let written = Arc::clone(&disk.written);
    let starts = [(1 << 28) - 200, (1 << 32) + 3, (1 << 40) - 60, 1 << 40, 1 << 63, (1 << 35) + 7];
    let counts = [250, 100, 100, 1, 1, 40];
    let segments = [0x3000, 0x5000, 0x7000, 0x7000, 0x7000, DATA_SEGMENT];
    let packets = starts.into_iter().zip(counts).zip(segments);
    let packets = packets.map(|((lba, count), segment)| packet(count, 0, segment, lba));
    let mut data = packets.collect::<Vec<_>>().concat();
    // The last one is written, from behind them.
    data[5 * 16 + 4..][..2].copy_from_slice(&[0, 4]);
    data.resize(0x400, 0);
    data.extend(numbers(1000..1040));
    let read = |n: u32| by_packet(0x42, 0x81, n * 16);
    let calls = [
        read(0),
        read(1),
        read(2),
        by_packet(0x44, 0x81, 2 * 16),
        read(3),
        read(4),
        by_packet(0x43, 0x81, 5 * 16),
        by_packet(0x44, 0x81, 5 * 16),
        by_packet(0x47, 0x81, 5 * 16),
        by_packet(0x47, 0x81, 3 * 16),
        Call { edx: 0x81, ..call(0x13, 0x0800) },
        Call { edx: 0x81, ..call(0x13, 0x1500) },
        Call { edx: 0x81, esi: 0x300, ds: DATA_SEGMENT, ..call(0x13, 0x4800) },
        // Written with verification, which 48h does not promise; and a packet that is too short.
        Call { eax: 0x4302, ..by_packet(0x43, 0x81, 5 * 16) },
        by_packet(0x42, 0x81, 0x302),
    ];
    data[0x300] = 26;
    let done = Machine { drives: vec![disk.drive()], ..Machine::default() }.make(&data, &calls);
    let c = &done.calls;
    assert!(well(&c[0]) && well(&c[1]), "{c:x?}");
    for (at, lba, count) in [(0x3_0000, starts[0], 250), (0x5_0000, starts[1], 100)] {
        assert_eq!(done.bytes(at, count * SECTOR), numbers(lba..lba + count as u64), "{lba:x}");
    }
    let c = &c[2..];
    let count = |n: u64| {
        let bytes = done.bytes(DATA + n * 16 + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    };
    // What there is comes, and its number: here of the verification, which came after.
    assert!(failed(&c[0], 0x04), "{:x?}", c[0]);
    assert_eq!(done.bytes(0x7_0000, 60 * SECTOR), numbers((1 << 40) - 60..1 << 40));
    assert!(well(&c[1]) && count(2) == 60, "{:x?}", c[1]);
    assert!(failed(&c[2], 0x04) && count(3) == 0, "{:x?}", c[2]);
    assert!(failed(&c[3], 0x04) && count(4) == 0, "{:x?}", c[3]);
    assert!(well(&c[4]) && well(&c[5]) && well(&c[6]) && count(5) == 40, "{:x?}", &c[4..7]);
    assert!(failed(&c[7], 0x04));
    assert_eq!((c[8].ecx, c[8].edx), (0xFFFF, 254 << 8 | 2), "1024 cylinders of 255 heads");
    assert!(!c[9].carry() && (c[9].ah(), c[9].ecx, c[9].edx) == (3, 0xFFFF, 0xFFFF));
    assert_eq!(done.bytes(DATA + 0x300 + 16, 8), (1u64 << 40).to_le_bytes());
    assert!(failed(&c[11], 0x01) && failed(&c[12], 0x01));

    let written = written.lock().unwrap();
    let bytes: Vec<u8> = written.sectors.values().flatten().copied().collect();
    assert_eq!(bytes, numbers(1000..1040));
    assert_eq!(written.sectors.keys().next(), Some(&((1 << 35) + 7)));
    assert_eq!(written.flushed, [40], "once for all");
}

#[test]
fn a_bad_sector_ends_a_transfer_where_it_is() {
    let bad = || Numbered { bad: 110..111, ..Numbered::new(5000) };
    let disk = bad();
    let written = Arc::clone(&disk.written);
    let protected = Numbered { protected: true, ..Numbered::new(5000) };
    let packets = [
        packet(100, 0, 0x3000, 90),
        packet(100, 0, 0x5000, 90),
        packet(100, 0, 0x5000, 90),
        packet(5, 0, 0x5000, 90),
        packet(1, 0xFE10, 0xFFFF, 7),
        packet(1, 0x0010, 0xFFFF, 7),
        packet(127, 0xFFFE, 0x3000, 200),
    ];
    let calls = [
        by_packet(0x42, 0x81, 0),
        by_packet(0x44, 0x81, 16),
        by_packet(0x43, 0x81, 32),
        by_packet(0x43, 0x82, 48),
        by_packet(0x42, 0x81, 64), // ends behind FFFF:FFFF
        by_packet(0x42, 0x81, 80), // the first sector above 1 MiB
        by_packet(0x42, 0x82, 96),
    ];
    let drives = vec![disk.drive(), protected.drive()];
    let done = Machine { drives, ..Machine::default() }.make(&packets.concat(), &calls);
    let c = &done.calls;
    let counts: Vec<_> = (0..7).map(|n| done.bytes(DATA + n * 16 + 2, 1)[0]).collect();
    let status: Vec<_> = c.iter().map(|call| (call.carry(), call.ah())).collect();
    assert_eq!(
        (status, counts),
        (
            vec![
                (true, 0x10),
                (true, 0x10),
                (true, 0xCC),
                (true, 0x03),
                (true, 0x09),
                (false, 0),
                (false, 0)
            ],
            vec![20, 20, 20, 0, 0, 1, 127]
        )
    );
    assert_eq!(done.bytes(0x10_0000, SECTOR), number(7));
    assert_eq!(done.bytes(0x3_FFFE, 127 * SECTOR), numbers(200..327));
    let written = written.lock().unwrap();
    // The sectors in front of the bad one are on the disk, and safe, although the call has failed.
    assert!((90..110).all(|lba| written.sectors.contains_key(&lba)));
    assert_eq!(written.flushed.len(), 1);
}

/// A channel that is busy for ever.
struct Stuck;

impl Device for Stuck {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0x80);
    }
    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[test]
fn a_drive_that_hangs_does_not_hang_the_start() {
    let port = u64::from(CHANNELS[1].port);
    let other = Some((port..port + 8, shared(Stuck) as Arc<Mutex<dyn Device>>));
    let calls =
        [Call { edx: 0x80, ..call(0x13, 0x1500) }, Call { edx: 0x81, ..call(0x13, 0x1500) }];
    let done = Machine { other, ..Machine::default() }.make(b"", &calls);
    assert_eq!(done.calls.iter().map(Call::ah).collect::<Vec<_>>(), [3, 0]);
}
