//! Who owns which 4 KiB frame of memory: one bit a frame.

use kernel_abi::boot::{E820_RAM, E820Entry};

/// The unit of paging.
pub const FRAME_SIZE: u64 = 4096;

/// The kernel maps and uses the first GiB at most; what a loader reports above stays untouched.
pub const LIMIT: u64 = 1 << 30;

const FRAMES: usize = (LIMIT / FRAME_SIZE) as usize;

/// The bitmap: a set bit is a free frame.
pub struct Frames {
    free: [u64; FRAMES / 64],
    /// Where the last search ended: everything below is taken.
    hint: usize,
    free_count: u32,
    total: u32,
}

impl Default for Frames {
    fn default() -> Self {
        Self::new()
    }
}

impl Frames {
    /// No memory at all.
    pub const fn new() -> Self {
        Self { free: [0; FRAMES / 64], hint: 0, free_count: 0, total: 0 }
    }

    /// Makes the RAM of a memory map available, from `from` on.
    ///
    /// The map comes from a loader, so nothing in it is taken for granted: ranges may overlap, wrap
    /// around or end inside a frame. A frame counts only if it is RAM as a whole and no other range
    /// claims a byte of it.
    pub fn add(&mut self, map: &[E820Entry], from: u64) {
        for range in map.iter().filter(|range| range.kind == E820_RAM) {
            let start = range.base.max(from).div_ceil(FRAME_SIZE);
            let end = range.base.saturating_add(range.length).min(LIMIT) / FRAME_SIZE;
            for frame in start..end {
                self.set(frame as usize, true);
            }
        }
        for range in map.iter().filter(|range| range.kind != E820_RAM) {
            let start = range.base.min(LIMIT) / FRAME_SIZE;
            let end = range.base.saturating_add(range.length).min(LIMIT).div_ceil(FRAME_SIZE);
            for frame in start..end {
                self.set(frame as usize, false);
            }
        }
        self.total = self.free_count;
        self.hint = 0;
    }

    /// Takes a frame; its physical address.
    pub fn take(&mut self) -> Option<u64> {
        let word = (self.hint..self.free.len()).find(|&word| self.free[word] != 0)?;
        self.hint = word;
        let frame = word * 64 + self.free[word].trailing_zeros() as usize;
        self.set(frame, false);
        Some(frame as u64 * FRAME_SIZE)
    }

    /// Gives a frame back.
    ///
    /// # Panics
    /// If it was not taken: two owners of one frame is the bug that this must not hide.
    pub fn give(&mut self, address: u64) {
        let frame = (address / FRAME_SIZE) as usize;
        assert!(!self.is_free(frame), "frame {address:#x} was given back twice");
        self.set(frame, true);
        self.hint = self.hint.min(frame / 64);
    }

    /// Frames that can be taken now.
    pub fn free(&self) -> u32 {
        self.free_count
    }

    /// Frames that there were in the beginning.
    pub fn total(&self) -> u32 {
        self.total
    }

    fn is_free(&self, frame: usize) -> bool {
        self.free[frame / 64] >> (frame % 64) & 1 == 1
    }

    fn set(&mut self, frame: usize, free: bool) {
        if self.is_free(frame) != free {
            self.free[frame / 64] ^= 1 << (frame % 64);
            self.free_count = if free { self.free_count + 1 } else { self.free_count - 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(base: u64, length: u64, kind: u32) -> E820Entry {
        E820Entry { base, length, kind, attributes: 0 }
    }

    fn frames(map: &[E820Entry], from: u64) -> Frames {
        let mut frames = Frames::new();
        frames.add(map, from);
        frames
    }

    #[test]
    fn only_whole_frames_of_ram_above_the_start_count() {
        let mut frames = frames(&[range(0, 0x9_fc00, 1), range(0x10_0800, 0x2900, 1)], 0x10_0000);
        assert_eq!((frames.free(), frames.total()), (2, 2));
        assert_eq!(frames.take(), Some(0x10_1000));
        assert_eq!(frames.take(), Some(0x10_2000));
        assert_eq!(frames.take(), None);
    }

    #[test]
    fn a_reserved_range_wins_over_ram_in_any_order() {
        let reserved = range(0x20_0fff, 2, 2);
        let ram = range(0x20_0000, 0x3000, 1);
        for map in [[reserved, ram], [ram, reserved]] {
            let mut frames = frames(&map, 0);
            assert_eq!(frames.take(), Some(0x20_2000));
            assert_eq!(frames.take(), None);
        }
    }

    #[test]
    fn hostile_ranges_do_no_harm() {
        let map = [
            range(u64::MAX, u64::MAX, 1),
            range(0, u64::MAX, 1),
            range(LIMIT, u64::MAX, 2),
            range(0x1000, 0, 1),
        ];
        let frames = frames(&map, 0);
        assert_eq!(u64::from(frames.free()), LIMIT / FRAME_SIZE);
    }

    #[test]
    fn a_frame_given_back_is_the_next_one_taken() {
        let mut frames = frames(&[range(0, 0x10_0000, 1)], 0);
        let first = frames.take().unwrap();
        let second = frames.take().unwrap();
        assert_ne!(first, second);
        frames.give(first);
        assert_eq!(frames.take(), Some(first));
        assert_eq!(frames.free(), 256 - 2);
    }

    #[test]
    #[should_panic = "given back twice"]
    fn giving_back_twice_is_caught() {
        let mut frames = frames(&[range(0, 0x10_0000, 1)], 0);
        let frame = frames.take().unwrap();
        frames.give(frame);
        frames.give(frame);
    }
}
