//! From the start of a process to the next instruction of the guest that it restores, seen from outside: as [`start`]
//! does it, with a guest that was saved in the middle of printing.
//!
//! [`start`]: crate::start

use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::start::command;
use crate::{Row, median, micros};

/// How often the guest is restored.
const RUNS: usize = 41;

/// The guest's memory in MiB.
const MEMORY: u32 = 512;

/// Stage 08.
pub fn rows(programs: &Path) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let snapshot = dir.path().join("machine");
    save(programs, dir.path(), &snapshot)?;
    let mut times = Vec::new();
    for round in 0..=RUNS {
        let time = restore(programs, &snapshot)?;
        // The first round reads the program and the snapshot from the disk.
        if round > 0 {
            times.push(time);
        }
    }
    let middle = median(&mut times);
    Ok(vec![Row {
        name: "restore/08_boot_linux".into(),
        what: "start of 08_boot_linux --restore to its guest's next byte".into(),
        value: micros(middle) / 1e3,
        unit: "ms",
        aim: Some(5.0),
        detail: format!("fastest {:.2} ms, {MEMORY} MiB of guest memory", micros(times[0]) / 1e3),
        runs: RUNS,
    }])
}

/// Runs the guest until it prints, and saves it.
fn save(programs: &Path, dir: &Path, snapshot: &Path) -> Result<()> {
    let (kernel, initrd) = (dir.join("kernel"), dir.join("initrd"));
    std::fs::write(&kernel, asm::long::PRINTS_ON)?;
    std::fs::write(&initrd, [0; 512])?;
    let mut run = command(programs, "08_boot_linux");
    run.args(["--memory", &format!("{MEMORY}M")]);
    run.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    run.arg("--snapshot-to").arg(snapshot).stderr(Stdio::inherit());
    let mut child = run.spawn().context("cannot start 08_boot_linux")?;
    let mut stdout = child.stdout.take().expect("it is a pipe");
    stdout.read_exact(&mut [0]).context("the guest printed nothing")?;
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::USR1)?;
    stdout.read_to_end(&mut Vec::new())?;
    let status = child.wait()?;
    ensure!(status.success(), "08_boot_linux was not saved: {status}");
    Ok(())
}

/// How long the guest takes until it prints again.
fn restore(programs: &Path, snapshot: &Path) -> Result<Duration> {
    let mut run = command(programs, "08_boot_linux");
    run.arg("--restore").arg(snapshot).stderr(Stdio::inherit());
    let began = Instant::now();
    let mut child = run.spawn().context("cannot start 08_boot_linux")?;
    let first = child.stdout.as_mut().expect("it is a pipe").read(&mut [0])?;
    let took = began.elapsed();
    end(child, first)?;
    Ok(took)
}

/// A machine whose output nobody reads any more ends by itself, and well.
fn end(mut child: Child, read: usize) -> Result<()> {
    drop(child.stdout.take());
    let status = child.wait()?;
    ensure!(read == 1 && status.success(), "08_boot_linux printed nothing or failed: {status}");
    Ok(())
}
