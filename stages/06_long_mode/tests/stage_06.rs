//! Milestone 6: a guest climbs to long mode, takes exceptions and interrupts, enters ring 3, and a
//! Rust kernel runs a shell there.

mod autopsy;
mod gdb;
mod trace;

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

use common::bus::{Bus, shared};
use common::deadline::Deadline;
use common::irqfd::{self, Irqfd};
use common::layout::{BOOT_INFO, PROGRAM, RECORDS};
use common::memory::{Ram, Vm};
use common::regs::{Mode, Registers};
use common::uart::{self, Uart};
use common::vcpu::{Exit, Vcpu};
use common::{elf, long_mode};
use guests::boot::{
    BootInfo, DEBUG_EXIT_PORT, E820_RAM, E820Entry, KERNEL_LIMIT, KERNEL_START, MAGIC, PANIC_EXIT,
};
use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, kvm_irqchip, kvm_regs};
use testkit::{Printed, Program, Ran};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 64 << 20;

fn stage_06() -> Program {
    Program::new(env!("CARGO_BIN_EXE_06_long_mode"))
}

/// Runs the kernel with `script` typed into its shell.
fn shell(script: &str) -> Ran {
    stage_06().stdin(script).run()
}

/// The machine of stage 06 with its loop in the test's hands, so that its registers can be read at
/// the end.
struct Machine {
    vcpu: Vcpu,
    ram: Ram,
    ports: Bus,
    paper: Printed,
}

impl Machine {
    fn new() -> Self {
        let kvm = common::kvm::open().unwrap();
        let vm = Vm::with_ram(&kvm, MEMORY).unwrap();
        irqfd::create_irqchip(&vm).unwrap();
        irqfd::create_pit(&vm).unwrap();
        let vcpu = Vcpu::new(&vm, 0).unwrap();
        vcpu.set_supported_cpuid(&kvm).unwrap();
        let paper = Printed::default();
        let line = Irqfd::new(&vm, uart::COM1_IRQ).unwrap();
        let mut ports = Bus::new();
        let com1 = u64::from(uart::COM1)..u64::from(uart::COM1 + uart::PORTS);
        ports.insert("serial port", com1, shared(Uart::new(line, paper.clone()))).unwrap();
        Self { ram: vm.ram(), vcpu, ports, paper }
    }

    /// A machine that starts `program` in real mode.
    fn real_mode(program: &[u8]) -> Self {
        let machine = Self::new();
        machine.ram.write_slice(program, PROGRAM).unwrap();
        machine.vcpu.start_real_mode(PROGRAM).unwrap();
        machine
    }

    /// A machine that starts `program` in long mode.
    fn long_mode(program: &[u8]) -> Self {
        let machine = Self::new();
        machine.ram.write_slice(program, PROGRAM).unwrap();
        let regs = kvm_regs { rip: PROGRAM.0, ..Default::default() };
        long_mode::enter(&machine.vcpu, &machine.ram, regs).unwrap();
        machine
    }

    /// A machine that starts the Rust kernel with these ranges of memory and this magic number.
    fn kernel(magic: u64, map: &[(u64, u64, u32)]) -> Self {
        let machine = Self::new();
        let allowed = KERNEL_START..KERNEL_LIMIT;
        let image = elf::load(&machine.ram, &mut Cursor::new(guests::KERNEL), allowed).unwrap();
        let at = BOOT_INFO.0;
        let e820 = at + size_of::<BootInfo>() as u64;
        let info = BootInfo { magic, e820, e820_count: map.len() as u32, loader: 0 };
        let mut bytes = info.to_bytes().to_vec();
        for &(base, length, kind) in map {
            bytes.extend(E820Entry { base, length, kind, attributes: 0 }.to_bytes());
        }
        machine.ram.write_slice(&bytes, BOOT_INFO).unwrap();
        let regs = kvm_regs { rip: image.entry.0, rdi: at, ..Default::default() };
        long_mode::enter(&machine.vcpu, &machine.ram, regs).unwrap();
        machine
    }

    /// Runs until the guest writes its exit code, which is returned. Nothing else may end it: no
    /// HLT, no triple fault.
    fn run(&mut self) -> u8 {
        self.run_until(None).unwrap()
    }

    /// Runs until the guest writes its exit code or has printed `text`.
    fn run_until(&mut self, text: Option<&str>) -> Option<u8> {
        let start = Instant::now();
        loop {
            // Asks again and again, for a guest that sleeps in HLT exits only for this.
            let deadline = Deadline::new(Some(Duration::from_millis(20))).unwrap();
            loop {
                match self.vcpu.run().unwrap() {
                    Exit::IoOut { port: DEBUG_EXIT_PORT, data, .. } => return Some(data[0]),
                    Exit::IoOut { port, size, data } => {
                        data.chunks(size).for_each(|data| {
                            self.ports.write(port.into(), data);
                        });
                    }
                    Exit::IoIn { port, size, data } => {
                        data.chunks_mut(size).for_each(|data| {
                            self.ports.read(port.into(), data);
                        });
                    }
                    Exit::Interrupted => {}
                    exit => panic!("{exit:x?} after\n{}", self.paper.text()),
                }
                if deadline.passed() {
                    break;
                }
            }
            if text.is_some_and(|text| self.paper.text().contains(text)) {
                return None;
            }
            assert!(start.elapsed() < testkit::PATIENCE, "no end; printed:\n{}", self.paper.text());
        }
    }

    fn word(&self, at: u64) -> u32 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn long(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// What `RECORD_MODE` left: CR0, CR3, CR4, EFER, CS.
    fn record(&self, index: u64) -> [u32; 5] {
        self.ram.read_obj(GuestAddress(RECORDS.0 + index * 20)).unwrap()
    }
}

const PE: u32 = 1 << 0;
const PG: u32 = 1 << 31;
const PSE: u32 = 1 << 4;
const PAE: u32 = 1 << 5;
const LME: u32 = 1 << 8;
const LMA: u32 = 1 << 10;

#[test]
fn the_climb_passes_every_mode_and_pages_mean_what_each_says() {
    let mut machine = Machine::real_mode(asm::real::CLIMB);
    assert_eq!(machine.run(), 0);

    // Which bits are set at each stop: CR0, CR4, EFER.
    let expected = [
        (0, 0, 0),
        (PE, 0, 0),
        (PE | PG, PSE, 0),
        (PE | PG, PSE | PAE, 0),
        (PE | PG, PSE | PAE, LME | LMA),
    ];
    let mut tables = vec![];
    for (index, (cr0, cr4, efer)) in (0..).zip(expected) {
        let record = machine.record(index);
        assert_eq!(record[0] & (PE | PG), cr0, "CR0 at stop {index}");
        assert_eq!(record[2] & (PSE | PAE), cr4, "CR4 at stop {index}");
        assert_eq!(record[3] & (LME | LMA), efer, "EFER at stop {index}");
        tables.push(record[1]);
    }
    assert_eq!(tables[..2], [0, 0]);
    tables.dedup();
    assert_eq!(tables.len(), 4, "three kinds of tables after none");

    // Written at 1 GiB, 2 GiB and 256 GiB; this machine has 64 MiB.
    for (at, text) in [(0x40_0000, b"PSE!"), (0x60_0000, b"PAE!"), (0x80_0000, b"LONG")] {
        assert_eq!(machine.word(at).to_le_bytes(), *text);
    }

    let registers = Registers::of(&machine.vcpu).unwrap();
    assert_eq!(registers.mode(), Mode::Long);
    let printed = machine.paper.text();
    let steps = ["real mode", "protected mode", "32-bit paging", "PAE paging", "long mode"];
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines.len(), steps.len());
    assert!(lines.iter().zip(steps).all(|(line, step)| line.starts_with(step)), "{printed}");
}

#[test]
fn the_host_enters_the_state_in_which_the_climb_ends() {
    let mut climb = Machine::real_mode(asm::real::CLIMB);
    let mut direct = Machine::long_mode(asm::long::DIRECT);
    // Before its first instruction.
    assert_eq!(Registers::of(&direct.vcpu).unwrap().mode(), Mode::Long);
    assert_eq!((climb.run(), direct.run()), (0, 0));

    let (ours, theirs) = (direct.record(4), climb.record(4));
    for (index, mask) in [(0, PE | PG), (2, PAE), (3, LME | LMA)] {
        assert_eq!(ours[index] & mask, mask);
        assert_eq!(theirs[index] & mask, mask);
    }
    let segments = [&direct, &climb].map(|machine| machine.vcpu.sregs().unwrap().cs);
    assert!(segments.iter().all(|cs| (cs.l, cs.db, cs.dpl, cs.present) == (1, 0, 0, 1)));
    assert_eq!(direct.paper.text().lines().count(), 1);

    // QEMU 10's emulated SVM lets a guest see its host's MCE in CR4, after these.
    for (how, cr4) in [("direct", "cr4 PAE "), ("climb", "cr4 PSE PAE ")] {
        stage_06().args([how]).run().ended(0).stderr_has(cr4).stderr_has("efer LME LMA");
    }
}

#[test]
fn exceptions_are_caught_with_what_the_processor_says_of_them() {
    let mut machine = Machine::long_mode(asm::long::EXCEPTIONS);
    assert_eq!(machine.run(), 0);
    assert_eq!(machine.long(RECORDS.0), 6);
    let records: Vec<[u64; 4]> = (1..=6)
        .map(|index| machine.ram.read_obj(GuestAddress(RECORDS.0 + index * 32)).unwrap())
        .collect();
    let vectors: Vec<_> = records.iter().map(|record| record[0]).collect();
    assert_eq!(vectors, [0, 3, 6, 13, 14, 8]);
    let codes: Vec<_> = records.iter().map(|record| record[1]).collect();
    assert_eq!(codes, [0, 0, 0, 0x1230, 2, 0], "a selector, and a write to no page");
    assert_eq!(records[4][3], 0x40_0000_0000, "CR2 is the address that was written");
    assert_eq!(records[5][3], 0x40_0000_0000 - 8, "CR2 is where the frame could not be pushed");

    // RIP is at the instruction, but behind a breakpoint.
    let program = asm::long::EXCEPTIONS;
    let at = |rip: u64, bytes: &[u8]| program[(rip - PROGRAM.0) as usize..].starts_with(bytes);
    assert!(at(records[0][2], &[0xF7, 0xF1]), "div ecx");
    assert!(at(records[1][2] - 1, &[0xCC]), "int3");
    assert!(at(records[2][2], &[0x0F, 0x0B]), "ud2");
    assert!(at(records[3][2], &[0x8E, 0xD8]), "mov ds, ax");
    assert!(at(records[4][2], &[0x88, 0x03]), "mov [rbx], al");
    assert_eq!(machine.paper.text().matches("  caught vector ").count(), 6);
}

#[test]
fn the_timer_interrupts_through_the_controllers_in_kvm() {
    let mut machine = Machine::long_mode(asm::long::INTERRUPTS);
    let start = Instant::now();
    // Panics if HLT exits.
    assert_eq!(machine.run(), 0);
    assert_eq!(machine.long(RECORDS.0), 10);
    assert!(start.elapsed() >= Duration::from_millis(90), "nine whole periods of 10 ms");

    let fd = machine.vcpu.vm().fd();
    let pit = fd.get_pit2().unwrap();
    assert_eq!((pit.channels[0].count, pit.channels[0].mode), (11932, 2));
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    fd.get_irqchip(&mut chip).unwrap();
    #[expect(unsafe_code, reason = "a C union; its tag is the chip_id that we asked for")]
    // SAFETY: KVM has filled it in for this chip_id, and any bytes are valid.
    let pic = unsafe { chip.chip.pic };
    assert_eq!((pic.irq_base, pic.imr, pic.isr), (32, 0xFE, 0), "moved, masked, acknowledged");
}

#[test]
fn ring_3_is_entered_and_left_by_syscall_by_int_and_by_a_fault() {
    let mut machine = Machine::long_mode(asm::long::RINGS);
    assert_eq!(machine.run(), 0);
    let [syscall_cs, syscall_rip, int_cs, int_from, fault_code, fault_rip, fault_from]: [u64; 7] =
        machine.ram.read_obj(RECORDS).unwrap();
    let (kernel, user) = (0x08, 0x23);
    assert_eq!(machine.long(0x20_1000), user, "what the program read, and wrote itself");
    assert_eq!((syscall_cs, int_cs), (kernel, kernel));
    assert_eq!((int_from, fault_from, fault_code), (user, user, 0));
    // The bytes before and at these addresses are the instructions that led there.
    let byte = |at| machine.ram.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!([byte(syscall_rip - 2), byte(syscall_rip - 1)], [0x0F, 0x05], "syscall");
    assert_eq!(byte(fault_rip), 0xF4, "hlt");
    // It is back in ring 0 at the end.
    assert_eq!(machine.vcpu.sregs().unwrap().cs.dpl, 0);
}

/// What the page tables say of a page: all levels together.
#[derive(Clone, Copy)]
struct Page {
    virt: u64,
    phys: u64,
    write: bool,
    user: bool,
    execute: bool,
}

/// Every page that the tables at `cr3` map.
fn pages(machine: &Machine, cr3: u64) -> Vec<Page> {
    let mut pages = vec![];
    let all = Page { virt: 0, phys: cr3, write: true, user: true, execute: true };
    let mut tables = vec![(all, 39)];
    while let Some((above, shift)) = tables.pop() {
        for index in 0..512 {
            let entry = machine.long((above.phys & !0xFFF) + index * 8);
            if entry & 1 == 0 {
                continue;
            }
            let page = Page {
                virt: above.virt | index << shift,
                phys: entry & 0x000F_FFFF_FFFF_F000,
                write: above.write && entry & 2 != 0,
                user: above.user && entry & 4 != 0,
                execute: above.execute && entry >> 63 == 0,
            };
            if shift == 12 || shift == 21 && entry & 0x80 != 0 {
                pages.push(page);
            } else {
                tables.push((page, shift - 9));
            }
        }
    }
    pages
}

#[test]
fn the_kernel_keeps_itself_and_its_programs_in_their_pages() {
    let mut machine =
        Machine::kernel(MAGIC, &[(0, 0x9_FC00, 1), (0x10_0000, MEMORY - 0x10_0000, 1)]);
    assert_eq!(machine.run_until(Some("> ")), None);
    let sregs = machine.vcpu.sregs().unwrap();
    let has = |register: u64, bit: u32| register >> bit & 1 == 1;
    assert!(has(sregs.cr0, 16), "WP: the kernel, too, may not write what is read-only");
    assert!(has(sregs.efer, 0) && has(sregs.efer, 11), "syscall and NX are switched on");
    assert!(sregs.tr.base >= KERNEL_START && sregs.idt.base >= KERNEL_START, "its own TSS and IDT");

    // The shell waits for a key, so its address space is in force.
    let pages = pages(&machine, sregs.cr3);
    assert!(pages.iter().all(|page| !(page.write && page.execute)), "writable and executable");
    assert!(pages.iter().all(|page| page.user == (0x4000_0000..0x8000_0000).contains(&page.virt)));
    assert!(pages.iter().all(|page| page.phys < MEMORY), "beyond the memory that it was told of");
    let (user, kernel): (Vec<&Page>, Vec<&Page>) = pages.iter().partition(|page| page.user);
    assert!(kernel.iter().all(|page| page.virt == page.phys && page.virt >= KERNEL_START));
    for (part, name) in [(&user, "programs"), (&kernel, "kernel")] {
        assert!(part.iter().any(|page| page.execute), "no code: {name}");
        assert!(part.iter().any(|page| page.write), "no data: {name}");
        assert!(part.iter().any(|page| !page.write && !page.execute), "no constants: {name}");
    }
    let mut frames: Vec<_> = user.iter().map(|page| page.phys).collect();
    frames.sort();
    frames.dedup();
    assert_eq!(frames.len(), user.len(), "two pages share a frame");
}

#[test]
fn the_kernel_takes_a_loader_that_breaks_the_contract_for_what_it_is() {
    let ram = (0x10_0000, MEMORY - 0x10_0000, E820_RAM);
    for (magic, map, why) in [
        (MAGIC + 1, &[ram; 1][..], "the boot info at 0x7000 starts with"),
        (MAGIC, &[], "0 memory ranges, expected 1 to 32"),
        (MAGIC, &[ram; 33], "33 memory ranges, expected 1 to 32"),
        (MAGIC, &[(0, 0x9_F000, 1)], "OutOfMemory"),
    ] {
        let mut machine = Machine::kernel(magic, map);
        assert_eq!(machine.run(), PANIC_EXIT);
        let printed = machine.paper.text();
        assert!(printed.contains("kernel panic") && printed.contains(why), "{printed}");
    }
    // The same RAM 32 times, a part of it reserved, and one that wraps around.
    let mut map = [ram; 32];
    map[7] = (0x200_0000, 0x100_0000, 2);
    map[9] = (u64::MAX - 5, u64::MAX, E820_RAM);
    let mut machine = Machine::kernel(MAGIC, &map);
    assert_eq!(machine.run_until(Some("> ")), None);
}

#[test]
fn programs_compute_what_they_should() {
    let script = "about\ntable 12\ncounter 3\necho several  words \nfib 94\nprimes 50\ncalc (2+3)*-4^2\n\
                  fact 25\nfact 35\ngcd 84 36 120\nuptime\nring\nhelp\n";
    let ran = shell(script);
    ran.ended(0);
    let out = ran.out().replace('\r', "");
    let after = |command: &str| {
        let (_, rest) =
            out.split_once(&format!("> {command}\n")).unwrap_or_else(|| ran.fail(command));
        rest.split("\n> ").next().unwrap().to_owned()
    };

    assert!(after("about").contains("ring 3"));
    let table: Vec<Vec<u32>> = after("table 12")
        .lines()
        .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
        .collect();
    let expected: Vec<Vec<u32>> = (1..=12).map(|a| (1..=12).map(|b| a * b).collect()).collect();
    assert_eq!(table, expected);
    assert_eq!(after("counter 3"), "1\n2\n3");
    assert_eq!(after("echo several  words "), "several  words");
    let (mut a, mut b) = (0_u64, 1);
    for (index, line) in after("fib 94").lines().enumerate() {
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), [index.to_string(), a.to_string()]);
        (a, b) = (b, a.wrapping_add(b));
    }
    let primes = after("primes 50");
    let (numbers, count) = primes.rsplit_once('\n').unwrap();
    let numbers: Vec<u32> = numbers.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let is_prime = |n: &u32| (2..*n).all(|d| !n.is_multiple_of(d));
    assert_eq!(numbers, (2..=50).filter(is_prime).collect::<Vec<_>>());
    assert_eq!(count, format!("{} primes up to 50", numbers.len()));
    assert_eq!(after("calc (2+3)*-4^2"), "-80");
    assert_eq!(after("fact 25"), format!("25! = {}", (1..=25).product::<u128>()));
    assert!(after("fact 35").contains("does not fit in 128 bits"));
    assert_eq!(after("gcd 84 36 120"), "12");
    assert!(after("ring").contains("CS is 0x23: its low two bits say ring 3"));

    // The counter waited three times a tenth of a second.
    let uptime = after("uptime");
    let ticks: u32 = uptime.split_whitespace().nth(3).unwrap().parse().unwrap();
    assert!(ticks >= 30, "{uptime}");
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let script = "table 0\ntable 21\ntable 1 2\nfib x\nfact -1\ngcd 3\nprimes 99999999999999999999\n\
                  calc 1+\ncalc 7/(3-3)\ncalc 9223372036854775807+1\nnonsense\nexit 256\ncrash softly\n";
    let ran = shell(script);
    ran.ended(0);
    for text in [
        "table: '0' is not a whole number from 1 to 20",
        "table: '21' is not",
        "usage: table [N]",
        "fib: 'x' is not",
        "fact: '-1' is not",
        "usage: gcd A B ...",
        "primes: '99999999999999999999' is not",
        "^ expected a number or '('",
        "^ division by zero",
        "^ the number does not fit in 64 bits",
        "nonsense: no such command; help lists them",
        "exit: the code is one whole number from 0 to 255",
        "usage: crash [HOW]",
    ] {
        ran.stdout_has(text);
    }
}

#[test]
fn programs_that_misbehave_are_killed_and_nothing_else() {
    let ways = [
        ("null", "page fault (#PF): user read of 0x0, page not present"),
        ("hlt", "general protection (#GP)"),
        ("cli", "general protection (#GP)"),
        ("out", "general protection (#GP)"),
        ("cr3", "general protection (#GP)"),
        ("kernel", "page fault (#PF): user read of 0x100000, the page does not allow it"),
        ("code", "page fault (#PF): user write to 0x4"),
        ("data", "page fault (#PF): user instruction fetch from 0x7"),
        ("stack", "the stack is full"),
        ("divide", "divide error (#DE)"),
        ("invalid", "invalid opcode (#UD)"),
        ("int", "general protection (#GP)"),
        ("panic", "as ordered"),
    ];
    let mut script = "mem\n".to_owned();
    for (way, _) in ways {
        script += &format!("crash {way}\n");
    }
    script += "mem\ncalc 6*7\n";
    let ran = shell(&script);
    // `crash out` writes to the debug-exit port: this would not be 0 if it had got through.
    ran.ended(0).stdout_has("\n42\r\n");
    let out = ran.out();
    for (way, report) in ways {
        let (_, rest) = out.split_once(&format!("> crash {way}\r\n")).unwrap();
        let report_of_it = rest.split("\n> ").next().unwrap();
        assert!(report_of_it.contains(report), "{way}: {report_of_it}");
        assert!(way == "panic" || report_of_it.contains("in ring 3 at RIP 0x"), "{report_of_it}");
    }
    assert!(!out.contains("nothing happened"));
    assert_eq!(out.matches(": killed").count(), ways.len() - 1);
    // Their memory has come back, page tables included.
    let free: Vec<_> = out.lines().filter(|line| line.contains("KiB free, in frames")).collect();
    assert_eq!(free.len(), 2);
    assert_eq!(free[0], free[1]);
}

#[test]
fn the_kernel_is_entered_by_the_climb_as_well() {
    let ran = stage_06().args(["--enter", "climb"]).stdin("calc 1+1\n").run();
    ran.ended(0)
        .stdout_has("real mode")
        .stdout_has("by the climb from real mode")
        .stdout_has("\n2\r\n");
    shell("").ended(0).stdout_has("by the VMM itself");
}

#[test]
fn the_guest_says_how_it_ended() {
    shell("exit\n").ended(0);
    shell("").ended(0).stdout_has("the shell ended with code 0");
    shell("exit 3\n").ended(1).stderr_has("the guest ended with code 3");
}

#[test]
fn a_kernel_that_crashes_at_once_ends_with_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken");
    let mut broken = guests::KERNEL.to_vec();
    // The first segment begins with the entry point, and has its place in the file in its header.
    let offset = u64::from_le_bytes(broken[64 + 8..64 + 16].try_into().unwrap()) as usize;
    broken[offset..offset + 2].copy_from_slice(&[0x0F, 0x0B]); // ud2, and there is no IDT
    fs::write(&path, broken).unwrap();
    let ran = stage_06().args(["--kernel".as_ref(), path.as_os_str()]).run();
    ran.ended(1).stderr_has("the guest crashed: triple fault");
    ran.stderr_has(
        "cause  invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6 is",
    );
    assert!(ran.stdout.is_empty());
}

#[test]
fn memory_may_be_small_and_larger_than_the_kernel_uses() {
    let free = |memory: &str| -> u64 {
        let ran = stage_06().args(["--memory", memory]).run();
        ran.ended(0);
        let out = ran.out();
        let line = out.lines().find(|line| line.starts_with("memory: ")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let (small, large) = (free("16M"), free("1536M"));
    assert!((13 << 10..15 << 10).contains(&small), "{small} KiB of 16 MiB");
    assert!((1021 << 10..1023 << 10).contains(&large), "{large} KiB: the first GiB is used");
}

#[test]
fn nothing_that_is_piped_in_gets_lost() {
    // Far more than the port's FIFO and the kernel's queue hold.
    let lines: Vec<_> = (0..500).map(|n| format!("line {n} of many")).collect();
    let ran = shell(&format!("echo\n{}\n\x04", lines.join("\n")));
    ran.ended(0);
    let out = ran.out().replace('\r', "");
    let doubled: String = lines.iter().map(|line| format!("{line}\n{line}\n")).collect();
    assert!(out.contains(&doubled), "{}", out.len());
}

#[test]
fn a_text_ends_the_machine() {
    let ran = stage_06().args(["--exit-when", "for what"]).stdin("spin\n").run();
    ran.ended(0);
    assert!(ran.out().ends_with("Type help for what"), "{ran}");
}

#[test]
fn an_endless_guest_meets_its_timeout() {
    let ran = stage_06().args(["--timeout", "2"]).stdin("spin\n").run();
    ran.ended(4).stdout_has("spinning").stderr_has("--timeout");
    assert!(ran.took >= Duration::from_secs(2));
}

#[test]
fn a_person_talks_to_the_shell() {
    let mut terminal = stage_06().on_terminal();
    terminal.expect("> ");
    assert!(terminal.is_raw());
    terminal.send("ecko\x7f\x7fho typed\r").expect("ho typed").expect("\ntyped").expect("> ");
    terminal.send("never run\x03").expect("^C").expect("> ");
    terminal.send("spin\r").expect("spinning").send("\x03").expect("^C").expect("> ");
    terminal.send("calc\r").expect("calc> ").send("2^10\r").expect("1024").expect("calc> ");
    terminal.send("\x04").expect("> ");
    terminal.send("counter 1000000\r").expect("\n2").send("\x03").expect("^C").expect("> ");
    terminal.send("\x01h").expect("Ctrl-A x       leave");
    terminal.send("exit\r");
    assert_eq!(terminal.end(), 0);
    assert!(!terminal.is_raw());
    assert!(!terminal.printed().contains("never: no such command"));
}

#[test]
fn ctrl_a_x_leaves_a_guest_that_takes_no_keys() {
    let mut terminal = stage_06().on_terminal();
    terminal.expect("> ").send("spin\r").expect("spinning");
    // More than all queues on the way hold.
    terminal.send(&"x".repeat(3000)).send("\x01x");
    assert_eq!(terminal.end(), 0);
    assert!(!terminal.is_raw());
}

#[test]
fn a_signal_gives_the_terminal_back() {
    for signal in ["TERM", "HUP", "INT"] {
        let mut terminal = stage_06().on_terminal();
        terminal.expect("> ");
        assert!(terminal.is_raw());
        let pid = terminal.pid().to_string();
        let kill = format!("kill -s {signal} {pid}");
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        terminal.end();
        assert!(!terminal.is_raw(), "SIG{signal}");
    }
}

#[test]
fn files_that_are_no_kernel_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("empty"), []).unwrap();
    fs::write(
        at("text"),
        "this is no kernel, but long enough to hold a header of sixty-four bytes\n",
    )
    .unwrap();
    fs::write(at("random"), (0..100_000_u64).map(|n| (n * n * 31 / 8) as u8).collect::<Vec<_>>())
        .unwrap();
    for cut in [3, 40, 100, guests::KERNEL.len() / 2] {
        fs::write(at(&format!("cut{cut}")), &guests::KERNEL[..cut]).unwrap();
    }
    fs::File::create(at("huge")).unwrap().set_len(1 << 40).unwrap();
    // The kernel's first segment, moved to where the boot info is.
    let mut moved = guests::KERNEL.to_vec();
    moved[64 + 24..64 + 32].copy_from_slice(&0x7000_u64.to_le_bytes());
    fs::write(at("moved"), moved).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();

    for (name, why) in [
        ("missing", "there is no such file"),
        ("dangling", "there is no such file"),
        ("", "a directory"),
        ("empty", "the file is empty"),
        ("text", "begins with 7f 45 4c 46"),
        ("random", "begins with 7f 45 4c 46"),
        ("huge", "begins with 7f 45 4c 46"),
        ("cut3", "truncated"),
        ("cut40", "truncated"),
        ("cut100", "truncated"),
        (&format!("cut{}", guests::KERNEL.len() / 2), "truncated"),
        ("moved", "0x7000"),
    ] {
        stage_06().args(["--kernel".as_ref(), at(name).as_os_str()]).run().refused(2, why);
    }
}

#[test]
fn memory_sizes_that_make_no_sense_are_refused_in_one_line() {
    for (size, why) in [
        ("0M", "at least 16 MiB"),
        ("1M", "guest memory of 1024 KiB: these guests need at least 16 MiB"),
        ("16385K", "multiple of 4 KiB"),
        ("9000000T", "--memory"),
    ] {
        stage_06().args(["--memory", size]).run().refused(2, why);
    }
    for size in ["64", "lots", "-1M", "99999999999999999999M"] {
        let arg = format!("--memory={size}");
        stage_06().args([arg]).run().ended(2).stderr_has("--memory");
    }
}

#[test]
fn options_of_the_kernel_do_not_go_with_other_guests() {
    for args in [["rings", "--enter", "climb"], ["climb", "--kernel", "/dev/null"]] {
        stage_06().args(args).run().refused(2, "belong to the guest `kernel`");
    }
}

#[test]
fn help_teaches() {
    let ran = stage_06().args(["--help"]).run();
    ran.ended(0);
    for text in
        ["climb", "exceptions", "interrupts", "rings", "Ctrl-A x", "Exit codes:", "--exit-when"]
    {
        ran.stdout_has(text);
    }
}

#[test]
fn a_full_disk_is_told() {
    let direct = || stage_06().args(["direct", "--timeout", "30"]);
    direct().redirected("> /dev/full").run().refused(3, "cannot write to stdout: No space left");
    direct().redirected("2> /dev/full").run().ended(0);
    direct().args(["--stats"]).redirected("> /dev/full 2> /dev/full").run().ended(3);
}
