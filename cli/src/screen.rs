//! Shows a guest's text screen: again and again on a terminal, once at the end into a pipe.

use std::io::{self, IsTerminal, Write};
use std::sync::PoisonError;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Effects, Style};
use common::bus::Shared;
use common::text_screen::{COLUMNS, Cell, DEFAULT_ATTRIBUTE, ROWS, TextScreen};

/// How often the screen is looked at: 25 pictures a second, and none while nothing changes.
const FRAME: Duration = Duration::from_millis(40);

/// Draws a guest's screen on stdout.
#[derive(Debug)]
pub struct Viewer {
    screen: Shared<TextScreen>,
    live: Option<(Sender<()>, JoinHandle<usize>)>,
}

impl Viewer {
    /// Will draw `screen`: if `live` and stdout is a terminal with room for it, also while the guest
    /// runs. That is done by a thread of its own, so that the guest never waits for the terminal,
    /// and one that has stopped writing and goes on running is seen as it is.
    pub fn start(screen: &Shared<TextScreen>, live: bool) -> Self {
        let live = (live && has_room()).then(|| {
            let (stop, stopped) = mpsc::channel();
            let screen = screen.clone();
            (stop, thread::spawn(move || draw_until(&stopped, &screen)))
        });
        Self { screen: screen.clone(), live }
    }

    /// Draws what the guest has left on its screen. A guest that never wrote on it shows nothing.
    pub fn finish(self) -> io::Result<()> {
        let drawn = match self.live {
            Some((stop, thread)) => {
                drop(stop);
                thread.join().unwrap_or(0)
            }
            None => 0,
        };
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        if screen.writes() == 0 {
            return Ok(());
        }
        let colours = AutoStream::choice(&io::stdout()) != ColorChoice::Never;
        draw(&lines(&screen, colours), drawn)
    }
}

/// Draws `screen` whenever it has changed, until the other end of `stopped` is gone. Returns how many
/// lines the last picture has.
fn draw_until(stopped: &mpsc::Receiver<()>, screen: &Shared<TextScreen>) -> usize {
    let (mut seen, mut drawn) = (0, 0);
    while stopped.recv_timeout(FRAME) == Err(RecvTimeoutError::Timeout) {
        // The guest must wait while the screen is locked, so it is for as short as possible.
        let lines = {
            let screen = screen.lock().unwrap_or_else(PoisonError::into_inner);
            if screen.writes() == seen {
                continue;
            }
            seen = screen.writes();
            lines(&screen, AutoStream::choice(&io::stdout()) != ColorChoice::Never)
        };
        if draw(&lines, drawn).is_ok() {
            drawn = lines.len().max(drawn);
        }
    }
    drawn
}

/// Whether stdout is a terminal on which a whole screen can be drawn over again.
fn has_room() -> bool {
    let stdout = io::stdout();
    stdout.is_terminal()
        && rustix::termios::tcgetwinsize(&stdout).is_ok_and(|size| {
            usize::from(size.ws_row) > ROWS && usize::from(size.ws_col) >= COLUMNS
        })
}

/// Prints `lines` over the last picture, which has `drawn` lines.
fn draw(lines: &[String], drawn: usize) -> io::Result<()> {
    let mut picture = String::new();
    if drawn > 0 {
        // Up to the first line of the last picture, and clear all below (ECMA-48: CUU, ED).
        picture = format!("\x1b[{drawn}A\r\x1b[J");
    }
    for line in lines {
        picture.push_str(line);
        picture.push('\n');
    }
    for _ in lines.len()..drawn {
        picture.push('\n');
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(picture.as_bytes())?;
    stdout.flush()
}

/// The screen's rows up to the last one with something on it.
pub(crate) fn lines(screen: &TextScreen, colours: bool) -> Vec<String> {
    let mut lines: Vec<_> = (0..ROWS).map(|row| line(screen.row(row), colours)).collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}

/// One row without the blanks that end it, in colours as runs of cells of the same attribute.
fn line(cells: impl Iterator<Item = Cell>, colours: bool) -> String {
    let mut line = String::new();
    let mut blanks = String::new();
    let mut attribute = DEFAULT_ATTRIBUTE;
    for cell in cells {
        let glyph = cell.glyph();
        let seen = if colours { cell.attribute } else { DEFAULT_ATTRIBUTE };
        if seen == DEFAULT_ATTRIBUTE && glyph == ' ' {
            // Blanks are kept back until something follows that can be seen.
            blanks.push(' ');
            continue;
        }
        if !blanks.is_empty() && attribute != DEFAULT_ATTRIBUTE {
            line.push_str(&style(attribute).render_reset().to_string());
            attribute = DEFAULT_ATTRIBUTE;
        }
        line.push_str(&blanks);
        blanks.clear();
        if seen != attribute {
            line.push_str(&format!("{}{}", style(attribute).render_reset(), style(seen).render()));
            attribute = seen;
        }
        line.push(glyph);
    }
    line.push_str(&style(attribute).render_reset().to_string());
    line
}

/// A cell's attribute as the terminal's colours; the default one is the terminal's own.
pub(crate) fn style(attribute: u8) -> Style {
    if attribute == DEFAULT_ATTRIBUTE {
        return Style::new();
    }
    let cell = Cell { code: b' ', attribute };
    let blink = if cell.blinks() { Effects::BLINK } else { Effects::new() };
    Style::new()
        .fg_color(Some(colour(cell.foreground()).into()))
        .bg_color(Some(colour(cell.background()).into()))
        .effects(blink)
}

/// A PC's colour number, in which bit 0 is blue and bit 2 red, as the terminal's.
fn colour(number: u8) -> AnsiColor {
    let dark = match number & 0x7 {
        0 => AnsiColor::Black,
        1 => AnsiColor::Blue,
        2 => AnsiColor::Green,
        3 => AnsiColor::Cyan,
        4 => AnsiColor::Red,
        5 => AnsiColor::Magenta,
        6 => AnsiColor::Yellow,
        _ => AnsiColor::White,
    };
    dark.bright(number & 0x8 != 0)
}

#[cfg(test)]
mod tests {
    use common::bus::Device;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_lines_are_the_text_of_the_screen() {
        let mut screen = TextScreen::new();
        assert!(lines(&screen, false).is_empty());
        screen.write(2 * (COLUMNS as u64 + 3), &[b'h', 0x1F, b'i', 0x2E]);
        assert_eq!(lines(&screen, false), ["", "   hi"]);
    }

    #[test]
    fn colours_are_those_of_the_attribute_and_end_with_the_line() {
        let mut screen = TextScreen::new();
        screen.write(0, &[b'a', 0x07, b'b', 0x1E, b'c', 0x1E, b' ', 0x07]);
        screen.write(8, &[b'd', 0x84]);
        // Bright yellow (93) on blue (44); then red (31) on black (40), blinking (5).
        assert_eq!(
            lines(&screen, true),
            ["a\u{1b}[93m\u{1b}[44mbc\u{1b}[0m \u{1b}[5m\u{1b}[31m\u{1b}[40md\u{1b}[0m"]
        );
    }

    #[test]
    fn a_coloured_blank_is_something_to_see() {
        let mut screen = TextScreen::new();
        screen.write(0, &[b' ', 0x40]);
        assert_eq!(lines(&screen, true), ["\u{1b}[30m\u{1b}[41m \u{1b}[0m"]);
        assert!(lines(&screen, false).is_empty());
    }

    proptest! {
        /// Whatever a guest puts on its screen, no control character of its choice reaches the
        /// terminal, and without the colours it is the plain text.
        #[test]
        fn a_guest_cannot_speak_to_the_terminal(
            writes in prop::collection::vec((0..4000_u64, any::<[u8; 8]>()), 0..200),
        ) {
            let mut screen = TextScreen::new();
            for (offset, data) in &writes {
                screen.write(*offset, data);
            }
            let plain = lines(&screen, false).join("\n");
            prop_assert!(plain.chars().all(|char| char == '\n' || !char.is_control()));
            prop_assert_eq!(&plain, &screen.text());
            for line in lines(&screen, true) {
                let stripped = anstream::adapter::strip_str(&line).to_string();
                prop_assert!(!stripped.chars().any(char::is_control));
            }
        }
    }
}
