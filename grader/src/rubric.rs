//! The rubrics: which criteria a stage has, what each is worth, and which deliverable of the plan it stands for.

use std::sync::LazyLock;

pub use cli::STAGES;
use serde::{Deserialize, Serialize};

/// The points of a stage.
pub const POINTS: u32 = 100;

/// A language that the criteria are described in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// Korean.
    Ko,
    /// English.
    #[default]
    En,
}

/// A text in both languages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// In Korean.
    pub ko: String,
    /// In English.
    pub en: String,
}

impl Text {
    /// The text in a language.
    pub fn of(&self, language: Language) -> &str {
        match language {
            Language::Ko => &self.ko,
            Language::En => &self.en,
        }
    }
}

/// A stage's `rubric.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rubric {
    /// The deliverable that the criteria stand for, where they name no other.
    pub deliverable: Text,
    /// The criteria, in the order in which they are run.
    #[serde(rename = "criterion", default)]
    pub criteria: Vec<Entry>,
}

/// One criterion of a rubric.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name: that of the function in the grader.
    pub name: String,
    /// What it is worth.
    pub points: u32,
    /// What it shows, in Korean.
    pub ko: String,
    /// What it shows, in English.
    pub en: String,
    /// The deliverable, if it is another one than the stage's.
    pub deliverable: Option<Text>,
}

impl Entry {
    /// What it shows.
    pub fn shows(&self) -> Text {
        Text { ko: self.ko.clone(), en: self.en.clone() }
    }
}

/// The rubric of a stage, 1 to 8, as it was when the grader was built; nothing if it has no criteria.
pub fn of(stage: usize) -> Option<&'static Rubric> {
    static ALL: LazyLock<Vec<Rubric>> = LazyLock::new(|| {
        let parse = |text| toml::from_str(text).expect("a unit test has read it before");
        TEXTS.into_iter().map(parse).collect()
    });
    ALL.get(stage.checked_sub(1)?).filter(|rubric| !rubric.criteria.is_empty())
}

/// The texts of the rubrics.
const TEXTS: [&str; 8] = [
    include_str!("../../stages/01_create_vm/rubric.toml"),
    include_str!("../../stages/02_memory/rubric.toml"),
    include_str!("../../stages/03_vcpu/rubric.toml"),
    include_str!("../../stages/04_pio/rubric.toml"),
    include_str!("../../stages/05_mmio/rubric.toml"),
    include_str!("../../stages/06_long_mode/rubric.toml"),
    include_str!("../../stages/07_bootloader/rubric.toml"),
    include_str!("../../stages/08_boot_linux/rubric.toml"),
];

/// The stages that have a rubric.
pub fn stages() -> Vec<usize> {
    (1..=STAGES.len()).filter(|&stage| of(stage).is_some()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criteria;

    #[test]
    fn every_rubric_has_its_points_and_its_functions() {
        for (stage, text) in (1..).zip(TEXTS) {
            let rubric: Rubric = toml::from_str(text).unwrap_or_else(|error| {
                panic!("rubric of stage {stage}: {error}");
            });
            if rubric.criteria.is_empty() {
                continue;
            }
            let points: u32 = rubric.criteria.iter().map(|criterion| criterion.points).sum();
            assert_eq!(points, POINTS, "stage {stage}");
            let named: Vec<_> = rubric.criteria.iter().map(|entry| entry.name.as_str()).collect();
            let written: Vec<_> = criteria::of(stage).iter().map(|(name, _)| *name).collect();
            assert_eq!(named, written, "stage {stage}: rubric.toml and the functions");
            for entry in &rubric.criteria {
                let korean = |text: &str| text.chars().any(|c| ('가'..='힣').contains(&c));
                assert!(korean(&entry.ko) && !korean(&entry.en), "{}", entry.name);
                assert!(!entry.en.is_empty() && entry.points > 0, "{}", entry.name);
            }
        }
    }
}
