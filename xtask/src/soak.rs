//! `cargo xtask soak`: boots Linux again and again, and looks at each boot from inside.
//!
//! One boot that hangs in a hundred is a bug that no test of a single boot finds. Every boot is a line of a table and
//! a point of a plot, so that one which came late is seen as well; of one that failed, everything that was printed
//! is kept.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
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
    /// How often Linux is booted, over all kernels and disks and numbers of vCPUs in turn
    #[arg(long, value_name = "N", default_value = "100",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    boots: usize,

    /// The numbers of vCPUs
    #[arg(long, value_name = "N,...", default_value = "1,2,4", value_delimiter = ',',
          value_parser = clap::value_parser!(u8).range(1..))]
    cpus: Vec<u8>,

    /// A kernel to boot with the default initramfs. Without this and --disk: Debian's two, and the one of `cargo xtask
    /// kernel` and the disk of `cargo xtask rootfs` where they are there
    #[arg(long = "kernel", value_name = "FILE")]
    kernels: Vec<PathBuf>,

    /// A disk with a system to boot with the default kernel, where root logs in on the console without a password. It
    /// stays as it is. Each is booted once while the kernels have their turn under every number of vCPUs
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,

    /// A boot that takes longer has failed
    #[arg(long, value_name = "SECS", default_value = "300", value_parser = cli::seconds)]
    limit: Duration,

    /// Where the table, the plot and the failures' logs go, instead of target/soak
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

// ANCHOR: script
/// What is typed into each guest. The quotes keep the echo of a line from looking like the answer.
const SCRIPT: &str = "\
bad='BUG:|WARNING: CPU|Oops:|lockup|rcu.*stall|blocked for|ACPI.*(Error|Warning)|Firmware Bug'
set -- $(cat /proc/uptime) $(grep -c ^processor /proc/cpuinfo) $(dmesg | grep -cE \"$bad\")
dd if=/dev/urandom of=/r bs=64k count=64 2>/dev/null
disk=/s; for d in /dev/vd?; do [ ! -e $d ] || disk=$d; done
dd if=/r of=$disk bs=64k conv=fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches
head -c 4194304 $disk | cmp - /r && same=1
for c in `seq $(nproc)`; do taskset $((1<<(c-1))) true && ran=$((ran+1)); done
state=running; [ ! -e /run/systemd ] || state=$(systemctl is-system-running --wait)
echo so''ak: up=$1 cpus=$3 complaints=$4 disk=$disk same=$same ran=$ran state=$state.
poweroff
";
// ANCHOR_END: script

/// To whom it is typed, a piece after each of these texts has been printed. The default initramfs has a shell that reads
/// what was there before it.
const TO_SHELL: [(&str, &str); 1] = [("", SCRIPT)];
const TO_LOGIN: [(&str, &str); 2] = [(" login: ", "root\n"), (":~# ", SCRIPT)];

/// The empty disk that each guest writes to and reads from.
const SCRATCH_SIZE: u64 = 64 << 20;

/// How long what runs the guest may take beside it, such as to start the lab.
const AROUND: Duration = Duration::from_secs(60);

/// One configuration, which is booted many times.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    kernel: PathBuf,
    /// The disk with its system, if that is not the default initramfs.
    disk: Option<PathBuf>,
    /// How kernel or disk are called in the table.
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
        let index = turn(&machines, args.cpus.len(), number);
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

/// Each kernel under each number of vCPUs, then each disk under each.
fn machines(args: &Args) -> Result<Vec<Machine>> {
    let (mut kernels, mut disks) = (args.kernels.clone(), args.disks.clone());
    if kernels.is_empty() && disks.is_empty() {
        kernels.push(cache::default_kernel());
        let lab = cache::lab_kernel().join("boot");
        let files = fs::read_dir(&lab).with_context(|| format!("no {}", lab.display()))?;
        let files = files.filter_map(|entry| Some(entry.ok()?.path()));
        kernels.extend(files.filter(|path| file_name(path).starts_with("vmlinuz-")));
        kernels.extend(Some(cache::small_kernel()).filter(|path| path.exists()));
        disks.extend(Some(cache::debian_disk()).filter(|path| path.exists()));
    }
    let name = |kernel: &Path| match kernel {
        kernel if kernel == cache::default_kernel() => "cloud".to_owned(),
        kernel if kernel == cache::small_kernel() => "small".to_owned(),
        kernel if kernel.starts_with(cache::lab_kernel()) => "generic".to_owned(),
        kernel => file_name(kernel),
    };
    let kernels = kernels.into_iter().map(|kernel| (name(&kernel), kernel, None));
    let disks =
        disks.into_iter().map(|disk| (file_name(&disk), cache::default_kernel(), Some(disk)));
    let each = |(name, kernel, disk): (String, PathBuf, Option<PathBuf>)| {
        let of = |&cpus| Machine {
            kernel: kernel.clone(),
            disk: disk.clone(),
            name: name.clone(),
            cpus,
        };
        args.cpus.iter().map(of).collect::<Vec<_>>()
    };
    Ok(kernels.chain(disks).flat_map(each).collect())
}

/// Which of the machines, each kernel or disk under so many numbers of vCPUs, is booted as number `number`: in each round
/// all that have only a kernel, and every disk under the next number of vCPUs, for a whole system takes as long as many
/// kernels.
fn turn(machines: &[Machine], cpus: usize, number: usize) -> usize {
    let kernels = machines.iter().filter(|machine| machine.disk.is_none()).count();
    let disks = (machines.len() - kernels) / cpus;
    let (round, at) = (number / (kernels + disks), number % (kernels + disks));
    match at.checked_sub(kernels) {
        None => at,
        Some(disk) => kernels + disk * cpus + round % cpus,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Machine {
    /// Where the guest finds the empty disk: behind that with its system, if it has one. Not every kernel can have it, for
    /// the default initramfs has modules for the default one alone; those write to a file in memory.
    fn scratch(&self) -> &'static str {
        if self.disk.is_some() {
            return "/dev/vdb";
        }
        let has_driver = [cache::default_kernel(), cache::small_kernel()].contains(&self.kernel);
        if has_driver { "/dev/vda" } else { "/s" }
    }

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
    let output = File::create(log).with_context(|| format!("log {}", log.display()))?;
    let scratch = log.with_extension("img");
    File::create(&scratch)?.set_len(SCRATCH_SIZE)?;
    let mut command = Command::new(workspace::root().join("lab/run"));
    command.arg(workspace::target().join("debug").join(STAGES[7]));
    command.args(["-v", "--rng", "--cpus", &machine.cpus.to_string(), "--kernel"]);
    command.arg(&machine.kernel);
    if let Some(disk) = &machine.disk {
        command.arg("--disk").arg(option(disk, ",snapshot"));
        command.args(["--append", "root=/dev/vda"]);
    }
    command.arg("--disk").arg(option(&scratch, ""));
    command.args(["--timeout", &limit.as_secs_f64().to_string()]);
    command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output);
    let mut child = command.spawn().context("cannot start lab/run")?;
    let talk = if machine.disk.is_some() { &TO_LOGIN[..] } else { &TO_SHELL };
    let ended = wait(&mut child, talk, log, Instant::now() + limit + AROUND, interrupted)?;
    fs::remove_file(&scratch)?;
    if interrupted.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let printed = String::from_utf8_lossy(&fs::read(log)?).replace('\r', "");
    Ok(Some(judge(machine, ended, &printed)))
}

/// The value of `--disk`, in which a comma of a name is written twice.
fn option(disk: &Path, more: &str) -> String {
    format!("path={}{more}", disk.display().to_string().replace(',', ",,"))
}

/// Waits for the end of `child`, and kills it if it does not come by `deadline`: None then. Meanwhile types the texts of
/// `talk`, when what comes before them stands in `log`.
fn wait(
    child: &mut Child,
    talk: &[(&str, &str)],
    log: &Path,
    deadline: Instant,
    interrupted: &AtomicBool,
) -> Result<Option<ExitStatus>> {
    // Open to the end: the guest ends by itself.
    let mut keyboard = child.stdin.take().context("no stdin")?;
    let (mut talk, mut seen) = (talk.iter(), 0);
    let mut next = talk.next();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if let Some((prompt, text)) = next {
            let printed = fs::read(log)?;
            let printed = String::from_utf8_lossy(&printed[seen..]);
            if printed.contains(prompt) {
                seen += printed.len();
                // It may have ended in this moment, which is judged by what it printed.
                let _ = keyboard.write_all(text.as_bytes());
                next = talk.next();
            }
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

/// Whether a machine's guest was well, by what it printed: the time that it took to its shell.
fn judge(machine: &Machine, ended: Option<ExitStatus>, printed: &str) -> Result<f64, String> {
    match ended.map(|status| status.code()) {
        None => return Err("the monitor did not end and was killed".to_owned()),
        Some(Some(0)) => {}
        Some(Some(code)) if code == Ended::TimedOut as i32 => {
            return Err("the guest did not end in time".to_owned());
        }
        Some(Some(code)) => return Err(format!("the monitor ended with exit code {code}")),
        Some(None) => return Err("the monitor was killed by a signal".to_owned()),
    }
    // ANCHOR: judge
    let answer = printed.lines().find_map(|line| line.split_once("soak: ")?.1.strip_suffix('.'));
    let answer = answer.ok_or("the guest's shell did not answer")?;
    let value = |key: &str| {
        let mut words = answer.split(' ').filter_map(|word| word.split_once('='));
        words.find(|(name, _)| *name == key).map_or("", |(_, value)| value)
    };
    let cpus = machine.cpus.to_string();
    for (key, expected) in [
        ("cpus", cpus.as_str()),
        ("complaints", "0"),
        ("disk", machine.scratch()),
        ("same", "1"),
        ("ran", &cpus),
        ("state", "running"),
    ] {
        if value(key) != expected {
            return Err(format!("{key} is {:?} in the guest, expected {expected}", value(key)));
        }
    }
    // ANCHOR_END: judge
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
    let all = boots.iter().filter_map(|boot| boot.result.clone().ok());
    let (fastest, slowest) =
        all.fold((1.0, 1.0), |(low, high): (f64, f64), time| (low.min(time), high.max(time)));
    let height = 90 + STRIP * machines.len() as u32;
    let area = SVGBackend::new(path, (900, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let strips = machines.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{} boots", boots.len()), ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        // From top to bottom, as the table.
        // A kernel takes seconds, a whole system a minute.
        .build_cartesian_2d((fastest.max(0.01)..slowest * 1.2).log_scale(), strips..0.0)?;
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
        chart.draw_series([Text::new(title, (fastest.max(0.01) * 1.02, top + 0.08), style)])?;
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
        let machine =
            |cpus| Machine { kernel: "vmlinuz".into(), disk: None, name: String::new(), cpus };
        let printed = "# echo so''ak: up=$1\n\
                       soak: up=2.75 cpus=2 complaints=0 disk=/s same=1 ran=2 state=running.\n# \n";
        assert_eq!(judge(&machine(2), exit(0), printed), Ok(2.75));
        let why = |cpus, ended, printed: &str| judge(&machine(cpus), ended, printed).unwrap_err();
        assert_eq!(why(4, exit(0), printed), "cpus is \"2\" in the guest, expected 4");
        for (good, bad, told) in [
            ("complaints=0", "complaints=3", "complaints is \"3\""),
            ("disk=/s", "disk=/dev/vda", "disk is \"/dev/vda\""),
            ("same=1", "same=", "same is \"\""),
            ("ran=2", "ran=1", "ran is \"1\""),
            ("running", "degraded", "state is \"degraded\""),
        ] {
            let why = why(2, exit(0), &printed.replace(good, bad));
            assert!(why.contains(told), "{why}");
        }
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
        let machine = |name: &str, cpus| Machine {
            kernel: name.into(),
            disk: None,
            name: name.to_owned(),
            cpus,
        };
        let mut boots: Vec<_> =
            (1..=20).map(|at| Boot { machine: 0, result: Ok(f64::from(at)) }).collect();
        boots.push(Boot { machine: 1, result: Err("a \"quoted\", reason".to_owned()) });
        (vec![machine("cloud", 1), machine("<my> kernel", 4), machine("generic", 2)], boots)
    }

    #[test]
    fn the_kernels_take_turns_and_each_disk_once_a_round() {
        let machine = |name: &str, disk: Option<&str>, cpus| Machine {
            kernel: name.into(),
            disk: disk.map(PathBuf::from),
            name: name.to_owned(),
            cpus,
        };
        let of = |name: &str, disk| [1, 2, 4].map(|cpus| machine(name, disk, cpus));
        let machines = [
            of("cloud", None),
            of("small", None),
            of("a.img", Some("a.img")),
            of("b.img", Some("b")),
        ];
        let machines = machines.concat();
        let turns: Vec<_> = (0..24).map(|number| turn(&machines, 3, number)).collect();
        let rounds =
            [[6, 9], [7, 10], [8, 11]].map(|disks| [&[0, 1, 2, 3, 4, 5][..], &disks].concat());
        assert_eq!(turns, rounds.concat());
        assert_eq!(turn(&machines[6..9], 3, 4), 1, "a disk alone");
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
