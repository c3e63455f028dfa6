//! Stage 03: a virtual CPU runs a program, and we see each of the ways in which that can end.

mod explain;
mod guests;
mod steps;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Parser;
use cli::{Ended, autopsy, debug, gdb, println};
use common::autopsy::Cause;
use common::layout::PROGRAM;
use common::memory::Vm;
use common::regs::Registers;
use common::trace::Devices;
use common::vcpu::{self, Exit, Vcpu};
use explain::{FAIL_ENTRY, HANG, HANGS, HLT, INTERNAL_ERROR, SHUTDOWN};
use guests::Guest;
use kvm_ioctls::Kvm;
use steps::Steps;
use vm_memory::Bytes;

/// 64 KiB: all that a real-mode segment reaches. The program stands at 0x1000, its stack below it.
const RAM: usize = 0x1_0000;

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
     03_vcpu --gdb                the same program under gdb
     03_vcpu hang --watchdog 1    a guest that gets nowhere, and why")]
struct Args {
    /// The guest: each ends in a way of its own
    #[arg(value_enum, default_value_t = Guest::Walk)]
    guest: Guest,

    /// Stop after every instruction and print it, with what it changed
    #[arg(long, conflicts_with = "gdb")]
    step: bool,

    #[command(flatten)]
    debug: debug::Flags,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<Ended> {
    // A VM with memory, as in stage 02, and a program in it.
    let kvm = common::kvm::open()?;
    let vm = memory(&kvm, args.guest)?;
    let kit = args.debug.start(&vm, 1, None, gdb::exit)?;

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

    // Whoever looks on does so around KVM_RUN: gdb, a trace. There are no devices yet.
    kit.follow(&mut vcpu, &Devices::default())?;
    let mut steps = Steps::begin(&vcpu, args.step)?;

    // ANCHOR: loop
    // The run loop. Only `break` ends it: with the exit's name, how it came about, and whether that is well.
    let mut cause;
    let (exit, story, ended) = loop {
        steps.ask(&vcpu)?;
        let exit = vcpu.run()?;
        cause = Cause::of(&exit);
        match exit {
            Exit::Hlt => break ("KVM_EXIT_HLT", HLT.into(), Ended::Well),
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
            // An instruction is done, with --step.
            Exit::Debug(_) => {
                if steps.done(&vcpu)? {
                    break ("KVM_EXIT_HLT", HLT.into(), Ended::Well);
                }
            }
            // A signal to this process: the guest has done nothing.
            Exit::Interrupted => {}
            Exit::Hang(_) => break (HANG, HANGS.into(), Ended::GuestCrashed),
            other => {
                let story = format!("{other:X?}: this guest has no business with devices.");
                break ("another exit", story, Ended::GuestCrashed);
            }
        }
    };
    // ANCHOR_END: loop
    vcpu.leave()?;

    // What it has done.
    steps.end(ended == Ended::Well);
    println!("{exit}: {story}");
    explain::difference(args.guest, exit);
    println!("\n{}", before.beside(&Registers::of(&vcpu)?));
    explain::results(args.guest, &vm.ram())?;
    kit.finish()?;
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
    vm.ram().write_slice(guest.program(), PROGRAM)?;
    Ok(vm)
}

/// The vCPU at the program's first instruction.
fn start(vcpu: &Vcpu, guest: Guest) -> Result<()> {
    vcpu.start_real_mode(PROGRAM)?;
    if guest == Guest::FailEntry {
        vcpu.set_sregs(&guests::impossible(vcpu.sregs()?))?;
    }
    Ok(())
}
