//! Introduced by stage 05: interrupts, from a device through an eventfd into the in-kernel irqchip.
//!
//! A PC has interrupt controllers between its devices and its processor: two cascaded 8259 PICs, an
//! IOAPIC and a local APIC for each processor. KVM has all of them inside the kernel, so that neither
//! an interrupt nor its acknowledgement costs an exit. A device's end of an interrupt line is then an
//! *irqfd*: an eventfd that KVM watches. Whoever writes to it, from any thread, pulses the line.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::Cap;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::Interrupt;
use crate::error::{Blame, Blamed};
use crate::memory::Vm;
use crate::trace::Trace;

/// Why there is no irqchip, or no line into it.
#[derive(Debug, Error)]
pub enum Error {
    /// A VM ioctl failed.
    #[error("{ioctl} failed: {source}")]
    Ioctl {
        /// Its name in the KVM API.
        ioctl: &'static str,
        /// The errno.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks what this needs.
    #[error("this KVM has no {0}: the kernel is too old; run with MINI_KVM=lab instead")]
    Missing(&'static str),
    /// The host has no eventfd left to give.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[from] io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

// ANCHOR: create
/// Puts the interrupt controllers into the VM: PICs at ports 0x20 and 0xA0, IOAPIC at 0xFEC00000, a
/// local APIC at 0xFEE00000 for each vCPU made from now on (`KVM_CREATE_IRQCHIP`, KVM API 4.24).
///
/// Comes before the first vCPU, which gets its APIC when it is made, and after guest memory: with an
/// irqchip each change of a memslot waits for KVM's readers, which takes milliseconds. From here on HLT
/// no longer exits: the vCPU sleeps in the kernel until an interrupt comes.
pub fn create_irqchip(vm: &Vm) -> Result<(), Error> {
    if !vm.fd().check_extension(Cap::Irqfd) {
        return Err(Error::Missing("KVM_CAP_IRQFD"));
    }
    vm.fd().create_irq_chip().map_err(|source| Error::Ioctl { ioctl: "KVM_CREATE_IRQCHIP", source })
}
// ANCHOR_END: create

/// Puts an i8254 timer (PIT) into the VM, at ports 0x40 to 0x43 and on line 0, and with it port 0x61: the
/// gate and the output of its third channel, against which Linux measures its clocks, the bit that connects a
/// speaker, which nobody hears, and one that toggles as memory's refresh did (`KVM_CREATE_PIT2` with
/// `KVM_PIT_SPEAKER_DUMMY`, KVM API 4.71). Needs [`create_irqchip`].
pub fn create_pit(vm: &Vm) -> Result<(), Error> {
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.fd().create_pit2(config).map_err(|source| Error::Ioctl { ioctl: "KVM_CREATE_PIT2", source })
}

/// One interrupt line into the in-kernel irqchip. Closing it, by dropping, takes it off the line.
#[derive(Debug)]
pub struct Irqfd {
    event: EventFd,
    gsi: u32,
    trace: Option<Arc<Trace>>,
}

impl Irqfd {
    /// Connects a new eventfd to line `gsi` (`KVM_IRQFD`, KVM API 4.75). Needs [`create_irqchip`].
    ///
    /// A *global system interrupt* below 16 is the ISA line of that number at the PICs, and pin `gsi` of the
    /// IOAPIC: KVM gives line 0, the PIT's, pin 0 there, where a PC often has pin 2.
    pub fn new(vm: &Vm, gsi: u32) -> Result<Self, Error> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        vm.fd()
            .register_irqfd(&event, gsi)
            .map_err(|source| Error::Ioctl { ioctl: "KVM_IRQFD", source })?;
        Ok(Self { event, gsi, trace: vm.trace().cloned() })
    }
}

impl Interrupt for Irqfd {
    fn trigger(&self) -> io::Result<()> {
        if let Some(trace) = &self.trace {
            trace.raised(self.gsi);
        }
        self.event.write(1)
    }
}
