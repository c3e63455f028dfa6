//! `cargo xtask soak`: boots Linux again and again, and looks at each boot from inside.
//!
//! One boot that hangs in a hundred is a bug that no test of a single boot finds. Every boot is a line of a table and
//! a point of a plot, so that one which came late is seen as well; of one that failed, everything that was printed
//! is kept.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use cli::{Ended, cache};
use plotters::prelude::*;
use signal_hook::consts::SIGINT;

use crate::progress::step;
use crate::workspace::{self, STAGES};

/// Options of `cargo xtask soak`.
#[derive(clap::Args)]
pub struct Args {
    /// How often Linux is booted, over all kernels and numbers of vCPUs in turn
    #[arg(long, value_name = "N", default_value = "100",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    boots: usize,

    /// The numbers of vCPUs
    #[arg(long, value_name = "N,...", default_value = "1,2,4", value_delimiter = ',',
          value_parser = clap::value_parser!(u8).range(1..))]
    cpus: Vec<u8>,

    /// Kernels to boot instead of Debian's two
    #[arg(long = "kernel", value_name = "FILE")]
    kernels: Vec<PathBuf>,

    /// A boot that takes longer has failed
    #[arg(long, value_name = "SECS", default_value = "120", value_parser = cli::seconds)]
    limit: Duration,

    /// Where the table, the plot and the failures' logs go, instead of target/soak
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What is typed into each guest. The quotes keep the echo of this line from looking like the answer.
const SCRIPT: &str = "\
bad='BUG:|WARNING: CPU|Oops:|lockup|rcu.*stall|blocked for|ACPI.*(Error|Warning)|Firmware Bug'
set -- $(cat /proc/uptime) $(grep -c ^processor /proc/cpuinfo) $(dmesg | grep -cE \"$bad\")
dd if=/dev/urandom of=/r bs=64k count=64 2>/dev/null; cp /r /s; cmp /r /s && same=1
for c in `seq $(nproc)`; do taskset $((1<<(c-1))) true && ran=$((ran+1)); done
echo so''ak: up=$1 cpus=$3 complaints=$4 same=$same ran=$ran.
";

/// How long what runs the guest may take beside it, such as to start the lab.
const AROUND: Duration = Duration::from_secs(60);

/// One configuration, which is booted many times.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    kernel: PathBuf,
    /// How the kernel is called in the table.
    name: String,
    cpus: u8,
}

/// How one boot went.
#[derive(Clone, Debug, PartialEq)]
struct Boot {
    machine: usize,
    /// Seconds from the kernel's start to its shell, by the guest's clock; or what was wrong.
    result: Result<f64, String>,
}

/// Boots, and writes what came of it. An error if a boot failed.
pub fn run(args: &Args) -> Result<()> {
    crate::setup::run(&crate::setup::Args::default())?;
    let stage = STAGES[7];
    let build = ["build", "--quiet", "--bin", stage, "--bin", "mini-kvm-runner"];
    let build = workspace::cargo().args(build).status().context("cannot start cargo")?;
    ensure!(build.success(), "{stage} does not build");
    let machines = machines(args)?;
    let out = args.out.clone().unwrap_or_else(|| workspace::target().join("soak"));
    fs::create_dir_all(&out).with_context(|| format!("folder {}", out.display()))?;

    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, Arc::clone(&interrupted))?;
    let mut boots = Vec::new();
    for number in 0..args.boots {
        let index = number % machines.len();
        let machine = &machines[index];
        let log = out.join(format!("{:05}-{}-{}.log", number + 1, machine.name, machine.cpus));
        let what = format!("boot {} of {}: {}", number + 1, args.boots, machine.title());
        // What a boot fails with is a result like others; only what keeps us from booting is an error.
        let mut cut_off = false;
        let booted = step(&what, |_| {
            let result = boot(machine, args.limit, &log, &interrupted)?;
            let Some(result) = result else {
                cut_off = true;
                return Ok(());
            };
            boots.push(Boot { machine: index, result: result.clone() });
            result.map(drop).map_err(anyhow::Error::msg)
        });
        match booted {
            _ if cut_off => break,
            Ok(()) => fs::remove_file(&log).context("cannot remove a log that nobody needs")?,
            Err(_) if boots.len() == number + 1 => {
                let why = boots[number].result.clone().err().unwrap_or_default();
                eprintln!("      {why}; see {}", log.display());
            }
            Err(error) => return Err(error),
        }
    }
    if interrupted.load(Ordering::Relaxed) {
        eprintln!("Ctrl-C: {} boots are done, and the last one does not count", boots.len());
    }

    let table = table(&machines, &boots);
    let csv = csv(&machines, &boots);
    for (name, text) in [("soak.md", &table), ("soak.csv", &csv)] {
        fs::write(out.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    plot(&out.join("soak.svg"), &machines, &boots).context("cannot draw soak.svg")?;
    print!("{table}");
    eprintln!("soak.md, soak.csv and soak.svg are in {}", out.display());
    match boots.iter().filter(|boot| boot.result.is_err()).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} boots failed; their logs are kept there", boots.len()),
    }
}

/// Each kernel under each number of vCPUs.
fn machines(args: &Args) -> Result<Vec<Machine>> {
    let mut kernels = args.kernels.clone();
    if kernels.is_empty() {
        kernels.push(cache::default_kernel());
        let lab = cache::lab_kernel().join("boot");
        let files = fs::read_dir(&lab).with_context(|| format!("no {}", lab.display()))?;
        let files = files.filter_map(|entry| Some(entry.ok()?.path()));
        kernels.extend(files.filter(|path| file_name(path).starts_with("vmlinuz-")));
    }
    let name = |kernel: &Path| match kernel {
        kernel if kernel == cache::default_kernel() => "cloud".to_owned(),
        kernel if kernel.starts_with(cache::lab_kernel()) => "generic".to_owned(),
        kernel => file_name(kernel),
    };
    let each = |kernel: &PathBuf| {
        let (kernel, name) = (kernel.clone(), name(kernel));
        let of = move |&cpus| Machine { kernel: kernel.clone(), name: name.clone(), cpus };
        args.cpus.iter().map(of).collect::<Vec<_>>()
    };
    Ok(kernels.iter().flat_map(each).collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Machine {
    fn title(&self) -> String {
        let s = if self.cpus == 1 { "" } else { "s" };
        format!("{}, {} vCPU{s}", self.name, self.cpus)
    }
}

/// Boots `machine` once, with everything that is printed in `log`. None if somebody interrupted it.
fn boot(
    machine: &Machine,
    limit: Duration,
    log: &Path,
    interrupted: &AtomicBool,
) -> Result<Option<Result<f64, String>>> {
    let script = log.with_extension("in");
    fs::write(&script, SCRIPT)?;
    let output = File::create(log).with_context(|| format!("log {}", log.display()))?;
    let mut child = Command::new(workspace::root().join("lab/run"))
        .arg(workspace::target().join("debug").join(STAGES[7]))
        .args(["-v", "--cpus", &machine.cpus.to_string(), "--kernel"])
        .arg(&machine.kernel)
        .args(["--timeout", &limit.as_secs_f64().to_string()])
        .stdin(File::open(&script)?)
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("cannot start lab/run")?;
    let ended = wait(&mut child, Instant::now() + limit + AROUND, interrupted)?;
    fs::remove_file(&script)?;
    if interrupted.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let printed = String::from_utf8_lossy(&fs::read(log)?).replace('\r', "");
    Ok(Some(judge(machine.cpus, ended, &printed)))
}

/// Waits for the end of `child`, and kills it if it does not come by `deadline`: None then.
fn wait(
    child: &mut Child,
    deadline: Instant,
    interrupted: &AtomicBool,
) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        // Ctrl-C reaches the child, too, which has its own things to put in order.
        if Instant::now() >= deadline && !interrupted.load(Ordering::Relaxed) {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a guest with so many vCPUs was well, by what it printed: the time that it took to its shell.
fn judge(cpus: u8, ended: Option<ExitStatus>, printed: &str) -> Result<f64, String> {
    match ended.map(|status| status.code()) {
        None => return Err("the monitor did not end and was killed".to_owned()),
        Some(Some(0)) => {}
        Some(Some(code)) if code == Ended::TimedOut as i32 => {
            return Err("the guest did not end in time".to_owned());
        }
        Some(Some(code)) => return Err(format!("the monitor ended with exit code {code}")),
        Some(None) => return Err("the monitor was killed by a signal".to_owned()),
    }
    let answer = printed.lines().find_map(|line| line.split_once("soak: ")?.1.strip_suffix('.'));
    let answer = answer.ok_or("the guest's shell did not answer")?;
    let value = |key: &str| {
        let mut words = answer.split(' ').filter_map(|word| word.split_once('='));
        words.find(|(name, _)| *name == key).map_or("", |(_, value)| value)
    };
    let cpus = cpus.to_string();
    for (key, expected) in
        [("cpus", cpus.as_str()), ("complaints", "0"), ("same", "1"), ("ran", &cpus)]
    {
        if value(key) != expected {
            return Err(format!("{key} is {:?} in the guest, expected {expected}", value(key)));
        }
    }
    value("up").parse().map_err(|_| format!("the guest's uptime is {:?}", value("up")))
}

/// The times of the boots of a machine that went well, in order, and how many there were at all.
fn times(boots: &[Boot], machine: usize) -> (Vec<f64>, usize) {
    let all = boots.iter().filter(|boot| boot.machine == machine);
    let mut times: Vec<_> = all.clone().filter_map(|boot| boot.result.clone().ok()).collect();
    times.sort_by(f64::total_cmp);
    (times, all.count())
}

/// A quantile by the nearest rank.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// A row for each machine, in Markdown: seconds to the shell.
fn table(machines: &[Machine], boots: &[Boot]) -> String {
    let mut rows = vec![
        ["machine", "boots", "failed", "fastest", "median", "95 %", "slowest"].map(str::to_owned),
    ];
    for (index, machine) in machines.iter().enumerate() {
        let (times, all) = times(boots, index);
        let seconds =
            |part| quantile(&times, part).map_or("-".to_owned(), |at| format!("{at:.2} s"));
        let failed = (all - times.len()).to_string();
        let [fastest, median, late, slowest] = [0.0, 0.5, 0.95, 1.0].map(seconds);
        rows.push([machine.title(), all.to_string(), failed, fastest, median, late, slowest]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let _ = match column {
                0 => write!(text, "| {cell:width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for column in 0..row.len() {
                let colon = if column == 0 { "-" } else { ":" };
                let _ = write!(text, "|{}{colon}", "-".repeat(width(column) + 1));
            }
            text.push_str("|\n");
        }
    }
    text
}

/// A line for each boot.
fn csv(machines: &[Machine], boots: &[Boot]) -> String {
    let mut text = "boot,kernel,vcpus,seconds,failure\n".to_owned();
    for (number, Boot { machine, result }) in (1..).zip(boots) {
        let Machine { name, cpus, .. } = &machines[*machine];
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let (seconds, failure) = match result {
            Ok(seconds) => (seconds.to_string(), String::new()),
            Err(why) => (String::new(), quoted(why)),
        };
        let _ = writeln!(text, "{number},{},{cpus},{seconds},{failure}", quoted(name));
    }
    text
}

/// A point for each boot at its seconds, in a strip for each machine, and a line at the strip's median.
fn plot(path: &Path, machines: &[Machine], boots: &[Boot]) -> Result<()> {
    const STRIP: u32 = 56;
    let slowest = boots.iter().filter_map(|boot| boot.result.clone().ok()).fold(1.0, f64::max);
    let height = 90 + STRIP * machines.len() as u32;
    let area = SVGBackend::new(path, (900, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let strips = machines.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{} boots", boots.len()), ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        // From top to bottom, as the table.
        .build_cartesian_2d(0.0..slowest * 1.05, strips..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .x_desc("seconds from the kernel's start to its shell, by the guest's clock")
        .label_style(("sans-serif", 13))
        .draw()?;
    for (index, machine) in machines.iter().enumerate() {
        let (times, all) = times(boots, index);
        let top = index as f64;
        let failed = all - times.len();
        let colour = if failed == 0 { BLACK } else { RED };
        let title = format!("{}: {failed} of {all} failed", machine.title());
        let style = ("sans-serif", 13).into_font().color(&colour);
        chart.draw_series([Text::new(title, (slowest * 0.005, top + 0.08), style)])?;
        // Side by side, or points at the same time would look like one.
        let point = |(number, &time): (usize, &f64)| {
            let at = (time, top + 0.5 + 0.1 * (number % 5) as f64);
            Circle::new(at, 3, BLUE.mix(0.4).filled())
        };
        chart.draw_series(times.iter().enumerate().map(point))?;
        let median = quantile(&times, 0.5);
        let line =
            |at| PathElement::new(vec![(at, top + 0.42), (at, top + 0.98)], RED.stroke_width(2));
        chart.draw_series(median.map(line))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn exit(code: i32) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(code << 8))
    }

    #[test]
    fn a_boot_is_well_if_the_guest_says_so() {
        let printed = "# echo so''ak: up=$1\nsoak: up=2.75 cpus=2 complaints=0 same=1 ran=2.\n# \n";
        assert_eq!(judge(2, exit(0), printed), Ok(2.75));
        let why = |cpus, ended, printed: &str| judge(cpus, ended, printed).unwrap_err();
        assert_eq!(why(4, exit(0), printed), "cpus is \"2\" in the guest, expected 4");
        assert!(
            why(2, exit(0), &printed.replace("complaints=0", "complaints=3"))
                .contains("complaints is \"3\"")
        );
        assert!(why(2, exit(0), &printed.replace("same=1", "same=")).contains("same is \"\""));
        assert!(why(2, exit(0), &printed.replace("ran=2", "ran=1")).contains("ran is \"1\""));
        assert!(why(2, exit(0), &printed.replace("2.75", "x")).contains("uptime is \"x\""));
        assert_eq!(
            why(2, exit(0), "# echo so''ak: up=$1 cpus=$3.\n"),
            "the guest's shell did not answer"
        );
        assert_eq!(why(2, exit(4), printed), "the guest did not end in time");
        assert_eq!(why(2, exit(1), printed), "the monitor ended with exit code 1");
        assert!(why(2, Some(ExitStatus::from_raw(9)), printed).contains("signal"));
        assert!(why(2, None, printed).contains("killed"));
    }

    fn some_boots() -> (Vec<Machine>, Vec<Boot>) {
        let machine =
            |name: &str, cpus| Machine { kernel: name.into(), name: name.to_owned(), cpus };
        let mut boots: Vec<_> =
            (1..=20).map(|at| Boot { machine: 0, result: Ok(f64::from(at)) }).collect();
        boots.push(Boot { machine: 1, result: Err("a \"quoted\", reason".to_owned()) });
        (vec![machine("cloud", 1), machine("<my> kernel", 4), machine("generic", 2)], boots)
    }

    #[test]
    fn the_table_has_a_row_for_each_machine_and_the_list_one_for_each_boot() {
        let (machines, boots) = some_boots();
        assert_eq!(
            table(&machines, &boots),
            "| machine              | boots | failed | fastest |  median |    95 % | slowest |\n\
             |----------------------|------:|-------:|--------:|--------:|--------:|--------:|\n\
             | cloud, 1 vCPU        |    20 |      0 |  1.00 s | 10.00 s | 19.00 s | 20.00 s |\n\
             | <my> kernel, 4 vCPUs |     1 |      1 |       - |       - |       - |       - |\n\
             | generic, 2 vCPUs     |     0 |      0 |       - |       - |       - |       - |\n"
        );
        let csv = csv(&machines, &boots);
        let lines: Vec<_> = csv.lines().collect();
        assert_eq!(lines.len(), 22);
        assert_eq!(lines[..2], ["boot,kernel,vcpus,seconds,failure", "1,\"cloud\",1,1,"]);
        assert_eq!(lines[21], "21,\"<my> kernel\",4,,\"a \"\"quoted\"\", reason\"");
    }

    #[test]
    fn the_plot_has_a_point_for_each_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plot.svg");
        let (machines, boots) = some_boots();
        plot(&path, &machines, &boots).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        assert_eq!(svg.matches("<circle").count(), 20);
        assert!(svg.contains("&lt;my&gt; kernel, 4 vCPUs: 1 of 1 failed"), "{svg}");
        assert!(svg.trim_end().ends_with("</svg>"));
        // Nothing booted, because somebody changed their mind at once.
        plot(&path, &machines, &[]).unwrap();
    }
}
