//! What a criterion is given: the submission's programs, random numbers, a folder, and a paper for what it saw.

use std::ffi::{OsStr, OsString};
use std::fmt::{Debug, Display, Write as _};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::inner::Order;
use crate::program::{Program, Ran};
use crate::rubric;

/// How something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mark {
    /// It was wanted and was seen.
    Good,
    /// It must not be, and was seen.
    Bad,
    /// It was wanted and was not seen.
    Missing,
}

impl Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Good => "GOOD",
            Self::Bad => "BAD",
            Self::Missing => "MISSING",
        })
    }
}

/// One thing that a criterion looked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// How it was found.
    pub mark: Mark,
    /// What.
    pub text: String,
    /// What was seen near it, or instead.
    #[serde(default)]
    pub near: Vec<String>,
}

/// How many lines of context a line has at most.
const MOST_NEAR: usize = 12;

/// The most that the log keeps of the record of one program.
const MOST_RECORD: usize = 2 << 20;

/// A criterion's look at the submission.
pub struct Look {
    stage: usize,
    bins: PathBuf,
    launcher: PathBuf,
    folder: PathBuf,
    rng: fastrand::Rng,
    lines: Vec<Line>,
    log: String,
    /// Where the honest programs' outputs are kept for a cheat.
    recordings: Option<PathBuf>,
}

impl Look {
    /// The look of the criterion `name` at what `order` is about. Its folder is made anew. `launcher` is the grader's
    /// binary, as which watched programs begin.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(order: &Order, name: &str, launcher: &Path) -> Result<Self> {
        let folder = order.folder.join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("folder {}", folder.display()))?;
        // Each criterion draws numbers of its own, whichever others are run.
        let mut hasher = DefaultHasher::new();
        (order.seed, order.stage, name).hash(&mut hasher);
        Ok(Self {
            stage: order.stage,
            bins: order.bins.clone(),
            launcher: launcher.to_owned(),
            folder,
            rng: fastrand::Rng::with_seed(hasher.finish()),
            lines: Vec::new(),
            log: String::new(),
            recordings: order.recordings.clone(),
        })
    }

    /// The stage's own program with these arguments; [`Program::run`] starts it.
    pub fn program<'c, A: AsRef<OsStr>>(&self, args: &[A]) -> Program<'c> {
        self.program_of(self.stage, args)
    }

    /// The program of another stage, 1 to 8.
    ///
    /// # Panics
    /// There is no such stage.
    pub fn program_of<'c, A: AsRef<OsStr>>(&self, stage: usize, args: &[A]) -> Program<'c> {
        Program::new(&self.launcher, self.bins.join(rubric::STAGES[stage - 1]), args)
    }

    /// A random number. All random values of a criterion follow from `--seed`.
    pub fn random(&mut self, range: impl RangeBounds<u64>) -> u64 {
        self.rng.u64(range)
    }

    /// Random bytes.
    pub fn random_bytes(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.rng.u8(..)).take(len).collect()
    }

    /// A random word of small letters.
    pub fn random_word(&mut self, len: usize) -> String {
        std::iter::repeat_with(|| self.rng.lowercase()).take(len).collect()
    }

    /// `count` different random numbers, in ascending order.
    pub fn random_set(&mut self, count: usize, range: std::ops::Range<u64>) -> Vec<u64> {
        let all: Vec<_> = range.collect();
        let mut chosen = self.rng.choose_multiple(all, count);
        chosen.sort_unstable();
        chosen
    }

    /// Writes a file for a program into the criterion's own folder and gives its path.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// A path in the criterion's own folder, where nothing is yet.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// GOOD if it is so, else MISSING.
    pub fn wants(&mut self, what: impl Display, so: bool) -> bool {
        self.wants_near(what, so, &[])
    }

    /// The same; if it is not so, these lines are shown with it.
    pub fn wants_near(&mut self, what: impl Display, so: bool, near: &[String]) -> bool {
        let mark = if so { Mark::Good } else { Mark::Missing };
        self.add(mark, what, if so { &[] } else { near });
        so
    }

    /// GOOD if they are the same, else MISSING with both.
    pub fn wants_same<T: PartialEq + Debug>(&mut self, what: impl Display, wanted: T, seen: T) {
        let same = wanted == seen;
        let near = [format!("wanted {wanted:x?}"), format!("seen   {seen:x?}")];
        self.wants_near(what, same, if same { &[] } else { &near });
    }

    /// GOOD if the text is in `all`, else MISSING with the end of what is there.
    pub fn wants_in(&mut self, what: impl Display, text: &str, all: &str) {
        let lines: Vec<_> = all.lines().map(str::to_owned).collect();
        let near = &lines[lines.len().saturating_sub(MOST_NEAR)..];
        self.wants_near(format!("{what}: {text:?}"), all.contains(text), near);
    }

    /// GOOD with a value, else MISSING, which ends the criterion: for what the rest of it needs.
    ///
    /// # Errors
    /// There is none.
    pub fn needs<T>(&mut self, what: impl Display, value: Option<T>) -> Result<T> {
        let text = what.to_string();
        self.wants(&text, value.is_some());
        value.with_context(|| format!("without that the rest cannot be looked for: {text}"))
    }

    /// BAD if it is so, else GOOD.
    pub fn forbids(&mut self, what: impl Display, so: bool) {
        match so {
            true => self.add(Mark::Bad, what, &[]),
            false => self.add(Mark::Good, format!("not: {what}"), &[]),
        }
    }

    /// GOOD if it ended by itself with this exit code.
    pub fn wants_code(&mut self, code: i32, ran: &Ran) {
        let near = match ran.code() == Some(code) {
            true => Vec::new(),
            false => {
                let mut near = vec![format!("it ended with {:?}", ran.status)];
                near.extend(crate::program::tail(ran));
                near
            }
        };
        let short = short(&ran.command);
        self.wants_near(format!("exit code {code} of `{short}`"), near.is_empty(), &near);
    }

    /// What every program owes a user whose input it cannot use: nothing on stdout, one line on stderr that begins with
    /// `error:` and has `text` in it, and exit code 2, or 3 if the host is to blame.
    pub fn wants_refusal(&mut self, code: i32, text: &str, ran: &Ran) {
        self.wants_code(code, ran);
        let err = ran.err();
        let one = err.starts_with("error:") && err.trim_end().lines().count() == 1;
        let near = crate::program::tail(ran);
        self.wants_near("one line `error: …` on stderr, and no other", one, &near);
        self.wants_in("the reason", text, &err);
        self.forbids("anything on stdout", !ran.stdout.is_empty());
    }

    pub(crate) fn missing(&mut self, what: &str, near: &[String]) {
        self.add(Mark::Missing, what, near);
    }

    pub(crate) fn bad(&mut self, what: &str, near: &[String]) {
        self.add(Mark::Bad, what, near);
    }

    fn add(&mut self, mark: Mark, what: impl Display, near: &[String]) {
        let near = near.iter().take(MOST_NEAR).cloned().collect();
        self.lines.push(Line { mark, text: what.to_string(), near });
    }

    /// A program has ended: all that is known of it goes to the log.
    pub(crate) fn ran(&mut self, ran: &Ran, args: &[OsString]) {
        let mut record = ran.to_string();
        if record.len() > MOST_RECORD {
            let end = record.floor_char_boundary(MOST_RECORD);
            record.truncate(end);
            record += "\n… and so on\n";
        }
        let _ = writeln!(
            self.log,
            "$ {}\nended: {:?}{}, after {:.2} s\n--- stdout\n{}\n--- stderr\n{}\n--- KVM\n{record}",
            ran.command,
            ran.status,
            if ran.timed_out { " (its time was up)" } else { "" },
            ran.took.as_secs_f64(),
            ran.out(),
            ran.err(),
        );
        if let Some(folder) = &self.recordings {
            let program = ran.command.split(' ').next().unwrap_or_default();
            let kept = crate::cheat::record(folder, Path::new(program), args, ran);
            if let Err(error) = kept {
                self.bad(&format!("the output cannot be kept for a cheat: {error:#}"), &[]);
            }
        }
    }

    /// What came of it: the lines, and the log's text. The criterion's files have served.
    ///
    /// # Errors
    /// The criterion looked at nothing.
    pub fn done(self) -> Result<(Vec<Line>, String)> {
        let _ = fs::remove_dir_all(&self.folder);
        if self.lines.is_empty() {
            bail!("the criterion has looked at nothing");
        }
        let mut log = String::new();
        for line in &self.lines {
            let _ = writeln!(log, "{:7} {}", line.mark, line.text);
            for near in &line.near {
                let _ = writeln!(log, "        | {near}");
            }
        }
        Ok((self.lines, log + "\n" + &self.log))
    }
}

/// A command without the folders of its program.
fn short(command: &str) -> String {
    let (program, rest) = command.split_once(' ').unwrap_or((command, ""));
    let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
    format!("{name} {rest}").trim_end().to_owned()
}
