//! The seeded faults: `grader/faults/stage_NN.toml`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::rubric::STAGES;

/// A mistake that somebody could make, as a change of one place in the sources.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The stage whose criteria are to notice it, 1 to 8.
    #[serde(skip)]
    pub stage: usize,
    /// A name, unique in its file.
    pub name: String,
    /// The file, from the repository's root.
    pub file: String,
    /// What stands there exactly once.
    pub find: String,
    /// What is to stand there instead.
    pub replace: String,
    /// What is broken then.
    pub breaks: String,
    /// The criterion that is expected to notice.
    pub criterion: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Faults {
    #[serde(default)]
    fault: Vec<Fault>,
}

/// All faults, in the order of their stages.
///
/// # Errors
/// A file is not as it should be.
pub fn all(root: &Path) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for stage in 1..=STAGES.len() {
        let path = root.join(format!("grader/faults/stage_{stage:02}.toml"));
        // A stage without criteria has none.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let file: Faults = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
        faults.extend(file.fault.into_iter().map(|fault| Fault { stage, ..fault }));
    }
    Ok(faults)
}

impl Fault {
    /// How a person names it.
    pub fn title(&self) -> String {
        format!("fault {:02} {}", self.stage, self.name)
    }

    /// The file with the fault in it, and as it is.
    ///
    /// # Errors
    /// The file has changed, so that there is no such place, or more than one.
    pub fn in_file(&self, repo: &Path) -> Result<(String, String)> {
        let path = repo.join(&self.file);
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("{}: no {}", self.title(), self.file))?;
        let places = text.matches(&self.find).count();
        let title = self.title();
        ensure!(places == 1, "{title}: `{}` stands {places} times in {}", self.find, self.file);
        Ok((text.replacen(&self.find, &self.replace, 1), text))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::grade::root;
    use crate::rubric;

    #[test]
    fn every_fault_has_its_place_and_its_criterion() {
        let mut names = HashSet::new();
        for fault in all(root()).unwrap() {
            let (with, without) = fault.in_file(root()).unwrap();
            assert!(with != without, "{}: nothing changes", fault.title());
            let rubric = rubric::of(fault.stage).unwrap();
            let known = rubric.criteria.iter().any(|entry| entry.name == fault.criterion);
            assert!(known, "{}: no criterion {}", fault.title(), fault.criterion);
            assert!(names.insert(fault.title()), "{} stands twice", fault.title());
            assert!(!fault.breaks.is_empty(), "{}", fault.title());
        }
    }
}
