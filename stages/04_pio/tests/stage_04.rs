//! Milestone 4: programs talk through ports, alone and several at once.

mod gdb;
mod trace;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::bus::{Bus, Device, Shared, shared};
use common::hypercall;
use common::layout::PROGRAM;
use common::memory::Vm;
use common::serial;
use common::vcpu::{Exit, Vcpu};
use proptest::prelude::*;
use testkit::{Program, Ran};
use vm_memory::{Bytes, GuestAddress};

const BIN: &str = env!("CARGO_BIN_EXE_04_pio");

fn stage_04<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Program {
    Program::new(BIN).args(args)
}

fn run(program: &str) -> Ran {
    stage_04([program]).run()
}

/// A file with these bytes as a guest.
fn guest(dir: &Path, name: &str, code: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, code).unwrap();
    path
}

/// `jmp $`
const SPIN: &[u8] = &[0xEB, 0xFE];

// What the programs print, computed by the test.

fn counter() -> String {
    (1..=20).map(|n| format!("count {n}\n")).collect()
}

fn multiplication() -> String {
    let row = |a: u32| (1..=9).map(|b| format!("{:3}", a * b)).collect::<String>() + "\n";
    (1..=9).map(row).collect()
}

fn fibonacci() -> String {
    let mut pair = (0u64, 1u64);
    let numbers = std::iter::from_fn(|| {
        let (n, next) = pair;
        pair = (next, n + next);
        u32::try_from(n).ok()
    });
    numbers.map(|n| format!("{n}\n")).collect()
}

fn primes() -> String {
    let primes: Vec<u32> =
        (2..1000).filter(|n| (2..*n).all(|d| !u32::is_multiple_of(*n, d))).collect();
    let line = |line: &[u32]| line.iter().map(|p| format!("{p:4}")).collect::<String>() + "\n";
    let lines: String = primes.chunks(10).map(line).collect();
    format!("{lines}{} primes below 1000\n", primes.len())
}

fn matrix() -> String {
    let left = [[1, 2, 3], [4, 5, 6], [7, 8, 9]];
    let right = [[9, 8, 7], [6, 5, 4], [3, 2, 1]];
    let mut product = [[0; 3]; 3];
    for (row, line) in product.iter_mut().enumerate() {
        for (column, element) in line.iter_mut().enumerate() {
            *element = (0..3).map(|k| left[row][k] * right[k][column]).sum();
        }
    }
    let text = |matrix: [[i32; 3]; 3]| -> String {
        let row = |row: &[i32; 3]| row.map(|n| format!("{n:5}")).concat() + "\n";
        matrix.iter().map(row).collect()
    };
    format!("{}times\n{}is\n{}", text(left), text(right), text(product))
}

#[test]
fn programs_print_what_they_compute() {
    let all = [
        ("counter", counter()),
        ("multiplication", multiplication()),
        ("fibonacci", fibonacci()),
        ("primes", primes()),
        ("matrix", matrix()),
    ];
    for (name, expected) in all {
        let ran = run(name);
        ran.ended(0).stderr_has("ended with code 0");
        assert_eq!(ran.out(), expected, "{name}");
    }
}

#[test]
fn hello_is_what_runs_without_arguments() {
    let ran = stage_04::<&str>([]).run();
    ran.ended(0).stdout_has("Hello from a virtual machine!\n").stderr_has("ended by HLT");
    assert_eq!(ran.stdout, run("hello").stdout);
}

#[test]
fn every_program_of_the_list_runs() {
    let list = stage_04(["--list"]).run();
    let text = list.ended(0).out();
    let names: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let known = "hello counter multiplication fibonacci primes matrix strings echo upper reverse";
    assert_eq!(names, known.split(' ').collect::<Vec<_>>());
    for name in names {
        let ran = stage_04([name]).stdin("eight letters\n").run();
        ran.ended(0);
        assert!(ran.stdout.ends_with(b"\n"), "{ran}");
    }
}

/// One access to a device: its offset, what was written, or how much was read.
#[derive(Clone, Debug, PartialEq)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// A device that remembers what the guest did. Reads give `next` and then the numbers that follow.
struct Recorder {
    accesses: Vec<Access>,
    next: u8,
}

impl Device for Recorder {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.accesses.push(Access::Read(offset, data.len()));
        data.fill(self.next);
        self.next = self.next.wrapping_add(1);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.accesses.push(Access::Write(offset, data.to_vec()));
    }
}

/// A guest whose devices are recorders, run until it halts or writes to the hypercall's exit.
struct Machine {
    vcpu: Vcpu,
    serial: Shared<Recorder>,
    hypercall: Shared<Recorder>,
    /// The size and the length of the data of each IN.
    ins: Vec<(usize, usize)>,
}

impl Machine {
    fn run(code: &[u8], first_read: u8) -> Self {
        let kvm = common::kvm::open().unwrap();
        let vm = Vm::with_ram(&kvm, 0x11_0000).unwrap();
        vm.ram().write_slice(code, PROGRAM).unwrap();
        let mut bus = Bus::new();
        let mut recorder = |name, ports: Range<u64>| {
            let device = shared(Recorder { accesses: vec![], next: first_read });
            bus.insert(name, ports, device.clone()).unwrap();
            device
        };
        let serial = recorder("serial", serial::PORTS);
        let hypercall = recorder("hypercall", hypercall::PORTS);
        let mut vcpu = Vcpu::new(&vm, 0).unwrap();
        vcpu.set_supported_cpuid(&kvm).unwrap();
        vcpu.start_real_mode(PROGRAM).unwrap();
        let mut ins = vec![];
        loop {
            match vcpu.run().unwrap() {
                Exit::IoOut { port, size, data } => {
                    bus.write_each(port.into(), size, data);
                    if u64::from(port) == hypercall::PORTS.start {
                        break;
                    }
                }
                Exit::IoIn { port, size, data } => {
                    ins.push((size, data.len()));
                    bus.read_each(port.into(), size, data);
                }
                Exit::Hlt => break,
                exit => panic!("{exit}"),
            }
        }
        Self { vcpu, serial, hypercall, ins }
    }

    fn memory<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.vcpu.vm().ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// What was written to `offset`, in order.
fn written(device: &Shared<Recorder>, offset: u64) -> Vec<Vec<u8>> {
    let accesses = device.lock().unwrap().accesses.clone();
    let writes = accesses.into_iter().filter_map(|access| match access {
        Access::Write(at, data) if at == offset => Some(data),
        _ => None,
    });
    writes.collect()
}

#[test]
fn hello_polls_the_status_before_each_letter() {
    // Bit 5 of the status is set from 0x20 on: the first read finds the port ready, the 33rd not.
    let machine = Machine::run(asm::real::HELLO, 0x20);
    let accesses = machine.serial.lock().unwrap().accesses.clone();
    let mut text = vec![];
    let mut ready = false;
    let mut status = 0x20u8;
    for access in accesses {
        match access {
            Access::Read(5, 1) => {
                ready = status & 0x20 != 0;
                status = status.wrapping_add(1);
            }
            Access::Write(0, byte) => {
                assert!(ready, "a letter was sent to a port that was busy");
                ready = false;
                text.extend(byte);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(status > 0x60, "the guest waited while the port was busy");
    assert_eq!(text, run("hello").stdout);
}

#[test]
fn string_output_has_the_size_of_its_instruction() {
    let machine = Machine::run(asm::real::STRINGS, 0xFF);
    // THR_EMPTY is polled from the recorder, which counts on from 0xFF: only OUTSB doesn't poll.
    let serial: Vec<u8> = written(&machine.serial, 0).concat();
    assert!(serial.starts_with(b"rep outsb: one instruction printed this line\n"));
    let words = b"rep outsw: two characters an access\n".chunks(2);
    let doubles = b"rep outsd: four characters an access...\n".chunks(4);
    let expected: Vec<_> = words.chain(doubles).map(<[u8]>::to_vec).collect();
    assert_eq!(written(&machine.hypercall, 4), expected);
    assert_eq!(written(&machine.hypercall, 0), [[0; 4]]);
}

#[test]
fn ports_without_a_device_read_as_ones_in_each_width() {
    let machine = Machine::run(asm::real::STRINGS, 0xFF);
    assert_eq!(machine.memory::<4>(0x1800), 0xFF_u32.to_le_bytes());
    assert_eq!(machine.memory::<4>(0x1804), 0xFFFF_u32.to_le_bytes());
    assert_eq!(machine.memory::<4>(0x1808), u32::MAX.to_le_bytes());
    let widths: Vec<_> = machine.ins.iter().take(3).collect();
    assert_eq!(widths, [&(1, 1), &(2, 2), &(4, 4)]);
    run("strings").ended(0).stdout_has("         255       65535  4294967295\n");
}

#[test]
fn string_input_comes_with_one_exit_and_a_count() {
    let machine = Machine::run(asm::real::REVERSE, 10);
    assert_eq!(machine.ins, [(1, 8)], "size 1, count 8");
    let keys: Vec<u8> = (10..18).collect();
    let reversed: Vec<u8> = keys.iter().rev().copied().chain([b'\n']).collect();
    assert_eq!(written(&machine.hypercall, 4).concat(), reversed);
    let reads = machine.hypercall.lock().unwrap().accesses.clone();
    assert_eq!(reads[..8], vec![Access::Read(8, 1); 8]);

    let ran = stage_04(["reverse"]).stdin("stressed").run();
    assert_eq!(ran.ended(0).out(), "desserts\n");
    // 0xFF eight times: what a getchar of one byte gives at the end of input.
    let ran = stage_04(["reverse"]).stdin("ab").run();
    assert_eq!(ran.ended(0).stdout, b"\xFF\xFF\xFF\xFF\xFF\xFFba\n");
}

#[test]
fn echo_sends_back_every_byte_until_ctrl_d() {
    let all: Vec<u8> = (0..=255).filter(|&byte| byte != 4).collect();
    let text = all.repeat(20);
    let ran = stage_04(["echo"]).stdin(text.clone()).run();
    ran.ended(0);
    assert!(ran.stdout == text, "{} of {} bytes", ran.stdout.len(), text.len());
    let ran = stage_04(["echo"]).stdin("one\x04two").run();
    assert_eq!(ran.ended(0).out(), "one");
    assert_eq!(run("echo").ended(0).out(), "");
}

#[test]
fn getchar_and_putchar_pass_all_bytes() {
    let all: Vec<u8> = (0..=255).collect();
    let text = all.repeat(30);
    let ran = stage_04(["upper"]).stdin(text.clone()).run();
    assert!(ran.ended(0).stdout == text.to_ascii_uppercase());
}

#[test]
fn a_program_that_reads_nothing_leaves_stdin_to_others() {
    let script = format!("{BIN} counter; cat");
    let ran = Program::new("sh").args(["-c", &script]).stdin("for cat\n").run();
    assert_eq!(ran.ended(0).out(), counter() + "for cat\n");
}

/// The lines of each program, in order, out of what all of them printed.
fn untangle(out: &str, programs: &[(&str, String)]) -> BTreeMap<String, Vec<String>> {
    let mut lines = BTreeMap::<_, Vec<_>>::new();
    for line in out.lines() {
        let owner = programs.iter().find(|(_, text)| text.lines().any(|own| own == line));
        let (name, _) = owner.unwrap_or_else(|| panic!("no program prints {line:?}"));
        lines.entry(name.to_string()).or_default().push(line.to_owned());
    }
    lines
}

#[test]
fn several_guests_run_at_once_and_their_lines_stay_whole() {
    // None of these shares a line with another.
    let programs =
        [("counter", counter()), ("fibonacci", fibonacci()), ("multiplication", multiplication())];
    let ran = stage_04(programs.iter().map(|(name, _)| name)).run();
    ran.ended(0);
    let lines = untangle(&ran.out(), &programs);
    for (id, (name, text)) in programs.iter().enumerate() {
        assert_eq!(lines[*name], text.lines().collect::<Vec<_>>(), "{name}");
        ran.stderr_has(&format!("vCPU {id}, {name}: ended with code 0"));
    }
    assert!(!ran.stdout.contains(&0x1B), "no colours into a pipe");
}

#[test]
fn guests_beyond_the_first_megabyte_run_as_well() {
    // 16 windows of 64 KiB are the first megabyte, which is all that a selector reaches.
    let count = 20;
    let ran = stage_04(vec!["counter"; count]).run();
    ran.ended(0);
    let mut times = BTreeMap::<String, usize>::new();
    for line in ran.out().lines() {
        *times.entry(line.to_owned()).or_default() += 1;
    }
    let expected: BTreeMap<_, _> = counter().lines().map(|l| (l.to_owned(), count)).collect();
    assert_eq!(times, expected);
}

#[test]
fn on_a_terminal_each_guest_has_its_colour() {
    let mut terminal =
        stage_04(["counter", "fibonacci"]).env("TERM", "xterm").env("NO_COLOR", "").on_terminal();
    assert_eq!(terminal.end(), 0);
    let printed = terminal.printed();
    let coloured = |colour: &str, text: &str| {
        text.lines().all(|line| printed.contains(&format!("\x1b[{colour}m{line}\x1b[0m\r\n")))
    };
    assert!(coloured("32", &counter()) && coloured("36", &fibonacci()), "{printed:?}");
}

#[test]
fn as_many_guests_run_as_a_vcpu_number_can_count() {
    let most = common::kvm::open().unwrap().get_max_vcpus().min(256);
    let ran = stage_04(vec!["hello"; most]).run();
    ran.ended(0);
    assert_eq!(ran.err().matches("ended by HLT").count(), most, "{ran}");
}

#[test]
fn too_many_guests_are_refused_with_the_limit() {
    let most = common::kvm::open().unwrap().get_max_vcpus().min(256);
    let limit =
        format!("{} programs are too many: a machine here has at most {most} vCPUs", most + 1);
    stage_04(vec!["hello"; most + 1]).run().refused(2, &limit);
}

#[test]
fn a_person_types_and_the_guest_answers() {
    let mut terminal = stage_04(["upper"]).on_terminal();
    terminal.send("first\n").expect("FIRST").send("and second\n").expect("AND SECOND");
    terminal.send("\x04");
    assert_eq!(terminal.end(), 0);

    let mut terminal = stage_04(["echo"]).on_terminal();
    // Once from the terminal, once from the guest.
    terminal.send("twice\n").expect("twice\r\n").expect("twice\r\n").send("\x04");
    assert_eq!(terminal.end(), 0);
}

#[test]
fn what_a_guest_has_printed_is_shown_while_it_computes() {
    let dir = tempfile::tempdir().unwrap();
    // mov al, '?'; mov dx, 0x3F8; out dx, al; jmp $
    let code = [&[0xB0, b'?', 0xBA, 0xF8, 0x03, 0xEE], SPIN].concat();
    let mut terminal = stage_04([guest(dir.path(), "asks.bin", &code)]).on_terminal();
    terminal.expect("?");
    // And Ctrl-C ends it, though it never exits.
    terminal.send("\x03");
    assert_eq!(terminal.end(), -1, "ended by SIGINT");

    let ran = stage_04([dir.path().join("asks.bin")]).args(["--timeout", "2"]).run();
    ran.ended(4).stderr_has("--timeout");
    assert_eq!(ran.out(), "?");
}

#[test]
fn a_guest_that_waits_for_a_key_ends_in_time_too() {
    let mut terminal = stage_04(["upper", "--timeout", "1"]).on_terminal();
    terminal.expect("--timeout");
    assert_eq!(terminal.end(), 4);
}

#[test]
fn the_time_limit_holds_where_nobody_reads() {
    let dir = tempfile::tempdir().unwrap();
    // mov dx, 0x3F8; again: mov al, 'x'; out dx, al; jmp again
    let flood = guest(dir.path(), "flood.bin", b"\xBA\xF8\x03\xB0x\xEE\xEB\xFB");
    stage_04([&flood]).args(["--timeout", "1"]).unread().run().ended(4);
    stage_04([&flood, &flood]).args(["--timeout", "1"]).unread().run().ended(4);
}

#[test]
fn the_time_limit_ends_all_guests_and_keeps_what_they_printed() {
    let dir = tempfile::tempdir().unwrap();
    let spin = guest(dir.path(), "spin.bin", SPIN);
    let mut args = vec![PathBuf::from("counter"), spin];
    args.extend(["--timeout", "4"].map(PathBuf::from));
    let ran = stage_04(args).run();
    ran.ended(4).stderr_has("1 of 2 programs were stopped");
    assert_eq!(ran.out(), counter());
    assert!(ran.took >= Duration::from_secs(4));
}

#[test]
fn a_guest_says_itself_how_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let debug_exit = |code: u8| [0xB0, code, 0xE6, 0xF4]; // mov al, code; out 0xF4, al
    let path = guest(dir.path(), "debug.bin", &debug_exit(0));
    stage_04([&path]).run().ended(0);
    fs::write(&path, debug_exit(3)).unwrap();
    stage_04([&path]).run().ended(1).stderr_has("says that it failed, with code 3");
    // mov eax, 0x12345678; mov dx, 0x500; out dx, eax
    let code = [0x66, 0xB8, 0x78, 0x56, 0x34, 0x12, 0xBA, 0x00, 0x05, 0x66, 0xEF];
    fs::write(&path, code).unwrap();
    let failed = format!("with code {}", 0x1234_5678);
    stage_04([&path]).run().ended(1).stderr_has(&failed);
    // One that fails among others makes the whole fail.
    let ran = stage_04([PathBuf::from("counter"), path]).run();
    assert_eq!(ran.ended(1).stderr_has(&failed).out(), counter());
}

#[test]
fn a_crash_is_one_clear_line_with_an_autopsy() {
    let dir = tempfile::tempdir().unwrap();
    let path = guest(dir.path(), "fault.bin", asm::real::TRIPLE_FAULT);
    let cause = "cause  invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6 is";
    let ran = stage_04([&path]).run();
    ran.ended(1).stderr_has("fault.bin: crashed: KVM_EXIT_SHUTDOWN, a triple fault");
    ran.stderr_has("\n-- autopsy: vCPU 0, triple fault --").stderr_has(cause);
    assert_eq!(ran.out(), "");
    // Where it happened, unless KVM has reset the vCPU: then no address rather than a wrong one.
    assert!(!ran.err().contains("F000:FFF0"), "{ran}");
    // One of several, in a window of its own, after exits whose answers it gets again when it is run a second time.
    // mov al, 'X'; mov dx, 0x3F8; out dx, al; in al, dx
    let exits = [0xB0, b'X', 0xBA, 0xF8, 0x03, 0xEE, 0xEC];
    let mut code = [&exits, asm::real::TRIPLE_FAULT].concat();
    // The address that LIDT reads.
    code[exits.len() + 3] += exits.len() as u8;
    fs::write(&path, code).unwrap();
    let ran = stage_04([PathBuf::from("counter"), path]).run();
    ran.ended(1)
        .stderr_has("\n-- autopsy: vCPU 1, ")
        .stderr_has(cause)
        .stderr_has("-> 1000:1014  ");
    ran.stderr_has("in 3F8 -> ").stdout_has("X\n");
}

#[test]
fn a_guest_that_waits_for_an_absent_device_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    // in al, 0x64; test al, 0x80; jnz back; hlt
    let polls = guest(dir.path(), "polls.bin", &[0xE4, 0x64, 0xA8, 0x80, 0x75, 0xFA, 0xF4]);
    let ran = stage_04([&polls]).args(["--watchdog", "0.5"]).run();
    ran.ended(1)
        .stderr_has("polls.bin: crashed: it hangs, asking devices the same again and again")
        .stderr_has("cause  it polls port 0x64, where no device is, which reads 0xff each time.");
}

#[test]
fn files_that_are_no_programs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let most = 0x1_0000 - 0x1000;
    fs::write(at("empty.bin"), []).unwrap();
    fs::write(at("big.bin"), vec![0xF4; most + 1]).unwrap();
    fs::write(at("fits.bin"), vec![0xF4; most]).unwrap();
    fs::File::create(at("huge.bin")).unwrap().set_len(1 << 40).unwrap();

    run(&at("none.bin")).refused(2, "neither a program (04_pio --list names them) nor a file");
    run("helo").refused(2, "neither a program");
    run(&at("empty.bin")).refused(2, "empty.bin: the file is empty");
    run(&at("big.bin")).refused(2, "has 61441 bytes, expected at most 61440");
    run(&at("huge.bin")).refused(2, "expected at most 61440");
    run(&at("")).refused(2, "this is a directory");
    run("/dev/zero").refused(2, "this is a character device");
    // One bad among good ones: nothing runs.
    stage_04(["hello".to_owned(), at("empty.bin")]).run().refused(2, "the file is empty");
    run(&at("fits.bin")).ended(0);
}

#[test]
fn bad_options_are_usage_errors() {
    for time in ["0", "x", "1e99", ""] {
        stage_04(["--timeout", time]).run().ended(2).stderr_has("--timeout <SECS>");
    }
    for argument in ["", "--what", "--timeout"] {
        stage_04([argument]).run().ended(2).stderr_has("error: ").stderr_has("--help");
    }
}

#[test]
fn a_full_disk_is_told() {
    // Several guests have several lines to say on stderr.
    let both = Program::new(BIN).args(["hello", "counter"]).redirected("> /dev/full").run();
    both.ended(3).stderr_has("error: cannot write to stdout: No space left on device");
    Program::full_disk(BIN, &["hello"]);
    Program::full_disk(BIN, &["--list"]);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    for programs in ["primes", "primes counter"] {
        let script = format!("{BIN} {programs} | head -n 1");
        let ran = Program::new("sh").args(["-c", &script]).run();
        ran.ended(0);
        assert!(!ran.err().contains("panicked") && !ran.err().contains("error"), "{ran}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]
    /// Whatever the bytes are: a halt, a crash, or an endless loop, one line about it, and an autopsy of 80 columns.
    #[test]
    fn random_bytes_end_in_one_of_four_ways(code in prop::collection::vec(any::<u8>(), 1..600)) {
        let dir = tempfile::tempdir().unwrap();
        let path = guest(dir.path(), "random.bin", &code);
        let ran = stage_04([&path]).args(["--timeout", "0.2"]).run();
        prop_assert!(matches!(ran.code(), Some(0 | 1 | 4)), "{ran}");
        // The autopsy has a limit of its own.
        let err = ran.err();
        prop_assert!(err.lines().skip(1).all(|line| line.chars().count() <= 80), "{ran}");
        prop_assert!(!ran.err().contains("panicked"), "{ran}");
    }
}
