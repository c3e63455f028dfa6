//! Introduced by stage 07: the registers of a VGA as far as text needs them, and the picture that they make of memory.
//!
//! The screen's cells are memory (see [`crate::text_screen`]). What is not in memory stands in the registers of the CRTC,
//! the cathode-ray tube controller: from which cell on the screen is shown, and where the cursor is. Programs reach
//! them as a pair of ports, the register's number at the first, its value at the second; a two-byte write to
//! the first does both. The card's other groups of registers keep what is written to them, and change nothing: there
//! is one mode, text of 80 columns. (IBM Personal System/2 Hardware Interface Technical Reference, "Video
//! Subsystem".)

use std::sync::PoisonError;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::bus::{Device, Shared};
use crate::layout::TEXT_SCREEN;
use crate::memory::Ram;
use crate::text_screen::{COLUMNS, ROWS, SIZE, TextScreen};

/// First port.
pub const PORT: u16 = 0x3C0;

/// How many ports it has.
pub const PORTS: u16 = 0x20;

// Offsets of the ports.
const ATTRIBUTE: u64 = 0x00;
const ATTRIBUTE_READ: u64 = 0x01;
const MISC_WRITE: u64 = 0x02;
const SEQUENCER: u64 = 0x04;
const SEQUENCER_VALUE: u64 = 0x05;
const MISC_READ: u64 = 0x0C;
const GRAPHICS: u64 = 0x0E;
const GRAPHICS_VALUE: u64 = 0x0F;
const CRTC: u64 = 0x14;
const CRTC_VALUE: u64 = 0x15;
const STATUS: u64 = 0x1A;

// Registers of the CRTC. Addresses count cells and have two bytes, the upper one first.
const CURSOR_START: usize = 0x0A;
const CURSOR_END: usize = 0x0B;
const START_ADDRESS: usize = 0x0C;
const CURSOR: usize = 0x0E;

/// In `CURSOR_START`: no cursor.
const CURSOR_OFF: u8 = 1 << 5;
/// In `CURSOR_START` and `CURSOR_END`: the line within the cell.
const CURSOR_LINE: u8 = 0x1F;

/// In the status: the beam is between two rows or frames.
const BLANK: u8 = 1 << 0;
/// In the status: it is on its way back to the top.
const RETRACE: u8 = 1 << 3;

/// The misc output register after mode 3 has been set: colour, so the CRTC is at 0x3D4; access to memory.
const MISC: u8 = 0x67;

/// Cells in the 32 KiB of text memory, behind which addresses start again.
const CELLS: usize = 0x4000;

/// A group of registers behind a port for the number and one for the value.
#[derive(Debug)]
struct Group<const COUNT: usize> {
    number: u8,
    registers: [u8; COUNT],
}

impl<const COUNT: usize> Group<COUNT> {
    const fn new() -> Self {
        Self { number: 0, registers: [0; COUNT] }
    }

    /// The value; a register that is not there reads as 0.
    fn get(&self) -> u8 {
        self.registers.get(usize::from(self.number)).copied().unwrap_or(0)
    }

    fn set(&mut self, value: u8) {
        if let Some(register) = self.registers.get_mut(usize::from(self.number)) {
            *register = value;
        }
    }
}

/// The card's registers.
#[derive(Debug)]
pub struct Vga {
    crtc: Group<0x19>,
    sequencer: Group<5>,
    graphics: Group<9>,
    attribute: Group<0x15>,
    /// The attribute registers have number and value at one port, in turn.
    attribute_value: bool,
    misc: u8,
    status: u8,
}

impl Default for Vga {
    fn default() -> Self {
        let mut crtc = Group::new();
        // An underline, as after power-on with a font of 16 lines.
        crtc.registers[CURSOR_START] = 13;
        crtc.registers[CURSOR_END] = 14;
        Self {
            crtc,
            sequencer: Group::new(),
            graphics: Group::new(),
            attribute: Group::new(),
            attribute_value: false,
            misc: MISC,
            status: 0,
        }
    }
}

impl Vga {
    fn address(&self, register: usize) -> usize {
        let [high, low] = [self.crtc.registers[register], self.crtc.registers[register + 1]];
        usize::from(u16::from_be_bytes([high, low])) % CELLS
    }

    /// The cell in the screen's top left corner.
    fn start(&self) -> usize {
        self.address(START_ADDRESS)
    }

    /// Row and column of the cursor, if it is to be seen.
    fn cursor(&self) -> Option<(usize, usize)> {
        let [start, end] = [CURSOR_START, CURSOR_END].map(|at| self.crtc.registers[at]);
        let shown = start & CURSOR_OFF == 0 && start & CURSOR_LINE <= end & CURSOR_LINE;
        let cell = (self.address(CURSOR) + CELLS - self.start()) % CELLS;
        (shown && cell < COLUMNS * ROWS).then_some((cell / COLUMNS, cell % COLUMNS))
    }

    fn read_byte(&mut self, port: u64) -> Option<u8> {
        Some(match port {
            ATTRIBUTE => self.attribute.number,
            ATTRIBUTE_READ => self.attribute.get(),
            // Switches and the feature connector: nothing there.
            MISC_WRITE => 0,
            MISC_READ => self.misc,
            SEQUENCER => self.sequencer.number,
            SEQUENCER_VALUE => self.sequencer.get(),
            GRAPHICS => self.graphics.number,
            GRAPHICS_VALUE => self.graphics.get(),
            CRTC => self.crtc.number,
            CRTC_VALUE => self.crtc.get(),
            STATUS => {
                // There is no beam. Whoever waits for either state of it waits for one read.
                self.status ^= BLANK | RETRACE;
                self.attribute_value = false;
                self.status
            }
            _ => return None,
        })
    }

    fn write_byte(&mut self, port: u64, value: u8) {
        match port {
            ATTRIBUTE if self.attribute_value => {
                self.attribute.set(value);
                self.attribute_value = false;
            }
            ATTRIBUTE => {
                // Bit 5 has the screen shown, and belongs to no register.
                self.attribute.number = value & 0x1F;
                self.attribute_value = true;
            }
            MISC_WRITE => self.misc = value,
            SEQUENCER => self.sequencer.number = value,
            SEQUENCER_VALUE => self.sequencer.set(value),
            GRAPHICS => self.graphics.number = value,
            GRAPHICS_VALUE => self.graphics.set(value),
            CRTC => self.crtc.number = value,
            CRTC_VALUE => self.crtc.set(value),
            _ => {}
        }
    }
}

impl Device for Vga {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = self.read_byte(port).unwrap_or(*byte);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            self.write_byte(port, byte);
        }
    }
}

/// What is to be seen on the screen at one moment.
#[derive(Debug, PartialEq, Eq)]
pub struct Picture {
    /// Its cells.
    pub screen: TextScreen,
    /// Row and column of the cursor, if there is one to be seen.
    pub cursor: Option<(usize, usize)>,
}

impl Picture {
    /// What `vga` makes of the text memory in `ram`, which the guest may be writing at this moment.
    pub fn take(vga: &Shared<Vga>, ram: &Ram) -> Result<Self, GuestMemoryError> {
        let (start, cursor) = {
            let vga = vga.lock().unwrap_or_else(PoisonError::into_inner);
            (vga.start(), vga.cursor())
        };
        let mut bytes = [0; SIZE];
        let (front, wrapped) = bytes.split_at_mut(SIZE.min((CELLS - start) * 2));
        let first = TEXT_SCREEN.0 + start as u64 * 2;
        ram.read_slice(front, GuestAddress(first))?;
        ram.read_slice(wrapped, TEXT_SCREEN)?;
        let mut screen = TextScreen::new();
        screen.write(0, &bytes);
        Ok(Self { screen, cursor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Bus, ports, shared};

    fn card() -> (Shared<Vga>, Bus) {
        let vga = shared(Vga::default());
        let mut bus = Bus::new();
        bus.insert("VGA", ports(PORT, PORTS), vga.clone()).unwrap();
        (vga, bus)
    }

    fn read(bus: &Bus, port: u64) -> u8 {
        let mut byte = [0xFF];
        bus.read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn registers_keep_what_is_written_byte_by_byte_or_in_words() {
        let (_, bus) = card();
        for index in [0x3C4, 0x3CE, 0x3D4] {
            bus.write(index, &[2]);
            bus.write(index + 1, &[0x5A]);
            bus.write(index, &[4, 0xA5]);
            assert_eq!((read(&bus, index), read(&bus, index + 1)), (4, 0xA5));
            bus.write(index, &[2]);
            assert_eq!(read(&bus, index + 1), 0x5A);
            let mut word = [0xFF; 2];
            bus.read(index, &mut word);
            assert_eq!(word, [2, 0x5A]);
            // There is no such register, and none of ones.
            bus.write(index, &[0xFF, 0xFF]);
            assert_eq!(read(&bus, index + 1), 0);
        }
        bus.write(0x3C2, &[0x63]);
        assert_eq!(read(&bus, 0x3CC), 0x63);
        assert_eq!(read(&bus, 0x3D0), 0xFF, "nothing is there");
    }

    #[test]
    fn attribute_registers_take_number_and_value_in_turn() {
        let (_, bus) = card();
        bus.write(0x3C0, &[0x10]);
        read(&bus, 0x3DA);
        for byte in [0x30, 0x0C, 0x33, 0x08] {
            bus.write(0x3C0, &[byte]);
        }
        assert_eq!(read(&bus, 0x3C1), 0x08);
        bus.write(0x3C0, &[0x30]);
        assert_eq!((read(&bus, 0x3C0), read(&bus, 0x3C1)), (0x10, 0x0C));
    }

    #[test]
    fn whoever_waits_for_the_beam_does_not_wait_for_ever() {
        let (_, bus) = card();
        let states: Vec<_> = (0..4).map(|_| read(&bus, 0x3DA) & 9).collect();
        assert_eq!(states, [9, 0, 9, 0]);
    }

    #[test]
    fn the_picture_begins_at_the_start_address_and_wraps() {
        let (vga, bus) = card();
        let ram = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let put = |cell: u64, code| {
            ram.write_slice(&[code, 7], GuestAddress(TEXT_SCREEN.0 + cell * 2)).unwrap();
        };
        let set = |register, cell: u16| {
            let [high, low] = cell.to_be_bytes();
            bus.write(0x3D4, &[register, high]);
            bus.write(0x3D4, &[register + 1, low]);
        };
        let take = || {
            let picture = Picture::take(&vga, &ram).unwrap();
            (picture.screen.text().replace(' ', "."), picture.cursor)
        };
        assert_eq!(take(), (String::new(), Some((0, 0))));
        put(0, b'a');
        put(81, b'b');
        assert_eq!(take().0, "a\n.b");
        set(0x0C, 80);
        set(0x0E, 165);
        assert_eq!(take(), (".b".into(), Some((1, 5))));
        // The last row of memory is the first of the screen.
        put(0x3FB0, b'z');
        set(0x0C, 0x3FB0);
        assert_eq!(take(), ("z\na\n.b".into(), Some((3, 5))));
        // Two bits more than there is memory for.
        set(0x0C, 0xFFB0);
        assert_eq!(take().0, "z\na\n.b");
    }

    #[test]
    fn a_cursor_may_be_hidden_or_elsewhere() {
        let (vga, bus) = card();
        let cursor = |writes: &[[u8; 2]]| {
            writes.iter().for_each(|write| {
                bus.write(0x3D4, write);
            });
            vga.lock().unwrap().cursor()
        };
        assert_eq!(cursor(&[[0x0F, 81]]), Some((1, 1)));
        assert_eq!(cursor(&[[0x0A, 0x2D]]), None);
        assert_eq!(cursor(&[[0x0A, 15]]), None, "it begins behind its end");
        assert_eq!(cursor(&[[0x0A, 0], [0x0B, 0]]), Some((1, 1)));
        assert_eq!(cursor(&[[0x0E, 0x07], [0x0F, 0xD0]]), None, "row 25");
        assert_eq!(cursor(&[[0x0C, 0x00], [0x0D, 80]]), Some((24, 0)));
    }
}
