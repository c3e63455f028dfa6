//! `cargo xtask bench`: what mini-kvm costs, as a table and as JSON. `bench/README.md` explains the rows.
//!
//! The measurements that need a `/dev/kvm` are taken by `mini-kvm-bench`, which the runner starts on this
//! host or, where this host's KVM cannot do what is measured, in the lab. How long the lab takes to start
//! is measured here, from outside.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cli::{Ended, cache};
use serde_json::{Value, json};

use crate::progress::step;
use crate::workspace;

/// What `mini-kvm-bench` measures: its name there, and what is said while it is under way.
const MEASUREMENTS: [(&str, &str); 6] = [
    ("exits", "one exit through our bus against a bare loop"),
    ("start", "from the start of a process to its guest's first byte"),
    ("restore", "from the start of a process to the next byte of the guest that it restores"),
    ("disk", "a disk, from inside Linux and from outside"),
    ("linux", "Linux to its first user-space line"),
    ("compare", "Linux in the other monitors that this machine has"),
];

/// How often the saved lab is resumed.
const WARM_RUNS: usize = 5;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Take only these measurements
    #[arg(value_name = "MEASUREMENT", value_parser = ["exits", "start", "restore", "disk", "linux", "compare", "lab"])]
    only: Vec<String>,

    /// Write the results as JSON: into FILE, or instead of the table to stdout
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    json: Option<PathBuf>,
}

/// Takes the measurements and prints them.
pub fn run(args: &Args) -> Result<()> {
    crate::setup::run(&crate::setup::Args::default())?;
    step("build for release", |_| build())?;
    if let Some((load, cpus)) = busy() {
        eprintln!(
            "This machine is busy (load {load} on {cpus} CPUs): what is measured here will be too high."
        );
    }
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let mut rows = Vec::new();
    for (name, what) in MEASUREMENTS.into_iter().filter(|(name, _)| wanted(name)) {
        rows.extend(step(what, |_| measure(name))?);
    }
    if wanted("lab") {
        rows.extend(step("the lab's start, cold and warm", |_| lab_start())?);
    }
    for row in &mut rows {
        let met = row["aim"].as_f64().zip(row["value"].as_f64()).map(|(aim, value)| value <= aim);
        row["met"] = json!(met);
    }
    let document = serde_json::to_string_pretty(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": cpu(),
        "rows": rows,
    }))?;
    match &args.json {
        Some(file) if file == Path::new("-") => println!("{document}"),
        Some(file) => {
            fs::write(file, document + "\n")
                .with_context(|| format!("cannot write {}", file.display()))?;
            print_table(&rows);
        }
        None => print_table(&rows),
    }
    Ok(())
}

fn programs() -> PathBuf {
    workspace::target().join("release")
}

/// The programs as a user has them, not as a developer.
fn build() -> Result<()> {
    let status = workspace::cargo()
        .args(["build", "--quiet", "--release", "--package=bench", "--package=runner"])
        .args(["--bin=mini-kvm-bench", "--bin=mini-kvm-runner"])
        .args(["--package=stage-05", "--bin=05_mmio", "--package=stage-08", "--bin=08_boot_linux"])
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the programs do not build");
    Ok(())
}

/// One of [`MEASUREMENTS`]: on this host if it can, else in the lab.
fn measure(name: &str) -> Result<Vec<Value>> {
    for place in ["host", "lab"] {
        let output = runner(place)
            .arg(programs().join("mini-kvm-bench"))
            .arg(name)
            .arg("--programs")
            .arg(programs())
            .output()
            .context("cannot run mini-kvm-runner")?;
        if place == "host" && output.status.code() == Some(Ended::HostCannot as i32) {
            continue;
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "mini-kvm-bench {name} failed:\n{}", errors.trim_end());
        return serde_json::Deserializer::from_slice(&output.stdout)
            .into_iter::<Value>()
            .map(|row| {
                let mut row = row.context("mini-kvm-bench printed something else than rows")?;
                row["where"] = json!(place);
                Ok(row)
            })
            .collect();
    }
    bail!("neither this host nor the lab can measure {name}")
}

fn runner(place: &str) -> Command {
    let mut command = Command::new(programs().join("mini-kvm-runner"));
    command.env("MINI_KVM", place).stdin(Stdio::null());
    command
}

/// From the command to the first line of a program in the lab: once with a lab that has to be booted and
/// saved first, as after set-up, then with the saved one. In a cache folder of its own, so that nobody's
/// saved lab is touched.
fn lab_start() -> Result<Vec<Value>> {
    let folder = tempfile::tempdir_in(workspace::target())?;
    let cache = folder.path().join("mini-kvm");
    fs::create_dir_all(cache.join("lab"))?;
    symlink(cache::lab_kernel(), cache.join("lab-kernel"))?;
    // What the lab is made of comes from set-up; only the saved machine is to be missing.
    for entry in fs::read_dir(cache::dir().join("lab"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cpio") {
            fs::copy(&path, cache.join("lab").join(path.file_name().expect("it has a name")))?;
        }
    }
    let cold = first_line(folder.path())?;
    let mut warm = (0..WARM_RUNS).map(|_| first_line(folder.path())).collect::<Result<Vec<_>>>()?;
    warm.sort();
    let row = |name: &str, what: &str, time: Duration, aim: Option<f64>, detail: String, runs| {
        json!({
            "name": name,
            "what": what,
            "value": time.as_secs_f64(),
            "unit": "s",
            "aim": aim,
            "detail": detail,
            "runs": runs,
            "where": "lab",
        })
    };
    let fastest = format!("fastest {:.2} s", warm[0].as_secs_f64());
    Ok(vec![
        row(
            "lab/cold",
            "lab booted and saved, to a program's first line",
            cold,
            None,
            String::new(),
            1,
        ),
        row(
            "lab/warm",
            "lab resumed, to a program's first line",
            warm[WARM_RUNS / 2],
            Some(1.5),
            fastest,
            WARM_RUNS,
        ),
    ])
}

/// How long `05_mmio --list` takes in the lab until its first byte.
fn first_line(cache: &Path) -> Result<Duration> {
    let began = Instant::now();
    let mut child = runner("lab")
        .env("XDG_CACHE_HOME", cache)
        .arg(programs().join("05_mmio"))
        .arg("--list")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run mini-kvm-runner")?;
    let mut stdout = child.stdout.take().expect("it is a pipe");
    let first = stdout.read(&mut [0])?;
    let took = began.elapsed();
    stdout.read_to_end(&mut Vec::new())?;
    let status = child.wait()?;
    ensure!(first == 1 && status.success(), "05_mmio --list failed in the lab: {status}");
    Ok(took)
}

/// The load average of the last minute and the number of CPUs, if there is more work than CPUs.
fn busy() -> Option<(f64, usize)> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split(' ').next()?.parse().ok()?;
    let cpus = std::thread::available_parallelism().ok()?.get();
    (load > cpus as f64).then_some((load, cpus))
}

/// The processor's name in `/proc/cpuinfo`, by which results of different machines are told apart.
fn cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn print_table(rows: &[Value]) {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    println!("{:66}  {:>11}  {:>9}  {:5}  runs  detail", "median of", "", "aim", "where");
    for row in rows {
        let unit = text(row, "unit");
        let number = |key: &str| {
            row[key].as_f64().map_or(String::new(), |value| format!("{value:.3} {unit:3}"))
        };
        let missed = if row["met"] == json!(false) { " (missed)" } else { "" };
        println!(
            "{:66}  {:>11}  {:>9}  {:5}  {:4}  {}{missed}",
            text(row, "what"),
            number("value"),
            row["aim"].as_f64().map_or(String::new(), |aim| format!("{aim} {unit:3}")),
            text(row, "where"),
            row["runs"],
            text(row, "detail"),
        );
    }
    println!("bench/README.md says how each is measured.");
}
