//! A trace in a file, for <https://ui.perfetto.dev> and `chrome://tracing`: a JSON array of events.
//!
//! The format is the "Trace Event Format" of Chrome: `ph` is the kind of an event, `X` for one that lasts, `i` for one
//! that doesn't, `M` for a name; `ts` and `dur` are in microseconds; `pid` and `tid` choose the track. Tracks here are:
//!
//! | pid | what | tid |
//! |---|---|---|
//! | 1 | vCPUs: "guest" while `KVM_RUN` runs, then the exit while the monitor deals with it | the vCPU's number |
//! | 2 | devices: each exit that they answer | one a device |
//! | 3 | what devices do on threads of their own | one a thread |
//! | 4 | interrupt lines that were raised | 0 |
//!
//! A thread writes the file, so that no vCPU waits for a disk. It is a whole JSON document between any two writes, so
//! also if the program is killed there: each write begins at the array's last bracket and has a new one at its end.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::{Error, stats};
use crate::last_exits::{LastExit, Space};

/// How many events may wait for the writer.
const WAITING: usize = 4096;

/// How long an event may wait to be written: what is lost when the program is killed.
const DELAY: Duration = Duration::from_millis(50);

/// How many bytes are written at once.
const BATCH: usize = 64 << 10;

/// How many bytes of an exit's data are written.
const DATA: usize = 16;

/// The end of the document.
const END: &[u8] = b"\n]\n";

/// The least that a file may have: room for the names of tracks and for the word that it is full.
pub const LEAST: u64 = 4 << 10;

/// What is to be written.
pub(super) enum Record {
    /// The vCPU was in `KVM_RUN`.
    Guest { vcpu: u8, from: Duration, to: Duration },
    /// The monitor dealt with an exit.
    Exit {
        vcpu: u8,
        at: Duration,
        took: Duration,
        name: String,
        device: Option<&'static str>,
        args: Value,
    },
    /// A device worked on its own thread.
    #[cfg_attr(not(feature = "stage08"), allow(dead_code, reason = "no device has a thread yet"))]
    Work { number: u32, name: &'static str, from: Duration, to: Duration },
    /// An interrupt line was raised.
    #[cfg_attr(not(feature = "stage05"), allow(dead_code, reason = "there are no lines yet"))]
    Line { at: Duration, gsi: u32 },
}

impl Record {
    pub(super) fn exit(
        vcpu: u8,
        at: Duration,
        took: Duration,
        exit: &LastExit,
        device: Option<&'static str>,
        data: &[u8],
    ) -> Self {
        let (name, mut args) = match exit.request {
            None => (stats::name(exit.reason).to_owned(), json!({})),
            Some(request) => {
                let name = match (request.space, request.write) {
                    (Space::Port, true) => format!("out {:X}", request.addr),
                    (Space::Port, false) => format!("in {:X}", request.addr),
                    (Space::Memory, true) => format!("write {:08X}", request.addr),
                    (Space::Memory, false) => format!("read {:08X}", request.addr),
                };
                let mut bytes: String =
                    data.iter().take(DATA).map(|byte| format!("{byte:02X} ")).collect();
                bytes.truncate(bytes.trim_end().len());
                let more = if data.len() > DATA { " ..." } else { "" };
                let whose = device.unwrap_or("nobody");
                (name, json!({ "device": whose, "size": request.size, "data": bytes + more }))
            }
        };
        if let Some(rip) = exit.rip {
            args["rip"] = json!(format!("{rip:#x}"));
        }
        args["number"] = json!(exit.number);
        Self::Exit { vcpu, at, took, name, device, args }
    }
}

/// An event as the file has it.
#[derive(Serialize)]
struct Json<'a> {
    name: Cow<'a, str>,
    ph: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'static str>,
    pid: u32,
    tid: u32,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    /// An instant event's scope: the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Value>,
}

const VCPUS: u32 = 1;
const DEVICES: u32 = 2;
const WORKERS: u32 = 3;
const LINES: u32 = 4;

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

fn lasting<'a>(
    (pid, tid): (u32, u32),
    cat: &'static str,
    name: Cow<'a, str>,
    from: Duration,
    to: Duration,
    args: Option<Value>,
) -> Json<'a> {
    let dur = Some(micros(to.saturating_sub(from)));
    Json { name, ph: "X", cat: Some(cat), pid, tid, ts: micros(from), dur, s: None, args }
}

fn instant((pid, tid): (u32, u32), name: String, at: Duration) -> Json<'static> {
    let (name, ts) = (Cow::Owned(name), micros(at));
    Json { name, ph: "i", cat: None, pid, tid, ts, dur: None, s: Some("p"), args: None }
}

/// What a track, or with `thread_name` not set all tracks of a pid, is called.
fn naming((pid, tid): (u32, u32), thread: bool, name: &str) -> Json<'static> {
    let what = if thread { "thread_name" } else { "process_name" };
    let args = Some(json!({ "name": name }));
    let name = Cow::Borrowed(what);
    Json { name, ph: "M", cat: None, pid, tid, ts: 0.0, dur: None, s: None, args }
}

/// A file that takes a trace.
pub struct File {
    sender: SyncSender<Option<Record>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl File {
    /// Makes the file, of at most `most` bytes. When that is reached, or when the file cannot be written, `told` is
    /// given the word for it, and what comes then is left out.
    ///
    /// The file is written at more than one place, so a pipe is refused.
    pub fn create(
        path: &Path,
        most: u64,
        told: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        if most < LEAST {
            return Err(Error::Small { most });
        }
        let file = fs::File::create(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(Error::NoFile { path: path.to_owned() });
        }
        let mut writer = Writer {
            file,
            path: path.to_owned(),
            end: 0,
            room: most,
            batch: Vec::new(),
            tracks: BTreeMap::new(),
            told: Some(Box::new(told)),
        };
        writer.begin().map_err(failed)?;
        let (sender, records) = sync_channel(WAITING);
        let thread = thread::Builder::new().name("trace".into());
        let thread = thread.spawn(move || writer.run(&records)).map_err(failed)?;
        Ok(Self { sender, writer: Mutex::new(Some(thread)) })
    }

    /// Adds an event, and waits if there are too many to be written.
    pub(super) fn record(&self, record: Record) {
        // Nobody takes it any more once the trace has ended.
        let _ = self.sender.send(Some(record));
    }

    /// Writes what has not been written.
    pub(super) fn finish(&self) {
        if let Some(writer) = super::lock(&self.writer).take() {
            let _ = self.sender.send(None);
            // It has told what it had to tell.
            let _ = writer.join();
        }
    }
}

struct Writer {
    file: fs::File,
    path: PathBuf,
    /// Where the next event goes.
    end: u64,
    /// How many bytes the events may still have.
    room: u64,
    /// Events that are not written yet, each with what parts it from the one before.
    batch: Vec<u8>,
    /// The tracks that have a name, with the end of their last event.
    tracks: BTreeMap<(u32, u32), (Option<&'static str>, Duration)>,
    /// Whom to tell that the file takes no more; nobody if that was done.
    told: Option<Box<dyn FnOnce(String) + Send>>,
}

impl Writer {
    /// Writes a document without events, but for the names.
    fn begin(&mut self) -> io::Result<()> {
        let name = |pid, name| naming((pid, 0), false, name);
        let mut names = vec![
            name(VCPUS, "vCPUs"),
            name(DEVICES, "devices"),
            name(WORKERS, "devices' own threads"),
            name(LINES, "interrupts"),
            naming((LINES, 0), true, "lines raised"),
        ]
        .into_iter();
        let first = serde_json::to_vec(&names.next()).expect("it is plain data");
        self.batch = [b"[\n", &first[..]].concat();
        names.for_each(|name| self.add(&name));
        self.room = self.room.saturating_sub((self.batch.len() + 1024) as u64);
        self.write()
    }

    fn run(&mut self, records: &Receiver<Option<Record>>) {
        let mut since = Instant::now();
        loop {
            let wait = match self.batch.is_empty() {
                true => Duration::from_secs(3600),
                false => DELAY.saturating_sub(since.elapsed()),
            };
            match records.recv_timeout(wait) {
                Ok(Some(record)) if self.told.is_some() => {
                    if self.batch.is_empty() {
                        since = Instant::now();
                    }
                    self.take(record);
                    if self.batch.len() >= BATCH || since.elapsed() >= DELAY {
                        self.flush();
                    }
                }
                Ok(Some(_)) => {}
                Err(RecvTimeoutError::Timeout) => self.flush(),
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return self.flush(),
            }
        }
    }

    fn take(&mut self, record: Record) {
        match record {
            Record::Guest { vcpu, from, to } => {
                let track = (VCPUS, vcpu.into());
                self.name(track, || format!("vCPU {vcpu}"));
                self.add(&lasting(track, "guest", "guest".into(), from, to, None));
            }
            Record::Exit { vcpu, at, took, name, device, args } => {
                let (track, to) = ((VCPUS, vcpu.into()), at + took);
                self.name(track, || format!("vCPU {vcpu}"));
                if let Some(device) = device {
                    let track = self.device(device);
                    // Two vCPUs that want the same device wait for each other; its time is one thing after the other.
                    let from = self.tracks.get(&track).map_or(at, |(_, end)| at.max(*end));
                    if from < to {
                        let name = Cow::Borrowed(name.as_str());
                        self.add(&lasting(track, "device", name, from, to, None));
                        self.tracks.insert(track, (Some(device), to));
                    }
                }
                self.add(&lasting(track, "exit", name.into(), at, to, Some(args)));
            }
            Record::Work { number, name, from, to } => {
                let track = (WORKERS, number);
                self.name(track, || format!("{name} ({number})"));
                self.add(&lasting(track, "work", name.into(), from, to, None));
            }
            Record::Line { at, gsi } => self.add(&instant((LINES, 0), format!("line {gsi}"), at)),
        }
    }

    /// Gives a track its name, if it has none yet.
    fn name(&mut self, track: (u32, u32), name: impl FnOnce() -> String) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.tracks.entry(track) {
            entry.insert((None, Duration::ZERO));
            self.add(&naming(track, true, &name()));
        }
    }

    /// A device's track.
    fn device(&mut self, name: &'static str) -> (u32, u32) {
        let mut tracks = self.tracks.range((DEVICES, 0)..(DEVICES + 1, 0));
        if let Some((track, _)) = tracks.find(|(_, (device, _))| *device == Some(name)) {
            return *track;
        }
        let track = (DEVICES, self.tracks.range((DEVICES, 0)..(DEVICES + 1, 0)).count() as u32);
        self.tracks.insert(track, (Some(name), Duration::ZERO));
        self.add(&naming(track, true, name));
        track
    }

    /// Adds an event, if there is room for it.
    fn add(&mut self, event: &Json<'_>) {
        let text = serde_json::to_vec(event).expect("it is plain data");
        let length = text.len() as u64 + 2;
        if self.told.is_none() {
            return;
        }
        if length > self.room {
            let at = Duration::from_nanos((event.ts * 1e3) as u64);
            let last = instant((VCPUS, 0), "the trace is full: nothing after this".to_owned(), at);
            let last = serde_json::to_vec(&last).expect("it is plain data");
            self.batch.extend([b",\n", &last[..]].concat());
            let (path, seconds) = (self.path.display(), at.as_secs_f64());
            let word = format!(
                "the trace in {path} is full after {seconds:.3} s: what comes is not in it; give it more with --trace-max"
            );
            return self.tell(word);
        }
        self.room -= length;
        self.batch.extend(b",\n");
        self.batch.extend(text);
    }

    fn flush(&mut self) {
        if let Err(error) = self.write() {
            // What is there shall stay a document, for which the space of what could not be written is enough.
            let _ = self.file.set_len(self.end);
            let _ = self.file.write_all_at(END, self.end);
            let path = self.path.display();
            self.tell(format!(
                "cannot write the trace to {path}: {error}; what comes is not in it"
            ));
        }
    }

    /// Writes what has come together over the document's end, and a new end behind it.
    fn write(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let length = self.batch.len() as u64;
        self.batch.extend(END);
        let batch = std::mem::take(&mut self.batch);
        self.file.write_all_at(&batch, self.end)?;
        self.end += length;
        Ok(())
    }

    fn tell(&mut self, word: String) {
        if let Some(told) = self.told.take() {
            told(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_SHUTDOWN};

    use super::*;
    use crate::last_exits::Request;

    fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn exit(vcpu: u8, at: u64, took: u64) -> Record {
        let request = Request { space: Space::Port, addr: 0x3F8, size: 1, write: true, len: 1 };
        let exit = LastExit {
            number: at,
            rip: Some(0x1007),
            reason: KVM_EXIT_IO,
            request: Some(request),
            data: None,
        };
        Record::exit(vcpu, millis(at), millis(took), &exit, Some("serial port"), b"A")
    }

    fn events(path: &Path) -> Vec<Value> {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// Pid, tid, kind, name, from and how long in ms.
    type Shown = (u64, u64, String, String, f64, f64);

    fn shown(events: &[Value]) -> Vec<Shown> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let ms = |value: &Value| value.as_f64().unwrap_or(0.0) / 1e3;
        let number = |value: &Value| value.as_u64().unwrap();
        let name = |event: &Value| match event["ph"].as_str() {
            Some("M") => text(&event["args"]["name"]),
            _ => text(&event["name"]),
        };
        let shown = |event: &Value| {
            let (pid, tid) = (number(&event["pid"]), number(&event["tid"]));
            (pid, tid, text(&event["ph"]), name(event), ms(&event["ts"]), ms(&event["dur"]))
        };
        events.iter().map(shown).collect()
    }

    #[test]
    fn tracks_have_names_and_events_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        let file = File::create(&path, 1 << 20, |word| panic!("{word}")).unwrap();
        assert_eq!(events(&path).len(), 5, "a document from the start");
        file.record(Record::Guest { vcpu: 1, from: millis(1), to: millis(4) });
        file.record(exit(1, 4, 2));
        // It has waited for the device until 6.
        file.record(exit(0, 5, 3));
        file.record(Record::Line { at: millis(9), gsi: 4 });
        file.record(Record::Work { number: 2, name: "disk", from: millis(9), to: millis(11) });
        let shutdown = LastExit::of(KVM_EXIT_SHUTDOWN);
        file.record(Record::exit(0, millis(12), millis(0), &shutdown, None, &[]));
        file.finish();
        let all = events(&path);
        let found = shown(&all[5..]);
        let x = |pid, tid, name: &str, from, long| (pid, tid, "X".into(), name.into(), from, long);
        let m = |pid, tid, name: &str| (pid, tid, "M".into(), name.into(), 0.0, 0.0);
        let expected: Vec<Shown> = vec![
            m(1, 1, "vCPU 1"),
            x(1, 1, "guest", 1.0, 3.0),
            m(2, 0, "serial port"),
            x(2, 0, "out 3F8", 4.0, 2.0),
            x(1, 1, "out 3F8", 4.0, 2.0),
            m(1, 0, "vCPU 0"),
            x(2, 0, "out 3F8", 6.0, 2.0),
            x(1, 0, "out 3F8", 5.0, 3.0),
            (4, 0, "i".into(), "line 4".into(), 9.0, 0.0),
            m(3, 2, "disk (2)"),
            x(3, 2, "disk", 9.0, 2.0),
            x(1, 0, "shutdown", 12.0, 0.0),
        ];
        assert_eq!(found, expected);
        let args = json!({ "device": "serial port", "size": 1, "data": "41", "rip": "0x1007", "number": 4 });
        assert_eq!(all[9]["args"], args);
    }

    #[test]
    fn a_file_keeps_its_bound_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        let (told, words) = channel();
        let file = File::create(&path, LEAST, move |word| told.send(word).unwrap()).unwrap();
        (0..10_000).for_each(|at| file.record(exit(0, at, 1)));
        file.finish();
        let length = fs::metadata(&path).unwrap().len();
        assert!((LEAST / 2..=LEAST).contains(&length), "{length}");
        let events = events(&path);
        assert_eq!(events.last().unwrap()["name"], "the trace is full: nothing after this");
        let words: Vec<_> = words.iter().collect();
        assert!(words.len() == 1 && words[0].contains("is full after 0.0"), "{words:?}");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let create = |path: &str, most| File::create(Path::new(path), most, |_| ()).err().unwrap();
        assert!(matches!(create("/dev/null", 1 << 20), Error::NoFile { .. }));
        assert!(matches!(create("/no/such/folder/x", 1 << 20), Error::File { .. }));
        assert!(matches!(create("/dev/null", 1), Error::Small { most: 1 }));
    }

    #[test]
    fn a_file_is_a_document_while_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        let file = File::create(&path, 1 << 30, |word| panic!("{word}")).unwrap();
        for at in 0..20_000 {
            file.record(exit(0, 2 * at, 1));
        }
        // What waits is written without anybody asking for it. One look may fall on a write, and see half of it.
        let look = || serde_json::from_slice::<Vec<Value>>(&fs::read(&path).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        while look().map_or(0, |events| events.len()) < 40_000 {
            assert!(Instant::now() < deadline, "{:?}", look());
        }
        file.finish();
        assert_eq!(events(&path).len(), 5 + 2 + 40_000);
    }
}
