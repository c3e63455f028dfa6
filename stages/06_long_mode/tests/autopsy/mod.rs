//! Guests that die of the mistakes which people make, and what the autopsy says of each.

use std::error::Error;
use std::time::Duration;

use common::autopsy::{Autopsy, Watchdog};
use common::bus::Bus;
use common::irqfd;
use common::layout::PROGRAM;
use common::long_mode;
use common::memory::Vm;
use common::run::{self, Crash, Ending};
use common::trace::Devices;
use common::vcpu::Vcpu;
use kvm_bindings::kvm_regs;
use vm_memory::Bytes;

use super::{MEMORY, stage_06};

/// How a guest begins.
#[derive(Clone, Copy)]
enum Start {
    Real,
    Long,
}
use Start::{Long, Real};

/// Name, program, start, and the whole sentence.
const MISTAKES: &[(&str, &[u8], Start, &str)] = &[
    (
        "divide_by_zero",
        asm::mistakes::DIVIDE_BY_ZERO,
        Long,
        "divide error (#DE): div ecx divides by zero; while delivering it, IDT vector 0 \
         is not present (IDT limit 0x0): double fault; vector 8 neither: triple fault",
    ),
    (
        "invalid_opcode",
        asm::mistakes::INVALID_OPCODE,
        Long,
        "invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6 is not \
         present (IDT limit 0x0): general protection (#GP); vector 13 neither: double \
         fault; vector 8 neither: triple fault",
    ),
    (
        "no_idt",
        asm::mistakes::NO_IDT,
        Long,
        "page fault at 0x4000000000, reading: PDPT[256] is not present; while \
         delivering it, IDT vector 14 is not present (IDT limit 0x0): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "bad_gdt_entry",
        asm::mistakes::BAD_GDT_ENTRY,
        Real,
        "general protection (#GP): CS gets selector 0x8, which is an empty entry; while \
         delivering it, IDT vector 13 is not present (IDT limit 0xffff): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "wrong_selector",
        asm::mistakes::WRONG_SELECTOR,
        Real,
        "general protection (#GP): selector 0x30 is beyond the GDT's limit 0x1f; while \
         delivering it, IDT vector 13 is not present (IDT limit 0xffff): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "not_present_segment",
        asm::mistakes::NOT_PRESENT_SEGMENT,
        Real,
        "segment not present (#NP): CS gets selector 0x8, whose segment is not present; \
         while delivering it, IDT vector 11 is not present (IDT limit 0xffff): double \
         fault; vector 8 neither: triple fault",
    ),
    (
        "code_as_stack",
        asm::mistakes::CODE_AS_STACK,
        Real,
        "general protection (#GP): SS gets selector 0x8, which is a code segment; while \
         delivering it, IDT vector 13 is not present (IDT limit 0xffff): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "segment_limit",
        asm::mistakes::SEGMENT_LIMIT,
        Real,
        "general protection (#GP): RIP gets 0x2000, beyond the limit 0xfff of selector \
         0x8; while delivering it, IDT vector 13 is not present (IDT limit 0xffff): \
         double fault; vector 8 neither: triple fault",
    ),
    (
        "no_lme",
        asm::mistakes::NO_LME,
        Real,
        "general protection (#GP): CR0 gets PG with CR4.PAE set and EFER.LME clear, \
         which is PAE paging and not long mode: PDPT[0] at 0x11000 has reserved bits \
         set: 0x2; while delivering it, IDT vector 13 is not present (IDT limit \
         0xffff): double fault; vector 8 neither: triple fault",
    ),
    (
        "unmapped_stack",
        asm::mistakes::UNMAPPED_STACK,
        Long,
        "page fault at 0x4000000ff8, writing: PDPT[256] is not present; while \
         delivering it, IDT vector 14 is not present (IDT limit 0x0): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "non_canonical",
        asm::mistakes::NON_CANONICAL,
        Long,
        "general protection (#GP): 0x800000000000 is no canonical address; while \
         delivering it, IDT vector 13 is not present (IDT limit 0x0): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "reserved_bit",
        asm::mistakes::RESERVED_BIT,
        Long,
        "page fault at 0x8000000000, reading: PML4[1] has reserved bits set: 0x80; \
         while delivering it, IDT vector 14 is not present (IDT limit 0x0): double \
         fault; vector 8 neither: triple fault",
    ),
    (
        "no_execute",
        asm::mistakes::NO_EXECUTE,
        Long,
        "page fault at 0x200000, fetching code: PD[1] forbids execution (NX); while \
         delivering it, IDT vector 14 is not present (IDT limit 0x0): double fault; \
         vector 8 neither: triple fault",
    ),
    (
        "read_only",
        asm::mistakes::READ_ONLY,
        Long,
        "page fault at 0x200000, writing: PD[1] is read-only; while delivering it, IDT \
         vector 14 is not present (IDT limit 0x0): double fault; vector 8 neither: \
         triple fault",
    ),
    (
        "ring3_supervisor",
        asm::mistakes::RING3_SUPERVISOR,
        Long,
        "page fault at 0x1041, fetching code: PML4[0] is for the kernel alone, and this \
         is ring 3; while delivering it, IDT vector 14 is not present (IDT limit \
         0xfff): double fault; vector 8 neither: triple fault",
    ),
    (
        "no_tss",
        asm::mistakes::NO_TSS,
        Long,
        "interrupt 0x80: int 0x80 raises it; while delivering it, the frame of vector \
         128 cannot be pushed: page fault at 0xffffffffffffffd8, writing: PML4[511] is \
         not present (RSP0 of the TSS at 0x0 (TR was never loaded) is 0x0): page fault \
         (#PF); while delivering vector 14, IDT vector 14 is not present (IDT limit \
         0xfff): double fault; vector 8 neither: triple fault",
    ),
    (
        "no_iretq_frame",
        asm::mistakes::NO_IRETQ_FRAME,
        Long,
        "general protection (#GP): IRET takes what is at RSP 0x30000 for a frame: CS \
         gets the null selector 0x0; while delivering it, IDT vector 13 is not present \
         (IDT limit 0xfff): double fault; vector 8 neither: triple fault",
    ),
    (
        "gate_to_data",
        asm::mistakes::GATE_TO_DATA,
        Long,
        "invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6: its \
         gate leads to selector 0x10, which is a data segment: general protection \
         (#GP); while delivering vector 13, IDT vector 13 is not present (IDT limit \
         0xfff): double fault; vector 8 neither: triple fault",
    ),
    (
        "stack_overflow",
        asm::mistakes::STACK_OVERFLOW,
        Long,
        "page fault at 0x3ffff8, writing: PD[1] is not present; while delivering it, \
         the frame of vector 14 cannot be pushed: page fault at 0x3fffd0, writing: \
         PD[1] is not present: double fault; while delivering vector 8, the frame of \
         vector 8 cannot be pushed: page fault at 0x3fffd0, writing: PD[1] is not \
         present: triple fault",
    ),
    (
        "handler_faults",
        asm::mistakes::HANDLER_FAULTS,
        Long,
        "page fault at 0x4000000000, reading: PDPT[256] is not present, and in its handler \
         at 0x1072 4 more before that returned; page fault at 0x4000000000, reading: PDPT[256] \
         is not present; while delivering it, the frame of vector 14 cannot be pushed: page \
         fault at 0x3fffe0, writing: PD[1] is not present: double fault; while delivering \
         vector 8, IDT vector 8 is not present (IDT limit 0xfff): triple fault",
    ),
    (
        "busy_tss",
        asm::mistakes::BUSY_TSS,
        Long,
        "general protection (#GP): TR gets selector 0x28, whose TSS is busy: it is \
         loaded already; while delivering it, IDT vector 13 is not present (IDT limit \
         0xfff): double fault; vector 8 neither: triple fault",
    ),
    (
        "sse_off",
        asm::mistakes::SSE_OFF,
        Long,
        "invalid opcode (#UD): movaps xmm0,xmm1 with CR4.OSFXSR clear; while delivering \
         it, IDT vector 6 is not present (IDT limit 0x0): general protection (#GP); \
         vector 13 neither: double fault; vector 8 neither: triple fault",
    ),
    (
        "cr3_outside_ram",
        asm::mistakes::CR3_OUTSIDE_RAM,
        Long,
        "page fault at 0x1008, fetching code: PML4[0] is at 0x40000000, where no RAM \
         is; while delivering it, IDT vector 14 is not present (IDT limit 0x0): double \
         fault; vector 8 neither: triple fault",
    ),
    (
        "no_memory",
        asm::mistakes::NO_MEMORY,
        Long,
        "the instruction at 0x8000000 would come from guest-physical 0x8000000, where \
         no memory is",
    ),
    (
        "halt",
        asm::mistakes::HALT,
        Long,
        "HLT before 0x1002 with interrupts off (RFLAGS.IF is clear): no interrupt wakes \
         this processor",
    ),
    (
        "loop",
        asm::mistakes::LOOP,
        Long,
        "an endless loop at 0x1000, which changes nothing, with interrupts off",
    ),
    (
        "flag",
        asm::mistakes::FLAG,
        Long,
        "an endless loop from 0x1000 to 0x100a, which waits for the byte at 0x100d, which is \
         0x0, to change, with interrupts off",
    ),
    (
        "absent_device",
        asm::mistakes::ABSENT_DEVICE,
        Long,
        "it polls port 0x64, where no device is, which reads 0xff each time",
    ),
];

/// How long a guest may stand still.
const STILL: Duration = Duration::from_millis(400);

/// And how long it may take in all.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine with `program` in it, and its vCPU at the first instruction.
fn machine(program: &[u8], start: Start) -> Result<Vcpu, Box<dyn Error + Send + Sync>> {
    let kvm = common::kvm::open()?;
    let vm = Vm::with_ram(&kvm, MEMORY)?;
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    vcpu.set_supported_cpuid(&kvm)?;
    vm.ram().write_slice(program, PROGRAM)?;
    match start {
        Real => vcpu.start_real_mode(PROGRAM)?,
        Long => {
            let regs = kvm_regs { rip: PROGRAM.0, ..Default::default() };
            long_mode::enter(&vcpu, &vm.ram(), regs)?;
        }
    }
    Ok(vcpu)
}

/// Runs a guest to its death, and asks why.
fn autopsy(program: &[u8], start: Start) -> Autopsy {
    let mut vcpu = machine(program, start).unwrap();
    let (_, stopped) = run::stop();
    Watchdog::new(STILL).follow(&mut vcpu, &Devices::default());
    let ran = run::run(vec![vcpu], Bus::new(), Bus::new(), stopped, Some(PATIENCE)).unwrap();
    let Ending::Crashed(Crash { cause, .. }) = ran.ending else { panic!("{:?}", ran.ending) };
    let mut again = || machine(program, start);
    Autopsy::of(&ran.vcpus[0], cause, Some(&mut again)).unwrap()
}

#[test]
fn each_mistake_is_named() {
    let mut wrong = Vec::new();
    for &(name, program, start, expected) in MISTAKES {
        let autopsy = autopsy(program, start);
        let report = autopsy.to_string();
        let too_wide = report.lines().find(|line| line.chars().count() > 80);
        if let Some(line) = too_wide {
            wrong.push(format!("{name}: wider than 80 columns: {line}"));
        }
        if autopsy.sentence() != expected {
            wrong.push(format!("{name}: {}\n{report}", autopsy.sentence()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_guest_that_spins_is_told_from_one_that_is_idle() {
    let ran = stage_06().args(["--watchdog", "1"]).stdin("spin\n").run();
    ran.ended(1).stderr_has("the guest crashed: it hangs").stderr_has("cause  an endless loop");
    // Its shell sleeps by HLT until a key comes.
    let mut terminal = stage_06().args(["--watchdog", "0.5"]).on_terminal();
    terminal.expect("> ");
    std::thread::sleep(Duration::from_secs(2));
    terminal.send("exit\r");
    assert_eq!(terminal.end(), 0);
}
