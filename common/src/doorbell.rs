//! Introduced by stage 05: a device as real ones are, with registers, a doorbell and an interrupt.
//!
//! It is a coprocessor that takes integer square roots. Its driver writes a number into a register,
//! *rings the doorbell* by writing to another one, and goes on with its work or sleeps; the device
//! interrupts it when the result is there, and keeps the interrupt pending in its status until the
//! driver has acknowledged it. Disks and network cards are driven in the same four steps.
//!
//! | offset | register | access | meaning |
//! |---|---|---|---|
//! | 0x00 | [`ID`] | read | [`MAGIC`]: how a driver finds out that the device is there |
//! | 0x04 | [`OPERAND`] | read, write | the number to take the root of |
//! | 0x08 | [`DOORBELL`] | write | any value: start |
//! | 0x0C | [`STATUS`] | read, write | bit 0, [`DONE`]: a result waits; write 1 to acknowledge |
//! | 0x10 | [`RESULT`] | read | the root, rounded down |
//!
//! All are 32 bits wide and take aligned 32-bit accesses only, as many real devices do: of others,
//! writes are dropped and reads give ones.

use crate::bus::{Device, Interrupt};

/// Offset of the register that identifies the device.
pub const ID: u64 = 0x00;
/// Offset of the register with the number to work on.
pub const OPERAND: u64 = 0x04;
/// Offset of the register that starts the work.
pub const DOORBELL: u64 = 0x08;
/// Offset of the register that tells and acknowledges the end of the work.
pub const STATUS: u64 = 0x0C;
/// Offset of the register with the result.
pub const RESULT: u64 = 0x10;
/// Bytes that the registers take.
pub const SIZE: u64 = 0x14;

/// What [`ID`] reads as: "ROOT" in ASCII.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ROOT");

/// The bit of [`STATUS`] that is set from the doorbell's ring to its acknowledgement.
pub const DONE: u32 = 1 << 0;

/// The device; `line` is how its interrupt leaves it.
#[derive(Debug)]
pub struct Doorbell<I> {
    line: I,
    operand: u32,
    status: u32,
    result: u32,
    rings: u64,
}

impl<I: Interrupt> Doorbell<I> {
    /// The device after reset, with its interrupt connected to `line`.
    pub fn new(line: I) -> Self {
        Self { line, operand: 0, status: 0, result: 0, rings: 0 }
    }

    /// How often the doorbell has been rung.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// Whether an interrupt has not been acknowledged yet.
    pub fn pending(&self) -> bool {
        self.status & DONE != 0
    }

    // ANCHOR: ring
    fn ring(&mut self) {
        self.rings += 1;
        self.result = self.operand.isqrt();
        self.status |= DONE;
        // If the line fails, the driver still finds DONE when it polls; there is nobody else to tell.
        let _ = self.line.trigger();
    }
    // ANCHOR_END: ring
}

impl<I: Interrupt> Device for Doorbell<I> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        *data = match offset {
            ID => MAGIC,
            OPERAND => self.operand,
            STATUS => self.status,
            RESULT => self.result,
            _ => return,
        }
        .to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            OPERAND => self.operand = value,
            DOORBELL => self.ring(),
            STATUS => self.status &= !value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::CountedLine;

    fn read(device: &mut Doorbell<CountedLine>, offset: u64) -> u32 {
        let mut data = [0xFF; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_four_steps_of_a_driver() {
        let line = CountedLine::default();
        let mut device = Doorbell::new(line.clone());
        assert_eq!(read(&mut device, ID).to_le_bytes(), *b"ROOT");
        device.write(OPERAND, &1_000_000_u32.to_le_bytes());
        assert_eq!((read(&mut device, STATUS), line.count()), (0, 0));

        device.write(DOORBELL, &1_u32.to_le_bytes());
        assert_eq!(line.count(), 1);
        assert_eq!(read(&mut device, STATUS), DONE);
        assert_eq!(read(&mut device, RESULT), 1000);
        assert!(device.pending());

        device.write(STATUS, &0_u32.to_le_bytes());
        assert!(device.pending(), "writing 0 acknowledges nothing");
        device.write(STATUS, &DONE.to_le_bytes());
        assert!(!device.pending());
        assert_eq!(line.count(), 1, "an acknowledgement is no interrupt");
    }

    #[test]
    fn other_widths_and_places_do_nothing() {
        let line = CountedLine::default();
        let mut device = Doorbell::new(line.clone());
        for data in [&[1_u8][..], &[1, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
            device.write(DOORBELL, data);
            device.write(OPERAND, data);
            let mut back = vec![0xFF; data.len()];
            device.read(ID, &mut back);
            assert!(back.iter().all(|&byte| byte == 0xFF));
        }
        device.write(DOORBELL + 1, &[1; 4]);
        device.write(ID, &[0; 4]);
        device.write(RESULT, &[9; 4]);
        assert_eq!(read(&mut device, ID), MAGIC);
        assert_eq!(read(&mut device, OPERAND), 0);
        assert_eq!(read(&mut device, RESULT), 0);
        assert_eq!(read(&mut device, DOORBELL), u32::MAX, "write-only");
        assert_eq!((device.rings(), line.count()), (0, 0));
    }

    proptest! {
        /// Whatever a driver does, there is one interrupt for each ring, and what is pending was rung.
        #[test]
        fn one_interrupt_a_ring(
            writes in prop::collection::vec(
                (0..SIZE + 4, prop::collection::vec(any::<u8>(), 1..=8)),
                0..100,
            ),
        ) {
            let line = CountedLine::default();
            let mut device = Doorbell::new(line.clone());
            for (offset, data) in &writes {
                device.write(*offset, data);
            }
            let rings = writes
                .iter()
                .filter(|(offset, data)| *offset == DOORBELL && data.len() == 4)
                .count();
            prop_assert_eq!(device.rings(), rings as u64);
            prop_assert_eq!(line.count() as usize, rings);
            prop_assert!(!device.pending() || rings > 0);
            let root = u64::from(read(&mut device, RESULT));
            prop_assert!(root * root <= u64::from(u32::MAX));
        }
    }
}
