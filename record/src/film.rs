//! A recording as pictures: what the window shows at which moment, with everything that is shown twice kept once.

use std::collections::HashMap;
use std::num::NonZero;
use std::time::Duration;

use anyhow::{Result, ensure};
use cli::cast::{Cast, Event};

/// How long a picture stays at least: ten of them are a second.
pub const TICK: Duration = Duration::from_millis(100);

/// How long the last picture stays.
const LAST: Duration = Duration::from_millis(2400);

/// How long a key that was pressed is shown.
const KEYS: Duration = Duration::from_millis(1800);

/// What a film may consist of; a recording may be anybody's.
const MOST_FRAMES: usize = 20_000;
const MOST_LINES: usize = 50_000;

/// The largest window of which pictures are made.
const LARGEST: (u16, u16) = (200, 60);

/// The pictures of a recording.
#[derive(Debug)]
pub struct Film {
    /// The window's columns.
    pub columns: u16,
    /// Its rows.
    pub rows: u16,
    /// What it shows.
    pub title: String,
    /// All lines that there are, each once. The first is empty.
    pub lines: Vec<Line>,
    /// The captions, one after the other.
    pub captions: Vec<Caption>,
    /// The pictures, one after the other.
    pub frames: Vec<Frame>,
    /// The film's length in ticks.
    pub ticks: u32,
    /// The picture that stands for all of them.
    pub poster: usize,
}

/// A line of the window.
pub type Line = Vec<Run>;

/// Neighbouring characters that look alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// Where it begins.
    pub column: u16,
    /// How many columns it takes.
    pub width: u16,
    /// What it says.
    pub text: String,
    /// How it looks.
    pub look: Look,
}

/// How characters look. Nothing stands for the window's own colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Look {
    /// Red, green, blue.
    pub colour: Option<[u8; 3]>,
    /// Behind it.
    pub background: Option<[u8; 3]>,
    /// Thick letters.
    pub bold: bool,
    /// Slanted letters.
    pub italic: bool,
    /// A line under them.
    pub underline: bool,
}

/// A caption in two languages, and when it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caption {
    /// From when on.
    pub from: Duration,
    /// Until when.
    pub to: Duration,
    /// Korean.
    pub ko: String,
    /// English.
    pub en: String,
}

/// What is seen from a moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Since when, in ticks.
    pub from: u32,
    /// The lines, by their places in [`Film::lines`].
    pub rows: Vec<usize>,
    /// The caption, by its place in [`Film::captions`].
    pub caption: Option<usize>,
    /// The keys that have just been pressed.
    pub keys: Option<String>,
}

impl Film {
    /// The pictures of `cast`, in which nothing lasts longer than `idle` without a change.
    pub fn of(cast: &Cast, idle: Option<Duration>) -> Result<Self> {
        let sizes = cast.events.iter().filter_map(|(_, event)| match event {
            Event::Resize(columns, rows) => Some((*columns, *rows)),
            _ => None,
        });
        let (columns, rows) = sizes
            .fold((cast.header.width, cast.header.height), |(c, r), (columns, rows)| {
                (c.max(columns), r.max(rows))
            });
        ensure!(
            columns <= LARGEST.0 && rows <= LARGEST.1,
            "a window of {columns} columns and {rows} rows: pictures are made of up to {} and {}",
            LARGEST.0,
            LARGEST.1
        );
        let events = timed(cast, idle);
        let end = events.last().map_or(Duration::ZERO, |(at, _)| *at) + LAST;
        let mut screening = Screening {
            window: vt100::Parser::new(size(cast.header.height), size(cast.header.width), 0),
            places: HashMap::new(),
            lines: Vec::new(),
            captions: Vec::new(),
            keys: None,
        };
        screening.place(Line::new());

        let (mut frames, mut waiting) = (Vec::<Frame>::new(), events.into_iter().peekable());
        while let Some((at, _)) = waiting.peek() {
            // All that happens within a tick is seen at its end; a key that was shown goes by itself.
            let gone = screening.keys.as_ref().map(|(until, _)| tick(*until));
            let next = tick(*at).min(gone.unwrap_or(u32::MAX));
            while let Some((at, event)) = waiting.next_if(|(at, _)| tick(*at) <= next) {
                screening.happens(at, event);
            }
            screening.keys.take_if(|(until, _)| tick(*until) <= next);
            let frame = screening.frame(next, columns, rows);
            let same = |last: &Frame| Frame { from: next, ..last.clone() } == frame;
            if !frames.last().is_some_and(same) {
                frames.push(frame);
            }
            ensure!(
                frames.len() <= MOST_FRAMES && screening.lines.len() <= MOST_LINES,
                "too much happens in it for a film"
            );
        }
        ensure!(!frames.is_empty(), "nothing happens in it");
        if let Some(caption) = screening.captions.last_mut() {
            caption.to = end;
        }
        let poster = cast.header.poster.and_then(|at| Duration::try_from_secs_f64(at).ok());
        let poster = poster.map_or(u32::MAX, tick);
        let poster = frames.partition_point(|frame| frame.from <= poster).saturating_sub(1);
        Ok(Self {
            columns,
            rows,
            title: cast.header.title.clone().unwrap_or_default(),
            lines: screening.lines,
            captions: screening.captions,
            frames,
            ticks: tick(end),
            poster,
        })
    }
}

/// The events with their times in the film.
fn timed(cast: &Cast, idle: Option<Duration>) -> Vec<(Duration, &Event)> {
    let (mut before, mut clock) = (Duration::ZERO, Duration::ZERO);
    let timed = cast.events.iter().map(|(at, event)| {
        let passed = at.saturating_sub(before);
        clock += idle.map_or(passed, |idle| passed.min(idle));
        before = *at;
        (clock, event)
    });
    timed.collect()
}

/// The first tick at which what happens then can be seen.
fn tick(at: Duration) -> u32 {
    u32::try_from(at.as_micros().div_ceil(TICK.as_micros())).unwrap_or(u32::MAX)
}

/// A window, and what was seen in it.
struct Screening {
    window: vt100::Parser,
    places: HashMap<Line, usize>,
    lines: Vec<Line>,
    captions: Vec<Caption>,
    /// The keys that have been pressed, and until when they are shown.
    keys: Option<(Duration, String)>,
}

impl Screening {
    fn happens(&mut self, at: Duration, event: &Event) {
        match event {
            // A soft reset (DECSTR), which the crate does not know, ends what letters look like.
            Event::Output(text) => {
                self.window.process(text.replace("\x1b[!p", "\x1b[m\x1b[?25h").as_bytes());
            }
            Event::Input(keys) => {
                let shown: String = keys.chars().filter(|key| !key.is_control()).take(24).collect();
                self.keys = (!shown.is_empty()).then(|| (at + KEYS, shown));
            }
            Event::Marker(label) => {
                if let Some(caption) = self.captions.last_mut() {
                    caption.to = at;
                }
                let (ko, en) = label.split_once('\n').unwrap_or((label, ""));
                let text =
                    |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect();
                self.captions.push(Caption { from: at, to: at, ko: text(ko), en: text(en) });
            }
            Event::Resize(columns, rows) => {
                self.window.screen_mut().set_size(size(*rows), size(*columns));
            }
        }
    }

    fn frame(&mut self, from: u32, columns: u16, rows: u16) -> Frame {
        let (height, _) = self.window.screen().size();
        let rows = (0..rows).map(|row| match row < height.get() {
            true => {
                let line = line(self.window.screen(), row, columns);
                self.place(line)
            }
            false => 0,
        });
        let rows = rows.collect();
        let caption = self.captions.len().checked_sub(1);
        let caption = caption.filter(|&last| !self.captions[last].ko.is_empty());
        Frame { from, rows, caption, keys: self.keys.as_ref().map(|(_, keys)| keys.clone()) }
    }

    fn place(&mut self, line: Line) -> usize {
        let next = self.lines.len();
        let place = *self.places.entry(line.clone()).or_insert(next);
        if place == next {
            self.lines.push(line);
        }
        place
    }
}

/// A window has rows and columns; a recording's size has been looked at.
fn size(number: u16) -> NonZero<u16> {
    NonZero::new(number).unwrap_or(NonZero::<u16>::MIN)
}

/// What stands in a row, as runs.
fn line(screen: &vt100::Screen, row: u16, columns: u16) -> Line {
    let cursor = (!screen.hide_cursor()).then(|| screen.cursor_position());
    let mut runs = Line::new();
    let mut blanks = 0;
    // Characters of a kind: of others, a browser may take the font's widths from elsewhere.
    let mut kind = 0;
    for column in 0..columns {
        let Some(cell) = screen.cell(row, column) else { break };
        if cell.is_wide_continuation() {
            continue;
        }
        let mut look = look(cell);
        if cursor == Some((row, column)) {
            look.background = Some(look.colour.unwrap_or(CURSOR));
            look.colour = Some(BACKGROUND);
        }
        let text = if cell.has_contents() { cell.contents() } else { " " };
        let (text, width) = (text.replace(char::is_control, " "), 1 + u16::from(cell.is_wide()));
        if text == " " && look.background.is_none() && !look.underline {
            blanks += 1;
            continue;
        }
        let this = u8::from(!text.is_ascii()) + u8::from(width == 2);
        match runs.last_mut() {
            Some(run)
                if run.look == look
                    && kind == this
                    && (blanks == 0 || blanks == 1 && this == 0)
                    && run.column + run.width + blanks == column =>
            {
                run.text.push_str(&" ".repeat(blanks.into()));
                run.text.push_str(&text);
                run.width += blanks + width;
            }
            _ => runs.push(Run { column, width, text, look }),
        }
        (blanks, kind) = (0, this);
    }
    runs
}

/// The window's colours.
pub const BACKGROUND: [u8; 3] = [0x16, 0x1B, 0x22];
/// Of letters.
pub const FOREGROUND: [u8; 3] = [0xD5, 0xDB, 0xE3];
const CURSOR: [u8; 3] = [0x8B, 0xB9, 0xFE];

/// The sixteen colours of a terminal.
const COLOURS: [[u8; 3]; 16] = [
    [0x3B, 0x43, 0x4D],
    [0xF4, 0x70, 0x67],
    [0x57, 0xC1, 0x6B],
    [0xD9, 0xA8, 0x4A],
    [0x6C, 0xB6, 0xFF],
    [0xC6, 0x8A, 0xF5],
    [0x4C, 0xC2, 0xC4],
    [0xC9, 0xD1, 0xD9],
    [0x76, 0x83, 0x90],
    [0xFF, 0x93, 0x8A],
    [0x7E, 0xDC, 0x8F],
    [0xF2, 0xCC, 0x60],
    [0x96, 0xD0, 0xFF],
    [0xDC, 0xBD, 0xFB],
    [0x7F, 0xDF, 0xE0],
    [0xFF, 0xFF, 0xFF],
];

fn look(cell: &vt100::Cell) -> Look {
    let (mut colour, mut background) = (rgb(cell.fgcolor()), rgb(cell.bgcolor()));
    if cell.inverse() {
        (colour, background) =
            (Some(background.unwrap_or(BACKGROUND)), Some(colour.unwrap_or(FOREGROUND)));
    }
    if cell.dim() {
        let over = background.unwrap_or(BACKGROUND);
        let from = colour.unwrap_or(FOREGROUND);
        colour = Some(std::array::from_fn(|i| from[i] / 2 + over[i] / 2));
    }
    let (bold, italic, underline) = (cell.bold(), cell.italic(), cell.underline());
    Look { colour, background, bold, italic, underline }
}

fn rgb(colour: vt100::Color) -> Option<[u8; 3]> {
    match colour {
        vt100::Color::Default => None,
        vt100::Color::Rgb(r, g, b) => Some([r, g, b]),
        vt100::Color::Idx(index @ 0..=15) => Some(COLOURS[usize::from(index)]),
        // A cube of six by six by six, and greys, as xterm has them.
        vt100::Color::Idx(index @ 16..=231) => {
            let level = |n: u8| if n == 0 { 0 } else { 55 + 40 * n };
            let n = index - 16;
            Some([level(n / 36), level(n / 6 % 6), level(n % 6)])
        }
        vt100::Color::Idx(index) => Some([8 + 10 * (index - 232); 3]),
    }
}

#[cfg(test)]
mod tests {
    use cli::cast::Header;
    use proptest::prelude::*;

    use super::*;

    fn cast(events: Vec<(u64, Event)>) -> Cast {
        let at = |(at, event)| (Duration::from_millis(at), event);
        Cast {
            header: Header { poster: Some(0.5), ..Header::new(20, 3) },
            events: events.into_iter().map(at).collect(),
        }
    }

    fn output(text: &str) -> Event {
        Event::Output(text.into())
    }

    #[test]
    fn what_is_seen_is_kept_once_and_what_changes_is_a_picture() {
        let film = Film::of(
            &cast(vec![
                (0, output("\x1b[?25l$ ls\r\n")),
                (10, Event::Marker("가\na".into())),
                (500, output("\x1b[31mred\x1b[m  b \u{2713}\r\n한글")),
                (501, output("")),
                (1000, output("\x1b[H\x1b[J$ ls\r\n")),
            ]),
            None,
        )
        .unwrap();
        let at: Vec<_> = film.frames.iter().map(|frame| frame.from).collect();
        assert_eq!(at, [0, 1, 5, 10]);
        assert_eq!(film.poster, 2);
        assert_eq!(film.frames[3].rows, film.frames[1].rows);
        assert_eq!(film.lines.len(), 4);
        let runs: Vec<_> = film.lines[film.frames[2].rows[1]]
            .iter()
            .map(|run| (run.column, run.width, run.text.as_str(), run.look.colour))
            .collect();
        let red = Some(COLOURS[1]);
        assert_eq!(runs, [(0, 3, "red", red), (5, 1, "b", None), (7, 1, "\u{2713}", None)]);
        let [korean] = &film.lines[film.frames[2].rows[2]][..] else { panic!("one run") };
        assert_eq!((korean.width, korean.text.as_str()), (4, "한글"));
        let ms = Duration::from_millis;
        let caption = Caption { from: ms(10), to: ms(3400), ko: "가".into(), en: "a".into() };
        assert_eq!(film.captions, [caption]);
    }

    #[test]
    fn a_soft_reset_ends_bold_letters() {
        let film = Film::of(&cast(vec![(0, output("\x1b[1;31ma\x1b[!pb"))]), None).unwrap();
        let looks: Vec<_> = film.lines[film.frames[0].rows[0]].iter().map(|run| run.look).collect();
        assert_eq!((looks[0].bold, looks[1]), (true, Look::default()));
    }

    #[test]
    fn keys_are_shown_for_a_while_and_waiting_can_be_cut() {
        let events =
            vec![(0, output("a")), (1000, Event::Input("Ctrl-A x".into())), (60_000, output("b"))];
        let film = Film::of(&cast(events.clone()), None).unwrap();
        let keys: Vec<_> = film.frames.iter().map(|frame| frame.keys.is_some()).collect();
        assert_eq!(keys, [false, true, false, false]);
        let cut = Film::of(&cast(events), Some(Duration::from_secs(2))).unwrap();
        assert_eq!((film.ticks, cut.ticks), (624, 54));
    }

    #[test]
    fn what_is_too_large_for_a_film_is_refused() {
        let mut large = cast(vec![(0, output("a"))]);
        large.header.width = 500;
        let error = Film::of(&large, None).unwrap_err().to_string();
        assert!(error.contains("a window of 500 columns and 3 rows"), "{error}");
        assert!(Film::of(&cast(vec![]), None).is_err());
        let long = (0..60_000).map(|n| (n * 80, output(&n.to_string()))).collect();
        let error = Film::of(&cast(long), None).unwrap_err().to_string();
        assert!(error.contains("too much happens"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_is_printed_can_be_shown(
            texts in prop::collection::vec("[\\x1b\\[0-9;?HJKmhlABCD가✓a \r\n]{0,40}", 0..20),
            sizes in prop::collection::vec((1_u16..60, 1_u16..60), 0..3),
        ) {
            let mut events: Vec<_> = texts.iter().map(|text| (0, output(text))).collect();
            events.extend(sizes.iter().map(|&(c, r)| (80, Event::Resize(c, r))));
            events.extend(texts.iter().map(|text| (160, output(text))));
            if let Ok(film) = Film::of(&cast(events), None) {
                for line in &film.lines {
                    let mut free = 0;
                    for run in line {
                        prop_assert!(run.column >= free && !run.text.contains(char::is_control));
                        free = run.column + run.width;
                    }
                }
            }
        }
    }
}
