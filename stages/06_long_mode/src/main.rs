//! Stage 06: 64-bit long mode, by the guest's own climb or put there by the host; interrupts, ring
//! 3, and a small Rust kernel.
//!
//! From this stage on the loop around `KVM_RUN` lives in [`common::run`]. Read `machine` from top
//! to bottom: it is what gets plugged into that loop.

mod guest;
mod kernel;
mod records;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use cli::console::{self, Console};
use cli::{Ended, autopsy, debug, gdb};
use common::bus::{self, Bus, shared};
use common::hypercall::{self, DebugExit};
use common::irqfd::{self, Irqfd};
use common::kvm;
use common::memory::Vm;
use common::run::{self, Ending, Ran};
use common::trace::Devices;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use guest::{Guest, Way};
use kvm_ioctls::Kvm;

/// Climbs to 64-bit long mode, and runs a small Rust kernel there.
///
/// Without arguments it boots the kernel to its shell, on this terminal: type help.
#[derive(Parser)]
#[command(after_help = "\
Try: 06_long_mode                           the kernel's shell; Ctrl-D ends it
     06_long_mode --enter climb             the same, climbing from real mode
     06_long_mode climb                     each mode on the way, its registers
     echo 'calc 6*7' | 06_long_mode         commands from a pipe
     06_long_mode climb --gdb               the same climb under gdb
     06_long_mode --exit-when '> ' --stats  how many exits a boot costs

The machine: 1 vCPU, interrupt controllers (PICs) and timer (PIT) in KVM, a
serial port at 0x3F8 on line 4, and port 0xF4, which ends it.")]
struct Args {
    /// What to run
    #[arg(value_enum, default_value_t = Guest::Kernel)]
    guest: Guest,

    /// How the kernel gets into long mode
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Way::Host)]
    enter: Way,

    /// Another kernel: an ELF64 file that is entered as guests/kernel/abi/src/boot.rs says
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "64M",
          allow_hyphen_values = true, value_parser = cli::size::parse)]
    memory: u64,

    #[command(flatten)]
    console: console::Flags,

    #[command(flatten)]
    debug: debug::Flags,
}

/// The guests write up to here.
const LEAST_MEMORY: u64 = 16 << 20;

fn main() -> ExitCode {
    cli::main(machine)
}

fn machine(args: Args) -> Result<Ended> {
    if args.memory < LEAST_MEMORY {
        let (found, least) = (args.memory >> 10, LEAST_MEMORY >> 20);
        bail!(
            "guest memory of {found} KiB: these guests need at least {least} MiB; give a larger --memory"
        );
    }
    if args.guest != Guest::Kernel && (args.kernel.is_some() || args.enter != Way::Host) {
        bail!(
            "--kernel and --enter belong to the guest `kernel`: leave the other guest's name out"
        );
    }

    // ANCHOR: machine
    let kvm = kvm::open()?;
    let mut vcpu = boot(&args, &kvm)?;
    let (vm, ram) = (vcpu.vm().clone(), vcpu.vm().ram());
    let (stop, stopped) = run::stop();
    let kit = args.debug.start(&vm, 1, kernel::symbols(&args), gdb::stopping(&stop))?;

    // What the guest finds at its ports: a console, and a way to end.
    let console = Console::open(&args.console, stop.clone())?;
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, console.screen()));
    let mut ports = Bus::new();
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop)))?;

    // Keys go in, the guest runs, and how it ended is how we end.
    console.type_into(move |keys| uart::type_in(&uart, keys))?;
    let (mmio, limit) = (Bus::new(), args.console.timeout);
    kit.follow(&mut vcpu, &Devices::of(&ports, &mmio))?;
    let stopped = stopped.under(&kit.gdb);
    let Ran { ending, vcpus } = run::run(vec![vcpu], ports, mmio, stopped, limit)?;
    let ended = console.finish(&ending);
    kit.finish()?;
    autopsy::tell(&ending, &vcpus, None, Some(|| boot(&args, &kvm)))?;

    if matches!(args.guest, Guest::Climb | Guest::Direct) && ending == Ending::Exited(0) {
        cli::eprint(format_args!("{}", records::table(&ram)?));
    }
    Ok(ended)
}

/// Makes the machine at the beginning of its life.
fn boot(args: &Args, kvm: &Kvm) -> Result<Vcpu> {
    // A VM with memory. Memory comes first: with an irqchip, each change of a memslot takes milliseconds.
    let vm = Vm::with_ram(kvm, args.memory)?;

    // Interrupt controllers and timer inside KVM; then the vCPU, which gets its local APIC from them.
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    // CPUID comes before long mode: without it the vCPU has none.
    vcpu.set_supported_cpuid(kvm)?;
    guest::load(args, &vm.ram(), &vcpu)?;
    Ok(vcpu)
}
// ANCHOR_END: machine
