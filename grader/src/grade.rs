//! `cargo xtask grade`: builds the stages, runs their criteria where the stages run, and reports.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::inner::{self, Met, News, Order};
use crate::look::{Line, Mark};
use crate::report::{Graded, Report, StageReport};
use crate::rubric::{self, Entry, Language, STAGES};
use crate::self_check;

/// Grades the stages: what the guests and KVM did, not what was printed
///
/// Each stage has 100 points, spread over the criteria of its rubric.toml. A criterion runs the stage's program with
/// random arguments, records every ioctl, exit and the guest's memory, and says what it saw.
#[derive(clap::Parser)]
#[command(name = "cargo xtask grade", bin_name = "cargo xtask grade", max_term_width = 100)]
#[command(after_help = "\
Try: cargo xtask grade                    all stages
     cargo xtask grade 02 03              two of them
     cargo xtask grade --filter dirty     criteria whose names contain `dirty`
     cargo xtask grade --repo ../theirs   somebody else's checkout, by our criteria
     cargo xtask grade --markdown 02      for a report or a pull request
     cargo xtask grade --self-check 02    what the grader itself is worth

Exit codes: 0 full points, 1 not, 2 bad usage.")]
pub struct Args {
    /// Stages by number or name; all without one
    #[arg(value_name = "STAGE", value_parser = stage)]
    stages: Vec<usize>,

    /// The same as an option
    #[arg(long = "stage", value_name = "STAGE", value_parser = stage)]
    more_stages: Vec<usize>,

    /// Only criteria whose name contains this word
    #[arg(long, value_name = "WORD")]
    filter: Option<String>,

    /// Print the criteria with their points and stop
    #[arg(long)]
    list: bool,

    /// The checkout to grade: its stages are built and run by our rubrics, criteria and guests
    #[arg(long, value_name = "PATH")]
    repo: Option<PathBuf>,

    /// A folder with the eight programs, built by whatever means
    #[arg(long, value_name = "DIR", conflicts_with = "repo")]
    bins: Option<PathBuf>,

    /// Grade the grader: honest runs, seeded faults, and programs that only print
    #[arg(long, conflicts_with_all = ["repo", "bins", "filter", "json", "junit", "markdown"])]
    self_check: bool,

    /// Of the self-check only what has this word in its name: `honest`, `cheat`, `fault`, or a fault's own
    #[arg(long, value_name = "WORD", requires = "self_check")]
    only: Option<String>,

    /// How often the self-check grades the honest project
    #[arg(long, value_name = "N", default_value_t = 20, requires = "self_check")]
    times: u32,

    /// Draw the random values that this number stands for; a grading prints its own
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// The language in which the criteria are described
    #[arg(long, value_enum, default_value_t)]
    lang: Language,

    /// Write the result as JSON: into FILE, or instead of the table to stdout
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    json: Option<PathBuf>,

    /// The same for JUnit's XML, which CI systems show
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    junit: Option<PathBuf>,

    /// The same for Markdown
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    markdown: Option<PathBuf>,
}

/// A stage by its number or its name.
fn stage(text: &str) -> Result<usize, String> {
    let by_number = text.parse().ok().filter(|number| (1..=STAGES.len()).contains(number));
    let by_name = STAGES.iter().position(|name| *name == text).map(|at| at + 1);
    let stage = by_number.or(by_name).ok_or("a stage is a number from 1 to 8, or a name")?;
    match rubric::of(stage) {
        Some(_) => Ok(stage),
        None => Err(format!("stage {stage:02} has no rubric yet")),
    }
}

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("grader is a folder of the workspace")
}

/// Cargo's target folder: the one that this very program was built in.
pub fn target() -> PathBuf {
    let built = std::env::current_exe().ok();
    let target = built.as_deref().and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
    target.unwrap_or_else(|| root().join("target"))
}

/// Runs the command.
///
/// # Errors
/// What keeps it from grading. Lost points are none.
pub fn run(args: &Args) -> Result<ExitCode> {
    let selection = selection(args)?;
    if args.list {
        return list(&selection, args.lang).map(|()| ExitCode::SUCCESS);
    }
    end_with_us()?;
    if args.self_check {
        let only = args.only.as_deref();
        return self_check::run(&selection, only, args.times, args.seed);
    }
    let began = Instant::now();
    let folder = target().join("grade");
    let stages: Vec<_> = selection.iter().map(|selected| selected.stage).collect();
    let built = match &args.bins {
        Some(bins) => {
            build(root(), &[], true)?;
            Built::of(bins)?
        }
        None => {
            let repo = args.repo.as_deref().unwrap_or(root());
            let repo = repo.canonicalize();
            let repo = repo.context("the checkout to grade is not there")?;
            if repo != root() {
                build(root(), &[], true)?;
            }
            build(&repo, &stages, repo == root())?
        }
    };
    let grading = Grading {
        grader: own_copy()?,
        folder,
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
        recordings: None,
        lanes: lanes(),
        quiet: false,
    };
    let stages = grading.grade(&selection, &built)?;
    let report = Report { stages, seed: grading.seed, seconds: began.elapsed().as_secs_f64() };

    let mut table = true;
    for (form, text) in [
        (&args.json, report.json()?),
        (&args.junit, report.junit()),
        (&args.markdown, report.markdown(args.lang)),
    ] {
        match form {
            Some(file) if file == Path::new("-") => {
                table = false;
                anstream::stdout().lock().write_all(text.as_bytes())?;
            }
            Some(file) => {
                fs::write(file, text)
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
            None => {}
        }
    }
    if table {
        report.print(&mut anstream::stdout().lock(), args.lang)?;
    }
    Ok(if report.is_full() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A stage with those of its criteria that are to be run.
#[derive(Clone, Debug)]
pub struct Selected {
    /// The stage, 1 to 8.
    pub stage: usize,
    /// Its criteria.
    pub criteria: Vec<&'static Entry>,
}

impl Selected {
    /// All criteria of a stage that has a rubric.
    pub fn all(stage: usize) -> Option<Self> {
        let rubric = rubric::of(stage)?;
        Some(Self { stage, criteria: rubric.criteria.iter().collect() })
    }
}

fn selection(args: &Args) -> Result<Vec<Selected>> {
    let mut stages: Vec<_> = args.stages.iter().chain(&args.more_stages).copied().collect();
    if stages.is_empty() {
        stages = rubric::stages();
    }
    stages.sort_unstable();
    stages.dedup();
    let mut selection: Vec<_> = stages.into_iter().filter_map(Selected::all).collect();
    if let Some(word) = &args.filter {
        for selected in &mut selection {
            selected.criteria.retain(|criterion| criterion.name.contains(word.as_str()));
        }
        selection.retain(|selected| !selected.criteria.is_empty());
        let hint = "`cargo xtask grade --list` prints them";
        ensure!(!selection.is_empty(), "no criterion's name contains `{word}`: {hint}");
    }
    Ok(selection)
}

fn list(selection: &[Selected], language: Language) -> Result<()> {
    let mut out = anstream::stdout().lock();
    for selected in selection {
        writeln!(out, "{}", STAGES[selected.stage - 1])?;
        for Entry { name, points, ko, en, .. } in &selected.criteria {
            let shows = if language == Language::Ko { ko } else { en };
            writeln!(out, "  {points:>3}  {name}\n       {shows}")?;
        }
    }
    Ok(())
}

/// Programs that have been built.
pub struct Built {
    /// Where they are.
    pub bins: PathBuf,
    /// Stages that do not build, with what the compiler said.
    pub broken: BTreeMap<usize, Vec<String>>,
}

impl Built {
    fn of(bins: &Path) -> Result<Self> {
        let bins = bins.canonicalize();
        let bins = bins.context("the folder with the programs is not there")?;
        Ok(Self { bins, broken: BTreeMap::new() })
    }
}

/// Builds the stages of a checkout, and with `tools` what the grader itself needs. A stage that does not build takes no
/// other with it.
///
/// # Errors
/// Cargo cannot be started, or the tools do not build.
pub fn build(repo: &Path, stages: &[usize], tools: bool) -> Result<Built> {
    let target = if repo == root() { target() } else { repo.join("target") };
    build_into(repo, stages, tools, &target)
}

/// The same into a target folder of the caller's.
///
/// # Errors
/// See [`build`].
pub fn build_into(repo: &Path, stages: &[usize], tools: bool, target: &Path) -> Result<Built> {
    let mut names: Vec<_> = stages.iter().map(|stage| STAGES[stage - 1]).collect();
    if tools {
        names.push(RUNNER);
    }
    let mut built = Built { bins: target.join("debug"), broken: BTreeMap::new() };
    if names.is_empty() || cargo_build(repo, target, &by_name(&names), true)?.is_ok() {
        return Ok(built);
    }
    for name in names {
        let Err(said) = cargo_build(repo, target, &by_name(&[name]), true)? else { continue };
        match STAGES.iter().position(|stage| *stage == name) {
            Some(at) => drop(built.broken.insert(at + 1, said)),
            None => bail!("{name} does not build:\n{}", said.join("\n")),
        }
    }
    Ok(built)
}

/// The program that picks this host's KVM or the lab.
const RUNNER: &str = "mini-kvm-runner";

/// Programs by their names: built with what the whole workspace asks of its crates, as `cargo run` builds them.
fn by_name(names: &[&str]) -> Vec<String> {
    names.iter().flat_map(|name| ["--bin".to_owned(), (*name).to_owned()]).collect()
}

/// Builds what these options name. Gives what the compiler said, if it was not content.
///
/// # Errors
/// Cargo cannot be started.
pub fn cargo_build(
    repo: &Path,
    target: &Path,
    what: &[String],
    progress: bool,
) -> Result<Result<(), Vec<String>>> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(repo).env("CARGO_TARGET_DIR", target);
    // Whoever grades wants points, not the compiler's opinion.
    cargo.args(["build", "--message-format=json-diagnostic-short"]).args(what);
    cargo.stdin(Stdio::null()).stdout(Stdio::piped());
    cargo.stderr(if progress { Stdio::inherit() } else { Stdio::null() });
    let mut child = Running::start(&mut cargo)?;
    let stdout = child.child.stdout.take().context("stdout is a pipe")?;
    let mut said = Vec::new();
    for line in BufReader::new(stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(&line?) else { continue };
        if message["message"]["level"] == "error" {
            let rendered = message["message"]["rendered"].as_str().unwrap_or_default();
            said.extend(rendered.lines().map(str::to_owned));
        }
    }
    let status = child.wait()?;
    Ok(if status.success() { Ok(()) } else { Err(said) })
}

/// A copy of this very program, for what is started later: this one may be built anew meanwhile.
///
/// # Errors
/// The disk is full.
pub fn own_copy() -> Result<PathBuf> {
    let program = fs::read("/proc/self/exe").context("cannot read this program itself")?;
    let mut hasher = DefaultHasher::new();
    program.hash(&mut hasher);
    let folder = target().join("grade/programs");
    let path = folder.join(format!("{:016x}", hasher.finish()));
    if !path.exists() {
        fs::create_dir_all(&folder).with_context(|| format!("folder {}", folder.display()))?;
        // What is older than a day serves nobody any more.
        for entry in fs::read_dir(&folder)?.flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).ok();
            if age.and_then(|at| at.elapsed().ok()).is_some_and(|age| age.as_secs() > 24 * 3600) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let half = folder.join(format!(".{}", std::process::id()));
        fs::write(&half, &program).with_context(|| format!("cannot write {}", half.display()))?;
        fs::set_permissions(&half, PermissionsExt::from_mode(0o755))?;
        fs::rename(half, &path)?;
    }
    Ok(path)
}

/// One grading.
pub struct Grading {
    /// The program that runs the criteria: [`own_copy`].
    pub grader: PathBuf,
    /// Where logs and the criteria's files go.
    pub folder: PathBuf,
    /// What random values follow from.
    pub seed: u64,
    /// Where outputs are kept for a cheat.
    pub recordings: Option<PathBuf>,
    /// How many groups of criteria run side by side.
    pub lanes: usize,
    /// Say nothing on the way.
    pub quiet: bool,
}

/// How much runs side by side: the lab has one CPU, so two labs use two.
pub fn lanes() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get()).min(2)
}

/// Some criteria of a stage, which run one after the other.
struct Group<'s> {
    stage: usize,
    number: usize,
    criteria: Vec<&'s Entry>,
}

impl Grading {
    /// Runs the criteria, groups of them side by side.
    ///
    /// # Errors
    /// What keeps the grader from running them, such as a lab that is not set up.
    pub fn grade(&self, selection: &[Selected], built: &Built) -> Result<Vec<StageReport>> {
        let groups: Vec<_> = selection
            .iter()
            .filter(|selected| !built.broken.contains_key(&selected.stage))
            .flat_map(groups)
            .collect();
        let all: usize = groups.iter().map(|group| group.criteria.len()).sum();
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results = Mutex::new(Vec::<(usize, Met, &'static str)>::new());
        let lane = || -> Result<()> {
            while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (mets, place) = self.run_group(group, built, &|met| {
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if !self.quiet {
                        let mark = if met.met { "ok" } else { "FAIL" };
                        let (stage, name, seconds) = (group.stage, &met.name, met.seconds);
                        eprintln!("{mark:>5} [{done}/{all}] {stage:02} {name} ({seconds:.1} s)");
                    }
                })?;
                let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                results.extend(mets.into_iter().map(|met| (group.stage, met, place)));
            }
            Ok(())
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..self.lanes).map(|_| scope.spawn(lane)).collect();
            lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"))
        })?;
        let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(selection.iter().map(|selected| stage_report(selected, built, &results)).collect())
    }

    /// Runs a group in one process where the stage runs. Gives what came of it and where that was.
    fn run_group(
        &self,
        group: &Group<'_>,
        built: &Built,
        ended: &dyn Fn(&Met),
    ) -> Result<(Vec<Met>, &'static str)> {
        let stage = group.stage;
        let folder = self.folder.join(STAGES[stage - 1]);
        fs::create_dir_all(&folder).with_context(|| format!("folder {}", folder.display()))?;
        let order = Order {
            stage,
            criteria: group.criteria.iter().map(|criterion| criterion.name.clone()).collect(),
            bins: built.bins.clone(),
            folder: folder.clone(),
            seed: self.seed,
            recordings: self.recordings.clone(),
        };
        // By this name the runner knows which stage is to be run, and so whether this host can do it. Stage 01 itself runs
        // everywhere, but whether its check-up finds what is there shows only where all of it is.
        let like = if stage == 1 { STAGES.len() } else { stage };
        let inner = folder.join(format!("stage_{like:02}-{}", group.number));
        let _ = fs::remove_file(&inner);
        symlink(&self.grader, &inner)?;
        let complaints = folder.join(format!("stage_{stage:02}-{}.stderr", group.number));
        let mut command = Command::new(target().join("debug").join(RUNNER));
        command.arg(&inner).arg(inner::WORD).arg(serde_json::to_string(&order)?);
        command.current_dir(root()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(File::create(&complaints)?);
        let mut child = Running::start(&mut command)?;
        let stdout = child.child.stdout.take().context("stdout is a pipe")?;
        let mut mets = Vec::new();
        for line in BufReader::new(stdout).lines() {
            if let Ok(News::Ended(met)) = serde_json::from_str(&line?) {
                ended(&met);
                mets.push(met);
            }
        }
        let status = child.wait()?;
        let said = fs::read_to_string(&complaints).unwrap_or_default();
        ensure!(
            status.success() || !mets.is_empty(),
            "the criteria of {} cannot be run:\n{}",
            STAGES[stage - 1],
            said.trim_end()
        );
        Ok((mets, if said.contains("running in the lab") { "lab" } else { "host" }))
    }
}

/// A stage's criteria as groups. Linux boots in nearly every criterion of the last stage: in two parts, it runs on two
/// cores.
fn groups<'s>(selected: &Selected) -> Vec<Group<'s>> {
    let parts = if selected.stage == STAGES.len() { 2 } else { 1 };
    let part = |number: usize| Group {
        stage: selected.stage,
        number,
        criteria: selected.criteria.iter().skip(number).step_by(parts).copied().collect(),
    };
    (0..parts).map(part).filter(|group| !group.criteria.is_empty()).collect()
}

fn stage_report(
    selected: &Selected,
    built: &Built,
    results: &[(usize, Met, &'static str)],
) -> StageReport {
    let of_stage: Vec<_> = results.iter().filter(|result| result.0 == selected.stage).collect();
    let rubric = rubric::of(selected.stage).expect("it was selected");
    let graded = |entry: &&Entry| {
        let met = of_stage.iter().find(|(_, met, _)| met.name == entry.name);
        let met = met.map(|(_, met, _)| met.clone()).unwrap_or_else(|| {
            let (text, near) = match built.broken.get(&selected.stage) {
                Some(said) => ("a program that builds".to_owned(), said.clone()),
                None => ("an end of this criterion: the grader's process died".to_owned(), vec![]),
            };
            let near = near.into_iter().take(12).collect();
            let lines = vec![Line { mark: Mark::Missing, text, near }];
            Met { name: entry.name.clone(), met: false, seconds: 0.0, lines, log: PathBuf::new() }
        });
        Graded {
            shows: entry.shows(),
            deliverable: entry.deliverable.clone().unwrap_or_else(|| rubric.deliverable.clone()),
            points: if met.met { entry.points } else { 0 },
            of: entry.points,
            met,
        }
    };
    StageReport {
        stage: STAGES[selected.stage - 1].to_owned(),
        place: of_stage.first().map_or("", |result| result.2).to_owned(),
        criteria: selected.criteria.iter().map(graded).collect(),
    }
}

/// The children that run now.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Pid>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child that ends with us. It is in our process group: whoever kills that, as `cargo xtask test` does, gets it as well.
pub struct Running {
    child: std::process::Child,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut running = running();
        let child = command.spawn();
        let child = child.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        running.push(Pid::from_raw(child.id() as i32));
        Ok(Self { child })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// None in practice.
    pub fn wait(&mut self) -> Result<std::process::ExitStatus> {
        let status = self.child.wait()?;
        let pid = Pid::from_raw(self.child.id() as i32);
        running().retain(|other| *other != pid);
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        if running().contains(&pid) {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = self.wait();
        }
    }
}

/// Has Ctrl-C, or another signal that ends this process, end what it has started. QEMU ends with the runner, and a watched
/// program with who watches it.
pub fn end_with_us() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let running = running();
            for pid in running.iter() {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            eprintln!("\nInterrupted: what ran has been ended.");
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
