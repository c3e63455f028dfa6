//! The assembly guests of mini-kvm.
//!
//! One module a folder of NASM sources, one constant a file: `asm/real/hello.asm` is
//! [`real::HELLO`]. They are flat binaries; each source names in its `org` the guest-physical
//! address that it expects to be loaded at. Those in [`mistakes`] die, each in a way of its own, for the autopsy to
//! tell; those in [`criteria`] are the grader's, and run wherever they are loaded but for the 16-bit ones.

include!(concat!(env!("OUT_DIR"), "/guests.rs"));

/// The probe guests of [`common::checkup`].
pub fn checkup() -> common::checkup::Probes {
    common::checkup::Probes {
        real16: probes::REAL16,
        protected32: probes::PROTECTED32,
        paging32: probes::PAGING32,
        long_mode: probes::LONG_MODE,
        speed: probes::SPEED,
        irqchip: probes::IRQCHIP,
        smp: probes::SMP,
        single_step: probes::SINGLE_STEP,
        ring3: probes::RING3,
        cmpxchg16b: probes::CMPXCHG16B,
        fpu_state: probes::FPU_STATE,
        mmio: probes::MMIO,
        rom: probes::ROM,
        touch: probes::TOUCH,
    }
}
