//! What came of a grading, in its forms.

use std::fmt::Write as _;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use serde::Serialize;

use crate::inner::Met;
use crate::look::Mark;
use crate::rubric::{Language, Text};

/// All of it. As JSON, the names of the fields are a promise.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Each stage that was graded.
    pub stages: Vec<StageReport>,
    /// What the random values followed from.
    pub seed: u64,
    /// How long it took, with building.
    pub seconds: f64,
}

/// What a stage got.
#[derive(Debug, Serialize)]
pub struct StageReport {
    /// Its name.
    pub stage: String,
    /// Where it ran: `host` or `lab`; nothing if it did not build.
    pub place: String,
    /// Its criteria, in the order of the rubric.
    pub criteria: Vec<Graded>,
}

/// What a criterion got.
#[derive(Debug, Serialize)]
pub struct Graded {
    /// What it shows.
    pub shows: Text,
    /// The deliverable of the plan that it stands for.
    pub deliverable: Text,
    /// Its points: all or none.
    pub points: u32,
    /// What it is worth.
    pub of: u32,
    /// How it went.
    #[serde(flatten)]
    pub met: Met,
}

impl StageReport {
    /// Points, and what they could have been.
    pub fn points(&self) -> (u32, u32) {
        let points = self.criteria.iter().map(|graded| (graded.points, graded.of));
        points.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// The names of the criteria that are not met.
    pub fn lost(&self) -> Vec<&str> {
        let lost = self.criteria.iter().filter(|graded| !graded.met.met);
        lost.map(|graded| graded.met.name.as_str()).collect()
    }
}

const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const LOST: Style = AnsiColor::Red.on_default();
const FAINT: Style = Style::new().dimmed();

impl Report {
    fn points(&self) -> (u32, u32) {
        let points = self.stages.iter().map(StageReport::points);
        points.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Whether no point was lost.
    pub fn is_full(&self) -> bool {
        let (points, of) = self.points();
        points == of
    }

    /// The table for people.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn print(&self, out: &mut impl Write, language: Language) -> io::Result<()> {
        for stage in &self.stages {
            let (points, of) = stage.points();
            let place = match (&*stage.place, language) {
                ("lab", Language::En) => "in the lab",
                ("lab", Language::Ko) => "lab에서 실행",
                ("host", Language::En) => "on this host",
                ("host", Language::Ko) => "이 호스트에서 실행",
                _ => "",
            };
            let name = &stage.stage;
            writeln!(out, "\n{BOLD}{name:16}{points:>4} / {of}{BOLD:#}  {FAINT}{place}{FAINT:#}")?;
            for graded in &stage.criteria {
                let Graded { points, of, shows, met, .. } = graded;
                let (style, mark) = if met.met { (GOOD, '✓') } else { (LOST, '✗') };
                let (seconds, shows) = (met.seconds, shows.of(language));
                writeln!(
                    out,
                    "  {style}{mark}{style:#} {points:>2}/{of:<2} {seconds:>5.1} s  {shows}"
                )?;
                if !met.met {
                    print_lines(out, met)?;
                }
            }
        }
        let (points, of) = self.points();
        let (seed, seconds) = (self.seed, self.seconds);
        let style = if points == of { GOOD } else { LOST };
        match language {
            Language::En => writeln!(
                out,
                "\n{style}{points} of {of} points{style:#} in {seconds:.0} s; --seed {seed} draws the same numbers"
            ),
            Language::Ko => writeln!(
                out,
                "\n{style}{of}점 만점에 {points}점{style:#}, {seconds:.0}초; --seed {seed}로 같은 난수를 쓴다"
            ),
        }
    }

    /// As JSON.
    ///
    /// # Errors
    /// None in practice.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// As the XML that JUnit has made common.
    pub fn junit(&self) -> String {
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
        for stage in &self.stages {
            let tests = stage.criteria.len();
            let (name, failures) = (escaped(&stage.stage), stage.lost().len());
            let _ = writeln!(
                xml,
                "  <testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failures}\">"
            );
            for Graded { points, of, shows, met, .. } in &stage.criteria {
                let (case, seconds) = (escaped(&met.name), met.seconds);
                let _ = writeln!(
                    xml,
                    "    <testcase classname=\"{name}\" name=\"{case}\" time=\"{seconds:.3}\">"
                );
                if !met.met {
                    let message = escaped(&format!("{points} of {of} points: {}", shows.en));
                    let lines = escaped(&plain(met));
                    let _ = writeln!(xml, "      <failure message=\"{message}\">{lines}</failure>");
                }
                xml += "    </testcase>\n";
            }
            xml += "  </testsuite>\n";
        }
        xml + "</testsuites>\n"
    }

    /// As Markdown.
    pub fn markdown(&self, language: Language) -> String {
        let mut text = String::new();
        let head = match language {
            Language::En => "| | points | criterion | deliverable |",
            Language::Ko => "| | 점수 | 기준 | 산출물 |",
        };
        let mut faults = String::new();
        for stage in &self.stages {
            let (points, of) = stage.points();
            let _ = writeln!(
                text,
                "### {} — {points} / {of}\n\n{head}\n|---|---|---|---|",
                stage.stage
            );
            for Graded { points, of, shows, deliverable, met } in &stage.criteria {
                let mark = if met.met { '✓' } else { '✗' };
                let cell = |text: &str| text.replace('|', "\\|");
                let (shows, deliverable) =
                    (cell(shows.of(language)), cell(deliverable.of(language)));
                let _ = writeln!(text, "| {mark} | {points}/{of} | {shows} | {deliverable} |");
                if !met.met {
                    let _ = writeln!(faults, "`{}`:\n\n```text\n{}```\n", met.name, plain(met));
                }
            }
            text += "\n";
        }
        let (points, of) = self.points();
        let total = match language {
            Language::En => format!("**{points} of {of} points** (seed {})\n", self.seed),
            Language::Ko => format!("**{of}점 만점에 {points}점** (난수 {})\n", self.seed),
        };
        text + &total + if faults.is_empty() { "" } else { "\n" } + &faults
    }
}

/// What a criterion that is not met saw, and where the rest is. Of what was in order, a few lines show how far it came.
fn print_lines(out: &mut impl Write, met: &Met) -> io::Result<()> {
    for line in &met.lines {
        let style = if line.mark == Mark::Good { FAINT } else { LOST };
        writeln!(out, "        {style}{:7}{style:#} {}", line.mark, line.text)?;
        for near in &line.near {
            writeln!(out, "        {FAINT}      | {near}{FAINT:#}")?;
        }
    }
    if !met.log.as_os_str().is_empty() {
        writeln!(out, "        {FAINT}log     {}{FAINT:#}", met.log.display())?;
    }
    Ok(())
}

fn plain(met: &Met) -> String {
    let mut text = Vec::new();
    let printed = print_lines(&mut anstream::StripStream::new(&mut text), met);
    printed.expect("a vector takes all");
    String::from_utf8_lossy(&text)
        .lines()
        .fold(String::new(), |all, line| all + line.strip_prefix("        ").unwrap_or(line) + "\n")
}

/// Text in XML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            // XML 1.0 has no way to write the others.
            c if c.is_control() && !matches!(c, '\n' | '\t') => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::look::Line;

    fn report(met: bool) -> Report {
        let mark = if met { Mark::Good } else { Mark::Missing };
        let near = vec!["<near> & \u{1b}far".to_owned()];
        let line = Line { mark, text: "a slot".into(), near };
        let shows = Text { ko: "슬롯 | 하나".into(), en: "a slot | one".into() };
        let met = Met {
            name: "slot".into(),
            met,
            seconds: 1.25,
            lines: vec![line],
            log: PathBuf::from("/logs/slot.log"),
        };
        let graded = Graded {
            deliverable: shows.clone(),
            shows,
            points: if met.met { 15 } else { 0 },
            of: 15,
            met,
        };
        let stage =
            StageReport { stage: "02_memory".into(), place: "lab".into(), criteria: vec![graded] };
        Report { stages: vec![stage], seed: 7, seconds: 2.0 }
    }

    #[test]
    fn a_lost_point_is_told_in_every_form() {
        let lost = report(false);
        assert!(!lost.is_full() && report(true).is_full());
        let mut table = Vec::new();
        lost.print(&mut anstream::StripStream::new(&mut table), Language::Ko).unwrap();
        let table = String::from_utf8(table).unwrap();
        for text in ["✗  0/15", "슬롯 | 하나", "MISSING a slot", "log     /logs/slot.log", "15점"]
        {
            assert!(table.contains(text), "{text}: {table}");
        }
        let xml = lost.junit();
        assert!(xml.contains("failures=\"1\"") && xml.contains("&lt;near&gt; &amp; "), "{xml}");
        assert!(!xml.contains('\u{1b}'), "{xml}");
        let markdown = lost.markdown(Language::En);
        assert!(markdown.contains("| ✗ | 0/15 | a slot \\| one |"), "{markdown}");
        assert!(markdown.contains("MISSING a slot\n"), "{markdown}");
        let json: serde_json::Value = serde_json::from_str(&lost.json().unwrap()).unwrap();
        assert_eq!(json["stages"][0]["criteria"][0]["lines"][0]["mark"], "MISSING");
    }
}
