//! Stage 03: a virtual CPU runs a program, and we see each of the ways in which that can end.

mod explain;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use cli::{Ended, autopsy, gdb, println, trace};
use common::autopsy::Cause;
use common::gdb::TRAP_PORT;
use common::layout::PROGRAM;
use common::memory::Vm;
use common::regs::Registers;
use common::step::Moment;
use common::trace::Devices;
use common::vcpu::{self, Exit, Vcpu};
use explain::{FAIL_ENTRY, HLT, INTERNAL_ERROR, SHUTDOWN};
use kvm_bindings::kvm_sregs;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

/// 64 KiB: all that a real-mode segment reaches. The program stands at 0x1000, its stack below it.
const RAM: usize = 0x1_0000;

/// Where `asm/real/walk.asm` leaves its results: 16 bits and 32 bits.
const SUM: GuestAddress = GuestAddress(0x2010);
const SQUARE: GuestAddress = GuestAddress(0x2012);

/// Runs a guest on a virtual CPU: registers before and after, and how it ended.
///
/// A vCPU is born in the reset state of a processor. The host gives it a CPUID, sets its registers,
/// and calls KVM_RUN: the guest then has the host's CPU until it does something that KVM leaves to us.
/// KVM_RUN returns, the exit reason says what it was, and a monitor is the loop around that.
#[derive(Parser)]
#[command(after_help = "\
Try: 03_vcpu                      the reset state, a program, what it changed
     03_vcpu --step               each instruction, disassembled, and its effect
     03_vcpu triple-fault --step  the last instructions of a dying machine
     03_vcpu --gdb                the same program under gdb")]
struct Args {
    /// The guest: each ends in a way of its own
    #[arg(value_enum, default_value_t = Guest::Walk)]
    guest: Guest,

    /// Stop after every instruction and print it, with what it changed
    #[arg(long, conflicts_with = "gdb")]
    step: bool,

    #[command(flatten)]
    trace: trace::Flags,

    #[command(flatten)]
    gdb: gdb::Flags,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Guest {
    /// Asks CPUID who it runs on, adds 1 to 10, squares the sum, ends with HLT
    Walk,
    /// Raises an exception that nothing handles: KVM_EXIT_SHUTDOWN
    TripleFault,
    /// Starts in a state that no processor can be in: KVM_EXIT_FAIL_ENTRY
    FailEntry,
    /// Jumps to where no memory is: KVM_EXIT_INTERNAL_ERROR
    InternalError,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<Ended> {
    // A VM with memory, as in stage 02, and a program in it.
    let kvm = common::kvm::open()?;
    let vm = memory(&kvm, args.guest)?;
    let watch = args.trace.start(&vm)?;

    // A processor. KVM has put it into the reset state.
    let mut vcpu = Vcpu::new(&vm, 0)?;
    println!("The vCPU after KVM_CREATE_VCPU: the state of a processor after reset");
    explain::reset(&Registers::of(&vcpu)?);

    // What it says of itself when the guest executes CPUID.
    let cpuid = vcpu.set_supported_cpuid(&kvm)?;
    println!("\nCPUID set: {} entries, vendor {:?}", cpuid.as_slice().len(), vcpu::vendor(&cpuid));

    // Where it starts.
    start(&vcpu, args.guest)?;
    let before = Registers::of(&vcpu)?;
    println!("Registers set: {}, starts at {}\n", before.mode(), before.address());

    // Whoever watches does so around KVM_RUN; there are no devices yet.
    watch.follow(&mut vcpu, &Devices::default())?;

    // ANCHOR: loop
    // The run loop. Only `break` ends it: with the exit's name, how it came about, and whether that is well.
    let mut now = Moment::of(&vcpu, RAM)?;
    let gdb = args.gdb.start(1, None, gdb::exit)?;
    let mut cause;
    let (exit, story, ended) = loop {
        gdb.before_run(&mut vcpu)?;
        if args.step {
            vcpu.set_single_step(true)?;
        }
        let exit = vcpu.run()?;
        cause = Cause::of(&exit);
        match exit {
            // A step or a breakpoint: gdb is told before the next KVM_RUN.
            Exit::Debug(_) | Exit::IoOut { port: TRAP_PORT, .. } if gdb.is_on() => {}
            Exit::Debug(_) => {
                let after = Moment::of(&vcpu, RAM)?;
                println!("{}", now.step_to(&after));
                // A KVM that emulates the guest reports the step over HLT instead of the halt.
                if now.next.as_ref().is_some_and(|done| done.text == "hlt") {
                    break ("KVM_EXIT_HLT", HLT.into(), Ended::Well);
                }
                now = after;
            }
            Exit::Hlt => {
                if args.step {
                    println!("{now}");
                }
                break ("KVM_EXIT_HLT", HLT.into(), Ended::Well);
            }
            Exit::Shutdown => break ("KVM_EXIT_SHUTDOWN", SHUTDOWN.into(), Ended::GuestCrashed),
            Exit::FailEntry { reason, cpu } => {
                let story =
                    format!("{FAIL_ENTRY}\nIts reason is {reason:#X}; it was host CPU {cpu}.");
                break ("KVM_EXIT_FAIL_ENTRY", story, Ended::GuestCrashed);
            }
            Exit::InternalError(error) => {
                let story = format!("{INTERNAL_ERROR}\nThe suberror is {}.", error.name());
                break ("KVM_EXIT_INTERNAL_ERROR", story, Ended::GuestCrashed);
            }
            // A signal to this process: the guest has done nothing.
            Exit::Interrupted => {}
            other => {
                let story = format!("{other:X?}: this guest has no business with devices.");
                break ("another exit", story, Ended::GuestCrashed);
            }
        }
    };
    // ANCHOR_END: loop
    gdb.leave(&vcpu);
    vcpu.end_watch()?;
    if args.step && ended != Ended::Well {
        println!("{now:45} ; was never finished");
    }

    println!("{}{exit}: {story}", if args.step { "\n" } else { "" });
    let expected = match args.guest {
        Guest::Walk => "KVM_EXIT_HLT",
        Guest::TripleFault => "KVM_EXIT_SHUTDOWN",
        Guest::FailEntry => "KVM_EXIT_FAIL_ENTRY",
        Guest::InternalError => "KVM_EXIT_INTERNAL_ERROR",
    };
    if exit != expected {
        println!("Hardware answers this guest with {expected}; this KVM does not.");
    }
    println!("\n{}", before.beside(&Registers::of(&vcpu)?));
    if args.guest == Guest::Walk {
        let (mut sum, mut square) = ([0; 2], [0; 4]);
        vm.ram().read_slice(&mut sum, SUM)?;
        vm.ram().read_slice(&mut square, SQUARE)?;
        let (sum, square) = (u16::from_le_bytes(sum), u32::from_le_bytes(square));
        println!("The guest left in memory: 1 + 2 + ... + 10 = {sum}, squared {square}");
    }
    watch.finish()?;
    if let (Ended::GuestCrashed, Some(cause)) = (ended, cause) {
        // Why: from what the guest left, or by making the machine again and running it a second time.
        let again = &mut || {
            let vcpu = Vcpu::new(&memory(&kvm, args.guest)?, 0)?;
            vcpu.set_supported_cpuid(&kvm)?;
            start(&vcpu, args.guest)?;
            Ok(vcpu)
        };
        autopsy::report(&vcpu, cause, None, Some(again))?;
    }
    Ok(ended)
}

/// A VM with memory, and the guest's program in it.
fn memory(kvm: &Kvm, guest: Guest) -> Result<Arc<Vm>> {
    let vm = Vm::with_ram(kvm, RAM as u64)?;
    let program = match guest {
        Guest::Walk => asm::real::WALK,
        Guest::TripleFault => asm::real::TRIPLE_FAULT,
        Guest::FailEntry => asm::real::HALT,
        Guest::InternalError => asm::real::NO_MEMORY,
    };
    vm.ram().write_slice(program, PROGRAM)?;
    Ok(vm)
}

/// The vCPU at the program's first instruction.
fn start(vcpu: &Vcpu, guest: Guest) -> Result<()> {
    vcpu.start_real_mode(PROGRAM)?;
    if guest == Guest::FailEntry {
        vcpu.set_sregs(&impossible(vcpu.sregs()?))?;
    }
    Ok(())
}

// ANCHOR: impossible
/// A state that KVM_SET_SREGS lets through and hardware refuses: long mode with a code segment that is
/// 64-bit (L) and 32-bit (D) at once. (Intel SDM vol. 3, 28.3.1.2; AMD APM vol. 2, 15.5.1.)
fn impossible(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cr0 = 1 << 31 | 1; // PG, PE
    sregs.cr4 = 1 << 5; // PAE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    (sregs.cs.l, sregs.cs.db) = (1, 1);
    sregs
}
// ANCHOR_END: impossible
