//! The links in all Markdown files of the repository, those of HTML within them as well: those to its own files and
//! headings are followed, those to the network are not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mdbook_markdown::pulldown_cmark::{Event, Tag, TagEnd};
use mdbook_markdown::{MarkdownOptions, new_cmark_parser};
use regex::Regex;

/// What is wrong with the links, a line each.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut pages = BTreeMap::new();
    for file in markdown(root)? {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        pages.insert(file, Page::new(&text));
    }
    let mut faults = Vec::new();
    for (file, page) in &pages {
        for link in &page.links {
            if let Err(why) = follow(root, file, link, &pages) {
                faults.push(format!("{}: the link to `{link}` {why}", relative(root, file)));
            }
        }
    }
    Ok(faults)
}

/// Whether `link` in `file` leads somewhere.
fn follow(
    root: &Path,
    file: &Path,
    link: &str,
    pages: &BTreeMap<PathBuf, Page>,
) -> Result<(), &'static str> {
    if link.contains("://") || link.starts_with("mailto:") {
        return Ok(());
    }
    let (path, heading) = link.split_once('#').map_or((link, None), |(path, id)| (path, Some(id)));
    let target = if path.is_empty() {
        file.to_owned()
    } else {
        let folder = file.parent().unwrap_or(file);
        folder.join(path).canonicalize().map_err(|_| "leads nowhere")?
    };
    match (heading, pages.get(&target)) {
        _ if !target.starts_with(root) => Err("leads out of the repository"),
        (Some(id), Some(page)) if !page.ids.0.contains(id) => Err("names no heading there"),
        (Some(_), None) => Err("names a heading in what is no Markdown"),
        _ => Ok(()),
    }
}

/// What is to be known of a Markdown file.
#[derive(Debug, Default)]
struct Page {
    links: Vec<String>,
    ids: Ids,
}

impl Page {
    fn new(text: &str) -> Self {
        let in_html = Regex::new(r#"\b(src|href|poster|id)="([^"]*)""#).expect("a pattern");
        let mut page = Self::default();
        let events = parse(text);
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.to_string());
                }
                Event::Start(Tag::Heading { .. }) => {
                    page.ids.of_heading(&heading(&events[at..]));
                }
                Event::Html(html) | Event::InlineHtml(html) => {
                    for found in in_html.captures_iter(html) {
                        let value = found[2].to_owned();
                        match &found[1] {
                            "id" => _ = page.ids.0.insert(value),
                            _ => page.links.push(value),
                        }
                    }
                }
                _ => {}
            }
        }
        page
    }
}

/// A Markdown file as mdBook reads it, with the settings of this book.
pub fn parse(text: &str) -> Vec<Event<'_>> {
    let mut options = MarkdownOptions::default();
    options.smart_punctuation = false;
    new_cmark_parser(text, &options).collect()
}

/// The text of the heading with which `events` begin.
pub fn heading(events: &[Event<'_>]) -> String {
    let inside = events.iter().take_while(|event| !matches!(event, Event::End(TagEnd::Heading(_))));
    let words = inside.filter_map(|event| match event {
        Event::Text(text) | Event::Code(text) => Some(&**text),
        _ => None,
    });
    words.collect()
}

/// The names of a page's places in links.
#[derive(Debug, Default)]
pub struct Ids(BTreeSet<String>);

impl Ids {
    /// The name of the next heading, as forges and mdBook make it.
    pub fn of_heading(&mut self, heading: &str) -> String {
        let id = slug(heading);
        let same = (1..).map(|n| format!("{id}-{n}"));
        let mut ids = std::iter::once(id.clone()).chain(same);
        let id = ids.find(|id| !self.0.contains(id)).unwrap_or_default();
        self.0.insert(id.clone());
        id
    }
}

/// A heading's name in links: in small letters, without punctuation, with `-` for spaces.
fn slug(heading: &str) -> String {
    let heading = heading.trim().to_lowercase();
    let kept = heading.chars().filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// All Markdown files below `folder`, by name. There are none where it is not.
pub fn markdown(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if folder.is_dir() {
        walk(folder, &mut files)?;
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    Ok(files)
}

/// All files below `folder`, without what is built and what is hidden. Paths are canonical if `folder` is.
pub fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if name == "target" || name.to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// A file's name as a person at the repository's root would type it.
pub fn relative(root: &Path, file: &Path) -> String {
    file.strip_prefix(root).unwrap_or(file).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_are_named_as_forges_name_them() {
        let page = Page::new("# `KVM_RUN`, and *then*?\n\n## 배경\n\n## 배경\n\n[a](b.md#c)\n");
        assert_eq!(page.links, ["b.md#c"]);
        let names: Vec<_> = page.ids.0.iter().map(String::as_str).collect();
        assert_eq!(names, ["kvm_run-and-then", "배경", "배경-1"]);
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(dir.path().join("outside"), "").unwrap();
        fs::write(root.join("plain"), "").unwrap();
        let root = root.canonicalize().unwrap();
        let link = |to: &str| format!("[text]({to})\n\n");
        let good = ["b.md", "b.md#two-words", "b.md#place", "#here", "https://example.org/", "."]
            .map(link);
        let bad = ["c.md", "b.md#three", "#there", "../outside", "plain#L1"].map(link);
        let html = "<video poster=\"a.png\" src=\"plain\">\n  <track src=\"a.vtt\">\n</video>\n\n\
                    `<a href=\"code\">` <a href=\"in.line\">x</a>\n";
        fs::write(root.join("a.md"), format!("# Here\n\n{}{}{html}", good.concat(), bad.concat()))
            .unwrap();
        fs::write(root.join("b.md"), "# Two words\n\n<a id=\"place\"></a>\n").unwrap();
        assert_eq!(
            check(&root).unwrap(),
            [
                "a.md: the link to `c.md` leads nowhere",
                "a.md: the link to `b.md#three` names no heading there",
                "a.md: the link to `#there` names no heading there",
                "a.md: the link to `../outside` leads out of the repository",
                "a.md: the link to `plain#L1` names a heading in what is no Markdown",
                "a.md: the link to `a.png` leads nowhere",
                "a.md: the link to `a.vtt` leads nowhere",
                "a.md: the link to `in.line` leads nowhere",
            ]
        );
    }
}
