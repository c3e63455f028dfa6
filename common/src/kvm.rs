//! Introduced by stage 01: `/dev/kvm`, its API version, its capabilities, and `KVM_CREATE_VM`.
//!
//! Everything in KVM is a file descriptor. `/dev/kvm` is the *system* one; [`create_vm`] asks it
//! for a *VM* one; stage 03 asks that for a *vCPU* one. (KVM API, section 2, "File descriptors".)

use std::ffi::CString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::Serialize;
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
    /// The node is there and belongs to a group that we are not in.
    #[error(
        "may not open {DEVICE} (owned by group {group}): join it with `sudo usermod -aG {group} \
         \"$USER\"` and log in again, or run with MINI_KVM=lab"
    )]
    Permission {
        /// The group that owns the node, by name if it has one.
        group: String,
    },
    /// The node is there and only root may open it.
    #[error("may not open {DEVICE}, which only root may here: use sudo, or run with MINI_KVM=lab")]
    OnlyRoot,
    /// Another error of `open`.
    #[error("cannot open {DEVICE}: {0}; run with MINI_KVM=lab instead")]
    Open(kvm_ioctls::Error),
    /// What is behind the node knows no ioctls of KVM.
    #[error("{DEVICE} is not KVM: it does not answer KVM_GET_API_VERSION; run with MINI_KVM=lab")]
    NotKvm,
    /// Another KVM than ours.
    #[error(
        "{DEVICE} speaks API version {found}, expected {API_VERSION}: the kernel is too old; run \
         with MINI_KVM=lab instead"
    )]
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
    open_at(DEVICE)
}

// ANCHOR: open
fn open_at(path: &str) -> Result<Kvm, Error> {
    let name = CString::new(path).expect("a path without zero bytes");
    let kvm = Kvm::new_with_path(name).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::Missing,
        libc::EACCES | libc::EPERM => forbidden(fs::metadata(path).ok()),
        _ => Error::Open(error),
    })?;
    check_version(kvm.get_api_version())?;
    Ok(kvm)
}
// ANCHOR_END: open

// ANCHOR: check_version
/// Whether it is the version that this project is written for; -1 is how an ioctl fails.
fn check_version(found: i32) -> Result<(), Error> {
    match found {
        API_VERSION => Ok(()),
        ..0 => Err(Error::NotKvm),
        found => Err(Error::Version { found }),
    }
}
// ANCHOR_END: check_version

/// What would help whoever may not open the node.
fn forbidden(node: Option<Metadata>) -> Error {
    const GROUP_MAY: u32 = 0o060;
    match node {
        Some(node) if node.gid() != 0 && node.mode() & GROUP_MAY == GROUP_MAY => {
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            let group = group_name(&groups, node.gid());
            Error::Permission { group: group.map_or_else(|| node.gid().to_string(), str::to_owned) }
        }
        _ => Error::OnlyRoot,
    }
}

// ANCHOR: create_vm
/// Makes a virtual machine: no memory, no vCPU, only a file descriptor for both to be attached to
/// (`KVM_CREATE_VM`, KVM API 4.2).
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    kvm.create_vm().map_err(|source| Error::Ioctl { ioctl: "KVM_CREATE_VM", source })
}
// ANCHOR_END: create_vm

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
        cap(Cap::MpState, "KVM_CAP_MP_STATE", "several vCPUs", &[7, 8]),
        cap(Cap::Clocksource, "KVM_CAP_CLOCKSOURCE", "the guest's clock", &[8]),
    ]
};

/// How much of everything KVM gives.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// vCPUs of one VM up to which it is fast (`KVM_CAP_NR_VCPUS`).
    pub vcpus_recommended: usize,
    /// vCPUs of one VM that are possible (`KVM_CAP_MAX_VCPUS`).
    pub vcpus_max: usize,
    /// Memslots of one VM (`KVM_CAP_NR_MEMSLOTS`).
    pub memslots: usize,
    /// Bytes of a vCPU's memory that KVM shares with us: `struct kvm_run` and what follows it
    /// (`KVM_GET_VCPU_MMAP_SIZE`, KVM API 4.5).
    pub vcpu_mmap_size: usize,
    /// Lines of the CPUID table that KVM can give to a guest (`KVM_GET_SUPPORTED_CPUID`, KVM API 4.46).
    pub cpuid_entries: usize,
    /// Model-specific registers that belong to a guest's state (`KVM_GET_MSR_INDEX_LIST`, KVM API 4.3).
    pub msrs: usize,
    /// Model-specific registers that tell features (`KVM_GET_MSR_FEATURE_INDEX_LIST`, KVM API 4.3).
    pub feature_msrs: usize,
}

impl Limits {
    /// Asks KVM for them.
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        let failed = |ioctl| move |source| Error::Ioctl { ioctl, source };
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let feature_msrs =
            kvm.get_msr_feature_index_list().map_err(failed("KVM_GET_MSR_FEATURE_INDEX_LIST"))?;
        Ok(Self {
            vcpus_recommended: kvm.get_nr_vcpus(),
            vcpus_max: kvm.get_max_vcpus(),
            memslots: kvm.get_nr_memslots(),
            vcpu_mmap_size: kvm.get_vcpu_mmap_size().map_err(failed("KVM_GET_VCPU_MMAP_SIZE"))?,
            cpuid_entries: cpuid.as_slice().len(),
            msrs: msrs.as_slice().len(),
            feature_msrs: feature_msrs.as_slice().len(),
        })
    }
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
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn group_names_come_from_the_third_field() {
        let groups = "root:x:0:\nbroken\nkvm:x:104:alice,bob\n";
        assert_eq!(group_name(groups, 104), Some("kvm"));
        assert_eq!(group_name(groups, 0), Some("root"));
        assert_eq!(group_name(groups, 7), None);
    }

    #[test]
    fn what_is_not_kvm_is_told_apart() {
        assert!(matches!(open_at("/dev/no-such-node"), Err(Error::Missing)));
        assert!(matches!(open_at("/dev/null"), Err(Error::NotKvm)));
        assert!(matches!(open_at("/dev"), Err(Error::Open(_))));
    }

    #[test]
    fn only_version_12_is_accepted() {
        assert!(check_version(12).is_ok());
        for version in [0, 11, 13, i32::MAX] {
            let Err(error) = check_version(version) else { panic!("{version} was accepted") };
            let text = error.to_string();
            assert!(text.contains(&format!("version {version}, expected 12")), "{text}");
        }
        assert!(matches!(check_version(-1), Err(Error::NotKvm)));
    }

    #[test]
    fn the_group_to_join_is_named_if_joining_it_helps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvm");
        let node = |mode| {
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            forbidden(fs::metadata(&path).ok())
        };
        assert!(matches!(node(0o600), Error::OnlyRoot));
        assert!(matches!(forbidden(None), Error::OnlyRoot));
        // As root a file's group is a matter of choice; else it is our own.
        match std::os::unix::fs::chown(&path, None, Some(4_000_000)) {
            Ok(()) => {
                assert!(matches!(node(0o660), Error::Permission { group } if group == "4000000"));
            }
            Err(_) => assert!(matches!(node(0o660), Error::Permission { .. })),
        }
    }

    #[test]
    fn every_capability_names_its_stages() {
        for capability in CAPABILITIES {
            let stages = capability.stages;
            assert!(!stages.is_empty() && stages.is_sorted(), "{capability:?}");
            assert!(stages.iter().all(|stage| (1..=8).contains(stage)), "{capability:?}");
            assert!(capability.name.starts_with("KVM_CAP_"), "{capability:?}");
        }
    }
}
