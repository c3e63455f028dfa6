//! The book itself, by mdBook.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use mdbook_driver::MDBook;
use regex::{Captures, Regex};
use tracing::Level;

use crate::search;

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
    lead_to_the_repository(root, to)?;
    Ok(to.join("index.html"))
}

/// Links that lead out of the notes lead to the files of this checkout, as far as the book is from there.
fn lead_to_the_repository(root: &Path, book: &Path) -> Result<()> {
    let prefix = match book.strip_prefix(root) {
        Ok(inside) => "../".repeat(inside.components().count()),
        Err(_) => format!("file://{}/", root.display()),
    };
    for entry in book.read_dir().with_context(|| format!("cannot read {}", book.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "html") {
            let page = fs::read_to_string(&path)?;
            fs::write(&path, relinked(&page, root, &prefix))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

/// A page of the book's only folder, with its links to other folders below `root` begun with `prefix`.
fn relinked(page: &str, root: &Path, prefix: &str) -> String {
    let outside = Regex::new(r##"href="\.\./([^"#]*)"##).expect("a pattern");
    let relinked = outside.replace_all(page, |found: &Captures<'_>| {
        let path = &found[1];
        // mdBook takes all Markdown for its own.
        let markdown = path.strip_suffix(".html").map(|path| format!("{path}.md"));
        let markdown = markdown.filter(|path| root.join(path).is_file());
        format!("href=\"{prefix}{}", markdown.as_deref().unwrap_or(path))
    });
    relinked.into_owned()
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
        assert_eq!(relinked(page, root, "../../"), expected);
    }
}
