//! Stage 08 beside other monitors: the same kernel and initramfs, in turn, each as its own manual starts it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use cli::cache;

use crate::linux::{Booted, MEMORY};
use crate::{Row, median};

/// How often each boots Linux.
const RUNS: usize = 3;

/// What all tell the kernel. kvmtool adds words of its own.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1";

/// A monitor of this machine's, and what was measured of it.
struct Monitor {
    /// Its part of a row's name.
    name: &'static str,
    program: PathBuf,
    args: Vec<String>,
    times: Vec<Duration>,
    kib: Vec<u64>,
}

impl Monitor {
    /// One that is given `args` and, by these options of its, the kernel, the initramfs and the command line.
    fn new(name: &'static str, program: &Path, args: &[&str], options: [&str; 3]) -> Self {
        let [kernel, initrd, cmdline] = options.map(str::to_owned);
        let path = |path: PathBuf| path.display().to_string();
        let mut args: Vec<_> = args.iter().map(ToString::to_string).collect();
        args.extend([kernel, path(cache::default_kernel())]);
        args.extend([initrd, path(cache::default_initrd()), cmdline, CMDLINE.to_owned()]);
        Self { name, program: program.into(), args, times: Vec::new(), kib: Vec::new() }
    }

    /// Boots once more, with a home folder of its own: kvmtool keeps a socket there.
    fn boot(&mut self, home: &Path) -> Result<()> {
        let mut command = Command::new(&self.program);
        let mut linux = Booted::until_first_line(command.args(&self.args).env("HOME", home))?;
        linux.child.kill()?;
        linux.child.wait()?;
        self.times.push(linux.took);
        self.kib.push(linux.own_kib);
        Ok(())
    }

    /// The seconds of a boot, and the MiB besides the guest's.
    fn medians(&mut self) -> (f64, f64) {
        self.kib.sort_unstable();
        (median(&mut self.times).as_secs_f64(), self.kib[RUNS / 2] as f64 / 1024.0)
    }
}

/// The boot and the memory of each monitor that this machine has, as multiples of ours.
pub fn rows(programs: &Path) -> Result<Vec<Row>> {
    let mib = (MEMORY >> 20).to_string();
    let direct = ["-kernel", "-initrd", "-append"];
    let ours = programs.join("08_boot_linux");
    let ours_mib = format!("{mib}M");
    let mut monitors = vec![Monitor::new(
        "08_boot_linux",
        &ours,
        &["--memory", &ours_mib],
        ["--kernel", "--initrd", "--cmdline"],
    )];
    if let Some(qemu) = found("qemu-system-x86_64") {
        for (name, machine) in [("qemu-microvm", "microvm"), ("qemu-q35", "q35")] {
            let args = ["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", &mib, "-nodefaults"];
            let args = [&args[..], &["-no-user-config", "-nographic", "-serial", "stdio"]].concat();
            monitors.push(Monitor::new(name, &qemu, &args, direct));
        }
    }
    if let Some(kvmtool) = found("lkvm") {
        let args = ["run", "-m", &mib, "-c", "1", "--network", "mode=none"];
        monitors.push(Monitor::new("kvmtool", &kvmtool, &args, ["-k", "-i", "-p"]));
    }
    let home = tempfile::tempdir_in("/dev/shm")?;
    for _ in 0..RUNS {
        monitors.iter_mut().try_for_each(|monitor| monitor.boot(home.path()))?;
    }
    let measured: Vec<_> = monitors.iter_mut().map(Monitor::medians).collect();
    let (our_time, our_mib) = measured[0];
    let others = monitors.iter().zip(measured).skip(1);
    let rows = others.flat_map(|(monitor, (time, mib))| {
        let row = |of: &str, what: &str, theirs: f64, ours: f64, unit: &str| Row {
            name: format!("compare/{of}/{}", monitor.name),
            what: format!("{}: {what}, against 08_boot_linux", monitor.name),
            value: theirs / ours,
            unit: "x",
            aim: None,
            detail: format!("{theirs:.2} {unit} against {ours:.2} {unit}"),
            runs: RUNS,
        };
        [
            row("boot", "start to Linux's first user-space line", time, our_time, "s"),
            row("memory", "resident memory besides the guest's", mib, our_mib, "MiB"),
        ]
    });
    Ok(rows.collect())
}

/// A command's path, if this machine has it.
fn found(command: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join(command)).find(|path| path.is_file())
}
