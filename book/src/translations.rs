//! Pairs such as `README.md` and `README.ko.md` say the same: they have the same headings, tables, code and links.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use mdbook_markdown::pulldown_cmark::{CodeBlockKind, Event, Tag, TagEnd};

use crate::links;

/// How the Korean one of a pair ends, and the English one.
const KOREAN: &str = ".ko.md";
const ENGLISH: &str = ".md";

/// Where the two of a pair differ, a line for each pair.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for korean in links::markdown(root)? {
        let name = links::relative(root, &korean);
        let Some(english) = name.strip_suffix(KOREAN).map(|stem| format!("{stem}{ENGLISH}")) else {
            continue;
        };
        let read = |name: &str, other: &str| {
            let text = fs::read_to_string(root.join(name));
            let text = text.with_context(|| format!("cannot read {name}"))?;
            Ok::<_, anyhow::Error>(shape(&text, file_name(other)))
        };
        let (here, there) = (read(&name, &english)?, read(&english, &name)?);
        let differ = |at: &usize| here.get(*at) != there.get(*at);
        if let Some(at) = (0..here.len().max(there.len())).find(differ) {
            let part = |shape: &[String]| shape.get(at).map_or("nothing more".into(), Clone::clone);
            faults.push(format!(
                "{name}: it has {} where {english} has {}",
                part(&here),
                part(&there)
            ));
        }
    }
    Ok(faults)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// What is the same in every language: the parts of a text in their order, and then its links, without that to the `other`
/// of the pair.
fn shape(text: &str, other: &str) -> Vec<String> {
    let mut shape = Vec::new();
    let mut links = Vec::new();
    let mut code: Option<(String, String)> = None;
    let mut cells = 0;
    for event in links::parse(text) {
        match event {
            Event::Start(Tag::Heading { level, .. }) => shape.push(format!("a heading {level}")),
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(name))) => {
                code = Some((name.to_string(), String::new()));
            }
            Event::Text(text) if code.is_some() => {
                code.iter_mut().for_each(|(_, code)| code.push_str(&text));
            }
            Event::End(TagEnd::CodeBlock) => {
                let (name, code) = code.take().unwrap_or_default();
                let lines = code.lines().map(|line| format!("the line `{}`", kept(&name, line)));
                shape.extend(lines);
            }
            Event::Start(Tag::TableHead | Tag::TableRow) => cells = 0,
            Event::End(TagEnd::TableCell) => cells += 1,
            Event::End(TagEnd::TableHead | TagEnd::TableRow) => {
                shape.push(format!("a table row of {cells}"));
            }
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. })
                if !dest_url.starts_with('#') && *dest_url != *other =>
            {
                links.push(format!("a link to {dest_url}"));
            }
            _ => {}
        }
    }
    links.sort();
    shape.extend(links);
    shape
}

/// What nobody translates of a line of code.
fn kept<'a>(name: &str, line: &'a str) -> &'a str {
    match name {
        "console" | "sh-session" => line,
        "text" => line.split_whitespace().next().unwrap_or_default(),
        _ => line.split(" #").next().unwrap_or_default().trim_end(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGLISH_TEXT: &str = "# Name\n\n[Korean](a.ko.md) [x](x.rs) [here](#name)\n\n\
        ```sh\ncargo run    # runs\n```\n\n```text\nbook/  the book\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n";

    /// The fault of a translation in which `from` is `to`.
    fn fault(from: &str, to: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let korean = ENGLISH_TEXT
            .replace("Name", "이름")
            .replace("#name", "#이름")
            .replace("(a.ko.md)", "(a.md)")
            .replace("runs", "실행한다")
            .replace("the book", "책");
        assert!(korean.contains(from));
        fs::write(dir.path().join("a.md"), ENGLISH_TEXT).unwrap();
        fs::write(dir.path().join("a.ko.md"), korean.replace(from, to)).unwrap();
        fs::write(dir.path().join("b.md"), "alone").unwrap();
        check(dir.path()).unwrap()
    }

    #[test]
    fn a_translation_has_the_same_parts() {
        assert_eq!(fault("", ""), [""; 0]);
        for (from, to, has, instead) in [
            ("# 이", "## 이", "a heading h2", "a heading h1"),
            ("cargo run ", "cargo test", "the line `cargo test`", "the line `cargo run`"),
            ("book/", "notes/", "the line `notes/`", "the line `book/`"),
            ("| 1 | 2 |\n", "", "a link to x.rs", "a table row of 2"),
            ("x.rs", "y.rs", "a link to y.rs", "a link to x.rs"),
            ("[x](x.rs)", "", "nothing more", "a link to x.rs"),
        ] {
            let expected = format!("a.ko.md: it has {has} where a.md has {instead}");
            assert_eq!(fault(from, to), [expected]);
        }
    }
}
