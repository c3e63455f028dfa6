//! The command line, and the disk and the firmware that it chooses.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use cli::console::{self, Console};
use cli::debug;
use common::cmos::BootFirst;
use common::ide::Drive;
use common::smp::MAX_CPUS;
use common::{boot_disk, file, firmware};

use crate::disks::{self, Disk};

/// Boots a disk: BIOS, MBR, second stage, and the Rust kernel of stage 06.
///
/// The vCPU takes its first instruction from a ROM, 16 bytes below 4 GiB. The BIOS there sets the
/// machine up, loads sector 0 of the disk to 0x7C00, checks that it ends in 55 AA, and jumps to it.
/// The disk's own code reads the rest.
#[derive(Parser)]
#[command(after_help = "\
Try: 07_bootloader                           the kernel's shell; Ctrl-D ends it
     07_bootloader --no-disk                 what the BIOS says to that
     07_bootloader --disk disk.img           boot another disk, a flat image
     07_bootloader --disk disk.img,snapshot  boot it and leave it as it is
     07_bootloader --exit-when '> ' --stats  how many exits a boot costs
     07_bootloader --disk xv6.img --disk fs.img --cpus 4    xv6, from its own disks
     07_bootloader --kernel FILE             no BIOS: the host is the boot loader
     07_bootloader --disk grub.img --cpus 2  GRUB boots Linux: cargo xtask grub-image
     07_bootloader --firmware /usr/share/seabios/bios.bin --firmware-log
                                             SeaBIOS boots the built-in disk
     07_bootloader --disk FILE --display text --serial log.txt
                                             another system on screen and keyboard,
                                             what its serial port says in a file

`cargo xtask image` writes the built-in disk to a file. It boots a PC, or QEMU, too.

The machine: vCPUs with local APICs, IOAPIC, PICs and timer (PIT) in KVM, a text
screen at 0xB8000 and its registers at 0x3C0, a keyboard controller at 0x60 on
line 1 and port 0x92 beside it (A20, reset), a serial port at 0x3F8 on line 4,
IDE disks at 0x1F0 on line 14 and at 0x170 on line 15, CMOS at 0x70, POST codes
at 0x80, and port 0xF4, which ends it. The BIOS answers int 10h to 1Ah; keys come
from the serial port, or from the keyboard with --display text.")]
pub struct Args {
    /// A disk: a flat image, or a block device. What the guest writes goes to the file; with ,ro it
    /// cannot write, with ,snapshot its writes are thrown away at the end. Up to four: primary
    /// master and slave, secondary master and slave. Without any: our MBR, second stage and kernel,
    /// in memory
    ///
    /// A comma in the name is written twice: --disk a,,b.img
    #[arg(long = "disk", value_name = "FILE[,rw|ro|snapshot]",
          value_parser = OsStringValueParser::new().try_map(Disk::parse))]
    disks: Vec<Disk>,

    /// Start without a disk, to see what the BIOS says
    #[arg(long, conflicts_with = "disks")]
    no_disk: bool,

    /// Start no BIOS, but enter this kernel as a Multiboot loader does: a 32-bit ELF file, or one with addresses in
    /// its header. There is no built-in disk then
    #[arg(long, value_name = "FILE", conflicts_with = "firmware")]
    pub kernel: Option<PathBuf>,

    /// What the kernel gets for a command line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        default_value = "",
        hide_default_value = true
    )]
    pub append: String,

    /// Another firmware than our BIOS, such as SeaBIOS: an image of 64, 128 or 256 KiB
    #[arg(long, value_name = "FILE")]
    pub firmware: Option<PathBuf>,

    /// Print what the firmware logs at port 402h, as SeaBIOS does, on stderr
    #[arg(long, requires = "firmware")]
    pub firmware_log: bool,

    /// Which drives the BIOS tries first. A disk of 1.44 MB (1474560 bytes) is a floppy
    #[arg(long, value_enum, default_value_t = Boot::Floppy)]
    pub boot: Boot,

    /// What one sees here, and what the keys are typed on
    #[arg(long, value_enum, default_value_t = Display::Serial)]
    pub display: Display,

    /// With --display text: write what the serial port sends to FILE. Without this nobody sees it
    #[arg(long, value_name = "FILE")]
    serial: Option<PathBuf>,

    /// Processors, 1 to 255. All but the first wait until it starts them by INIT and STARTUP
    #[arg(long, value_name = "N", default_value = "1", allow_hyphen_values = true,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    pub cpus: u8,

    /// The guest's memory. xv6 takes 224 MiB for granted
    #[arg(long, value_name = "SIZE", default_value = "256M",
          allow_hyphen_values = true, value_parser = cli::size::parse)]
    pub memory: u64,

    #[command(flatten)]
    pub console: console::Flags,

    #[command(flatten)]
    pub debug: debug::Flags,
}

/// Which drives the BIOS tries first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// Floppies, then hard disks
    Floppy,
    /// Hard disks, then floppies
    Disk,
}

impl From<Boot> for BootFirst {
    fn from(boot: Boot) -> Self {
        match boot {
            Boot::Floppy => Self::Floppies,
            Boot::Disk => Self::Disks,
        }
    }
}

/// What stands for the machine's screen and keyboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Display {
    /// The serial port, which the BIOS copies its text screen to and takes keys from
    Serial,
    /// The text screen, drawn as it changes, and printed when the machine has ended; and the keyboard
    Text,
}

impl Args {
    /// Where the serial port's output goes: to the console unless that shows the text screen.
    pub fn serial(&self, console: &Console) -> Result<Box<dyn Write + Send>> {
        Ok(match (&self.serial, self.display) {
            (None, Display::Serial) => Box::new(console.screen()),
            (None, Display::Text) => Box::new(io::sink()),
            (Some(path), Display::Text) => {
                let file = file::create(path);
                Box::new(file.with_context(|| format!("serial port to {}", path.display()))?)
            }
            (Some(_), Display::Serial) => {
                bail!("--serial goes with --display text: without it the serial port is here")
            }
        })
    }

    /// Refuses what would write into the text screen's picture.
    pub fn check_beside_picture(&self) -> Result<()> {
        for (wanted, option) in [
            (self.debug.wants_trace(), "--trace"),
            (self.debug.wants_gdb(), "--gdb"),
            (self.firmware_log, "--firmware-log"),
        ] {
            if wanted {
                console::check_beside_picture(option)?;
            }
        }
        Ok(())
    }

    /// The drives with the disks that were asked for.
    pub fn drives(&self) -> Result<Vec<Drive>> {
        match &self.disks[..] {
            _ if self.no_disk => Ok(Vec::new()),
            [] if self.kernel.is_some() => Ok(Vec::new()),
            [] => {
                let disk = boot_disk::build(asm::boot::MBR, asm::boot::STAGE2, guests::KERNEL)?;
                Ok(vec![Drive::new(disk, "1")])
            }
            disks => disks::open(disks, self.kernel.is_none()),
        }
    }

    /// The firmware that was asked for.
    pub fn rom(&self) -> Result<Vec<u8>> {
        let Some(path) = &self.firmware else { return Ok(asm::bios::BIOS.to_vec()) };
        let image = file::read(path, firmware::MAX).map_err(anyhow::Error::from);
        let checked = image.and_then(|image| {
            firmware::check(&image)?;
            Ok(image)
        });
        checked.with_context(|| format!("firmware {}", path.display()))
    }
}
