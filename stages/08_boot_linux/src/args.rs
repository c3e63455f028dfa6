//! The command line, and the files that it chooses.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use cli::{cache, config, console, debug, manual, size};
use common::linux::{self, Cache, Way};
use common::memory::Pages;
use common::smp::MAX_CPUS;
use common::snapshot::{self, Saved};
use common::virtio::balloon::Control;

use crate::devices;

/// Boots Linux to an interactive shell on this terminal.
///
/// The host is the boot loader: it puts kernel and initrd into the guest's memory, writes the page of
/// parameters that Linux expects (boot_params, with the memory map in it) and ACPI tables, and starts the
/// vCPU at the kernel's entry. From there on Linux finds a small PC.
///
/// A compressed kernel is unpacked on the host, which is quicker than letting the guest do it.
#[derive(Parser)]
#[command(next_help_heading = "Boot")]
#[command(after_help = "\
Try: 08_boot_linux                              Debian's kernel, a shell
     08_boot_linux -v --cpus 2 --memory 2G      say what is done for it
     08_boot_linux --append loglevel=7          the kernel's own messages
     08_boot_linux --kernel /boot/vmlinuz-6.1   a kernel of yours
     08_boot_linux --disk a.img --disk b.img,ro disks: /dev/vda and /dev/vdb
     08_boot_linux --net user --append ip=dhcp  a network, without root
     08_boot_linux --kernel small --gdb         the kernel under gdb, from its entry
     echo 'cat /proc/meminfo' | 08_boot_linux   commands from a pipe
     08_boot_linux --record session.cast        a recording, for asciinema
     08_boot_linux --cpus 2 --print-config > vm.toml
     08_boot_linux --config vm.toml             the same machine from a file

The machine: vCPUs, interrupt controllers and timer in KVM, a serial port
(ttyS0), a clock, ACPI, virtio devices. It ends when the guest powers off,
restarts, or its kernel panics. SIGTERM presses its power button, for a guest that
listens to it; a second one ends it at once.")]
pub struct Args {
    /// The kernel: a bzImage (vmlinuz) or a vmlinux; or `small`, the one that `cargo xtask kernel`
    /// builds. Without it: the one that `cargo xtask setup` fetched
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Where the kernel is entered
    #[arg(long, value_enum, default_value_t = Entry::Auto)]
    entry: Entry,

    /// Neither use nor keep unpacked kernels in the cache folder
    #[arg(long)]
    no_cache: bool,

    /// The initial root file system. Without it: the busybox that `cargo xtask setup` packed
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Start without an initial root file system
    #[arg(long, conflicts_with = "initrd")]
    no_initrd: bool,

    /// The kernel's command line, instead of the default one, which -v shows. Without console=ttyS0 or
    /// console=hvc0 in it, as --console says, nothing is seen
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,

    /// Add TEXT to the command line; of an option that is there twice, the kernel takes the last
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    append: String,

    /// The guest's memory. It may be more than this host has: only what the guest touches is taken
    #[arg(long, help_heading = "Machine", value_name = "SIZE", default_value = "512M",
          allow_hyphen_values = true, value_parser = size::parse)]
    pub memory: u64,

    /// Take the memory from the huge pages (2 MiB) that this host's administrator has reserved, all at
    /// once. Without this it comes as it is touched, in transparent huge pages if the host has them
    #[arg(long, help_heading = "Machine")]
    hugepages: bool,

    /// Processors, 1 to 255
    #[arg(long, help_heading = "Machine", value_name = "N", default_value = "1", allow_hyphen_values = true,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    pub cpus: u8,

    #[command(flatten)]
    devices: devices::Options,

    /// Have Ctrl-A s, or the signal USR1, save the machine to this folder and end. Its memory, processors and devices
    /// are saved, what its disks hold is not: leave them as they are until it is restored
    #[arg(long, help_heading = "Snapshots", value_name = "DIR")]
    pub snapshot_to: Option<PathBuf>,

    /// Go on with the machine that was saved to this folder. Its devices are the same, and so are the files, interfaces
    /// and sockets behind them, unless others are given
    ///
    /// --disk, --net and --vsock name what is to be in their place: as many disks and interfaces as there were, in their
    /// order. A disk has to be as it was left. With ,snapshot its file stays that way, and the machine can be restored any
    /// number of times
    #[arg(long, help_heading = "Snapshots", value_name = "DIR", conflicts_with_all = ["kernel", "entry", "no_cache", "initrd", "no_initrd",
          "cmdline", "append", "memory", "hugepages", "cpus"])]
    pub restore: Option<PathBuf>,

    #[command(flatten)]
    pub console: console::Flags,

    /// Write all that the console prints to a new file as well, with its times: an asciicast v2, which asciinema plays
    /// and `cargo xtask record FILE` makes pictures and a film of. It grows to 16 MiB at most. What is typed is in it only
    /// as far as the guest echoes it
    #[arg(long, help_heading = "Console", value_name = "FILE")]
    pub record: Option<PathBuf>,

    #[command(flatten)]
    pub debug: debug::Flags,

    /// Say on stderr what is found in the kernel and done with it
    #[arg(short, long, help_heading = "Debugging")]
    verbose: bool,

    #[command(flatten)]
    config: config::Flags,

    #[command(flatten)]
    manual: manual::Flags,
}

/// Where the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Entry {
    /// The quickest way that the kernel has: the first of the following
    Auto,
    /// The unpacked kernel's own entry, in 64-bit mode
    Elf,
    /// The bzImage's 64-bit entry: the guest unpacks its kernel, and may choose its address at random
    Packed,
    /// The bzImage's 32-bit entry, which all have
    Packed32,
    /// The unpacked kernel's PVH entry, made for guests, in 32-bit mode
    Pvh,
}

impl Args {
    /// The file that gdb may want for the symbols of the kernel that was named.
    pub fn symbols(&self) -> Option<PathBuf> {
        let kernel = self.kernel.as_deref()?;
        match kernel.as_os_str() == "small" {
            true => Some(cache::small_kernel().with_file_name("vmlinux")),
            false => Some(kernel.into()),
        }
    }

    /// The kernel and the initrd: the ones that were named, else the default ones.
    pub fn files(&self) -> Result<(PathBuf, Option<PathBuf>)> {
        let named_or = |named: &Option<PathBuf>, default: PathBuf, option| match named {
            Some(file) => Ok(file.clone()),
            None if default.exists() => Ok(default),
            None => {
                bail!("no {}: run `cargo xtask setup`, or give {option} FILE", default.display())
            }
        };
        let kernel = match &self.kernel {
            Some(name) if name.as_os_str() == "small" => cache::small_kernel(),
            named => named_or(named, cache::default_kernel(), "--kernel")?,
        };
        if kernel == cache::small_kernel() && !kernel.exists() {
            bail!("no {}: run `cargo xtask kernel`, which builds it", kernel.display());
        }
        if self.no_initrd {
            return Ok((kernel, None));
        }
        Ok((kernel, Some(named_or(&self.initrd, cache::default_initrd(), "--initrd")?)))
    }

    /// How the kernel is to be loaded.
    pub fn kernel_options(&self) -> linux::Options {
        let way = match self.entry {
            Entry::Auto => Way::Auto,
            Entry::Elf => Way::Elf,
            Entry::Packed => Way::Packed,
            Entry::Packed32 => Way::Packed32,
            Entry::Pvh => Way::Pvh,
        };
        let cache = (!self.no_cache).then(|| Cache::new(cache::unpacked_kernels()));
        linux::Options { way, cache }
    }

    /// The options for devices: those that were given, or, for a machine that was `saved`, the ones that it had.
    pub fn devices(&self, saved: Option<&Saved>) -> Result<devices::Options> {
        let options = match saved {
            Some(saved) => self.devices.over(saved)?,
            None => {
                self.devices.check_balloon(self.memory)?;
                self.devices.clone()
            }
        };
        if let Some(folder) = &self.snapshot_to {
            ensure!(
                !options.forget(),
                "--snapshot-to saves no disk, and what goes to one with `snapshot` is thrown away; give that disk as rw or ro"
            );
            snapshot::prepare(folder, &options.to_keep()?)?;
        }
        Ok(options)
    }

    /// Whether to say what is done.
    pub fn verbose(&self) -> bool {
        self.verbose
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> String {
        let default = if self.devices.hvc() { linux::HVC_CMDLINE } else { linux::DEFAULT_CMDLINE };
        [self.cmdline.as_deref().unwrap_or(default), &self.append].join(" ").trim().to_owned()
    }

    /// What the memory is taken from.
    pub fn pages(&self) -> Pages {
        if self.hugepages { Pages::Huge } else { Pages::Small }
    }

    /// With `--stats`: how much memory the balloon had in the end.
    pub fn tell_balloon(&self, balloon: Option<Control>) {
        if let Some(balloon) = balloon.filter(|_| self.debug.wants_stats()) {
            cli::eprintln!("at the end {}", balloon.last());
        }
    }

    /// With `--verbose`: what is unwise about the machine.
    pub fn caution(&self, cautions: [Option<String>; 2]) {
        if self.verbose {
            cautions.iter().flatten().for_each(|caution| cli::eprintln!("{caution}"));
        }
    }

    /// That the machine is in `folder` now, with `bytes` of its memory.
    pub fn tell_saved(&self, folder: &Path, bytes: u64) {
        let (folder, mib) = (folder.display(), bytes.div_ceil(1 << 20));
        cli::eprintln!("saved to {folder}, {mib} MiB of memory; go on with --restore {folder}");
    }

    /// With `--verbose`: what the loader found and did.
    pub fn tell(&self, notes: &[String], initrd: &Option<Range<u64>>, cmdline: &str) {
        if !self.verbose {
            return;
        }
        notes.iter().for_each(|note| cli::eprintln!("kernel {note}"));
        if let Some(Range { start, end }) = initrd {
            cli::eprintln!("initrd has the memory from {start:#x} to {end:#x}");
        }
        cli::eprintln!("command line: {cmdline}");
    }
}
