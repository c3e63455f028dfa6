//! Stage 04: port I/O. IN and OUT are exits; a bus finds the device, and the device answers.

mod output;
mod programs;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode as ProcessExit;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use cli::{Ended, autopsy, debug, gdb};
use common::autopsy::Cause;
use common::bus::{Bus, shared};
use common::hypercall::{self, DebugExit, ExitCode, Hypercall};
use common::layout::PROGRAM;
use common::memory::Vm;
use common::regs::Registers;
use common::serial::{self, Serial};
use common::trace::Devices;
use common::vcpu::{self, Exit, Vcpu};
use kvm_ioctls::Kvm;
use programs::Program;
use vm_memory::{Address, Bytes, GuestAddress};
use watch::{Ending, Ran};

/// What a real-mode segment reaches: each guest has its own 64 KiB of the machine's RAM.
const WINDOW: u64 = 0x1_0000;

/// Runs programs that talk through ports, each on a virtual CPU of its own.
///
/// IN and OUT reach the host as exits with a port, a size and data. A bus finds the device at the port: a
/// serial port (0x3F8), the hypercall ports (0x500: exit, putchar, getchar), the debug exit (0xF4). Where
/// no device is, a read gives ones. One program alone has stdin, and stdout as it is; several run in
/// parallel, each in a colour, and print whole lines.
#[derive(Parser)]
#[command(after_help = format!("\
Programs:
{}
Try: 04_pio                                  hello
     echo some text | 04_pio upper           stdin reaches the guest
     04_pio counter primes fibonacci matrix  four vCPUs in one machine
     04_pio --gdb primes fibonacci           two threads in gdb
     04_pio --timeout 5 ./mine.bin           flat 16-bit code, started at 0x1000",
    programs::list("  ")))]
struct Args {
    /// Names of programs, or files with flat 16-bit code
    #[arg(value_name = "PROGRAM", default_value = "hello")]
    programs: Vec<PathBuf>,

    /// Print the names of the programs, with what they do
    #[arg(long)]
    list: bool,

    /// End with exit code 4 if the guests have not ended after SECS seconds
    #[arg(long, value_name = "SECS", allow_hyphen_values = true, value_parser = cli::seconds, conflicts_with = "gdb")]
    timeout: Option<Duration>,

    #[command(flatten)]
    debug: debug::Flags,
}

fn main() -> ProcessExit {
    cli::main(run)
}

fn run(args: Args) -> Result<Ended> {
    if args.list {
        cli::print(format_args!("{}", programs::list("")));
        return Ok(Ended::Well);
    }
    let kvm = common::kvm::open()?;
    let (count, most) = (args.programs.len(), kvm.get_max_vcpus().min(1 << u8::BITS));
    ensure!(
        count <= most,
        "{count} programs are too many: a machine here has at most {most} vCPUs"
    );
    let programs = programs::load(&args.programs)?;

    // One machine for all. 17 windows are what real mode can address, even if there is one guest.
    let ram = WINDOW * (count.max(16) as u64 + 1);
    let vm = Vm::with_ram(&kvm, ram)?;
    let kit = args.debug.start(&vm, count, None, gdb::exit)?;
    let teletypes = output::teletypes(count)?;
    let (report, reports) = mpsc::channel();
    for ((id, program), tty) in (0..=u8::MAX).zip(&programs).zip(&teletypes) {
        // ANCHOR: devices
        // The devices. Ports belong to a machine; here each vCPU is given a machine's ports of its own.
        let exit = ExitCode::default();
        let hypercall = Hypercall::new(Arc::clone(tty), exit.clone());
        let mut ports = Bus::new();
        ports.insert("serial port", serial::PORTS, shared(Serial::new(Arc::clone(tty))))?;
        ports.insert("hypercall", hypercall::PORTS, shared(hypercall))?;
        ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(exit.clone())))?;
        // ANCHOR_END: devices

        // The processor, and the thread that is the processor: KVM_RUN borrows it.
        let mut vcpu = start(&kvm, &vm, id, program)?;
        kit.follow(&mut vcpu, &Devices::of(&ports, &Bus::new()))?;
        let (report, tty) = (report.clone(), Arc::clone(tty));
        thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
            let ran = run_vcpu(&mut vcpu, &ports, &exit);
            let ran = vcpu.leave().and(ran);
            // Nobody listens any more when the time given is over.
            let _ = report.send((vcpu, ran, tty.flush()));
        })?;
    }
    // Whoever prints may have to wait for a reader, the time given notwithstanding.
    let its_programs = programs.clone();
    let wait = move || watch::until_all_end(&its_programs, &teletypes, &reports, args.timeout);
    let gave_up = || Ok((Ended::TimedOut, Vec::new()));
    let (ended, dead) = cli::within(args.timeout, wait)?.unwrap_or_else(gave_up)?;
    kit.finish()?;
    for (vcpu, cause) in dead {
        // Why: from what the guest left, or by running it a second time, in a machine of its own.
        let id = vcpu.id();
        let again = &mut || start(&kvm, &Vm::with_ram(&kvm, ram)?, id, &programs[usize::from(id)]);
        autopsy::report(&vcpu, cause, None, Some(again))?;
    }
    Ok(ended)
}

/// A program in its window of the RAM, and a vCPU at its first instruction.
fn start(kvm: &Kvm, vm: &Arc<Vm>, id: u8, program: &Program) -> Result<Vcpu> {
    // The same code runs in each window: its addresses count from the start of its segments.
    let window = GuestAddress(WINDOW * u64::from(id));
    vm.ram().write_slice(&program.code, window.unchecked_add(PROGRAM.0))?;
    let vcpu = Vcpu::new(vm, id)?;
    vcpu.set_supported_cpuid(kvm)?;
    vcpu.start_real_mode_in(window, PROGRAM)?;
    Ok(vcpu)
}

// ANCHOR: loop
/// The run loop of one vCPU.
fn run_vcpu(vcpu: &mut Vcpu, ports: &Bus, exit: &ExitCode) -> Result<Ran, vcpu::Error> {
    let mut ran = Ran { outs: 0, ins: 0, bytes: 0, ending: Ending::Halted };
    let (crash, cause) = loop {
        match vcpu.run()? {
            Exit::IoOut { port, size, data } => {
                ran.outs += 1;
                ran.bytes += data.len();
                ports.write_each(port.into(), size, data);
                if let Some(code) = exit.get() {
                    ran.ending = Ending::Exited(code);
                    return Ok(ran);
                }
            }
            // What the bus puts into `data`, the guest finds in its register at the next KVM_RUN.
            Exit::IoIn { port, size, data } => {
                ran.ins += 1;
                ran.bytes += data.len();
                ports.read_each(port.into(), size, data);
            }
            Exit::Hlt => return Ok(ran),
            // A signal: the guest has done nothing.
            Exit::Interrupted => {}
            // A triple fault, memory where none is, a state that KVM cannot go on from.
            other => break (other.to_string(), Cause::of(&other)),
        }
    };
    // After a triple fault KVM on AMD resets the vCPU, and where it happened is forgotten.
    let at = Registers::of(vcpu)?;
    let at = if at.is_reset() { String::new() } else { format!(", at {}", at.address()) };
    ran.ending = Ending::Crashed(crash + &at, cause);
    Ok(ran)
}
// ANCHOR_END: loop
