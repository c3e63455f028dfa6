//! Pictures as SVG: one that stands still, one that moves, and the parts that a film is put together from.

use std::fmt::Write;

use crate::film::{BACKGROUND, FOREGROUND, Film, Frame, Line, Run, TICK};

/// The size of letters, and of the cell that each has.
const FONT: f64 = 14.0;
const CELL: (f64, f64) = (8.4, 18.0);

/// The captions' letters: the first language's, and the second's.
const CAPTION: (f64, f64) = (17.0, 13.0);

/// Around the text, in the bar above it, and in the captions below.
const MARGIN: f64 = 16.0;
const BAR: f64 = 34.0;
const CAPTIONS: f64 = 66.0;

/// The columns that are kept free for the keys that are shown beside a caption.
const KEYS: f64 = 120.0;

/// Around the window's text, and behind the captions.
pub const GROUND: [u8; 3] = [0x0D, 0x11, 0x17];

/// The first has no Korean, the second has. The others are for browsers on machines without them.
const FAMILIES: &str = "DejaVu Sans Mono,NanumGothicCoding,D2Coding,Menlo,Consolas,monospace";

/// How many columns of text there is room for in a caption's first line under a window of `columns`.
pub fn caption_room(columns: u16) -> usize {
    room(columns, CAPTION.0)
}

/// The same for its second line.
pub fn small_caption_room(columns: u16) -> usize {
    room(columns, CAPTION.1)
}

fn room(columns: u16, size: f64) -> usize {
    ((f64::from(columns) * CELL.0 - KEYS) / advance(size)) as usize
}

/// The width of a letter.
fn advance(size: f64) -> f64 {
    size * CELL.0 / FONT
}

/// Where things are in a picture of a window.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The picture's width; like the height, a multiple of 4, so that half as large again is an even number.
    pub width: u32,
    /// Its height.
    pub height: u32,
    /// Where the text begins.
    pub text: (u32, u32),
    /// The width and height of a line of it.
    pub line: (u32, u32),
    /// Where the captions begin.
    pub captions: u32,
}

impl Layout {
    /// For a film's window.
    pub fn of(film: &Film) -> Self {
        let line = (f64::from(film.columns) * CELL.0).ceil();
        let width = (line + 2.0 * MARGIN) as u32;
        let below = BAR + f64::from(film.rows) * CELL.1 + 10.0;
        Self {
            width: width.next_multiple_of(4),
            height: ((below + CAPTIONS) as u32).next_multiple_of(4),
            text: (MARGIN as u32, BAR as u32),
            line: (line as u32, CELL.1 as u32),
            captions: below as u32,
        }
    }
}

/// The beginning of a picture.
pub fn open(width: u32, height: u32) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"{FAMILIES}\" font-size=\"{FONT}\" fill=\"{}\" \
         xml:space=\"preserve\">\n",
        hex(FOREGROUND)
    )
}

/// The window without anything in it.
pub fn empty_window(film: &Film, layout: Layout) -> String {
    let Layout { width, height, captions, .. } = layout;
    let mut svg = format!(
        "<rect width=\"{width}\" height=\"{height}\" rx=\"9\" fill=\"{}\"/>\
         <path d=\"M0 {bar}V9a9 9 0 0 1 9-9h{top}a9 9 0 0 1 9 9V{bar}z\" fill=\"#2d333b\"/>\
         <rect y=\"{bar}\" width=\"{width}\" height=\"{text}\" fill=\"{}\"/>",
        hex(GROUND),
        hex(BACKGROUND),
        bar = BAR - 8.0,
        top = width - 18,
        text = f64::from(captions) - BAR + 8.0,
    );
    for (x, colour) in [(18, "#f47067"), (36, "#d9a84a"), (54, "#57c16b")] {
        let _ = write!(svg, "<circle cx=\"{x}\" cy=\"13\" r=\"5.5\" fill=\"{colour}\"/>");
    }
    // As much of the title as there is room for.
    let room = ((f64::from(width) - 160.0) / advance(12.0)) as usize;
    let title = fitted(&film.title, room);
    svg.push_str(&text(&title, (f64::from(width) / 2.0, 17.5), 12.0, "#adbac7", "middle"));
    svg.push('\n');
    svg
}

/// The beginning of `text` that takes `room` columns at most.
fn fitted(text: &str, room: usize) -> String {
    use unicode_width::UnicodeWidthChar;
    let mut left = room;
    let fits = |char: &char| {
        let width = char.width().unwrap_or(0);
        left.checked_sub(width).inspect(|now| left = *now).is_some()
    };
    text.chars().take_while(fits).collect()
}

/// A line of a window; its upper left corner is at 0, 0.
pub fn line(line: &Line) -> String {
    line.iter().map(run).collect()
}

fn run(run: &Run) -> String {
    let (x, width) = (f64::from(run.column) * CELL.0, f64::from(run.width) * CELL.0);
    let mut svg = String::new();
    if let Some(colour) = run.look.background {
        let _ = write!(
            svg,
            "<rect x=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>",
            short(x),
            short(width),
            CELL.1,
            hex(colour)
        );
    }
    if run.text.trim().is_empty() && !run.look.underline {
        return svg;
    }
    let _ = write!(svg, "<text x=\"{}\" y=\"13.5\"", short(x));
    // Whatever the font, each letter is in its column.
    let _ = write!(svg, " textLength=\"{}\" lengthAdjust=\"spacingAndGlyphs\"", short(width));
    if let Some(colour) = run.look.colour {
        let _ = write!(svg, " fill=\"{}\"", hex(colour));
    }
    for (is, attribute) in [
        (run.look.bold, " font-weight=\"bold\""),
        (run.look.italic, " font-style=\"italic\""),
        (run.look.underline, " text-decoration=\"underline\""),
    ] {
        svg.push_str(if is { attribute } else { "" });
    }
    let _ = write!(svg, ">{}</text>", escaped(&run.text));
    svg
}

/// What stands below the window; its upper left corner is at 0, 0.
pub fn captions(film: &Film, frame: &Frame, layout: Layout) -> String {
    let mut svg = String::new();
    let columns = film.columns;
    if let Some(caption) = frame.caption.map(|place| &film.captions[place]) {
        let ko = fitted(&caption.ko, caption_room(columns));
        let en = fitted(&caption.en, small_caption_room(columns));
        svg.push_str(&text(&ko, (MARGIN, 29.0), CAPTION.0, "#ffffff", "start"));
        svg.push_str(&text(&en, (MARGIN, 51.0), CAPTION.1, "#9da7b3", "start"));
    }
    if let Some(keys) = &frame.keys {
        let keys = fitted(keys, 11);
        let width = advance(FONT) * keys.chars().count() as f64 + 20.0;
        let right = f64::from(layout.width) - MARGIN;
        let _ = write!(
            svg,
            "<rect x=\"{}\" y=\"18\" width=\"{}\" height=\"28\" rx=\"6\" fill=\"#2d333b\" stroke=\"#768390\"/>",
            short(right - width),
            short(width)
        );
        let middle = (right - width / 2.0, 37.0);
        svg.push_str(&text(&keys, middle, FONT, "#f2cc60", "middle"));
    }
    svg
}

/// A text whose letters have the same width everywhere.
fn text(text: &str, (x, y): (f64, f64), size: f64, colour: &str, anchor: &str) -> String {
    use unicode_width::UnicodeWidthStr;
    if text.is_empty() {
        return String::new();
    }
    let width = advance(size) * text.width() as f64;
    format!(
        "<text x=\"{}\" y=\"{y}\" font-size=\"{size}\" fill=\"{colour}\" text-anchor=\"{anchor}\" \
         textLength=\"{}\" lengthAdjust=\"spacingAndGlyphs\">{}</text>",
        short(x),
        short(width),
        escaped(text)
    )
}

/// One moment of a film.
pub fn still(film: &Film, frame: &Frame) -> String {
    let layout = Layout::of(film);
    let mut svg = open(layout.width, layout.height) + &empty_window(film, layout);
    for (row, &place) in frame.rows.iter().enumerate().filter(|(_, place)| **place != 0) {
        let (x, y) = at(layout, row);
        let _ =
            writeln!(svg, "<g transform=\"translate({x} {y})\">{}</g>", line(&film.lines[place]));
    }
    let below = captions(film, frame, layout);
    let _ = write!(svg, "<g transform=\"translate(0 {})\">{below}</g>\n</svg>\n", layout.captions);
    svg
}

/// Where a row begins.
fn at(layout: Layout, row: usize) -> (u32, u32) {
    (layout.text.0, layout.text.1 + layout.line.1 * row as u32)
}

/// The whole film: all pictures beside each other, of which one after the other is moved to where it is seen.
pub fn animated(film: &Film) -> String {
    let layout = Layout::of(film);
    let Layout { width, height, .. } = layout;
    let mut svg = open(width, height);
    let total = f64::from(film.ticks) * TICK.as_secs_f64();
    let _ = write!(svg, "<style>.f{{animation:f {total:.2}s step-end infinite}}@keyframes f{{");
    for (place, frame) in film.frames.iter().enumerate() {
        let percent = 100.0 * f64::from(frame.from) / f64::from(film.ticks.max(1));
        let x = place as u64 * u64::from(width);
        let _ = write!(svg, "{percent:.3}%{{transform:translateX(-{x}px)}}");
    }
    let poster = film.poster as u64 * u64::from(width);
    // Who wants nothing to move gets the picture that stands for all.
    let _ = writeln!(
        svg,
        "}}@media(prefers-reduced-motion:reduce){{.f{{animation:none;transform:translateX(-{poster}px)}}}}</style>"
    );
    svg.push_str("<defs>\n");
    for (place, content) in film.lines.iter().enumerate().skip(1) {
        let _ = writeln!(svg, "<g id=\"l{place}\">{}</g>", line(content));
    }
    let mut belows: Vec<String> = Vec::new();
    let mut below_of = Vec::new();
    for frame in &film.frames {
        let below = captions(film, frame, layout);
        let place = belows.iter().rposition(|known| *known == below);
        below_of.push(place.unwrap_or(belows.len()));
        if place.is_none() {
            let _ = writeln!(svg, "<g id=\"c{}\">{below}</g>", belows.len());
            belows.push(below);
        }
    }
    svg.push_str("</defs>\n");
    svg.push_str(&empty_window(film, layout));
    svg.push_str("<g class=\"f\">\n");
    for (place, frame) in film.frames.iter().enumerate() {
        let _ = write!(svg, "<g transform=\"translate({})\">", place as u64 * u64::from(width));
        for (row, line) in frame.rows.iter().enumerate().filter(|(_, line)| **line != 0) {
            let (x, y) = at(layout, row);
            let _ = write!(svg, "<use href=\"#l{line}\" x=\"{x}\" y=\"{y}\"/>");
        }
        let _ =
            writeln!(svg, "<use href=\"#c{}\" y=\"{}\"/></g>", below_of[place], layout.captions);
    }
    svg.push_str("</g>\n</svg>\n");
    svg
}

/// A length with one digit behind the point, if it needs that.
fn short(length: f64) -> String {
    let text = format!("{length:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A colour as CSS has it.
pub fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// A text as XML has it. What XML cannot have at all is replaced.
pub fn escaped(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\u{FFFE}' | '\u{FFFF}' => out.push(char::REPLACEMENT_CHARACTER),
            char if char.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            char => out.push(char),
        }
    }
    out
}
