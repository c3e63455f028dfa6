//! `cargo xtask grade --self-check`: what the grader itself is worth.
//!
//! It grades the honest project again and again, which has to get full points each time; programs with seeded faults, each
//! of which has to lose some; and programs that only print what honest ones have printed. What has been done is written
//! down at once, so that a check which was interrupted goes on where it was, as long as the sources are the same.

mod copy;
mod faults;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use self::copy::Copy;
use self::faults::Fault;
use crate::cheat;
use crate::grade::{self, Built, Grading, Selected};
use crate::report::StageReport;
use crate::rubric::{POINTS, STAGES};

/// How one trial went.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Trial {
    /// Its name.
    title: String,
    /// The stage.
    stage: usize,
    kind: Kind,
    /// Whether it went as it must: full points for an honest run, lost points for the others.
    right: bool,
    /// The points.
    points: u32,
    /// For a person: what was lost, or what was expected.
    note: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Honest,
    Cheat,
    /// A fault that the criterion noticed which was meant for it.
    Fault,
    /// A fault that another criterion noticed.
    FaultElsewhere,
}

/// What there is to be done.
enum Task {
    Honest { stage: usize, number: u32 },
    Cheat { stage: usize },
    Fault(Fault),
}

impl Task {
    fn title(&self) -> String {
        match self {
            Self::Honest { stage, number } => format!("honest {stage:02} run {number}"),
            Self::Cheat { stage } => format!("cheat {stage:02}"),
            Self::Fault(fault) => fault.title(),
        }
    }
}

/// Does what has to be done and prints the table. The exit code says whether all went as it must.
///
/// # Errors
/// What keeps it from being done, such as a fault that does not build.
pub fn run(
    selection: &[Selected],
    only: Option<&str>,
    times: u32,
    seed: Option<u64>,
) -> Result<ExitCode> {
    let stages: Vec<_> = selection.iter().map(|selected| selected.stage).collect();
    let faults = faults::all(grade::root())?;
    for fault in &faults {
        fault.in_file(grade::root())?;
    }
    let mut tasks = VecDeque::new();
    tasks.extend(stages.iter().map(|&stage| Task::Cheat { stage }));
    let of_stages = faults.iter().filter(|fault| stages.contains(&fault.stage));
    tasks.extend(of_stages.cloned().map(Task::Fault));
    for number in 1..=times {
        tasks.extend(stages.iter().map(|&stage| Task::Honest { stage, number }));
    }
    tasks.retain(|task| only.is_none_or(|word| task.title().contains(word)));
    ensure!(
        !tasks.is_empty(),
        "nothing of the self-check has `{}` in its name",
        only.unwrap_or("")
    );

    let folder = grade::target().join("grade/self-check");
    fs::create_dir_all(&folder).with_context(|| format!("folder {}", folder.display()))?;
    let done = Done::open(&folder.join("done.jsonl"))?;
    let all = tasks.len();
    tasks.retain(|task| done.get(&task.title()).is_none());
    if tasks.len() < all {
        eprintln!("{} of {all} trials were done before", all - tasks.len());
    }
    let grader = grade::own_copy()?;
    let honest = grade::build(grade::root(), &stages, true)?;
    ensure!(honest.broken.is_empty(), "the honest project does not build");

    // One copy for all: while one lane builds in it, the other one grades what it has built.
    let faulty = tasks.iter().any(|task| matches!(task, Task::Fault(_)));
    let copy = Mutex::new(if faulty { Some(Copy::new(&folder)?) } else { None });
    let (total, tasks) = (tasks.len(), Mutex::new(tasks));
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let lane = |number: usize| -> Result<()> {
        let folder = folder.join(format!("lane-{number}"));
        let lane = Lane { folder, grader: &grader, honest: &honest, copy: &copy, seed };
        loop {
            let next = {
                let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
                tasks.pop_front().map(|task| (task, tasks.len()))
            };
            let Some((task, left)) = next else { return Ok(()) };
            let began = Instant::now();
            let trial = lane.trial(&task)?;
            let (mark, seconds) = (if trial.right { "ok" } else { "FAIL" }, began.elapsed());
            eprintln!(
                "{mark:>5} [{}/{total}] {}: {} points; {} ({:.1} s)",
                total - left,
                trial.title,
                trial.points,
                trial.note,
                seconds.as_secs_f64()
            );
            done.add(trial)?;
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> =
            (0..grade::lanes()).map(|number| scope.spawn(move || lane(number))).collect();
        lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"))
    })?;

    let trials = done.all();
    let table = table(&trials);
    let path = folder.join("self-check.md");
    fs::write(&path, &table).with_context(|| format!("cannot write {}", path.display()))?;
    print!("{table}");
    eprintln!("{} has the same", path.display());
    let wrong: Vec<_> = trials.iter().filter(|trial| !trial.right).collect();
    for trial in &wrong {
        eprintln!("FAIL {}: {} points; {}", trial.title, trial.points, trial.note);
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What one of several threads works with.
struct Lane<'s> {
    folder: PathBuf,
    grader: &'s Path,
    honest: &'s Built,
    copy: &'s Mutex<Option<Copy>>,
    seed: u64,
}

impl Lane<'_> {
    fn trial(&self, task: &Task) -> Result<Trial> {
        let title = task.title();
        match task {
            Task::Honest { stage, .. } => {
                // Another seed for each, and the same one when it is looked at again.
                let mut hasher = DefaultHasher::new();
                (self.seed, &title).hash(&mut hasher);
                let seed = hasher.finish() >> 32;
                let report = self.grade(all(*stage)?, self.honest, seed, None)?;
                let (points, of) = report.points();
                let note = match points == of {
                    true => "full".to_owned(),
                    false => format!("lost {:?} with --seed {seed}", report.lost()),
                };
                let (stage, kind, right) = (*stage, Kind::Honest, points == of);
                Ok(Trial { title, stage, kind, right, points, note })
            }
            Task::Cheat { stage } => {
                let points = self.cheat(*stage)?;
                // Points for what is printed alone would be a flaw, if not a pass.
                let (stage, kind, right) = (*stage, Kind::Cheat, points == 0);
                let note = "prints what the honest program printed".to_owned();
                Ok(Trial { title, stage, kind, right, points, note })
            }
            Task::Fault(fault) => {
                let bins = self.folder.join("bins");
                let built = {
                    let copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
                    let copy = copy.as_ref().context("faults have a copy to be tried in")?;
                    copy.build_with(fault, self.honest, &bins)?
                };
                self.fault(fault, &built)
            }
        }
    }

    /// The criterion that is meant for the fault; and if that does not notice, all others of the stage.
    fn fault(&self, fault: &Fault, built: &Built) -> Result<Trial> {
        let (meant, others) = parted(fault)?;
        let first = self.grade(meant, built, self.seed, None)?;
        let mut trial = Trial {
            title: fault.title(),
            stage: fault.stage,
            kind: Kind::Fault,
            right: !first.lost().is_empty(),
            points: first.points().0,
            note: format!("{} noticed that {}", fault.criterion, fault.breaks),
        };
        if !trial.right {
            let rest = self.grade(others, built, self.seed, None)?;
            trial.kind = Kind::FaultElsewhere;
            trial.right = !rest.lost().is_empty();
            trial.points += rest.points().0;
            trial.note = match trial.right {
                true => format!("{:?} noticed, not {}", rest.lost(), fault.criterion),
                false => format!("nobody noticed that {}", fault.breaks),
            };
        }
        Ok(trial)
    }

    /// Grades the honest programs, keeps what they print, and grades those that only print it, with the same random
    /// values and paths. Gives the points of the latter.
    fn cheat(&self, stage: usize) -> Result<u32> {
        let bins = self.folder.join(format!("cheat-{stage:02}"));
        let _ = fs::remove_dir_all(&bins);
        fs::create_dir_all(&bins)?;
        for name in STAGES {
            symlink(self.grader, bins.join(name))?;
        }
        let recordings = bins.join(cheat::RECORDINGS);
        let honest = self.grade(all(stage)?, self.honest, self.seed, Some(recordings.clone()))?;
        ensure!(honest.lost().is_empty(), "the honest stage {stage:02} lost {:?}", honest.lost());
        ensure!(recordings.exists(), "nothing of stage {stage:02} has been recorded");
        let cheats = Built { bins, broken: BTreeMap::new() };
        Ok(self.grade(all(stage)?, &cheats, self.seed, None)?.points().0)
    }

    fn grade(
        &self,
        selected: Selected,
        built: &Built,
        seed: u64,
        recordings: Option<PathBuf>,
    ) -> Result<StageReport> {
        let (grader, folder) = (self.grader.to_owned(), self.folder.join("grade"));
        let grading = Grading { grader, folder, seed, recordings, lanes: 1, quiet: true };
        let mut reports = grading.grade(&[selected], built)?;
        let report = reports.pop().context("a stage has a report")?;
        // A point that the grader itself lost says nothing of a fault.
        let ran = report.criteria.iter().all(|graded| !graded.met.log.as_os_str().is_empty());
        ensure!(ran, "the process that runs the criteria of {} died", report.stage);
        Ok(report)
    }
}

fn all(stage: usize) -> Result<Selected> {
    Selected::all(stage).with_context(|| format!("stage {stage:02} has no criteria"))
}

/// The stage's criteria: the one that is meant for the fault, and the others.
fn parted(fault: &Fault) -> Result<(Selected, Selected)> {
    let (mut meant, mut others) = (all(fault.stage)?, all(fault.stage)?);
    meant.criteria.retain(|criterion| criterion.name == fault.criterion);
    others.criteria.retain(|criterion| criterion.name != fault.criterion);
    ensure!(!meant.criteria.is_empty(), "{}: no such criterion", fault.title());
    Ok((meant, others))
}

/// The trials that have been done, and the file where they stand.
struct Done {
    file: Mutex<fs::File>,
    trials: Mutex<HashMap<String, Trial>>,
}

impl Done {
    /// Opens the file. What was done with other sources does not count.
    fn open(path: &Path) -> Result<Self> {
        let sources = sources()?;
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut lines = text.lines();
        let same = lines.next() == Some(sources.as_str());
        let trials: HashMap<_, _> = lines
            .filter(|_| same)
            .filter_map(|line| serde_json::from_str::<Trial>(line).ok())
            // What went wrong is tried again.
            .filter(|trial| trial.right)
            .map(|trial| (trial.title.clone(), trial))
            .collect();
        let mut file = fs::File::options();
        let file =
            if same { file.append(true) } else { file.write(true).create(true).truncate(true) };
        let mut file =
            file.open(path).with_context(|| format!("cannot write {}", path.display()))?;
        if !same {
            writeln!(file, "{sources}")?;
        }
        Ok(Self { file: Mutex::new(file), trials: Mutex::new(trials) })
    }

    fn get(&self, title: &str) -> Option<Trial> {
        self.trials.lock().unwrap_or_else(PoisonError::into_inner).get(title).cloned()
    }

    fn add(&self, trial: Trial) -> Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{}", serde_json::to_string(&trial)?)?;
        let mut trials = self.trials.lock().unwrap_or_else(PoisonError::into_inner);
        trials.insert(trial.title.clone(), trial);
        Ok(())
    }

    fn all(&self) -> Vec<Trial> {
        let trials = self.trials.lock().unwrap_or_else(PoisonError::into_inner);
        let mut trials: Vec<_> = trials.values().cloned().collect();
        trials.sort_by(|one, other| one.title.cmp(&other.title));
        trials
    }
}

/// What tells these sources from others: all files but the texts, as they are committed and as they have been changed.
fn sources() -> Result<String> {
    let git = |args: &[&str]| -> Result<Vec<u8>> {
        let sources = ["--", ".", ":!*.md", ":!notes"];
        let mut command = Command::new("git");
        command.args(args).args(sources).current_dir(grade::root());
        Ok(command.output().context("cannot start git")?.stdout)
    };
    let mut hasher = DefaultHasher::new();
    (git(&["ls-files", "--stage"])?, git(&["diff"])?).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

/// The figures, as Markdown.
fn table(trials: &[Trial]) -> String {
    let mut table = "\
| stage | faults noticed | by the criterion meant for them | a cheat's points | honest runs with full points |
|---|---|---|---|---|
"
    .to_owned();
    let of = |stage: Option<usize>, kinds: &[Kind]| -> Vec<&Trial> {
        let of = trials.iter().filter(|trial| stage.is_none_or(|stage| stage == trial.stage));
        of.filter(|trial| kinds.contains(&trial.kind)).collect()
    };
    let right = |trials: &[&Trial]| trials.iter().filter(|trial| trial.right).count();
    let mut row = |name: &str, stage: Option<usize>| {
        let (faults, meant) =
            (of(stage, &[Kind::Fault, Kind::FaultElsewhere]), of(stage, &[Kind::Fault]));
        let (cheats, honest) = (of(stage, &[Kind::Cheat]), of(stage, &[Kind::Honest]));
        let points: u32 = cheats.iter().map(|trial| trial.points).sum();
        let _ = writeln!(
            table,
            "| {name} | {} of {} | {} | {points} of {} | {} of {} |",
            right(&faults),
            faults.len(),
            right(&meant),
            cheats.len() as u32 * POINTS,
            right(&honest),
            honest.len(),
        );
    };
    for (stage, name) in (1..).zip(STAGES) {
        if trials.iter().any(|trial| trial.stage == stage) {
            row(&format!("`{name}`"), Some(stage));
        }
    }
    row("**all**", None);
    table
}
