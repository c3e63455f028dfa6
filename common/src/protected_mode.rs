//! Introduced by stage 07: 32-bit protected mode without paging, entered from the host.
//!
//! Boot loaders of the PC have agreed on this state for the kernels that they start: flat segments, so that an
//! address is an address, and interrupts off. Multiboot asks for it, the Linux boot protocol (1.14 "32-bit Boot
//! Protocol"), and Xen's PVH boot protocol.

use kvm_bindings::{kvm_regs, kvm_segment};

use crate::long_mode::{Error, segment, set_flat_segments};
use crate::memory::Ram;
use crate::vcpu::Vcpu;

// Bits of CR0 (Intel SDM vol. 3, 2.5).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;

/// Puts the vCPU into 32-bit protected mode, ring 0, interrupts and paging off, and with `regs`, whose `rip` is
/// where the guest starts. `code` is the code segment's selector, the data segment's is the next one.
///
/// Uses guest memory at [`BOOT_GDT`](crate::layout::BOOT_GDT); the guest may reuse it once it has descriptors of its own.
pub fn enter(vcpu: &Vcpu, ram: &Ram, code: u16, regs: kvm_regs) -> Result<(), Error> {
    let mut sregs = vcpu.sregs()?;
    set_flat_segments(&mut sregs, ram, kvm_segment { l: 0, db: 1, ..segment(code, true) })?;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    // A busy 32-bit TSS of the smallest size, which PVH asks for.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xB, present: 1, ..kvm_segment::default() };
    vcpu.set_sregs(&sregs)?;
    // Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3); IF is clear.
    vcpu.set_regs(&kvm_regs { rflags: 0x2, ..regs })?;
    Ok(())
}
