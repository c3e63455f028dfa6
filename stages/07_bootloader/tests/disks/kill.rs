//! Whatever happens to the monitor, a sector that the guest has flushed is on the disk.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::disk::SECTOR;
use tempfile::TempDir;

use crate::Disks;

/// How often the monitor is killed.
const KILLS: usize = 50;

/// Sectors that asm/boot/flush.asm writes to, one after the other, from sector 1 on.
const SLOTS: usize = 16;

/// The longest that it may write before it is killed.
const MOST: Duration = Duration::from_millis(100);

/// The number that fills the sector of `slot`, or how the sector is torn.
fn number(image: &[u8], slot: usize) -> Result<u32, Vec<u32>> {
    let sector = &image[(1 + slot) * SECTOR..][..SECTOR];
    let mut words: Vec<u32> =
        sector.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    words.dedup();
    if let [number] = words[..] { Ok(number) } else { Err(words) }
}

/// The monitor, from memory if files can be run there: the lab gets them from afar, and would 50 times.
fn monitor() -> (Option<TempDir>, PathBuf) {
    let original = PathBuf::from(env!("CARGO_BIN_EXE_07_bootloader"));
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return (None, original) };
    let copy = folder.path().join("monitor");
    let copied = fs::copy(&original, &copy);
    match copied.and_then(|_| Command::new(&copy).arg("--version").output()) {
        Ok(ran) if ran.status.success() => (Some(folder), copy),
        _ => (None, original),
    }
}

#[test]
fn what_was_flushed_survives_a_kill_at_any_moment() {
    let folder = Disks::new();
    let image = folder.write("image", &[asm::boot::FLUSH, &[0; SLOTS * SECTOR]].concat());
    let (_folder, monitor) = monitor();
    let mut greatest = 0;
    let started = Instant::now();
    for kill in 0..KILLS {
        let mut child = Command::new(&monitor)
            .args(["--timeout", "60", "--disk"])
            .arg(&image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        // Each line that is a number was printed after the flush. The first says that the guest is at it.
        let mut next = || {
            let mut line = String::new();
            while out.read_line(&mut line).unwrap() > 0 {
                // The last line may be cut off.
                let whole = line.strip_suffix('\n').filter(|digits| digits.len() == 8);
                if let Some(number) = whole.and_then(|digits| u32::from_str_radix(digits, 16).ok())
                {
                    return Some(number);
                }
                line.clear();
            }
            None
        };
        let first = next().expect("a number that was flushed");
        assert_eq!(first, greatest + 1, "the guest goes on behind what it finds");
        // ANCHOR: kill
        let wait = MOST.mul_f64(RandomState::new().hash_one(kill) as f64 / u64::MAX as f64);
        thread::sleep(wait);
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        let flushed = std::iter::from_fn(&mut next).last().unwrap_or(first);

        let image = fs::read(&image).unwrap();
        let sectors: Vec<u32> = (0..SLOTS)
            .map(|slot| {
                number(&image, slot).unwrap_or_else(|words| {
                    panic!("kill {kill} after {wait:?}: slot {slot} is torn: {words:x?}")
                })
            })
            .collect();
        for (slot, &found) in sectors.iter().enumerate() {
            // The greatest number up to `flushed` that belongs here. A greater one was written, and its flush had not
            // ended, or was not told.
            let behind = (flushed as usize + SLOTS - slot) % SLOTS;
            let least = flushed.saturating_sub(behind as u32);
            assert!(
                found >= least && (found == 0 || found as usize % SLOTS == slot),
                "kill {kill} after {wait:?}: {flushed} was flushed, slot {slot} has {found}"
            );
        }
        // ANCHOR_END: kill
        greatest = *sectors.iter().max().unwrap();
    }
    eprintln!("{KILLS} kills in {:?}, {greatest} sectors were written", started.elapsed());
}
