//! Introduced by stage 04: devices, and the bus that finds them by address.
//!
//! A PC has two address spaces for devices: 64 Ki ports, reached by IN and OUT, and memory addresses where
//! no RAM is. Behind both stands the same [`Device`] with registers at offsets, so both are a [`Bus`]:
//! stage 04 has one of ports, stage 05 adds one of memory.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use crate::error::{Blame, Blamed};

// ANCHOR: device
/// Something with registers. It owns no thread and no global: it is called when the guest touches it.
pub trait Device: Send {
    /// The guest reads `data.len()` bytes at `offset` from the device's first address. `data` comes
    /// filled with ones, which is what an undriven bus reads as.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the device's first address.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// The guest reads several times at `offset`, `size` bytes each time, by one string instruction (`rep ins`).
    /// A device through which much data goes may do better than one after the other.
    fn read_each(&mut self, offset: u64, size: usize, data: &mut [u8]) {
        data.chunks_mut(size).for_each(|access| self.read(offset, access));
    }
}
// ANCHOR_END: device

/// How an interrupt leaves a device: an irqfd in production, a counter in tests.
pub trait Interrupt: Send {
    /// Raises the line for a moment (an edge).
    fn trigger(&self) -> std::io::Result<()>;
}

/// The counter in tests: how often the line was raised. Clones share it, one for the device and one to look at.
#[cfg(all(test, feature = "stage05"))]
#[derive(Clone, Debug, Default)]
pub(crate) struct CountedLine(Arc<std::sync::atomic::AtomicU32>);

#[cfg(all(test, feature = "stage05"))]
impl CountedLine {
    pub(crate) fn count(&self) -> u32 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[cfg(all(test, feature = "stage05"))]
impl Interrupt for CountedLine {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

/// A device on a bus, shared by the vCPUs and by whoever feeds it input.
pub type Shared<D> = Arc<Mutex<D>>;

/// A device's ports, `count` of them from `first` on, as addresses on a bus.
pub fn ports(first: u16, count: u16) -> Range<u64> {
    u64::from(first)..u64::from(first) + u64::from(count)
}

/// Makes a device that can be put on a bus and kept at hand.
pub fn shared<D: Device>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

/// Why a device cannot be put on a bus. A mistake in the monitor, not in the guest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Its range is empty.
    #[error("{name} has an empty address range")]
    Empty {
        /// The device's name.
        name: &'static str,
    },
    /// Another device is there.
    #[error("{name} at {range:#x?} overlaps {other}")]
    Overlap {
        /// The device's name.
        name: &'static str,
        /// The addresses that it asked for.
        range: Range<u64>,
        /// The name of the device that has some of them.
        other: &'static str,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

struct Entry {
    range: Range<u64>,
    name: &'static str,
    device: Arc<Mutex<dyn Device>>,
}

/// An address space of devices. It is built first and then only read, so vCPUs share it without a
/// lock; each device has its own.
#[derive(Default)]
pub struct Bus {
    // Sorted by the ranges' starts, without overlap.
    entries: Vec<Entry>,
}

impl Bus {
    /// A bus without devices, where every read gives ones.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at the addresses `range`.
    pub fn insert(
        &mut self,
        name: &'static str,
        range: Range<u64>,
        device: Arc<Mutex<dyn Device>>,
    ) -> Result<(), Error> {
        if range.is_empty() {
            return Err(Error::Empty { name });
        }
        let at = self.entries.partition_point(|entry| entry.range.start < range.start);
        let neighbours = self.entries[at.saturating_sub(1)..].iter().take(2);
        for entry in neighbours {
            if entry.range.start < range.end && range.start < entry.range.end {
                return Err(Error::Overlap { name, range, other: entry.name });
            }
        }
        self.entries.insert(at, Entry { range, name, device });
        Ok(())
    }

    /// The devices' addresses and names, in the order of their addresses.
    pub fn places(&self) -> impl Iterator<Item = (Range<u64>, &'static str)> {
        self.entries.iter().map(|entry| (entry.range.clone(), entry.name))
    }

    // ANCHOR: read
    /// One read of `data.len()` bytes. What no device answers reads as ones. Returns the name of the
    /// device, if there is one.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Option<&'static str> {
        data.fill(0xFF);
        let entry = self.find(addr, data.len())?;
        let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(addr - entry.range.start, data);
        Some(entry.name)
    }
    // ANCHOR_END: read

    /// One write. What no device takes is dropped. Returns the name of the device, if there is one.
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<&'static str> {
        let entry = self.find(addr, data.len())?;
        let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(addr - entry.range.start, data);
        Some(entry.name)
    }

    /// Each `size` bytes of `data` are one read of `addr`: string instructions (`rep insb` and its kin) arrive as
    /// one exit for many accesses to the same port. `size` is not 0.
    pub fn read_each(&self, addr: u64, size: usize, data: &mut [u8]) -> Option<&'static str> {
        data.fill(0xFF);
        let entry = self.find(addr, size)?;
        let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read_each(addr - entry.range.start, size, data);
        Some(entry.name)
    }

    /// Each `size` bytes of `data` are one write to `addr`, as with `rep outsb`.
    pub fn write_each(&self, addr: u64, size: usize, data: &[u8]) -> Option<&'static str> {
        data.chunks(size).fold(None, |_, access| self.write(addr, access))
    }

    // ANCHOR: find
    /// The device that has all of an access: one that reaches past its end belongs to nobody, as on a
    /// bus that decodes addresses.
    /// The name of the device at `addr`.
    pub fn name(&self, addr: u64) -> Option<&'static str> {
        self.find(addr, 1).map(|entry| entry.name)
    }

    fn find(&self, addr: u64, len: usize) -> Option<&Entry> {
        let at = self.entries.partition_point(|entry| entry.range.start <= addr).checked_sub(1)?;
        let entry = &self.entries[at];
        let end = addr.checked_add(len as u64)?;
        (end <= entry.range.end).then_some(entry)
    }
    // ANCHOR_END: find
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.entries.iter().map(|entry| (&entry.range, entry.name))).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers with the offset and remembers what was written.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl Device for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn devices_are_found_at_their_offsets_and_holes_read_as_ones() {
        let probe = shared(Probe::default());
        let mut bus = Bus::new();
        bus.insert("probe", 0x10..0x14, probe.clone()).unwrap();
        let mut byte = [0];
        assert_eq!(bus.read(0x12, &mut byte), Some("probe"));
        assert_eq!(byte, [2]);
        for hole in [0x0F, 0x14, u64::MAX] {
            assert_eq!(bus.read(hole, &mut byte), None);
            assert_eq!(byte, [0xFF]);
        }
        assert_eq!(bus.write(0x10, &[1, 2]), Some("probe"));
        assert_eq!(bus.write(0x13, &[1, 2]), None, "reaches past the end");
        assert_eq!(probe.lock().unwrap().0, [(0, vec![1, 2])]);
    }

    proptest! {
        #[test]
        fn string_io_is_one_access_after_the_other(
            size in prop::sample::select(vec![1, 2, 4]),
            count in 0..100usize,
            seed: u8,
        ) {
            let data: Vec<u8> = (0..size * count).map(|at| seed.wrapping_add(at as u8)).collect();
            let probe = shared(Probe::default());
            let mut bus = Bus::new();
            bus.insert("probe", 0x10..0x18, probe.clone()).unwrap();
            prop_assert_eq!(bus.write_each(0x13, size, &data), (count > 0).then_some("probe"));
            prop_assert_eq!(bus.write_each(0x80, size, &data), None);
            let expected: Vec<_> = data.chunks(size).map(|access| (3, access.to_vec())).collect();
            prop_assert_eq!(&probe.lock().unwrap().0, &expected);

            let mut read = data.clone();
            bus.read_each(0x13, size, &mut read);
            prop_assert!(read.iter().all(|&byte| byte == 3));
            bus.read_each(0x80, size, &mut read);
            prop_assert!(read.iter().all(|&byte| byte == 0xFF));
        }
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.insert("a", 0x10..0x20, shared(Probe::default())).unwrap();
        for range in [0x10..0x20, 0x0..0x11, 0x1F..0x30, 0x12..0x13, 0x0..0x100] {
            let error = bus.insert("b", range, shared(Probe::default())).unwrap_err();
            assert!(matches!(error, Error::Overlap { other: "a", .. }), "{error}");
        }
        let error = bus.insert("b", 5..5, shared(Probe::default())).unwrap_err();
        assert_eq!(error, Error::Empty { name: "b" });
        bus.insert("b", 0x20..0x21, shared(Probe::default())).unwrap();
        bus.insert("c", 0x0F..0x10, shared(Probe::default())).unwrap();
    }
}
