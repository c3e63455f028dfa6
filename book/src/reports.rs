//! The reports of `notes/reports`, as PDF files for those who want paper.
//!
//! mdBook takes in the excerpts, WeasyPrint sets the pages: it is made for paper, with running heads, page numbers and a
//! table of contents that has them, and needs no browser. `notes/theme/reports.css` says how it looks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use mdbook_driver::MDBook;
use mdbook_driver::builtin_renderers::MarkdownRenderer;
use mdbook_markdown::pulldown_cmark::{Event, HeadingLevel, Tag, html};

use crate::links::{self, Ids};

/// The program that sets the pages.
const RENDERER: &str = "weasyprint";

/// The folder of the reports in that of the notes.
const FOLDER: &str = "reports";

/// What is said where something is missing.
const SETUP: &str = "`cargo xtask setup --reports` brings it";

/// Writes the reports whose names contain one of `wanted`, or all, to the folder `to`, and gives their files.
pub fn export(root: &Path, to: &Path, wanted: &[String]) -> Result<Vec<PathBuf>> {
    can_render()?;
    let notes = root.join("notes");
    let mut reports = reports(&notes)?;
    ensure!(!reports.is_empty(), "there are no reports in notes/{FOLDER}");
    let names: Vec<_> = reports.keys().cloned().collect();
    for word in wanted {
        ensure!(
            names.iter().any(|name| name.contains(word.as_str())),
            "no report's name contains {word}: there are {}",
            names.join(", ")
        );
    }
    reports.retain(|name, _| {
        wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()))
    });
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut files = Vec::new();
    for (name, text) in &reports {
        let file = to.join(format!("{name}.pdf"));
        eprintln!("making {}", links::relative(root, &file));
        let page = to.join(format!("{name}.html"));
        fs::write(&page, self::page(text))
            .with_context(|| format!("cannot write {}", page.display()))?;
        render(&page, &notes, &file).with_context(|| format!("cannot make {name}.pdf"))?;
        files.push(file);
    }
    Ok(files)
}

/// Whether there is what it takes. Without a font, Korean would come out as empty boxes.
fn can_render() -> Result<()> {
    let said = |program: &str, arg: &str| {
        let ran = Command::new(program).arg(arg).stdin(Stdio::null()).output();
        ran.is_ok_and(|ran| !ran.stdout.is_empty())
    };
    ensure!(said(RENDERER, "--version"), "there is no {RENDERER} here: {SETUP}");
    ensure!(said("fc-list", ":lang=ko"), "there is no Korean font here: {SETUP}");
    Ok(())
}

/// The reports' texts by name, with the excerpts in them.
fn reports(notes: &Path) -> Result<BTreeMap<String, String>> {
    let (book, _) = MDBook::load(notes)?.preprocess_book(&MarkdownRenderer::new())?;
    let texts = book.chapters().filter_map(|chapter| {
        let path = chapter.path.as_ref()?;
        let name = path.strip_prefix(FOLDER).ok()?.with_extension("");
        Some((name.display().to_string(), chapter.content.clone()))
    });
    let texts: BTreeMap<_, _> = texts.collect();
    for file in links::markdown(&notes.join(FOLDER))? {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        ensure!(
            texts.contains_key(&*name),
            "notes/SUMMARY.md does not list the report {FOLDER}/{name}.md"
        );
    }
    Ok(texts)
}

/// A report as one page of HTML: what stands before its first section is the title page, with a table of contents.
fn page(text: &str) -> String {
    let mut ids = Ids::default();
    let (mut title, mut contents) = (String::new(), String::new());
    let mut first_section = None;
    let mut events = links::parse(text);
    for at in 0..events.len() {
        let words = links::heading(&events[at..]);
        match &mut events[at] {
            Event::Start(Tag::Heading { level, id, .. }) => {
                let name = ids.of_heading(&words);
                let words = escaped(&words);
                match level {
                    HeadingLevel::H1 => title = words,
                    HeadingLevel::H2 | HeadingLevel::H3 => {
                        first_section.get_or_insert(at);
                        let entry = format!("<a href=\"#{name}\">{words}</a>");
                        let _ = writeln!(contents, "<li class=\"{level}\">{entry}</li>");
                    }
                    _ => {}
                }
                *id = Some(name.into());
            }
            // On paper there is nothing behind a link to a file.
            Event::Start(Tag::Link { dest_url, .. }) if !leads_on(dest_url) => {
                *dest_url = "".into();
            }
            _ => {}
        }
    }
    let contents = format!("<nav><ol>\n{contents}</ol></nav>\n</header>\n");
    events.insert(first_section.unwrap_or(events.len()), Event::Html(contents.into()));
    let mut body = String::new();
    html::push_html(&mut body, events.into_iter());
    let body = body.replace("<a href=\"\">", "<a>");
    format!(
        "<!doctype html>\n<html lang=\"ko\">\n<meta charset=\"utf-8\">\n<title>{title}</title>\n\
         <header>\n{body}</html>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Whether a link leads somewhere from a PDF file.
fn leads_on(link: &str) -> bool {
    link.starts_with('#') || link.contains("://")
}

/// Has the pages set. What a page names is found from a report's folder, its style from that of the notes.
fn render(page: &Path, notes: &Path, file: &Path) -> Result<()> {
    let done = Command::new(RENDERER)
        .arg("--base-url")
        .arg(notes.join(FOLDER).join(""))
        .arg("--stylesheet")
        .arg(notes.join("theme/reports.css"))
        .args([page, file])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {RENDERER}"))?;
    // It goes on without a picture that it cannot find, and says so.
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() || !said.trim().is_empty() {
        bail!("{RENDERER} has complaints:\n{}", said.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with notes of one report, which has all that is set apart.
    fn notes(report: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let notes = dir.path().join("notes");
        for folder in ["reports", "theme", "figures"] {
            fs::create_dir_all(notes.join(folder)).unwrap();
        }
        let theme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../notes/theme/reports.css");
        fs::copy(theme, notes.join("theme/reports.css")).unwrap();
        fs::write(notes.join("book.toml"), "[book]\nsrc = \".\"\n").unwrap();
        fs::write(notes.join("SUMMARY.md"), "- [보고서](reports/one.md)\n").unwrap();
        fs::write(dir.path().join("code.rs"), "// ANCHOR: x\nlet 값 = 1;\n// ANCHOR_END: x\n")
            .unwrap();
        let figure = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"9\" height=\"9\"/>";
        fs::write(notes.join("figures/a.svg"), figure).unwrap();
        fs::write(notes.join("reports/one.md"), report).unwrap();
        dir
    }

    const REPORT: &str = "# 보고서 `KVM`\n\n> **In short.** A summary.\n\n## 첫 번째\n\n\
        [1주차](../week01.md), [아래](#둘--셋)\n\n![그림](../figures/a.svg)\n\n\
        ```rust\n{{#include ../../code.rs:x}}\n```\n\n\
        <details><summary>질문</summary>\n\n접힌 답.\n</details>\n\n## 둘 & 셋\n\n\
        [![영화](../figures/a.svg)](no.mp4)\n";

    #[test]
    fn a_report_becomes_a_title_page_with_contents_and_its_sections() {
        let page = page(REPORT);
        let (title, sections) = page.split_once("</header>").unwrap();
        assert!(title.contains("<title>보고서 KVM</title>"), "{title}");
        assert!(title.contains("A summary."), "{title}");
        assert!(title.contains("<a href=\"#둘--셋\">둘 &amp; 셋</a>"), "{title}");
        assert!(sections.contains("<h2 id=\"둘--셋\">"), "{sections}");
        assert!(sections.contains("<a>1주차</a>"), "{sections}");
        assert!(!sections.contains("no.mp4"), "{sections}");
        assert_eq!(sections.matches("../figures/a.svg").count(), 2, "{sections}");
    }

    #[test]
    fn a_report_is_set_with_its_korean_excerpts_and_folded_answers() {
        if let Err(missing) = can_render() {
            eprintln!("skipped: {missing:#}");
            return;
        }
        let dir = notes(REPORT);
        let to = dir.path().join("out");
        let files = export(dir.path(), &to, &["on".into()]).unwrap();
        assert_eq!(files, [to.join("one.pdf")]);
        let Ok(text) = Command::new("pdftotext").arg(&files[0]).arg("-").output() else {
            eprintln!("skipped: there is no pdftotext here: {SETUP}");
            return;
        };
        let text = String::from_utf8(text.stdout).unwrap();
        for words in ["보고서 KVM", "첫 번째", "let 값 = 1;", "접힌 답.", "둘 & 셋", "1/2"]
        {
            assert!(text.contains(words), "no {words} in: {text}");
        }
    }

    #[test]
    fn what_cannot_be_exported_is_named() {
        if let Err(missing) = can_render() {
            eprintln!("skipped: {missing:#}");
            return;
        }
        let dir = notes("# 보고서\n\n![없는 그림](no.svg)\n");
        let notes = dir.path().join("notes");
        let why = |wanted: &[String]| {
            format!("{:#}", export(dir.path(), &notes.join("out"), wanted).unwrap_err())
        };
        assert_eq!(why(&["two".into()]), "no report's name contains two: there are one");
        assert!(why(&[]).contains("no.svg"), "{}", why(&[]));
        fs::write(notes.join("reports/two.md"), "# 둘\n").unwrap();
        assert_eq!(why(&[]), "notes/SUMMARY.md does not list the report reports/two.md");
    }
}
