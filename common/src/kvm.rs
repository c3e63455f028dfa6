//! Introduced by stage 01: `/dev/kvm`, its API version, its capabilities, and `KVM_CREATE_VM`.
//!
//! Everything in KVM is a file descriptor. `/dev/kvm` is the *system* one; [`create_vm`] asks it
//! for a *VM* one; stage 03 asks that for a *vCPU* one. (KVM API, section 2, "File descriptors".)

use std::fs;
use std::os::unix::fs::MetadataExt;

use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use crate::error::{Blame, Blamed};

/// The device node that KVM's kernel module creates.
pub const DEVICE: &str = "/dev/kvm";

/// The only API version that programs should accept: it has been 12 since Linux 2.6.22 and will
/// not change again; new features are capabilities. (KVM API, 4.1 `KVM_GET_API_VERSION`.)
pub const API_VERSION: i32 = 12;

/// Why this host gives us no KVM.
#[derive(Debug, Error)]
pub enum Error {
    /// The node is missing: no module loaded, no virtualization, or a container without it.
    #[error(
        "no {DEVICE}: the kvm-intel or kvm-amd module is not loaded, virtualization is off in the \
         firmware, or this machine is itself a VM without nesting; run with MINI_KVM=lab instead"
    )]
    Missing,
    /// The node is there and we may not open it.
    #[error(
        "may not open {DEVICE} (owned by group {group}): join it with `sudo usermod -aG {group} \
         \"$USER\"` and log in again, or run with MINI_KVM=lab"
    )]
    Permission {
        /// The group that owns the node, by name if it has one.
        group: String,
    },
    /// Another error of `open`.
    #[error("cannot open {DEVICE}: {0}")]
    Open(kvm_ioctls::Error),
    /// Something else answers behind the node.
    #[error("{DEVICE} speaks API version {found}, expected {API_VERSION}: the kernel is too old")]
    Version {
        /// What `KVM_GET_API_VERSION` returned.
        found: i32,
    },
    /// A system ioctl failed.
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
        Blame::Host
    }
}

/// Opens `/dev/kvm` and checks the API version (`KVM_GET_API_VERSION`, KVM API 4.1).
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::Missing,
        libc::EACCES | libc::EPERM => Error::Permission { group: device_group() },
        _ => Error::Open(error),
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found => Err(Error::Version { found }),
    }
}

/// Makes a virtual machine: no memory, no vCPU, only a file descriptor for both to be attached to
/// (`KVM_CREATE_VM`, KVM API 4.2).
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    kvm.create_vm().map_err(|source| Error::Ioctl { ioctl: "KVM_CREATE_VM", source })
}

/// Something that KVM has been able to do since some version, and tells by `KVM_CHECK_EXTENSION` (KVM
/// API 4.4).
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its name in the KVM API.
    pub name: &'static str,
    /// What the stages use it for, in a few words.
    pub what: &'static str,
    /// The stages (1 to 8) that cannot do without it.
    pub stages: &'static [u8],
    cap: Cap,
}

impl Capability {
    /// What `KVM_CHECK_EXTENSION` says: 0 if KVM lacks it, 1 or a number with a meaning of its own if not.
    pub fn value(&self, kvm: &Kvm) -> i32 {
        kvm.check_extension_int(self.cap)
    }

    /// Those that `stage` (1 to 8) cannot do without.
    pub fn needed_by(stage: u8) -> impl Iterator<Item = &'static Self> {
        CAPABILITIES.iter().filter(move |capability| capability.stages.contains(&stage))
    }
}

/// The capabilities that the stages rely on, in the order in which they come to need them.
pub const CAPABILITIES: &[Capability] = {
    const fn cap(
        cap: Cap,
        name: &'static str,
        what: &'static str,
        stages: &'static [u8],
    ) -> Capability {
        Capability { name, what, stages, cap }
    }
    const FROM_2: &[u8] = &[2, 3, 4, 5, 6, 7, 8];
    const FROM_3: &[u8] = &[3, 4, 5, 6, 7, 8];
    &[
        cap(Cap::UserMemory, "KVM_CAP_USER_MEMORY", "memslots", FROM_2),
        cap(Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "KVM's own pages", FROM_2),
        cap(Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "KVM's own pages", FROM_2),
        cap(Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "ROM", &[2, 5, 7]),
        cap(Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "the guest's CPUID", FROM_3),
        cap(Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG", "single step", &[3]),
        cap(Cap::CoalescedMmio, "KVM_CAP_COALESCED_MMIO", "gathered writes", &[5]),
        cap(Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "doorbells", &[5, 8]),
        cap(Cap::Irqchip, "KVM_CAP_IRQCHIP", "in-kernel PIC and APIC", &[5, 6, 7, 8]),
        cap(Cap::Irqfd, "KVM_CAP_IRQFD", "interrupt lines", &[5, 6, 7, 8]),
        cap(Cap::Pit2, "KVM_CAP_PIT2", "in-kernel timer", &[6, 7, 8]),
        cap(Cap::MpState, "KVM_CAP_MP_STATE", "several vCPUs", &[8]),
        cap(Cap::Clocksource, "KVM_CAP_CLOCKSOURCE", "the guest's clock", &[8]),
    ]
};

/// The group that owns [`DEVICE`], by name if `/etc/group` has one for it.
fn device_group() -> String {
    let gid = fs::metadata(DEVICE).map_or(0, |meta| meta.gid());
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    group_name(&groups, gid).map_or_else(|| gid.to_string(), str::to_owned)
}

/// Looks a gid up in the text of `/etc/group` (`name:password:gid:members`).
fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_names_come_from_the_third_field() {
        let groups = "root:x:0:\nbroken\nkvm:x:104:alice,bob\n";
        assert_eq!(group_name(groups, 104), Some("kvm"));
        assert_eq!(group_name(groups, 0), Some("root"));
        assert_eq!(group_name(groups, 7), None);
    }
}
