//! Introduced by stage 07: the CMOS, a PC's 128 bytes of battery-backed memory behind two ports.
//!
//! The PC AT's firmware kept its settings and the clock there. It is also how firmware learns from the machine
//! how much memory there is: the registers are the ones that Bochs and QEMU fill, too.

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
            data[0] = self.registers[usize::from(self.selected)];
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
