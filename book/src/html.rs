//! The book itself, by mdBook.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use mdbook_driver::MDBook;
use regex::{Captures, Regex};
use tracing::Level;

use crate::{links, search};

/// What mdBook has to complain of.
#[derive(Clone, Default)]
struct Complaints(Arc<Mutex<Vec<u8>>>);

impl Complaints {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Complaints {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Builds the book of `root/notes` in the folder `to`, and gives its first page. A warning is an error.
pub fn build(root: &Path, to: &Path) -> Result<PathBuf> {
    let complaints = Complaints::default();
    let writer = complaints.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(Level::WARN)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .without_time()
        .finish();
    tracing::subscriber::with_default(subscriber, || -> Result<()> {
        let mut book = MDBook::load(root.join("notes"))?;
        book.config.build.build_dir = to.to_owned();
        book.build()
    })
    .context("mdBook cannot build the notes")?;
    let complaints = complaints.text();
    ensure!(complaints.is_empty(), "mdBook has warnings:\n{complaints}");
    search::replace(to)?;
    finish(root, to)?;
    Ok(to.join("index.html"))
}

/// Does what is to be done to each page.
fn finish(root: &Path, book: &Path) -> Result<()> {
    let to_root = match book.strip_prefix(root) {
        Ok(inside) => "../".repeat(inside.components().count()),
        Err(_) => format!("file://{}/", root.display()),
    };
    let mut files = Vec::new();
    links::walk(book, &mut files)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "html"));
    for path in files {
        let folder = path.parent().unwrap_or(book);
        let depth = folder.strip_prefix(book).map_or(0, |inside| inside.components().count());
        let page = relinked(&fs::read_to_string(&path)?, root, &to_root, depth);
        fs::write(&path, with_films(&page, folder)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// A page which lies `depth` folders deep, with its links out of the book leading to the files of this checkout, which
/// lie at `to_root` for a page that is not in a folder.
fn relinked(page: &str, root: &Path, to_root: &str, depth: usize) -> String {
    let up = "../".repeat(depth);
    let outside =
        Regex::new(&format!(r##"href="{}\.\./([^"#]*)"##, regex::escape(&up))).expect("a pattern");
    let inside = if to_root.starts_with("../") { &*up } else { "" };
    let relinked = outside.replace_all(page, |found: &Captures<'_>| {
        let path = &found[1];
        // mdBook takes all Markdown for its own.
        let markdown = path.strip_suffix(".html").map(|path| format!("{path}.md"));
        let markdown = markdown.filter(|path| root.join(path).is_file());
        format!("href=\"{inside}{to_root}{}", markdown.as_deref().unwrap_or(path))
    });
    relinked.into_owned()
}

/// The languages of captions: a file of each lies beside a film.
const CAPTIONS: [(&str, &str); 2] = [("ko", "한국어"), ("en", "English")];

/// A page of `folder` in which each picture that leads to a film (`[![text](film.still.svg)](film.mp4)`) has become the
/// film, to be played there. Its captions are in the page: a browser reads no files for them where the page is a file
/// itself.
fn with_films(page: &str, folder: &Path) -> Result<String> {
    let film = r#"<a href="([^":]+)\.mp4"><img src="([^"]+)" alt="([^"]*)"\s*/?></a>"#;
    let film = Regex::new(film).expect("a pattern");
    let mut with = String::with_capacity(page.len());
    let mut done = 0;
    for found in film.captures_iter(page) {
        let (whole, [name, picture, text]) = (found.get_match(), found.extract().1);
        with += &page[done..whole.start()];
        done = whole.end();
        let _ = write!(
            with,
            r#"<video controls preload="none" src="{name}.mp4" poster="{picture}" aria-label="{text}">"#
        );
        for (code, language) in CAPTIONS {
            let path = folder.join(format!("{name}.{code}.vtt"));
            let captions =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let _ = write!(
                with,
                r#"<track kind="captions" srclang="{code}" label="{language}" src="data:text/vtt,"#
            );
            captions.iter().for_each(|byte| {
                let _ = write!(with, "%{byte:02X}");
            });
            with += "\">";
        }
        with += "</video>";
    }
    Ok(with + &page[done..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_of_the_book_lead_to_the_repository() {
        let page = r##"<a href="../README.html#x"> <a href="../common/"> <a href="week01.html">"##;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let expected =
            r##"<a href="../../README.md#x"> <a href="../../common/"> <a href="week01.html">"##;
        assert_eq!(relinked(page, root, "../../", 0), expected);

        let deep = r#"<a href="../../README.html"> <a href="../week01.html">"#;
        let expected = r#"<a href="../../../README.md"> <a href="../week01.html">"#;
        assert_eq!(relinked(deep, root, "../../", 1), expected);
        let expected = r#"<a href="file:///x/README.md"> <a href="../week01.html">"#;
        assert_eq!(relinked(deep, root, "file:///x/", 1), expected);
    }

    #[test]
    fn a_picture_that_leads_to_a_film_becomes_the_film_with_its_captions() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.ko.vtt"), "W\n한").unwrap();
        let page = r#"<p><a href="a.mp4"><img src="a.still.svg" alt="영화"></a></p> <a href="b.mp4">b</a>"#;
        let missing = with_films(page, dir.path()).unwrap_err().to_string();
        assert!(missing.contains("a.en.vtt"), "{missing}");
        fs::write(dir.path().join("a.en.vtt"), "W").unwrap();
        let expected = r#"<p><video controls preload="none" src="a.mp4" poster="a.still.svg" aria-label="영화"><track kind="captions" srclang="ko" label="한국어" src="data:text/vtt,%57%0A%ED%95%9C"><track kind="captions" srclang="en" label="English" src="data:text/vtt,%57"></video></p> <a href="b.mp4">b</a>"#;
        assert_eq!(with_films(page, dir.path()).unwrap(), expected);
    }
}
