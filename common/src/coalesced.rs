//! Introduced by stage 05: MMIO writes that KVM collects and hands over together.
//!
//! A write that has no effect the guest could notice before its next exit need not exit on its own.
//! For the addresses of a *coalesced* zone KVM puts address and data into a ring of about 170
//! entries, a page that it shares with the monitor beside `struct kvm_run`, and lets the guest go
//! on. The monitor empties the ring after each `KVM_RUN`, before it looks at the exit: so writes
//! reach their devices in the order in which the guest made them, only later. When the ring is full,
//! the next write exits as an ordinary one would.

use std::fs::File;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{Cap, IoEventAddress};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileMemoryError};

use crate::error::{Blame, Blamed};
use crate::layout::PAGE_SIZE;
use crate::vcpu::Vcpu;

/// Why writes cannot be coalesced.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM lacks it.
    #[error("this KVM has no KVM_CAP_COALESCED_MMIO; run with MINI_KVM=lab instead")]
    Missing,
    /// KVM refused the zone.
    #[error("KVM_REGISTER_COALESCED_MMIO failed for {range:#x?}: {source}")]
    Register {
        /// Guest-physical addresses of the zone.
        range: Range<u64>,
        /// The errno.
        source: kvm_ioctls::Error,
    },
    /// The ring's page could not be mapped.
    #[error("cannot map the ring of coalesced writes: {0}")]
    Map(#[from] MmapRegionError),
    /// The vCPU's descriptor could not be duplicated for the mapping.
    #[error("cannot map the ring of coalesced writes: {0}")]
    Descriptor(#[from] std::io::Error),
    /// An access beyond the ring's page: cannot happen.
    #[error("the ring of coalesced writes: {0}")]
    Ring(#[from] VolatileMemoryError),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// How many entries the ring has. One always stays free: a full ring would look like an empty one.
pub const CAPACITY: usize =
    (PAGE_SIZE as usize - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// The ring of collected writes: `struct kvm_coalesced_mmio_ring`, one page, one for each VM.
#[derive(Debug)]
pub struct Ring(MmapRegion<()>);

impl Ring {
    /// Maps the ring of the VM that `vcpu` belongs to. At which page of the vCPU's file it is, is the
    /// value of `KVM_CAP_COALESCED_MMIO` (KVM API 4.116).
    pub fn map(vcpu: &Vcpu) -> Result<Self, Error> {
        let page = vcpu.vm().fd().check_extension_int(Cap::CoalescedMmio);
        let offset = match u64::try_from(page) {
            Ok(page @ 1..) => page * PAGE_SIZE,
            _ => return Err(Error::Missing),
        };
        // SAFETY: the descriptor is open as long as `vcpu` lives, which is longer than this call.
        #[expect(unsafe_code, reason = "VcpuFd gives only the number of its descriptor")]
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.fd().as_raw_fd()) };
        let file = FileOffset::new(File::from(fd.try_clone_to_owned()?), offset);
        Ok(Self(MmapRegion::from_file(file, PAGE_SIZE as usize)?))
    }

    /// Has KVM collect the writes to the guest-physical addresses `range`
    /// (`KVM_REGISTER_COALESCED_MMIO`, KVM API 4.116). Reads exit as before.
    pub fn collect(&self, vcpu: &Vcpu, range: Range<u64>) -> Result<(), Error> {
        let size = u32::try_from(range.end.saturating_sub(range.start)).unwrap_or(u32::MAX);
        vcpu.vm()
            .fd()
            .register_coalesced_mmio(IoEventAddress::Mmio(range.start), size)
            .map_err(|source| Error::Register { range, source })
    }

    // ANCHOR: drain
    /// Empties the ring: calls `write` with address and data of each write, oldest first, and returns
    /// how many there were. KVM adds entries at `last`, we take them at `first`.
    pub fn drain(&self, mut write: impl FnMut(u64, &[u8])) -> Result<u64, Error> {
        const FIRST: usize = offset_of!(kvm_coalesced_mmio_ring, first);
        const LAST: usize = offset_of!(kvm_coalesced_mmio_ring, last);
        let page = self.0.as_volatile_slice();
        let mut first = page.load::<u32>(FIRST, Ordering::Relaxed)?;
        let mut count = 0;
        // What KVM wrote before it moved `last` is to be seen after `last` has been read.
        while first != page.load::<u32>(LAST, Ordering::Acquire)? {
            let entry = size_of::<kvm_coalesced_mmio_ring>()
                + first as usize % CAPACITY * size_of::<kvm_coalesced_mmio>();
            let addr = page.read_obj(entry + offset_of!(kvm_coalesced_mmio, phys_addr))?;
            let len: u32 = page.read_obj(entry + offset_of!(kvm_coalesced_mmio, len))?;
            let data: [u8; 8] = page.read_obj(entry + offset_of!(kvm_coalesced_mmio, data))?;
            write(addr, &data[..data.len().min(len as usize)]);
            first = (first + 1) % CAPACITY as u32;
            page.store(first, FIRST, Ordering::Release)?;
            count += 1;
        }
        Ok(count)
    }
    // ANCHOR_END: drain
}
