//! `cargo xtask test`: every check, the quick ones first, the milestones on a real `/dev/kvm` last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{IsTerminal, Write, stderr, stdout};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::setup;
use crate::workspace::{self, STAGES};

/// What no check may exceed: a hang has to end in a clear line. The longest takes a few minutes.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// How much of a failed check's output is shown; the whole of it is in its log.
const TAIL_LINES: usize = 60;

/// How a milestone test begins the line in which it says what this host lacks for it.
const SKIPPED: &str = "skipped: ";

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Run only the checks whose name contains one of these words, such as `clippy` or `05`
    #[arg(value_name = "CHECK")]
    only: Vec<String>,

    /// Print the names of the checks and stop
    #[arg(long)]
    list: bool,
}

/// One check: a name and the command that decides it.
struct Check {
    name: String,
    command: Command,
}

/// How a check ended.
struct Outcome {
    name: String,
    status: Option<ExitStatus>,
    took: Duration,
    log: PathBuf,
    tests: Tests,
}

/// What the test harnesses of a check counted.
#[derive(Clone, Copy, Default)]
struct Tests {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs the checks and says how each ended. An error means that one failed.
pub fn run(args: &Args) -> Result<()> {
    let wanted = |name: &str| {
        args.only.is_empty() || args.only.iter().any(|word| name.contains(word.as_str()))
    };
    let names = names();
    if args.list {
        // Whoever reads it may have seen enough.
        let listed: String =
            names.iter().filter(|name| wanted(name)).map(|name| format!("{name}\n")).collect();
        let _ = stdout().write_all(listed.as_bytes());
        return Ok(());
    }
    for word in &args.only {
        ensure!(
            names.iter().any(|name| name.contains(word.as_str())),
            "no check's name contains `{word}`: `cargo xtask test --list` prints them"
        );
    }
    setup::run(&setup::Args { tests: true, ..setup::Args::default() })?;
    end_checks_with_us()?;

    let began = Instant::now();
    let mut outcomes = Vec::new();
    for check in workspace_checks().into_iter().filter(|check| wanted(&check.name)) {
        outcomes.push(check.run()?);
    }
    let milestones: Vec<_> = milestone_checks(wanted)?;
    // Two labs use two cores; the emulated machine itself has one.
    let lanes = thread::available_parallelism().map_or(1, |cores| cores.get()).min(2);
    outcomes.extend(run_side_by_side(milestones, lanes)?);
    for check in walk_checks().into_iter().filter(|check| wanted(&check.name)) {
        outcomes.push(check.run()?);
    }
    report(&outcomes, began.elapsed())
}

/// The names of all checks.
fn names() -> Vec<String> {
    let milestones = milestones().into_iter().map(|milestone| milestone.name());
    let others = workspace_checks().into_iter().chain(walk_checks()).map(|check| check.name);
    others.chain(milestones).collect()
}

/// The process groups of the checks that run now.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Kills the checks that run now. As long as the guard lives, none is started or reported.
fn kill_running() -> MutexGuard<'static, Vec<Pid>> {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    for group in running.iter() {
        let _ = kill_process_group(*group, Signal::KILL);
    }
    running
}

/// Has Ctrl-C, or another signal that ends this process, end the checks with all that they started:
/// being groups of their own, they don't get it.
fn end_checks_with_us() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _nothing_more = kill_running();
            eprintln!("\nInterrupted: the checks that ran have been ended.");
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The checks that need no virtual machine, and the lab's own.
fn workspace_checks() -> Vec<Check> {
    let mut checks = vec![
        Check::cargo("format", &["fmt", "--all", "--check"]),
        Check::cargo("format of the guest kernel", &["fmt", "--all", "--check"]).in_guest_kernel(),
        Check::cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "-Dwarnings"]),
        Check::cargo(
            "clippy of the guest kernel",
            &["clippy", "--all-targets", "--", "-Dwarnings"],
        )
        .in_guest_kernel(),
        Check::cargo("docs", &["doc", "--workspace", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "-Dwarnings"),
        Check::cargo("docs of the guest kernel", &["doc", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "-Dwarnings")
            .in_guest_kernel(),
    ];
    // ANCHOR: layers
    // Alone, a stage's `common` has only what the stages up to it introduced.
    checks.extend(STAGES.iter().map(|stage| {
        let package = format!("stage-{}", &stage[..2]);
        let lint = ["clippy", "--package", &package, "--", "-Dwarnings"];
        Check::cargo(&format!("layers of {stage}"), &lint)
    }));
    // ANCHOR_END: layers
    let mut units = vec!["test", "--workspace", "--no-fail-fast"];
    let packages: Vec<_> = STAGES.iter().map(|stage| format!("stage-{}", &stage[..2])).collect();
    units.extend(packages.iter().flat_map(|package| ["--exclude", package]));
    checks.push(Check::cargo("unit tests and the lab", &units).env("MINI_KVM_REQUIRE_LAB", "1"));
    checks.push(Check::cargo("unit tests of the guest kernel", &["test"]).in_guest_kernel());
    checks
}

/// Each stage once as a reader starts it, without arguments, the demo, what the grader says of the stages, and the notes,
/// whose experiments run the stages as these have just been built.
fn walk_checks() -> Vec<Check> {
    let mut checks: Vec<_> = STAGES
        .iter()
        .map(|stage| {
            Check::cargo(&format!("cargo run --bin {stage}"), &["run", "--quiet", "--bin", stage])
                .env("MINI_KVM", "lab")
        })
        .collect();
    checks.push(Check::cargo("cargo xtask demo", &["xtask", "demo"]));
    checks.push(Check::cargo("grade", &["xtask", "grade"]));
    checks.push(Check::cargo("book", &["xtask", "book", "--check"]));
    checks
}

/// A stage's milestone tests, or a part of them, in one place.
struct Milestone {
    stage: &'static str,
    /// What `MINI_KVM` says: `lab` or `host`.
    place: &'static str,
    /// Which part of how many.
    part: (usize, usize),
}

impl Milestone {
    fn name(&self) -> String {
        let Self { stage, place, part: (part, parts) } = self;
        match parts {
            1 => format!("milestone {stage} ({place})"),
            _ => format!("milestone {stage} ({place}, part {part} of {parts})"),
        }
    }

    /// The check that runs it by this executable.
    fn check(&self, executable: &Path) -> Result<Check> {
        let mut command = Command::new(workspace::root().join("lab/run"));
        command.arg(executable).arg("--show-output").env("MINI_KVM", self.place);
        command.current_dir(workspace::root().join("stages").join(self.stage));
        let (part, parts) = self.part;
        if parts > 1 {
            let tests = tests_of(executable)?;
            command.arg("--exact").args(tests.iter().skip(part - 1).step_by(parts));
        }
        Ok(Check { name: self.name(), command })
    }
}

// ANCHOR: milestones
/// Every stage in the lab, and once more on the host. The last stages take longest; started first, they leave no
/// core idle at the end. Linux boots in nearly every test of the last one, which takes as long as all others
/// together: in parts, it runs on two cores.
fn milestones() -> Vec<Milestone> {
    let parts = |stage, place| if (stage, place) == (STAGES[7], "lab") { 2 } else { 1 };
    ["lab", "host"]
        .into_iter()
        .flat_map(|place| STAGES.iter().rev().map(move |stage| (*stage, place)))
        .flat_map(|(stage, place)| {
            let parts = parts(stage, place);
            (1..=parts).map(move |part| Milestone { stage, place, part: (part, parts) })
        })
        .collect()
}
// ANCHOR_END: milestones

/// The names of the tests in a test executable.
fn tests_of(executable: &Path) -> Result<Vec<String>> {
    let output = Command::new(executable)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("cannot start {}", executable.display()))?;
    ensure!(output.status.success(), "{} does not list its tests", executable.display());
    let listed = String::from_utf8_lossy(&output.stdout);
    let tests: Vec<_> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    ensure!(!tests.is_empty(), "{} lists no tests", executable.display());
    Ok(tests.into_iter().map(str::to_owned).collect())
}

/// The milestone tests in the lab, and on the host those that its KVM can do.
fn milestone_checks(wanted: impl Fn(&str) -> bool) -> Result<Vec<Check>> {
    let candidates: Vec<_> =
        milestones().into_iter().filter(|milestone| wanted(&milestone.name())).collect();
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let executables = build_milestones()?;
    let able = if candidates.iter().any(|milestone| milestone.place == "host") {
        stages_the_host_can_run()?
    } else {
        Vec::new()
    };
    let (can, cannot): (Vec<_>, Vec<_>) = candidates
        .into_iter()
        .partition(|milestone| milestone.place == "lab" || able.contains(&milestone.stage));
    for milestone in cannot {
        let name = milestone.name();
        eprintln!("   - {name}: not run, this host's KVM cannot do it (01_create_vm says why)");
    }
    can.into_iter()
        .map(|milestone| {
            let executable = executables
                .get(&format!("stage_{}", &milestone.stage[..2]))
                .with_context(|| format!("{} has no milestone tests", milestone.stage))?;
            milestone.check(executable)
        })
        .collect()
}

/// Builds the stages and their tests; gives the test executables by name.
fn build_milestones() -> Result<BTreeMap<String, PathBuf>> {
    let output = workspace::cargo()
        .args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "the milestone tests do not build");
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?;
            let executable = message["executable"].as_str()?;
            name.starts_with("stage_").then(|| (name.to_owned(), executable.into()))
        })
        .collect())
}

/// What stage 01's check-up says of this host's own KVM; none if there is none.
fn stages_the_host_can_run() -> Result<Vec<&'static str>> {
    let output = workspace::cargo()
        .args(["run", "--quiet", "--bin", STAGES[0], "--", "--json"])
        .env("MINI_KVM", "host")
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let report: Value = serde_json::from_slice(&output.stdout)
        .context("01_create_vm --json printed something else than JSON")?;
    let verdicts = report["verdicts"].as_array().context("01_create_vm --json has no verdicts")?;
    let able = |number: u64| {
        verdicts.iter().any(|verdict| {
            verdict["stage"].as_u64() == Some(number) && verdict["able"] == Value::Bool(true)
        })
    };
    Ok((1..).zip(STAGES).filter(|(number, _)| able(*number)).map(|(_, stage)| stage).collect())
}

impl Check {
    fn cargo(name: &str, args: &[&str]) -> Self {
        let mut command = workspace::cargo();
        command.args(args);
        Self { name: name.to_owned(), command }
    }

    fn env(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self
    }

    /// The guest kernel is a workspace of its own: it is built for no operating system.
    fn in_guest_kernel(mut self) -> Self {
        self.command.current_dir(workspace::root().join("guests/kernel"));
        self.command.env_remove("CARGO_TARGET_DIR");
        self
    }

    /// Runs the check with its output in a log, and prints a line when it begins and one when it ends.
    fn run(mut self) -> Result<Outcome> {
        let live = stderr().is_terminal();
        eprint!("   … {}{}", self.name, if live { "\r" } else { "\n" });
        let outcome = self.finish()?;
        outcome.print(if live { "\x1b[K" } else { "" });
        Ok(outcome)
    }

    fn finish(&mut self) -> Result<Outcome> {
        let log = log_path(&self.name)?;
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let began = Instant::now();
        self.command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let child = self
            .command
            .spawn()
            .with_context(|| format!("cannot start {:?}", self.command.get_program()))?;
        let group = Pid::from_child(&child);
        running.push(group);
        drop(running);
        let status = wait_within(child, LIMIT)?;
        // Here, too, the end of the process waits while a signal is obeyed.
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != group);
        let tests = Tests::count(&fs::read_to_string(&log).unwrap_or_default());
        Ok(Outcome { name: self.name.clone(), status, took: began.elapsed(), log, tests })
    }
}

/// Waits for a child that leads its own process group; past the limit it kills the group and gives
/// `None`.
fn wait_within(mut child: Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    child.wait()?;
    Ok(None)
}

/// Runs checks in `lanes` threads, in their order.
fn run_side_by_side(checks: Vec<Check>, lanes: usize) -> Result<Vec<Outcome>> {
    let queue = Mutex::new(checks.into_iter());
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let Some(mut check) = queue.lock().unwrap().next() else {
                            return Ok(());
                        };
                        eprintln!("   … {}", check.name);
                        let outcome = check.finish()?;
                        outcome.print("");
                        outcomes.lock().unwrap().push(outcome);
                    }
                })
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"))
    })
    .map(|()| outcomes.into_inner().unwrap())
}

impl Outcome {
    fn ok(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Which of its tests were not run, and why.
    fn skips(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let reasons = log.lines().filter_map(|line| line.strip_prefix(SKIPPED));
        reasons.map(|reason| format!("skipped in {}: {reason}", self.name)).collect()
    }

    /// Prints one line, and for a failed check the end of its log.
    fn print(&self, clear: &str) {
        let mut text = format!(
            "{clear}{:>4} {} ({:.1} s{})\n",
            if self.ok() { "ok" } else { "FAIL" },
            self.name,
            self.took.as_secs_f64(),
            self.tests.describe(),
        );
        if !self.ok() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text += &format!("   | {line}\n");
            }
            let how = match self.status {
                None => format!("killed after {} minutes", LIMIT.as_secs() / 60),
                Some(status) => match (status.code(), status.signal()) {
                    (Some(code), _) => format!("exit code {code}"),
                    (None, signal) => format!("signal {}", signal.unwrap_or(0)),
                },
            };
            text += &format!("   = {how}; all of it: {}\n", self.log.display());
        }
        let _ = stderr().write_all(text.as_bytes());
    }
}

impl Tests {
    /// Adds up the `test result:` lines of libtest, and the lines by which a test says that this host
    /// cannot run it.
    fn count(log: &str) -> Self {
        let mut tests = Self::default();
        let mut unable = 0;
        for line in log.lines() {
            if let Some(result) = line.strip_prefix("test result: ") {
                let number = |what: &str| -> u64 {
                    let before = result.split(what).next().unwrap_or_default();
                    before.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
                };
                tests.passed += number(" passed");
                tests.failed += number(" failed");
                tests.skipped += number(" ignored");
            } else if line.starts_with(SKIPPED) {
                unable += 1;
            }
        }
        // ANCHOR: skipped
        // libtest counts these as passed: it has no way to say at run time that a test was not run.
        tests.skipped += unable;
        tests.passed = tests.passed.saturating_sub(unable);
        // ANCHOR_END: skipped
        tests
    }

    fn describe(&self) -> String {
        match self {
            Self { passed: 0, failed: 0, skipped: 0 } => String::new(),
            Self { passed, skipped: 0, .. } => format!(", {passed} tests"),
            Self { passed, skipped, .. } => format!(", {passed} tests, {skipped} skipped"),
        }
    }
}

/// Where the output of a check is kept.
fn log_path(name: &str) -> Result<PathBuf> {
    let dir = workspace::target().join("checks");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let file: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Ok(dir.join(file + ".log"))
}

/// Prints the sum, and fails if a check failed.
fn report(outcomes: &[Outcome], took: Duration) -> Result<()> {
    let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.ok()).collect();
    let mut sum = Tests::default();
    for outcome in outcomes {
        sum.passed += outcome.tests.passed;
        sum.failed += outcome.tests.failed;
        sum.skipped += outcome.tests.skipped;
    }
    println!();
    for skip in outcomes.iter().flat_map(Outcome::skips) {
        println!("{skip}");
    }
    println!("{} checks, {} failed, in {:.0} s", outcomes.len(), failed.len(), took.as_secs_f64());
    println!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    if failed.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = failed.iter().map(|outcome| outcome.name.as_str()).collect();
    bail!("failed: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_harnesses_add_up_and_skipped_tests_did_not_pass() {
        let log = "\
running 3 tests
skipped: this host's KVM cannot page
test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out
";
        let Tests { passed, failed, skipped } = Tests::count(log);
        assert_eq!((passed, failed, skipped), (6, 2, 2));
    }

    #[test]
    fn a_word_that_names_no_check_is_an_error() {
        let args = Args { only: vec!["format".into(), "nosuch".into()], list: false };
        let error = run(&args).unwrap_err().to_string();
        assert!(error.contains("`nosuch`") && error.contains("--list"), "{error}");
    }

    /// A child that leads a process group with another process in it.
    fn family() -> Child {
        Command::new("sh").args(["-c", "sleep 1000 & sleep 1000"]).process_group(0).spawn().unwrap()
    }

    /// A group is empty once its last member is gone, which init may take a moment to reap.
    fn is_gone(group: Pid) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while rustix::process::test_kill_process_group(group).is_ok() {
            assert!(Instant::now() < deadline, "the group still has a process");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_check_that_hangs_is_killed_with_all_that_it_started() {
        let child = family();
        let group = Pid::from_child(&child);
        assert!(wait_within(child, Duration::from_millis(100)).unwrap().is_none());
        is_gone(group);
    }

    #[test]
    fn an_interrupt_kills_what_runs_with_all_that_it_started() {
        let mut child = family();
        let group = Pid::from_child(&child);
        RUNNING.lock().unwrap().push(group);
        drop(kill_running());
        child.wait().unwrap();
        is_gone(group);
    }
}
