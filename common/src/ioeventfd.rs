//! Introduced by stage 05: a doorbell that rings inside the kernel.
//!
//! When all that a write says is "look", nobody needs its data, and the guest needn't wait until
//! somebody has looked. KVM can be told to turn writes to an address into signals of an eventfd, a
//! counter in the kernel: the guest goes on at once, and a thread that waits for the eventfd wakes
//! up beside it. It is the irqfd's mirror image, and how fast virtio devices are notified.

use std::io;

use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Blame, Blamed};
use crate::memory::Vm;

/// Why an address cannot signal an eventfd.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM lacks it.
    #[error("this KVM has no KVM_CAP_IOEVENTFD; run with MINI_KVM=lab instead")]
    Missing,
    /// KVM refused it.
    #[error("KVM_IOEVENTFD failed for {addr:#x}: {source}")]
    Ioctl {
        /// The guest-physical address.
        addr: u64,
        /// The errno.
        source: kvm_ioctls::Error,
    },
    /// The host has no eventfd left to give, or reading one failed.
    #[error("eventfd: {0}")]
    EventFd(#[from] io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// An address whose writes signal an eventfd instead of causing an exit.
///
/// KVM keeps its end of the eventfd until the VM is gone.
#[derive(Debug)]
pub struct Ioeventfd(EventFd);

impl Ioeventfd {
    /// [`connect`]s a new eventfd.
    pub fn new(vm: &Vm, addr: u64) -> Result<Self, Error> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        connect(vm, addr, &event)?;
        Ok(Self(event))
    }

    /// How many writes there were since the last call. Does not wait.
    pub fn take(&self) -> Result<u64, Error> {
        match self.0.read() {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// Has writes of any size and value to guest-physical `addr` signal `event`, instead of causing an exit
/// (`KVM_IOEVENTFD`, KVM API 4.59).
pub fn connect(vm: &Vm, addr: u64, event: &EventFd) -> Result<(), Error> {
    if !vm.fd().check_extension(Cap::Ioeventfd) {
        return Err(Error::Missing);
    }
    vm.fd()
        .register_ioevent(event, &IoEventAddress::Mmio(addr), NoDatamatch)
        .map_err(|source| Error::Ioctl { addr, source })
}
