//! Introduced by stage 07: the CMOS, a PC's 128 bytes of battery-backed memory behind two ports.
//!
//! The PC AT's firmware kept its settings and the clock there. It is also how firmware learns from the machine
//! how much memory there is: the registers are the ones that Bochs and QEMU fill, too. The clock (Motorola
//! MC146818 data sheet) shows the host's time in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::Device;
use crate::layout::{MMIO_HOLE, MMIO_HOLE_END};

/// First port: the register's number is written here; the next one is its value.
pub const PORT: u16 = 0x70;

/// How many ports it has.
pub const PORTS: u16 = 2;

/// The register of our own BIOS's setting: in bit 0, whether the screen's text goes to the serial port, too.
const CONSOLE: usize = 0x50;

const MIB: u64 = 1 << 20;

/// Bit 7 of the register's number is not part of it: it masks NMIs.
const NUMBER: u8 = 0x7F;

/// The clock's register `number` at a time in seconds since 1970, in BCD. `None` if it is none of the clock's.
fn clock(number: u8, time: u64) -> Option<u8> {
    let bcd = |value: u64| Some((value / 10 % 10 * 16 + value % 10) as u8);
    let (days, seconds) = (time / 86400, time % 86400);
    match number {
        0x00 => bcd(seconds % 60),
        0x02 => bcd(seconds / 60 % 60),
        0x04 => bcd(seconds / 3600),
        // 1970 began on a Thursday, a week on Sunday.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(date(days).2),
        0x08 => bcd(date(days).1),
        0x09 => bcd(date(days).0 % 100),
        0x32 => bcd(date(days).0 / 100),
        // Status A: 32.768 kHz, and no update in progress. B: 24 hours. D: the battery is good.
        0x0A => Some(0x26),
        0x0B => Some(0x02),
        0x0D => Some(0x80),
        _ => None,
    }
}

/// Year, month and day, `days` after the first of January 1970. Years are counted from March here, so that the
/// leap day is their last; the calendar repeats itself every 400 years, which have 146097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since the first of March of the year 0
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // five months have 153 days
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

/// The CMOS. It is read-only: writes to registers are lost, as with an empty battery.
pub struct Cmos {
    registers: [u8; 128],
    selected: u8,
}

impl Cmos {
    /// The CMOS of a machine with `memory` bytes of RAM.
    pub fn new(memory: u64) -> Self {
        let mut registers = [0; 128];
        let below_hole = memory.min(MMIO_HOLE.0);
        let above_hole = memory.saturating_sub(MMIO_HOLE.0).min(u64::MAX - MMIO_HOLE_END.0);
        let mut put =
            |at: usize, bytes: &[u8]| registers[at..at + bytes.len()].copy_from_slice(bytes);
        // Below 640 KiB, in KiB.
        let base = (memory >> 10).min(640) as u16;
        put(0x15, &base.to_le_bytes());
        // Above 1 MiB in KiB, as much as 16 bits count; twice, as on the AT.
        let extended = (below_hole.saturating_sub(MIB) >> 10).min(0xFFFF) as u16;
        put(0x17, &extended.to_le_bytes());
        put(0x30, &extended.to_le_bytes());
        // From 16 MiB to the hole, in units of 64 KiB.
        let high = (below_hole.saturating_sub(16 * MIB) >> 16) as u16;
        put(0x34, &high.to_le_bytes());
        // From 4 GiB on, in units of 64 KiB: 24 bits.
        let above = (above_hole >> 16).min(0xFF_FFFF) as u32;
        put(0x5B, &above.to_le_bytes()[..3]);
        Self { registers, selected: 0 }
    }

    /// The same with a setting for the BIOS in `asm/bios`: what programs print on the screen by its calls goes to
    /// the serial port, too.
    pub fn with_serial_console(mut self, on: bool) -> Self {
        self.registers[CONSOLE] = on.into();
        self
    }
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == 1 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let clock = clock(self.selected, now.as_secs());
            data[0] = clock.unwrap_or(self.registers[usize::from(self.selected)]);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            self.selected = data[0] & NUMBER;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &mut Cmos, register: u8) -> u64 {
        cmos.write(0, &[register]);
        let mut data = [0xFF];
        cmos.read(1, &mut data);
        data[0].into()
    }

    fn word(cmos: &mut Cmos, register: u8) -> u64 {
        read(cmos, register) | read(cmos, register + 1) << 8
    }

    #[test]
    fn the_clock_knows_its_calendar() {
        // From `date -u -d @SECONDS`.
        for (time, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (1_735_603_200, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(date(time / 86400), expected);
        }
        // Thursday, 2024-02-29 23:59:58.
        let at = |register| clock(register, 1_709_251_198).unwrap();
        assert_eq!([0x04, 0x02, 0x00].map(at), [0x23, 0x59, 0x58]);
        assert_eq!([0x32, 0x09, 0x08, 0x07, 0x06].map(at), [0x20, 0x24, 0x02, 0x29, 0x05]);
        assert_eq!(clock(0x0F, 0), None);
    }

    #[test]
    fn memory_stands_in_its_registers() {
        let mut cmos = Cmos::new(64 * MIB);
        assert_eq!(word(&mut cmos, 0x15), 640);
        assert_eq!(word(&mut cmos, 0x30), 63 * 1024);
        assert_eq!(word(&mut cmos, 0x34), 48 * 16);
        assert_eq!(word(&mut cmos, 0x34 | 0x80), 48 * 16, "bit 7 masks NMIs");
        assert_eq!(word(&mut cmos, 0x5B), 0);

        let mut cmos = Cmos::new(8 << 30);
        assert_eq!(word(&mut cmos, 0x30), 0xFFFF);
        assert_eq!(word(&mut cmos, 0x34) << 16, MMIO_HOLE.0 - 16 * MIB);
        let above = word(&mut cmos, 0x5B) | read(&mut cmos, 0x5D) << 16;
        assert_eq!(above << 16, (8 << 30) - MMIO_HOLE.0);
        let mut cmos = Cmos::new(8 * MIB);
        assert_eq!((word(&mut cmos, 0x30), word(&mut cmos, 0x34)), (7 * 1024, 0));
    }
}
