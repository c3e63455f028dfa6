//! Stage 07: a disk boots. The host loads its first sector and nothing else; the code in it loads the rest.
//!
//! Up to here the host put its guests into memory, registers included. A PC's firmware does less: it
//! loads one sector of 512 bytes, and what stands in them has to find its own way to a kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use cli::Ended;
use cli::console::{self, Console};
use common::ata::{self, Ata, FileSectors, Sectors};
use common::bus::{self, Bus, shared};
use common::cmos::{self, Cmos};
use common::disk_image::{self, SECTOR};
use common::hypercall::{self, DebugExit};
use common::irqfd::{self, Irqfd};
use common::layout::BOOT_SECTOR;
use common::memory::Vm;
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::{file, kvm, run};
use kvm_bindings::kvm_regs;
use vm_memory::Bytes;

/// The drive's number, as a BIOS passes it to a boot sector in DL: the first hard disk.
const FIRST_HARD_DISK: u64 = 0x80;

/// Boots a disk: boot sector, second stage, and the Rust kernel of stage 06.
///
/// The host does what a BIOS does at the end of its work: it loads sector 0 to 0x7C00, checks that it ends
/// in 55 AA, and starts the vCPU there in real mode. All else is read by the guest itself, through the
/// ports of an ATA disk.
#[derive(Parser)]
#[command(after_help = "\
Try: 07_bootloader                           the kernel's shell; Ctrl-D ends it
     07_bootloader --write-image boot.img    the disk as a file, for hexdump -C
     07_bootloader --disk boot.img           boot it, or any other flat image
     07_bootloader --exit-when '> ' --stats  how many exits a boot costs

The same image boots a PC, or QEMU:
     qemu-system-x86_64 -nographic -drive file=boot.img,format=raw \\
                        -device isa-debug-exit,iobase=0xf4

The machine: 1 vCPU, interrupt controllers and timer in KVM, a serial port at
0x3F8 on line 4, an ATA disk at 0x1F0, CMOS at 0x70, and port 0xF4, which ends
it. There is no BIOS to call.")]
struct Args {
    /// The disk to boot, a flat image. Without it: our boot sector, second stage and kernel, in memory
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,

    /// Write the built-in disk to FILE and end
    #[arg(long, value_name = "FILE", conflicts_with = "disk")]
    write_image: Option<PathBuf>,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "64M",
          allow_hyphen_values = true, value_parser = cli::size::parse)]
    memory: u64,

    #[command(flatten)]
    console: console::Flags,
}

const TOO_SMALL: &str =
    "--memory is too small for a PC, whose boot sector goes to 0x7C00; give at least 32K";

fn main() -> ExitCode {
    cli::main(machine)
}

fn machine(args: Args) -> Result<Ended> {
    if let Some(path) = &args.write_image {
        file::write(path, &built_in_disk()?).with_context(|| path.display().to_string())?;
        return Ok(Ended::Well);
    }
    let (boot_sector, disk) = match &args.disk {
        Some(path) => open_disk(path).with_context(|| format!("disk {}", path.display()))?,
        None => insert(built_in_disk()?)?,
    };

    // A VM with memory, interrupt controllers and timer, and a vCPU: as in stage 06.
    let kvm = kvm::open()?;
    let vm = Vm::with_ram(&kvm, args.memory)?;
    irqfd::create_irqchip(&vm)?;
    irqfd::create_pit(&vm)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    vcpu.set_supported_cpuid(&kvm)?;

    // The last step of a BIOS: one sector to 0x7C00, the drive's number in DL, and off it goes.
    vm.ram().write_slice(&boot_sector, BOOT_SECTOR).ok().context(TOO_SMALL)?;
    vcpu.start_real_mode(BOOT_SECTOR)?;
    vcpu.set_regs(&kvm_regs { rdx: FIRST_HARD_DISK, ..vcpu.regs()? })?;

    // What the guest finds at its ports: the disk, how much memory there is, a console, a way to end.
    let (stop, stopped) = run::stop();
    let console = Console::open(&args.console, stop.clone())?;
    let uart = shared(Uart::new(Irqfd::new(&vm, uart::COM1_IRQ)?, console.screen()));
    let ata = shared(disk);
    let control = shared(ata::Control(ata.clone()));
    let mut ports = Bus::new();
    ports.insert("disk", bus::ports(ata::PORT, ata::PORTS), ata)?;
    ports.insert("disk control", bus::ports(ata::CONTROL_PORT, 1), control)?;
    ports.insert("CMOS", bus::ports(cmos::PORT, cmos::PORTS), shared(Cmos::new(args.memory)))?;
    ports.insert("serial port", bus::ports(uart::COM1, uart::PORTS), uart.clone())?;
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop)))?;

    // Keys go in, the guest runs, and how it ended is how we end.
    console.type_into(move |keys| uart::type_in(&uart, keys))?;
    let (ending, exits) = run::run(vec![vcpu], ports, Bus::new(), stopped, args.console.timeout)?;
    Ok(console.finish(&ending, &exits))
}

/// Boot sector, second stage and kernel as one disk.
fn built_in_disk() -> Result<Vec<u8>> {
    Ok(disk_image::build(asm::boot::SECTOR, asm::boot::STAGE2, guests::KERNEL)?)
}

/// Opens a disk image, for writing if that is permitted.
fn open_disk(path: &Path) -> Result<([u8; SECTOR], Ata)> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true);
    let (file, len) = match file::open_with(path, &mut options) {
        Err(file::Error::Open(_)) => file::open(path)?,
        opened => opened?,
    };
    disk_image::check_length(len)?;
    insert(FileSectors::new(file, len))
}

/// Puts a disk into a drive, if it can be booted. Its first sector comes along.
fn insert(mut disk: impl Sectors + 'static) -> Result<([u8; SECTOR], Ata)> {
    let mut boot_sector = [0; SECTOR];
    disk.read(0, &mut boot_sector).context("cannot read the first sector")?;
    disk_image::check_boot_sector(&boot_sector)?;
    Ok((boot_sector, Ata::new(disk)))
}
