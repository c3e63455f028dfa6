//! Stage 07: a disk boots. The vCPU starts as a processor does after reset, in a ROM; all else follows.
//!
//! Up to here the host put its guests into memory, registers included. A PC does less: its processor finds
//! a BIOS, which loads one sector of 512 bytes from a disk, and what stands in them has to find its own
//! way to a kernel.

mod args;
mod disks;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use args::{Args, Display};
use cli::console::Console;
use cli::{Ended, autopsy, gdb, keys};
use common::bus::{self, Bus, shared};
use common::cmos::{self, Cmos};
use common::firmware::{self, LOG_PORT, Log, POST_PORT, PostCode};
use common::hypercall::{self, DebugExit};
use common::i8042::{self, I8042, SystemControl};
use common::irqfd::{self, Irqfd};
use common::memory::Vm;
use common::run::{self, Ran};
use common::trace::Devices;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::vga::{self, Picture, Vga};
use common::{cpuid, ide, kvm, mp_table, multiboot, smp};
use kvm_ioctls::Kvm;

fn main() -> ExitCode {
    cli::main(machine)
}

fn machine(args: Args) -> Result<Ended> {
    let (drives, mut rom) = (args.drives()?, args.rom()?);
    let kvm = kvm::open()?;
    if args.firmware.is_none() {
        mp_table::put_into(&mut rom, args.cpus, cpuid::signature(&kvm)?)?;
    }

    let (vm, mut vcpus) = boot(&args, &kvm, &rom)?;

    // What the guest finds at its ports: how far POST came, settings, a console, a way to end, the disks.
    let (stop, stopped) = run::stop();
    let kit = args.debug.start(&vm, vcpus.len(), args.kernel.as_deref(), gdb::stopping(&stop))?;
    let mut console = Console::open(&args.console, stop.clone())?;
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, args.serial(&console)?));
    let vga = shared(Vga::default());
    let cmos = Cmos::new(args.memory)
        .with_boot_order(args.boot.into())
        .with_serial_console(args.display == Display::Serial);
    let post = PostCode::default();
    let mut ports = Bus::new();
    ports.insert("POST code", bus::ports(POST_PORT, 1), shared(post.clone()))?;
    if args.firmware_log {
        let log = Log::new(|line| cli::eprintln!("firmware: {line}"));
        ports.insert("firmware's log", bus::ports(LOG_PORT, 1), shared(log))?;
    }
    ports.insert("CMOS", bus::ports(cmos::PORT, cmos::PORTS), shared(cmos))?;
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    ports.insert("VGA", bus::ports(vga::PORT, vga::PORTS), vga.clone())?;
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop.clone())))?;
    let i8042 = shared(I8042::new(Irqfd::new(&vm, i8042::IRQ)?, stop));
    let control = shared(SystemControl(i8042.clone()));
    ports.insert("port 92", bus::ports(i8042::SYSTEM_CONTROL_PORT, 1), control)?;
    ports.insert("keyboard controller", bus::ports(i8042::PORT, i8042::PORTS), i8042.clone())?;
    for (socket, drives) in ide::CHANNELS.into_iter().zip(ide::cables(drives)) {
        ide::insert(&mut ports, socket, drives, Irqfd::new(&vm, socket.irq)?)?;
    }

    // Keys go in, the guest runs, and how it ended is how we end.
    match args.display {
        Display::Serial => {
            console.return_carriages()?;
            console.type_into(move |keys| uart::type_in(&uart, keys))?;
        }
        Display::Text => {
            args.check_beside_picture()?;
            let ram = vm.ram();
            console.show(move || Picture::take(&vga, &ram).ok())?;
            console.type_into(move |keys| i8042::type_in(&i8042, keys::strokes(keys)))?;
        }
    }
    let (mmio, limit) = (Bus::new(), args.console.timeout);
    kit.follow_all(&mut vcpus, &Devices::of(&ports, &mmio))?;
    let stopped = stopped.under(&kit.gdb);
    let Ran { ending, vcpus } = run::run(vcpus, ports, mmio, stopped, limit)?;
    let ended = console.finish(&ending);
    kit.finish()?;
    let again = || boot(&args, &kvm, &rom).map(|(_, mut vcpus)| vcpus.remove(0));
    autopsy::tell(&ending, &vcpus, None, Some(again))?;
    if args.kernel.is_none() && matches!(ended, Ended::GuestCrashed | Ended::TimedOut) {
        cli::eprintln!("the last POST code was {:02X}h", post.last());
    }
    Ok(ended)
}

/// Makes the machine as it is when it is switched on.
fn boot(args: &Args, kvm: &Kvm, rom: &[u8]) -> Result<(Arc<Vm>, Vec<Vcpu>)> {
    // ANCHOR: vm
    // A VM with RAM and ROM, interrupt controllers and timer, and vCPUs. Their registers stay as reset leaves
    // them: the first one takes its first instruction from 0xFFFFFFF0, the others wait until it wakes them.
    // Another firmware than ours gets its copy below 1 MiB as RAM: a PC's ROMs have their variables there.
    let vm = firmware::create_vm(kvm, args.memory, rom, args.firmware.is_some())?;
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpus = smp::create_vcpus(kvm, &vm, args.cpus)?;
    // ANCHOR_END: vm
    if let Some(kernel) = &args.kernel {
        // Unless the host is the boot loader.
        multiboot::boot(&vcpus[0], &vm.ram(), args.memory, kernel, &args.append)
            .with_context(|| format!("kernel {}", kernel.display()))?;
    }
    Ok((vm, vcpus))
}
