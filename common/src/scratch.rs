//! Introduced by stage 05: the simplest device, some bytes that keep what is written to them.

use crate::bus::Device;

/// Registers without a meaning: they read as what was last written, in any size and alignment.
#[derive(Debug, PartialEq, Eq)]
pub struct Scratch {
    bytes: Vec<u8>,
    writes: u64,
}

impl Scratch {
    /// `size` bytes of zeros.
    pub fn new(size: usize) -> Self {
        Self::holding(vec![0; size])
    }

    /// What reads as `bytes` until it is written.
    pub fn holding(bytes: Vec<u8>) -> Self {
        Self { bytes, writes: 0 }
    }

    /// What the guest has written so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many writes have arrived.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The bytes of an access, if it lies in the device.
    fn at(&mut self, offset: u64, len: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get_mut(start..start.checked_add(len)?)
    }
}

impl Device for Scratch {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(bytes) = self.at(offset, data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(bytes) = self.at(offset, data.len()) {
            bytes.copy_from_slice(data);
            self.writes += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::{Bus, shared};

    /// Where the device of these tests stands: not at the start of a page, and not a power of two long.
    const BASE: u64 = 0xFF3;
    const SIZE: usize = 0x25;

    proptest! {
        /// KVM splits an access that crosses a page, and may hand over 16 bytes as two times 8. The
        /// pieces must come to the same as the whole, on the bus and in the device, for a write and
        /// for a read, wherever the access lies in it.
        #[test]
        fn an_access_in_pieces_comes_to_the_same_as_the_whole(
            start in 0..SIZE,
            data in prop::collection::vec(any::<u8>(), 1..=16),
            cut in 0_usize..16,
        ) {
            prop_assume!(start + data.len() <= SIZE);
            let cut = cut.min(data.len());
            let device = shared(Scratch::new(SIZE));
            let mut bus = Bus::new();
            bus.insert("scratch", BASE..BASE + SIZE as u64, device.clone()).unwrap();
            let addr = BASE + start as u64;
            for (at, piece) in [(addr, &data[..cut]), (addr + cut as u64, &data[cut..])] {
                if !piece.is_empty() {
                    prop_assert_eq!(bus.write(at, piece), Some("scratch"));
                }
            }
            let mut expected = vec![0; SIZE];
            expected[start..start + data.len()].copy_from_slice(&data);
            prop_assert_eq!(device.lock().unwrap().bytes().to_vec(), expected);

            let mut whole = vec![0; data.len()];
            bus.read(addr, &mut whole);
            prop_assert_eq!(&whole, &data);
        }

        /// Wherever a guest reads and writes, only the bytes of the device change, and what it does
        /// not have reads as ones.
        #[test]
        fn accesses_around_the_device_leave_it_alone(
            addr in prop_oneof![BASE - 20..BASE + 80, any::<u64>()],
            len in 1_usize..=8,
        ) {
            let device = shared(Scratch::new(SIZE));
            let mut bus = Bus::new();
            bus.insert("scratch", BASE..BASE + SIZE as u64, device.clone()).unwrap();
            let inside = addr >= BASE
                && addr.checked_add(len as u64).is_some_and(|end| end <= BASE + SIZE as u64);
            let hit = inside.then_some("scratch");
            let mut data = vec![0x5A; len];
            prop_assert_eq!(bus.read(addr, &mut data), hit);
            prop_assert_eq!(data, vec![if inside { 0 } else { 0xFF }; len]);
            prop_assert_eq!(bus.write(addr, &vec![1; len]), hit);
            prop_assert_eq!(device.lock().unwrap().writes(), u64::from(inside));
        }
    }
}
