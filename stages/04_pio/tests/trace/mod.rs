//! What is watched of a guest is what the guest did: lines, the file for a viewer, the table and the picture.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testkit::Ran;

use crate::{BIN, guest, stage_04};

/// `mov cx, 1000; mov dx, 0x1000`, then 1000 times `out dx, al; inc dx`, each to another port; `hlt`.
const MANY_PORTS: &[u8] = &[0xB9, 0xE8, 3, 0xBA, 0, 0x10, 0xEE, 0x42, 0xE2, 0xFC, 0xF4];

/// The same with 300 times `out 0x80, al; in al, 0x81` and no end.
const ENDLESS: &[u8] = &[0xB9, 0x2C, 1, 0xE6, 0x80, 0xE4, 0x81, 0xE2, 0xFA, 0xEB, 0xFE];

/// Runs `program` with options for what is watched, in each of which DIR is a folder's name.
fn run(dir: &Path, program: &[u8], options: &[&str]) -> Ran {
    let program = guest(dir, "program", program);
    let folder = dir.to_str().unwrap();
    let options = options.iter().map(|option| option.replace("DIR", folder));
    stage_04(options).args([program]).run()
}

fn events(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The names of the events of a category.
fn names<'a>(events: &'a [Value], category: &'a str) -> Vec<&'a str> {
    let of = events.iter().filter(move |event| event["cat"] == category);
    of.map(|event| event["name"].as_str().unwrap()).collect()
}

/// On each track one event comes after the other, but for those within one.
fn tracks_are_in_order(events: &[Value]) {
    let mut lasting: Vec<_> = events
        .iter()
        .filter(|event| event["ph"] == "X")
        .map(|event| {
            let [from, long] = ["ts", "dur"].map(|key| event[key].as_f64().unwrap());
            (event["pid"].as_u64(), event["tid"].as_u64(), from, from + long)
        })
        .collect();
    lasting.sort_by(|one, other| one.partial_cmp(other).unwrap());
    for pair in lasting.windows(2) {
        let same = (pair[0].0, pair[0].1) == (pair[1].0, pair[1].1);
        // Microseconds with three decimals, as floating-point numbers.
        assert!(!same || pair[0].3 <= pair[1].2 + 1e-3, "{pair:?}");
    }
}

#[test]
fn the_table_the_file_and_the_picture_have_each_exit() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["--stats", "--trace-file=DIR/out.json", "--stats-plot=DIR/out.svg"];
    let ran = run(dir.path(), MANY_PORTS, &options);
    ran.ended(0).stderr_has("1000 OUT, 0 IN");
    let count = |what| ran.exits(what);
    let reasons = [count("port I/O"), count("hlt"), count("all")];
    assert_eq!((reasons, count("port without a device")), ([1000, 1, 1001], 1000), "{ran}");

    let events = events(&dir.path().join("out.json"));
    let exits = names(&events, "exit");
    let expected: Vec<_> = (0x1000..0x1000 + 1000).map(|port| format!("out {port:X}")).collect();
    assert_eq!(exits[..1000], expected[..]);
    assert_eq!(exits[1000..], ["hlt"]);
    // The guest ran before each of them; no device did anything.
    assert_eq!(names(&events, "guest").len(), 1001);
    assert_eq!(names(&events, "device").len(), 0);
    tracks_are_in_order(&events);

    let picture = fs::read_to_string(dir.path().join("out.svg")).unwrap();
    assert!(picture.contains("port without a device") && picture.contains("1000 (99.9 %)"));
    assert!(picture.trim_end().ends_with("</svg>"));
}

#[test]
fn devices_have_tracks_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(
        dir.path(),
        b"\xE6\x80\xB0\x41\xBA\xF8\x03\xEE\xEE\xB0\0\xE6\xF4",
        &["--stats", "--trace-file=DIR/out.json"],
    );
    ran.ended(0).stdout_has("AA");
    assert_eq!([ran.exits("serial port"), ran.exits("debug exit"), ran.exits("all")], [2, 1, 4]);
    let events = events(&dir.path().join("out.json"));
    assert_eq!(names(&events, "exit"), ["out 80", "out 3F8", "out 3F8", "out F4"]);
    assert_eq!(names(&events, "device"), ["out 3F8", "out 3F8", "out F4"]);
    let track = |name: &str| {
        let is_it = |event: &&Value| event["args"]["name"] == name;
        events.iter().find(is_it).map(|event| (event["pid"].clone(), event["tid"].clone()))
    };
    let serial = events.iter().find(|event| event["cat"] == "device").unwrap();
    assert_eq!(track("serial port"), Some((serial["pid"].clone(), serial["tid"].clone())));
    let sent = events.iter().filter(|event| event["args"]["device"] == "serial port");
    assert!(sent.clone().all(|event| event["args"]["data"] == "41") && sent.count() == 2);
}

#[test]
fn four_vcpus_are_watched_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.json");
    let file = format!("--trace-file={}", path.display());
    let ran = stage_04([&file, "--stats", "counter", "primes", "fibonacci", "matrix"]).run();
    ran.ended(0);
    // What each says of itself is what was seen.
    let number = |text: &str, before: &str| -> u64 {
        let text = text.split(before).next().unwrap();
        text.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let err = ran.err();
    let line = |vcpu| err.lines().find(|line| line.starts_with(&format!("vCPU {vcpu}, ")));
    let own = [0, 1, 2, 3].map(|vcpu| {
        let line = line(vcpu).unwrap();
        number(line, " OUT") + number(line, " IN")
    });
    assert_eq!(ran.exits("port I/O"), own.iter().sum::<u64>(), "{ran}");
    let events = events(&path);
    for (vcpu, own) in own.into_iter().enumerate() {
        let its = |event: &&Value| event["cat"] == "exit" && event["tid"] == vcpu;
        let ports = events.iter().filter(its).filter(|event| event["name"] != "hlt");
        assert_eq!(ports.count() as u64, own, "vCPU {vcpu}");
    }
    tracks_are_in_order(&events);
}

#[test]
fn a_flood_of_lines_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let lines = |words: &str| {
        let ran = run(dir.path(), MANY_PORTS, &[words]);
        ran.ended(0);
        let err = ran.err();
        let shown = err.lines().filter(|line| line.contains(" nobody: ")).count();
        let more = |line: &str| {
            let count = line.split_once(" - ... ")?.1.strip_suffix("in the last second")?;
            count.split(' ').next()?.parse::<usize>().ok()
        };
        let seconds = err.lines().filter_map(more).count();
        (shown, err.lines().filter_map(more).sum::<usize>(), seconds)
    };
    let (shown, more, seconds) = lines("--trace=rate:20");
    // The start has a line, too, and the end may have one; a second that has ended none.
    assert!((19..=20 * (seconds + 1)).contains(&shown), "{shown} lines in {seconds} s");
    assert!((1000..=1001).contains(&(shown + more)), "{shown} and {more} more");
    assert_eq!(lines("--trace=every"), (1000, 0, 0));
    assert_eq!(lines("--trace=mmio"), (0, 0, 0));
    assert_eq!(lines("--trace=nobody,every"), (1000, 0, 0));
}

#[test]
fn a_file_that_is_full_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(dir.path(), MANY_PORTS, &["--trace-file=DIR/out.json", "--trace-max=16K"]);
    ran.ended(0).stderr_has("the trace in ").stderr_has(" is full after 0.");
    let path = dir.path().join("out.json");
    let length = fs::metadata(&path).unwrap().len();
    assert!((12 << 10..=16 << 10).contains(&length), "{length}");
    let events = events(&path);
    assert_eq!(events.last().unwrap()["name"], "the trace is full: nothing after this");
}

#[test]
fn a_program_that_is_killed_leaves_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, program) = (dir.path().join("out.json"), guest(dir.path(), "program", ENDLESS));
    let mut child = Command::new(BIN)
        .arg("--trace-file")
        .args([&path, &program])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // All that the guest does until it spins is there soon, without another exit. One look may fall on a write, and
    // see half of it.
    let look = || serde_json::from_slice::<Vec<Value>>(&fs::read(&path).ok()?).ok();
    let deadline = Instant::now() + Duration::from_secs(60);
    while look().is_none_or(|events| names(&events, "exit").len() < 600) {
        assert!(Instant::now() < deadline, "the guest's exits are not in the file");
        thread::sleep(Duration::from_millis(5));
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success() && !child.wait().unwrap().success());
    let events = events(&path);
    let exits = names(&events, "exit");
    assert_eq!(exits, ["out 80", "in 81"].repeat(300));
    tracks_are_in_order(&events);
}

#[test]
fn what_cannot_be_written_is_refused_before_the_guest_runs() {
    let refused = |options: &[&str], text: &str| {
        stage_04(options).args(["hello"]).run().refused(2, text);
    };
    refused(&["--trace-file=/no/such/folder/x"], "cannot write a trace to /no/such/folder/x");
    refused(&["--trace-file=/dev/null"], "it is no file");
    refused(&["--stats-plot=/no/such/folder/x"], "cannot draw to /no/such/folder/x");
    refused(&["--trace=flop"], "there is no device \"flop\" to trace");
    refused(&["--trace-max=1M"], "--trace-file");
    refused(&["--trace-file=/tmp/x", "--trace-max=1K"], "room for nothing");
}
