//! Introduced by stage 08: a machine on disk, to go on from another time.
//!
//! All that a machine is can be read out: its memory, its vCPUs' registers, the interrupt controllers, timer and clock
//! inside KVM, and what our own devices hold. A snapshot is a folder with two files:
//!
//! ```text
//! DIR/state.json          everything but the memory: version, the options, vCPUs, KVM's devices, ours
//! DIR/memory.XXXXXX       the memory's ranges one behind the other; pages of zeros are holes
//! ```
//!
//! The one names the other and is put in place by a `rename`, when both are on the disk: whenever saving stops halfway,
//! the folder holds the old snapshot, whole. A restored machine maps the memory file privately, so that a page is read
//! when the guest touches it and what the guest writes stays out of the file: a snapshot can be restored any number of
//! times.
//!
//! What isn't in a snapshot is what the machine's disks hold. It belongs to the moment at which they were left: saving
//! ends the machine. But which disks, network interfaces and sockets they were, it has: the program's options for
//! devices, in whatever form the program reads them again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::Kvm;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryError,
    GuestMemoryRegion as _,
};

use crate::error::{Blame, Blamed};
use crate::layout::PAGE_SIZE;
use crate::memory::{self, Ram, SlotFlags, Vm};
use crate::vcpu::{self, Vcpu};
use crate::{irqfd, kvm};

mod vcpu_state;

/// The format's version. It changes with whatever a reader of the old one would misunderstand.
const VERSION: u32 = 2;

const STATE: &str = "state.json";
const MEMORY: &str = "memory.";
/// The state on its way to its place.
const NEW_STATE: &str = ".state.";

/// The state without its memory has some KiB for each vCPU. A file that is larger is none of ours.
const MOST_STATE: u64 = 64 << 20;

/// Why a machine could not be saved or restored.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: cannot {what}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else is saving there.
    #[error("{}: another machine is being saved there; give another folder", .0.display())]
    Busy(PathBuf),
    /// The folder holds no snapshot.
    #[error("{}: no snapshot there: {STATE} is missing", .0.display())]
    Missing(PathBuf),
    /// The state is not what this program writes.
    #[error("{}: not a snapshot of this program: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another version of this program made it.
    #[error(
        "{}: a snapshot of format {found}, this program reads format {VERSION}; restore it with the \
         program that made it", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in it.
        found: u64,
    },
    /// It comes from a processor that can do what this one can't.
    #[error("the snapshot was made on another processor: {0}; restore it on one like that")]
    Processor(String),
    /// A device can't take its state.
    #[error("the {device} cannot go on from the snapshot: {why}")]
    Device {
        /// Its name.
        device: String,
        /// What is wrong.
        why: String,
    },
    /// The machine has other devices than the snapshot.
    #[error("the snapshot is of a machine with other devices: {0}")]
    OtherDevices(String),
    /// A device can't be left as it is.
    #[error("cannot save the {device}: {source}; nothing was saved")]
    Unsettled {
        /// Its name.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// The options for devices can't be written down.
    #[error("a snapshot cannot have these options for devices: {0}")]
    Options(serde_json::Error),
    /// A vCPU is stuck in a device, so its state is not whole.
    #[error("{} of {} vCPUs stopped in time; nothing was saved", stopped, all)]
    Stuck {
        /// How many stopped.
        stopped: usize,
        /// How many there are.
        all: usize,
    },
    /// Guest memory could not be read or written.
    #[error("cannot copy the guest's memory: {0}")]
    Ram(#[from] GuestMemoryError),
    /// The memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A vCPU's state could not be read or written.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The interrupt controllers could not be made.
    #[error(transparent)]
    Irqfd(#[from] irqfd::Error),
    /// A system ioctl failed.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// A VM ioctl failed.
    #[error("{ioctl} failed: {source}")]
    Ioctl {
        /// Its name in the KVM API.
        ioctl: &'static str,
        /// The errno.
        source: kvm_ioctls::Error,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::File { .. }
            | Self::Busy(_)
            | Self::Missing(_)
            | Self::Malformed { .. }
            | Self::Version { .. }
            | Self::Processor(_)
            | Self::Device { .. }
            | Self::Options(_)
            | Self::OtherDevices(_) => Blame::Input,
            Self::Unsettled { .. } | Self::Stuck { .. } | Self::Ram(_) | Self::Ioctl { .. } => {
                Blame::Host
            }
            Self::Memory(error) => error.blame(),
            Self::Vcpu(error) => error.blame(),
            Self::Irqfd(error) => error.blame(),
            Self::Kvm(error) => error.blame(),
        }
    }
}

fn ioctl(ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Ioctl { ioctl, source }
}

fn file<'a>(path: &'a Path, what: &'static str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { path: path.to_owned(), what, source }
}

/// A device whose state is kept.
pub trait Keep: Send {
    /// Does what it has told the guest is done, if it has put that off: comes before [`keep`](Self::keep).
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What it holds that the guest could notice.
    fn keep(&self) -> Value;

    /// Takes back what [`keep`](Self::keep) gave. The device is new.
    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error>;
}

/// Reads `state` as a `T`, for [`Keep::restore`].
pub fn read<T: DeserializeOwned>(state: &Value) -> Result<T, serde_json::Error> {
    T::deserialize(state)
}

/// What devices hold, by their names.
pub type States = BTreeMap<String, Value>;

/// A machine's devices whose state is kept, by name.
#[derive(Default)]
pub struct Devices(Vec<(String, Arc<Mutex<dyn Keep>>)>);

impl Devices {
    /// Adds one. Names differ.
    pub fn add(&mut self, name: impl Into<String>, device: Arc<Mutex<dyn Keep>>) {
        self.0.push((name.into(), device));
    }

    /// What each of them holds, for [`save`]. Their machine has ended; what they have on this host can be looked at
    /// from here on, and changes no more.
    pub fn keep(&self) -> Result<States, Error> {
        let keep = |(name, device): &(String, Arc<Mutex<dyn Keep>>)| {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let unsettled = |source| Error::Unsettled { device: name.clone(), source };
            device.settle().map_err(unsettled)?;
            Ok((name.clone(), device.keep()))
        };
        self.0.iter().map(keep).collect()
    }

    /// Gives each device what `saved` has of it: all of that, and to all of them.
    pub fn restore(&self, saved: &Saved) -> Result<(), Error> {
        let known = |name: &String| self.0.iter().any(|(other, _)| other == name);
        if let Some(name) = saved.devices.keys().find(|name| !known(name)) {
            return Err(Error::OtherDevices(format!("there is no {name} here")));
        }
        for (name, device) in &self.0 {
            let state = saved.devices.get(name);
            let state = state.ok_or_else(|| Error::OtherDevices(format!("it has no {name}")))?;
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let wrong =
                |e: serde_json::Error| Error::Device { device: name.clone(), why: e.to_string() };
            device.restore(state).map_err(wrong)?;
        }
        Ok(())
    }
}

/// A snapshot as it stands on disk, without its memory.
#[derive(Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    /// When it was saved, in nanoseconds since 1970.
    time: u64,
    /// The program's options for devices.
    options: Value,
    memory: Memory,
    vcpus: Vec<vcpu_state::State>,
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    /// KVM's clock in nanoseconds.
    clock: u64,
    devices: States,
    #[serde(skip)]
    folder: PathBuf,
}

/// Which file holds the memory, and whose: first addresses and lengths.
#[derive(Serialize, Deserialize)]
struct Memory {
    file: String,
    ranges: Vec<(u64, u64)>,
}

/// Makes sure that a machine with these `options` can be saved to `folder` when the time comes: makes it if it isn't
/// there.
pub fn prepare(folder: &Path, options: &impl Serialize) -> Result<(), Error> {
    in_json(options)?;
    writable(folder)
}

fn in_json(options: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(options).map_err(Error::Options)
}

fn writable(folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(file(folder, "make this folder"))?;
    tempfile::Builder::new().tempfile_in(folder).map_err(file(folder, "write to this folder"))?;
    Ok(())
}

/// Saves a machine that has ended, with all of its `all` vCPUs in `vcpus`, to `folder`: with what its `devices` hold, and
/// the program's `options` for them, which [`Saved::options`] gives back. Returns how many bytes of memory had to be
/// written.
pub fn save(
    folder: &Path,
    kvm: &Kvm,
    vm: &Vm,
    vcpus: &[Vcpu],
    all: usize,
    devices: States,
    options: &impl Serialize,
) -> Result<u64, Error> {
    if vcpus.len() != all {
        return Err(Error::Stuck { stopped: vcpus.len(), all });
    }
    writable(folder)?;
    let dir = File::open(folder).map_err(file(folder, "open this folder"))?;
    // Where there are no locks, two that save to one folder at once may remove each other's memory.
    if let Err(Errno::WOULDBLOCK) = flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        return Err(Error::Busy(folder.to_owned()));
    }
    let irqchip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.fd().get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
        Ok::<_, Error>(chip)
    };
    let vcpus = vcpus.iter().map(|vcpu| vcpu_state::save(kvm, vcpu)).collect::<Result<_, _>>()?;
    let irqchips = [
        irqchip(KVM_IRQCHIP_PIC_MASTER)?,
        irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
        irqchip(KVM_IRQCHIP_IOAPIC)?,
    ];
    let pit = vm.fd().get_pit2().map_err(ioctl("KVM_GET_PIT2"))?;
    // To write the memory takes a while: what the time is now, belongs to what the clock says now.
    let clock = vm.fd().get_clock().map_err(ioctl("KVM_GET_CLOCK"))?.clock;
    let time = now();

    let mut memory = tempfile::Builder::new()
        .prefix(MEMORY)
        .tempfile_in(folder)
        .map_err(file(folder, "make a file here"))?;
    let path = memory.path().to_owned();
    let ram = vm.ram();
    let written = write_memory(memory.as_file_mut(), &ram).map_err(|error| match error {
        GuestMemoryError::IOError(source) => Error::File { path, what: "write it", source },
        error => Error::Ram(error),
    })?;
    let name = memory.path().file_name().map(|name| name.to_string_lossy().into_owned());
    let saved = Saved {
        version: VERSION,
        time,
        options: in_json(options)?,
        memory: Memory {
            file: name.unwrap_or_default(),
            ranges: ram.iter().map(|r| (r.start_addr().raw_value(), r.len())).collect(),
        },
        vcpus,
        irqchips,
        pit,
        clock,
        devices,
        folder: folder.to_owned(),
    };

    let path = folder.join(STATE);
    let wrong = file(&path, "write it");
    let state = write_state(folder, &saved).and_then(|state| {
        memory.as_file().sync_all()?;
        Ok(state)
    });
    // The new memory file stays from here on, and the old one goes when nothing names it any more.
    let state = state.map_err(wrong)?;
    let memory = memory.into_temp_path().keep().map_err(|e| file(&path, "keep it")(e.error))?;
    state.persist(&path).map_err(|e| file(&path, "put it in place")(e.error))?;
    dir.sync_all().map_err(file(folder, "write this folder"))?;
    remove_others(folder, &memory).map_err(file(folder, "remove the old snapshot"))?;
    Ok(written)
}

/// Writes the state to a file that isn't in its place yet.
fn write_state(folder: &Path, saved: &Saved) -> io::Result<tempfile::NamedTempFile> {
    let mut state = tempfile::Builder::new().prefix(NEW_STATE).tempfile_in(folder)?;
    let mut out = BufWriter::new(state.as_file_mut());
    serde_json::to_writer(&mut out, saved)?;
    out.flush()?;
    drop(out);
    state.as_file().sync_all()?;
    Ok(state)
}

/// Removes the memory of snapshots that were there before, and what was left when somebody was stopped halfway.
fn remove_others(folder: &Path, current: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let ours = [MEMORY, NEW_STATE].iter().any(|prefix| name.starts_with(prefix.as_bytes()));
        // By their names: the folder's may be relative in the one path and absolute in the other.
        if ours && path.file_name() != current.file_name() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Writes all pages of `ram` that aren't zeros, each at its place in the file. Returns how many bytes those are.
fn write_memory(to: &mut File, ram: &Ram) -> Result<u64, GuestMemoryError> {
    const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let (mut begin, mut written) = (0, 0);
    let mut page = ZEROS;
    for region in ram.iter() {
        let (start, len) = (region.start_addr(), region.len());
        to.set_len(begin + len).map_err(GuestMemoryError::IOError)?;
        // As long a run of pages as there is, at once.
        let mut run = None;
        for offset in (0..=len).step_by(PAGE_SIZE as usize) {
            let full = offset < len && {
                ram.read_slice(&mut page, start.unchecked_add(offset))?;
                page != ZEROS
            };
            match (full, run) {
                (true, None) => run = Some(offset),
                (false, Some(from)) => {
                    to.seek(SeekFrom::Start(begin + from)).map_err(GuestMemoryError::IOError)?;
                    let count = (offset - from) as usize;
                    ram.write_all_volatile_to(start.unchecked_add(from), to, count)?;
                    written += offset - from;
                    run = None;
                }
                _ => {}
            }
        }
        begin += len;
    }
    Ok(written)
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads the snapshot in `folder`, all but its memory.
pub fn open(folder: &Path) -> Result<Saved, Error> {
    let path = folder.join(STATE);
    let malformed = |why: String| Error::Malformed { path: path.clone(), why };
    let state = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Missing(folder.to_owned()));
        }
        state => state.map_err(file(&path, "open it"))?,
    };
    let len = state.metadata().map_err(file(&path, "read it"))?.len();
    if len > MOST_STATE {
        return Err(malformed(format!("it has {len} bytes")));
    }
    let text = io::read_to_string(state).map_err(file(&path, "read it"))?;
    // The version first: what comes behind may be anything, if it is another one.
    #[derive(Deserialize)]
    struct Version {
        version: u64,
    }
    let Version { version: found } =
        serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    if found != u64::from(VERSION) {
        return Err(Error::Version { path, found });
    }
    let mut saved: Saved =
        serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    if saved.memory.file.contains('/') || !saved.memory.file.starts_with(MEMORY) {
        return Err(malformed(format!("it calls its memory {:?}", saved.memory.file)));
    }
    if !(1..=usize::from(crate::smp::MAX_CPUS)).contains(&saved.vcpus.len()) {
        return Err(malformed(format!("it has {} vCPUs", saved.vcpus.len())));
    }
    saved.folder = folder.to_owned();
    Ok(saved)
}

impl Saved {
    /// The options for devices that the machine was saved with.
    pub fn options<T: DeserializeOwned>(&self) -> Result<T, Error> {
        read(&self.options).map_err(|error| Error::Malformed {
            path: self.folder.join(STATE),
            why: format!("options: {error}"),
        })
    }

    /// Makes the machine: its memory, its interrupt controllers and its vCPUs, each as it was. What it was told of the
    /// time is what the time is now.
    pub fn machine(&self, kvm: &Kvm) -> Result<(Arc<Vm>, Vec<Vcpu>), Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        for vcpu in &self.vcpus {
            crate::cpuid::covers(supported.as_slice(), &vcpu.cpuid).map_err(Error::Processor)?;
        }
        let vm = Vm::new(kvm)?;
        self.map_memory(&vm)?;
        irqfd::create_irqchip(&vm)?;
        irqfd::create_pit(&vm)?;
        let vcpus: Vec<Vcpu> =
            (0..).zip(&self.vcpus).map(|(id, _)| Vcpu::new(&vm, id)).collect::<Result<_, _>>()?;
        for chip in &self.irqchips {
            vm.fd().set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        vm.fd().set_pit2(&self.pit).map_err(ioctl("KVM_SET_PIT2"))?;
        // A host whose clock was set back since: then no time has passed.
        let elapsed = now().saturating_sub(self.time);
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu, elapsed)?;
        }
        let clock = self.clock.saturating_add(elapsed);
        let clock = kvm_clock_data { clock, ..Default::default() };
        vm.fd().set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        Ok((vm, vcpus))
    }

    /// Gives `vm` the memory, page by page when the guest touches it.
    fn map_memory(&self, vm: &Vm) -> Result<(), Error> {
        let path = self.folder.join(&self.memory.file);
        let memory = File::open(&path).map_err(file(&path, "open the snapshot's memory"))?;
        let there = memory.metadata().map_err(file(&path, "read it"))?.len();
        let malformed = |why: String| Error::Malformed { path: path.clone(), why };
        // What lies behind a file's end can be mapped, but who touches it dies.
        let mut lens = self.memory.ranges.iter().map(|(_, len)| *len);
        let wanted = lens.try_fold(0u64, u64::checked_add);
        if wanted != Some(there) {
            return Err(malformed(format!("it has {there} bytes, which is not what {STATE} says")));
        }
        let memory = Arc::new(memory);
        let mut offset = 0;
        for (slot, &(start, len)) in (0..).zip(&self.memory.ranges) {
            if len == 0 || !len.is_multiple_of(PAGE_SIZE) || !start.is_multiple_of(PAGE_SIZE) {
                return Err(malformed(format!("{len} bytes of memory at {start:#x}")));
            }
            let flags = SlotFlags::default();
            vm.add_file(slot, GuestAddress(start), len as usize, &memory, offset, flags)?;
            offset += len;
        }
        Ok(())
    }
}
