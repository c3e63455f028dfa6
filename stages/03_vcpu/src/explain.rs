//! What a person is told: what the reset state means, and what each exit.

use anyhow::Result;
use cli::println;
use common::memory::Ram;
use common::regs::{Bits, CR0, EFER, RFLAGS, Registers};
use vm_memory::{Bytes, GuestAddress};

use crate::guests::Guest;

pub const HLT: &str = "the guest executed HLT and waits for an interrupt; none can come.";
pub const SHUTDOWN: &str = "a triple fault. A PC would reset now. KVM on AMD does reset
the vCPU, so there the registers below are those of the reset state again.";
pub const FAIL_ENTRY: &str = "the processor refused to enter the guest in this state.";
pub const INTERNAL_ERROR: &str = "KVM had to emulate an instruction and could not.";
pub const HANG: &str = "no exit";
pub const HANGS: &str = "the guest gets nowhere, and --watchdog has called its vCPU back.";

/// Where `asm/real/walk.asm` leaves its results: 16 bits and 32 bits.
const SUM: GuestAddress = GuestAddress(0x2010);
const SQUARE: GuestAddress = GuestAddress(0x2012);

/// The registers that decide what the first instruction is and means.
pub fn reset(Registers { regs, sregs }: &Registers) {
    println!(
        "  cs     {:04X}, base {:08X}: in real mode the base is the selector times 16,
         but not here, until CS is loaded for the first time
  rip    {:04X}: the first instruction comes from {:08X}, a ROM's last 16 bytes
         below 4 GiB (stage 07). There is none here: we set CS and RIP ourselves
  rflags {:04X} {}: interrupts are off; bit 1 is always set
  cr0    {:08X} {}: without PE it is real mode, without PG no paging
  efer   {:04X} {}: no long mode
  rdx    {:04X}: family, model and stepping of the processor
  idt    base {:04X}: in real mode 256 vectors of 4 bytes each stand there",
        sregs.cs.selector,
        sregs.cs.base,
        regs.rip,
        sregs.cs.base.wrapping_add(regs.rip),
        regs.rflags,
        Bits(regs.rflags, RFLAGS),
        sregs.cr0,
        Bits(sregs.cr0, CR0),
        sregs.efer,
        Bits(sregs.efer, EFER),
        regs.rdx,
        sregs.idt.base,
    );
}

/// Where this KVM is not like hardware.
pub fn difference(guest: Guest, exit: &str) {
    let expected = guest.exit();
    if exit != expected {
        println!("Hardware answers this guest with {expected}; this KVM does not.");
    }
}

/// What the guest has left in memory, if it is one that computes.
pub fn results(guest: Guest, ram: &Ram) -> Result<()> {
    if guest == Guest::Walk {
        let sum = u16::from_le(ram.read_obj(SUM)?);
        let square = u32::from_le(ram.read_obj(SQUARE)?);
        println!("The guest left in memory: 1 + 2 + ... + 10 = {sum}, squared {square}");
    }
    Ok(())
}
