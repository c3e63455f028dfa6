//! The guests, and where each leads.

use clap::ValueEnum;
use kvm_bindings::kvm_sregs;

use crate::explain::HANG;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Guest {
    /// Asks CPUID who it runs on, adds 1 to 10, squares the sum, ends with HLT
    Walk,
    /// Raises an exception that nothing handles: KVM_EXIT_SHUTDOWN
    TripleFault,
    /// Starts in a state that no processor can be in: KVM_EXIT_FAIL_ENTRY
    FailEntry,
    /// Jumps to where no memory is: KVM_EXIT_INTERNAL_ERROR
    InternalError,
    /// Waits for what never comes, without an exit: for --watchdog
    Hang,
}

impl Guest {
    /// Its code, for address 0x1000.
    pub fn program(self) -> &'static [u8] {
        match self {
            Self::Walk => asm::real::WALK,
            Self::TripleFault => asm::real::TRIPLE_FAULT,
            Self::FailEntry => asm::real::HALT,
            Self::InternalError => asm::real::NO_MEMORY,
            Self::Hang => asm::real::HANG,
        }
    }

    /// What hardware answers it with, if it ends.
    pub fn exit(self) -> &'static str {
        match self {
            Self::Hang => HANG,
            Self::Walk => "KVM_EXIT_HLT",
            Self::TripleFault => "KVM_EXIT_SHUTDOWN",
            Self::FailEntry => "KVM_EXIT_FAIL_ENTRY",
            Self::InternalError => "KVM_EXIT_INTERNAL_ERROR",
        }
    }
}

// ANCHOR: impossible
/// A state that KVM_SET_SREGS lets through and hardware refuses: long mode with a code segment that is
/// 64-bit (L) and 32-bit (D) at once. (Intel SDM vol. 3, 28.3.1.2; AMD APM vol. 2, 15.5.1.)
pub fn impossible(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cr0 = 1 << 31 | 1; // PG, PE
    sregs.cr4 = 1 << 5; // PAE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    (sregs.cs.l, sregs.cs.db) = (1, 1);
    sregs
}
// ANCHOR_END: impossible
