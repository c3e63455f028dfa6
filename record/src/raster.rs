//! Pictures of dots, by resvg: each line is drawn once and put wherever it is seen.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{self, fontdb};

use crate::film::{BACKGROUND, Film, Frame};
use crate::svg::{self, Layout};

/// How many dots a unit of the SVG takes.
const SCALE: f32 = 1.5;

/// Where a distribution keeps its fonts.
const FONTS: &str = "/usr/share/fonts";

/// The fonts that are drawn with. Others would make other pictures.
const FAMILIES: [&str; 2] = ["DejaVu Sans Mono", "NanumGothicCoding"];

/// Draws the pictures of a film.
pub struct Painter<'a> {
    film: &'a Film,
    layout: Layout,
    options: usvg::Options<'static>,
    /// The window with nothing in it.
    empty: Pixmap,
    lines: HashMap<usize, Pixmap>,
    captions: HashMap<String, Pixmap>,
}

impl<'a> Painter<'a> {
    /// Makes ready for `film`.
    pub fn new(film: &'a Film) -> Result<Self> {
        let mut fonts = fontdb::Database::new();
        fonts.load_fonts_dir(FONTS);
        let other = |face: &&fontdb::FaceInfo| {
            !face.families.iter().any(|(name, _)| FAMILIES.contains(&name.as_str()))
        };
        let others: Vec<_> = fonts.faces().filter(other).map(|face| face.id).collect();
        others.into_iter().for_each(|id| fonts.remove_face(id));
        for family in FAMILIES {
            let query = fontdb::Query {
                families: &[fontdb::Family::Name(family)],
                ..fontdb::Query::default()
            };
            ensure!(
                fonts.query(&query).is_some(),
                "the font {family} is not in {FONTS}: run `cargo xtask setup --record`"
            );
        }
        let options = usvg::Options { fontdb: Arc::new(fonts), ..usvg::Options::default() };
        let layout = Layout::of(film);
        let empty = svg::empty_window(film, layout);
        let mut painter = Self {
            film,
            layout,
            options,
            empty: Pixmap::new(1, 1).context("a dot")?,
            lines: HashMap::new(),
            captions: HashMap::new(),
        };
        painter.empty = painter.draw(layout.width, layout.height, svg::GROUND, &empty)?;
        Ok(painter)
    }

    /// The width and height of its pictures.
    pub fn size(&self) -> (u32, u32) {
        (self.empty.width(), self.empty.height())
    }

    /// Draws one.
    pub fn paint(&mut self, frame: &Frame) -> Result<Pixmap> {
        let mut picture = self.empty.clone();
        let (x, y) = self.layout.text;
        let (width, height) = self.layout.line;
        for (row, &place) in (0..).zip(&frame.rows) {
            if !self.lines.contains_key(&place) {
                let line = svg::line(&self.film.lines[place]);
                let line = self.draw(width, height, BACKGROUND, &line)?;
                self.lines.insert(place, line);
            }
            put(&mut picture, &self.lines[&place], x, y + height * row);
        }
        let below = svg::captions(self.film, frame, self.layout);
        if !self.captions.contains_key(&below) {
            let Layout { width, height, captions, .. } = self.layout;
            let drawn = self.draw(width, height - captions, svg::GROUND, &below)?;
            self.captions.insert(below.clone(), drawn);
        }
        put(&mut picture, &self.captions[&below], 0, self.layout.captions);
        Ok(picture)
    }

    /// Draws a part of a picture on a ground of one colour.
    fn draw(&self, width: u32, height: u32, ground: [u8; 3], content: &str) -> Result<Pixmap> {
        let svg = svg::open(width, height) + content + "</svg>";
        let tree = usvg::Tree::from_str(&svg, &self.options).context("an SVG of ours")?;
        let dots = |length: u32| (length as f32 * SCALE).ceil() as u32;
        let mut pixmap =
            Pixmap::new(dots(width), dots(height)).context("a picture without dots")?;
        let [r, g, b] = ground;
        pixmap.fill(Color::from_rgba8(r, g, b, 255));
        resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixmap.as_mut());
        Ok(pixmap)
    }
}

/// Copies `part`, whose upper left corner is at `x` and `y` of the SVG, as far as it is inside.
fn put(picture: &mut Pixmap, part: &Pixmap, x: u32, y: u32) {
    let dots = |length: u32| (length as f32 * SCALE) as usize;
    let (x, y) = (dots(x), dots(y));
    let (to, from) = (picture.width() as usize * 4, part.width() as usize * 4);
    let len = from.min(to.saturating_sub(x * 4));
    let rows = picture.data_mut().chunks_exact_mut(to).skip(y);
    for (row, new) in rows.zip(part.data().chunks_exact(from)) {
        row[x * 4..x * 4 + len].copy_from_slice(&new[..len]);
    }
}
