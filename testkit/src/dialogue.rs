//! A program on a pseudo-terminal: the test waits for what it prints and types the answers.

use std::num::NonZero;
use std::time::Instant;

use crate::{Program, TICK, Terminal, described, keep};

/// A program that runs on a terminal of its own, as its session's controlling one: Ctrl-C and changes of
/// the window's size reach it as signals. It is killed when the dialogue is dropped.
pub struct Dialogue {
    terminal: Terminal,
    command: String,
    program: Program,
    printed: Vec<u8>,
    // What a person sees of it.
    window: vt100::Parser,
    // Up to where `expect` has looked.
    seen: usize,
}

impl Dialogue {
    #[track_caller]
    pub(crate) fn start(mut program: Program) -> Self {
        let terminal = match Terminal::start(&mut program.command, ROWS, COLUMNS) {
            Ok(terminal) => terminal,
            Err(error) => panic!("a program on a terminal cannot be started: {error}"),
        };
        Self {
            terminal,
            command: described(&program.command),
            program,
            printed: Vec::new(),
            window: vt100::Parser::new(ROWS, COLUMNS, 0),
            seen: 0,
        }
    }

    /// Waits until `text` has been printed since the last `expect`. Panics with everything that was
    /// printed if it does not come in time.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> &mut Self {
        let deadline = Instant::now() + self.program.patience;
        loop {
            if let Some(at) = find(&self.printed[self.seen..], text.as_bytes()) {
                self.seen += at + text.len();
                return self;
            }
            if Instant::now() >= deadline {
                self.fail(&format!("{text:?} was not printed within {:?}", self.program.patience));
            }
            if !self.read() && self.terminal.has_ended() && !self.read() {
                if find(&self.printed[self.seen..], text.as_bytes()).is_some() {
                    continue;
                }
                self.fail(&format!("it ended without having printed {text:?}"));
            }
        }
    }

    /// Types `keys`. Control characters are written as such: `"\x03"` is Ctrl-C, `"\x04"` Ctrl-D.
    #[track_caller]
    pub fn send(&mut self, keys: &str) -> &mut Self {
        if let Err(error) = self.terminal.type_in(keys.as_bytes()) {
            self.fail(&format!("{keys:?} cannot be typed: {error}"));
        }
        self
    }

    /// Changes the size of the window; the program gets `SIGWINCH`.
    #[track_caller]
    pub fn resize(&mut self, rows: u16, columns: u16) -> &mut Self {
        let (Some(rows), Some(columns)) = (NonZero::new(rows), NonZero::new(columns)) else {
            self.fail("a window has rows and columns");
        };
        if let Err(error) = self.terminal.resize(rows, columns) {
            self.fail(&format!("the window cannot be resized: {error}"));
        }
        self.window.screen_mut().set_size(rows, columns);
        self
    }

    /// Waits until `text` stands in the window, wherever the program has written it. Panics with what the window
    /// shows if it does not come in time.
    #[track_caller]
    pub fn shows(&mut self, text: &str) -> &mut Self {
        self.see(&format!("{text:?} was not shown"), |it| it.window().contains(text))
    }

    /// Waits until `text` no longer stands in the window.
    #[track_caller]
    pub fn hides(&mut self, text: &str) -> &mut Self {
        self.see(&format!("{text:?} was shown"), |it| !it.window().contains(text))
    }

    /// Waits until the cursor is in this row and column of the terminal.
    #[track_caller]
    pub fn shows_cursor_at(&mut self, place: (u16, u16)) -> &mut Self {
        let otherwise = format!("the cursor did not come to {place:?}");
        self.see(&otherwise, |it| it.terminal().cursor_position() == place)
    }

    #[track_caller]
    fn see(&mut self, otherwise: &str, seen: impl Fn(&Self) -> bool) -> &mut Self {
        let deadline = Instant::now() + self.program.patience;
        while !seen(self) {
            let more = self.read();
            if Instant::now() >= deadline || !more && self.terminal.has_ended() {
                let window = crate::indented(&self.window());
                self.fail(&format!("{otherwise}; the window:\n{window}"));
            }
        }
        self
    }

    /// The window's lines without the blanks that end them.
    fn window(&self) -> String {
        let contents = self.window.screen().contents();
        contents.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }

    /// Has something else write on the window.
    pub fn spoil(&mut self) -> &mut Self {
        self.window.process(b"\x1b[2J\x1b[Hsomething else");
        self
    }

    /// What the window shows, and in which state it is.
    pub fn terminal(&self) -> &vt100::Screen {
        self.window.screen()
    }

    /// Whether the terminal is in raw mode: keys neither echoed nor gathered to lines. A program that
    /// changes the modes has to restore them whatever happens.
    #[track_caller]
    pub fn is_raw(&self) -> bool {
        match self.terminal.is_raw() {
            Ok(raw) => raw,
            Err(error) => self.fail(&format!("the terminal has no modes: {error}")),
        }
    }

    /// The program's process ID, to send it signals.
    pub fn pid(&self) -> u32 {
        self.terminal.pid()
    }

    /// All that was printed so far, as text with the terminal's line ends (`\r\n`).
    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&self.printed).into_owned()
    }

    /// Waits for the program's end and gives its exit code, or -1 if a signal ended it. Panics with
    /// everything that was printed if it does not end in time.
    #[track_caller]
    pub fn end(&mut self) -> i32 {
        let deadline = Instant::now() + self.program.patience;
        loop {
            // What it prints has to be taken from the terminal, or it would wait for us.
            let more = self.read();
            match self.terminal.status() {
                Some(status) if !more => return status.code().unwrap_or(-1),
                _ if Instant::now() >= deadline => {
                    self.fail(&format!("it did not end within {:?}", self.program.patience))
                }
                _ => {}
            }
        }
    }

    /// Fails the test with all that the program printed.
    #[track_caller]
    pub fn fail(&self, why: &str) -> ! {
        panic!(
            "{why}\n  command: {}\n  printed:\n{}\n{}",
            self.command,
            crate::indented(&self.printed().replace('\r', "")),
            keep(&[("terminal", &self.printed)]),
        );
    }

    /// Takes what is there, after a moment of waiting for it. Whether there was anything.
    fn read(&mut self) -> bool {
        let bytes = self.terminal.read(TICK);
        self.printed.extend(&bytes);
        self.window.process(&bytes);
        !bytes.is_empty()
    }
}

/// The window's size at first.
const ROWS: NonZero<u16> = NonZero::new(24).unwrap();
const COLUMNS: NonZero<u16> = NonZero::new(80).unwrap();

/// Where `needle` begins in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len().max(1)).position(|window| window == needle)
}
