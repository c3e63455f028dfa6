//! The options for devices, and where a restored machine has them from.

use std::ffi::OsString;
use std::path::{self, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use cli::console::Console;
use cli::list::List;
use cli::size;
use common::layout::PAGE_SIZE;
use common::snapshot::Saved;
use common::virtio;
use common::virtio::balloon::{self, Balloon};
use common::virtio::rng::Rng;
use common::virtio::vsock::{self, Vsock};
use serde::{Deserialize, Serialize};

use crate::disks::{self, Disk};
use crate::nets::Interface;

/// What devices the machine has, and what stands behind them on this host. A snapshot has it, too.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[command(next_help_heading = "Devices")]
pub struct Options {
    /// A disk: a raw or qcow2 image, or a block device. What the guest writes goes to the file; with ,ro
    /// it cannot write, with ,snapshot its writes are thrown away at the end. The first is /dev/vda, the
    /// second /dev/vdb
    ///
    /// The format is seen from the file, unless format=raw or format=qcow2 says what it is. A qcow2
    /// overlay may name any file of this machine as its backing file: that is only read, and only with
    /// ,backing. serial=TEXT is what the guest finds in /sys/block/vda/serial. A comma in a name is
    /// written twice: --disk a,,b.img
    #[arg(long = "disk", value_name = "FILE[,rw|ro|snapshot][,KEY=VALUE]",
          value_parser = OsStringValueParser::new().try_map(Disk::parse))]
    disks: Vec<Disk>,

    /// A network interface, eth0; once more for eth1. With tap=NAME its cable leads to a tap interface
    /// of the host, with user to passt, which needs no root and shares the host's network
    ///
    /// Without mac=ADDRESS the address is a random one that stays the same on this host. The guest gets its
    /// IP address by --append ip=dhcp (passt answers) or by --append ip=10.0.0.2::10.0.0.1:255.255.255.0. The lab
    /// has neither a network to share nor the host's taps
    #[arg(long = "net", value_name = "tap=NAME|user[,mac=ADDRESS]",
          value_parser = OsStringValueParser::new().try_map(Interface::parse))]
    nets: Vec<Interface>,

    /// Give the guest random numbers of the host (a virtio entropy device)
    #[arg(long, conflicts_with = "restore")]
    rng: bool,

    /// Take memory back that the guest does not use: what it frees, at once, and SIZE from the start, which it
    /// gets back when it would run out of memory (a virtio balloon). Ctrl-A - takes more, Ctrl-A + gives it back
    #[arg(long, value_name = "size=SIZE", num_args = 0..=1, default_missing_value = "size=0M", conflicts_with = "restore",
          value_parser = OsStringValueParser::new().try_map(parse_balloon))]
    balloon: Option<u64>,

    /// Streams between guest and host without a network (virtio vsock): the guest has the number N, from 3 up
    ///
    /// To reach port 1234 of the guest, connect to the Unix socket PATH and write "CONNECT 1234" and a line feed;
    /// "OK", a number and a line feed come back, then the stream. When the guest connects to port 1234 of the host,
    /// which has the number 2, it reaches whoever listens at the Unix socket PATH_1234
    #[arg(long, value_name = "cid=N,uds=PATH",
          value_parser = OsStringValueParser::new().try_map(Socket::parse))]
    vsock: Option<Socket>,

    /// Where this terminal is in the guest. Kernels without a driver for hvc0 are silent there
    #[arg(long = "console", value_enum, value_name = "TTY", default_value_t = Tty::TtyS0, conflicts_with = "restore")]
    pub tty: Tty,
}

/// Where the person's terminal is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Tty {
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
#[derive(Clone, Debug, Serialize, Deserialize)]
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

/// The machine's devices, and what is to be known of them while it runs.
pub struct Opened {
    /// The devices themselves.
    pub devices: virtio::Devices,
    /// What changes the balloon's size, if there is one.
    pub balloon: Option<balloon::Control>,
}

impl Options {
    /// Whether the person's terminal is a virtio console.
    pub fn hvc(&self) -> bool {
        self.tty == Tty::Hvc0
    }

    /// Whether what is written to one of the disks is thrown away at the end.
    pub fn forget(&self) -> bool {
        self.disks.iter().any(Disk::forgets)
    }

    /// Opens what stands behind the devices. `verbose` says on stderr what the disks are.
    pub fn open(&self, verbose: bool) -> Result<Opened> {
        let mut devices = virtio::Devices::default();
        for (number, disk) in self.disks.iter().enumerate() {
            devices.add(disk.open(&disks::name(number), verbose)?);
        }
        for (number, interface) in self.nets.iter().enumerate() {
            devices.add(interface.open(number)?);
        }
        if self.rng {
            devices.add(Rng);
        }
        let mut control = None;
        if let Some(size) = self.balloon {
            let balloon = Balloon::new(size);
            control = Some(balloon.control());
            devices.add(balloon);
        }
        if let Some(Socket { cid, path }) = &self.vsock {
            devices.add(Vsock::listen(*cid, path)?);
        }
        Ok(Opened { devices, balloon: control })
    }

    /// A machine with `memory` bytes cannot have a balloon of that size.
    pub fn check_balloon(&self, memory: u64) -> Result<()> {
        ensure!(
            self.balloon.is_none_or(|size| size < memory),
            "--balloon takes all of the guest's memory; give a smaller size, or a larger --memory"
        );
        Ok(())
    }

    /// The devices of a machine that was saved, with what is given here in the place of what stood behind them.
    pub fn over(&self, saved: &Saved) -> Result<Self> {
        let mut options: Self = saved.options()?;
        if self.disks.is_empty() {
            options.disks.iter().try_for_each(Disk::check_unchanged)?;
        } else {
            let disks = same_number("disk", &self.disks, &options.disks)?;
            options.disks = disks.map(|(new, old)| new.in_place_of(old)).collect();
        }
        if !self.nets.is_empty() {
            let nets = same_number("net", &self.nets, &options.nets)?;
            options.nets = nets.map(|(new, old)| new.in_place_of(old)).collect::<Result<_>>()?;
        }
        if let Some(new) = &self.vsock {
            let old =
                options.vsock.as_ref().context("--vsock: the saved machine has no such device")?;
            let (new_cid, cid) = (new.cid, old.cid);
            ensure!(new_cid == cid, "--vsock: the saved guest has cid={cid}, and keeps it");
            options.vsock = Some(new.clone());
        }
        Ok(options)
    }

    /// The same for another process: it may be started in another folder, and finds the disks as they are now.
    pub fn to_keep(&self) -> Result<Self> {
        let mut options = self.clone();
        options.disks = self.disks.iter().map(Disk::to_keep).collect::<Result<_>>()?;
        let nets = self.nets.iter().enumerate();
        options.nets = nets.map(|(number, interface)| interface.to_keep(number)).collect();
        if let Some(socket) = &mut options.vsock {
            socket.path = path::absolute(&socket.path)?;
        }
        Ok(options)
    }
}

/// So much memory one key takes from a guest, or gives back.
const STEP: i64 = 64 << 20;

/// How long a guest may take to tell of its memory.
const PATIENCE: Duration = Duration::from_secs(1);

/// Has keys change the size of the `balloon` in a machine with `memory` bytes, and ask the guest how it does.
pub fn add_balloon_keys(console: &Console, balloon: &balloon::Control, memory: u64) {
    // What one step is, the guest keeps.
    let most = memory.saturating_sub(STEP as u64);
    let resize = |step| {
        let balloon = balloon.clone();
        move || {
            balloon.resize(step, most);
            let mib = u64::from(balloon.status().wanted) * PAGE_SIZE / (1 << 20);
            format!("the balloon is to have {mib} MiB")
        }
    };
    let asked = balloon.clone();
    console.on_key(b'-', "take 64 MiB from the guest, into the balloon", resize(STEP));
    console.on_key(b'+', "give the guest 64 MiB back", resize(-STEP));
    console.on_key(b'b', "ask the guest how much memory it has", move || {
        asked.ask(PATIENCE).to_string()
    });
}

/// The devices that are given, each with the one in whose place it comes.
fn same_number<'a, T>(
    option: &str,
    new: &'a [T],
    old: &'a [T],
) -> Result<impl Iterator<Item = (&'a T, &'a T)>> {
    let (given, had) = (new.len(), old.len());
    ensure!(
        given == had,
        "--{option} is given {given} times, and the saved machine has {had} of these devices; give all of \
         them, in their order, or none"
    );
    Ok(new.iter().zip(old))
}
