//! A machine that is saved goes on where it was, as often as it is restored, at the time that it is then.

use std::fs::{self, File};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use testkit::Dialogue;

use crate::devices::{socket_folder, wait_until};
use crate::net::isolated;
use crate::{PATIENCE, PROMPT, program, text};

fn restored(folder: &Path, more: &[&str]) -> Dialogue {
    program().args(["--restore", &text(folder)]).args(more).patience(PATIENCE).on_terminal()
}

/// Boots with `cpus`, and leaves a shell with something in its memory and a program that runs.
fn saved(folder: &Path, cpus: &str) {
    let disk = folder.with_extension("img");
    fs::write(&disk, [0; 1 << 20]).unwrap();
    // As people name it: from where they are.
    let (here, name) = (folder.parent().unwrap(), text(Path::new(folder.file_name().unwrap())));
    let args = ["--cpus", cpus, "--memory", "256M", "--rng", "--snapshot-to", &name];
    let guest = program().args(args).args(["--disk", &text(&disk)]);
    let mut guest = guest.current_dir(here).on_terminal();
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
    let mut guest = restored(folder, &[]);
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
    let mut guest = restored(folder, &["--snapshot-to", &text(folder)]);
    guest.send("\rword=again; echo $word\r").expect("again\r\n").expect(PROMPT);
    guest.send("\x01s").expect("saved to ");
    assert_eq!(guest.end(), 0);
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!((names.len(), names[1].to_str()), (2, Some("state.json")), "{names:?}");
    let mut guest = restored(folder, &[]);
    guest.send("\recho $word\r").expect("\nagain\r\n").expect(PROMPT);
    guest.send("poweroff -f\r");
    assert_eq!(guest.end(), 0);
}

/// What can't be a snapshot of this machine is refused in a line.
fn is_refused_when_spoilt(folder: &Path) {
    let refused = |more: &[&str], why: &str| {
        program().args(["--restore", &text(folder)]).args(more).run().refused(2, why);
    };
    let disk = folder.with_extension("img");
    let named = text(&disk);
    refused(&["--cpus", "2"], "cannot be used with");
    refused(&["--rng"], "cannot be used with");
    refused(
        &["--disk", &named, "--disk", &named],
        "--disk is given 2 times, and the saved machine has 1 of these devices",
    );
    refused(&["--net", "user"], "--net is given 1 times, and the saved machine has 0");
    refused(&["--vsock", "cid=3,uds=x"], "--vsock: the saved machine has no such device");
    // What the guest knows of its disk has to be true.
    let changed = SystemTime::now();
    File::options().write(true).open(&disk).unwrap().set_modified(changed).unwrap();
    refused(&[], &format!("disk {named} was written to after the machine had been saved"));
    let smaller = folder.with_extension("small");
    fs::write(&smaller, [0; 512 << 10]).unwrap();
    refused(
        &["--disk", &text(&smaller)],
        "the virtio blk (0) cannot go on from the snapshot: the disk had 2048 sectors then, this one has 1024",
    );
    refused(&["--disk", &format!("{named},ro")], "cannot go on from the snapshot: it had features");
    fs::rename(&disk, &smaller).unwrap();
    refused(&[], &format!("disk {named}: there is no such file"));
    let disk = ["--disk", &text(&smaller)];
    let forgetful = ["--disk", "x.img,snapshot", "--snapshot-to", &text(folder)];
    program().args(forgetful).run().refused(2, "--snapshot-to saves no disk");
    let path = folder.join("state.json");
    let state = fs::read_to_string(&path).unwrap();
    for (spoilt, why) in [
        (
            state.replacen("\"version\":2", "\"version\":1", 1),
            "a snapshot of format 1, this program reads",
        ),
        (state[..state.len() / 2].to_owned(), "not a snapshot of this program: EOF"),
        (state.replacen("memory.", "../memory.", 1), "it calls its memory \"../memory."),
        (
            state.replacen("\"ranges\":[[0,", "\"ranges\":[[0,1", 1),
            "which is not what state.json says",
        ),
        (state.replacen("\"kind\":4", "\"kind\":2", 1), "it is of another kind of device"),
        (
            state.replacen("\"rng\":true", "\"rng\":false", 1),
            "the snapshot is of a machine with other devices: there is no virtio rng (1) here",
        ),
        (state.replacen("\"rng\"", "\"gnr\"", 1), "options: missing field `rng`"),
        (String::new(), "not a snapshot of this program: EOF"),
    ] {
        assert_ne!(spoilt, state, "{why}");
        fs::write(&path, &spoilt).unwrap();
        refused(&disk, why);
    }
    fs::remove_file(&path).unwrap();
    refused(&disk, "no snapshot there: state.json is missing");
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

/// A network namespace with a tap, in which the machine runs. The guest knows the host by its address, and would look for
/// another one only after a while.
const TAP: &str = r#"
    tap=$1; shift
    $bb tunctl -t $tap > $dir/log
    $bb ip address add 10.0.0.1/24 dev $tap
    $bb ip link set $tap address 02:00:00:00:00:01
    $bb ip link set $tap up
    $program "$@"
"#;

/// Starts the stage with these options.
fn with_tap(dir: &tempfile::TempDir, tap: &str, args: &[&str]) -> Dialogue {
    isolated(TAP, dir, &[&[tap], args].concat()).on_terminal()
}

/// Sends back what comes over each connection, to its end.
fn echo_at(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let stream = stream.unwrap();
                // A machine that is saved lets its connections go.
                let _ = io::copy(&mut &stream, &mut &stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
}

/// All devices work, and the disk has the text.
fn devices_work(guest: &mut Dialogue, text: &str) {
    guest.send("head -c 9 /dev/vda; tty; stty size; head -c 16 /dev/hwrng | wc -c\r");
    guest.expect(&format!("{text}\r\n/dev/hvc0\r\n24 80\r\n16\r\n")).expect(PROMPT);
    guest.send("ping -A -q -c 20 10.0.0.1\r").expect(" 0% packet loss").expect(PROMPT);
    guest.send("echo hello | vsock 52\r").expect("\nhello\r\n").expect(PROMPT);
    // The answer to a question comes through the balloon's queue for statistics.
    guest.send("\x01b").expect("the balloon has ").expect(" MiB; of the guest's ");
}

#[test]
fn each_device_goes_on_with_what_is_behind_it_then() {
    let (dir, sockets) = (tempfile::tempdir().unwrap(), socket_folder());
    let path = |name: &str| text(&dir.path().join(name));
    let socket = |name: &str| sockets.path().join(name);
    let (disk, folder) = (path("disk.img"), path("machine"));
    fs::write(&disk, [0; 1 << 20]).unwrap();
    echo_at(&socket("vsock_52"));
    let args = [
        ["--memory", "256M"],
        ["--console", "hvc0"],
        ["--append", "ip=10.0.0.2::10.0.0.1:255.255.255.0"],
        ["--snapshot-to", &folder],
        ["--balloon", "size=32M"],
        ["--net", "tap=tap0"],
        ["--vsock", &format!("cid=7,uds={}", text(&socket("vsock")))],
        ["--disk", &disk],
    ];
    let mut guest = with_tap(&dir, "tap0", &[&["--rng"], args.as_flattened()].concat());
    guest.expect(PROMPT);
    guest.send("echo the disk | dd of=/dev/vda conv=fsync\r").expect("records out").expect(PROMPT);
    devices_work(&mut guest, "the disk");
    // A connection that is open, with one line through it.
    guest.send("mkfifo f; vsock 52 < f & exec 3> f; echo li''ne >&3\r").expect("line\r\n");
    guest.send("\x01-").expect("the balloon is to have 96 MiB");
    guest.send("\x01s").expect("saved to ");
    assert_eq!(guest.end(), 0);

    // With the same devices, on a tap that has been made anew. The connection is gone.
    let mut guest = with_tap(&dir, "tap0", &["--restore", &folder, "--stats"]);
    guest.expect("vsock: error number  10").send("\r").expect(PROMPT);
    devices_work(&mut guest, "the disk");
    // The balloon goes on to the size that it was given before.
    let full = "the balloon has 96 of 96 MiB; of the guest's ";
    wait_until(full, || {
        guest.send("\x01b").expect("the balloon has ").expect(" available");
        guest.printed().contains(full)
    });
    guest.send("poweroff -f\r").expect(&format!("at the end {full}"));
    assert_eq!(guest.end(), 0);

    // With others behind them, and a disk that stays as it is.
    fs::rename(&disk, path("moved.img")).unwrap();
    echo_at(&socket("other_52"));
    let others = [
        ["--restore", &folder],
        ["--disk", &format!("{},snapshot", path("moved.img"))],
        ["--vsock", &format!("cid=7,uds={}", text(&socket("other")))],
        ["--net", "tap=tap1"],
    ];
    let mut guest = with_tap(&dir, "tap1", others.as_flattened());
    guest.expect("vsock: error number  10").send("\r").expect(PROMPT);
    devices_work(&mut guest, "the disk");
    guest.send("echo is other | dd of=/dev/vda conv=fsync\r").expect("records out");
    guest.send("echo 1 > /proc/sys/vm/drop_caches; head -c 9 /dev/vda\r").expect("\nis other\r\n");
    guest
        .send("dmesg | grep -iE 'virtio|vsock|balloon' | grep -ciE 'error|fail|warn'\r")
        .expect("\n0\r\n");
    guest.send("poweroff -f\r");
    assert_eq!(guest.end(), 0);
    assert!(fs::read(path("moved.img")).unwrap().starts_with(b"the disk\n\0"));
}
