//! Introduced by stage 08: model-specific registers, as a PC's firmware leaves them.
//!
//! After reset a processor caches nothing and takes string instructions slowly. Firmware changes both
//! before it hands over, and Linux takes for granted that it has. (Intel SDM vol. 3, 13.11 "Memory Type
//! Range Registers"; vol. 4, IA32_MISC_ENABLE.)

use kvm_bindings::{Msrs, kvm_msr_entry};

use crate::vcpu::{Error, Vcpu};

/// IA32_MTRR_DEF_TYPE: how memory is cached that no range register speaks of.
const MTRR_DEF_TYPE: u32 = 0x2FF;
/// Range registers are in force; write-back is the type of all memory.
const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1A0;
/// `rep movs` and `rep stos` move cache lines, not bytes.
const FAST_STRINGS: u64 = 1 << 0;

/// Sets them (`KVM_GET_MSRS`, KVM API 4.18; `KVM_SET_MSRS`, 4.19). Comes after CPUID, which says that they
/// exist.
pub fn set(vcpu: &Vcpu) -> Result<(), Error> {
    let failed = |ioctl| move |source| Error::Ioctl { ioctl, vcpu: vcpu.id(), source };
    // KVM stops at the first register that it refuses, and says so only by the count.
    let all = |ioctl, done| match done == 2 {
        true => Ok(()),
        false => Err(failed(ioctl)(kvm_ioctls::Error::new(libc::EINVAL))),
    };
    let entry = |index| kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry(MTRR_DEF_TYPE), entry(MISC_ENABLE)])
        .expect("two entries are fewer than the most");
    all("KVM_GET_MSRS", vcpu.fd().get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?)?;
    let [mtrr_def_type, misc_enable] = msrs.as_mut_slice() else { unreachable!("two entries") };
    mtrr_def_type.data = ENABLED_WRITE_BACK;
    // Its other bits tell what KVM doesn't have.
    misc_enable.data |= FAST_STRINGS;
    all("KVM_SET_MSRS", vcpu.fd().set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?)
}
