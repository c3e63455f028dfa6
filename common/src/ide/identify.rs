//! What a drive says of itself: the 256 words of IDENTIFY DEVICE.

use super::task_file::Geometry;
use crate::disk::SECTOR;

/// What differs from drive to drive.
pub struct Identity<'a> {
    pub serial: &'a str,
    /// As the drive was made.
    pub native: Geometry,
    /// As INITIALIZE DEVICE PARAMETERS has set it.
    pub current: Geometry,
    pub sectors: u64,
    pub multiple_max: u8,
    pub multiple: u8,
    pub write_cache: bool,
}

// Bits of words 82, 83, 85 and 86: the command sets, first those there are, then those that are turned on.
const POWER_MANAGEMENT: u16 = 1 << 3;
const WRITE_CACHE: u16 = 1 << 5;
const LOOK_AHEAD: u16 = 1 << 6;
const LBA48: u16 = 1 << 10;
const FLUSH_CACHE: u16 = 1 << 12;
const FLUSH_CACHE_EXT: u16 = 1 << 13;

/// Of a word with this bit, and without the next, a guest knows that it was filled in.
const VALID: u16 = 1 << 14;

impl Identity<'_> {
    /// The words as they come through the data port. What isn't named here is 0: there is none of it.
    pub fn bytes(&self) -> [u8; SECTOR] {
        let mut words = [0u16; SECTOR / 2];
        words[0] = 1 << 6; // a disk that stays in its drive
        (words[1], words[3], words[6]) =
            (self.native.cylinders, self.native.heads.into(), self.native.track.into());
        words[2] = 0xC837; // it needs no command to start its motor
        text(&mut words[10..20], self.serial);
        text(&mut words[23..27], env!("CARGO_PKG_VERSION"));
        text(&mut words[27..47], "mini-kvm disk");
        words[47] = 0x8000 | u16::from(self.multiple_max);
        words[49] = 1 << 9 | 1 << 10 | 1 << 11; // linear addresses; IORDY, which may be turned off
        words[50] = VALID;
        words[51] = 2 << 8; // PIO mode 2 for who doesn't know of those in word 64
        words[53] = 1 << 0 | 1 << 1; // words 54 to 58 and 64 to 70 count
        (words[54], words[55], words[56]) =
            (self.current.cylinders, self.current.heads.into(), self.current.track.into());
        number(&mut words[57..59], self.current.sectors().min(self.sectors));
        if self.multiple > 0 {
            words[59] = 1 << 8 | u16::from(self.multiple);
        }
        number(&mut words[60..62], self.sectors.min(0x0FFF_FFFF));
        words[64] = 0b11; // PIO modes 3 and 4
        (words[67], words[68]) = (120, 120); // nanoseconds a word, as mode 4 has it
        words[80] = 0b111 << 4; // ATA/ATAPI-4 to ATA/ATAPI-6
        words[82] = POWER_MANAGEMENT | WRITE_CACHE | LOOK_AHEAD;
        words[83] = VALID | LBA48 | FLUSH_CACHE | FLUSH_CACHE_EXT;
        words[84] = VALID;
        words[85] = words[82] & !if self.write_cache { 0 } else { WRITE_CACHE };
        words[86] = words[83] & !VALID;
        words[87] = VALID;
        number(&mut words[100..104], self.sectors.min(0xFFFF_FFFF_FFFF));

        let mut bytes = [0; SECTOR];
        for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        // Word 255: a mark, and what makes the sum of all bytes 0.
        bytes[SECTOR - 2] = 0xA5;
        bytes[SECTOR - 1] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        bytes
    }
}

/// Two characters in a word, the first in the upper byte; blanks behind them.
fn text(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
    for word in words {
        *word = u16::from_be_bytes([0; 2].map(|_| bytes.next().unwrap_or(b' ')));
    }
}

/// The lowest 16 bits first.
fn number(words: &mut [u16], value: u64) {
    for (i, word) in words.iter_mut().enumerate() {
        *word = (value >> (16 * i)) as u16;
    }
}
