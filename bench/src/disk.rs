//! A disk of stage 08's: reading and writing it from inside Linux, against the same with its file on the host.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::start::command;
use crate::{Row, median};

/// How often the disk is read and written, in one boot.
const RUNS: usize = 5;

/// Its size in MiB, of which each run moves all: so many that the guest's clock, which has hundredths of a second, will do.
const MIB: usize = 128;

/// As much as `dd` and the host move at once.
const AT_ONCE: usize = 1 << 20;

/// After so many seconds a boot is given up.
const TIMEOUT: &str = "300";

/// What the guest's `time -p` prints in front of the seconds (POSIX, time).
const REAL: &str = "real ";

/// Reading and writing.
pub fn rows(programs: &Path) -> Result<Vec<Row>> {
    // In memory: what is measured is the way there, not a disk of the host.
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![0xA5; MIB << 20])?;
    let (mut read, mut written) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        read.push(host_reads(&path)?);
        written.push(host_writes(&path)?);
    }
    let guest = guest(programs, &path)?;
    let (reads, writes): (Vec<_>, Vec<_>) =
        guest.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
    Ok(vec![row("read", "reading", reads, read), row("write", "writing", writes, written)])
}

fn row(name: &str, what: &str, mut guest: Vec<Duration>, mut host: Vec<Duration>) -> Row {
    let [guest, host] = [&mut guest, &mut host].map(|times| median(times).as_secs_f64());
    let rate = |seconds: f64| MIB as f64 / seconds;
    Row {
        name: format!("disk/{name}"),
        what: format!("{what} a virtio disk in the guest against {what} its file on the host"),
        value: guest / host,
        unit: "x",
        aim: None,
        detail: format!("{:.0} MiB/s against {:.0} MiB/s", rate(guest), rate(host)),
        runs: RUNS,
    }
}

fn host_reads(path: &Path) -> Result<Duration> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; AT_ONCE]);
    let began = Instant::now();
    while file.read(&mut buffer)? > 0 {}
    Ok(began.elapsed())
}

fn host_writes(path: &Path) -> Result<Duration> {
    let (mut file, buffer) = (File::options().write(true).open(path)?, vec![0; AT_ONCE]);
    let began = Instant::now();
    (0..MIB).try_for_each(|_| file.write_all(&buffer))?;
    file.sync_data()?;
    Ok(began.elapsed())
}

/// What the guest says that `dd` took, to read and to write in turn.
fn guest(programs: &Path, path: &Path) -> Result<Vec<Duration>> {
    // What was read must not be in the guest's own memory.
    let script = format!(
        "for i in $(seq {RUNS}); do echo 3 > /proc/sys/vm/drop_caches; time -p dd if=/dev/vda of=/dev/null bs={AT_ONCE}; \
         time -p dd if=/dev/zero of=/dev/vda bs={AT_ONCE} count={MIB} conv=fsync; done\n"
    );
    let mut run = command(programs, "08_boot_linux");
    run.args(["--timeout", TIMEOUT]).arg("--disk").arg(path).stdin(Stdio::piped());
    let mut child = run.spawn().context("cannot start 08_boot_linux")?;
    let mut stdin = child.stdin.take().expect("it is a pipe");
    stdin.write_all(script.as_bytes())?;
    // The end of stdin ends the guest's shell, and that the machine.
    drop(stdin);
    let output = child.wait_with_output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "08_boot_linux failed: {}\n{printed}", output.status);
    let times: Vec<_> = printed.lines().filter_map(seconds).collect();
    ensure!(times.len() == 2 * RUNS, "the guest did not tell {} times:\n{printed}", 2 * RUNS);
    Ok(times)
}

/// `real 0.12`
fn seconds(line: &str) -> Option<Duration> {
    let seconds: f64 = line.trim_end().strip_prefix(REAL)?.parse().ok()?;
    // Less than the clock shows is no time to divide by.
    Duration::try_from_secs_f64(seconds.max(0.005)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_what_the_guest_says() {
        assert_eq!(seconds("real 1.25\r"), Some(Duration::from_millis(1250)));
        assert_eq!(seconds("real 0.00\r"), Some(Duration::from_millis(5)));
        for line in ["128+0 records in", "user 0.00", "real x", "# time -p dd"] {
            assert_eq!(seconds(line), None, "{line}");
        }
    }
}
