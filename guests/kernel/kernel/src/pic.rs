//! The two 8259A interrupt controllers: 15 lines, numbered 0 to 15, the second hanging on line 2 of
//! the first. (Intel 8259A data sheet.)

use crate::cpu::{input, out};

/// Vector of line 0. The reset value, 8, collides with the CPU's exceptions: a timer tick would
/// look like a double fault.
pub const FIRST_VECTOR: u8 = 32;

pub const TIMER: u8 = 0;
pub const SERIAL: u8 = 4;

const COMMAND: [u16; 2] = [0x20, 0xa0];
const DATA: [u16; 2] = [0x21, 0xa1];

/// OCW2: non-specific end of interrupt.
const END_OF_INTERRUPT: u8 = 0x20;
/// OCW3: the next read of the command port gives the in-service register.
const READ_IN_SERVICE: u8 = 0x0b;

/// Maps lines 0 to 15 to vectors 32 to 47 and masks all but the two that have a handler.
pub fn init() {
    for (index, wiring) in [(0, 1 << 2), (1, 2)] {
        // SAFETY: the four initialization words in their order, then the mask.
        unsafe {
            out(COMMAND[index], 0x11); // ICW1: edge triggered, cascaded, ICW4 follows
            out(DATA[index], FIRST_VECTOR + 8 * index as u8); // ICW2
            out(DATA[index], wiring); // ICW3: which line the other one hangs on
            out(DATA[index], 0x01); // ICW4: 8086 mode, EOI by hand
        }
    }
    // SAFETY: OCW1, the masks.
    unsafe {
        out(DATA[0], !(1 << TIMER | 1 << SERIAL));
        out(DATA[1], 0xff);
    }
}

/// Whether a line really interrupts. A request that went away before the CPU took it arrives as
/// the controller's lowest line, 7 or 15, and wants no end of interrupt.
pub fn in_service(line: u8) -> bool {
    let chip = usize::from(line / 8);
    // SAFETY: reading the in-service register changes nothing.
    unsafe {
        out(COMMAND[chip], READ_IN_SERVICE);
        input(COMMAND[chip]) >> (line % 8) & 1 == 1
    }
}

/// Tells the controller that a line has been served.
pub fn end_of_interrupt(line: u8) {
    // SAFETY: OCW2, to the second one first, if it is its line.
    unsafe {
        if line >= 8 {
            out(COMMAND[1], END_OF_INTERRUPT);
        }
        out(COMMAND[0], END_OF_INTERRUPT);
    }
}
