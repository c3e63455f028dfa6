//! Introduced by stage 07: a PS/2 keyboard, the codes that its keys send and the commands that it takes.
//!
//! A keyboard knows keys, not characters: each sends a *scan code* when it goes down and another one when it
//! comes up, Shift like any other, and what that means is the operating system's business. What is typed here
//! comes as characters from a terminal, so the way leads back from them to the keys of an American keyboard,
//! with Shift, Ctrl and Alt held as they have to be.
//!
//! There are three sets of scan codes. This keyboard sends set 2, as every one does when it is switched on,
//! or set 1, the one of the PC of 1981, if it is told so. Most PCs leave the keyboard at set 2 and have its
//! controller ([`crate::i8042`]) translate it to set 1. (IBM Personal System/2 Hardware Interface Technical
//! Reference, "Keyboards (101- and 102-Key)".)

use std::collections::VecDeque;

/// A key, by its scan code of set 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    code: u8,
    /// The code comes behind [`EXTENDED`]: one of the keys that came with the keyboard of 101 keys.
    extended: bool,
}

/// Before the code of a key that the keyboard of 1981 did not have.
const EXTENDED: u8 = 0xE0;
/// In set 2, before the code of a key that comes up.
const UP: u8 = 0xF0;

impl Key {
    const fn new(code: u8) -> Self {
        Self { code, extended: false }
    }

    const fn extended(code: u8) -> Self {
        Self { code, extended: true }
    }

    /// Esc.
    pub const ESC: Self = Self::new(0x76);
    /// Backspace.
    pub const BACKSPACE: Self = Self::new(0x66);
    /// Tab.
    pub const TAB: Self = Self::new(0x0D);
    /// Enter.
    pub const ENTER: Self = Self::new(0x5A);
    /// The left Shift.
    pub const SHIFT: Self = Self::new(0x12);
    /// The left Ctrl.
    pub const CTRL: Self = Self::new(0x14);
    /// The left Alt.
    pub const ALT: Self = Self::new(0x11);
    /// The cursor keys.
    pub const UP: Self = Self::extended(0x75);
    /// The cursor keys.
    pub const DOWN: Self = Self::extended(0x72);
    /// The cursor keys.
    pub const LEFT: Self = Self::extended(0x6B);
    /// The cursor keys.
    pub const RIGHT: Self = Self::extended(0x74);
    /// Home.
    pub const HOME: Self = Self::extended(0x6C);
    /// End.
    pub const END: Self = Self::extended(0x69);
    /// Page up.
    pub const PAGE_UP: Self = Self::extended(0x7D);
    /// Page down.
    pub const PAGE_DOWN: Self = Self::extended(0x7A);
    /// Insert.
    pub const INSERT: Self = Self::extended(0x70);
    /// Delete.
    pub const DELETE: Self = Self::extended(0x71);
    /// F1 to F12.
    pub const FUNCTION: [Self; 12] = [
        Self::new(0x05),
        Self::new(0x06),
        Self::new(0x04),
        Self::new(0x0C),
        Self::new(0x03),
        Self::new(0x0B),
        Self::new(0x83),
        Self::new(0x0A),
        Self::new(0x01),
        Self::new(0x09),
        Self::new(0x78),
        Self::new(0x07),
    ];

    /// What it sends when it goes down.
    fn down(self) -> impl Iterator<Item = u8> {
        self.extended.then_some(EXTENDED).into_iter().chain([self.code])
    }

    /// What it sends when it comes up.
    fn up(self) -> impl Iterator<Item = u8> {
        self.extended.then_some(EXTENDED).into_iter().chain([UP, self.code])
    }
}

/// The keys of an American keyboard that have a character, without Shift and with it.
const CHARACTERS: [(u8, char, char); 48] = [
    (0x0E, '`', '~'),
    (0x16, '1', '!'),
    (0x1E, '2', '@'),
    (0x26, '3', '#'),
    (0x25, '4', '$'),
    (0x2E, '5', '%'),
    (0x36, '6', '^'),
    (0x3D, '7', '&'),
    (0x3E, '8', '*'),
    (0x46, '9', '('),
    (0x45, '0', ')'),
    (0x4E, '-', '_'),
    (0x55, '=', '+'),
    (0x15, 'q', 'Q'),
    (0x1D, 'w', 'W'),
    (0x24, 'e', 'E'),
    (0x2D, 'r', 'R'),
    (0x2C, 't', 'T'),
    (0x35, 'y', 'Y'),
    (0x3C, 'u', 'U'),
    (0x43, 'i', 'I'),
    (0x44, 'o', 'O'),
    (0x4D, 'p', 'P'),
    (0x54, '[', '{'),
    (0x5B, ']', '}'),
    (0x5D, '\\', '|'),
    (0x1C, 'a', 'A'),
    (0x1B, 's', 'S'),
    (0x23, 'd', 'D'),
    (0x2B, 'f', 'F'),
    (0x34, 'g', 'G'),
    (0x33, 'h', 'H'),
    (0x3B, 'j', 'J'),
    (0x42, 'k', 'K'),
    (0x4B, 'l', 'L'),
    (0x4C, ';', ':'),
    (0x52, '\'', '"'),
    (0x1A, 'z', 'Z'),
    (0x22, 'x', 'X'),
    (0x21, 'c', 'C'),
    (0x2A, 'v', 'V'),
    (0x32, 'b', 'B'),
    (0x31, 'n', 'N'),
    (0x3A, 'm', 'M'),
    (0x41, ',', '<'),
    (0x49, '.', '>'),
    (0x4A, '/', '?'),
    (0x29, ' ', ' '),
];

/// A key, and what is held down while it is pressed and released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stroke {
    /// The key.
    pub key: Key,
    /// With Shift.
    pub shift: bool,
    /// With Ctrl.
    pub ctrl: bool,
    /// With Alt.
    pub alt: bool,
}

impl From<Key> for Stroke {
    fn from(key: Key) -> Self {
        Self { key, shift: false, ctrl: false, alt: false }
    }
}

impl Stroke {
    /// How `character` is typed on an American keyboard; control characters are those that terminals send:
    /// 0x03 is Ctrl-C. `None` if there is no key for it.
    pub fn of(character: char) -> Option<Self> {
        let ctrl = |key| Self::of(key).map(|stroke| Self { ctrl: true, ..stroke });
        match character {
            '\r' | '\n' => Some(Key::ENTER.into()),
            '\t' => Some(Key::TAB.into()),
            '\x1b' => Some(Key::ESC.into()),
            '\x08' | '\x7f' => Some(Key::BACKSPACE.into()),
            // The key on which @ stands; likewise ^ and _ below.
            '\0' => ctrl('2'),
            '\x01'..='\x1a' => ctrl(char::from(b'a' - 1 + character as u8)),
            '\x1c' => ctrl('\\'),
            '\x1d' => ctrl(']'),
            '\x1e' => ctrl('6'),
            '\x1f' => ctrl('-'),
            _ => CHARACTERS.iter().find_map(|&(code, plain, shifted)| {
                let stroke = Self::from(Key::new(code));
                let shift = character != plain;
                (!shift || character == shifted).then_some(Self { shift, ..stroke })
            }),
        }
    }

    /// What the keyboard sends for it, in set 2.
    pub(crate) fn codes(self) -> Vec<u8> {
        let held = [(self.shift, Key::SHIFT), (self.ctrl, Key::CTRL), (self.alt, Key::ALT)];
        let held: Vec<_> = held.into_iter().filter_map(|(held, key)| held.then_some(key)).collect();
        let down = held.iter().copied().chain([self.key]).flat_map(Key::down);
        let up = [self.key].into_iter().chain(held.iter().rev().copied()).flat_map(Key::up);
        down.chain(up).collect()
    }
}

/// Set 1's code for each of set 2's up to 0x7F. The others stay as they are, but for two.
const SET_1: [u8; 0x80] = [
    0xFF, 0x43, 0x41, 0x3F, 0x3D, 0x3B, 0x3C, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3E, 0x0F, 0x29, 0x59,
    0x65, 0x38, 0x2A, 0x70, 0x1D, 0x10, 0x02, 0x5A, 0x66, 0x71, 0x2C, 0x1F, 0x1E, 0x11, 0x03, 0x5B,
    0x67, 0x2E, 0x2D, 0x20, 0x12, 0x05, 0x04, 0x5C, 0x68, 0x39, 0x2F, 0x21, 0x14, 0x13, 0x06, 0x5D,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5E, 0x6A, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5F,
    0x6B, 0x33, 0x25, 0x17, 0x18, 0x0B, 0x0A, 0x60, 0x6C, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0C, 0x61,
    0x6D, 0x73, 0x28, 0x74, 0x1A, 0x0D, 0x62, 0x6E, 0x3A, 0x36, 0x1C, 0x1B, 0x75, 0x2B, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7A, 0x0E, 0x7B, 0x7C, 0x4F, 0x7D, 0x4B, 0x47, 0x7E, 0x7F, 0x6F,
    0x52, 0x53, 0x50, 0x4C, 0x4D, 0x48, 0x01, 0x45, 0x57, 0x4E, 0x51, 0x4A, 0x37, 0x49, 0x46, 0x54,
];

/// From set 2 to set 1, in which a key that comes up has its code with bit 7 set.
#[derive(Debug, Default)]
pub(crate) struct Translation {
    up: bool,
}

impl Translation {
    /// The byte that comes out for one that goes in, if one does.
    pub(crate) fn next(&mut self, byte: u8) -> Option<u8> {
        if byte == UP {
            self.up = true;
            return None;
        }
        let up = if std::mem::take(&mut self.up) { 0x80 } else { 0 };
        Some(match byte {
            0x83 => 0x41 | up,
            0x84 => 0x54 | up,
            0x80.. => byte,
            _ => SET_1[usize::from(byte)] | up,
        })
    }
}

// Commands.
const SET_LAMPS: u8 = 0xED;
const ECHO: u8 = 0xEE;
const SCAN_CODE_SET: u8 = 0xF0;
const IDENTIFY: u8 = 0xF2;
const SET_REPEAT: u8 = 0xF3;
const ENABLE: u8 = 0xF4;
const DISABLE: u8 = 0xF5;
const DEFAULTS: u8 = 0xF6;
const RESEND: u8 = 0xFE;
const RESET: u8 = 0xFF;

// Answers.
const TESTED: u8 = 0xAA;
const ACK: u8 = 0xFA;
/// "Send that again": also for what it does not understand.
const AGAIN: u8 = 0xFE;
const IDENTITY: [u8; 2] = [0xAB, 0x83];

/// The keyboard: what is to be known of it between two keys.
#[derive(Debug)]
pub(crate) struct Keyboard {
    /// Answers to the last command. A new command takes their place, so there are never more than three.
    answers: VecDeque<u8>,
    /// The command whose parameter comes next.
    unfinished: Option<u8>,
    last_answer: u8,
    /// The scan code set: 1 or 2.
    set: u8,
    to_set_1: Translation,
    scanning: bool,
    /// How often it was reset: a stroke that began before is not finished.
    resets: u64,
}

impl Keyboard {
    /// A keyboard that has been switched on, and tested itself.
    pub(crate) fn new() -> Self {
        Self {
            answers: VecDeque::new(),
            unfinished: None,
            last_answer: AGAIN,
            set: 2,
            to_set_1: Translation::default(),
            scanning: true,
            resets: 0,
        }
    }

    /// Whether keys send codes.
    pub(crate) fn scans(&self) -> bool {
        self.scanning
    }

    /// How often it was reset.
    pub(crate) fn resets(&self) -> u64 {
        self.resets
    }

    /// What goes over the wire for one byte of [`Stroke::codes`].
    pub(crate) fn scan(&mut self, byte: u8) -> Option<u8> {
        if self.set == 1 { self.to_set_1.next(byte) } else { Some(byte) }
    }

    /// The next byte of its answer.
    pub(crate) fn answer(&mut self) -> Option<u8> {
        let answer = self.answers.pop_front()?;
        self.last_answer = answer;
        Some(answer)
    }

    /// Takes a byte from the controller: a command or the parameter of one. What it sets that nobody here can see,
    /// the lamps and how fast a held key repeats, is taken and forgotten.
    pub(crate) fn command(&mut self, byte: u8) {
        self.answers.clear();
        // A command instead of a parameter is taken as one.
        if let Some(command) = self.unfinished.take_if(|_| byte < SET_LAMPS) {
            match (command, byte) {
                (SCAN_CODE_SET, 0) => self.answers.extend([ACK, self.set]),
                (SCAN_CODE_SET, 1 | 2) => {
                    self.set = byte;
                    self.answers.push_back(ACK);
                }
                (SCAN_CODE_SET, _) => self.answers.push_back(AGAIN),
                _ => self.answers.push_back(ACK),
            }
            return;
        }
        self.unfinished = None;
        match byte {
            SET_LAMPS | SCAN_CODE_SET | SET_REPEAT => {
                self.unfinished = Some(byte);
                self.answers.push_back(ACK);
            }
            ECHO => self.answers.push_back(ECHO),
            IDENTIFY => {
                self.answers.push_back(ACK);
                self.answers.extend(IDENTITY);
            }
            ENABLE => {
                self.scanning = true;
                self.answers.push_back(ACK);
            }
            DISABLE | DEFAULTS => {
                self.set = 2;
                self.scanning = byte == DEFAULTS;
                self.answers.push_back(ACK);
            }
            RESEND => self.answers.push_back(self.last_answer),
            RESET => {
                *self = Self { resets: self.resets + 1, ..Self::new() };
                self.answers.extend([ACK, TESTED]);
            }
            _ => self.answers.push_back(AGAIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use pc_keyboard::layouts::Us104Key;
    use pc_keyboard::{
        DecodedKey, HandleControl, KeyCode, PS2Keyboard, ScancodeSet, ScancodeSet1, ScancodeSet2,
    };
    use proptest::prelude::*;

    use super::*;

    /// What the driver of another project makes of scan codes.
    fn decoded<S: ScancodeSet>(set: S, codes: &[u8]) -> Vec<DecodedKey> {
        let mut driver = PS2Keyboard::new(set, Us104Key, HandleControl::MapLettersToUnicode);
        codes
            .iter()
            .filter_map(|&code| driver.add_byte(code).expect("a known code"))
            .collect::<Vec<_>>()
            .into_iter()
            .filter_map(|event| driver.process_keyevent(event))
            .collect()
    }

    fn translated(codes: &[u8]) -> Vec<u8> {
        let mut translation = Translation::default();
        codes.iter().filter_map(|&code| translation.next(code)).collect()
    }

    fn text(keys: &[DecodedKey]) -> String {
        keys.iter()
            .filter_map(|key| match key {
                DecodedKey::Unicode(character) => Some(*character),
                DecodedKey::RawKey(_) => None,
            })
            .collect()
    }

    proptest! {
        /// Text becomes scan codes and the same text again, in both sets.
        #[test]
        fn typed_text_arrives(typed in "[ -~\n\t\x01-\x07\x0b\x0c\x0e-\x1b]{0,60}") {
            let codes: Vec<u8> =
                typed.chars().flat_map(|typed| Stroke::of(typed).unwrap().codes()).collect();
            prop_assert_eq!(text(&decoded(ScancodeSet2::new(), &codes)), typed.clone());
            prop_assert_eq!(text(&decoded(ScancodeSet1::new(), &translated(&codes))), typed);
        }

        /// Whatever a guest tells it, the keyboard has one answer ready, of at most three bytes.
        #[test]
        fn any_command_has_an_answer(commands: Vec<u8>) {
            let mut keyboard = Keyboard::new();
            for command in commands {
                keyboard.command(command);
                prop_assert!((1..=3).contains(&keyboard.answers.len()), "{:x}", command);
            }
        }
    }

    #[test]
    fn keys_without_a_character_arrive_as_themselves() {
        use KeyCode::*;
        let functions = [F1, F2, F3, F4, F5, F6, F7, F8, F9, F10, F11, F12];
        let others = [
            (Key::UP, ArrowUp),
            (Key::DOWN, ArrowDown),
            (Key::LEFT, ArrowLeft),
            (Key::RIGHT, ArrowRight),
            (Key::HOME, Home),
            (Key::END, End),
            (Key::PAGE_UP, PageUp),
            (Key::PAGE_DOWN, PageDown),
            (Key::INSERT, Insert),
        ];
        for (key, code) in Key::FUNCTION.into_iter().zip(functions).chain(others) {
            let codes = Stroke::from(key).codes();
            assert_eq!(decoded(ScancodeSet2::new(), &codes), [DecodedKey::RawKey(code)]);
            let codes = translated(&codes);
            assert_eq!(decoded(ScancodeSet1::new(), &codes), [DecodedKey::RawKey(code)]);
        }
        for (key, character) in
            [(Key::DELETE, '\x7f'), (Key::BACKSPACE, '\x08'), (Key::ESC, '\x1b')]
        {
            let codes = translated(&Stroke::from(key).codes());
            assert_eq!(text(&decoded(ScancodeSet1::new(), &codes)), character.to_string());
        }
    }

    #[test]
    fn what_is_held_goes_down_first_and_comes_up_last() {
        let stroke = Stroke { ctrl: true, alt: true, ..Key::DELETE.into() };
        let set_1 = [0x1D, 0x38, 0xE0, 0x53, 0xE0, 0xD3, 0xB8, 0x9D];
        assert_eq!(translated(&stroke.codes()), set_1);
        let at = Stroke::of('@').unwrap();
        assert_eq!(at.codes(), [0x12, 0x1E, 0xF0, 0x1E, 0xF0, 0x12]);
        assert_eq!(Stroke::of('\0'), Stroke::of('2').map(|two| Stroke { ctrl: true, ..two }));
        assert_eq!(Stroke::of('é'), None);
    }

    #[test]
    fn commands_are_answered_as_keyboards_do() {
        let mut keyboard = Keyboard::new();
        let mut tell = |bytes: &[u8]| -> Vec<u8> {
            let mut answers = vec![];
            for &byte in bytes {
                keyboard.command(byte);
                answers.extend(std::iter::from_fn(|| keyboard.answer()));
            }
            answers
        };
        assert_eq!(tell(&[RESET]), [ACK, TESTED]);
        assert_eq!(tell(&[RESEND]), [TESTED]);
        assert_eq!(tell(&[IDENTIFY]), [ACK, 0xAB, 0x83]);
        assert_eq!(tell(&[ECHO]), [ECHO]);
        assert_eq!(tell(&[SET_LAMPS, 7, SET_REPEAT, 0x2B]), [ACK; 4]);
        assert_eq!(tell(&[SCAN_CODE_SET, 0]), [ACK, ACK, 2]);
        assert_eq!(tell(&[SCAN_CODE_SET, 1, SCAN_CODE_SET, 0]), [ACK, ACK, ACK, ACK, 1]);
        assert_eq!(tell(&[SCAN_CODE_SET, 3]), [ACK, AGAIN], "there is no set 3");
        assert_eq!(tell(&[DEFAULTS, SCAN_CODE_SET, 0]), [ACK, ACK, ACK, 2]);
        assert_eq!(tell(&[SET_LAMPS, ECHO]), [ACK, ECHO], "a command instead of a parameter");
        assert_eq!(tell(&[0x00, 0xE7]), [AGAIN; 2]);
        assert_eq!(tell(&[DISABLE]), [ACK]);
        assert!(!keyboard.scans());
        keyboard.command(ENABLE);
        assert!(keyboard.scans());
    }

    #[test]
    fn a_keyboard_of_set_1_sends_it_by_itself() {
        let mut keyboard = Keyboard::new();
        keyboard.command(SCAN_CODE_SET);
        keyboard.command(1);
        let codes = Stroke::from(Key::UP).codes();
        let sent: Vec<u8> = codes.iter().filter_map(|&code| keyboard.scan(code)).collect();
        assert_eq!(sent, [0xE0, 0x48, 0xE0, 0xC8]);
    }
}
