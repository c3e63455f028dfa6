//! Introduced by stage 03: a virtual CPU, its registers, and `KVM_RUN`.
//!
//! A vCPU is a file descriptor and a page of memory shared with KVM, `struct kvm_run`. [`Vcpu::run`] hands
//! the host CPU to the guest; when the guest does something that KVM leaves to us, the call returns and
//! the page says what it was. That is an [`Exit`], and a monitor is a loop around it. The last of them are kept.

use std::sync::Arc;
use std::{fmt, mem, slice};

pub use kvm_bindings::CpuId;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_MAX_CPUID_ENTRIES, kvm_debug_exit_arch,
    kvm_guest_debug, kvm_regs, kvm_run, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::GuestAddress;

#[cfg(feature = "stage03")]
use crate::autopsy::Hang;
use crate::deadline;
use crate::error::{Blame, Blamed};
use crate::journal::Journal;
use crate::last_exits::{self, LastExit, LastExits, Request, Space};
use crate::memory::Vm;

/// Why a vCPU could not be made, set up or run.
#[derive(Debug, Error)]
pub enum Error {
    /// An ioctl of the vCPU, or the one that makes it, failed.
    #[error("{ioctl} failed on vCPU {vcpu}: {source}")]
    Ioctl {
        /// Its name in the KVM API.
        ioctl: &'static str,
        /// The vCPU's number.
        vcpu: u8,
        /// The errno.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a model-specific register's value.
    #[error("vCPU {vcpu} cannot have {value:#x} in its MSR {index:#x}")]
    Msr {
        /// The vCPU's number.
        vcpu: u8,
        /// The register's number.
        index: u32,
        /// What it was to have.
        value: u64,
    },
    /// The entry point of a real-mode program is out of reach of a 16-bit instruction pointer.
    #[error("a real-mode program starts below 64 KiB, not at {0:#x}")]
    RealModeEntry(u64),
    /// A vCPU cannot be called back from its guest.
    #[error(transparent)]
    Signal(#[from] deadline::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// Why `KVM_RUN` came back: the part of `struct kvm_run` that the exit reason selects (KVM API,
/// section 5).
#[derive(Debug)]
pub enum Exit<'a> {
    /// `KVM_EXIT_IO`, out: the guest wrote to a port.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// What was written: `size` × count bytes. KVM's count may be above 1 for `rep outs`.
        data: &'a [u8],
    },
    /// `KVM_EXIT_IO`, in: the guest reads from a port; fill `data` before the next run.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// To be filled: `size` × count bytes; `rep ins` arrives in one exit for up to a page.
        data: &'a mut [u8],
    },
    /// `KVM_EXIT_MMIO`, read: an access where no memslot is; fill `data` before the next run.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// To be filled: 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// `KVM_EXIT_MMIO`, write: to where no memslot is, or to a read-only one.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What was written: 1 to 8 bytes.
        data: &'a [u8],
    },
    /// `KVM_EXIT_HLT`: the guest executed HLT and no in-kernel irqchip waits on its behalf.
    Hlt,
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the state that the guest was to start in.
    FailEntry {
        /// The hardware's reason: on Intel the VM-entry failure, on AMD the VMEXIT code.
        reason: u64,
        /// The host CPU on which it happened.
        cpu: u32,
    },
    /// `KVM_EXIT_INTERNAL_ERROR`: KVM itself could not go on.
    InternalError(InternalError),
    /// `KVM_EXIT_DEBUG`: a single step or a breakpoint.
    Debug(kvm_debug_exit_arch),
    /// `KVM_EXIT_SYSTEM_EVENT`: the guest asked the platform for reset or power-off.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// `KVM_RUN` was interrupted by a signal or by `immediate_exit` before the guest did anything, or a [`Watcher`] had
    /// the guest stop, whose business that is.
    Interrupted,
    /// No exit of KVM's: the [`Watchdog`](crate::autopsy::Watchdog) has found that the guest gets nowhere.
    #[cfg(feature = "stage03")]
    Hang(Hang),
    /// Any other reason, by its number in the KVM API.
    Other(u32),
}

/// The exit as the end of a guest that nobody expected: its name in the KVM API, and what it means.
impl fmt::Display for Exit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IoOut { port, .. } => write!(f, "KVM_EXIT_IO, a write to port {port:#X}"),
            Self::IoIn { port, .. } => write!(f, "KVM_EXIT_IO, a read from port {port:#X}"),
            Self::MmioRead { addr, .. } => {
                write!(f, "KVM_EXIT_MMIO, a read from {addr:#X}, where no memory is")
            }
            Self::MmioWrite { addr, .. } => {
                write!(f, "KVM_EXIT_MMIO, a write to {addr:#X}, where no memory is")
            }
            Self::Hlt => f.write_str("KVM_EXIT_HLT"),
            Self::Shutdown => f.write_str("KVM_EXIT_SHUTDOWN, a triple fault"),
            Self::FailEntry { reason, .. } => {
                write!(f, "KVM_EXIT_FAIL_ENTRY, the processor refused its state ({reason:#X})")
            }
            Self::InternalError(error) => {
                write!(f, "KVM_EXIT_INTERNAL_ERROR, KVM could not go on ({})", error.name())
            }
            Self::Debug(_) => f.write_str("KVM_EXIT_DEBUG"),
            Self::SystemEvent { kind } => write!(f, "KVM_EXIT_SYSTEM_EVENT {kind}"),
            Self::Interrupted => f.write_str("KVM_EXIT_INTR"),
            #[cfg(feature = "stage03")]
            Self::Hang(hang) => write!(f, "it hangs, {hang}"),
            Self::Other(reason) => write!(f, "exit reason {reason}, which no stage knows"),
        }
    }
}

/// What `KVM_EXIT_INTERNAL_ERROR` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`.
    pub suberror: u32,
    /// More words, their meaning depending on `suberror`.
    pub data: Vec<u64>,
}

impl InternalError {
    /// The suberror's name in the KVM API.
    pub fn name(&self) -> &'static str {
        match self.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM_INTERNAL_ERROR_EMULATION",
            KVM_INTERNAL_ERROR_SIMUL_EX => "KVM_INTERNAL_ERROR_SIMUL_EX",
            KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM_INTERNAL_ERROR_DELIVERY_EV",
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"
            }
            _ => "an unknown KVM_INTERNAL_ERROR",
        }
    }
}

/// Who looks on at a vCPU around each `KVM_RUN`: gdb, the watchdog, the trace.
pub trait Watcher: Send + fmt::Debug {
    /// `KVM_RUN` is about to be called. What the last exit was for has been dealt with: `data` is what the guest wrote
    /// or what it is given. Returns what [`run`](Vcpu::run) comes back with instead, if the guest shall not run now.
    fn before_run(&mut self, vcpu: &mut Vcpu, data: &[u8]) -> Result<Option<Exit<'static>>, Error>;

    /// `KVM_RUN` has come back for `exit`, which has no number if it is a single step or a signal. Says whether
    /// that is the watcher's own doing: the run loop sees an interruption, and those who look on behind it see nothing.
    fn after_run(&mut self, exit: &LastExit) -> bool;

    /// There will be no `KVM_RUN` any more, as before it otherwise.
    fn leave(&mut self, vcpu: &mut Vcpu, data: &[u8]) -> Result<(), Error>;
}

/// Where a guest stands while it doesn't run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// Between two instructions: its registers are whole.
    Between,
    /// In an instruction that accesses a device: KVM finishes it at the next `KVM_RUN`.
    Within,
    /// Between two instructions, because of a single step or a breakpoint.
    Debug(kvm_debug_exit_arch),
    /// Where it cannot go on from.
    Dead,
}

/// A virtual CPU. It keeps its VM, and so the memory that the guest runs in, alive.
#[derive(Debug)]
pub struct Vcpu {
    // Dropped before `vm`: fields are dropped in the order in which they stand.
    fd: VcpuFd,
    vm: Arc<Vm>,
    id: u8,
    last_exits: LastExits,
    standing: Standing,
    journal: Journal,
    /// Whether KVM leaves RIP in `struct kvm_run`.
    tells_rip: bool,
    watchers: Vec<Box<dyn Watcher>>,
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // A vCPU that cannot be asked any more tells nothing.
        let _ = self.leave();
    }
}

impl Vcpu {
    // ANCHOR: new
    /// Makes vCPU number `id`, in the state that a processor has after reset (`KVM_CREATE_VCPU`, KVM
    /// API 4.7; Intel SDM vol. 3, 11.1.1 "Processor State After Reset").
    pub fn new(vm: &Arc<Vm>, id: u8) -> Result<Self, Error> {
        let mut fd = vm.fd().create_vcpu(id.into()).map_err(|source| Error::Ioctl {
            ioctl: "KVM_CREATE_VCPU",
            vcpu: id,
            source,
        })?;
        // Each exit brings the general registers with it, in `kvm_run.s.regs` (KVM API, section 5, "kvm_valid_regs").
        let tells_rip = vm.fd().check_extension_int(Cap::SyncRegs) & SyncReg::Register as i32 != 0;
        if tells_rip {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        let (vm, standing) = (Arc::clone(vm), Standing::Between);
        let (last_exits, journal) = (LastExits::default(), Journal::default());
        Ok(Self { fd, vm, id, last_exits, standing, journal, tells_rip, watchers: Vec::new() })
    }
    // ANCHOR_END: new

    /// Its number, which is also its initial APIC ID.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// The VM that it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Where the guest stands since [`run`](Self::run) came back.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Its last exits.
    pub fn last_exits(&self) -> &LastExits {
        &self.last_exits
    }

    /// All that it was told since it was made.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Has `watcher` look on from now on, behind those that do so already.
    pub fn add_watcher(&mut self, watcher: impl Watcher + 'static) {
        self.watchers.push(Box::new(watcher));
    }

    /// There will be no [`run`](Self::run) any more: whoever looks on has the last word.
    pub fn leave(&mut self) -> Result<(), Error> {
        let page: *const kvm_run = self.fd.get_kvm_run();
        let watchers = mem::take(&mut self.watchers);
        watchers.into_iter().try_for_each(|mut watcher| watcher.leave(self, data(page)))
    }

    /// Has each watcher look before `KVM_RUN`.
    fn before_run(&mut self) -> Result<Option<Exit<'static>>, Error> {
        let page: *const kvm_run = self.fd.get_kvm_run();
        let mut watchers = mem::take(&mut self.watchers);
        let told = watchers.iter_mut().find_map(|it| it.before_run(self, data(page)).transpose());
        self.watchers = watchers;
        told.transpose()
    }

    /// The vCPU's file descriptor, for ioctls that have no method here.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Tells the guest what its processor can do: all that KVM supports on this host
    /// (`KVM_GET_SUPPORTED_CPUID` and `KVM_SET_CPUID2`, KVM API 4.46). Comes before MSRs and modes
    /// which depend on it, long mode among them.
    pub fn set_supported_cpuid(&self, kvm: &Kvm) -> Result<CpuId, Error> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| self.failed("KVM_GET_SUPPORTED_CPUID", source))?;
        self.fd.set_cpuid2(&cpuid).map_err(|source| self.failed("KVM_SET_CPUID2", source))?;
        Ok(cpuid)
    }

    /// The general registers, RIP and RFLAGS (`KVM_GET_REGS`, KVM API 4.11).
    pub fn regs(&self) -> Result<kvm_regs, Error> {
        self.fd.get_regs().map_err(|source| self.failed("KVM_GET_REGS", source))
    }

    /// Sets them (`KVM_SET_REGS`, KVM API 4.12).
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.fd.set_regs(regs).map_err(|source| self.failed("KVM_SET_REGS", source))
    }

    /// The special registers: segments, descriptor tables, control registers, EFER (`KVM_GET_SREGS`,
    /// KVM API 4.13).
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.fd.get_sregs().map_err(|source| self.failed("KVM_GET_SREGS", source))
    }

    /// Sets them (`KVM_SET_SREGS`, KVM API 4.14).
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.fd.set_sregs(sregs).map_err(|source| self.failed("KVM_SET_SREGS", source))
    }

    /// Leaves the reset state for a flat 16-bit program at `entry`: all segments start at 0, the stack
    /// grows down from the program's first byte.
    ///
    /// After reset CS has base 0xFFFF0000, so that the first instruction comes from a ROM at the top of
    /// the address space; stage 07 starts there. Here there is no ROM yet.
    pub fn start_real_mode(&self, entry: GuestAddress) -> Result<(), Error> {
        self.start_real_mode_in(GuestAddress(0), entry)
    }

    /// The same with all segments starting at `base`: `entry` counts from there, and so does every address
    /// that the program uses, until it loads a segment register itself.
    ///
    /// In real mode a base is 16 times a selector of 16 bits. KVM sets the two apart, so that `base` may
    /// be beyond the first megabyte; the selectors are 0 then.
    // ANCHOR: start
    pub fn start_real_mode_in(&self, base: GuestAddress, entry: GuestAddress) -> Result<(), Error> {
        if entry.0 > 0xFFFF {
            return Err(Error::RealModeEntry(entry.0));
        }
        let mut sregs = self.sregs()?;
        let selector = u16::try_from(base.0 / 16).unwrap_or(0);
        let kvm_sregs { cs, ss, ds, es, fs, gs, .. } = &mut sregs;
        for segment in [cs, ss, ds, es, fs, gs] {
            segment.base = base.0;
            segment.selector = selector;
        }
        self.set_sregs(&sregs)?;
        // Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3).
        self.set_regs(&kvm_regs { rip: entry.0, rsp: entry.0, rflags: 0x2, ..Default::default() })
    }
    // ANCHOR_END: start

    /// Where the guest's page tables map a linear address, and `None` where they map nothing; without
    /// paging the two are the same (`KVM_TRANSLATE`, KVM API 4.15).
    pub fn translate(&self, linear: u64) -> Option<GuestAddress> {
        let found = self.fd.translate_gva(linear).ok()?;
        (found.valid != 0).then_some(GuestAddress(found.physical_address))
    }

    // ANCHOR: single_step
    /// Has KVM return with [`Exit::Debug`] after the next instruction, or no longer
    /// (`KVM_SET_GUEST_DEBUG`, KVM API 4.87).
    ///
    /// Ask again before each step. KVM steps by setting RFLAGS.TF at the instruction where the guest stands
    /// now; when it emulates one (on AMD a `mov` to or from CR0, for instance), the flag is lost with it.
    pub fn set_single_step(&self, on: bool) -> Result<(), Error> {
        let control = if on { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
        self.set_guest_debug(&kvm_guest_debug { control, ..Default::default() })
    }

    /// The same in all its generality: single step, software and hardware breakpoints.
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Error> {
        self.fd.set_guest_debug(debug).map_err(|source| self.failed("KVM_SET_GUEST_DEBUG", source))
    }
    // ANCHOR_END: single_step

    // ANCHOR: run
    /// Runs the guest until it needs us (`KVM_RUN`, KVM API 4.10).
    ///
    /// KVM finishes the instruction behind an [`Exit::IoIn`] or an [`Exit::MmioRead`] only at the next call,
    /// with the bytes that the caller put into `data`.
    pub fn run(&mut self) -> Result<Exit<'_>, Error> {
        let vcpu = self.id;
        let page: *const kvm_run = self.fd.get_kvm_run();
        if let Some(read) = self.last_exits.unanswered() {
            read.data = Some(last_exits::kept(data(page)));
            self.journal.answer(data(page));
        }
        if !self.watchers.is_empty()
            && let Some(instead) = self.before_run()?
        {
            self.standing = Standing::Between;
            return Ok(instead);
        }
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                self.standing = Standing::Between;
                for watcher in &mut self.watchers {
                    watcher.after_run(&LastExit::of(KVM_EXIT_INTR));
                }
                return Ok(Exit::Interrupted);
            }
            Err(source) => return Err(Error::Ioctl { ioctl: "KVM_RUN", vcpu, source }),
        };
        self.standing = match &exit {
            VcpuExit::Debug(what) => Standing::Debug(*what),
            VcpuExit::IoOut(..)
            | VcpuExit::IoIn(..)
            | VcpuExit::MmioRead(..)
            | VcpuExit::MmioWrite(..) => Standing::Within,
            VcpuExit::Shutdown | VcpuExit::FailEntry(..) | VcpuExit::InternalError => {
                Standing::Dead
            }
            _ => Standing::Between,
        };
        let mut seen = last_exit(page, self.tells_rip);
        // These two are our doing.
        let is_ours = matches!(seen.reason, KVM_EXIT_DEBUG | KVM_EXIT_INTR);
        if !is_ours {
            seen.number = self.last_exits.count() + 1;
        }
        if self.watchers.iter_mut().any(|watcher| watcher.after_run(&seen)) {
            return Ok(Exit::Interrupted);
        }
        if !is_ours {
            self.journal.exit(seen.reason, seen.request);
            self.last_exits.push(seen);
        }
        Ok(match exit {
            VcpuExit::IoOut(port, data) => Exit::IoOut { port, size: io_size(page), data },
            VcpuExit::IoIn(port, data) => Exit::IoIn { port, size: io_size(page), data },
            VcpuExit::MmioRead(addr, data) => Exit::MmioRead { addr, data },
            VcpuExit::MmioWrite(addr, data) => Exit::MmioWrite { addr, data },
            VcpuExit::Hlt => Exit::Hlt,
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::FailEntry(reason, cpu) => Exit::FailEntry { reason, cpu },
            VcpuExit::InternalError => Exit::InternalError(internal_error(page)),
            VcpuExit::Debug(what) => Exit::Debug(what),
            VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent { kind },
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Unsupported(reason) => Exit::Other(reason),
            _ => Exit::Other(exit_reason(page)),
        })
    }
    // ANCHOR_END: run

    /// Whether [`run`](Self::run) comes back before the guest's next instruction, when KVM has finished the one behind
    /// the last exit (`immediate_exit`, KVM API, section 5).
    pub fn set_immediate_exit(&mut self, on: bool) {
        self.fd.set_kvm_immediate_exit(on.into());
    }

    fn failed(&self, ioctl: &'static str, source: kvm_ioctls::Error) -> Error {
        Error::Ioctl { ioctl, vcpu: self.id, source }
    }
}

/// The vendor that CPUID leaf 0 names: twelve letters in EBX, EDX and ECX (Intel SDM vol. 2, CPUID).
pub fn vendor(cpuid: &CpuId) -> String {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0);
    let letters = leaf.map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]).map(u32::to_le_bytes);
    String::from_utf8_lossy(letters.as_flattened()).into_owned()
}

/// The bytes of one access of a `KVM_EXIT_IO`, which kvm-ioctls folds into the length of the data.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn io_size(page: *const kvm_run) -> usize {
    debug_assert_eq!(exit_reason(page), KVM_EXIT_IO);
    // SAFETY: `page` is the vCPU's mapped kvm_run page, which lives as long as its `VcpuFd`; the exit
    // reason says that the union holds `io`, all of whose bit patterns are valid.
    let size = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(size)
}

/// The exit reason's number.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn exit_reason(page: *const kvm_run) -> u32 {
    // SAFETY: as in `io_size`; the field is outside the union.
    unsafe { (*page).exit_reason }
}

/// What is kept of the exit.
fn last_exit(page: *const kvm_run, tells_rip: bool) -> LastExit {
    let request = request(page);
    let data = request.filter(|request| request.write).map(|_| last_exits::kept(data(page)));
    let rip = tells_rip.then(|| rip(page));
    LastExit { rip, request, data, ..LastExit::of(exit_reason(page)) }
}

/// What the guest wants of a device, if that is what it exited for.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn request(page: *const kvm_run) -> Option<Request> {
    match exit_reason(page) {
        KVM_EXIT_IO => {
            // SAFETY: as in `io_size`.
            let io = unsafe { (*page).__bindgen_anon_1.io };
            Some(Request {
                space: Space::Port,
                addr: io.port.into(),
                size: io.size,
                write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                len: io.count.saturating_mul(io.size.into()),
            })
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as in `io_size`, with the union holding `mmio`.
            let mmio = unsafe { (*page).__bindgen_anon_1.mmio };
            Some(Request {
                space: Space::Memory,
                addr: mmio.phys_addr,
                size: mmio.len as u8,
                write: mmio.is_write != 0,
                len: mmio.len,
            })
        }
        _ => None,
    }
}

/// The bytes that the last exit is about: what the guest wrote or, when it has been answered, what it is given.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn data<'a>(page: *const kvm_run) -> &'a [u8] {
    match request(page) {
        None => &[],
        Some(Request { space: Space::Port, len, .. }) => {
            // SAFETY: as in `io_size`; KVM has put `len` bytes at `data_offset` of what it shares with us, all of which
            // is mapped, and writes them in KVM_RUN only, behind which nobody uses this slice.
            unsafe {
                let offset = (*page).__bindgen_anon_1.io.data_offset;
                slice::from_raw_parts(page.cast::<u8>().add(offset as usize), len as usize)
            }
        }
        Some(Request { len, .. }) => {
            // SAFETY: as in `request`, and as above.
            let data = unsafe { &(*page).__bindgen_anon_1.mmio.data };
            &data[..data.len().min(len as usize)]
        }
    }
}

/// RIP at the last exit, if KVM was asked to tell.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn rip(page: *const kvm_run) -> u64 {
    // SAFETY: as in `io_size`; all bit patterns of the union are valid registers.
    unsafe { (*page).s.regs.regs.rip }
}

/// What the union holds on `KVM_EXIT_INTERNAL_ERROR`.
#[expect(unsafe_code, reason = "struct kvm_run is a page shared with the kernel")]
fn internal_error(page: *const kvm_run) -> InternalError {
    debug_assert_eq!(exit_reason(page), KVM_EXIT_INTERNAL_ERROR);
    // SAFETY: as in `io_size`, with the union holding `internal`.
    let internal = unsafe { (*page).__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    InternalError { suberror: internal.suberror, data: internal.data[..count].to_vec() }
}
