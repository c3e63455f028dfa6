//! A copy of the repository in which faults are tried, with a target folder that stays warm.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::faults::Fault;
use crate::grade::{self, Built, cargo_build};
use crate::rubric::STAGES;

/// The copy.
pub struct Copy {
    repo: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// Brings the copy in `folder` up to date: only what has changed is written, so that little is built again.
    ///
    /// # Errors
    /// Git does not say what belongs to the repository, or the disk is full.
    pub fn new(folder: &Path) -> Result<Self> {
        let copy = Self { repo: folder.join("repo"), target: folder.join("target") };
        let mut git = Command::new("git");
        git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]);
        let listed = git.current_dir(grade::root()).output().context("cannot start git")?;
        ensure!(listed.status.success(), "git does not list the repository's files");
        for name in listed.stdout.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let name = Path::new(OsStr::from_bytes(name));
            let (from, to) = (grade::root().join(name), copy.repo.join(name));
            let Ok(contents) = fs::read(&from) else { continue };
            if fs::read(&to).is_ok_and(|there| there == contents) {
                continue;
            }
            fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
            // With its permissions: some are scripts.
            fs::copy(&from, &to).with_context(|| format!("cannot write {}", to.display()))?;
        }
        Ok(copy)
    }

    /// Builds the stage with the fault, and takes the fault out again. The program is put into the folder `bins`, beside
    /// the others of the honest project.
    ///
    /// # Errors
    /// The fault has no place, or does not build: it is none then.
    pub fn build_with(&self, fault: &Fault, honest: &Built, bins: &Path) -> Result<Built> {
        let (with, without) = fault.in_file(&self.repo)?;
        let path = self.repo.join(&fault.file);
        fs::write(&path, with)?;
        // Only what this stage asks of the crates that it shares with others.
        let what = ["--package".to_owned(), format!("stage-{:02}", fault.stage)];
        let built = cargo_build(&self.repo, &self.target, &what, false);
        fs::write(&path, without)?;
        if let Err(said) = built? {
            anyhow::bail!("{} does not build:\n{}", fault.title(), said.join("\n"));
        }
        let _ = fs::remove_dir_all(bins);
        fs::create_dir_all(bins)?;
        for (stage, name) in (1..).zip(STAGES) {
            if stage == fault.stage {
                fs::copy(self.target.join("debug").join(name), bins.join(name))?;
            } else {
                symlink(honest.bins.join(name), bins.join(name))?;
            }
        }
        Ok(Built { bins: bins.to_owned(), broken: BTreeMap::new() })
    }
}
