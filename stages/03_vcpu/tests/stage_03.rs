//! Milestone 3: a vCPU runs a program, and each way in which a VM ends is seen.

mod gdb;

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use common::autopsy::{Autopsy, Cause};
use common::layout::PROGRAM;
use common::memory::Vm;
use common::regs::{Mode, Registers};
use common::vcpu::{self, Exit, Vcpu};
use testkit::{Program, Ran};
use vm_memory::{Bytes, GuestAddress};

/// What the walk has to compute, computed by the test.
const SUM: u32 = {
    let (mut sum, mut n) = (0, 1);
    while n <= 10 {
        sum += n;
        n += 1;
    }
    sum
};

fn stage_03(args: &[&str]) -> Ran {
    Program::new(env!("CARGO_BIN_EXE_03_vcpu")).args(args).run()
}

/// A vCPU in 64 KiB of RAM with `program` in it, at its first instruction.
fn vcpu(program: &[u8]) -> (Vcpu, vcpu::CpuId) {
    let kvm = common::kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, 0x1_0000).unwrap();
    vm.ram().write_slice(program, PROGRAM).unwrap();
    let vcpu = Vcpu::new(&vm, 0).unwrap();
    let cpuid = vcpu.set_supported_cpuid(&kvm).unwrap();
    vcpu.start_real_mode(PROGRAM).unwrap();
    (vcpu, cpuid)
}

/// The rows of the table of registers: name, before, mark, after.
fn table(out: &str) -> Vec<(&str, u64, bool, u64)> {
    let hex = |text| u64::from_str_radix(text, 16).unwrap();
    out.lines()
        .skip_while(|line| !(line.contains("before") && line.contains("after")))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
            [name, before, "*", after, ..] => (name, hex(before), true, hex(after)),
            [name, before, after, ..] => (name, hex(before), false, hex(after)),
            _ => panic!("{line}"),
        })
        .collect()
}

#[test]
fn a_vcpu_is_born_in_the_reset_state() {
    let kvm = common::kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, 0x1000).unwrap();
    let reset = Registers::of(&Vcpu::new(&vm, 0).unwrap()).unwrap();
    // Intel SDM vol. 3, table 10-1; AMD APM vol. 2, table 14-1.
    assert_eq!((reset.sregs.cs.selector, reset.sregs.cs.base), (0xF000, 0xFFFF_0000));
    assert_eq!((reset.regs.rip, reset.regs.rflags), (0xFFF0, 2));
    assert_eq!((reset.sregs.cr0, reset.sregs.efer), (0x6000_0010, 0));
    assert_eq!((reset.mode(), reset.linear_rip()), (Mode::Real, 0xFFFF_FFF0));

    let ran = stage_03(&[]);
    ran.ended(0);
    for shown in ["F000, base FFFF0000", "FFF0: ", "0002 -: ", "60000010 ET NW CD: ", "0000 -: "] {
        ran.stdout_has(shown);
    }
}

#[test]
fn the_guest_computes_and_reads_the_cpuid_that_the_host_has_set() {
    let (mut vcpu, cpuid) = vcpu(asm::real::WALK);
    assert!(matches!(vcpu.run().unwrap(), Exit::Hlt));

    let mut memory = [0; 0x16];
    vcpu.vm().ram().read_slice(&mut memory, GuestAddress(0x2000)).unwrap();
    assert_eq!(String::from_utf8_lossy(&memory[..12]), vcpu::vendor(&cpuid));
    assert_eq!(memory[0x10..0x12], (SUM as u16).to_le_bytes());
    assert_eq!(memory[0x12..0x16], (SUM * SUM).to_le_bytes());

    let regs = vcpu.regs().unwrap();
    assert_eq!(regs.rax, u64::from(SUM * SUM));
    assert_eq!(regs.rcx as u16, 0, "LOOP ends when CX is 0");
    assert_eq!(regs.rsp, PROGRAM.0, "CALL and RET balance");
    // HLT is the last instruction before the subroutine: F4, and RIP stands behind it.
    let hlt = asm::real::WALK.iter().rposition(|&byte| byte == 0xF4).unwrap() as u64;
    assert_eq!(regs.rip, PROGRAM.0 + hlt + 1);
}

#[test]
fn registers_are_shown_before_and_after_and_changes_are_marked() {
    let ran = stage_03(&[]);
    ran.ended(0).stdout_has("KVM_EXIT_HLT").stdout_has(&format!("= {SUM}, squared {}", SUM * SUM));
    let out = ran.out();
    let rows = table(&out);
    let row = |wanted| *rows.iter().find(|(name, ..)| *name == wanted).unwrap();
    assert_eq!(row("eax"), ("eax", 0, true, u64::from(SUM * SUM)));
    assert_eq!(row("esp"), ("esp", PROGRAM.0, false, PROGRAM.0));
    assert_eq!(row("eip").1, PROGRAM.0);
    for (name, before, marked, after) in rows {
        assert_eq!(marked, before != after, "{name}");
    }
}

#[test]
fn a_guest_that_cannot_handle_an_exception_shuts_its_machine_down() {
    let ran = stage_03(&["triple-fault"]);
    ran.ended(1).stdout_has("KVM_EXIT_SHUTDOWN: a triple fault");
    ran.stderr_has(
        "cause  invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6 is",
    );
    assert!(!ran.out().contains("this KVM does not"));
    let (mut vcpu, _) = vcpu(asm::real::TRIPLE_FAULT);
    assert!(matches!(vcpu.run().unwrap(), Exit::Shutdown));
}

#[test]
fn an_instruction_that_kvm_cannot_fetch_is_an_internal_error() {
    let ran = stage_03(&["internal-error"]);
    ran.ended(1).stdout_has("KVM_EXIT_INTERNAL_ERROR").stdout_has("KVM_INTERNAL_ERROR_EMULATION");
    // It got as far as the jump.
    let out = ran.out();
    let after = |wanted| table(&out).iter().find(|(name, ..)| *name == wanted).unwrap().3;
    assert_eq!((after("cs"), after("eip"), after("cs.base")), (0x4000, 0, 0x40000));
}

#[test]
fn a_guest_that_never_exits_is_called_back_by_the_watchdog() {
    let ran = stage_03(&["hang", "--watchdog", "0.5"]);
    ran.ended(1)
        .stdout_has("no exit: the guest gets nowhere")
        .stderr_has("autopsy: vCPU 0, hangs")
        .stderr_has("cause  an endless loop from 0x1002 to 0x1007, which waits for the byte at");
    // One that gets to its end is left alone.
    stage_03(&["--watchdog", "0.5"]).ended(0).stdout_has("KVM_EXIT_HLT");
}

#[test]
fn an_access_beyond_the_memory_is_named() {
    // mov ax, 0x2000; mov ds, ax; mov al, [0]
    let (mut vcpu, _) = vcpu(&[0xB8, 0x00, 0x20, 0x8E, 0xD8, 0xA0, 0x00, 0x00]);
    let cause = Cause::of(&vcpu.run().unwrap()).unwrap();
    let sentence = Autopsy::of(&vcpu, cause, None).unwrap().sentence();
    let expected = "it reads from guest-physical 0x20000, where no memory is; it stands at 0000:1005 `mov al,[0]`";
    assert_eq!(sentence, expected);
}

#[test]
fn hardware_refuses_to_enter_an_impossible_state() {
    let ran = stage_03(&["fail-entry"]);
    ran.ended(1);
    if ran.out().contains("this KVM does not") {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
        let hardware = cpu.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        assert!(!hardware, "VMX or SVM is here, so that entry fails:\n{ran}");
        println!("skipped: KVM runs without VMX or SVM here: no hardware checks the guest's state");
        return;
    }
    // VMEXIT_INVALID is -1 (AMD APM vol. 2, appendix C); 0x80000021 is "VM-entry failure due to
    // invalid guest state" (Intel SDM vol. 3, appendix C).
    ran.stdout_has("KVM_EXIT_FAIL_ENTRY");
    let out = ran.out();
    let reason = out.split("reason is 0x").nth(1).unwrap().split(';').next().unwrap();
    assert!(["FFFFFFFF", "FFFFFFFFFFFFFFFF", "80000021"].contains(&reason), "{reason}");
}

/// What `--step` printed, with the changes of each instruction in its own line again.
fn unfolded(ran: &Ran) -> String {
    ran.out().replace(&format!("\n{:45} ; ", ""), ", ")
}

/// Address, bytes, text and changes of each line that `--step` printed.
fn steps(out: &str) -> Vec<(u64, Vec<u8>, &str, &str)> {
    out.lines()
        .filter(|line| line.starts_with("0000:"))
        .map(|line| {
            let (code, changes) = line.split_once(" ; ").unwrap_or((line, ""));
            let address = u64::from_str_radix(&code[5..9], 16).unwrap();
            let (bytes, text) = code[11..].split_at(15);
            let bytes = bytes.split_whitespace().map(|b| u8::from_str_radix(b, 16).unwrap());
            (address, bytes.collect(), text.trim(), changes.trim())
        })
        .collect()
}

#[test]
fn every_step_is_printed_with_what_it_changed() {
    let ran = stage_03(&["--step"]);
    ran.ended(0).stdout_has("KVM_EXIT_HLT");
    let out = unfolded(&ran);
    let steps = steps(&out);

    // The instructions in the order in which the source has them executed.
    let head = ["xor", "cpuid", "mov", "mov", "mov", "xor", "mov"];
    let tail = ["mov", "call", "movzx", "imul", "ret", "mov", "hlt"];
    let wanted = head.into_iter().chain(["add", "loop"].repeat(10)).chain(tail);
    let names: Vec<_> =
        steps.iter().map(|(_, _, text, _)| text.split(' ').next().unwrap()).collect();
    assert_eq!(names, wanted.collect::<Vec<_>>());

    // The sums and their flags, as the test adds them up.
    let (mut sum, mut flags) = (0u16, "PF ZF".to_owned());
    for (round, (_, _, _, changes)) in
        steps.iter().filter(|(_, _, text, _)| *text == "add ax,cx").enumerate()
    {
        let term = 10 - round as u16;
        let next = sum + term;
        let mut names = vec![];
        if (next as u8).count_ones().is_multiple_of(2) {
            names.push("PF");
        }
        if (sum & 0xF) + (term & 0xF) > 0xF {
            names.push("AF");
        }
        let next_flags = if names.is_empty() { "-".into() } else { names.join(" ") };
        let mut expected = format!("eax {sum:08X} -> {next:08X}");
        if flags != next_flags {
            expected += &format!(", flags {flags} -> {next_flags}");
        }
        assert_eq!(*changes, expected, "round {round}");
        (sum, flags) = (next, next_flags);
    }
    assert_eq!(u32::from(sum), SUM);

    // Memory: the sum, CALL's return address, the square.
    let written: Vec<_> = steps.iter().filter_map(|step| step.3.split_once('[')).collect();
    let texts: Vec<_> = written.iter().map(|(_, text)| text.to_string()).collect();
    let call = steps.iter().find(|step| step.2.starts_with("call")).unwrap();
    let back = (call.0 + call.1.len() as u64).to_le_bytes();
    assert_eq!(texts[3], format!("2010] = {SUM:02X}"));
    assert_eq!(texts[4], format!("0FFE] = {:02X} {:02X}", back[0], back[1]));
    assert_eq!(texts.len(), 6);
}

/// NASM's own disassembler reads the program as `--step` did, and each step stands where the one before
/// leads to.
#[test]
fn steps_agree_with_an_independent_disassembler() {
    let ndisasm = Command::new("ndisasm")
        .args(["-b16", "-o0x1000", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut ndisasm) = ndisasm else {
        println!("skipped: ndisasm, a part of NASM, is not here");
        return;
    };
    ndisasm.stdin.take().unwrap().write_all(asm::real::WALK).unwrap();
    let listing = String::from_utf8(ndisasm.wait_with_output().unwrap().stdout).unwrap();

    let ran = stage_03(&["--step"]);
    let out = unfolded(&ran);
    let steps = steps(&out);
    assert_eq!(steps.len(), 34);
    for (at, (address, bytes, text, changes)) in steps.iter().enumerate() {
        let start = format!("{address:08X}");
        let line = listing.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("no instruction at {start}:\n{listing}"));
        let (hex, independent) = line[10..].split_once(' ').unwrap();
        assert_eq!(hex, bytes.iter().map(|b| format!("{b:02X}")).collect::<String>());
        // The two differ in the case of hexadecimal digits and in `short`.
        let plain = |text: &str| text.trim().to_lowercase().replace("short ", "");
        assert_eq!(plain(independent), plain(text));

        if let Some((next, ..)) = steps.get(at + 1) {
            let target = changes.split("eip ").nth(1).map(|jump| jump[12..20].to_owned());
            let follows = format!("{:08X}", address + bytes.len() as u64);
            assert_eq!(format!("{next:08X}"), target.unwrap_or(follows), "after {text}");
        }
    }
}

#[test]
fn the_instruction_that_ended_the_machine_is_the_last_one_printed() {
    for (guest, address, text) in
        [("triple-fault", "0000:100D", "ud2"), ("internal-error", "4000:0000", "(no memory here)")]
    {
        let ran = stage_03(&[guest, "--step"]);
        ran.ended(1);
        let out = ran.out();
        let last = out.lines().rfind(|line| line.get(4..5) == Some(":")).unwrap();
        assert!(last.starts_with(address) && last.contains(text), "{last}");
        assert!(last.ends_with("; was never finished"), "{last}");
    }
}

#[test]
fn unknown_guests_and_options_are_usage_errors() {
    for args in [&["run"][..], &["--stop"], &["walk", "walk"]] {
        stage_03(args).ended(2).stderr_has("--help");
    }
    stage_03(&["nothing"]).ended(2).stderr_has("walk, triple-fault, fail-entry, internal-error");
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let ran = Program::new("sh")
        .args(["-c", &format!("{} --step | head -n 1", env!("CARGO_BIN_EXE_03_vcpu"))])
        .run();
    ran.ended(0);
    assert_eq!(ran.err(), "", "{ran}");
}

#[test]
fn a_full_disk_is_told() {
    Program::full_disk(env!("CARGO_BIN_EXE_03_vcpu"), &[]);
}
