//! Introduced by stage 07: several vCPUs in one machine.
//!
//! Each is a processor with a local APIC of its own, whose ID is the vCPU's number. The first one is the
//! *bootstrap processor*, which takes its first instruction from the ROM. The others, *application
//! processors*, wait until it sends them an INIT and a STARTUP interrupt, which says in which page of the first
//! megabyte to begin (Intel SDM vol. 3, 10.4 "Multiple-Processor (MP) Initialization"). KVM's irqchip does all of
//! that: `KVM_RUN` sleeps in the kernel while the processor waits (`KVM_MP_STATE_UNINITIALIZED`, KVM API 4.38).

use std::sync::Arc;

use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::cpuid;
use crate::error::{Blame, Blamed};
use crate::memory::Vm;
use crate::vcpu::{self, Vcpu};

/// A local APIC's ID has 8 bits, and 255 means all of them (Intel SDM vol. 3, 12.6.2 "Determining IPI Destination"). An
/// x2APIC's has 32, but KVM's IOAPIC, like a real one, can name 8 of them, so Linux would not use more processors.
pub const MAX_CPUS: u8 = 255;

/// Why a machine cannot have so many processors.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM's own limit.
    #[error(
        "this host's KVM gives a machine at most {most} processors, not {asked}; give a smaller --cpus"
    )]
    TooMany {
        /// How many were asked for.
        asked: u8,
        /// `KVM_CAP_MAX_VCPUS`.
        most: usize,
    },
    /// One of them could not be made.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::TooMany { .. } => Blame::Input,
            Self::Vcpu(error) => error.blame(),
        }
    }
}

/// What a person may want to know of a machine with `count` processors, if that is more than KVM recommends.
pub fn caution(kvm: &Kvm, count: u8) -> Option<String> {
    let good = kvm.get_nr_vcpus();
    (usize::from(count) > good).then(|| {
        format!(
            "vCPUs: {count}, KVM recommends {good} at most (KVM_CAP_NR_VCPUS): they will take turns"
        )
    })
}

/// Makes vCPUs 0 to `count` - 1, all as reset leaves them, each with a CPUID that tells it its APIC ID. Comes after
/// the irqchip.
pub fn create_vcpus(kvm: &Kvm, vm: &Arc<Vm>, count: u8) -> Result<Vec<Vcpu>, Error> {
    let most = kvm.get_max_vcpus();
    if usize::from(count) > most {
        return Err(Error::TooMany { asked: count, most });
    }
    let vcpu = |id| {
        let vcpu = Vcpu::new(vm, id)?;
        cpuid::set(kvm, &vcpu, count)?;
        Ok(vcpu)
    };
    (0..count).map(vcpu).collect()
}
