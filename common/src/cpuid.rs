//! Introduced by stage 07: CPUID as an operating system wants it: true about its own machine.
//!
//! `KVM_GET_SUPPORTED_CPUID` describes what the host's KVM can do, but some of its fields are the host
//! processor's own: its APIC ID, its number of cores. A kernel that reads them would place itself into
//! another machine's topology. (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.)

#[cfg(any(feature = "stage08", test))]
use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm;
use crate::vcpu::{self, Vcpu};

/// Leaf 1, ECX: the local APIC's timer takes a time-stamp as its deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor, whose leaves begin at 0x4000_0000.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX bits 16 to 23 hold a number of logical processors.
const HTT: u32 = 1 << 28;

/// Sets what the vCPU's CPUID says: all that KVM supports, KVM's own leaves with its clock among them,
/// and the topology of a machine with `vcpus` vCPUs: one package, one thread a core.
/// (`KVM_GET_SUPPORTED_CPUID` and `KVM_SET_CPUID2`, KVM API 4.46.)
pub fn set(kvm: &Kvm, vcpu: &Vcpu, vcpus: u8) -> Result<(), vcpu::Error> {
    let failed = |ioctl| move |source| vcpu::Error::Ioctl { ioctl, vcpu: vcpu.id(), source };
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    // KVM's local APIC has this timer even where the host's processor has none, but the list of
    // supported features doesn't say so (KVM API 4.46).
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    describe(&mut cpuid, vcpu.id(), vcpus, tsc_deadline);
    vcpu.fd().set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))
}

/// What kind of processor the vCPUs will be, before there is one: leaf 1's EAX (stepping, model and family) and
/// EDX (features). (`KVM_GET_SUPPORTED_CPUID`, KVM API 4.46.)
pub fn signature(kvm: &Kvm) -> Result<(u32, u32), kvm::Error> {
    let failed = |source| kvm::Error::Ioctl { ioctl: "KVM_GET_SUPPORTED_CPUID", source };
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed)?;
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    Ok(leaf.map_or((0, 0), |leaf| (leaf.eax, leaf.edx)))
}

/// Whether a guest that was told `wanted` finds all of that on a host that supports `here`: the same vendor's processor
/// with the same features, or more. If not: what is missing.
#[cfg(feature = "stage08")]
pub(crate) fn covers(here: &[kvm_cpuid_entry2], wanted: &[kvm_cpuid_entry2]) -> Result<(), String> {
    /// What follows the guest's own state, or is ours to say: OSXSAVE, TSC-deadline and the hypervisor bit in leaf 1's
    /// ECX, HTT in its EDX, OSPKE in leaf 7's ECX.
    const OSXSAVE: u32 = 1 << 27;
    const OSPKE: u32 = 1 << 4;
    let find = |leaves: &[kvm_cpuid_entry2], function, index| {
        let found = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        found.map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
    };
    let [[_, vendor @ ..], [_, wanted_vendor @ ..]] = [find(here, 0, 0), find(wanted, 0, 0)];
    if vendor != wanted_vendor {
        return Err("another vendor's".to_owned());
    }
    // The registers of the leaves that hold features, each with the bits that don't count.
    const FEATURES: [(u32, u32, [u32; 4]); 4] = [
        (0x1, 0, [!0, !0, OSXSAVE | HYPERVISOR | TSC_DEADLINE, HTT]),
        (0x7, 0, [!0, 0, OSPKE, 0]),
        (0xD, 1, [0, !0, !0, !0]),
        (0x8000_0001, 0, [!0, !0, 0, 0]),
    ];
    for (function, index, ignored) in FEATURES {
        let (here, wanted) = (find(here, function, index), find(wanted, function, index));
        for (((name, here), wanted), ignored) in
            ["EAX", "EBX", "ECX", "EDX"].iter().zip(here).zip(wanted).zip(ignored)
        {
            let missing = wanted & !here & !ignored;
            if missing != 0 {
                return Err(format!(
                    "this one lacks features ({missing:#x} in {name} of CPUID leaf {function:#x})"
                ));
            }
        }
    }
    Ok(())
}

/// Writes the guest's own topology into `cpuid`.
fn describe(cpuid: &mut CpuId, id: u8, vcpus: u8, tsc_deadline: bool) {
    let id = u32::from(id);
    let count = u32::from(vcpus);
    // How many bits of an APIC ID number the cores of a package.
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ebx = entry.ebx & 0xFFFF | count << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = entry.edx & !HTT | if count > 1 { HTT } else { 0 };
            }
            // Intel: caches, and the number of core IDs in a package, less one.
            (0x4, _) => {
                // The field has 6 bits; what has more is told by leaf 0xB.
                let core_ids = (1u32 << core_bits).min(64) - 1;
                entry.eax = entry.eax & 0x3FFF | core_ids << 26;
            }
            // The extended topology: level 0 is threads of a core, level 1 cores of a package.
            (0xB | 0x1F, level) => {
                (entry.eax, entry.ebx, entry.ecx) = match level {
                    0 => (0, 1, 1 << 8),
                    1 => (core_bits, count, 1 | 2 << 8),
                    _ => (0, 0, level),
                };
                entry.edx = id;
            }
            // AMD: cores of a package, less one, and the size of the core ID in bits.
            (0x8000_0008, _) => {
                entry.ecx = entry.ecx & !0xF0FF | core_bits << 12 | (count - 1);
            }
            // AMD: caches, and by how many logical processors each is shared, less one.
            (0x8000_001D, _) => entry.eax &= !(0xFFF << 14),
            // AMD: the APIC ID, threads of a core less one, nodes less one.
            (0x8000_001E, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The leaves that matter, filled with a 16-core host's values.
    fn host() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xFFFF_FFFF,
            ebx: 0x0710_0800,
            ecx: 0x0000_F00F,
            edx: HTT | 1,
            ..Default::default()
        };
        let intel = [(4, 0), (0xB, 0), (0xB, 1)];
        let amd = [(0x8000_0008, 0), (0x8000_001D, 0), (0x8000_001E, 0)];
        let leaves = [&[(1, 0)], &intel[..], &amd].concat();
        CpuId::from_entries(
            &leaves.into_iter().map(|(function, index)| leaf(function, index)).collect::<Vec<_>>(),
        )
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn a_single_vcpu_sees_nothing_of_the_host_s_sixteen() {
        let mut cpuid = host();
        describe(&mut cpuid, 0, 1, true);
        let one = leaf(&cpuid, 1, 0);
        assert_eq!(one.ebx, 0x0001_0800, "APIC ID 0, 1 processor, CLFLUSH size kept");
        assert_eq!(one.ecx & (TSC_DEADLINE | HYPERVISOR), TSC_DEADLINE | HYPERVISOR);
        assert_eq!(one.edx, 1, "no HTT");
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 0);
        assert_eq!(leaf(&cpuid, 0x8000_001D, 0).eax, 0xFC00_3FFF, "no cache is shared");
        assert_eq!(leaf(&cpuid, 0xB, 1).ebx, 1);
    }

    #[test]
    fn apic_ids_are_the_vcpus_numbers() {
        let mut cpuid = host();
        describe(&mut cpuid, 2, 3, false);
        assert_eq!(leaf(&cpuid, 1, 0).ebx, 0x0203_0800);
        assert_eq!(leaf(&cpuid, 1, 0).edx & HTT, HTT);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!((leaf(&cpuid, 0xB, 0).edx, leaf(&cpuid, 0xB, 1).edx), (2, 2));
        assert_eq!((leaf(&cpuid, 0xB, 1).eax, leaf(&cpuid, 0xB, 1).ebx), (2, 3));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert_eq!(leaf(&cpuid, 0x8000_001E, 0).eax, 2);
    }
}
