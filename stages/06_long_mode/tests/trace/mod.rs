//! What a trace says about an exit: compared with what the device saw, and with where the guest's instructions are.

use std::fs;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use common::bus::{Bus, Device, ports, shared};
use common::hypercall::{self, DebugExit};
use common::layout::PROGRAM;
use common::memory::Vm;
use common::run::{self, Ending};
use common::trace::{Access, Devices, Event, Sink, Space, Trace, What};
use common::vcpu::Vcpu;
use common::{irqfd, long_mode};
use kvm_bindings::kvm_regs;
use serde_json::Value;
use testkit::PATIENCE;
use vm_memory::Bytes;

/// One access: space, address, whether it writes, and its bytes.
type Seen = (Space, u64, bool, Vec<u8>);

/// Notes each access, and answers with other bytes each time.
struct Recorder {
    space: Space,
    first: u64,
    seen: Arc<Mutex<Vec<Seen>>>,
    answer: u8,
}

impl Recorder {
    fn note(&self, offset: u64, write: bool, data: &[u8]) {
        let seen = (self.space, self.first + offset, write, data.to_vec());
        self.seen.lock().unwrap().push(seen);
    }
}

impl Device for Recorder {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in &mut *data {
            self.answer = self.answer.wrapping_add(7);
            *byte = self.answer;
        }
        self.note(offset, false, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.note(offset, true, data);
    }
}

/// A sink for a test.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<Event>>>);

impl Sink for Events {
    fn take(&mut self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

/// Runs `program` in a machine with a recorder at port 0x80 and one in `memory`.
fn run(program: &[u8], memory: Range<u64>, words: &str, long: bool) -> (Vec<Event>, Vec<Seen>) {
    let kvm = common::kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, 0xA_0000).unwrap();
    let ram = vm.ram();
    ram.write_slice(program, PROGRAM).unwrap();
    irqfd::create_irqchip(&vm).unwrap();
    let mut vcpu = Vcpu::new(&vm, 0).unwrap();
    vcpu.set_supported_cpuid(&kvm).unwrap();
    if long {
        let regs = kvm_regs { rip: PROGRAM.0, ..Default::default() };
        long_mode::enter(&vcpu, &ram, regs).unwrap();
    } else {
        vcpu.start_real_mode(PROGRAM).unwrap();
    }
    let (stop, stopped) = run::stop();
    let seen = Arc::<Mutex<Vec<Seen>>>::default();
    let recorder =
        |space, first| shared(Recorder { space, first, seen: Arc::clone(&seen), answer: 0 });
    let (mut io, mut mmio) = (Bus::new(), Bus::new());
    io.insert("recorder", ports(0x80, 4), recorder(Space::Port, 0x80)).unwrap();
    io.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop))).unwrap();
    mmio.insert("recorder", memory.clone(), recorder(Space::Memory, memory.start)).unwrap();
    let events = Events::default();
    let trace = Arc::new(Trace::default().with_lines(words.parse().unwrap(), events.clone()));
    trace.follow(&mut vcpu, &Devices::of(&io, &mmio)).unwrap();
    let ran = run::run(vec![vcpu], io, mmio, stopped, Some(PATIENCE)).unwrap();
    let ending = ran.ending;
    let events = events.0.lock().unwrap().clone();
    assert_eq!(ending, Ending::Exited(0), "{events:#x?}");
    let seen = seen.lock().unwrap().clone();
    (events, seen)
}

/// The addresses of a guest's instructions that make exits, each as often as it makes one (`accesses.inc`).
fn places(program: &[u8]) -> Vec<u64> {
    let word = |at: usize| u16::from_le_bytes([program[at], program[at + 1]]);
    let table = usize::from(word(2)) - PROGRAM.0 as usize;
    (table..program.len())
        .step_by(4)
        .flat_map(|at| vec![u64::from(word(at)); usize::from(word(at + 2))])
        .collect()
}

/// The accesses among the events, with the address of the instruction and its bytes.
fn accesses(events: &[Event]) -> Vec<(u64, &[u8], &Access)> {
    let told = events.iter().filter_map(|event| match &event.what {
        What::Access(access) => Some((event, access)),
        _ => None,
    });
    told.map(|(event, access)| {
        let bytes = event.instruction.as_ref().map_or(&[][..], |found| &found.bytes);
        (event.registers.linear_rip(), bytes, access)
    })
    .collect()
}

/// The trace of `program` names each access, its answer, and the instruction behind it.
fn names_everything(program: &[u8], memory: Range<u64>, long: bool, mode: &str) {
    let (events, seen) = run(program, memory, "all", long);
    assert_eq!(events[0].what, What::Start { runs: true });
    assert_eq!(events[0].registers.linear_rip(), PROGRAM.0);
    let accesses = accesses(&events);
    assert_eq!(accesses.len() + 1, events.len(), "only the start is no access");

    let told: Vec<u64> = accesses.iter().map(|&(place, ..)| place).collect();
    assert_eq!(told, places(program), "{mode}: {accesses:#x?}");
    for (place, bytes, access) in &accesses {
        let at = (place - PROGRAM.0) as usize;
        assert!(!bytes.is_empty() && program[at..].starts_with(bytes), "{place:#x} {access:x?}");
    }
    let told: Vec<Seen> = accesses
        .iter()
        .filter(|(.., access)| access.device == Some("recorder"))
        .flat_map(|&(.., access)| {
            let seen = |bytes: &[u8]| (access.space, access.addr, access.write, bytes.to_vec());
            access.data.chunks(access.size).map(seen).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(told, seen, "{mode}");
}

#[test]
fn each_exit_of_16_bit_code_is_told_with_its_instruction() {
    names_everything(asm::real::ACCESSES, 0xA_0000..0xA_2000, false, "real16");
}

#[test]
fn each_exit_of_64_bit_code_is_told_with_its_instruction() {
    names_everything(asm::long::ACCESSES, 0xD000_0000..0xD000_2000, true, "long64");
}

#[test]
fn words_leave_out_what_is_not_asked_for() {
    let of = |words| {
        let (events, _) = run(asm::real::ACCESSES, 0xA_0000..0xA_2000, words, false);
        let told = accesses(&events);
        let memory = told.iter().filter(|(.., access)| access.space == Space::Memory).count();
        (told.len() - memory, memory)
    };
    let (io, mmio) = of("all");
    assert!(io > 10 && mmio > 10);
    assert_eq!(
        [of("io"), of("mmio"), of("recorder"), of("debug"), of("nobody")],
        [(io, 0), (0, mmio), (io - 1, mmio), (1, 0), (0, 0),]
    );
}

#[test]
fn single_steps_show_each_instruction_once() {
    // mov ax, 5; dec ax; jnz to it; out 0x80, al; out 0xF4, al
    let program = [0xB8, 5, 0, 0x48, 0x75, 0xFD, 0xE6, 0x80, 0xE6, 0xF4];
    let expected: Vec<u64> = [0x1000, 0x1003, 0x1004, 0x1003, 0x1004, 0x1003, 0x1004, 0x1003]
        .into_iter()
        .chain([0x1004, 0x1003, 0x1004, 0x1006, 0x1008])
        .collect();
    for (words, steps) in [("step", 12), ("step:4", 4), ("step:100,recorder", 11)] {
        let (events, _) = run(&program, 0xA_0000..0xA_2000, words, false);
        let told: Vec<_> = events[1..].iter().map(|event| event.registers.linear_rip()).collect();
        let told_steps = events.iter().filter(|event| matches!(event.what, What::Step(_))).count();
        assert_eq!(told_steps, steps, "{words}");
        assert_eq!(told, expected[..told.len()], "{words}");
        // The OUT is an access where that is asked for, and a step where it is not.
        assert_eq!(told.len(), if words == "step:4" { 4 } else { 12 }, "{words}");
    }
}

#[test]
fn the_lines_tell_what_the_kernel_printed() {
    let ran = crate::stage_06().args(["--trace=serial,every"]).stdin("calc 6*7\nexit\n").run();
    ran.ended(0).stdout_has("calc 6*7\r\n42\r\n");
    assert_eq!(ran.traced_serial(), ran.stdout, "{ran}");
    // In a loop the same is shown twice, and then counted.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.json");
    let options = ["--trace=serial", "--stats", "--trace-file"];
    let short = crate::stage_06().args(options).args([&path]).stdin("calc 6*7\nexit\n").run();
    short.ended(0).stderr_has(" more events like the last line of vCPU 0\n");
    assert!(short.stderr.len() < ran.stderr.len() / 2, "{short}");
    // The table and the file have what the lines have, and signals, which end the machine, are no events.
    let events: Vec<Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let exits = events.iter().filter(|event| event["cat"] == "exit").count() as u64;
    assert_eq!(exits + short.exits("signal"), short.exits("all"), "{short}");
    let sent = events.iter().filter(|event| event["cat"] == "exit" && event["name"] == "out 3F8");
    assert_eq!(sent.count() as u64, short.exits("out 3F8"));
    assert!(short.exits("out 3F8") > short.stdout.len() as u64, "{short}");
}

#[test]
fn words_without_a_meaning_get_one_line() {
    let run = |words: &str| crate::stage_06().args([format!("--trace={words}")]).run();
    run("flop")
        .refused(2, "there is no device \"flop\" to trace; there are: debug exit, serial port");
    run("").refused(2, "a word is empty");
    run("step:0").refused(2, "step:0 is no number of instructions");
    run("rate:x").refused(2, "rate:x is no number of lines");
}

#[test]
fn a_terminal_gets_colours_and_whole_line_ends_and_a_pipe_neither() {
    let words = ["--trace=serial", "--exit-when", "Type help"];
    let mut guest = crate::stage_06().args(words).on_terminal();
    assert_eq!(guest.end(), 0);
    let printed = guest.printed();
    // The terminal is in raw mode, where a line feed alone leaves the cursor where it is.
    let lines: Vec<_> = printed.split('\n').filter(|line| line.contains("serial port")).collect();
    assert!(lines.len() > 10, "{printed:?}");
    assert!(lines.iter().all(|line| line.ends_with(" us\x1b[0m\r")), "{printed:?}");
    let mut guest = crate::stage_06().args(words).env("NO_COLOR", "1").on_terminal();
    assert_eq!(guest.end(), 0);
    assert!(!guest.printed().contains('\x1b'), "{:?}", guest.printed());
    let ran = crate::stage_06().args(words).run();
    ran.ended(0).stderr_has(" us\n");
    assert!(!ran.err().contains(['\x1b', '\r']), "{ran}");
}
