//! The guests, and how each gets into memory and to its first instruction.

use anyhow::Result;
use clap::ValueEnum;
use common::layout::PROGRAM;
use common::long_mode;
use common::memory::Ram;
use common::vcpu::Vcpu;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::{Args, kernel};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// The Rust kernel: paging, interrupts, a shell, and programs in ring 3
    Kernel,
    /// Real mode, protected mode, 32-bit paging, PAE, long mode in turn
    Climb,
    /// Long mode from the first instruction on: the host has set the registers
    Direct,
    /// Six exceptions, caught and reported
    Exceptions,
    /// The timer's interrupts, through the interrupt controllers in KVM
    Interrupts,
    /// Down to ring 3, and back by syscall, by int 0x80 and by a fault
    Rings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// The host writes the tables and sets the registers
    Host,
    /// A guest program climbs from real mode and jumps to the kernel
    Climb,
}

/// Puts the guest into memory, and the vCPU at its first instruction.
pub fn load(args: &Args, ram: &Ram, vcpu: &Vcpu) -> Result<()> {
    let program = match args.guest {
        Guest::Kernel => {
            let entry = kernel::load(ram, args.kernel.as_deref())?;
            return match args.enter {
                Way::Host => kernel::enter(vcpu, ram, entry),
                Way::Climb => kernel::climb_to(vcpu, ram, entry),
            };
        }
        Guest::Climb => {
            ram.write_slice(asm::real::CLIMB, PROGRAM)?;
            return Ok(vcpu.start_real_mode(PROGRAM)?);
        }
        Guest::Direct => asm::long::DIRECT,
        Guest::Exceptions => asm::long::EXCEPTIONS,
        Guest::Interrupts => asm::long::INTERRUPTS,
        Guest::Rings => asm::long::RINGS,
    };
    ram.write_slice(program, PROGRAM)?;
    let GuestAddress(rip) = PROGRAM;
    Ok(long_mode::enter(vcpu, ram, kvm_regs { rip, ..Default::default() })?)
}
