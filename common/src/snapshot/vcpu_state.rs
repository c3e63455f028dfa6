//! Introduced by stage 08: all that a vCPU is, as KVM gives it out and takes it back.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::vcpu::{Error, Vcpu};

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: armed by writing to it, once the local APIC's timer is in that mode.
const TSC_DEADLINE: u32 = 0x6E0;
/// How many registers are asked for by one call; KVM takes 255 (`MAX_IO_MSRS`).
const AT_ONCE: usize = 128;

/// A vCPU's state. KVM's structures stand in it as the bytes that they are.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// How quickly its time-stamp counter counts, in kHz; 0 where KVM doesn't say.
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    /// Where the host's processor has extended control registers.
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Model-specific registers by their numbers.
    msrs: Vec<(u32, u64)>,
}

/// Reads the state of `vcpu`, which stands between two instructions.
pub fn save(kvm: &Kvm, vcpu: &Vcpu) -> Result<State, Error> {
    let id = vcpu.id();
    let failed = |ioctl| move |source| Error::Ioctl { ioctl, vcpu: id, source };
    let fd = vcpu.fd();
    // First, since KVM lets a pending INIT or STARTUP take effect when this is read.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
    let xcrs = match kvm.check_extension(Cap::Xcrs) {
        true => Some(fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?),
        false => None,
    };
    let indices = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
    let msrs = read_msrs(vcpu, indices.as_slice())?;
    Ok(State {
        cpuid: cpuid.as_slice().to_vec(),
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        mp_state,
        regs: vcpu.regs()?,
        sregs: vcpu.sregs()?,
        xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
        xcrs,
        debug_regs: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
        events: fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        msrs,
    })
}

impl State {
    /// Gives this state to `vcpu`, which is new. `elapsed` nanoseconds have passed since it was read: that much the
    /// time-stamp counter has gone on.
    ///
    /// The order matters: CPUID says which registers exist, the special registers put the local APIC to its address
    /// and into its mode, and that decides what its timer's registers mean.
    pub fn restore(&self, vcpu: &Vcpu, elapsed: u64) -> Result<(), Error> {
        let failed = |ioctl| move |source| Error::Ioctl { ioctl, vcpu: vcpu.id(), source };
        let fd = vcpu.fd();
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| failed("KVM_SET_CPUID2")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        if self.tsc_khz != 0 && fd.get_tsc_khz().is_ok_and(|here| here != self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz).map_err(failed("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(self.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_sregs(&self.sregs)?;
        // SAFETY: KVM reads as much as it uses of the state that this VM's guest may have; what goes beyond `struct
        // kvm_xsave` has to be asked for (`ARCH_REQ_XCOMP_GUEST_PERM`), which nobody here does.
        #[expect(unsafe_code, reason = "KVM_SET_XSAVE reads as much as its caller has asked for")]
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        fd.set_debug_regs(&self.debug_regs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        self.restore_msrs(vcpu, elapsed)?;
        fd.set_vcpu_events(&self.events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        // So that its watchdogs don't take the time away for time lost (KVM API 4.72). A guest that has no kvmclock
        // has nowhere to be told.
        match fd.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL")(error)),
            _ => Ok(()),
        }
    }

    fn restore_msrs(&self, vcpu: &Vcpu, elapsed: u64) -> Result<(), Error> {
        let ticks = u128::from(elapsed) * u128::from(self.tsc_khz) / 1_000_000;
        let saved = self.msrs.iter().find(|(index, _)| *index == TSC);
        let tsc = saved.map_or(0, |(_, tsc)| *tsc).wrapping_add(ticks as u64);
        // What a new vCPU has already need not be set, and some of it can't be.
        let indices: Vec<_> = self.msrs.iter().map(|(index, _)| *index).collect();
        let has = read_msrs(vcpu, &indices)?;
        let differ =
            |msr: &&(u32, u64)| msr.0 != TSC && msr.0 != TSC_DEADLINE && !has.contains(msr);
        let others = self.msrs.iter().filter(differ).copied();
        let deadline =
            self.msrs.iter().filter(|(index, value)| *index == TSC_DEADLINE && *value != 0);
        let all: Vec<_> = [(TSC, tsc)].into_iter().chain(others).chain(deadline.copied()).collect();
        for some in all.chunks(AT_ONCE) {
            let entry = |&(index, data)| kvm_msr_entry { index, data, ..Default::default() };
            let entries: Vec<_> = some.iter().map(entry).collect();
            let msrs = Msrs::from_entries(&entries).expect("fewer than the most");
            let failed = |source| Error::Ioctl { ioctl: "KVM_SET_MSRS", vcpu: vcpu.id(), source };
            let done = vcpu.fd().set_msrs(&msrs).map_err(failed)?;
            // KVM stops at the first that it refuses, and says so only by the count.
            if let Some((index, value)) = some.get(done) {
                return Err(Error::Msr { vcpu: vcpu.id(), index: *index, value: *value });
            }
        }
        Ok(())
    }
}

/// Reads those of the registers `indices` that can be read (`KVM_GET_MSRS`, KVM API 4.18).
fn read_msrs(vcpu: &Vcpu, mut indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut values = Vec::new();
    while !indices.is_empty() {
        let some = &indices[..indices.len().min(AT_ONCE)];
        let entry = |&index| kvm_msr_entry { index, ..Default::default() };
        let entries: Vec<_> = some.iter().map(entry).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("fewer than the most");
        let failed = |source| Error::Ioctl { ioctl: "KVM_GET_MSRS", vcpu: vcpu.id(), source };
        let done = vcpu.fd().get_msrs(&mut msrs).map_err(failed)?;
        values.extend(msrs.as_slice()[..done].iter().map(|msr| (msr.index, msr.data)));
        // KVM stops at the first that this processor doesn't have: on behind it.
        indices = &indices[(done + usize::from(done < some.len()))..];
    }
    Ok(values)
}
