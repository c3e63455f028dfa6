//! A line editor: what each typed byte does to the line, and what to print for it.

/// The longest line, in bytes.
pub const MAX_LENGTH: usize = 256;

/// What a byte led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The line goes on.
    More,
    /// Enter: the line is complete.
    Complete,
    /// Ctrl-C: the line is dropped.
    Cancelled,
    /// Ctrl-D on an empty line.
    End,
}

/// How much of an escape sequence (an arrow key, say) has been seen. None has a meaning here, so
/// they are swallowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// After ESC.
    Started,
    /// After `ESC [` or `ESC O`, up to a letter or `~`.
    Parameters,
}

/// The line under the cursor.
#[derive(Debug)]
pub struct Line {
    bytes: [u8; MAX_LENGTH],
    length: usize,
    escape: Escape,
    /// The last byte was a carriage return: a line feed right after it belongs to it.
    after_return: bool,
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { bytes: [0; MAX_LENGTH], length: 0, escape: Escape::None, after_return: false }
    }

    /// What was typed. Bytes that are no UTF-8 end the text.
    pub fn text(&self) -> &str {
        let bytes = &self.bytes[..self.length];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }

    /// Starts over.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Takes a typed byte; `echo` gets what the terminal should show.
    pub fn feed(&mut self, byte: u8, mut echo: impl FnMut(&[u8])) -> Event {
        let after_return = core::mem::replace(&mut self.after_return, byte == b'\r');
        match (self.escape, byte) {
            (_, 0x1b) => self.escape = Escape::Started,
            (Escape::Started, b'[' | b'O') => self.escape = Escape::Parameters,
            (Escape::Parameters, 0x20..=0x3f) => {}
            (Escape::Started | Escape::Parameters, 0x20..) => self.escape = Escape::None,
            _ => {
                self.escape = Escape::None;
                return self.key(byte, after_return, &mut echo);
            }
        }
        Event::More
    }

    fn key(&mut self, byte: u8, after_return: bool, echo: &mut impl FnMut(&[u8])) -> Event {
        match byte {
            b'\n' if after_return => {}
            b'\r' | b'\n' => {
                echo(b"\n");
                return Event::Complete;
            }
            // Ctrl-C
            0x03 => {
                echo(b"^C\n");
                return Event::Cancelled;
            }
            // Ctrl-D
            0x04 if self.length == 0 => {
                echo(b"\n");
                return Event::End;
            }
            // Backspace, as terminals send it today and as they used to.
            0x7f | 0x08 => self.rub_out(echo),
            // Ctrl-U
            0x15 => {
                while self.length > 0 {
                    self.rub_out(echo);
                }
            }
            b'\t' => self.insert(b' ', echo),
            0x20.. => self.insert(byte, echo),
            _ => {}
        }
        Event::More
    }

    fn insert(&mut self, byte: u8, echo: &mut impl FnMut(&[u8])) {
        if self.length == MAX_LENGTH {
            echo(b"\x07");
        } else {
            self.bytes[self.length] = byte;
            self.length += 1;
            echo(&[byte]);
        }
    }

    /// Takes the last character away, from the line and from the screen.
    fn rub_out(&mut self, echo: &mut impl FnMut(&[u8])) {
        if self.length == 0 {
            return;
        }
        // A character is a byte followed by UTF-8 continuation bytes, 10xx_xxxx.
        let end = self.length;
        let is_start = |byte: u8| byte & 0xc0 != 0x80;
        self.length = self.bytes[..end].iter().rposition(|&byte| is_start(byte)).unwrap_or(0);
        // From three bytes on it is most likely Korean, Chinese, Japanese or an emoji: two columns.
        let columns = if end - self.length >= 3 { 2 } else { 1 };
        (0..columns).for_each(|_| echo(b"\x08 \x08"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines, or what ended them, and all that was echoed.
    fn typed(bytes: &[u8]) -> (Vec<(Event, String)>, String) {
        let mut line = Line::new();
        let (mut events, mut echoed) = (vec![], vec![]);
        for &byte in bytes {
            let event = line.feed(byte, |echo| echoed.extend(echo));
            if event != Event::More {
                events.push((event, line.text().to_owned()));
                line.clear();
            }
        }
        (events, String::from_utf8(echoed).unwrap())
    }

    fn lines(bytes: &[u8]) -> Vec<String> {
        typed(bytes).0.into_iter().map(|(_, line)| line).collect()
    }

    #[test]
    fn enter_is_return_line_feed_or_both() {
        assert_eq!(lines(b"a\rb\nc\r\nd\n\n"), ["a", "b", "c", "d", ""]);
    }

    #[test]
    fn backspace_takes_a_whole_character() {
        assert_eq!(typed("a\u{ac00}\x7fb\x08\x08c\x7f\x7f\n".as_bytes()).0[0].1, "");
        assert_eq!(typed("\u{ac00}\x7f\n".as_bytes()).1, "\u{ac00}\x08 \x08\x08 \x08\n");
        assert_eq!(lines(b"helo\x7flo\n"), ["hello"]);
        assert_eq!(lines(b"wrong\x15right\n"), ["right"]);
    }

    #[test]
    fn control_keys_end_the_line() {
        let expected = [(Event::Cancelled, "abc".to_owned()), (Event::End, String::new())];
        assert_eq!(typed(b"abc\x03\x04"), (expected.to_vec(), "abc^C\n\n".to_owned()));
        // In the middle of a line, Ctrl-D is nothing.
        assert_eq!(lines(b"a\x04b\n"), ["ab"]);
    }

    #[test]
    fn arrow_keys_leave_no_trace() {
        assert_eq!(lines(b"a\x1b[Ab\x1b[1;5Cc\x1bOPd\x1b\n"), ["abcd"]);
    }

    #[test]
    fn a_long_line_rings_the_bell() {
        let (events, echoed) = typed(format!("{}\n", "x".repeat(MAX_LENGTH + 3)).as_bytes());
        assert_eq!(events[0].1.len(), MAX_LENGTH);
        assert!(echoed.ends_with("\x07\x07\x07\n"));
    }

    #[test]
    fn broken_utf8_ends_the_text() {
        let mut line = Line::new();
        for byte in [b'a', 0xff, b'b'] {
            line.feed(byte, |_| ());
        }
        assert_eq!(line.text(), "a");
    }
}
