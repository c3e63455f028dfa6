//! Introduced by stage 02: guest-physical memory, which is host memory with a second address.
//!
//! The host `mmap`s some pages; a *memslot* tells KVM at which guest-physical address the guest sees
//! them (`KVM_SET_USER_MEMORY_REGION`, KVM API 4.35). From then on both sides read and write the
//! same bytes. An access where no slot is becomes an exit, which is how stage 05 makes devices.

use std::collections::BTreeMap;
#[cfg(feature = "stage03")]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::{
    Address as _, Bytes as _, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion as _, GuestRegionMmap, MmapRegion, ReadVolatile,
    mmap::{MmapRegionBuilder, MmapRegionError},
};

use crate::error::{Blame, Blamed};
use crate::layout::{self, LARGE_PAGE, PAGE_SIZE};

/// Guest RAM as the host's code reads and writes it: by guest-physical address, always checked
/// against the regions, so that no address which a guest names reaches other host memory.
pub type Ram = GuestMemoryMmap<()>;

/// Reads `len` bytes from `from` straight into guest memory at `at`, in as many pieces as it takes: a file on
/// a network comes in pieces.
pub fn read_exact<F: ReadVolatile>(
    ram: &Ram,
    at: GuestAddress,
    from: &mut F,
    len: usize,
) -> Result<(), GuestMemoryError> {
    let mut done = 0;
    while done < len {
        let to = at.checked_add(done as u64).ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
        match ram.read_volatile_from(to, from, len - done)? {
            0 => {
                let why = format!("the file ended after {done} of {len} bytes");
                let error = io::Error::new(io::ErrorKind::UnexpectedEof, why);
                return Err(GuestMemoryError::IOError(error));
            }
            read => done += read,
        }
    }
    Ok(())
}

/// Why memory could not be given to a guest.
#[derive(Debug, Error)]
pub enum Error {
    /// The system ioctl that makes a VM failed.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::Error),
    /// The size makes no sense for a machine.
    #[error("guest memory of {found} bytes: expected a multiple of 4 KiB, at least one page")]
    Size {
        /// What was asked for, in bytes.
        found: u64,
    },
    /// Huge pages have no parts.
    #[error("guest memory of {found} bytes in huge pages: expected a multiple of 2 MiB")]
    HugeSize {
        /// What was asked for, in bytes.
        found: u64,
    },
    /// Huge pages are reserved by hand, and too few of them are.
    #[error(
        "the guest needs {wanted} huge pages of 2 MiB, this host has {free} free: reserve more with \
         `echo N | sudo tee /proc/sys/vm/nr_hugepages`, or leave --hugepages away"
    )]
    HugePages {
        /// How many the memory has.
        wanted: u64,
        /// How many the host has reserved, and not given to anybody.
        free: u64,
    },
    /// The host has no such amount of address space or memory to give.
    #[error("the host cannot map {size} bytes of guest memory: {source}; give a smaller --memory")]
    Map {
        /// Bytes that were asked for.
        size: usize,
        /// What `mmap` said.
        source: MmapRegionError,
    },
    /// It is more than KVM lets a guest have.
    #[error(
        "KVM refuses {size} bytes of guest memory: more than a memslot holds, this processor addresses, or \
         this host can keep tables for; give a smaller --memory"
    )]
    TooMuch {
        /// Bytes that were asked for.
        size: u64,
    },
    /// The range does not fit into the guest's address space, or two of our own overlap.
    #[error("guest memory of {size} bytes at {start:#x} overlaps other RAM or wraps around")]
    Range {
        /// First guest-physical address.
        start: u64,
        /// Length in bytes.
        size: usize,
    },
    /// KVM refused a slot.
    #[error(
        "KVM_SET_USER_MEMORY_REGION refused slot {slot} ({size:#x} bytes at {start:#x}): {source}"
    )]
    Slot {
        /// The slot's number.
        slot: u32,
        /// First guest-physical address.
        start: u64,
        /// Length in bytes.
        size: u64,
        /// The errno.
        source: kvm_ioctls::Error,
    },
    /// The slot that was named does not exist.
    #[error("no memslot {0}")]
    NoSlot(u32),
    /// Another VM ioctl failed.
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
            Self::Size { .. }
            | Self::HugeSize { .. }
            | Self::Map { .. }
            | Self::TooMuch { .. }
            | Self::Range { .. } => Blame::Input,
            Self::HugePages { .. } => Blame::Host,
            Self::Kvm(_) | Self::Slot { .. } | Self::NoSlot(_) | Self::Ioctl { .. } => Blame::Host,
        }
    }
}

/// What the guest may do with a slot and whether KVM keeps a log of its writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// `KVM_MEM_READONLY`: reads are memory, writes become `KVM_EXIT_MMIO`. A ROM.
    pub read_only: bool,
    /// `KVM_MEM_LOG_DIRTY_PAGES`: KVM notes each page that the guest writes, for [`Vm::dirty_log`].
    pub log_dirty: bool,
}

impl SlotFlags {
    /// The `flags` field of `struct kvm_userspace_memory_region`.
    fn bits(self) -> u32 {
        let bit = |set, flag| if set { flag } else { 0 };
        bit(self.read_only, KVM_MEM_READONLY) | bit(self.log_dirty, KVM_MEM_LOG_DIRTY_PAGES)
    }
}

/// One memslot: some host memory and where the guest sees it.
#[derive(Debug)]
struct Slot {
    region: Arc<GuestRegionMmap>,
    flags: SlotFlags,
}

/// A memslot as [`Vm::slots`] describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The slot's number.
    pub slot: u32,
    /// First guest-physical address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub size: u64,
    /// Its flags.
    pub flags: SlotFlags,
    /// Where the same bytes stand in the monitor's own address space.
    pub host: u64,
}

/// What a person may want to know of a guest with `size` bytes of memory, if that is more than the host's memory and swap
/// space (`sysinfo(2)`).
pub fn caution(size: u64) -> Option<String> {
    let host = rustix::system::sysinfo();
    let host = (host.totalram.saturating_add(host.totalswap)).saturating_mul(host.mem_unit.into());
    let mib = |bytes| bytes / (1 << 20);
    (size > host).then(|| {
        let (size, host) = (mib(size), mib(host));
        format!(
            "memory of {size} MiB, the host has {host} MiB: it does not last if the guest uses all"
        )
    })
}

/// What the host takes guest memory from. Either way it is zeroed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Pages of 4 KiB, each when it is first touched, so that a guest may have more memory than the host. The host is
    /// advised to give 2 MiB at once where it can ("transparent huge pages"): that is one exit, not 512, and
    /// the processor finds the page's address in fewer steps.
    #[default]
    Small,
    /// Huge pages of 2 MiB that the host's administrator has reserved, all of them at once, so that the guest neither
    /// waits for them later nor runs out of them (Linux, "HugeTLB Pages").
    Huge,
}

impl Pages {
    /// Maps `size` bytes.
    fn map(self, size: usize) -> Result<MmapRegion, Error> {
        let failed = |source| Error::Map { size, source };
        match self {
            Self::Small => {
                let memory = MmapRegion::new(size).map_err(failed)?;
                if size >= LARGE_PAGE as usize {
                    advise_huge_pages(&memory);
                }
                Ok(memory)
            }
            Self::Huge => {
                let flags = libc::MAP_ANONYMOUS
                    | libc::MAP_PRIVATE
                    | libc::MAP_HUGETLB
                    | libc::MAP_HUGE_2MB;
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                MmapRegion::build(None, size, protection, flags).map_err(|source| {
                    match (size as u64 / LARGE_PAGE, free_huge_pages()) {
                        (wanted, free) if free < wanted => Error::HugePages { wanted, free },
                        _ => failed(source),
                    }
                })
            }
        }
    }
}

/// How many huge pages nobody has, for whom they are not meant, either.
fn free_huge_pages() -> u64 {
    let read = |what| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}_hugepages");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let free: u64 = read("free").unwrap_or(0);
    free.saturating_sub(read("resv").unwrap_or(0))
}

/// `MADV_HUGEPAGE` (madvise(2)).
fn advise_huge_pages(memory: &MmapRegion) {
    // SAFETY: the range is the mapping that `memory` owns, and the advice changes nothing but how large the pages are
    // that will be put there. A host without transparent huge pages refuses it, which is as well.
    #[expect(unsafe_code, reason = "rustix knows no mapping's owner")]
    let _ = unsafe {
        rustix::mm::madvise(memory.as_ptr().cast(), memory.size(), Advice::LinuxHugepage)
    };
}

/// Maps `size` bytes for guest memory at `start`, so that both addresses are equally far into a large page, if that can
/// be had. Only then can KVM map large pages, 512 times fewer than small ones, each of which costs an exit when the
/// guest touches it first.
fn map(start: GuestAddress, size: usize, pages: Pages) -> Result<MmapRegion, Error> {
    // The kernel chooses the address: mostly right below what was mapped last. What is mapped meanwhile moves it.
    let mut pads = Vec::new();
    loop {
        let memory = pages.map(size)?;
        let off = (memory.as_ptr() as u64).wrapping_sub(start.0) % LARGE_PAGE;
        if off == 0 || size < LARGE_PAGE as usize || pads.len() == 4 {
            return Ok(memory);
        }
        drop(memory);
        let pad = MmapRegion::<()>::new(off as usize);
        pads.push(pad.map_err(|source| Error::Map { size, source })?);
    }
}

// ANCHOR: vm
/// A virtual machine: its file descriptor and the memory that its slots point into.
///
/// The two live and die together: KVM keeps only the host *address* of a slot, so if that memory were
/// unmapped while a vCPU runs, the guest would write into whatever the monitor maps there next. A
/// [`crate`] vCPU holds the `Arc` of its `Vm` for the same reason.
#[derive(Debug)]
pub struct Vm {
    // Dropped before `slots`: fields are dropped in the order in which they stand.
    fd: VmFd,
    slots: Mutex<BTreeMap<u32, Slot>>,
    /// Who is told what the machine's devices do.
    #[cfg(feature = "stage03")]
    trace: OnceLock<Arc<crate::trace::Trace>>,
}
// ANCHOR_END: vm

impl Vm {
    // ANCHOR: new
    /// Makes a VM without memory (`KVM_CREATE_VM`, KVM API 4.2) and tells KVM where it may put its own
    /// pages.
    pub fn new(kvm: &Kvm) -> Result<Arc<Self>, Error> {
        let fd = crate::kvm::create_vm(kvm)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(|source| Error::Ioctl { ioctl: "KVM_SET_IDENTITY_MAP_ADDR", source })?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(|source| Error::Ioctl { ioctl: "KVM_SET_TSS_ADDR", source })?;
        Ok(Arc::new(Self {
            fd,
            slots: Mutex::default(),
            #[cfg(feature = "stage03")]
            trace: OnceLock::new(),
        }))
    }
    // ANCHOR_END: new

    /// The machine's trace, if it has one.
    #[cfg(feature = "stage05")]
    pub(crate) fn trace(&self) -> Option<&Arc<crate::trace::Trace>> {
        self.trace.get()
    }

    /// Gives the machine a trace. It keeps the first one.
    #[cfg(feature = "stage03")]
    pub(crate) fn set_trace(&self, trace: Arc<crate::trace::Trace>) {
        let _ = self.trace.set(trace);
    }

    /// Makes a VM with `size` bytes of RAM laid out by [`layout::ram_ranges`], one memslot a range, of small pages.
    ///
    /// `size` must be a multiple of 4 KiB. Nothing is allocated until somebody touches it, so it may be more than the
    /// host has: one that is out of memory then ends a process, as a rule this one.
    pub fn with_ram(kvm: &Kvm, size: u64) -> Result<Arc<Self>, Error> {
        Self::with_ram_of(kvm, size, Pages::Small)
    }

    /// The same of pages of the caller's choice. If they are huge, `size` must be a multiple of 2 MiB.
    pub fn with_ram_of(kvm: &Kvm, size: u64, pages: Pages) -> Result<Arc<Self>, Error> {
        if pages == Pages::Huge && !size.is_multiple_of(LARGE_PAGE) {
            return Err(Error::HugeSize { found: size });
        }
        Self::with_ranges(kvm, size, layout::ram_ranges(size), pages)
    }

    /// The same with a layout of the caller's: first addresses and lengths in bytes, `size` or less in all.
    pub fn with_ranges(
        kvm: &Kvm,
        size: u64,
        ranges: Vec<(GuestAddress, usize)>,
        pages: Pages,
    ) -> Result<Arc<Self>, Error> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size { found: size });
        }
        let vm = Self::new(kvm)?;
        for (slot, (start, len)) in (0..).zip(ranges) {
            let added = vm.add_slot_of(slot, start, len, SlotFlags::default(), pages);
            added.map_err(|error| match error {
                // Place and alignment are ours and right: it can only be the size.
                Error::Slot { source, .. }
                    if [libc::EINVAL, libc::ENOMEM].contains(&source.errno()) =>
                {
                    Error::TooMuch { size }
                }
                error => error,
            })?;
        }
        Ok(vm)
    }

    /// The VM's file descriptor, for what later stages attach to it: vCPUs, irqchip, irqfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Maps `size` bytes of fresh zeroed host memory and gives them to the guest at `start` as memslot
    /// `slot` (`KVM_SET_USER_MEMORY_REGION`, KVM API 4.35).
    pub fn add_slot(
        &self,
        slot: u32,
        start: GuestAddress,
        size: usize,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        self.add_slot_of(slot, start, size, flags, Pages::Small)
    }

    fn add_slot_of(
        &self,
        slot: u32,
        start: GuestAddress,
        size: usize,
        flags: SlotFlags,
        pages: Pages,
    ) -> Result<(), Error> {
        let memory = map(start, size, pages)?;
        self.put(slot, Arc::new(memory), start, flags)
    }

    /// The same with `size` bytes of `file` from `offset` on, which the file has: a page of it is read when somebody
    /// touches it, and what is written there is not written to the file (`MAP_PRIVATE`).
    pub fn add_file(
        &self,
        slot: u32,
        start: GuestAddress,
        size: usize,
        file: &Arc<fs::File>,
        offset: u64,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let memory = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .build()
            .map_err(|source| Error::Map { size, source })?;
        self.put(slot, Arc::new(memory), start, flags)
    }

    /// Moves a slot: the same bytes appear at another guest-physical address.
    pub fn move_slot(&self, slot: u32, to: GuestAddress) -> Result<(), Error> {
        let (memory, flags) = {
            let slots = self.lock();
            let old = slots.get(&slot).ok_or(Error::NoSlot(slot))?;
            (old.region.get_mmap(), old.flags)
        };
        self.put(slot, memory, to, flags)
    }

    /// Changes a slot's flags; KVM allows that only for `log_dirty`.
    pub fn set_flags(&self, slot: u32, flags: SlotFlags) -> Result<(), Error> {
        let region = {
            let slots = self.lock();
            Arc::clone(&slots.get(&slot).ok_or(Error::NoSlot(slot))?.region)
        };
        self.set(slot, region, flags)
    }

    /// Deletes a slot: a size of 0 is how the ioctl says it. The guest finds a hole there afterwards.
    pub fn delete_slot(&self, slot: u32) -> Result<(), Error> {
        let mut slots = self.lock();
        let start = slots.get(&slot).ok_or(Error::NoSlot(slot))?.region.start_addr().0;
        self.ioctl(slot, start, 0, 0, SlotFlags::default())?;
        // Only now may the memory go: KVM no longer points at it.
        slots.remove(&slot);
        Ok(())
    }

    /// How many bytes of memory there are in all slots.
    pub fn size(&self) -> u64 {
        self.slots().iter().map(|slot| slot.size).sum()
    }

    /// The slots in the order of their numbers.
    pub fn slots(&self) -> Vec<SlotInfo> {
        self.lock()
            .iter()
            .map(|(&slot, Slot { region, flags })| SlotInfo {
                slot,
                start: region.start_addr(),
                size: region.get_mmap().size() as u64,
                flags: *flags,
                host: region.get_mmap().as_ptr() as u64,
            })
            .collect()
    }

    /// All slots as one memory that the host's code addresses as the guest does. A view of the slots
    /// as they are now: slots that come later are not in it.
    pub fn ram(&self) -> Ram {
        let mut regions: Vec<_> =
            self.lock().values().map(|slot| Arc::clone(&slot.region)).collect();
        regions.sort_by_key(|region| region.start_addr());
        Ram::from_arc_regions(regions).unwrap_or_default()
    }

    /// The pages that the guest wrote since the last call, as page numbers from the slot's start
    /// (`KVM_GET_DIRTY_LOG`, KVM API 4.8). The slot needs [`SlotFlags::log_dirty`].
    pub fn dirty_log(&self, slot: u32) -> Result<Vec<u64>, Error> {
        let slots = self.lock();
        let size = slots.get(&slot).ok_or(Error::NoSlot(slot))?.region.get_mmap().size();
        let bitmap = self
            .fd
            .get_dirty_log(slot, size)
            .map_err(|source| Error::Ioctl { ioctl: "KVM_GET_DIRTY_LOG", source })?;
        Ok((0u64..)
            .step_by(64)
            .zip(bitmap)
            .flat_map(|(first, word)| {
                (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
            })
            .collect())
    }

    /// Creates or moves a slot: `memory` appears at `start`.
    fn put(
        &self,
        slot: u32,
        memory: Arc<MmapRegion>,
        start: GuestAddress,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let size = memory.size();
        let region = GuestRegionMmap::with_arc(memory, start)
            .ok_or(Error::Range { start: start.0, size })
            .map(Arc::new)?;
        self.set(slot, region, flags)
    }

    /// Creates or changes a slot and keeps its memory alive.
    fn set(&self, slot: u32, region: Arc<GuestRegionMmap>, flags: SlotFlags) -> Result<(), Error> {
        let mut slots = self.lock();
        let memory = region.get_mmap();
        self.ioctl(
            slot,
            region.start_addr().0,
            memory.size() as u64,
            memory.as_ptr() as u64,
            flags,
        )?;
        slots.insert(slot, Slot { region, flags });
        Ok(())
    }

    // ANCHOR: ioctl
    /// `KVM_SET_USER_MEMORY_REGION`; the caller holds the lock and keeps what `host` points at.
    fn ioctl(
        &self,
        slot: u32,
        start: u64,
        size: u64,
        host: u64,
        flags: SlotFlags,
    ) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: flags.bits(),
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: `host` is the start of `size` mapped bytes of an `MmapRegion` which `slots` keeps
        // until KVM has been told to forget it (`delete_slot`), or, if it replaces an entry, which
        // that entry already kept; the VM's descriptor is closed before `slots` is dropped.
        #[expect(unsafe_code, reason = "KVM will write to host memory by its address")]
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|source| Error::Slot {
            slot,
            start,
            size,
            source,
        })
    }
    // ANCHOR_END: ioctl

    /// A thread that panicked while it held this lock left the map as it was before or after one
    /// insertion, both of which are true.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
