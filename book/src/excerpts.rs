//! Excerpts of the sources: `{{#include ../common/src/kvm.rs:open}}` in a note is the text between the lines with
//! `ANCHOR: open` and `ANCHOR_END: open` there.
//!
//! mdBook takes them in when it builds the book, and leaves a hole where an anchor is missing. So they are looked at
//! before, and from the other side, too: an anchor that no note shows is clutter.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use regex::Regex;

use crate::links;

/// The folders whose sources have anchors.
const SOURCES: [&str; 12] = [
    "asm", "bench", "book", "cli", "common", "grader", "guests", "lab", "record", "stages",
    "testkit", "xtask",
];

/// What is wrong with the excerpts, a line each.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let include = Regex::new(r"\{\{#include ([^}:\s]+)(?::([\w-]+))?\s*\}\}").expect("a pattern");
    let mut faults = Vec::new();
    let mut shown = BTreeSet::new();
    for note in links::markdown(&root.join("notes"))? {
        let name = links::relative(root, &note);
        let text =
            fs::read_to_string(&note).with_context(|| format!("cannot read {}", note.display()))?;
        let marked = text.matches("{{#").count();
        if include.find_iter(&text).count() != marked {
            faults.push(format!(
                "{name}: an include is not of the form {{{{#include FILE:ANCHOR}}}}"
            ));
        }
        for found in include.captures_iter(&text) {
            let file = note.parent().unwrap_or(root).join(&found[1]);
            let Ok(source) = fs::read_to_string(&file) else {
                faults.push(format!("{name}: there is no {}", &found[1]));
                continue;
            };
            let Some(anchor) = found.get(2).map(|anchor| anchor.as_str()) else { continue };
            if excerpt(&source, anchor).is_none_or(|excerpt| excerpt.trim().is_empty()) {
                faults.push(format!("{name}: {} has no excerpt `{anchor}`", &found[1]));
            }
            let file = file.canonicalize().with_context(|| format!("cannot find {}", &found[1]))?;
            shown.insert((file, anchor.to_owned()));
        }
    }
    // A line of its own: strings and texts may speak of anchors.
    let marker = Regex::new(r"(?m)^\s*(?://|#|;) ANCHOR: ([\w-]+)").expect("a pattern");
    for file in sources(root)? {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for found in marker.captures_iter(&text) {
            let canonical = file.canonicalize().unwrap_or_else(|_| file.clone());
            if !shown.contains(&(canonical, found[1].to_owned())) {
                let name = links::relative(root, &file);
                faults.push(format!("{name}: no note shows the excerpt `{}`", &found[1]));
            }
        }
    }
    Ok(faults)
}

// ANCHOR: excerpt
/// The lines between an anchor's two marks, if there are two.
fn excerpt<'a>(source: &'a str, anchor: &str) -> Option<&'a str> {
    let line = |mark: &str| {
        let mark = format!("{mark}: {anchor}");
        source
            .match_indices(&mark)
            .map(|(at, _)| (at, at + mark.len()))
            .find(|&(_, end)| source[end..].chars().next().is_none_or(char::is_whitespace))
    };
    let ((_, start), (end, _)) = (line("ANCHOR")?, line("ANCHOR_END")?);
    let between = source.get(start..end)?;
    // The last line of these is the one with the mark.
    Some(between.rsplit_once('\n')?.0)
}
// ANCHOR_END: excerpt

/// All files below [`SOURCES`] that git would keep.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in SOURCES {
        links::walk(&root.join(folder), &mut files)?;
    }
    let wanted = ["rs", "asm", "inc", "toml", "sh"];
    files.retain(|file| {
        file.extension().is_some_and(|extension| wanted.iter().any(|wanted| extension == *wanted))
    });
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_what_stands_between_its_marks() {
        let source = "a\n// ANCHOR: run\nb\nc\n    // ANCHOR_END: run\nd\n";
        assert_eq!(excerpt(source, "run"), Some("\nb\nc"));
        assert_eq!(excerpt(source, "ru"), None);
        assert_eq!(excerpt("// ANCHOR: run\nb\n", "run"), None);
    }

    #[test]
    fn a_missing_anchor_and_one_that_nobody_shows_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in SOURCES.iter().chain(&["notes"]) {
            fs::create_dir(root.join(folder)).unwrap();
        }
        let mark = |name: &str| format!("// ANCHOR: {name}\ncode\n// ANCHOR_END: {name}\n");
        fs::write(root.join("asm/x.rs"), mark("shown") + &mark("unseen")).unwrap();
        let include = |what: &str| format!("{{{{#include {what}}}}}\n");
        let note = include("../asm/x.rs:shown") + &include("../asm/x.rs:gone") + &include("no.rs");
        fs::write(root.join("notes/week01.md"), note).unwrap();
        assert_eq!(
            check(root).unwrap(),
            [
                "notes/week01.md: ../asm/x.rs has no excerpt `gone`",
                "notes/week01.md: there is no no.rs",
                "asm/x.rs: no note shows the excerpt `unseen`",
            ]
        );
    }
}
