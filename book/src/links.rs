//! The links in all Markdown files of the repository: those to its own files and headings are followed, those to the
//! network are not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mdbook_markdown::pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// What is wrong with the links, a line each.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    walk(root, &mut files)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    let mut pages = BTreeMap::new();
    for file in &files {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        pages.insert(file.clone(), Page::new(&text));
    }
    let mut faults = Vec::new();
    for (file, page) in &pages {
        for link in &page.links {
            if let Err(why) = follow(file, link, &pages) {
                faults.push(format!("{}: {why}", relative(root, file)));
            }
        }
    }
    Ok(faults)
}

/// Whether `link` in `file` leads somewhere.
fn follow(file: &Path, link: &str, pages: &BTreeMap<PathBuf, Page>) -> Result<(), String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return Ok(());
    }
    let (path, heading) = link.split_once('#').map_or((link, None), |(path, id)| (path, Some(id)));
    let target = if path.is_empty() {
        file.to_owned()
    } else {
        let folder = file.parent().unwrap_or(file);
        let target = folder.join(path).canonicalize();
        target.map_err(|_| format!("the link to `{link}` leads nowhere"))?
    };
    match (heading, pages.get(&target)) {
        (Some(id), Some(page)) if !page.headings.contains(id) => {
            Err(format!("the link to `{link}` names no heading there"))
        }
        _ => Ok(()),
    }
}

/// What is to be known of a Markdown file.
#[derive(Debug, Default, PartialEq)]
struct Page {
    links: Vec<String>,
    /// The headings' names in links, as forges and mdBook make them.
    headings: BTreeSet<String>,
}

impl Page {
    fn new(text: &str) -> Self {
        let mut page = Self::default();
        let mut heading: Option<String> = None;
        let options = Options::ENABLE_TABLES | Options::ENABLE_FOOTNOTES;
        for event in Parser::new_ext(text, options) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let id = slug(&heading.take().unwrap_or_default());
                    let same = (1..).map(|n| format!("{id}-{n}"));
                    let mut ids = std::iter::once(id.clone()).chain(same);
                    page.headings.extend(ids.find(|id| !page.headings.contains(id)));
                }
                Event::Text(text) | Event::Code(text) => {
                    heading.iter_mut().for_each(|heading| heading.push_str(&text));
                }
                _ => {}
            }
        }
        page
    }
}

/// A heading's name in links: in small letters, without punctuation, with `-` for spaces.
fn slug(heading: &str) -> String {
    let heading = heading.trim().to_lowercase();
    let kept = heading.chars().filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
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
        let page = Page::new("# `KVM_RUN`, and then?\n\n## 배경\n\n## 배경\n\n[a](b.md#c)\n");
        assert_eq!(page.links, ["b.md#c"]);
        let names: Vec<_> = page.headings.iter().map(String::as_str).collect();
        assert_eq!(names, ["kvm_run-and-then", "배경", "배경-1"]);
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let link = |to: &str| format!("[text]({to})\n\n");
        let good = ["b.md", "b.md#two-words", "#here", "https://example.org/", "."].map(link);
        let bad = ["c.md", "b.md#three", "#there"].map(link);
        fs::write(root.join("a.md"), format!("# Here\n\n{}{}", good.concat(), bad.concat()))
            .unwrap();
        fs::write(root.join("b.md"), "# Two words\n").unwrap();
        assert_eq!(
            check(&root).unwrap(),
            [
                "a.md: the link to `c.md` leads nowhere",
                "a.md: the link to `b.md#three` names no heading there",
                "a.md: the link to `#there` names no heading there",
            ]
        );
    }
}
