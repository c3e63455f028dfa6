//! Stage 08: unmodified Linux boots to an interactive shell.
//!
//! All that it needs has been introduced by the stages before, except for what makes a virtual machine a
//! PC that Linux knows: `boot_params` and e820, ACPI tables, and a way to power off and to restart.

mod args;
mod devices;
mod disks;
mod nets;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use args::Args;
use cli::console::{Console, Screen};
use cli::{Ended, autopsy, gdb};
use common::bus::{self, Bus, shared};
use common::cmos::{self, Cmos};
use common::i8042::{self, I8042};
use common::irqfd::{self, Irqfd};
use common::memory::{self, Vm};
use common::panic_watch::PanicWatch;
use common::run::{self, Ending, Ran};
use common::trace::Devices;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::virtio::console::{self as hvc, Size};
use common::{acpi, kvm, linux, msr, smp, snapshot, virtio};
use devices::Opened;
use kvm_ioctls::Kvm;

fn main() -> ExitCode {
    cli::main(machine)
}

/// Memory and vCPUs, then devices around them; and until it ends, the guest has the word.
fn machine(args: Args) -> Result<Ended> {
    let saved = args.restore.as_deref().map(snapshot::open).transpose()?;
    let options = args.devices(saved.as_ref())?;
    let Opened { mut devices, balloon } = options.open(args.verbose())?;
    let count = devices.count(options.hvc().into())?;
    let kvm = kvm::open()?;
    let (vm, mut vcpus, finding) = match &saved {
        Some(saved) => saved.machine(&kvm).map(|(vm, vcpus)| (vm, vcpus, None))?,
        None => boot(&args, &kvm, count)?,
    };

    // The terminal from which we were started becomes the guest's.
    let (stop, stopped) = run::stop();
    let kit =
        args.debug.start(&vm, vcpus.len(), args.symbols().as_deref(), gdb::stopping(&stop))?;
    let console = Console::open(&args.console, stop.clone())?;
    args.record.as_deref().map(|file| console.record(file)).transpose()?;
    let (screen, panicked) = PanicWatch::new(console.screen(), stop.clone());
    let hvc = options.hvc().then(|| add_hvc(&mut devices, &console, &screen)).transpose()?;

    // ANCHOR: devices
    // What the guest finds at its ports: a serial port, a clock, and two ways to end the machine, which has a power
    // button.
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, screen));
    let mut ports = Bus::new();
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    let i8042 = shared(I8042::new(Irqfd::new(&vm, i8042::IRQ)?, stop.clone()));
    ports.insert("i8042", bus::ports(i8042::PORT, i8042::PORTS), i8042.clone())?;
    let cmos = shared(Cmos::new(vm.size()));
    ports.insert("CMOS", bus::ports(cmos::PORT, cmos::PORTS), cmos.clone())?;
    let pm1 = shared(acpi::Pm1::new(Irqfd::new(&vm, acpi::SCI)?, stop.clone()));
    ports.insert("ACPI PM1", bus::ports(acpi::PM1_PORT, acpi::PM1_PORTS), pm1.clone())?;

    // And in its memory: devices made for virtual machines, each with a thread of its own.
    let mut kept = snapshot::Devices::default();
    let mut mmio = Bus::new();
    let workers = virtio::plug(&vm, &mut mmio, devices, &stop, &mut kept)?;
    // ANCHOR_END: devices

    // What a snapshot has of them, beside what KVM gives out itself.
    kept.add("serial port", uart.clone());
    kept.add("i8042", i8042);
    kept.add("CMOS", cmos.clone());
    kept.add("ACPI PM1", pm1.clone());
    saved.map(|saved| kept.restore(&saved)).transpose()?;

    // The clock's alarm rings, the power button can be pressed, the balloon's size changed, and the machine saved.
    cmos::ring(cmos, Irqfd::new(&vm, cmos::IRQ)?)?;
    console.on_sigterm(move || acpi::press_power_button(&pm1))?;
    if let Some(balloon) = &balloon {
        devices::add_balloon_keys(&console, balloon, vm.size());
    }
    if args.snapshot_to.is_some() {
        console.let_save()?;
    }

    // Keys go in, the guest runs, and how it ended is how we end.
    match hvc {
        Some(terminal) => console.type_into(move |keys| terminal.type_in(keys))?,
        None => console.type_into(move |keys| uart::type_in(&uart, keys))?,
    }
    kit.follow_all(&mut vcpus, &Devices::of(&ports, &mmio))?;
    let stopped = stopped.under(&kit.gdb);
    let again = || boot(&args, &kvm, count).map(|(_, mut vcpus, _)| vcpus.remove(0));
    let (cpus, limit) = (vcpus.len(), args.console.timeout);
    let Ran { ending, vcpus } = run::run(vcpus, ports, mmio, stopped, limit)?;
    drop(workers);
    if let (Ending::Saved, Some(folder)) = (&ending, &args.snapshot_to) {
        let (kept, options) = (kept.keep()?, options.to_keep()?);
        let bytes = snapshot::save(folder, &kvm, &vm, &vcpus, cpus, kept, &options)?;
        args.tell_saved(folder, bytes);
    }
    let ending = panicked.judge(ending);
    let ended = console.finish(&ending);
    args.tell_balloon(balloon);
    kit.finish()?;
    autopsy::tell(&ending, &vcpus, finding, args.restore.is_none().then_some(again))?;
    Ok(ended)
}

/// A machine, and what is wrong with what its kernel is told, if anything is.
type Booted = (Arc<Vm>, Vec<Vcpu>, Option<String>);

/// Makes a machine at the beginning of its life, with the kernel loaded.
fn boot(args: &Args, kvm: &Kvm, virtio_devices: usize) -> Result<Booted> {
    let (kernel_path, initrd_path) = args.files()?;
    let cmdline = args.cmdline();

    // A VM with memory. Memory comes first: with an irqchip, each change of a memslot takes milliseconds.
    args.caution([memory::caution(args.memory), smp::caution(kvm, args.cpus)]);
    let vm = Vm::with_ram_of(kvm, args.memory, args.pages())?;
    let ram = vm.ram();

    // ANCHOR: boot
    // The boot loader's part: the kernel, the initrd, and what the kernel is told about its machine.
    let kernel = linux::load_kernel(&ram, &kernel_path, &args.kernel_options())
        .with_context(|| format!("kernel {}", kernel_path.display()))?;
    let initrd = initrd_path
        .map(|path| {
            linux::load_initrd(&ram, &kernel, &path)
                .with_context(|| format!("initrd {}", path.display()))
        })
        .transpose()?;
    args.tell(&kernel.notes, &initrd, &cmdline);
    let rsdp = acpi::write_tables(&ram, args.cpus, virtio_devices)?;
    linux::write_boot_params(&ram, &kernel, initrd, &cmdline, rsdp)?;
    let finding = linux::check_boot_params(&ram, &kernel);

    // Interrupt controllers and timer inside KVM; then the vCPUs, which get their local APICs from it. The first
    // begins with the kernel; the others wait until it wakes them.
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpus = smp::create_vcpus(kvm, &vm, args.cpus)?;
    vcpus.iter().try_for_each(msr::set)?;
    linux::enter(&vcpus[0], &ram, &kernel)?;
    // ANCHOR_END: boot
    Ok((vm, vcpus, finding))
}

/// Adds a virtio console for the person's terminal: what is printed there is watched as on the serial port, the device
/// is served again when there is room to print, and learns of the window's size.
fn add_hvc(
    devices: &mut virtio::Devices,
    console: &Console,
    screen: &PanicWatch<Screen>,
) -> io::Result<hvc::Terminal> {
    let size = console.size().map(|(columns, rows)| Size { columns, rows });
    let (device, terminal) = hvc::Console::new(screen.also(console.screen().hurried()), size);
    devices.add(device);
    let (printed, resized) = (terminal.clone(), terminal.clone());
    console.when_printed(move || printed.printed());
    console.when_resized(move |columns, rows| resized.resize(Size { columns, rows }))?;
    Ok(terminal)
}
