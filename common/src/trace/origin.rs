//! Which instruction made an exit.
//!
//! KVM leaves RIP at the instruction or behind it, as it happens to handle the exit. In Linux's source
//! (`arch/x86/kvm/x86.c`):
//!
//! - IN and a read of memory stay where they are until the next `KVM_RUN` brings them their data.
//! - OUT that the processor has decoded (`kvm_fast_pio_out`) stays, too. OUT that KVM's own emulator executes, and
//!   so each OUTS, is behind it; with a REP prefix after the last element only.
//! - A write to memory is always the emulator's, and RIP behind it, but for a REP that has more to do.
//!
//! So for writes both places are looked at: the instruction has to be one that makes this very exit.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::{Access, Space};
use crate::disasm::{self, Instruction, MAX_LEN};
use crate::layout::PAGE_SIZE;
use crate::regs::Registers;
use crate::vcpu::Vcpu;

/// What KVM was last seen to do after OUT: two of them in a row may look alike from both places.
#[derive(Debug, Default)]
pub struct Habit {
    behind: bool,
}

impl Habit {
    /// The registers of `vcpu` with the RIP of the instruction that made `access`, and the instruction. It is none
    /// if it can't be told.
    pub fn origin(
        &mut self,
        vcpu: &Vcpu,
        registers: Registers,
        access: &Access,
    ) -> (Registers, Option<Instruction>) {
        if !access.write {
            return (registers, disasm::next(vcpu, &registers));
        }
        let fits = |registers: &Registers, length| {
            let code = disasm::fetch(vcpu, registers.linear_rip(), length);
            fits(vcpu, registers, &code, access)
        };
        let here = fits(&registers, MAX_LEN).map(|it| (registers, it));
        let mut behind = (1..=MAX_LEN).filter_map(|length| {
            let mut before = registers;
            before.regs.rip = registers.regs.rip.wrapping_sub(length as u64);
            fits(&before, length).filter(|it| it.len() == length).map(|it| (before, it))
        });
        let place = match access.space {
            Space::Port => match here {
                Some((_, it)) if it.is_string_instruction() || !self.behind => here,
                _ => {
                    // What stands before an OUT may look like a prefix of it: `mov al, 0x66`, `out dx, al`.
                    let mut behind = behind.peekable();
                    let shortest = behind.peek().copied();
                    let found = behind.find(|(_, it)| it.has_rep_prefix()).or(shortest);
                    if !found.is_some_and(|(_, it)| it.is_string_instruction()) {
                        self.behind = found.is_some();
                    }
                    found.or(here)
                }
            },
            // What stands before belongs to it as a rule: a REX prefix, for instance, names another register.
            Space::Memory => behind.next_back().or(here),
        };
        let place = place.map(|(place, _)| place);
        match place {
            Some(place) => (place, disasm::next(vcpu, &place)),
            None => (registers, None),
        }
    }
}

fn decode(code: &[u8], registers: &Registers) -> Option<iced_x86::Instruction> {
    let (bits, rip) = (registers.code_bits(), registers.regs.rip);
    let instruction = Decoder::with_ip(bits, code, rip, DecoderOptions::NONE).decode();
    let prefix_counts = instruction.is_string_instruction()
        || !(instruction.has_rep_prefix() || instruction.has_repne_prefix());
    (!instruction.is_invalid() && prefix_counts).then_some(instruction)
}

/// The instruction in `code`, if it makes this `access`, which is a write.
fn fits(
    vcpu: &Vcpu,
    registers: &Registers,
    code: &[u8],
    access: &Access,
) -> Option<iced_x86::Instruction> {
    let instruction = decode(code, registers)?;
    let fits = match access.space {
        Space::Port => writes_port(&instruction, &registers.regs, access),
        Space::Memory => {
            writes_memory(&instruction, registers, access, |linear| Some(vcpu.translate(linear)?.0))
        }
    };
    fits.then_some(instruction)
}

fn writes_port(instruction: &iced_x86::Instruction, regs: &kvm_regs, access: &Access) -> bool {
    let dx = regs.rdx & 0xFFFF;
    let (port, size) = match instruction.mnemonic() {
        Mnemonic::Out => {
            let port = match instruction.op0_kind() {
                OpKind::Immediate8 => instruction.immediate8().into(),
                _ => dx,
            };
            (port, instruction.op1_register().size())
        }
        Mnemonic::Outsb => (dx, 1),
        Mnemonic::Outsw => (dx, 2),
        Mnemonic::Outsd => (dx, 4),
        _ => return false,
    };
    (port, size) == (access.addr, access.size)
}

fn writes_memory(
    instruction: &iced_x86::Instruction,
    registers: &Registers,
    access: &Access,
    translate: impl Fn(u64) -> Option<u64>,
) -> bool {
    // An access to two pages, or of more than 8 bytes, is several exits.
    let size = instruction.memory_size().size() as u64;
    if size < access.size as u64 || writes_another_value(instruction, &registers.regs, access) {
        return false;
    }
    // The kinds of operands in memory are the last ones.
    let in_memory = |&operand: &u32| instruction.op_kind(operand) >= OpKind::MemorySegSI;
    (0..instruction.op_count()).filter(in_memory).any(|operand| {
        let Some(mut linear) = instruction.virtual_address(operand, 0, |register, _, _| {
            Some(disasm::register(
                register,
                &registers.regs,
                &registers.sregs,
                registers.code_bits(),
            ))
        }) else {
            return false;
        };
        // A string instruction has moved on by an element.
        if instruction.is_string_instruction() {
            let backwards = registers.regs.rflags >> 10 & 1 == 1;
            linear = if backwards { linear.wrapping_add(size) } else { linear.wrapping_sub(size) };
        }
        let in_page = size.min(PAGE_SIZE - linear % PAGE_SIZE);
        let parts = [(linear, in_page), (linear.wrapping_add(in_page), size - in_page)];
        parts.into_iter().filter(|&(_, length)| length > 0).any(|(part, length)| {
            translate(part).is_some_and(|at| access.addr.wrapping_sub(at) < length)
        })
    })
}

/// Whether a MOV from a register writes something else than `access`, as far as that can be told.
fn writes_another_value(
    instruction: &iced_x86::Instruction,
    regs: &kvm_regs,
    access: &Access,
) -> bool {
    if instruction.mnemonic() != Mnemonic::Mov
        || instruction.op1_kind() != OpKind::Register
        || !instruction.op1_register().is_gpr()
        || instruction.memory_size().size() != access.data.len()
    {
        return false;
    }
    let source =
        disasm::register(instruction.op1_register(), regs, &kvm_sregs::default(), 64).to_le_bytes();
    !source.starts_with(&access.data)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn access(space: Space, addr: u64, data: &[u8]) -> Access {
        let took = Duration::ZERO;
        Access {
            space,
            addr,
            size: data.len(),
            write: true,
            data: data.to_vec(),
            device: None,
            took,
        }
    }

    /// 64-bit code with a byte, a word and more in RAX, a port in DX and an address in RDI.
    fn registers() -> Registers {
        let mut sregs = kvm_sregs { cr0: 1, efer: 1 << 10, ..Default::default() };
        sregs.cs.l = 1;
        sregs.fs.base = 0x5000;
        let regs = kvm_regs { rax: 0x4433_2211, rdx: 0xF_03F8, rdi: 0x2000, ..Default::default() };
        Registers { regs, sregs }
    }

    fn instruction(code: &[u8], registers: &Registers) -> iced_x86::Instruction {
        decode(code, registers).unwrap()
    }

    #[test]
    fn an_out_is_told_by_its_port_and_its_size() {
        let registers = registers();
        let fits = |code: &[u8], port, size| {
            let access = access(Space::Port, port, &[0; 4][..size]);
            writes_port(&instruction(code, &registers), &registers.regs, &access)
        };
        assert!(
            fits(&[0xEE], 0x3F8, 1) && fits(&[0xEF], 0x3F8, 4) && fits(&[0x66, 0xEF], 0x3F8, 2)
        );
        assert!(fits(&[0xE6, 0x80], 0x80, 1) && fits(&[0xE7, 0x80], 0x80, 4));
        assert!(fits(&[0x6E], 0x3F8, 1) && fits(&[0xF3, 0x6F], 0x3F8, 4));
        assert!(!fits(&[0xEE], 0x3F9, 1), "another port");
        assert!(!fits(&[0xEF], 0x3F8, 1), "another size");
        assert!(!fits(&[0xEC], 0x3F8, 1), "an IN");
        assert!(!fits(&[0x90], 0x3F8, 1), "a NOP");
        // A prefix of nothing but the byte of another instruction.
        assert_eq!(decode(&[0xF3, 0xEE], &registers), None);
    }

    #[test]
    fn a_write_to_memory_is_told_by_its_address_and_its_value() {
        let mut registers = registers();
        // Pages are mapped one below, and 0x3000 not at all.
        let translate = |linear: u64| (linear >> 12 != 3).then(|| linear - 0x1000);
        let fits = |code: &[u8], addr, data: &[u8]| {
            let found = instruction(code, &registers);
            writes_memory(&found, &registers, &access(Space::Memory, addr, data), translate)
        };
        // mov [rdi], eax; mov [rdi], r8d; mov [rdi+8], al; mov dword [rdi], 7; mov [fs:rdi], al
        assert!(fits(&[0x89, 0x07], 0x1000, &[0x11, 0x22, 0x33, 0x44]));
        assert!(!fits(&[0x44, 0x89, 0x07], 0x1000, &[0x11, 0x22, 0x33, 0x44]), "another value");
        assert!(!fits(&[0x89, 0x07], 0x1008, &[0x11, 0x22, 0x33, 0x44]), "another address");
        assert!(fits(&[0x88, 0x47, 0x08], 0x1008, &[0x11]));
        assert!(!fits(&[0x88, 0x47, 0x08], 0x1008, &[0x11, 0x22]), "another size");
        assert!(fits(&[0xC7, 0x07, 7, 0, 0, 0], 0x1000, &[7, 0, 0, 0]));
        assert!(fits(&[0x64, 0x88, 0x07], 0x6000, &[0x11]));
        // mov [rdi+0xffe], eax: the second page's part is an exit of its own, if it is mapped.
        let across = [0x89, 0x87, 0xFE, 0x0F, 0, 0];
        assert!(fits(&across, 0x1FFE, &[0x11, 0x22]));
        assert!(!fits(&across, 0x2000, &[0x33, 0x44]));
        // stosd has moved RDI on, or back.
        assert!(fits(&[0xF3, 0xAB], 0x0FFC, &[0x11, 0x22, 0x33, 0x44]));
        registers.regs.rflags = 1 << 10;
        let found = instruction(&[0xF3, 0xAB], &registers);
        let backwards = access(Space::Memory, 0x1004, &[0x11, 0x22, 0x33, 0x44]);
        assert!(writes_memory(&found, &registers, &backwards, translate));
    }

    #[test]
    fn real_mode_adds_16_times_the_segment() {
        let mut registers = registers();
        registers.sregs = kvm_sregs::default();
        registers.sregs.ds.base = 0xB_8000;
        registers.regs.rdi = 0xFFFF_0010;
        // mov [di], ax
        let found = instruction(&[0x89, 0x05], &registers);
        let written = access(Space::Memory, 0xB_8010, &[0x11, 0x22]);
        assert!(writes_memory(&found, &registers, &written, Some));
    }
}
