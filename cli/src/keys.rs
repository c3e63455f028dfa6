//! What a terminal sends becomes strokes on a PC's keyboard.
//!
//! A terminal sends characters. Keys without one come as ESC and some more, and so does a key that is pressed with
//! Alt; the Esc key is ESC alone (ECMA-48, 5.4; xterm, "Control Sequences", "PC-Style Function Keys"). What there
//! is no key for on an American keyboard is dropped.

use common::keyboard::{Key, Stroke};

const ESC: u8 = 0x1B;

/// What was typed in `bytes`, which have come from the terminal at once: an ESC that ends them is the Esc key.
pub fn strokes(mut bytes: &[u8]) -> Vec<Stroke> {
    let mut strokes = Vec::new();
    while !bytes.is_empty() {
        let (stroke, len) = first(bytes);
        strokes.extend(stroke);
        bytes = &bytes[len..];
    }
    strokes
}

/// What comes first, and how many bytes it has.
fn first(bytes: &[u8]) -> (Option<Stroke>, usize) {
    match *bytes {
        [ESC, b'[', ref rest @ ..] => match control_sequence(rest) {
            Some((stroke, len)) => (stroke, 2 + len),
            None => (alt(b'['), 2),
        },
        [ESC, b'O', key, ..] if let Some(key) = lettered(key) => (Some(key.into()), 3),
        [ESC] | [ESC, ESC, ..] => (Some(Key::ESC.into()), 1),
        [ESC, byte, ..] => (alt(byte), 2),
        // A part of a character beyond ASCII has bit 7 set.
        [byte, ..] => (Stroke::of(char::from(byte)).filter(|_| byte.is_ascii()), 1),
        [] => (None, 0),
    }
}

/// `byte` with Alt.
fn alt(byte: u8) -> Option<Stroke> {
    let stroke = Stroke::of(char::from(byte)).filter(|_| byte.is_ascii())?;
    Some(Stroke { alt: true, ..stroke })
}

/// What stands behind ESC [, if it is complete: numbers with semicolons between them, and a last character that says
/// what it is.
fn control_sequence(bytes: &[u8]) -> Option<(Option<Stroke>, usize)> {
    // Linux's own console has F1 to F5 as ESC [ [ A and so on.
    if let [b'[', key @ b'A'..=b'E', ..] = *bytes {
        return Some((Some(Key::FUNCTION[usize::from(key - b'A')].into()), 2));
    }
    let end = bytes.iter().position(|byte| !(0x20..=0x3F).contains(byte))?;
    let last = bytes[end];
    if !(0x40..=0x7E).contains(&last) {
        return None;
    }
    let mut numbers = bytes[..end].split(|&byte| byte == b';').map(number);
    let (code, held) = (numbers.next().flatten(), numbers.next().flatten());
    let key = match last {
        b'~' => code.and_then(numbered),
        b'Z' => Some(Key::TAB),
        _ => lettered(last),
    };
    // One more than the sum of 1 for Shift, 2 for Alt and 4 for Ctrl.
    let held = held.unwrap_or(1).saturating_sub(1);
    let stroke = key.map(|key| Stroke {
        key,
        shift: held & 1 != 0 || last == b'Z',
        alt: held & 2 != 0,
        ctrl: held & 4 != 0,
    });
    Some((stroke, end + 1))
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The keys that a letter stands for.
fn lettered(letter: u8) -> Option<Key> {
    Some(match letter {
        b'A' => Key::UP,
        b'B' => Key::DOWN,
        b'C' => Key::RIGHT,
        b'D' => Key::LEFT,
        b'F' => Key::END,
        b'H' => Key::HOME,
        b'P'..=b'S' => Key::FUNCTION[usize::from(letter - b'P')],
        _ => return None,
    })
}

/// The keys that a number and ~ stand for. The function keys have gaps, as the VT220's keyboard had.
fn numbered(number: u32) -> Option<Key> {
    let function = |first: u32, number: u32| Key::FUNCTION.get((number - first) as usize).copied();
    match number {
        1 | 7 => Some(Key::HOME),
        2 => Some(Key::INSERT),
        3 => Some(Key::DELETE),
        4 | 8 => Some(Key::END),
        5 => Some(Key::PAGE_UP),
        6 => Some(Key::PAGE_DOWN),
        11..=15 => function(11, number),
        17..=21 => function(12, number),
        23 | 24 => function(13, number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(key: Key) -> Stroke {
        key.into()
    }

    #[test]
    fn keys_without_a_character_come_in_sequences() {
        for (bytes, keys) in [
            ("\x1b[A\x1b[B\x1b[C\x1b[D", [Key::UP, Key::DOWN, Key::RIGHT, Key::LEFT]),
            ("\x1bOA\x1bOB\x1bOC\x1bOD", [Key::UP, Key::DOWN, Key::RIGHT, Key::LEFT]),
            ("\x1b[H\x1b[F\x1b[5~\x1b[6~", [Key::HOME, Key::END, Key::PAGE_UP, Key::PAGE_DOWN]),
            ("\x1b[1~\x1b[4~\x1b[2~\x1b[3~", [Key::HOME, Key::END, Key::INSERT, Key::DELETE]),
        ] {
            assert_eq!(strokes(bytes.as_bytes()), keys.map(plain), "{bytes:?}");
        }
        let xterm = "\x1bOP\x1bOQ\x1bOR\x1bOS\x1b[15~\x1b[17~\x1b[18~\x1b[19~\x1b[20~\x1b[21~\x1b[23~\x1b[24~";
        assert_eq!(strokes(xterm.as_bytes()), Key::FUNCTION.map(plain));
        let linux = "\x1b[[A\x1b[[B\x1b[[C\x1b[[D\x1b[[E";
        assert_eq!(strokes(linux.as_bytes()), Key::FUNCTION.map(plain)[..5]);
        let vt220 = "\x1b[11~\x1b[12~\x1b[13~\x1b[14~";
        assert_eq!(strokes(vt220.as_bytes()), Key::FUNCTION.map(plain)[..4]);
    }

    #[test]
    fn what_is_held_comes_along() {
        let held = |shift, ctrl, alt, key| Stroke { key, shift, ctrl, alt };
        assert_eq!(strokes(b"\x1b[1;5C"), [held(false, true, false, Key::RIGHT)]);
        assert_eq!(strokes(b"\x1b[3;7~"), [held(false, true, true, Key::DELETE)]);
        assert_eq!(strokes(b"\x1b[15;2~"), [held(true, false, false, Key::FUNCTION[4])]);
        assert_eq!(strokes(b"\x1b[Z"), [held(true, false, false, Key::TAB)]);
        let x = Stroke::of('x').unwrap();
        assert_eq!(strokes(b"\x1bx\x18"), [Stroke { alt: true, ..x }, Stroke { ctrl: true, ..x }]);
    }

    #[test]
    fn esc_alone_is_a_key() {
        let esc = plain(Key::ESC);
        let a = Stroke::of('a').unwrap();
        assert_eq!(strokes(b"\x1b"), [esc]);
        assert_eq!(strokes(b"\x1b\x1b"), [esc, esc]);
        assert_eq!(strokes(b"a\x1b"), [a, esc]);
        assert_eq!(strokes(b"\x1b\x1b[A"), [esc, plain(Key::UP)]);
        // No sequence at all: Alt and a bracket.
        let bracket = Stroke { alt: true, ..Stroke::of('[').unwrap() };
        assert_eq!(strokes(b"\x1b["), [bracket]);
        assert_eq!(strokes(b"\x1b[\x01"), [bracket, Stroke { ctrl: true, ..a }]);
    }

    #[test]
    fn what_has_no_key_is_dropped() {
        assert_eq!(strokes("aé가b".as_bytes()), strokes(b"ab"));
        assert_eq!(strokes(b"\x1b[200~a\x1b[?1;2c\x1b[999999999999~\x1b[~"), strokes(b"a"));
        assert_eq!(strokes(b"\x1b\xE4"), []);
    }

    proptest! {
        /// Text in ASCII is a stroke for each character, and nothing that comes does harm.
        #[test]
        fn text_is_typed_as_it_comes(text in "[ -~\n\t]{0,40}", noise: Vec<u8>) {
            let expected: Vec<_> = text.chars().filter_map(Stroke::of).collect();
            prop_assert_eq!(strokes(text.as_bytes()), expected);
            prop_assert!(strokes(&noise).len() <= noise.len());
        }
    }
}
