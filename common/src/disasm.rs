//! Introduced by stage 03: the instruction that a vCPU executes next, as NASM would write it.
//!
//! The processor finds it at CS.base + RIP, a *linear* address, which paging may map anywhere; KVM walks
//! the guest's page tables for us (`KVM_TRANSLATE`, KVM API 4.15).

use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::PAGE_SIZE;
use crate::regs::Registers;
use crate::vcpu::Vcpu;

/// The longest instruction in bytes (Intel SDM vol. 2, 2.3.11).
pub const MAX_LEN: usize = 15;

/// One decoded instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its text in NASM's syntax, or `(bad)` if the bytes are no instruction.
    pub text: String,
}

/// Decodes the first instruction in `code`, which stands at `rip` of a code segment of `bits` (16, 32 or
/// 64). Jumps are shown with their target.
pub fn decode(code: &[u8], bits: u32, rip: u64) -> Instruction {
    let code = &code[..code.len().min(MAX_LEN)];
    let mut decoder = Decoder::with_ip(bits, code, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mut text = String::new();
    if instruction.is_invalid() {
        // An invalid instruction has a length too, but one that says nothing.
        return Instruction { bytes: code[..code.len().min(1)].to_vec(), text: "(bad)".into() };
    }
    let mut formatter = NasmFormatter::new();
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.format(&instruction, &mut text);
    Instruction { bytes: code[..instruction.len()].to_vec(), text }
}

/// The instruction that `vcpu`, standing at `registers`, executes next; none if no RAM is there.
pub fn next(vcpu: &Vcpu, registers: &Registers) -> Option<Instruction> {
    let code = fetch(vcpu, registers.linear_rip(), MAX_LEN);
    (!code.is_empty()).then(|| decode(&code, registers.code_bits(), registers.regs.rip))
}

/// `len` bytes from a linear address on, [`MAX_LEN`] at most: fewer where a page is not mapped or not RAM.
pub(crate) fn fetch(vcpu: &Vcpu, linear: u64, len: usize) -> Vec<u8> {
    let ram = vcpu.vm().ram();
    let mut code = Vec::with_capacity(len);
    while code.len() < len {
        let at = linear.wrapping_add(code.len() as u64);
        let Some(physical) = vcpu.translate(at) else { break };
        let left_in_page = (PAGE_SIZE - at % PAGE_SIZE) as usize;
        let mut part = [0; MAX_LEN];
        let part = &mut part[..left_in_page.min(len - code.len())];
        if ram.read_slice(part, GuestAddress(physical.0)).is_err() {
            break;
        }
        code.extend_from_slice(part);
    }
    code
}

/// What an address is made of: a general register's value, or a segment's base.
pub(crate) fn register(register: Register, regs: &kvm_regs, sregs: &kvm_sregs, bits: u32) -> u64 {
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RBP => regs.rbp,
        Register::RSP => regs.rsp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::FS => return sregs.fs.base,
        Register::GS => return sregs.gs.base,
        // 64-bit code has no other segments.
        _ if bits == 64 => return 0,
        Register::ES => return sregs.es.base,
        Register::CS => return sregs.cs.base,
        Register::SS => return sregs.ss.base,
        Register::DS => return sregs.ds.base,
        _ => return 0,
    };
    match (register, register.size()) {
        (Register::AH | Register::BH | Register::CH | Register::DH, _) => full >> 8 & 0xFF,
        (_, 8) => full,
        (_, size) => full & ((1 << (size * 8)) - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_mean_different_things_by_mode() {
        let code = [0xB8, 0x37, 0x00, 0x00, 0x00];
        let text = |bits| decode(&code, bits, 0);
        assert_eq!(text(16).text, "mov ax,0x37");
        assert_eq!(text(16).bytes, [0xB8, 0x37, 0x00]);
        assert_eq!(text(32).text, "mov eax,0x37");
        assert_eq!(decode(&[0x48, 0xFF, 0xC0], 64, 0).text, "inc rax");
    }

    #[test]
    fn jumps_show_their_target() {
        assert_eq!(decode(&[0xEB, 0xFE], 16, 0x1005).text, "jmp short 0x1005");
    }

    #[test]
    fn bytes_that_are_no_instruction_are_called_bad() {
        for code in [&[][..], &[0x0F], &[0xFF, 0xFF], &[0x66; 40]] {
            let bad = decode(code, 16, 0);
            assert_eq!(bad.text, "(bad)");
            assert_eq!(bad.bytes, code[..code.len().min(1)]);
        }
    }
}
