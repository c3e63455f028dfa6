//! What is played: a file of `record/scripts`, or any other.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use common::file;
use serde::{Deserialize, Serialize};
use unicode_width::UnicodeWidthStr;

use crate::svg;

/// No script is longer.
const MAX: u64 = 64 << 10;

/// How long is waited for a text when a step says nothing else, in seconds: for the lab on a busy machine.
const LIMIT: f64 = 300.0;

/// A session: the window's size, and what a person does in it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// What it shows.
    pub title: Text,
    /// The window's columns.
    pub columns: u16,
    /// Its rows.
    pub rows: u16,
    /// The programs that are built beforehand.
    #[serde(default)]
    pub build: Vec<String>,
    /// What a shell does beforehand in the session's own, empty folder, unseen.
    #[serde(default)]
    pub prepare: String,
    /// What is done, one after the other.
    #[serde(rename = "step")]
    pub steps: Vec<Step>,
}

/// The same in two languages.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// Korean.
    pub ko: String,
    /// English.
    pub en: String,
}

/// One step. What it has is done in this order.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The caption from here on.
    pub caption: Option<Text>,
    /// How long to wait before anything is typed, in seconds: for a caption to be read.
    #[serde(default)]
    pub before: f64,
    /// A line that is typed, and Enter.
    #[serde(rename = "type")]
    pub line: Option<String>,
    /// Keys that are pressed: `Ctrl-A`, `Enter`, `Tab`, `Escape`, an arrow, or a character.
    #[serde(default)]
    pub press: Vec<String>,
    /// What is waited for until the screen shows it.
    pub wait: Option<String>,
    /// For how long at most, in seconds of the real clock.
    #[serde(default = "limit")]
    pub limit: f64,
    /// How long the picture stays, in seconds.
    #[serde(default)]
    pub pause: f64,
    /// This moment, at the step's end, stands for the whole film.
    #[serde(default)]
    pub poster: bool,
}

fn limit() -> f64 {
    LIMIT
}

impl Script {
    /// Reads a script.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || {
            let text = String::from_utf8(file::read(path, MAX)?).context("this is no text")?;
            Self::parse(&text)
        };
        read().with_context(|| format!("script {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let script: Self = toml::from_str(text).map_err(|error| {
            let before = &text[..error.span().map_or(0, |span| span.start)];
            let line = before.matches('\n').count() + 1;
            anyhow::anyhow!("line {line}: {}", error.message().replace('\n', "; "))
        })?;
        script.check()?;
        Ok(script)
    }

    fn check(&self) -> Result<()> {
        let (columns, rows) = (self.columns, self.rows);
        ensure!(
            (40..=200).contains(&columns) && (10..=60).contains(&rows),
            "a window of {columns} columns and {rows} rows, expected 40 to 200 and 10 to 60"
        );
        ensure!(
            (1..=200).contains(&self.steps.len()),
            "{} steps, expected 1 to 200",
            self.steps.len()
        );
        check_text(&self.title, columns).context("title")?;
        for (number, step) in (1..).zip(&self.steps) {
            step.check(columns).with_context(|| format!("step {number}"))?;
        }
        let posters = self.steps.iter().filter(|step| step.poster).count();
        ensure!(posters == 1, "{posters} steps are the poster, expected 1");
        Ok(())
    }

    /// What tells whether a recording was made by this very script: comments and the order of keys do not count.
    pub fn fingerprint(&self) -> String {
        let text = serde_json::to_vec(self).expect("text and numbers");
        blake3::hash(&text).to_hex()[..16].to_owned()
    }
}

impl Step {
    fn check(&self, columns: u16) -> Result<()> {
        if let Some(caption) = &self.caption {
            check_text(caption, columns).context("caption")?;
        }
        for (name, seconds, most) in [
            ("before", self.before, 30.0),
            ("pause", self.pause, 30.0),
            ("limit", self.limit, 3600.0),
        ] {
            ensure!((0.0..=most).contains(&seconds), "{name} is {seconds}, expected 0 to {most}");
        }
        if let Some(line) = &self.line {
            ensure!(!line.chars().any(char::is_control), "type has a control character: use press");
        }
        ensure!(self.wait.as_deref() != Some(""), "wait is empty");
        self.press.iter().try_for_each(|key| bytes(key).map(drop))
    }
}

fn check_text(text: &Text, columns: u16) -> Result<()> {
    for (language, text, room) in [
        ("ko", &text.ko, svg::caption_room(columns)),
        ("en", &text.en, svg::small_caption_room(columns)),
    ] {
        ensure!(!text.chars().any(char::is_control), "{language} is more than a line of text");
        let width = text.width();
        ensure!(
            width <= room,
            "{language} takes {width} columns, and there is room for {room}: {text}"
        );
    }
    Ok(())
}

/// What a terminal sends for a key.
pub fn bytes(key: &str) -> Result<Vec<u8>> {
    if let Some(letter) = key.strip_prefix("Ctrl-")
        && let [letter @ b'A'..=b'Z'] = letter.as_bytes()
    {
        return Ok(vec![letter - b'@']);
    }
    Ok(match key {
        "Enter" => b"\r".into(),
        "Tab" => b"\t".into(),
        "Escape" => b"\x1b".into(),
        "Up" => b"\x1b[A".into(),
        "Down" => b"\x1b[B".into(),
        "Right" => b"\x1b[C".into(),
        "Left" => b"\x1b[D".into(),
        _ if key.chars().count() == 1 && !key.contains(char::is_control) => key.into(),
        _ => bail!(
            "{key:?} is no key: expected a character, Ctrl-A to Ctrl-Z, Enter, Tab, Escape, Up, Down, Left or Right"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "title = { ko = \"가\", en = \"a\" }\ncolumns = 80\nrows = 24\n";

    fn error(text: &str) -> String {
        format!("{:#}", Script::parse(text).unwrap_err())
    }

    #[test]
    fn a_script_is_read_with_what_it_leaves_out() {
        let text = format!("{HEAD}[[step]]\ntype = \"ls\"\nwait = \"$ \"\nposter = true\n");
        let script = Script::parse(&text).unwrap();
        let [step] = &script.steps[..] else { panic!("{script:?}") };
        assert_eq!((step.line.as_deref(), step.wait.as_deref()), (Some("ls"), Some("$ ")));
        assert_eq!((step.limit, step.pause, step.caption.is_none()), (LIMIT, 0.0, true));
        let other = text.replace("ls", "df");
        assert_ne!(script.fingerprint(), Script::parse(&other).unwrap().fingerprint());
        let same = Script::parse(&format!("# The same.\n{text}")).unwrap();
        assert_eq!(script.fingerprint(), same.fingerprint());
    }

    #[test]
    fn each_mistake_is_named_in_a_line() {
        let long = "가".repeat(60);
        for (rest, why) in [
            ("", "missing field `step`"),
            ("[[step]]\ntipe = \"x\"", "line 5: unknown field `tipe`"),
            ("[[step]]\npause = \"x\"", "line 5: invalid type"),
            ("[[step]]\npause = 1e9", "step 1: pause is 1000000000, expected 0 to 30"),
            ("[[step]]\npause = nan", "step 1: pause is NaN"),
            ("[[step]]\npause = 1", "0 steps are the poster, expected 1"),
            ("[[step]]\nwait = \"\"", "step 1: wait is empty"),
            ("[[step]]\ntype = \"a\\u0003\"", "type has a control character: use press"),
            ("[[step]]\npress = [\"Ctrl-a\"]", "\"Ctrl-a\" is no key"),
            ("[[step]]\npress = [\"\"]", "\"\" is no key"),
            ("[[step]]\ncaption = { ko = \"가\" }", "missing field `en`"),
            (
                &format!("[[step]]\ncaption = {{ ko = \"{long}\", en = \"\" }}"),
                "step 1: caption: ko takes 120 columns, and there is room for",
            ),
        ] {
            let error = error(&format!("{HEAD}{rest}"));
            assert!(error.contains(why) && !error.contains('\n'), "{rest}: {error}");
        }
        let wide = HEAD.replace("80", "8000") + "[[step]]\n";
        assert!(error(&wide).contains("a window of 8000 columns"));
    }

    #[test]
    fn keys_are_what_a_terminal_sends() {
        assert_eq!(bytes("Ctrl-A").unwrap(), [1]);
        assert_eq!(bytes("x").unwrap(), b"x");
        assert_eq!(bytes("가").unwrap(), "가".as_bytes());
        assert_eq!(bytes("Up").unwrap(), b"\x1b[A");
    }
}
