//! Introduced by stage 03: one instruction at a time: what it was, and what it changed.

use std::fmt;

use vm_memory::{Bytes, GuestAddress};

use crate::disasm::{self, Instruction};
use crate::regs::{Change, Registers};
use crate::vcpu::{Error, Vcpu};

/// How long a line gets before its changes go on in the next one: what every terminal has.
const WIDTH: usize = 80;

/// A guest between two instructions.
#[derive(Clone, Debug)]
pub struct Moment {
    /// Its registers.
    pub registers: Registers,
    /// The instruction that comes next, if RAM is there.
    pub next: Option<Instruction>,
    ram: Vec<u8>,
}

/// What one instruction did.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Where it stood, as [`Registers::address`] writes it.
    pub address: String,
    /// What it was, if it could be read.
    pub instruction: Option<Instruction>,
    /// The registers that it changed. RIP is there only if the instruction after this one doesn't follow
    /// it in memory.
    pub changes: Vec<Change>,
    /// The bytes of RAM that it changed: the address of the first and, up to the last that differs, what
    /// stands there now.
    pub written: Option<(u64, Vec<u8>)>,
}

impl Moment {
    /// Takes down where `vcpu` stands. `ram` bytes of memory from address 0 on are copied, so this is for
    /// guests as small as those of stage 03.
    pub fn of(vcpu: &Vcpu, ram: usize) -> Result<Self, Error> {
        let registers = Registers::of(vcpu)?;
        let mut bytes = vec![0; ram];
        // What is no RAM stays zero at all moments, and so is never found to have changed.
        let _ = vcpu.vm().ram().read_slice(&mut bytes, GuestAddress(0));
        Ok(Self { registers, next: disasm::next(vcpu, &registers), ram: bytes })
    }

    /// What happened between this moment and the next one.
    pub fn step_to(&self, after: &Self) -> Step {
        let changes = changes(&self.registers, self.next.as_ref(), &after.registers);
        let differs = |at: &usize| self.ram.get(*at) != after.ram.get(*at);
        let written = (0..self.ram.len()).find(differs).map(|first| {
            let last = (first..self.ram.len()).rfind(differs).unwrap_or(first);
            (first as u64, after.ram[first..=last].to_vec())
        });
        Step { address: self.registers.address(), instruction: self.next.clone(), changes, written }
    }
}

/// The registers that an instruction changed. RIP is among them only if what comes next doesn't follow it in memory.
pub fn changes(
    before: &Registers,
    instruction: Option<&Instruction>,
    after: &Registers,
) -> Vec<Change> {
    let length = instruction.map_or(0, |instruction| instruction.bytes.len() as u64);
    let follows = before.regs.rip.wrapping_add(length) == after.regs.rip;
    let mut changes = before.changes(after);
    changes.retain(|change| !(follows && matches!(change.name, "eip" | "rip")));
    changes
}

/// One line: the address and the instruction that comes next.
impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(code(&self.registers.address(), self.next.as_ref()).trim_end())
    }
}

/// One line: address, bytes, text, and behind a semicolon, as an assembler's comment, what it changed; with
/// more lines of comment for what doesn't fit.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut changed: Vec<_> = self.changes.iter().map(Change::to_string).collect();
        if let Some((address, bytes)) = &self.written {
            changed.push(format!("[{address:04X}] = {}", hex(bytes)));
        }
        let mut line = code(&self.address, self.instruction.as_ref());
        let column = line.len();
        for (at, change) in changed.iter().enumerate() {
            if at > 0 && line.len() + 2 + change.len() <= WIDTH {
                line = line + ", " + change;
                continue;
            }
            if at > 0 {
                writeln!(f, "{line}")?;
                line = " ".repeat(column);
            }
            line = line + " ; " + change;
        }
        f.write_str(line.trim_end())
    }
}

/// Address, bytes and text in columns.
fn code(address: &str, instruction: Option<&Instruction>) -> String {
    let (bytes, text) = match instruction {
        Some(Instruction { bytes, text }) => (hex(bytes), text.as_str()),
        None => (String::new(), "(no memory here)"),
    };
    format!("{address}  {bytes:15} {text:18}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;

    fn moment(rip: u64, rax: u64, ram: &[u8]) -> Moment {
        let regs = kvm_regs { rip, rax, rflags: 2, ..Default::default() };
        let registers = Registers { regs, sregs: kvm_sregs::default() };
        let next = Some(disasm::decode(&[0x40], 16, rip));
        Moment { registers, next, ram: ram.to_vec() }
    }

    #[test]
    fn a_step_tells_registers_and_memory_but_not_the_next_address() {
        let step = moment(0x10, 1, &[1, 2, 3, 4]).step_to(&moment(0x11, 2, &[1, 7, 3, 8]));
        assert_eq!(
            step.to_string(),
            "0000:0010  40              inc ax             ; eax 00000001 -> 00000002\n\
             \x20                                             ; [0001] = 07 03 08"
        );
    }

    #[test]
    fn a_jump_is_told() {
        let step = moment(0x10, 1, &[]).step_to(&moment(0x20, 1, &[]));
        assert!(step.to_string().ends_with("; eip 00000010 -> 00000020"), "{step}");
        assert_eq!(step.written, None);
    }

    #[test]
    fn an_instruction_that_changes_nothing_has_no_comment() {
        let step = moment(0x10, 1, &[5]).step_to(&moment(0x11, 1, &[5]));
        assert_eq!(step.to_string(), "0000:0010  40              inc ax");
    }
}
