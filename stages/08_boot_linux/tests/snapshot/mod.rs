//! A machine that is saved goes on where it was, as often as it is restored, at the time that it is then.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use testkit::Dialogue;

use crate::{PATIENCE, PROMPT, program, text};

fn restored(folder: &Path, more: &[&str]) -> Dialogue {
    let disk = text(&folder.with_extension("img"));
    let args = ["--restore", &text(folder), "--disk", &disk];
    program().args(args).args(more).patience(PATIENCE).on_terminal()
}

/// Boots with `cpus`, and leaves a shell with something in its memory and a program that runs.
fn saved(folder: &Path, cpus: &str) {
    let disk = folder.with_extension("img");
    fs::write(&disk, [0; 1 << 20]).unwrap();
    let args = ["--cpus", cpus, "--memory", "256M", "--rng", "--snapshot-to", &text(folder)];
    let mut guest = program().args(args).args(["--disk", &text(&disk)]).on_terminal();
    guest.expect(PROMPT);
    guest
        .send("echo disk > /tmp/disk; dd if=/tmp/disk of=/dev/vda conv=fsync\r")
        .expect("records out")
        .expect(PROMPT);
    guest.send("word=kept; seq 1 20000 > /tmp/seq; md5sum < /tmp/seq > /tmp/sum\r").expect(PROMPT);
    guest.send(": > /tmp/n; (while sleep 1; do echo >> /tmp/n; done) & echo started\r");
    guest.expect("started\r\n").expect(PROMPT);
    guest.send("\x01s");
    guest.expect("saved to ").expect(" MiB of memory; go on with --restore ");
    assert_eq!(guest.end(), 0);
}

/// A restored machine remembers, works on, and knows what time it is.
fn goes_on(folder: &Path, cpus: &str) {
    let mut guest = restored(folder, &["--rng"]);
    guest.send("\recho $word; md5sum < /tmp/seq | cmp - /tmp/sum && echo same\r");
    guest.expect("kept\r\n").expect("same\r\n").expect(PROMPT);
    guest.send(
        "a=$(wc -l < /tmp/n); sleep 3; b=$(wc -l < /tmp/n); [ \"$b\" -gt \"$a\" ] && echo ru''nning\r",
    );
    guest.expect("running\r\n").expect(PROMPT);
    guest
        .send("grep -c ^processor /proc/cpuinfo\r")
        .expect(&format!("\n{cpus}\r\n"))
        .expect(PROMPT);
    guest.send("echo at $(date +%s) now\r").expect("\nat ").expect(" now\r\n");
    let host = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let printed = guest.printed();
    let at = printed.rsplit("\nat ").next().unwrap().split(' ').next().unwrap();
    let guests: u64 = at.parse().unwrap();
    assert!(guests.abs_diff(host) <= 5, "the guest says {guests}, the host {host}");
    guest.send("dmesg | grep -ciE 'lockup|stall|clocksource.*unstable'\r").expect("\n0\r\n");
    guest.send("poweroff -f\r");
    assert_eq!(guest.end(), 0);
}

/// What was left when somebody was stopped halfway is in nobody's way, and goes with the next snapshot.
fn is_replaced_as_a_whole(folder: &Path) {
    fs::write(folder.join(".state.123456"), "{\"version\":").unwrap();
    fs::write(folder.join("memory.123456"), "half").unwrap();
    let mut guest = restored(folder, &["--rng", "--snapshot-to", &text(folder)]);
    guest.send("\rword=again; echo $word\r").expect("again\r\n").expect(PROMPT);
    guest.send("\x01s").expect("saved to ");
    assert_eq!(guest.end(), 0);
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!((names.len(), names[1].to_str()), (2, Some("state.json")), "{names:?}");
    let mut guest = restored(folder, &["--rng"]);
    guest.send("\recho $word\r").expect("\nagain\r\n").expect(PROMPT);
    guest.send("poweroff -f\r");
    assert_eq!(guest.end(), 0);
}

/// What can't be a snapshot of this machine is refused in a line.
fn is_refused_when_spoilt(folder: &Path) {
    let refused = |more: &[&str], why: &str| {
        let disk = text(&folder.with_extension("img"));
        let ran = program().args(["--restore", &text(folder), "--disk", &disk]).args(more).run();
        ran.refused(2, why);
    };
    refused(
        &[],
        "the snapshot is of a machine with other devices: there is no virtio rng (1) here",
    );
    refused(&["--rng", "--cpus", "2"], "cannot be used with");
    let forgetful = ["--disk", "x.img,snapshot", "--snapshot-to", &text(folder)];
    program().args(forgetful).run().refused(2, "--snapshot-to saves no disk");
    let path = folder.join("state.json");
    let state = fs::read_to_string(&path).unwrap();
    for (spoilt, why) in [
        (
            state.replacen("\"version\":1", "\"version\":2", 1),
            "a snapshot of format 2, this program reads",
        ),
        (state[..state.len() / 2].to_owned(), "not a snapshot of this program: EOF"),
        (state.replacen("memory.", "../memory.", 1), "it calls its memory \"../memory."),
        (
            state.replacen("\"ranges\":[[0,", "\"ranges\":[[0,1", 1),
            "which is not what state.json says",
        ),
        (state.replacen("\"kind\":4", "\"kind\":2", 1), "it is of another kind of device"),
        (String::new(), "not a snapshot of this program: EOF"),
    ] {
        assert_ne!(spoilt, state, "{why}");
        fs::write(&path, &spoilt).unwrap();
        refused(&["--rng"], why);
    }
    fs::remove_file(&path).unwrap();
    refused(&["--rng"], "no snapshot there: state.json is missing");
}

#[test]
fn a_machine_goes_on_as_often_as_it_is_restored() {
    for cpus in ["1", "4"] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("machine");
        saved(&folder, cpus);
        // Long enough to be seen on a clock that stood still.
        thread::sleep(Duration::from_secs(8));
        goes_on(&folder, cpus);
        goes_on(&folder, cpus);
        if cpus == "1" {
            is_replaced_as_a_whole(&folder);
            is_refused_when_spoilt(&folder);
        }
    }
}
