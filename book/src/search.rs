//! The book's search index, made for Korean.
//!
//! mdBook makes an index of English words: its pipeline strips what is no ASCII letter from the ends of a word, which of
//! a Korean word leaves nothing. So its index is replaced by one of whole words without a pipeline. The page looks
//! for words that begin with what was typed: particles (`메모리를`, `메모리는`) need no more than that.

use std::path::Path;
use std::{fs, iter};

use anyhow::{Context, Result, ensure};
use elasticlunr::lang::Language;
use elasticlunr::pipeline::Pipeline;
use elasticlunr::{Index, IndexBuilder};
use serde_json::Value;

/// What stands around the JSON in `searchindex.js`.
const BEFORE: &str = "window.search = Object.assign(window.search, JSON.parse('";
const AFTER: &str = "'));";

/// Longer ones are no words.
const LONGEST: usize = 80;

/// Words as they stand.
#[derive(Clone)]
struct Words;

impl Language for Words {
    fn name(&self) -> String {
        "words".into()
    }

    fn code(&self) -> String {
        "words".into()
    }

    fn tokenize(&self, text: &str) -> Vec<String> {
        words(text)
    }

    fn make_pipeline(&self) -> Pipeline {
        Pipeline { queue: Vec::new() }
    }
}

/// The words of a text: each between spaces or hyphens, as the page splits what is typed, without the
/// punctuation at its ends; and its parts, if there is punctuation within.
fn words(text: &str) -> Vec<String> {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    let text = text.to_lowercase();
    let whole = text.split(|c: char| c.is_whitespace() || c == '-');
    let words = whole.map(|word| word.trim_matches(|c| !inside(c))).flat_map(|word| {
        let parts = word.split(move |c| !inside(c)).filter(move |part| *part != word);
        iter::once(word).chain(parts)
    });
    words.filter(|word| (1..=LONGEST).contains(&word.len())).map(str::to_owned).collect()
}

/// Replaces the index in the book at `book`.
pub fn replace(book: &Path) -> Result<()> {
    let mut replaced = 0;
    for entry in book.read_dir().with_context(|| format!("cannot read {}", book.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("searchindex") && name.ends_with(".js") {
            let old = fs::read_to_string(&path)?;
            let new = replaced_in(&old).with_context(|| format!("in {}", path.display()))?;
            fs::write(&path, new).with_context(|| format!("cannot write {}", path.display()))?;
            replaced += 1;
        }
    }
    ensure!(replaced == 1, "mdBook made {replaced} search indices, expected one");
    Ok(())
}

fn replaced_in(script: &str) -> Result<String> {
    let json = script.strip_prefix(BEFORE).and_then(|rest| rest.strip_suffix(AFTER));
    let json = json.context("the search index has another form than mdBook 0.5 gives it")?;
    let mut search: Value = serde_json::from_str(&unescaped(json))?;
    let fields = ["title", "body", "breadcrumbs"];
    let mut index: Index = fields
        .iter()
        .fold(IndexBuilder::with_language(Box::new(Words)), |builder, field| {
            builder.add_field(field)
        })
        .build();
    let docs = search["index"]["documentStore"]["docs"].as_object();
    for (key, doc) in docs.context("mdBook's search index has no documents")? {
        index.add_doc(key, fields.map(|field| doc[field].as_str().unwrap_or_default()));
    }
    search["index"] = serde_json::to_value(&index)?;
    let json = serde_json::to_string(&search)?.replace('\\', "\\\\").replace('\'', "\\'");
    Ok(format!("{BEFORE}{json}{AFTER}"))
}

/// The text that a JavaScript string in single quotes stands for, where mdBook wrote it.
fn unescaped(literal: &str) -> String {
    let mut text = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        text.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn korean_words_are_found_and_english_ones_as_well() {
        assert_eq!(
            words("`KVM_RUN`은 (게스트를) /dev/kvm read-only."),
            ["kvm_run`은", "kvm_run", "은", "게스트를", "dev/kvm", "dev", "kvm", "read", "only"]
        );
    }

    #[test]
    fn an_index_keeps_its_documents() {
        let doc = serde_json::json!({"title": "배경", "body": "it's \"a\\b\"", "breadcrumbs": ""});
        let old = serde_json::json!({
            "doc_urls": ["week01.html"],
            "index": {"documentStore": {"docs": {"0": doc}}},
        });
        let old = old.to_string().replace('\\', "\\\\").replace('\'', "\\'");
        let new = replaced_in(&format!("{BEFORE}{old}{AFTER}")).unwrap();
        let json = new.strip_prefix(BEFORE).unwrap().strip_suffix(AFTER).unwrap();
        let new: Value = serde_json::from_str(&unescaped(json)).unwrap();
        assert_eq!(new["doc_urls"][0], "week01.html");
        assert_eq!(new["index"]["documentStore"]["docs"]["0"]["body"], "it's \"a\\b\"");
        // A tree of letters.
        assert_eq!(new["index"]["index"]["title"]["root"]["배"]["경"]["df"], 1);
        assert_eq!(new["index"]["pipeline"], serde_json::json!([]));
    }
}
