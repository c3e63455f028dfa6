//! What this KVM can stop a guest by: three guests of a few bytes try it.
//!
//! A KVM on emulated hardware, or one that interprets its guests, may do a part of it alone. QEMU's SVM is an example: `VMRUN`
//! puts the guest's DR7 where the emulator doesn't look when an address is to be compared. An interpreter may execute
//! `int3` without a thought of who debugs whom.

use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::{Access, Breakpoints, Watched};
use crate::deadline::{self, Deadline};
use crate::kvm;
use crate::layout::{PAGE_SIZE, PROGRAM};
use crate::memory::{self, Vm};
use crate::vcpu::{self, Exit, Vcpu};

/// `nop`, `int3`, `hlt`, and `mov [0x2000], al`.
const NOP: u8 = 0x90;
const INT3: u8 = 0xCC;
const HLT: u8 = 0xF4;
const STORE: [u8; 3] = [0xA2, 0x00, 0x20];
const STORED: u64 = 0x2000;

/// Where an `int3` leads that the guest gets itself: a HLT, in real mode's table of vectors.
const HANDLER: u64 = 0x500;
const VECTOR_3: GuestAddress = GuestAddress(3 * 4);

/// Far more than they need.
const LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Ram(#[from] vm_memory::GuestMemoryError),
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    #[error(transparent)]
    Deadline(#[from] deadline::Error),
}

/// What works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Works {
    /// `int3` comes to the debugger.
    pub(super) int3: bool,
    /// A debug register stops at an instruction.
    pub(super) execute: bool,
    /// And at a write.
    pub(super) write: bool,
}

impl Works {
    /// Tries it.
    pub(super) fn here() -> Self {
        let stops_behind = |code: &[u8], len, debug: kvm_guest_debug| {
            stop(code, &debug).is_ok_and(|pc| pc == Some(PROGRAM.0 + len))
        };
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        let software = kvm_guest_debug { control, ..Default::default() };
        let mut execute = Breakpoints::default();
        let mut write = Breakpoints::default();
        let watched = Watched { addr: STORED, len: 1, access: Access::Write };
        let set = execute.insert_hardware(PROGRAM.0 + 1).and(write.watch(watched));
        debug_assert!(set.is_ok(), "there are four debug registers");
        let [store, at, of] = STORE;
        Self {
            int3: stops_behind(&[NOP, INT3, HLT], 1, software),
            execute: stops_behind(&[NOP, NOP, HLT], 1, execute.control()),
            write: stops_behind(&[store, at, of, NOP, HLT], 3, write.control()),
        }
    }
}

/// Runs `code` in real mode. Returns where `KVM_EXIT_DEBUG` stopped it, if that did.
fn stop(code: &[u8], debug: &kvm_guest_debug) -> Result<Option<u64>, Failure> {
    let kvm = kvm::open()?;
    let vm = Vm::with_ram(&kvm, 4 * PAGE_SIZE)?;
    vm.ram().write_slice(code, PROGRAM)?;
    vm.ram().write_obj(HLT, GuestAddress(HANDLER))?;
    vm.ram().write_obj(HANDLER as u32, VECTOR_3)?;
    let mut vcpu = Vcpu::new(&vm, 0)?;
    vcpu.start_real_mode(PROGRAM)?;
    vcpu.set_guest_debug(debug)?;
    let deadline = Deadline::new(Some(LIMIT))?;
    loop {
        match vcpu.run()? {
            Exit::Debug(what) => return Ok(Some(what.pc)),
            Exit::Interrupted if !deadline.passed() => {}
            _ => return Ok(None),
        }
    }
}
