//! gdb's `monitor` commands: what a person who debugs a machine wants to see, and gdb has no command for.

use std::fmt::Write;

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry};
use vm_memory::{Bytes, GuestAddress};

use super::probe::Works;
use crate::descriptor::{self, Layout, Unusable};
use crate::disasm::{self, MAX_LEN};
use crate::memory::Ram;
use crate::page_walk::Paging;
use crate::regs::{Bits, CR0, CR4, EFER, Registers};
use crate::vcpu::Vcpu;

/// `monitor help`.
const HELP: &str = "\
Of the vCPU that `thread` has chosen:
  regs               all registers, segments and control registers in words
  cr                 the control registers and EFER
  msr NUMBER [VALUE] reads a model-specific register, or writes it
  code [ADDR [N]]    disassembles N instructions as the vCPU reads them now
  pagewalk ADDR      the page tables' entries for a linear address
  phys ADDR [LEN]    guest-physical memory
  gdt, idt           the descriptor tables in words; idt N: one vector
  exits [N]          the last exits to the monitor
  stops              what this KVM can stop a guest by
Numbers are hexadecimal with 0x in front, else decimal.
eip and rip are linear addresses here: CS's base is added. In 16-bit code the stack is at $ss*16+$sp.
When the guest has changed its mode, `unset tdesc filename` has gdb look again.";

/// `monitor stops`: what breakpoints and watchpoints are made of here.
pub(super) fn stops(works: Works) -> String {
    let register = "one of four debug registers";
    let trap = match works.int3 {
        true => "an int3 in the guest's code",
        false => {
            "an OUT in the guest's code, for this KVM keeps int3 to itself; in code of ring 3 the guest goes step \
                  by step, which is slow"
        }
    };
    let software = trap.to_owned();
    let hardware = match works.execute {
        true => register.to_owned(),
        false => format!("this KVM loses debug registers: {trap}"),
    };
    let watch = match works.write {
        true => register,
        false => {
            "this KVM loses debug registers: the guest goes step by step, which is slow and sees only \
                  changes; rwatch and awatch are refused"
        }
    };
    format!("break:  {software}\nhbreak: {hardware}\nwatch:  {watch}")
}

/// The most bytes that `phys` shows, and the most lines of the other commands.
const MOST_BYTES: u64 = 0x1000;
const MOST_LINES: u64 = 256;

/// What a command answers; what it can't do, it says.
pub(super) fn answer(line: &str, vcpu: &Vcpu) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let registers = match Registers::of(vcpu) {
        Ok(registers) => registers,
        Err(error) => return error.to_string(),
    };
    let ram = vcpu.vm().ram();
    let answer = match *words.as_slice() {
        [] | ["help"] => Ok(HELP.to_owned()),
        ["regs"] => Ok(registers.to_string()),
        ["cr"] => Ok(control_registers(&registers)),
        ["msr", index] => number(index).and_then(|index| read_msr(vcpu, index)),
        ["msr", index, value] => number(index)
            .and_then(|index| number(value).and_then(|value| write_msr(vcpu, index, value))),
        ["code"] => Ok(code(&registers, &ram, registers.linear_rip(), 8)),
        ["code", at] => number(at).map(|at| code(&registers, &ram, at, 8)),
        ["code", at, count] => {
            number(at).and_then(|at| number(count).map(|count| code(&registers, &ram, at, count)))
        }
        ["pagewalk", at] => {
            number(at).map(|at| Paging::of(&registers.sregs).walk(&ram, at).to_string())
        }
        ["phys", at] => number(at).and_then(|at| physical(&ram, at, 64)),
        ["phys", at, len] => {
            number(at).and_then(|at| number(len).and_then(|len| physical(&ram, at, len)))
        }
        ["gdt"] => Ok(gdt(&registers, &ram)),
        ["idt"] => Ok(idt(&registers, &ram, None)),
        ["idt", vector] => number(vector).and_then(|vector| match u8::try_from(vector) {
            Ok(vector) => Ok(idt(&registers, &ram, Some(vector))),
            Err(_) => Err("a vector is 0 to 255".to_owned()),
        }),
        ["exits"] => Ok(exits(vcpu, 16)),
        ["exits", count] => number(count).map(|count| exits(vcpu, count)),
        _ => Err(format!(
            "there is no `{}`, or not with that; `monitor help` has what there is",
            line.trim()
        )),
    };
    answer.unwrap_or_else(|why| why)
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text} is no number; 0x stands in front of hexadecimal ones"))
}

fn control_registers(registers: &Registers) -> String {
    let s = &registers.sregs;
    format!(
        "cr0  {:#010x} {}\ncr2  {:#x}\ncr3  {:#x}\ncr4  {:#010x} {}\ncr8  {:#x}\nefer {:#010x} {}\n{}, {}",
        s.cr0,
        Bits(s.cr0, CR0),
        s.cr2,
        s.cr3,
        s.cr4,
        Bits(s.cr4, CR4),
        s.cr8,
        s.efer,
        Bits(s.efer, EFER),
        registers.mode(),
        Paging::of(s).scheme,
    )
}

/// One register, as `KVM_GET_MSRS` and `KVM_SET_MSRS` take it.
fn msr(index: u64, data: u64) -> Result<Msrs, String> {
    let index = u32::try_from(index).map_err(|_| "an MSR's number has 32 bits".to_owned())?;
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Ok(Msrs::from_entries(&[entry]).expect("one entry is fewer than the most"))
}

fn read_msr(vcpu: &Vcpu, index: u64) -> Result<String, String> {
    let mut msrs = msr(index, 0)?;
    match vcpu.fd().get_msrs(&mut msrs) {
        Ok(1) => {
            let value = msrs.as_slice()[0].data;
            let names = if index == 0xC000_0080 { EFER } else { &[] };
            let names =
                if names.is_empty() { String::new() } else { format!(" {}", Bits(value, names)) };
            Ok(format!("MSR {index:#x} = {value:#x}{names}"))
        }
        Ok(_) => Err(format!("this KVM has no MSR {index:#x}")),
        Err(error) => Err(format!("KVM_GET_MSRS failed: {error}")),
    }
}

fn write_msr(vcpu: &Vcpu, index: u64, value: u64) -> Result<String, String> {
    match vcpu.fd().set_msrs(&msr(index, value)?) {
        Ok(1) => read_msr(vcpu, index),
        Ok(_) => Err(format!("this KVM does not take {value:#x} for MSR {index:#x}")),
        Err(error) => Err(format!("KVM_SET_MSRS failed: {error}")),
    }
}

/// Instructions from a linear address on, as the vCPU reads them now.
fn code(registers: &Registers, ram: &Ram, mut at: u64, count: u64) -> String {
    let paging = Paging::of(&registers.sregs);
    let mut text = String::new();
    for _ in 0..count.min(MOST_LINES) {
        let mut bytes = [0; MAX_LEN];
        let len = paging.read(ram, at, &mut bytes);
        if len == 0 {
            let _ = writeln!(text, "   {at:#x}: no memory here");
            break;
        }
        let instruction = disasm::decode(&bytes[..len], registers.code_bits(), at);
        let mark = if at == registers.linear_rip() { "=>" } else { "  " };
        let _ = writeln!(text, "{mark} {at:#x}: {}", instruction.text);
        at = at.wrapping_add(instruction.bytes.len().max(1) as u64);
    }
    text
}

/// Memory as bytes and letters, 16 a line.
fn physical(ram: &Ram, at: u64, len: u64) -> Result<String, String> {
    let len = len.min(MOST_BYTES);
    let mut text = String::new();
    for line in (0..len).step_by(16) {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..(len - line).min(16) as usize];
        let start = at.checked_add(line).ok_or("the address space ends here")?;
        if ram.read_slice(bytes, GuestAddress(start)).is_err() {
            let _ = writeln!(text, "{start:#x}: no RAM here");
            break;
        }
        let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let letters: String = bytes
            .iter()
            .map(|&byte| if byte.is_ascii_graphic() || byte == b' ' { byte.into() } else { '.' })
            .collect();
        let _ = writeln!(text, "{start:#x}: {:47}  {letters}", hex.join(" "));
    }
    Ok(text)
}

/// How many entries of `size` bytes a table's limit has room for.
fn entries(table: kvm_dtable, size: u64) -> u64 {
    (u64::from(table.limit) + 1) / size
}

/// The GDT's entries that are not empty.
fn gdt(registers: &Registers, ram: &Ram) -> String {
    let (table, layout) = (registers.sregs.gdt, Layout::of(registers));
    let mut text = format!("GDT at {:#x}, limit {:#x}\n", table.base, table.limit);
    if layout == Layout::Real {
        text += "real mode: segments are selectors times 16, the GDT is not looked at\n";
        return text;
    }
    let paging = Paging::of(&registers.sregs);
    let read = |at: u64, bytes: &mut [u8]| paging.read(ram, at, bytes);
    let mut index = 1;
    while index < entries(table, 8) {
        let selector = (index * 8) as u16;
        index += 1;
        let mut raw = [0; 8];
        let there = read(table.base.wrapping_add(selector.into()), &mut raw) == raw.len();
        if there && raw == [0; 8] {
            continue;
        }
        match descriptor::segment(table, selector, layout, read) {
            Ok(segment) => {
                let _ = writeln!(text, "{selector:#06x}: {segment}");
                // A system descriptor of long mode has the place of two.
                index += u64::from(layout == Layout::Long && segment.is_system());
            }
            Err(why) => {
                let _ = writeln!(text, "{selector:#06x}: {why}");
                if why == Unusable::Unmapped {
                    break;
                }
            }
        }
    }
    text
}

/// The IDT's gates, or one of them. Equal ones in a row are told once.
fn idt(registers: &Registers, ram: &Ram, only: Option<u8>) -> String {
    let (table, layout) = (registers.sregs.idt, Layout::of(registers));
    let mut text = format!("IDT at {:#x}, limit {:#x}\n", table.base, table.limit);
    let paging = Paging::of(&registers.sregs);
    let told = |vector: u8| {
        let read = |at: u64, bytes: &mut [u8]| paging.read(ram, at, bytes);
        let gate = match descriptor::gate(table, vector, layout, read) {
            Ok(gate) => gate,
            Err(why) => return why.to_string(),
        };
        match gate.usable() {
            Ok(()) => gate.to_string(),
            Err(Unusable::NotPresent) => "not present".to_owned(),
            Err(why) => why.to_string(),
        }
    };
    if let Some(vector) = only {
        let _ = writeln!(text, "{vector:3}: {}", told(vector));
        return text;
    }
    let count = entries(table, layout.gate_size()).min(256) as u16;
    let mut first = 0;
    while first < count {
        let what = told(first as u8);
        let last = (first + 1..count).take_while(|&vector| told(vector as u8) == what).last();
        let last = last.unwrap_or(first);
        let _ = match last == first {
            true => writeln!(text, "{first:3}: {what}"),
            false => writeln!(text, "{first:3} to {last}: {what}"),
        };
        first = last + 1;
    }
    text
}

fn exits(vcpu: &Vcpu, count: u64) -> String {
    let last = vcpu.last_exits();
    let mut text = format!("{} exits so far", last.count());
    let kept: Vec<_> = last.iter().collect();
    let from = kept.len().saturating_sub(count.min(MOST_LINES) as usize);
    if from < kept.len() {
        text += "; the last ones, the latest at the end:";
    }
    for exit in &kept[from..] {
        let _ = write!(text, "\n{:6}: {exit}", exit.number);
    }
    text
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;

    fn long() -> (Registers, Ram) {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        // Page tables that map the first GiB to itself.
        for (at, entry) in [(0x1000, 0x2003u64), (0x2000, 0x83)] {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let table = |base, limit| kvm_dtable { base, limit, ..Default::default() };
        let mut sregs = kvm_sregs {
            cr0: 1 << 31 | 1,
            cr3: 0x1000,
            cr4: 1 << 5,
            efer: 0x500,
            gdt: table(0x3000, 0x2F),
            idt: table(0x4000, 0x3F),
            ..Default::default()
        };
        sregs.cs.l = 1;
        let regs = kvm_regs { rip: 0x5001, ..Default::default() };
        (Registers { regs, sregs }, ram)
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("16"), Ok(16));
        assert_eq!(number("0xC0000080"), Ok(0xC000_0080));
        for wrong in ["", "x", "0x", "c0", "-1", "0x10000000000000000"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_gdt_is_told_without_its_empty_entries() {
        let (registers, ram) = long();
        let entries =
            [0, 0, 0x00AF_9B00_0000_FFFFu64, 0x0000_8900_1000_0067, 0, 0x00CF_9300_0000_FFFF];
        for (at, entry) in (0x3000..).step_by(8).zip(entries) {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        assert_eq!(
            gdt(&registers, &ram),
            "GDT at 0x3000, limit 0x2f\n\
             0x0010: base 0x0, limit 0xffffffff, code rx, 64-bit, ring 0\n\
             0x0018: base 0x1000, limit 0x67, TSS, ring 0\n\
             0x0028: base 0x0, limit 0xffffffff, data rw, 32-bit, ring 0\n"
        );
        let mut far = registers;
        far.sregs.gdt.base = 1 << 40;
        assert!(gdt(&far, &ram).ends_with("0x0008: no RAM is mapped where it stands\n"));
    }

    #[test]
    fn an_idt_is_told_with_equal_gates_as_one() {
        let (registers, ram) = long();
        ram.write_obj(0x0000_8E00_0010_5678u64, GuestAddress(0x4010)).unwrap();
        assert_eq!(
            idt(&registers, &ram, None),
            "IDT at 0x4000, limit 0x3f\n\
             \x20 0: it is reserved type 0, not an interrupt, trap or task gate\n\
             \x20 1: interrupt gate to 0x10:0x5678, ring 0\n\
             \x20 2 to 3: it is reserved type 0, not an interrupt, trap or task gate\n"
        );
        let one = idt(&registers, &ram, Some(14));
        assert!(
            one.ends_with(" 14: its last byte is at 0xef, the table's limit is 0x3f\n"),
            "{one}"
        );
    }

    #[test]
    fn code_is_read_by_mode_and_marked_where_the_vcpu_stands() {
        let (registers, ram) = long();
        ram.write_slice(&[0x90, 0x48, 0xFF, 0xC0], GuestAddress(0x5000)).unwrap();
        assert_eq!(code(&registers, &ram, 0x5000, 2), "   0x5000: nop\n=> 0x5001: inc rax\n");
        assert_eq!(code(&registers, &ram, 1 << 40, 2), "   0x10000000000: no memory here\n");
    }

    #[test]
    fn physical_memory_is_shown_up_to_where_it_ends() {
        let (_, ram) = long();
        ram.write_slice(b"mini-kvm\x00", GuestAddress(0xF_FFF0)).unwrap();
        assert_eq!(
            physical(&ram, 0xF_FFF0, 32).unwrap(),
            "0xffff0: 6d 69 6e 69 2d 6b 76 6d 00 00 00 00 00 00 00 00  mini-kvm........\n\
             0x100000: no RAM here\n"
        );
        assert!(physical(&ram, u64::MAX, 64).is_ok());
    }
}
