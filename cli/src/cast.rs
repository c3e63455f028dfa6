//! asciicast v2: what a terminal showed, as a file of text that asciinema and others play.
//!
//! The first line is a header, every other one an event: `[seconds, "o", "what was printed"]`. See
//! <https://docs.asciinema.org/manual/asciicast/v2/>.

use std::io::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most that is written to a file of this kind, and read of one: a guest that prints without end shall fill
/// nobody's disk. It is some hours of a kernel's messages.
pub const LIMIT: u64 = 16 << 20;

/// The largest window, in columns and in rows.
const LARGEST: u16 = 500;

/// The longest session.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a text is no asciicast.
#[derive(Debug, Error)]
pub enum Error {
    /// It is some other text.
    #[error("line {line} is no part of an asciicast v2: {why}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What was found there.
        why: String,
    },
    /// A window that no terminal has.
    #[error("a window of {0} columns and {1} rows, expected 1 to 500 of each")]
    Size(u16, u16),
}

/// The file's first line.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Header {
    /// Always 2.
    pub version: u8,
    /// The window's columns.
    pub width: u16,
    /// Its rows.
    pub height: u16,
    /// When it began, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// What it shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Ours: the moment that stands for all of it, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poster: Option<f64>,
    /// Ours: the fingerprint of the script that was played.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
}

impl Header {
    /// For a window of this size.
    pub fn new(width: u16, height: u16) -> Self {
        Self { version: 2, width, height, ..Self::default() }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// This was printed.
    Output(String),
    /// This was pressed.
    Input(String),
    /// A label.
    Marker(String),
    /// The window has so many columns and rows from here on.
    Resize(u16, u16),
}

/// A whole session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cast {
    /// The first line.
    pub header: Header,
    /// What happened when, since the beginning. No time is before the one in front of it.
    pub events: Vec<(Duration, Event)>,
}

impl Cast {
    /// Reads a file's bytes, which may be anybody's.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut lines = (1..).zip(bytes.split(|&byte| byte == b'\n'));
        let (_, first) = lines.next().unwrap_or_default();
        let header: Header = serde_json::from_slice(first).map_err(|error| wrong(1, error))?;
        if header.version != 2 {
            return Err(wrong(1, format!("this is version {}", header.version)));
        }
        check_size(header.width, header.height)?;
        let (mut events, mut latest) = (Vec::new(), Duration::ZERO);
        for (number, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
            let (at, code, data): (f64, String, String) =
                serde_json::from_slice(line).map_err(|error| wrong(number, error))?;
            let at = Duration::try_from_secs_f64(at).ok().filter(|at| *at <= LONGEST);
            let at = at.ok_or_else(|| wrong(number, "its time is not between 0 and a day"))?;
            // Of a session that was edited, the times may go back by a rounding error.
            latest = latest.max(at);
            events.push((latest, Event::of(&code, data, number)?));
        }
        // What is not known is left out: the format may grow.
        let events = events.into_iter().filter_map(|(at, event)| Some((at, event?))).collect();
        Ok(Self { header, events })
    }

    /// The file's bytes, if it is not too long for one.
    pub fn written(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &self.header)?;
        self.events.iter().try_for_each(|(at, event)| writer.event(*at, event))?;
        Ok(bytes)
    }
}

fn wrong(line: usize, why: impl ToString) -> Error {
    Error::Line { line, why: why.to_string() }
}

fn check_size(columns: u16, rows: u16) -> Result<(), Error> {
    let fits = |size| (1..=LARGEST).contains(&size);
    if fits(columns) && fits(rows) { Ok(()) } else { Err(Error::Size(columns, rows)) }
}

impl Event {
    /// The event of an event's line; none of a kind that is not known.
    fn of(code: &str, data: String, line: usize) -> Result<Option<Self>, Error> {
        Ok(Some(match code {
            "o" => Self::Output(data),
            "i" => Self::Input(data),
            "m" => Self::Marker(data),
            "r" => {
                let size = data.split_once('x');
                let size = size.and_then(|(c, r)| Some((c.parse().ok()?, r.parse().ok()?)));
                let (columns, rows) =
                    size.ok_or_else(|| wrong(line, "it has no size such as 80x24"))?;
                check_size(columns, rows)?;
                Self::Resize(columns, rows)
            }
            _ => return Ok(None),
        }))
    }
}

/// Writes such a file while the session goes on.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    /// How much may still be written.
    left: u64,
    /// The beginning of a character whose other bytes have not been printed yet.
    begun: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins it with the header.
    pub fn new(out: W, header: &Header) -> io::Result<Self> {
        let mut writer = Self { out, left: LIMIT, begun: Vec::new() };
        writer.line(serde_json::to_string(header)?)?;
        Ok(writer)
    }

    /// `bytes` were printed. A character may come in pieces, and what is none is shown as U+FFFD.
    pub fn output(&mut self, at: Duration, bytes: &[u8]) -> io::Result<()> {
        self.begun.extend(bytes);
        let text = take_text(&mut self.begun);
        if text.is_empty() { Ok(()) } else { self.event(at, &Event::Output(text)) }
    }

    /// Anything happened. [`io::ErrorKind::FileTooLarge`] says that the file has no room for it.
    pub fn event(&mut self, at: Duration, event: &Event) -> io::Result<()> {
        let size;
        let (code, data) = match event {
            Event::Output(text) => ("o", text),
            Event::Input(text) => ("i", text),
            Event::Marker(text) => ("m", text),
            Event::Resize(columns, rows) => {
                size = format!("{columns}x{rows}");
                ("r", &size)
            }
        };
        let at = at.as_micros() as f64 / 1e6;
        self.line(serde_json::to_string(&(at, code, data))?)
    }

    /// One write a line: whoever is killed leaves whole lines.
    fn line(&mut self, mut line: String) -> io::Result<()> {
        line.push('\n');
        self.left = self
            .left
            .checked_sub(line.len() as u64)
            .ok_or(io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.out.write_all(line.as_bytes())
    }
}

/// Takes all whole characters out of `bytes`. What is none is U+FFFD, unless it is at the end and may become one.
pub fn take_text(bytes: &mut Vec<u8>) -> String {
    let (mut text, mut taken) = (String::new(), 0);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        // At the end, it may be the beginning of a character.
        let at_end = taken + invalid.len() == bytes.len();
        if at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        Cast::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        let at = Duration::from_millis;
        let cast = Cast {
            header: Header { title: Some("부팅".into()), ..Header::new(80, 24) },
            events: vec![
                (at(0), Event::Output("\u{1b}[1m안녕\r\n\"".into())),
                (at(1500), Event::Marker("a\nb".into())),
                (at(1500), Event::Input("\u{1}x".into())),
                (at(1501), Event::Resize(100, 30)),
            ],
        };
        let bytes = cast.written().unwrap();
        assert_eq!(Cast::parse(&bytes).unwrap(), cast);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("{\"version\":2,\"width\":80,\"height\":24,"), "{text}");
        assert!(text.contains("\n[1.5,\"m\",\"a\\nb\"]\n"), "{text}");
    }

    #[test]
    fn a_character_may_come_in_pieces_and_others_are_replaced() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &Header::new(80, 24)).unwrap();
        let at = Duration::from_secs(1);
        for piece in [&b"\xEA"[..], b"\xB0\x80\xFFa", b"\xE2\x82", b"b"] {
            writer.output(at, piece).unwrap();
        }
        let printed = |(_, event)| match event {
            Event::Output(text) => text,
            other => panic!("{other:?}"),
        };
        let cast = Cast::parse(&bytes).unwrap();
        let printed: Vec<String> = cast.events.into_iter().map(printed).collect();
        assert_eq!(printed, ["가\u{FFFD}a", "\u{FFFD}b"]);
    }

    #[test]
    fn a_file_has_an_end() {
        let mut writer = Writer::new(io::sink(), &Header::new(80, 24)).unwrap();
        let much = vec![b'x'; 1 << 20];
        let mut write = || writer.output(Duration::ZERO, &much);
        let full = (0..17).find_map(|_| write().err()).unwrap();
        assert_eq!(full.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn other_files_are_refused_in_a_line() {
        for (text, why) in [
            ("", "line 1 is no part of an asciicast v2: EOF"),
            ("\x7fELF", "line 1 is no part"),
            (r#"{"version":3,"width":80,"height":24}"#, "this is version 3"),
            (r#"{"version":2,"width":0,"height":24}"#, "a window of 0 columns and 24 rows"),
            (r#"{"version":2,"width":80,"height":60000}"#, "80 columns and 60000 rows"),
            ("{\"version\":2,\"width\":80,\"height\":24}\n[1,\"o\"]", "line 2 is no part"),
            ("{\"version\":2,\"width\":80,\"height\":24}\n[-1,\"o\",\"\"]", "its time is not"),
            ("{\"version\":2,\"width\":80,\"height\":24}\n[1e300,\"o\",\"\"]", "its time is not"),
            ("{\"version\":2,\"width\":80,\"height\":24}\n[1,\"r\",\"9\"]", "no size such as"),
            ("{\"version\":2,\"width\":80,\"height\":24}\n[1,\"r\",\"9x999\"]", "999 rows"),
        ] {
            let error = error(text);
            assert!(error.contains(why) && !error.contains('\n'), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_printed_can_be_read(pieces in prop::collection::vec(any::<Vec<u8>>(), 0..20)) {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes, &Header::new(80, 24)).unwrap();
            for piece in &pieces {
                writer.output(Duration::ZERO, piece).unwrap();
            }
            let begun = String::from_utf8_lossy(&writer.begun).into_owned();
            let mut text = String::new();
            for (_, event) in Cast::parse(&bytes).unwrap().events {
                let Event::Output(printed) = event else { panic!("{event:?}") };
                text.push_str(&printed);
            }
            let all = pieces.concat();
            prop_assert_eq!(text + &begun, String::from_utf8_lossy(&all));
        }

        #[test]
        fn no_file_does_harm(text in "[\\[\\]{}\",:0-9eorim\\n -]{0,200}") {
            let header = "{\"version\":2,\"width\":80,\"height\":24}\n";
            let _ = (Cast::parse(text.as_bytes()), Cast::parse(format!("{header}{text}").as_bytes()));
        }
    }
}
