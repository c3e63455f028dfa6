//! Stage 06: 64-bit long mode, by the guest's own climb or put there by the host; interrupts, ring
//! 3, and a small Rust kernel.
//!
//! From this stage on the loop around `KVM_RUN` lives in [`common::run`]. Read `machine` from top
//! to bottom: it is what gets plugged into that loop.

mod kernel;
mod records;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use cli::console::{self, Console};
use cli::{Ended, autopsy, gdb, trace};
use common::bus::{self, Bus, shared};
use common::hypercall::{self, DebugExit};
use common::irqfd::{self, Irqfd};
use common::layout::PROGRAM;
use common::memory::{Ram, Vm};
use common::run::{self, Ending, Ran};
use common::trace::Devices;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::{kvm, long_mode};
use kvm_bindings::kvm_regs;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

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
    trace: trace::Flags,

    #[command(flatten)]
    gdb: gdb::Flags,

    #[command(flatten)]
    autopsy: autopsy::Flags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    /// The Rust kernel: paging, interrupts, a shell, and programs in ring 3
    Kernel,
    /// Real mode, protected mode, 32-bit paging, PAE, long mode in turn
    Climb,
    /// Long mode from the first instruction on: the host has set the registers
    Direct,
    /// Six exceptions, caught and reported
    Exceptions,
    /// The timer's interrupts, through the interrupt controllers in KVM
    Interrupts,
    /// Down to ring 3, and back by syscall, by int 0x80 and by a fault
    Rings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// The host writes the tables and sets the registers
    Host,
    /// A guest program climbs from real mode and jumps to the kernel
    Climb,
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
    let watch = args.trace.start(&vm)?;

    // What the guest finds at its ports: a console, and a way to end.
    let (stop, stopped) = run::stop();
    let gdb = args.gdb.start(1, args.kernel.as_deref(), gdb::stopping(&stop))?;
    let console = Console::open(&args.console, stop.clone())?;
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, console.screen()));
    let mut ports = Bus::new();
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop)))?;

    // Keys go in, the guest runs, and how it ended is how we end.
    console.type_into(move |keys| uart::type_in(&uart, keys))?;
    let (mmio, limit) = (Bus::new(), args.console.timeout);
    watch.follow(&mut vcpu, &Devices::of(&ports, &mmio))?;
    let stopped = stopped.under(gdb).or_hung(args.autopsy.watchdog());
    let Ran { ending, vcpus } = run::run(vec![vcpu], ports, mmio, stopped, limit)?;
    let ended = console.finish(&ending);
    watch.finish()?;
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
    load(args, &vm.ram(), &vcpu)?;
    Ok(vcpu)
}
// ANCHOR_END: machine

/// Puts the guest into memory, and the vCPU at its first instruction.
fn load(args: &Args, ram: &Ram, vcpu: &Vcpu) -> Result<()> {
    let program = match args.guest {
        Guest::Kernel => {
            let entry = kernel::load(ram, args.kernel.as_deref())?;
            return match args.enter {
                Way::Host => kernel::enter(vcpu, ram, entry),
                Way::Climb => kernel::climb_to(vcpu, ram, entry),
            };
        }
        Guest::Climb => {
            ram.write_slice(asm::real::CLIMB, PROGRAM)?;
            return Ok(vcpu.start_real_mode(PROGRAM)?);
        }
        Guest::Direct => asm::long::DIRECT,
        Guest::Exceptions => asm::long::EXCEPTIONS,
        Guest::Interrupts => asm::long::INTERRUPTS,
        Guest::Rings => asm::long::RINGS,
    };
    ram.write_slice(program, PROGRAM)?;
    let GuestAddress(rip) = PROGRAM;
    Ok(long_mode::enter(vcpu, ram, kvm_regs { rip, ..Default::default() })?)
}
