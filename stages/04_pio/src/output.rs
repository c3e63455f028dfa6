//! Where guests print: one alone gets stdout as it is, several share it line by line.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, LineWriter, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use common::teletype::Teletype;

/// A line longer than this is broken: a guest that never ends one doesn't fill the host's memory.
const LONGEST: usize = 4096;

const COLOURS: [AnsiColor; 6] = [
    AnsiColor::Green,
    AnsiColor::Cyan,
    AnsiColor::Yellow,
    AnsiColor::Magenta,
    AnsiColor::Blue,
    AnsiColor::Red,
];

/// The colour of guest number `id` among several.
pub fn colour(id: usize) -> Style {
    Style::new().fg_color(Some(COLOURS[id % COLOURS.len()].into()))
}

/// A teletype for each of `count` guests. A single one is fed from stdin; several get no input.
pub fn teletypes(count: usize) -> io::Result<Vec<Arc<Teletype>>> {
    if count == 1 {
        let tty = Teletype::new(raw()?);
        let fed = Arc::clone(&tty);
        // An error of stdin is its end: the guest can do no more about it than we.
        thread::Builder::new().name("stdin".into()).spawn(move || fed.feed(io::stdin()))?;
        return Ok(vec![tty]);
    }
    // What `anstream` knows of stdout: whether it is a terminal, and of NO_COLOR.
    let plain = AutoStream::choice(&io::stdout()) == ColorChoice::Never;
    Ok((0..count)
        .map(|id| {
            let style = if plain { Style::new() } else { colour(id) };
            let tty = Teletype::new(Lines::new(io::stdout(), style));
            tty.end_of_input();
            tty
        })
        .collect())
}

/// stdout byte for byte: to a terminal line by line, else in blocks.
fn raw() -> io::Result<Box<dyn Write + Send>> {
    let stdout = io::stdout();
    let file = File::from(stdout.as_fd().try_clone_to_owned()?);
    Ok(if stdout.is_terminal() {
        Box::new(LineWriter::new(file))
    } else {
        Box::new(BufWriter::new(file))
    })
}

/// One of several guests: its output reaches `to` in whole lines.
struct Lines<W> {
    to: W,
    style: Style,
    line: Vec<u8>,
}

impl<W: Write> Lines<W> {
    /// Lines that are printed in `style`.
    fn new(to: W, style: Style) -> Self {
        Self { to, style, line: Vec::new() }
    }

    /// Prints the line with one call: stdout is locked during each.
    fn end_line(&mut self) -> io::Result<()> {
        let Self { to, style, line } = self;
        let mut whole = style.render().to_string().into_bytes();
        whole.append(line);
        whole.extend(style.render_reset().to_string().bytes());
        whole.push(b'\n');
        to.write_all(&whole)
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' || self.line.len() == LONGEST {
                self.end_line()?;
            }
            if byte != b'\n' {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    /// Ends the line, if one has begun: called when the guest has printed its last.
    fn flush(&mut self) -> io::Result<()> {
        if self.line.is_empty() { Ok(()) } else { self.end_line() }
    }
}
