//! Introduced by stage 05: the text screen of a PC, 25 rows of 80 cells at 0xB8000.
//!
//! A cell is two bytes, as it has been since the CGA card of 1981: a character of code page 437 and
//! an attribute, whose low four bits are the foreground colour, the next three the background, and
//! whose top bit makes it blink. On a PC that is memory on the graphics card. Here no memory is there:
//! each access is an exit, and this device holds the bytes.

use crate::bus::Device;
use crate::scratch::Scratch;

/// Cells in a row.
pub const COLUMNS: usize = 80;

/// Rows on the screen.
pub const ROWS: usize = 25;

/// Bytes of the screen: two for each cell.
pub const SIZE: usize = COLUMNS * ROWS * 2;

/// Light grey on black, what a PC starts with.
pub const DEFAULT_ATTRIBUTE: u8 = 0x07;

/// What the 256 character codes look like, as Unicode. The first 32 and 0x7F, which are control codes
/// elsewhere, have a shape here; 0 and 0xFF are blank.
const CODE_PAGE_437: &str = "\
\u{20}☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼ !\"#$%&'()*+,-./0123456789:;<=>?\
@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~⌂\
ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐\
└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// One cell as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The character's code in code page 437.
    pub code: u8,
    /// Its colours, see [`Cell::foreground`] and [`Cell::background`].
    pub attribute: u8,
}

impl Cell {
    /// The character in Unicode. Always one that can be printed, whatever the guest wrote.
    pub fn glyph(self) -> char {
        // The table is 256 characters long, so there is always one.
        match CODE_PAGE_437.chars().nth(self.code.into()) {
            Some('\u{a0}') | None => ' ',
            Some(glyph) => glyph,
        }
    }

    /// The colour of the character, 0 to 15: bit 0 is blue, 1 green, 2 red, 3 bright.
    pub fn foreground(self) -> u8 {
        self.attribute & 0xF
    }

    /// The colour behind it, 0 to 7.
    pub fn background(self) -> u8 {
        self.attribute >> 4 & 0x7
    }

    /// Whether the character blinks.
    pub fn blinks(self) -> bool {
        self.attribute & 0x80 != 0
    }
}

/// The screen's memory.
#[derive(Debug, PartialEq, Eq)]
pub struct TextScreen {
    memory: Scratch,
}

impl Default for TextScreen {
    fn default() -> Self {
        Self::new()
    }
}

impl TextScreen {
    /// A screen of blanks.
    pub fn new() -> Self {
        Self { memory: Scratch::holding([b' ', DEFAULT_ATTRIBUTE].repeat(COLUMNS * ROWS)) }
    }

    /// The cells of row `row`, 0 to 24.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> impl ExactSizeIterator<Item = Cell> + Clone {
        self.memory.bytes()[row * COLUMNS * 2..][..COLUMNS * 2]
            .chunks_exact(2)
            .map(|cell| Cell { code: cell[0], attribute: cell[1] })
    }

    /// How often the guest has written: whoever draws the screen compares it with the last time.
    pub fn writes(&self) -> u64 {
        self.memory.writes()
    }

    /// The screen as plain text, without the blanks that end rows and the blank rows that end it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for row in 0..ROWS {
            let line: String = self.row(row).map(Cell::glyph).collect();
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text
    }
}

impl Device for TextScreen {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.memory.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.memory.write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_code_has_one_printable_glyph() {
        assert_eq!(CODE_PAGE_437.chars().count(), 256);
        let glyph = |code| Cell { code, attribute: DEFAULT_ATTRIBUTE }.glyph();
        for code in 0..=255 {
            assert!(!glyph(code).is_control(), "{code:#x}");
        }
        for ascii in 0x20..0x7F {
            assert_eq!(glyph(ascii), char::from(ascii));
        }
        // A few from each part of the table, after the Unicode consortium's cp437_DOSLatinUS.
        let known = [
            (0x00, ' '),
            (0x01, '☺'),
            (0x1F, '▼'),
            (0x80, 'Ç'),
            (0x9F, 'ƒ'),
            (0xB0, '░'),
            (0xBF, '┐'),
            (0xC0, '└'),
            (0xC9, '╔'),
            (0xDB, '█'),
            (0xE1, 'ß'),
            (0xFE, '■'),
            (0xFF, ' '),
        ];
        for (code, expected) in known {
            assert_eq!(glyph(code), expected, "{code:#x}");
        }
    }

    #[test]
    fn colours_are_the_bits_of_the_attribute() {
        let cell = Cell { code: b'A', attribute: 0x9E };
        assert_eq!((cell.foreground(), cell.background(), cell.blinks()), (14, 1, true));
        let plain = Cell { code: b'A', attribute: DEFAULT_ATTRIBUTE };
        assert_eq!((plain.foreground(), plain.background(), plain.blinks()), (7, 0, false));
    }

    #[test]
    fn a_new_screen_is_blank_and_text_drops_what_is_blank_at_the_ends() {
        let mut screen = TextScreen::new();
        assert_eq!(screen.text(), "");
        screen.write(((COLUMNS + 2) * 2) as u64, &[b'o', 7, b'k', 7]);
        assert_eq!(screen.text(), "\n  ok");
        assert_eq!(screen.writes(), 1);
    }

    proptest! {
        /// The screen is memory: what was written last is read, in any sizes and at any offsets, and
        /// an access that leaves it changes nothing.
        #[test]
        fn reads_give_what_was_written(
            writes in prop::collection::vec(
                (prop_oneof![0..SIZE as u64 + 16, any::<u64>()], prop::collection::vec(any::<u8>(), 1..=8)),
                0..64,
            ),
        ) {
            let mut screen = TextScreen::new();
            let mut model = screen.memory.bytes().to_vec();
            for (offset, data) in &writes {
                screen.write(*offset, data);
                if let Some(end) = offset.checked_add(data.len() as u64)
                    && end <= SIZE as u64
                {
                    model[*offset as usize..end as usize].copy_from_slice(data);
                }
            }
            for (at, expected) in model.into_iter().enumerate() {
                let mut byte = [0];
                screen.read(at as u64, &mut byte);
                prop_assert_eq!(byte[0], expected);
            }
        }
    }
}
