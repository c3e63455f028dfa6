//! Introduced by stage 08: a disk (VIRTIO 1.2, 5.2 "Block Device").
//!
//! One queue. Each chain on it is a request: 16 bytes that say what and from which sector on, then the data, one way
//! or the other, and one byte for how it went. Behind it are the same [`Sectors`] as behind stage 07's IDE drive, which
//! took an exit for each two bytes of them; here the guest hands over as much as it likes at once, goes on with other
//! things, and hears of it by one interrupt.
//!
//! ```text
//!   readable                                writable
//!   type, 0, sector | data (OUT, DISCARD..)   data (IN, GET_ID) | status
//!     4   4     8                                                  1
//! ```
//!
//! How a request is cut into descriptors is the driver's choice (VIRTIO 1.2, 2.7.4).

use std::io::{self, Read as _, Write as _};

use serde::de::Error as _;
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{Reader, Writer};

use super::{Broken, Device, Rings, copy_config};
use crate::disk::{SECTOR, Sectors};
use crate::snapshot;

/// The only queue.
const REQUESTS: usize = 0;

const QUEUE_SIZE: u16 = 256;

/// Pieces of data in a request: the queue's size without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Bytes in a piece.
const SIZE_MAX: u32 = 1 << 20;

/// Bytes of data in a request. So a request's end is near, and its length fits into the used ring's 32 bits.
const MOST: usize = SEG_MAX as usize * SIZE_MAX as usize;

/// Ranges in a request to discard or to write zeros, 16 bytes each.
const RANGES_MAX: usize = 16;
const RANGE: usize = 16;

/// Sectors in such a range: 4 GiB to discard, and 128 MiB to write, since the host may have to do it with real zeros.
const DISCARD_MAX: u32 = 8 << 20;
const ZEROES_MAX: u32 = 256 << 10;

/// Bytes in the answer to GET_ID.
pub const SERIAL_LEN: usize = 20;

/// Data is on its way through here, so much at a time: it stays in the processor's cache. A guest that changes its
/// buffers meanwhile changes nothing here.
const BOUNCE: usize = 128 << 10;

/// How a request failed: the status that the driver sees.
struct Failed(u32);

const BAD: Failed = Failed(VIRTIO_BLK_S_IOERR);
const UNSUPPORTED: Failed = Failed(VIRTIO_BLK_S_UNSUPP);

/// The host's error: the driver gets no more detail than of a bad request.
impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        BAD
    }
}

/// A disk.
pub struct Blk {
    disk: Box<dyn Sectors>,
    serial: [u8; SERIAL_LEN],
    /// The features that the driver has chosen.
    features: u64,
    bounce: Box<[u8]>,
}

impl Blk {
    /// A disk with these sectors. The guest finds the first 20 bytes of `serial` in `/sys/block/vda/serial`.
    pub fn new(disk: Box<dyn Sectors>, serial: &[u8]) -> Self {
        let mut id = [0; SERIAL_LEN];
        copy_config(serial, 0, &mut id);
        Self { disk, serial: id, features: 0, bounce: vec![0; BOUNCE].into() }
    }

    fn chose(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Does what the driver asks for. `request` has the header and what is to be written; the answer goes to `data`.
    fn handle(&mut self, request: &mut Reader<'_>, data: &mut Writer<'_>) -> Result<(), Failed> {
        let mut header = [0; 16];
        request.read_exact(&mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (what, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        match what {
            VIRTIO_BLK_T_IN => self.read(sector, data),
            VIRTIO_BLK_T_OUT => self.write(sector, request),
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush()?),
            VIRTIO_BLK_T_GET_ID => {
                let len = data.available_bytes().min(SERIAL_LEN);
                Ok(data.write_all(&self.serial[..len])?)
            }
            VIRTIO_BLK_T_DISCARD if self.chose(VIRTIO_BLK_F_DISCARD) => {
                self.each_range(request, DISCARD_MAX, 0, |disk, sector, count, _| {
                    disk.discard(sector, count)
                })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.chose(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                self.each_range(request, ZEROES_MAX, unmap, |disk, sector, count, flags| {
                    disk.write_zeroes(sector, count, flags & unmap != 0)
                })?;
                self.written()
            }
            _ => Err(UNSUPPORTED),
        }
    }

    fn read(&mut self, mut sector: u64, data: &mut Writer<'_>) -> Result<(), Failed> {
        self.check(sector, data.available_bytes())?;
        while data.available_bytes() > 0 {
            let piece = &mut self.bounce[..data.available_bytes().min(BOUNCE)];
            self.disk.read(sector, piece)?;
            data.write_all(piece)?;
            sector += (piece.len() / SECTOR) as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut sector: u64, data: &mut Reader<'_>) -> Result<(), Failed> {
        self.check(sector, data.available_bytes())?;
        if self.disk.write_protected() {
            return Err(BAD);
        }
        while data.available_bytes() > 0 {
            let piece = &mut self.bounce[..data.available_bytes().min(BOUNCE)];
            data.read_exact(piece)?;
            self.disk.write(sector, piece)?;
            sector += (piece.len() / SECTOR) as u64;
        }
        self.written()
    }

    /// A driver that has not taken FLUSH will never ask for one: what it is told to be written has to be
    /// (VIRTIO 1.2, 5.2.5.2).
    fn written(&mut self) -> Result<(), Failed> {
        if !self.chose(VIRTIO_BLK_F_FLUSH) {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Whether so many bytes are whole sectors, and all of them there.
    fn check(&self, sector: u64, bytes: usize) -> Result<(), Failed> {
        let end = sector.checked_add((bytes / SECTOR) as u64);
        let there = end.is_some_and(|end| end <= self.disk.count());
        if there && bytes.is_multiple_of(SECTOR) && bytes <= MOST { Ok(()) } else { Err(BAD) }
    }

    /// Calls `act` for each range in the request, with its first sector, its length in sectors and its flags, after
    /// all were found to be on the disk and to have no other flags than `known`.
    fn each_range(
        &mut self,
        request: &mut Reader<'_>,
        most: u32,
        known: u32,
        act: impl Fn(&mut dyn Sectors, u64, u64, u32) -> io::Result<()>,
    ) -> Result<(), Failed> {
        let mut bytes = [0; RANGES_MAX * RANGE];
        let bytes = bytes.get_mut(..request.available_bytes()).ok_or(BAD)?;
        request.read_exact(bytes)?;
        let (ranges, []) = bytes.as_chunks::<RANGE>() else { return Err(BAD) };
        let ranges = ranges.iter().map(|range| {
            let [a, b, c, d, e, f, g, h, count @ .., f0, f1, f2, f3] = *range;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            (sector, u32::from_le_bytes(count), u32::from_le_bytes([f0, f1, f2, f3]))
        });
        for (sector, count, flags) in ranges.clone() {
            if flags & !known != 0 {
                return Err(UNSUPPORTED);
            }
            let end = sector.checked_add(count.into());
            if count > most || end.is_none_or(|end| end > self.disk.count()) {
                return Err(BAD);
            }
        }
        for (sector, count, flags) in ranges {
            act(&mut *self.disk, sector, count.into(), flags)?;
        }
        Ok(())
    }
}

impl Device for Blk {
    fn kind(&self) -> u32 {
        2
    }

    fn name(&self) -> &'static str {
        "virtio blk"
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let may_write = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let protected = self.disk.write_protected();
        let depends = if protected { &[VIRTIO_BLK_F_RO][..] } else { &may_write };
        [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ]
        .iter()
        .chain(depends)
        .fold(0, |features, bit| features | 1 << bit)
    }

    /// VIRTIO 1.2, 5.2.4 "Device configuration layout".
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, &self.disk.count().to_le_bytes());
        set(8, &SIZE_MAX.to_le_bytes());
        set(12, &SEG_MAX.to_le_bytes());
        set(20, &(SECTOR as u32).to_le_bytes());
        // Writes are best in blocks of 2^3 sectors, aligned: that is what file systems on the host are made of.
        set(24, &[3]);
        set(26, &8u16.to_le_bytes());
        set(34, &1u16.to_le_bytes());
        set(36, &DISCARD_MAX.to_le_bytes());
        set(40, &(RANGES_MAX as u32).to_le_bytes());
        // Aligned at those blocks, too.
        set(44, &8u32.to_le_bytes());
        set(48, &ZEROES_MAX.to_le_bytes());
        set(52, &(RANGES_MAX as u32).to_le_bytes());
        set(56, &[1]);
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        const OUTSIDE: Broken = Broken("buffers are not in its memory");
        while let Some(chain) = rings.take(REQUESTS)? {
            let head = chain.head_index();
            let mut request = chain.clone().reader(rings.ram()).map_err(|_| OUTSIDE)?;
            let mut data = chain.writer(rings.ram()).map_err(|_| OUTSIDE)?;
            // The last byte of all.
            let status_at = data.available_bytes().checked_sub(1);
            let status_at = status_at.ok_or(Broken("request has no room for its status"))?;
            let mut status = data.split_at(status_at).map_err(|_| OUTSIDE)?;
            let done = match self.handle(&mut request, &mut data) {
                Ok(()) => VIRTIO_BLK_S_OK,
                Err(Failed(status)) => status,
            };
            status.write_all(&[done as u8]).map_err(|_| OUTSIDE)?;
            // As far as everything before has been written, too (VIRTIO 1.2, 2.7.8.2).
            let whole = data.available_bytes() == 0;
            let written = data.bytes_written() + usize::from(whole);
            rings.give(REQUESTS, head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
    }

    /// Whoever copies the disk's file to go with the snapshot, or asks when it was changed last, finds all of it there.
    fn settle(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn keep(&self) -> Value {
        self.disk.count().into()
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let (had, has) = (snapshot::read::<u64>(state)?, self.disk.count());
        if had == has {
            return Ok(());
        }
        Err(serde_json::Error::custom(format!(
            "the disk had {had} sectors then, this one has {has}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, MutexGuard};

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::virtio::tests::{Buffer, Driver, MEMORY, hostile_chains};

    const COUNT: u64 = 64;
    const VERSION_1: u64 = 1 << 32;

    /// A disk that can be looked at from outside, and be broken.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        bytes: Vec<u8>,
        /// What was asked for, beside reading.
        log: Vec<String>,
        broken: bool,
        protected: bool,
    }

    impl Fake {
        /// Each sector is filled with its number.
        fn new() -> Self {
            let fake = Self::default();
            fake.0.lock().unwrap().bytes = (0..COUNT as u8).flat_map(|n| [n; SECTOR]).collect();
            fake
        }

        fn log(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap().log)
        }

        fn act(&self, what: String) -> io::Result<MutexGuard<'_, State>> {
            let mut state = self.0.lock().unwrap();
            state.log.push(what);
            if state.broken { Err(io::Error::other("broken")) } else { Ok(state) }
        }

        fn driver(&self) -> Driver {
            Driver::new(Blk::new(Box::new(self.clone()), b"serial"))
        }
    }

    impl Sectors for Fake {
        fn count(&self) -> u64 {
            COUNT
        }

        fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
            let mut state = self.act(String::new())?;
            state.log.pop();
            Sectors::read(&mut state.bytes, lba, data)
        }

        fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
            let mut state = self.act(format!("write {lba} {}", data.len() / SECTOR))?;
            Sectors::write(&mut state.bytes, lba, data)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.act("flush".into()).map(drop)
        }

        fn write_zeroes(&mut self, lba: u64, count: u64, unmap: bool) -> io::Result<()> {
            let mut state = self.act(format!("zero {lba} {count} {unmap}"))?;
            state.bytes.write_zeroes(lba, count, unmap)
        }

        fn discard(&mut self, lba: u64, count: u64) -> io::Result<()> {
            self.act(format!("discard {lba} {count}")).map(drop)
        }

        fn write_protected(&self) -> bool {
            self.0.lock().unwrap().protected
        }
    }

    fn header(what: u32, sector: u64) -> Vec<u8> {
        [&what.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    /// Sends a request. Gives its status, what it got before that, and the length that came back.
    fn ask(driver: &mut Driver, request: &[u8], len: usize) -> (u32, Vec<u8>, u32) {
        driver.put(0, &[Buffer::In(request), Buffer::Out(len as u32 + 1)]);
        driver.serve();
        let mut used = driver.used(0).expect("an answer");
        let status = used.data.pop().unwrap();
        (status.into(), used.data, used.len)
    }

    /// The status of a request with data.
    fn send(driver: &mut Driver, what: u32, sector: u64, data: &[u8]) -> u32 {
        ask(driver, &[&header(what, sector), data].concat(), 0).0
    }

    const OK: u32 = VIRTIO_BLK_S_OK;
    const IOERR: u32 = VIRTIO_BLK_S_IOERR;
    const UNSUPP: u32 = VIRTIO_BLK_S_UNSUPP;
    const IN: u32 = VIRTIO_BLK_T_IN;
    const OUT: u32 = VIRTIO_BLK_T_OUT;
    const FLUSH: u32 = VIRTIO_BLK_T_FLUSH;
    const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
    const ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

    #[test]
    fn a_driver_is_told_what_the_disk_is() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        let config = driver.config(0, 64);
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(0), u32_at(4)), (COUNT as u32, 0));
        assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (1 << 20, 254, 512));
        assert_eq!((config[24], u32_at(36), u32_at(48)), (3, 8 << 20, 256 << 10));
        assert_eq!((u32_at(40), u32_at(52), u32_at(56)), (16, 16, 1));
        assert_eq!(u32_at(60), 0);
        // SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY; then what only a disk that is written to has.
        let always = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10;
        assert_eq!(driver.offered() & 0xFF_FFFF, always | 1 << 13 | 1 << 14);
        fake.0.lock().unwrap().protected = true;
        assert_eq!(driver.offered() & 0xFF_FFFF, always | 1 << 5);

        let id = header(VIRTIO_BLK_T_GET_ID, 0);
        let serial = [&b"serial"[..], &[0; 14]].concat();
        assert_eq!(ask(&mut driver, &id, 20), (OK, serial, 21));
        assert_eq!(ask(&mut driver, &id, 3), (OK, b"ser".to_vec(), 4));
    }

    #[test]
    fn sectors_are_written_and_read() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        assert_eq!(ask(&mut driver, &header(IN, 7), SECTOR), (OK, vec![7; SECTOR], 513));
        let data: Vec<u8> = (0..2 * SECTOR).map(|n| n as u8).collect();
        assert_eq!(send(&mut driver, OUT, COUNT - 2, &data), OK);
        assert_eq!(ask(&mut driver, &header(IN, COUNT - 2), 2 * SECTOR), (OK, data, 1025));
        assert_eq!(fake.log(), ["write 62 2"]);
        assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
        assert_eq!(fake.log(), ["flush"]);
    }

    #[test]
    fn data_longer_than_the_bounce_buffer_goes_through_in_pieces() {
        let sectors = 3 * BOUNCE / SECTOR + 1;
        let mut driver = Driver::new(Blk::new(Box::new(vec![0; 2 * sectors * SECTOR]), b""));
        let data: Vec<u8> = (0..sectors * SECTOR).map(|n| (n / 100) as u8).collect();
        assert_eq!(send(&mut driver, OUT, 1, &data), OK);
        let (status, read, _) = ask(&mut driver, &header(IN, 1), data.len());
        assert!(status == OK && read == data);
    }

    #[test]
    fn without_flush_everything_is_written_at_once() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        let features = driver.offered() & !(1 << VIRTIO_BLK_F_FLUSH);
        driver.begin(features);
        assert_eq!(send(&mut driver, OUT, 1, &[1; SECTOR]), OK);
        assert_eq!(fake.log(), ["write 1 1", "flush"]);
        assert_eq!(send(&mut driver, ZEROES, 0, &range(1, 1, 0)), OK);
        assert_eq!(fake.log(), ["zero 1 1 false", "flush"]);
    }

    #[test]
    fn ranges_are_discarded_and_zeroed() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        let two = [range(1, 2, 0), range(60, 4, 1)].concat();
        assert_eq!(send(&mut driver, ZEROES, 0, &two), OK);
        assert_eq!(fake.log(), ["zero 1 2 false", "zero 60 4 true"]);
        assert_eq!(ask(&mut driver, &header(IN, 2), SECTOR).1, [0; SECTOR]);
        assert_eq!(ask(&mut driver, &header(IN, 3), SECTOR).1, [3; SECTOR]);
        assert_eq!(send(&mut driver, DISCARD, 0, &range(8, 8, 0)), OK);
        assert_eq!(fake.log(), ["discard 8 8"]);
        // Nothing at all is done when one of them is wrong.
        for (what, ranges, status) in [
            (DISCARD, range(0, 1, 1), UNSUPP), // to unmap is what it does anyway
            (DISCARD, range(0, 1, 2), UNSUPP),
            (ZEROES, range(0, 1, 2), UNSUPP),
            (ZEROES, [range(0, 1, 0), range(0, 1, 2)].concat(), UNSUPP),
            (ZEROES, [range(0, 1, 0), range(64, 1, 0)].concat(), IOERR),
            (ZEROES, range(u64::MAX, 1, 0), IOERR),
            (ZEROES, range(0, u32::MAX, 0), IOERR),
            (DISCARD, range(0, 65, 0), IOERR),
            (DISCARD, range(0, 1, 0)[..15].to_vec(), IOERR),
            (DISCARD, range(0, 1, 0).repeat(17), IOERR),
        ] {
            assert_eq!(send(&mut driver, what, 0, &ranges), status, "{what} {ranges:?}");
            assert_eq!(fake.log(), [""; 0], "{what} {ranges:?}");
        }
        assert_eq!(send(&mut driver, DISCARD, 0, &range(0, 1, 0).repeat(16)), OK);
    }

    #[test]
    fn bad_requests_are_refused_and_change_nothing() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        for (what, sector, len) in [
            (IN, COUNT, SECTOR),
            (IN, COUNT - 1, 2 * SECTOR),
            (IN, u64::MAX, SECTOR),
            (IN, 0, SECTOR - 1),
            (IN, 0, 1),
        ] {
            let (status, data, written) = ask(&mut driver, &header(what, sector), len);
            assert_eq!((status, data, written), (IOERR, vec![0; len], 0), "{what} {sector} {len}");
        }
        for (what, sector, len, status) in [
            (OUT, COUNT, SECTOR, IOERR),
            (OUT, COUNT - 1, 2 * SECTOR, IOERR),
            (OUT, u64::MAX, SECTOR, IOERR),
            (OUT, 0, SECTOR + 1, IOERR),
            (2, 0, SECTOR, UNSUPP), // SCSI, of the legacy interface
            (14, 0, 16, UNSUPP),    // SECURE_ERASE, which is not offered
            (u32::MAX, 0, 0, UNSUPP),
        ] {
            let got = send(&mut driver, what, sector, &vec![1; len]);
            assert_eq!(got, status, "{what} {sector} {len}");
        }
        // A header that isn't there.
        assert_eq!(ask(&mut driver, &header(IN, 0)[..15], SECTOR).0, IOERR);
        assert_eq!(fake.log(), [""; 0]);
        // What wasn't chosen isn't done.
        driver.begin(VERSION_1);
        assert_eq!(send(&mut driver, DISCARD, 0, &range(0, 1, 0)), UNSUPP);
        assert_eq!(send(&mut driver, ZEROES, 0, &range(0, 1, 0)), UNSUPP);
        assert!(!driver.broken());
    }

    #[test]
    fn a_request_that_cannot_be_answered_breaks_the_device() {
        for buffers in [&[][..], &[Buffer::In(&[0; 16])], &[Buffer::In(&[0; 16]), Buffer::Out(0)]] {
            let mut driver = Fake::new().driver();
            if buffers.is_empty() {
                driver.descriptor(0, 0, MEMORY, 16, 0, 0);
                driver.offer(0, 0);
            } else {
                driver.put(0, buffers);
            }
            driver.serve();
            assert!(driver.broken() && driver.used(0).is_none(), "{buffers:?}");
            let features = driver.offered();
            driver.begin(features);
            assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
        }
    }

    #[test]
    fn more_data_than_a_request_may_have_is_refused() {
        let fake = Fake::new();
        let mut driver = fake.driver();
        let size = (MEMORY / 2) as u32;
        // 33 times the same 8 MiB by an indirect table (VIRTIO 1.2, 2.7.5.3) are 264 MiB.
        let table = 0x20_0000;
        let entry = |index: u64, at: u64, len: u32, flags: u16, next: u16| {
            let bytes = [
                &at.to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            let to = GuestAddress(table + 16 * index);
            driver.ram.write_slice(&bytes.concat(), to).unwrap();
        };
        let head = 0x30_0000;
        driver.ram.write_slice(&header(IN, 0), GuestAddress(head)).unwrap();
        entry(0, head, 16, 1, 1);
        for index in 1..=33 {
            let last = index == 33;
            entry(index, MEMORY / 2, size, u16::from(!last) | 2, index as u16 + 1);
        }
        driver.descriptor(0, 0, table, 34 * 16, 4, 0);
        driver.offer(0, 0);
        driver.serve();
        let used = driver.used(0).unwrap();
        assert_eq!((used.head, used.len), (0, 0));
        let status: u8 = driver.ram.read_obj(GuestAddress(MEMORY - 1)).unwrap();
        assert_eq!(u32::from(status), IOERR);
    }

    #[test]
    fn a_protected_disk_and_a_broken_one_fail_as_such() {
        let fake = Fake::new();
        fake.0.lock().unwrap().protected = true;
        let mut driver = fake.driver();
        assert_eq!(send(&mut driver, OUT, 1, &[1; SECTOR]), IOERR);
        assert_eq!(send(&mut driver, ZEROES, 0, &range(1, 1, 0)), UNSUPP);
        assert_eq!(send(&mut driver, DISCARD, 0, &range(1, 1, 0)), UNSUPP);
        assert_eq!(fake.log(), [""; 0]);
        assert_eq!(ask(&mut driver, &header(IN, 1), SECTOR).1, [1; SECTOR]);

        let fake = Fake::new();
        let mut driver = fake.driver();
        fake.0.lock().unwrap().broken = true;
        assert_eq!(ask(&mut driver, &header(IN, 1), SECTOR), (IOERR, vec![0; SECTOR], 0));
        assert_eq!(send(&mut driver, OUT, 1, &[1; SECTOR]), IOERR);
        assert_eq!(send(&mut driver, FLUSH, 0, &[]), IOERR);
        assert_eq!(send(&mut driver, ZEROES, 0, &range(1, 1, 0)), IOERR);
        assert_eq!(send(&mut driver, DISCARD, 0, &range(1, 1, 0)), IOERR);
    }

    proptest! {
        #[test]
        fn hostile_chains_do_no_harm(chains in hostile_chains()) {
            Fake::new().driver().survives(chains);
        }

        /// Requests of all kinds, for sectors here and elsewhere, with lengths that make no sense.
        #[test]
        fn requests_that_make_no_sense_do_no_harm(
            requests in prop::collection::vec(
                (0..16u32, prop_oneof![0..2 * COUNT, any::<u64>()], prop::collection::vec(any::<u8>(), 0..1200), 0..1200usize),
                1..12,
            ),
        ) {
            let fake = Fake::new();
            let mut driver = fake.driver();
            for (what, sector, data, room) in requests {
                let (status, ..) = ask(&mut driver, &[header(what, sector), data].concat(), room);
                prop_assert!([OK, IOERR, UNSUPP].contains(&status));
            }
            prop_assert_eq!(fake.0.lock().unwrap().bytes.len(), COUNT as usize * SECTOR);
        }

        /// Where descriptors begin and end means nothing.
        #[test]
        fn requests_are_cut_anywhere(
            sector in 0..COUNT, count in 0..8usize, byte: u8, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let fake = Fake::new();
            let mut driver = fake.driver();
            let count = count.min((COUNT - sector) as usize);
            let data: Vec<u8> = (0..count * SECTOR).map(|n| (n as u8).wrapping_mul(byte)).collect();
            let split = |len: usize| {
                let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(len + 1)).chain([0, len]).collect();
                at.sort_unstable();
                at.windows(2).map(|w| w[0]..w[1]).collect::<Vec<_>>()
            };
            let request = [header(OUT, sector), data.clone()].concat();
            let mut buffers: Vec<_> = split(request.len()).into_iter().map(|r| Buffer::In(&request[r])).collect();
            buffers.push(Buffer::Out(1));
            driver.put(0, &buffers);
            driver.serve();
            let used = driver.used(0).unwrap();
            prop_assert_eq!((used.data, used.len), (vec![OK as u8], 1));

            let request = header(IN, sector);
            let mut buffers = vec![Buffer::In(&request[..8]), Buffer::In(&request[8..])];
            buffers.extend(split(data.len() + 1).into_iter().map(|r| Buffer::Out(r.len() as u32)));
            driver.put(0, &buffers);
            driver.serve();
            let used = driver.used(0).unwrap();
            prop_assert_eq!(used.len as usize, data.len() + 1);
            prop_assert_eq!(used.data, [data, vec![OK as u8]].concat());
        }

        /// Whatever stands on the ring: the device answers or gives up, and works after a reset.
        #[test]
        fn nonsense_does_no_harm(
            table in prop::collection::vec((hostile(), hostile(), 0..8u16, 0..10u16), 8),
            heads in prop::collection::vec(0..10u16, 1..8),
            requests in prop::collection::vec((0..16u32, hostile(), any::<[u8; 32]>()), 4),
        ) {
            let fake = Fake::new();
            let mut driver = fake.driver();
            for (number, (what, sector, more)) in requests.into_iter().enumerate() {
                let bytes = [header(what, sector % 100), more.to_vec()].concat();
                let to = GuestAddress(number as u64 * 512);
                driver.ram.write_slice(&bytes, to).unwrap();
            }
            for (index, (at, len, flags, next)) in (0..).zip(table) {
                driver.descriptor(0, index, at, len as u32, flags, next);
            }
            heads.into_iter().for_each(|head| driver.offer(0, head));
            driver.serve();
            let features = driver.offered();
            driver.begin(features);
            prop_assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
            prop_assert_eq!(fake.0.lock().unwrap().bytes.len(), COUNT as usize * SECTOR);
        }
    }

    /// Addresses and lengths that mean something, and others.
    fn hostile() -> impl Strategy<Value = u64> {
        prop_oneof![
            (0..4u64).prop_map(|n| n * 512),
            Just(16),
            Just(513),
            0..4096u64,
            Just(MEMORY - 1),
            any::<u64>(),
        ]
    }
}
