//! Stage 08 with the Linux that set-up fetched: how long it boots, and how much memory the monitor has
//! besides the guest's.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Row, median};

/// How often Linux boots.
const RUNS: usize = 3;

/// The first line of user space, which `guests/linux/init` prints.
const FIRST_LINE: &[u8] = b"reached user space";

/// The guest's memory in bytes: stage 08's default, named so that its mapping can be told.
pub const MEMORY: u64 = 512 << 20;

/// When a boot is given up.
const LIMIT: Duration = Duration::from_secs(300);

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
    let mut command = Command::new(program);
    command.args(["--memory", &format!("{}M", MEMORY >> 20)]);
    command.args(["--timeout", &LIMIT.as_secs().to_string()]);
    let mut linux = Booted::until_first_line(&mut command)?;
    // The end of stdin ends the guest's shell, and that the machine.
    drop(linux.child.stdin.take());
    io::copy(&mut linux.screen, &mut io::sink())?;
    let status = linux.child.wait()?;
    ensure!(status.success(), "Linux booted, and then ended with {status}");
    Ok((linux.took, linux.own_kib))
}

/// A monitor whose Linux has come to the first line of user space.
pub struct Booted {
    /// The monitor.
    pub child: Child,
    /// What its guest prints from there on.
    screen: ChildStdout,
    /// From just before its start to that line.
    pub took: Duration,
    /// What it had in memory then, besides the guest's.
    pub own_kib: u64,
}

impl Booted {
    /// Starts a monitor, whose guest has [`MEMORY`] and its console on stdin and stdout. One that has not come so far
    /// when it ends, or in time, is an error.
    pub fn until_first_line(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let began = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let mut screen = child.stdout.take().expect("it is a pipe");
        let printed = wait_for_line(&mut screen, began + LIMIT)?;
        let took = began.elapsed();
        if let Err(printed) = printed {
            child.kill()?;
            let status = child.wait()?;
            let printed = String::from_utf8_lossy(&printed);
            let last = printed.trim_end().lines().last().unwrap_or("nothing");
            bail!("Linux did not boot in {name} ({status}); it printed last: {last}");
        }
        let own_kib = own_kib(&smaps(child.id())?, MEMORY / 1024)?;
        Ok(Self { child, screen, took, own_kib })
    }
}

/// Reads what a guest prints up to [`FIRST_LINE`]. If that doesn't come by the deadline, what came instead is given back.
fn wait_for_line(screen: &mut ChildStdout, deadline: Instant) -> Result<Result<(), Vec<u8>>> {
    let (mut printed, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        let readable = poll(&mut [PollFd::new(screen, PollFlags::IN)], Some(&left))?;
        let read = if readable == 0 { 0 } else { screen.read(&mut buffer)? };
        if read == 0 {
            return Ok(Err(printed));
        }
        printed.extend(&buffer[..read]);
        if printed.windows(FIRST_LINE.len()).any(|text| text == FIRST_LINE) {
            return Ok(Ok(()));
        }
    }
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
