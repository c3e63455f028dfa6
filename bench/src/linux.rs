//! Stage 08 with the Linux that set-up fetched: how long it boots, and how much memory the monitor has
//! besides the guest's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Row, median};

/// How often Linux boots.
const RUNS: usize = 3;

/// The first line of user space, which `guests/linux/init` prints.
const FIRST_LINE: &str = "reached user space";

/// The guest's memory in bytes: stage 08's default, named so that its mapping can be told.
const MEMORY: u64 = 512 << 20;

/// After so many seconds a boot is given up.
const TIMEOUT: &str = "100";

/// The boot, and the monitor's memory at its end.
pub fn rows(programs: &Path) -> Result<Vec<Row>> {
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (time, size) = boot(&programs.join("08_boot_linux"))?;
        times.push(time);
        sizes.push(size);
    }
    sizes.sort();
    let seconds = median(&mut times).as_secs_f64();
    Ok(vec![
        Row {
            name: "boot/08_boot_linux".into(),
            what: "start of 08_boot_linux to the guest's first user-space line".into(),
            value: seconds,
            unit: "s",
            aim: None,
            detail: format!("fastest {:.2} s", times[0].as_secs_f64()),
            runs: RUNS,
        },
        Row {
            name: "memory/08_boot_linux".into(),
            what: "resident memory of 08_boot_linux besides the guest's".into(),
            value: sizes[RUNS / 2] as f64 / 1024.0,
            unit: "MiB",
            aim: Some(3.0),
            detail: format!("at the first user-space line, {} MiB of guest memory", MEMORY >> 20),
            runs: RUNS,
        },
    ])
}

/// Boots once. Returns the time to the first line of user space, and the monitor's own KiB then.
fn boot(program: &Path) -> Result<(Duration, u64)> {
    let began = Instant::now();
    let mut child = Command::new(program)
        .args(["--memory", &format!("{}M", MEMORY >> 20), "--timeout", TIMEOUT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut lines = BufReader::new(child.stdout.take().expect("it is a pipe")).split(b'\n');
    let found = lines.by_ref().find_map(|line| {
        let line = line.ok()?;
        let text = String::from_utf8_lossy(&line);
        text.contains(FIRST_LINE).then(|| began.elapsed())
    });
    let size = match found {
        Some(_) => own_kib(&smaps(child.id())?, MEMORY / 1024)?,
        None => 0,
    };
    // The end of stdin ends the guest's shell, and that the machine.
    drop(child.stdin.take());
    lines.for_each(drop);
    let status = child.wait()?;
    let took = found.with_context(|| format!("Linux did not boot: {status}"))?;
    ensure!(status.success(), "Linux booted, and then ended with {status}");
    Ok((took, size))
}

fn smaps(pid: u32) -> Result<String> {
    let path = format!("/proc/{pid}/smaps");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

/// The resident KiB of all mappings in the text of `/proc/PID/smaps`, but for the one that is as large as
/// the guest's memory (proc(5)).
fn own_kib(smaps: &str, guest_kib: u64) -> Result<u64> {
    let (mut own, mut guests, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let mut fields = line.split_whitespace();
        let name = fields.next();
        let kib = fields.next().and_then(|number| number.parse::<u64>().ok());
        match (name, kib) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Rss:"), Some(_)) if size == guest_kib => guests += 1,
            (Some("Rss:"), Some(kib)) => own += kib,
            _ => {}
        }
    }
    ensure!(guests == 1, "{guests} mappings are as large as the guest's memory, expected one");
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_mapping_does_not_count() {
        let mapping = |size, rss| {
            format!("55a1-55a2 r--p 0 fe:00 1  /x\nSize: {size} kB\nRss: {rss} kB\nPss: 9 kB\n")
        };
        let guest = mapping(512, 400);
        let smaps = [mapping(8, 4), guest.clone(), mapping(100, 30)].concat();
        assert_eq!(own_kib(&smaps, 512).unwrap(), 34);
        assert!(own_kib(&mapping(8, 4), 512).is_err(), "no guest");
        assert!(own_kib(&[guest.clone(), guest].concat(), 512).is_err(), "two guests");
    }
}
