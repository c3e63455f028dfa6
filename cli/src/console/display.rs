//! Draws a guest's text screen on the terminal, again and again as it changes.
//!
//! The terminal's *alternate screen* is used, so that what was there before comes back at the end. Only what has
//! changed since the last picture is sent. A terminal with fewer rows than the guest's screen shows those around
//! the cursor, one with fewer columns the left ones.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use anstyle::Reset;
use common::run::Ending;
use common::text_screen::{COLUMNS, Cell, DEFAULT_ATTRIBUTE, ROWS};
use common::vga::Picture;
use crossterm::Command;
use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use rustix::termios::tcgetwinsize;

use super::{Console, KEYS, Screen, lock, terminal};
use crate::screen::{lines, style};

/// How often the guest's screen is looked at: 30 times a second. Nothing is drawn while nothing changes.
const FRAME: Duration = Duration::from_millis(33);

/// Black on grey, for what is not the guest's.
const OURS: u8 = 0x70;

/// A size in rows and columns.
type Size = (usize, usize);

/// What the terminal shows: as much of the guest's screen as there is room for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View {
    size: Size,
    rows: Vec<Vec<Cell>>,
    /// Row and column of the cursor.
    cursor: Option<(usize, usize)>,
}

impl View {
    /// The part of `picture` that fits; `notice` is written over its first rows.
    fn new(picture: &Picture, (rows, columns): Size, notice: &str) -> Self {
        // The row of the cursor is the one to see.
        let row = picture.cursor.map_or(0, |(row, _)| row);
        let top = (row + 1).saturating_sub(rows);
        let seen = top..ROWS.min(top + rows);
        let mut view: Vec<Vec<Cell>> =
            seen.map(|row| picture.screen.row(row).take(columns).collect()).collect();
        for (cells, line) in view.iter_mut().zip(notice.lines()) {
            let line = line.bytes().chain(std::iter::repeat(b' '));
            for (cell, code) in cells.iter_mut().zip(line) {
                *cell = Cell { code, attribute: OURS };
            }
        }
        let cursor = picture.cursor.map(|(row, column)| (row - top, column));
        Self {
            size: (rows, columns),
            rows: view,
            cursor: cursor.filter(|&(row, column)| row < rows && column < columns),
        }
    }

    /// What to send to a terminal that shows `before`, if that is known, to have it show this.
    fn draw(&self, before: Option<&Self>, colours: bool) -> String {
        let before = before.filter(|before| before.size == self.size);
        if before == Some(self) {
            return String::new();
        }
        let mut text = String::new();
        send(&mut text, Hide);
        if before.is_none() {
            text.push_str(&Reset.render().to_string());
            send(&mut text, Clear(ClearType::All));
        }
        // A terminal without a picture shows blanks.
        let blank = vec![Cell { code: b' ', attribute: DEFAULT_ATTRIBUTE }; COLUMNS];
        let mut attribute = DEFAULT_ATTRIBUTE;
        for (row, cells) in self.rows.iter().enumerate() {
            let shown = before.map_or(&blank, |before| &before.rows[row]);
            // Where the terminal's own cursor is in this row, if it is there.
            let mut at = None;
            for (column, (cell, shown)) in cells.iter().zip(shown).enumerate() {
                if cell == shown {
                    continue;
                }
                if at != Some(column) {
                    send(&mut text, MoveTo(column as u16, row as u16));
                }
                if colours && cell.attribute != attribute {
                    let style = style(cell.attribute);
                    text.push_str(&format!("{}{}", Reset.render(), style.render()));
                    attribute = cell.attribute;
                }
                text.push(cell.glyph());
                at = Some(column + 1);
            }
        }
        if attribute != DEFAULT_ATTRIBUTE {
            text.push_str(&Reset.render().to_string());
        }
        if let Some((row, column)) = self.cursor {
            send(&mut text, MoveTo(column as u16, row as u16));
            send(&mut text, Show);
        }
        text
    }
}

/// Appends the control sequence of `command`.
fn send(text: &mut String, command: impl Command) {
    // Writing to a string does not fail.
    let _ = command.write_ansi(text);
}

impl Console {
    /// Shows pictures of the guest's text screen from here on, which `picture` takes: on the terminal as it changes,
    /// and the last one when the machine has ended, which is all of them where stdout is no terminal. `--exit-when`
    /// waits for its text to stand there. Comes before [`Console::type_into`].
    pub fn show(
        &mut self,
        mut picture: impl FnMut() -> Option<Picture> + Send + 'static,
    ) -> io::Result<()> {
        let live = io::stdout().is_terminal();
        if live {
            let (mut enter, mut leave) = (String::new(), String::new());
            send(&mut enter, EnterAlternateScreen);
            send(&mut leave, Show);
            send(&mut leave, LeaveAlternateScreen);
            terminal::take_screen(enter, leave)?;
        }
        let notice = Arc::<AtomicBool>::default();
        let wanted = lock(&self.screen.shared.output).wanted.take();
        let drawer = Drawer {
            screen: self.screen(),
            live,
            colours: AutoStream::choice(&io::stdout()) != ColorChoice::Never,
            wanted: wanted.map(|wanted| String::from_utf8_lossy(&wanted.text).into_owned()),
            notice: Arc::clone(&notice),
        };
        let (stop, stopped) = channel();
        let colours = drawer.colours;
        let leave = self.stop.clone();
        let thread = thread::Builder::new().name("display".into()).spawn(move || {
            drawer.draw_until(&stopped, &mut picture, || leave.now(Ending::Left));
            // The last picture is the one that the guest leaves behind.
            let _ = stopped.recv();
            picture()
        })?;
        let end_of_line = if live && self.raw { "\r\n" } else { "\n" };
        self.notice = Some(notice);
        self.last_picture = Some(Box::new(move || {
            drop(stop);
            let picture = thread.join().ok().flatten();
            let lines = picture.map(|picture| lines(&picture.screen, colours));
            lines.unwrap_or_default().into_iter().map(|line| line + end_of_line).collect()
        }));
        Ok(())
    }
}

/// What draws, on a thread of its own: the guest never waits for the terminal.
struct Drawer {
    screen: Screen,
    /// stdout is a terminal.
    live: bool,
    colours: bool,
    /// The text of `--exit-when`.
    wanted: Option<String>,
    /// Whether somebody has asked for help.
    notice: Arc<AtomicBool>,
}

impl Drawer {
    /// Draws what `picture` gives until the other end of `stopped` is gone. Calls `seen` once the text that is wanted
    /// stands there.
    fn draw_until(
        mut self,
        stopped: &Receiver<()>,
        picture: &mut impl FnMut() -> Option<Picture>,
        seen: impl Fn(),
    ) {
        if !self.live && self.wanted.is_none() {
            return;
        }
        let (mut shown, mut last): (Option<View>, _) = (None, None);
        while stopped.recv_timeout(FRAME) == Err(RecvTimeoutError::Timeout) {
            // While the terminal still takes in the last picture, one is left out.
            if self.live && self.screen.is_pending() {
                continue;
            }
            if terminal::is_spoilt() {
                (shown, last) = (None, None);
            }
            let Some(picture) = picture() else { continue };
            let notice = if self.notice.load(Ordering::Relaxed) { KEYS } else { "" };
            let now = Some((picture, size(), notice));
            if now == last {
                continue;
            }
            last = now;
            let Some((picture, size, notice)) = &last else { continue };
            if self.live {
                let view = View::new(picture, *size, notice);
                let text = view.draw(shown.as_ref(), self.colours);
                // The console is the guest's end of stdout: it tells by itself when that fails.
                let _ = self.screen.write_all(text.as_bytes());
                shown = Some(view);
            }
            if self.wanted.as_ref().is_some_and(|wanted| picture.screen.text().contains(wanted)) {
                seen();
                self.wanted = None;
            }
        }
    }
}

/// The terminal's size.
fn size() -> Size {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        // It does not know.
        _ => (ROWS, COLUMNS),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use common::bus::Device;
    use common::text_screen::TextScreen;
    use proptest::prelude::*;

    use super::*;

    fn terminal(rows: usize, columns: usize) -> vt100::Parser {
        let size = |count: usize| NonZero::new(count as u16).unwrap();
        vt100::Parser::new(size(rows), size(columns), 0)
    }

    fn picture(writes: &[(u64, Vec<u8>)], cursor: Option<(usize, usize)>) -> Picture {
        let mut screen = TextScreen::new();
        for (offset, data) in writes {
            screen.write(*offset, data);
        }
        Picture { screen, cursor }
    }

    fn pictures() -> impl Strategy<Value = Picture> {
        // Rows are written more often than anything between them.
        let write = (0..4000_u64, prop::collection::vec(any::<u8>(), 1..200));
        let cursor = prop::option::of((0..ROWS, 0..COLUMNS));
        (prop::collection::vec(write, 0..12), cursor)
            .prop_map(|(writes, cursor)| picture(&writes, cursor))
    }

    proptest! {
        /// A terminal that gets the differences shows the last picture, whatever its size is and whatever the
        /// guest has written.
        #[test]
        fn the_terminal_shows_the_last_picture(
            pictures in prop::collection::vec(pictures(), 1..5),
            (rows, columns) in (1..40_usize, 1..100_usize),
            colours: bool,
        ) {
            let mut terminal = terminal(rows, columns);
            terminal.process(b"something else\r\nwas here before");
            let mut shown: Option<View> = None;
            for picture in &pictures {
                let view = View::new(picture, (rows, columns), "");
                let text = view.draw(shown.as_ref(), colours);
                prop_assert_eq!(view.draw(Some(&view), colours), "");
                terminal.process(text.as_bytes());
                let top = (picture.cursor.map_or(0, |(row, _)| row) + 1).saturating_sub(rows);
                for row in 0..rows {
                    let expected: String = match top + row {
                        at @ ..ROWS => picture.screen.row(at).take(columns).map(Cell::glyph).collect(),
                        _ => String::new(),
                    };
                    let shown: String = (0..columns as u16)
                        .map(|column| match terminal.screen().cell(row as u16, column) {
                            Some(cell) if cell.has_contents() => cell.contents().to_owned(),
                            _ => " ".to_owned(),
                        })
                        .collect();
                    prop_assert_eq!(shown.trim_end(), expected.trim_end(), "row {}", row);
                }
                let screen = terminal.screen();
                match picture.cursor {
                    Some((row, column)) if column < columns => {
                        prop_assert!(!screen.hide_cursor());
                        let at = ((row - top) as u16, column as u16);
                        prop_assert_eq!(screen.cursor_position(), at);
                    }
                    _ => prop_assert!(screen.hide_cursor()),
                }
                shown = Some(view);
            }
        }
    }

    #[test]
    fn colours_are_the_guests() {
        let mut terminal = terminal(25, 80);
        // Bright yellow on blue, and light grey on black.
        let picture = picture(&[(0, vec![b'a', 0x1E, b'b', 0x07])], None);
        terminal.process(View::new(&picture, (25, 80), "").draw(None, true).as_bytes());
        let cell = |column| terminal.screen().cell(0, column).unwrap();
        assert_eq!(
            (cell(0).fgcolor(), cell(0).bgcolor()),
            (vt100::Color::Idx(11), vt100::Color::Idx(4))
        );
        assert_eq!(cell(1).fgcolor(), vt100::Color::Default);
    }

    #[test]
    fn little_is_sent_for_a_little_change() {
        let one = View::new(&picture(&[], Some((0, 0))), (25, 80), "");
        let two = View::new(&picture(&[(0, vec![b'x', 7])], Some((0, 1))), (25, 80), "");
        let text = two.draw(Some(&one), true);
        assert!(text.len() < 40, "{text:?}");
        // Another size is another picture.
        assert!(View { size: (25, 81), ..two.clone() }.draw(Some(&two), true).contains("\x1b[2J"));
    }

    #[test]
    fn a_notice_stands_above_the_guests_screen() {
        let view = View::new(&picture(&[(0, vec![b'x', 7])], None), (3, 10), "key\nhelp");
        let text = |row: usize| view.rows[row].iter().map(|cell| cell.glyph()).collect::<String>();
        assert_eq!([text(0), text(1), text(2)], ["key       ", "help      ", "          "]);
    }
}
