//! The command line, and the files that it chooses.

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use cli::list::List;
use cli::{cache, config, console, manual, size, trace};
use common::linux::{self, Cache, Way};
use common::memory::Pages;
use common::smp::MAX_CPUS;
use common::virtio;
use common::virtio::balloon::Balloon;
use common::virtio::rng::Rng;
use common::virtio::vsock::{self, Vsock};

use crate::disks::{self, Disk};
use crate::nets::Interface;

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
     echo 'cat /proc/meminfo' | 08_boot_linux   commands from a pipe
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

    /// A disk: a raw or qcow2 image, or a block device. What the guest writes goes to the file; with ,ro
    /// it cannot write, with ,snapshot its writes are thrown away at the end. The first is /dev/vda, the
    /// second /dev/vdb
    ///
    /// The format is seen from the file, unless format=raw or format=qcow2 says what it is. A qcow2
    /// overlay may name any file of this machine as its backing file: that is only read, and only with
    /// ,backing. serial=TEXT is what the guest finds in /sys/block/vda/serial. A comma in a name is
    /// written twice: --disk a,,b.img
    #[arg(long = "disk", help_heading = "Devices", value_name = "FILE[,rw|ro|snapshot][,KEY=VALUE]",
          value_parser = OsStringValueParser::new().try_map(Disk::parse))]
    disks: Vec<Disk>,

    /// A network interface, eth0; once more for eth1. With tap=NAME its cable leads to a tap interface
    /// of the host, with user to passt, which needs no root and shares the host's network
    ///
    /// Without mac=ADDRESS the address is a random one that stays the same on this host. The guest gets its
    /// IP address by --append ip=dhcp (passt answers) or by --append ip=10.0.0.2::10.0.0.1:255.255.255.0
    #[arg(long = "net", help_heading = "Devices", value_name = "tap=NAME|user[,mac=ADDRESS]",
          value_parser = OsStringValueParser::new().try_map(Interface::parse))]
    nets: Vec<Interface>,

    /// Give the guest random numbers of the host (a virtio entropy device)
    #[arg(long, help_heading = "Devices")]
    rng: bool,

    /// Take memory back that the guest does not use: what it frees, at once, and SIZE from the start, which it
    /// gets back when it would run out of memory (a virtio balloon)
    #[arg(long, help_heading = "Devices", value_name = "size=SIZE", num_args = 0..=1, default_missing_value = "size=0M",
          value_parser = OsStringValueParser::new().try_map(parse_balloon))]
    balloon: Option<u64>,

    /// Streams between guest and host without a network (virtio vsock): the guest has the number N, from 3 up
    ///
    /// To reach port 1234 of the guest, connect to the Unix socket PATH and write "CONNECT 1234" and a line feed;
    /// "OK", a number and a line feed come back, then the stream. When the guest connects to port 1234 of the host,
    /// which has the number 2, it reaches whoever listens at the Unix socket PATH_1234
    #[arg(long, help_heading = "Devices", value_name = "cid=N,uds=PATH",
          value_parser = OsStringValueParser::new().try_map(Socket::parse))]
    vsock: Option<Socket>,

    /// Where this terminal is in the guest. Kernels without a driver for hvc0 are silent there
    #[arg(long = "console", help_heading = "Devices", value_enum, value_name = "TTY", default_value_t = Tty::TtyS0)]
    tty: Tty,

    /// Have Ctrl-A s, or the signal USR1, save the machine to this folder and end. Its memory, processors and devices
    /// are saved, what its disks hold is not: leave them as they are until it is restored. Balloon and vsock, whose
    /// other end is not in the machine, can't be saved
    #[arg(long, help_heading = "Snapshots", value_name = "DIR", conflicts_with_all = ["balloon", "vsock"])]
    pub snapshot_to: Option<PathBuf>,

    /// Go on with the machine that was saved to this folder, given the same devices. It can be restored any number of
    /// times
    #[arg(long, help_heading = "Snapshots", value_name = "DIR", conflicts_with_all = ["kernel", "entry", "no_cache", "initrd", "no_initrd",
          "cmdline", "append", "memory", "hugepages", "cpus", "balloon", "vsock"])]
    pub restore: Option<PathBuf>,

    #[command(flatten)]
    pub console: console::Flags,

    #[command(flatten)]
    pub trace: trace::Flags,

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

/// Where the person's terminal is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tty {
    /// A serial port: there from the kernel's first instruction, two exits a character
    #[value(name = "ttyS0")]
    TtyS0,
    /// A virtio console: quicker, and it knows the window's size. What the kernel says before its driver works
    /// comes by the serial port to the same place; keys go to hvc0 alone
    #[value(name = "hvc0")]
    Hvc0,
}

/// `--balloon size=SIZE`.
fn parse_balloon(text: OsString) -> Result<u64, String> {
    let mut list = List::parse(&text)?;
    let value = list.first("size", "SIZE")?;
    list.end()?;
    size::parse(&value.to_string_lossy()).map_err(|why| format!("size: {why}"))
}

/// `--vsock cid=N,uds=PATH`.
#[derive(Clone, Debug)]
struct Socket {
    cid: u32,
    path: PathBuf,
}

impl Socket {
    fn parse(text: OsString) -> Result<Self, String> {
        let mut list = List::parse(&text)?;
        let cid = list.value("cid", "N")?.ok_or("cid=N is missing")?;
        let path = list.value("uds", "PATH")?.ok_or("uds=PATH is missing")?.into();
        list.end()?;
        let cid = cid.to_str().and_then(|cid| cid.parse().ok());
        let cid = cid.filter(|cid| vsock::CIDS.contains(cid)).ok_or_else(|| {
            let (first, last) = vsock::CIDS.into_inner();
            format!("cid: expected a number from {first} to {last}")
        })?;
        Ok(Self { cid, path })
    }
}

impl Args {
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

    /// The machine's virtio devices.
    pub fn devices(&self) -> Result<virtio::Devices> {
        ensure!(
            self.snapshot_to.is_none() || !self.disks.iter().any(disks::Disk::forgets),
            "--snapshot-to saves no disk, and what goes to one with `snapshot` is thrown away; give that disk as rw or ro"
        );
        let mut devices = virtio::Devices::default();
        for (number, disk) in self.disks.iter().enumerate() {
            devices.add(disk.open(&disks::name(number), self.verbose)?);
        }
        for (number, interface) in self.nets.iter().enumerate() {
            devices.add(interface.open(number)?);
        }
        if self.rng {
            devices.add(Rng);
        }
        if let Some(size) = self.balloon {
            ensure!(
                size < self.memory,
                "--balloon takes all of the guest's memory; give a smaller size, or a larger --memory"
            );
            devices.add(Balloon::new(size));
        }
        if let Some(Socket { cid, path }) = &self.vsock {
            devices.add(Vsock::listen(*cid, path)?);
        }
        Ok(devices)
    }

    /// Whether the person's terminal is a virtio console.
    pub fn hvc(&self) -> bool {
        self.tty == Tty::Hvc0
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> String {
        let default = match self.tty {
            Tty::TtyS0 => linux::DEFAULT_CMDLINE,
            Tty::Hvc0 => linux::HVC_CMDLINE,
        };
        [self.cmdline.as_deref().unwrap_or(default), &self.append].join(" ").trim().to_owned()
    }

    /// What the memory is taken from.
    pub fn pages(&self) -> Pages {
        if self.hugepages { Pages::Huge } else { Pages::Small }
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
