//! Introduced by stage 05: MMIO writes that KVM collects and hands over together.
//!
//! A write that has no effect the guest could notice before its next exit need not exit on its own.
//! For the addresses of a *coalesced* zone KVM puts address and data into a ring of about 170
//! entries, a page that it shares with the monitor beside `struct kvm_run`, and lets the guest go
//! on. The monitor empties the ring after each `KVM_RUN`, before it looks at the exit: so writes
//! reach their devices in the order in which the guest made them, only later. When the ring is full,
//! the next write exits as an ordinary one would.

use std::ops::Range;

use kvm_ioctls::{Cap, IoEventAddress};
use thiserror::Error;

use crate::error::{Blame, Blamed};
use crate::memory::Vm;
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
    /// The ring could not be mapped or read.
    #[error("cannot map the ring of coalesced writes: {0}")]
    Ring(kvm_ioctls::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// Has KVM collect the writes to the guest-physical addresses `range`
/// (`KVM_REGISTER_COALESCED_MMIO`, KVM API 4.116). Reads exit as before.
///
/// There is one ring a VM; `vcpu` is the one through which it is mapped.
pub fn register(vm: &Vm, vcpu: &mut Vcpu, range: Range<u64>) -> Result<(), Error> {
    if !vm.fd().check_extension(Cap::CoalescedMmio) {
        return Err(Error::Missing);
    }
    let size = u32::try_from(range.end.saturating_sub(range.start)).unwrap_or(u32::MAX);
    vm.fd()
        .register_coalesced_mmio(IoEventAddress::Mmio(range.start), size)
        .map_err(|source| Error::Register { range, source })?;
    vcpu.fd_mut().map_coalesced_mmio_ring().map_err(Error::Ring)
}

/// Empties the ring: calls `write` with address and data of each write, oldest first, and returns
/// how many there were. The ring must have been mapped by [`register`].
pub fn drain(vcpu: &mut Vcpu, mut write: impl FnMut(u64, &[u8])) -> Result<u64, Error> {
    let mut count = 0;
    while let Some(entry) = vcpu.fd_mut().coalesced_mmio_read().map_err(Error::Ring)? {
        let len = (entry.len as usize).min(entry.data.len());
        write(entry.phys_addr, &entry.data[..len]);
        count += 1;
    }
    Ok(count)
}
