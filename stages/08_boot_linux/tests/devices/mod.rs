//! The virtio devices that need nothing on the host but a thread: seen from inside a guest, and from outside.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::*;

/// What the guest prints between the command `what` and its next prompt.
fn said(ran: &Ran, what: &str) -> String {
    answer(ran, what).join("\n")
}

#[test]
fn a_virtio_console_prints_all_and_a_virtio_rng_gives_randomness() {
    let random = "head -c 32 /dev/hwrng | sha256sum";
    let numbers: String = (1..=170_000).map(|n| format!("{n}\n")).collect();
    assert!(numbers.len() > 1_000_000);
    // As it is, and so by the page: with a carriage return put in, the guest's terminal would send it by the line.
    let print = "stty -opost; cat /tmp/n; stty opost";
    let complaints = "dmesg | grep -ciE 'virtio.*(error|fail|warn)|hvc.*(error|fail)'";
    let script = [
        "tty",
        "cat /sys/class/tty/console/active",
        "cat /proc/cmdline",
        "cat /sys/class/misc/hw_random/rng_current",
        random,
        "seq 1 170000 > /tmp/n",
        print,
        &random.replace("32", "33"),
        complaints,
        "true\n",
    ]
    .join("\n");
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("out.json");
    let file = format!("--trace-file={}", trace.display());
    let ran = boot(&["--console", "hvc0", "--rng", "--stats", &file], &script);
    ran.ended(0);
    assert_eq!(said(&ran, "tty"), "/dev/hvc0");
    assert_eq!(said(&ran, "cat /sys/class/tty/console/active"), "hvc0");
    assert_eq!(said(&ran, "cat /proc/cmdline"), linux::HVC_CMDLINE);
    assert_eq!(said(&ran, "cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0");
    let digests = [said(&ran, random), said(&ran, &random.replace("32", "33"))];
    assert!(digests.iter().all(|digest| digest.len() == 64 + 3), "{digests:?}");
    assert_ne!(digests[0], digests[1]);
    // A megabyte, and not a byte of it is lost.
    assert_eq!(said(&ran, print) + "\n", numbers);
    assert_eq!(said(&ran, complaints), "0");
    // It came in buffers, not in bytes: a serial port has two exits for each.
    assert!((1..10_000).contains(&ran.exits("all")), "{ran}");
    // The trace has each exit, the devices' own work, and the lines that they raise.
    let events: Vec<Value> = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
    let of = |key: &str, value: &str| events.iter().filter(|it| it[key] == value).count() as u64;
    assert_eq!(of("cat", "exit") + ran.exits("signal"), ran.exits("all"), "{ran}");
    let work = |name| events.iter().filter(|it| it["cat"] == "work" && it["name"] == name).count();
    assert!(work("virtio console") > 10 && work("virtio rng") > 1);
    assert!(events.iter().any(|it| it["ph"] == "i" && it["pid"] == 4), "no line was raised");
}

#[test]
fn a_person_at_a_virtio_console_has_a_window_and_sees_a_panic_on_four_vcpus() {
    let mut guest = program().args(["--console", "hvc0", "--cpus", "4"]).on_terminal();
    guest.expect(PROMPT);
    guest.send("stty size\r").expect("24 80").expect(PROMPT);
    guest.resize(50, 132);
    // The guest learns of it by an interrupt.
    guest.send("until stty size | grep 50; do sleep 0.1; done\r").expect("50 132").expect(PROMPT);
    guest.send("nproc; tty\r").expect("\n4\r\n/dev/hvc0").expect(PROMPT);
    guest.send("sh -c 'echo $((6*7)); exec sleep 1000'\r").expect("42").send("\x03").expect(PROMPT);
    // Without the flag there is no randomness of the host's.
    guest.send("cat /sys/class/misc/hw_random/rng_current || echo n''one\r").expect("none");
    guest.send("echo c > /proc/sysrq-trigger\r").expect("Kernel panic - not syncing: sysrq");
    assert_eq!(guest.end(), 1);
    assert_eq!(
        guest.printed().matches("Kernel panic - not syncing").count(),
        1,
        "it is seen twice"
    );
    assert!(guest.printed().contains("the guest's kernel panicked: sysrq triggered crash"));
}

/// The guest's memory that the host has, in KiB: what the monitor has beside it is a few MiB.
fn resident(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Waits until `seen` says so, and tells how long.
pub fn wait_until(what: &str, mut seen: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !seen() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_balloon_takes_memory_and_what_the_guest_frees_goes_back_to_the_host() {
    const MIB: u64 = 1 << 10;
    let dir = socket_folder();
    let disk = sparse(&dir, "disk.img", 250 << 20);
    let args = ["--balloon", "size=96M", "--memory", "512M", "--disk", &disk];
    let mut guest = program().args(args).on_terminal();
    guest.expect(PROMPT);
    // The balloon fills as soon as its driver works. Without it more than 400 MiB are free.
    let full = "awk '/MemFree/ { exit $2 > 370 * 1024 }' /proc/meminfo";
    guest.send(&format!("until {full}; do sleep 0.1; done; echo fu''ll\r")).expect("full");
    guest.expect(PROMPT);
    let pid = guest.pid();
    let before = resident(pid);
    guest.send("dd if=/dev/zero of=/tmp/big bs=1M count=150\r").expect("150+0 records out");
    guest.expect(PROMPT);
    let with = resident(pid);
    assert!(with > before + 140 * MIB, "{before} KiB, then {with} KiB");
    guest.send("rm /tmp/big; echo g''one\r").expect("gone").expect(PROMPT);
    wait_until("the host did not get its memory back", || resident(pid) < with - 120 * MIB);
    // What the guest has read from its disk it keeps, until the balloon needs the memory.
    guest.send("dd if=/dev/vda of=/dev/null bs=1M\r").expect("250+0 records out").expect(PROMPT);
    let with = resident(pid);
    let becomes = |guest: &mut Dialogue, key: &str, size: u32| {
        guest.send(&key.repeat(4)).expect(&format!("the balloon is to have {size} MiB"));
        let has = format!("the balloon has {size} of {size} MiB; of the guest's ");
        wait_until(&has, || {
            guest.send("\x01b").expect("the balloon has ").expect(" available");
            guest.printed().contains(&has)
        });
    };
    becomes(&mut guest, "\x01-", 96 + 4 * 64);
    wait_until("the host did not get what the balloon took", || resident(pid) < with - 80 * MIB);
    becomes(&mut guest, "\x01+", 96);
    guest.send("\r").expect(PROMPT);
    // It can be had again, and more of it than there is without what the balloon has.
    guest.send("dd if=/dev/zero of=/dev/null bs=380M count=1\r").expect("1+0 records out");
    guest.expect(PROMPT).send("\x04").expect("Power down");
    assert_eq!(guest.end(), 0);
}

/// Where Unix sockets can be: not on the file system of the host's that the lab shows.
pub fn socket_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A connection to the guest's port, when somebody listens there.
fn connect(path: &Path, port: u32) -> UnixStream {
    let until = Instant::now() + PATIENCE;
    loop {
        let mut stream = UnixStream::connect(path).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                _ => break,
            }
        }
        if line.starts_with(b"OK ") {
            return stream;
        }
        assert!(Instant::now() < until, "nobody listens at port {port}: {line:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What the guest's `seq 1 100000` prints.
fn numbers() -> String {
    (1..=100_000).map(|n| format!("{n}\n")).collect()
}

/// The line that the guest's `sha256sum` prints for what it reads.
fn digest(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    format!("{}  -", sha256(&file(&dir, "content", bytes)))
}

#[test]
fn guest_and_host_reach_each_other_by_vsock() {
    for cpus in ["1", "4"] {
        let dir = socket_folder();
        let path = dir.path().join("vsock");
        // On the host's port 52 somebody sends back what comes, on port 53 only its sum, when all has come.
        let echo = UnixListener::bind(dir.path().join("vsock_52")).unwrap();
        thread::spawn(move || {
            for stream in echo.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || {
                    std::io::copy(&mut &stream, &mut &stream).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                });
            }
        });
        let sum = UnixListener::bind(dir.path().join("vsock_53")).unwrap();
        thread::spawn(move || {
            for stream in sum.incoming() {
                let mut bytes = Vec::new();
                let mut stream = stream.unwrap();
                stream.read_to_end(&mut bytes).unwrap();
                let count: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
                writeln!(stream, "{} bytes, {count}", bytes.len()).unwrap();
            }
        });
        let vsock = format!("cid=7,uds={}", path.display());
        let mut guest = program().args(["--vsock", &vsock, "--cpus", cpus]).on_terminal();
        guest.expect(PROMPT);
        // The guest asks the host: once at a time, and several at once.
        guest.send("echo hello | vsock 52\r").expect("\nhello\r\n").expect(PROMPT);
        let digest_of_numbers = digest(numbers().as_bytes());
        guest.send("seq 1 100000 > /tmp/n; sha256sum < /tmp/n\r").expect(&digest_of_numbers);
        guest.expect(PROMPT);
        guest
            .send("for i in 1 2 3 4; do vsock 52 < /tmp/n | sha256sum & done; wait; echo d''one\r");
        guest.expect("done\r\n").expect(PROMPT);
        assert_eq!(guest.printed().matches(&digest_of_numbers).count(), 5, "{}", guest.printed());
        guest.send("vsock 53 < /tmp/n\r").expect("588895 bytes, ").expect(PROMPT);
        guest.send("vsock 99\r").expect("error number  104").expect(PROMPT);
        // The host asks the guest, and both send at once.
        guest.send("vsock -l 1234 < /tmp/n | sha256sum\r");
        let content: Vec<u8> = (0..500_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let mut stream = connect(&path, 1234);
        let digest_of_content = digest(&content);
        let writer = thread::spawn({
            let mut stream = stream.try_clone().unwrap();
            move || {
                stream.write_all(&content).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            }
        });
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        writer.join().unwrap();
        assert!(answer == numbers(), "{} bytes came", answer.len());
        guest.expect(&digest_of_content).expect(PROMPT);
        // Nobody listens there.
        let mut nobody = UnixStream::connect(&path).unwrap();
        nobody.write_all(b"CONNECT 4\n").unwrap();
        assert!(matches!(nobody.read(&mut [0]), Ok(0) | Err(_)));
        guest.send("\r").expect(PROMPT).send("\x04").expect("Power down");
        assert_eq!(guest.end(), 0);
        assert!(!path.exists(), "the socket was left behind");
    }
}

#[test]
fn devices_that_make_no_sense_get_one_line() {
    let dir = socket_folder();
    let file = file(&dir, "file", b"");
    for (args, why) in [
        (["--balloon", "size=512M"], "--balloon takes all of the guest's memory"),
        (["--vsock", &format!("cid=3,uds={file}")], "cannot listen at the Unix socket"),
    ] {
        program().args(args).run().refused(2, why);
    }
    for (args, why) in [
        (["--balloon", "512M,x"], "\"x\" is unknown"),
        (["--vsock", "cid=2,uds=/dev/shm/x"], "expected a number from 3 to 4294967294"),
        (["--vsock", "cid=3"], "uds=PATH is missing"),
        (["--console", "tty1"], "hvc0"),
    ] {
        program().args(args).run().ended(2).stderr_has(why);
    }
}
