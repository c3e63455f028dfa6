//! Stage 08: unmodified Linux boots to an interactive shell.
//!
//! All that it needs has been introduced by the stages before, except for what makes a virtual machine a
//! PC that Linux knows: `boot_params` and e820, ACPI tables, and a way to power off and to restart.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cli::console::{self, Console};
use cli::{Ended, cache, size, trace};
use common::bus::{self, Bus, shared};
use common::i8042::{self, I8042};
use common::irqfd::{self, Irqfd};
use common::memory::Vm;
use common::panic_watch::PanicWatch;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::{acpi, cpuid, kvm, linux, msr, run};

/// How many vCPUs the machine has.
const VCPUS: u8 = 1;

/// Boots Linux to an interactive shell on this terminal.
///
/// The host is the boot loader: it puts kernel and initrd into the guest's memory, writes the page of
/// parameters that Linux expects (boot_params, with the memory map in it) and ACPI tables, and starts the
/// vCPU at the kernel's 64-bit entry. From there on Linux finds a small PC.
#[derive(Parser)]
#[command(after_help = "\
Try: 08_boot_linux                                     Debian's kernel, a shell
     08_boot_linux --append loglevel=7                 the kernel's own messages
     08_boot_linux --kernel /boot/vmlinuz-$(uname -r)  this machine's kernel
     echo 'cat /proc/meminfo' | 08_boot_linux          commands from a pipe

The machine: 1 vCPU, interrupt controllers and timer in KVM, a serial port
(ttyS0), ACPI, no disk. It ends when the guest powers off, restarts, or its
kernel panics.")]
struct Args {
    /// The kernel: a bzImage (vmlinuz) or a vmlinux. Without it: the one that `cargo xtask setup`
    /// fetched
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The initial root file system. Without it: the busybox that `cargo xtask setup` packed
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Start without an initial root file system
    #[arg(long, conflicts_with = "initrd")]
    no_initrd: bool,

    /// The kernel's command line, instead of the default one. Without console=ttyS0 nothing is seen
    #[arg(long, value_name = "TEXT", default_value = linux::DEFAULT_CMDLINE)]
    cmdline: String,

    /// Add TEXT to the command line; of an option that is there twice, the kernel takes the last
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    append: String,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "512M",
          allow_hyphen_values = true, value_parser = size::parse)]
    memory: u64,

    #[command(flatten)]
    console: console::Flags,

    #[command(flatten)]
    trace: trace::Flags,
}

fn main() -> ExitCode {
    cli::main(boot)
}

fn boot(args: Args) -> Result<Ended> {
    let (kernel_path, initrd_path) = files(&args)?;
    let cmdline = [args.cmdline.as_str(), &args.append].join(" ");

    // A VM with memory. Memory comes first: with an irqchip, each change of a memslot takes milliseconds.
    let kvm = kvm::open()?;
    let vm = Vm::with_ram(&kvm, args.memory)?;
    let ram = vm.ram();

    // The boot loader's part: the kernel, the initrd, and what the kernel is told about its machine.
    let kernel = linux::load_kernel(&ram, &kernel_path)
        .with_context(|| format!("kernel {}", kernel_path.display()))?;
    let initrd = initrd_path
        .map(|path| {
            linux::load_initrd(&ram, &kernel, &path)
                .with_context(|| format!("initrd {}", path.display()))
        })
        .transpose()?;
    let rsdp = acpi::write_tables(&ram, VCPUS)?;
    linux::write_boot_params(&ram, &kernel, initrd, cmdline.trim(), rsdp)?;

    // Interrupt controllers and timer inside KVM; then the vCPU, which gets its local APIC from it.
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    cpuid::set(&kvm, &vcpu, VCPUS)?;
    msr::set(&vcpu)?;
    linux::enter(&vcpu, &ram, &kernel)?;

    // What the guest finds at its ports: a console, and two ways to end the machine.
    let (stop, stopped) = run::stop();
    let console = Console::open(&args.console, stop.clone())?;
    let (screen, panicked) = PanicWatch::new(console.screen(), stop.clone());
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, screen));
    let mut ports = Bus::new();
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    let i8042 = shared(I8042::new(Irqfd::new(&vm, i8042::IRQ)?, stop.clone()));
    ports.insert("i8042", bus::ports(i8042::PORT, i8042::PORTS), i8042)?;
    let pm1 = shared(acpi::Pm1::new(stop));
    ports.insert("ACPI PM1", bus::ports(acpi::PM1_PORT, acpi::PM1_PORTS), pm1)?;

    // Keys go in, the guest runs, and how it ended is how we end.
    console.type_into(move |keys| uart::type_in(&uart, keys))?;
    let (trace, limit) = (args.trace.start(), args.console.timeout);
    let (ending, exits) = run::run(vec![vcpu], ports, Bus::new(), stopped, limit, trace)?;
    Ok(console.finish(&panicked.judge(ending), &exits))
}

/// The kernel and the initrd: the ones that were named, else the default ones.
fn files(args: &Args) -> Result<(PathBuf, Option<PathBuf>)> {
    let named_or = |named: &Option<PathBuf>, default: PathBuf, option| match named {
        Some(file) => Ok(file.clone()),
        None if default.exists() => Ok(default),
        None => bail!("no {}: run `cargo xtask setup`, or give {option} FILE", default.display()),
    };
    let kernel = named_or(&args.kernel, cache::default_kernel(), "--kernel")?;
    if args.no_initrd {
        return Ok((kernel, None));
    }
    Ok((kernel, Some(named_or(&args.initrd, cache::default_initrd(), "--initrd")?)))
}
