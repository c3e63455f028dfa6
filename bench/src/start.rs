//! From the start of a process to its first `KVM_RUN`, seen from outside.
//!
//! The guest's first instructions send a byte, which its monitor writes to stdout at once. So the time from
//! just before `fork` to that byte's arrival contains the first `KVM_RUN`, and more: the program needs no
//! switch that only a benchmark would use, and the figure is an upper bound.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Row, median, micros};

/// How often each program is started.
const RUNS: usize = 41;

/// Stages 05 and 08, each with a guest that does nothing else.
pub fn rows(programs: &Path) -> Result<Vec<Row>> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).map(|()| path)
    };
    let mut mmio = command(programs, "05_mmio");
    mmio.arg(file("program", asm::real::FIRST_EXIT)?);
    let mut linux = command(programs, "08_boot_linux");
    linux.arg("--kernel").arg(file("kernel", asm::long::FIRST_EXIT)?);
    // Without this it would be the one from set-up, whose reading takes longer than all the rest.
    linux.arg("--initrd").arg(file("initrd", &[0; 512])?);
    [("05_mmio", mmio), ("08_boot_linux", linux)]
        .into_iter()
        .map(|(name, mut run)| row(name, &mut run, command(programs, name).arg("--help")))
        .collect()
}

/// How a stage is started: nothing is typed, and what it prints is read.
pub fn command(programs: &Path, program: &str) -> Command {
    let mut command = Command::new(programs.join(program));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Starts `run`, whose guest speaks first, in turn with `idle`, which speaks without a guest.
fn row(program: &str, run: &mut Command, idle: &mut Command) -> Result<Row> {
    let (mut with_guest, mut without) = (Vec::new(), Vec::new());
    for round in 0..=RUNS {
        let pair = (first_byte(run)?, first_byte(idle)?);
        // The first round reads the program from the disk.
        if round > 0 {
            with_guest.push(pair.0);
            without.push(pair.1);
        }
    }
    Ok(Row {
        name: format!("start/{program}"),
        what: format!("start of {program} to its guest's first byte"),
        value: micros(median(&mut with_guest)) / 1e3,
        unit: "ms",
        aim: Some(2.0),
        detail: format!(
            "fastest {:.2} ms; without KVM {:.2} ms",
            micros(with_guest[0]) / 1e3,
            micros(median(&mut without)) / 1e3
        ),
        runs: RUNS,
    })
}

/// How long a program takes until the first byte on its stdout. It must end well.
fn first_byte(command: &mut Command) -> Result<Duration> {
    let name = command.get_program().to_owned();
    let context = || format!("cannot start {}", name.display());
    let began = Instant::now();
    let mut child = command.spawn().with_context(context)?;
    let mut stdout = child.stdout.take().expect("it is a pipe");
    let first = stdout.read(&mut [0])?;
    let took = began.elapsed();
    stdout.read_to_end(&mut Vec::new())?;
    let status = child.wait()?;
    ensure!(
        first == 1 && status.success(),
        "{} printed nothing or failed: {status}",
        name.display()
    );
    Ok(took)
}
