//! Introduced by stage 03: the states that a processor refuses to run a guest in.
//!
//! KVM checks most of what `KVM_SET_SREGS` is given itself. What it lets through, hardware checks at each entry (Intel
//! SDM vol. 3, 28.3 "Checking and Loading Guest State"; AMD APM vol. 2, 15.5.1 "Canonicalization and Consistency Checks").

use crate::regs::Registers;

const PE: u64 = 1 << 0;
const PG: u64 = 1 << 31;
const NW: u64 = 1 << 29;
const CD: u64 = 1 << 30;
const PAE: u64 = 1 << 5;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;

/// The first rule that `registers` break, in words.
pub(super) fn inconsistency(registers: &Registers) -> Option<String> {
    let Registers { regs, sregs } = registers;
    let (cr0, cr4, efer) = (sregs.cr0, sregs.cr4, sregs.efer);
    let long = efer & LME != 0 && cr0 & PG != 0;
    let says = |text: &str| Some(text.to_owned());
    if cr0 & (NW | CD) == NW {
        return says("CR0.NW is set and CR0.CD is not");
    }
    if cr0 >> 32 != 0 || cr4 >> 32 != 0 {
        return says("CR0 or CR4 have bits above 31 set");
    }
    if cr0 & PG != 0 && cr0 & PE == 0 {
        return says("CR0.PG is set and CR0.PE is not: paging needs protected mode");
    }
    if long && cr4 & PAE == 0 {
        return says("EFER.LME and CR0.PG are set and CR4.PAE is not: long mode needs PAE");
    }
    if (efer & LMA != 0) != long {
        return says("EFER.LMA is not what EFER.LME and CR0.PG make it");
    }
    if long && sregs.cs.l == 1 && sregs.cs.db == 1 {
        return says(
            "in long mode CS is 64-bit code and 32-bit code at once: both L and D are set",
        );
    }
    if regs.rflags & 2 == 0 {
        return says("bit 1 of RFLAGS is clear, which is always set");
    }
    if cr0 & PE != 0 && sregs.cs.unusable == 0 && (sregs.cs.s == 0 || sregs.cs.type_ & 8 == 0) {
        return says("CS holds no code segment");
    }
    if sregs.tr.present == 0 || ![3, 11].contains(&sregs.tr.type_) {
        return says("TR holds no busy TSS");
    }
    if sregs.cs.l == 1 && long && (regs.rip as i64) << 16 >> 16 != regs.rip as i64 {
        return Some(format!("RIP is {:#x}, no canonical address", regs.rip));
    }
    if cr0 & PE == 0 {
        let segments = registers.segments();
        let odd = segments[..6].iter().find(|(_, it)| it.base >> 20 != 0 && it.limit != 0xFFFF);
        return odd.map(|(name, it)| {
            let name = name.to_uppercase();
            format!("{name} has the limit {:#x} in real mode, not 0xffff", it.limit)
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

    use super::*;

    fn long() -> Registers {
        let code = kvm_segment { s: 1, type_: 0xB, l: 1, present: 1, ..Default::default() };
        let sregs = kvm_sregs {
            cr0: PE | PG,
            cr4: PAE,
            efer: LME | LMA,
            cs: code,
            tr: kvm_segment { type_: 11, present: 1, ..Default::default() },
            ..Default::default()
        };
        Registers { regs: kvm_regs { rflags: 2, ..Default::default() }, sregs }
    }

    #[test]
    fn what_is_consistent_is_left_alone_and_what_is_not_is_named() {
        assert_eq!(inconsistency(&long()), None);
        let told = |break_it: fn(&mut Registers)| {
            let mut registers = long();
            break_it(&mut registers);
            inconsistency(&registers).unwrap()
        };
        assert!(told(|r| r.sregs.cs.db = 1).contains("both L and D"));
        assert!(told(|r| r.sregs.cr4 = 0).contains("long mode needs PAE"));
        assert!(told(|r| r.sregs.cr0 = PG).contains("needs protected mode"));
        assert!(told(|r| r.sregs.efer = LME).contains("EFER.LMA"));
        assert!(told(|r| r.sregs.cr0 |= NW).contains("CR0.NW"));
        assert!(told(|r| r.regs.rflags = 0).contains("bit 1"));
        assert!(told(|r| r.regs.rip = 1 << 60).contains("no canonical address"));
        assert!(told(|r| r.sregs.tr.type_ = 9).contains("TR holds"));
        assert!(told(|r| r.sregs.cs.type_ = 3).contains("no code segment"));
    }
}
