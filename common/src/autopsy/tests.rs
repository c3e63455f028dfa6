//! What needs no KVM: exceptions foretold, and deliveries followed.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const PE: u64 = 1 << 0;
const PG: u64 = 1 << 31;
const PAE: u64 = 1 << 5;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const CODE: u64 = 0x1000;
const IDT: u64 = 0x2000;

fn segment(selector: u16, type_: u8, dpl: u8) -> kvm_segment {
    let (present, s, g, db) = (1, 1, 1, 1);
    kvm_segment { selector, type_, dpl, present, s, g, db, limit: u32::MAX, ..Default::default() }
}

/// Ring 0 in flat 32-bit code without paging: GDT with code (0x8) and data (0x10) at 0x500, an IDT of 32 empty vectors.
fn protected() -> (Ram, Registers) {
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    for (index, entry) in [0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF].iter().enumerate() {
        ram.write_obj::<u64>(*entry, GuestAddress(0x500 + 8 * index as u64)).unwrap();
    }
    let data = segment(0x10, 3, 0);
    let sregs = kvm_sregs {
        cr0: PE,
        cs: segment(8, 0xB, 0),
        ss: data,
        ds: data,
        es: data,
        gdt: kvm_dtable { base: 0x500, limit: 0x17, ..Default::default() },
        idt: kvm_dtable { base: IDT, limit: 0xFF, ..Default::default() },
        ..Default::default()
    };
    let regs = kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Default::default() };
    (ram, Registers { regs, sregs })
}

/// What `code` does, with the registers as `change` leaves them.
fn next(code: &[u8], change: impl FnOnce(&mut Registers)) -> Next {
    let (ram, mut registers) = protected();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    change(&mut registers);
    Scene::new(&ram, &registers).next()
}

/// The exception that it raises.
fn raised(code: &[u8], change: impl FnOnce(&mut Registers)) -> String {
    match next(code, change) {
        Next::Raises(exception) => exception.told(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_allowed_raises_nothing() {
    for code in [&[0x90][..], &[0x89, 0x03], &[0x50], &[0x8E, 0xD8], &[0xF4], &[0xF7, 0xF1]] {
        let allowed = next(code, |r| (r.regs.rax, r.regs.rcx) = (0x10, 1));
        assert_eq!(allowed, Next::Executes, "{code:X?}");
    }
}

/// QEMU, and with it the lab, does not check limits of data segments, nor null selectors in them. Stage 05 has guests that die of
/// it on a KVM which does.
#[test]
fn segments_are_checked() {
    let limit = |r: &mut Registers| {
        (r.sregs.ds.limit, r.regs.rbx) = (0xFFF, 0xFFE);
    };
    // mov [ebx], eax
    assert_eq!(
        raised(&[0x89, 0x03], limit),
        "general protection (#GP): DS:0xffe is beyond DS's limit 0xfff"
    );
    assert_eq!(
        raised(&[0x89, 0x03], |r| r.sregs.ds.unusable = 1),
        "general protection (#GP): DS is used, and holds the null selector"
    );
    assert_eq!(
        raised(&[0x89, 0x03], |r| r.sregs.ds.type_ = 1),
        "general protection (#GP): a write to DS, which is a read-only data segment"
    );
    assert_eq!(
        raised(&[0x50], |r| r.sregs.ss.limit = 0xFFF),
        "stack fault (#SS): SS:0x7ffc is beyond SS's limit 0xfff"
    );
    assert_eq!(
        raised(&[0x50], |r| (r.sregs.ss.type_, r.sregs.ss.limit) = (7, 0x7FFF)),
        "stack fault (#SS): SS:0x7ffc is beyond SS's limit 0x7fff"
    );
    assert_eq!(
        raised(&[0x90], |r| r.sregs.cs.limit = 0xFFF),
        "general protection (#GP): RIP 0x1000 is beyond CS's limit 0xfff"
    );
}

/// QEMU lets a guest turn paging on with EFER.LME set and CR4.PAE clear, and never comes back from it.
#[test]
fn control_registers_are_checked() {
    let cr0 = [0x0F, 0x22, 0xC0];
    let value = |value| move |r: &mut Registers| r.regs.rax = value;
    assert_eq!(
        raised(&cr0, |r| (r.regs.rax, r.sregs.efer) = (PG | PE, LME)),
        "general protection (#GP): CR0 gets PG with EFER.LME set and CR4.PAE clear: long mode \
         needs PAE"
    );
    assert_eq!(
        raised(&cr0, value(PG)),
        "general protection (#GP): CR0 gets PG without PE: paging needs protected mode"
    );
    assert_eq!(next(&cr0, value(PG | PE)), Next::Executes);
    assert_eq!(
        next(&cr0, |r| (r.regs.rax, r.sregs.efer, r.sregs.cr4) = (PG | PE, LME, PAE)),
        Next::Executes
    );
    // mov cr4, eax; mov cr5, eax, which there is not
    assert_eq!(
        raised(&[0x0F, 0x22, 0xE0], |r| r.sregs.efer = LME | LMA),
        "general protection (#GP): CR4 loses PAE in long mode"
    );
    assert!(raised(&[0x0F, 0x22, 0xE8], |_| ()).starts_with("invalid opcode (#UD)"));
}

#[test]
fn rings_are_checked() {
    let ring3 = |r: &mut Registers| {
        (r.sregs.cs, r.sregs.ss) = (segment(0x1B, 0xB, 3), segment(0x23, 3, 3));
    };
    assert_eq!(
        raised(&[0xF4], ring3),
        "general protection (#GP): hlt in ring 3, which only ring 0 may execute"
    );
    assert_eq!(
        raised(&[0xFA], ring3),
        "general protection (#GP): cli in ring 3, with RFLAGS.IOPL 0"
    );
    assert_eq!(
        raised(&[0xE4, 0x60], ring3),
        "general protection (#GP): in al,0x60 in ring 3, with RFLAGS.IOPL 0"
    );
    let io = next(&[0xE4, 0x60], |r| {
        ring3(r);
        r.regs.rflags |= 3 << 12;
    });
    assert_eq!(io, Next::Executes);
}

#[test]
fn divisions_are_computed() {
    // div ecx; idiv cl; div qword is 64-bit code's
    let with = |rdx, rax, rcx| {
        move |r: &mut Registers| {
            (r.regs.rdx, r.regs.rax, r.regs.rcx) = (rdx, rax, rcx);
        }
    };
    let (div, idiv) = ([0xF7, 0xF1], [0xF6, 0xF9]);
    assert!(raised(&div, with(0, 1, 0)).ends_with("divides by zero"));
    assert!(raised(&div, with(1, 0, 1)).ends_with("does not fit"));
    assert_eq!(next(&div, with(1, 0, 2)), Next::Executes);
    assert!(raised(&idiv, with(0, 0x80, 1)).ends_with("does not fit"));
    assert!(raised(&idiv, with(0, 0x8000, 0xFF)).ends_with("does not fit"));
    assert_eq!(next(&idiv, with(0, 0xFF80, 1)), Next::Executes);
}

#[test]
fn what_can_be_no_instruction_is_none() {
    assert_eq!(raised(&[0x0F, 0xFF, 0x90], |_| ()).split(':').next(), Some("invalid opcode (#UD)"));
    assert_eq!(
        raised(&[0x0F, 0x28, 0xC1], |_| ()),
        "invalid opcode (#UD): movaps xmm0,xmm1 with CR4.OSFXSR clear"
    );
    assert_eq!(raised(&[0xD9, 0xE8], |r| r.sregs.cr0 |= 8), "no FPU (#NM): fld1 with CR0.TS set");
    assert_eq!(next(&[], |r| r.regs.rip = 0x20_0000), Next::NoMemory(0x20_0000));
}

/// Fills a gate of the IDT.
fn gate(ram: &Ram, vector: u64, selector: u64, offset: u64, kind: u64) {
    let low = offset & 0xFFFF | selector << 16 | kind << 40 | (offset >> 16) << 48;
    ram.write_obj(low, GuestAddress(IDT + vector * 8)).unwrap();
}

/// Interrupt gates of 32 bits, present, ring 0.
const INTERRUPT: u64 = 0x8E;

/// UD2 and what comes of it, with the gates that `fill` writes.
fn chain(fill: impl FnOnce(&Ram), change: impl FnOnce(&mut Registers)) -> Chain {
    let (ram, mut registers) = protected();
    ram.write_slice(&[0x0F, 0x0B], GuestAddress(CODE)).unwrap();
    fill(&ram);
    change(&mut registers);
    let scene = Scene::new(&ram, &registers);
    let Next::Raises(exception) = scene.next() else { panic!() };
    Chain::of(&scene, exception)
}

#[test]
fn a_handler_is_found_and_its_frame() {
    let chain = chain(|ram| gate(ram, 6, 8, 0x1_2345, INTERRUPT), |_| ());
    assert_eq!(chain.to_string(), "invalid opcode (#UD): ud2 raises it");
    let handler = chain.handler.unwrap();
    // EIP, CS, EFLAGS below 0x8000.
    assert_eq!((handler.linear, handler.flags_at), (0x1_2345, 0x7FFC));
}

#[test]
fn a_double_fault_may_be_handled() {
    let found = chain(
        |ram| {
            gate(ram, 6, 0x10, 0, INTERRUPT);
            gate(ram, 8, 8, 0x9000, INTERRUPT);
        },
        |_| (),
    );
    assert_eq!(
        found.to_string(),
        "invalid opcode (#UD): ud2 raises it; while delivering it, IDT vector 6: its gate leads to \
         selector 0x10, which is a data segment: general protection (#GP); while delivering vector \
         13, IDT vector 13 is not present (IDT limit 0xff): double fault"
    );
    assert_eq!(found.handler.map(|handler| handler.vector), Some(8));
    assert_eq!(found.vectors(), [6, 13, 8]);
}

#[test]
fn gates_and_stacks_that_cannot_be_used_are_named() {
    let why = |fill: fn(&Ram), change: fn(&mut Registers)| {
        let chain = chain(fill, change);
        assert_eq!(chain.handler, None);
        chain.failures[0].exception.why.clone()
    };
    assert_eq!(
        why(|ram| gate(ram, 6, 8, 0, 0x0E), |_| ()),
        "IDT vector 6 is not present (IDT limit 0xff)"
    );
    assert_eq!(
        why(|ram| gate(ram, 6, 8, 0, 0x92), |_| ()),
        "IDT vector 6 is no gate, but a data segment"
    );
    assert_eq!(
        why(|ram| gate(ram, 6, 0x40, 0, INTERRUPT), |_| ()),
        "IDT vector 6: selector 0x40 is beyond the GDT's limit 0x17"
    );
    assert_eq!(
        why(|ram| gate(ram, 6, 8, 0, INTERRUPT), |r| r.sregs.ss.limit = 0xFFF),
        "the frame of vector 6 cannot be pushed: SS:0x7ff4 is beyond SS's limit 0xfff"
    );
    assert_eq!(
        why(
            |ram| gate(ram, 6, 8, 0, INTERRUPT),
            |r| {
                (r.sregs.cs, r.sregs.ss) = (segment(0x1B, 0xB, 3), segment(0x23, 3, 3));
                r.sregs.tr = kvm_segment { limit: 0x67, base: 0x3000, ..segment(0x28, 0xB, 0) };
            }
        ),
        "the TSS at 0x3000 gives ring 0 the stack 0x0:0x0, which has the null selector"
    );
}

#[test]
fn the_table_of_double_faults_is_that_of_the_manuals() {
    let fails = |vector| Exception::of(vector, 0, "");
    let (ram, mut registers) = protected();
    // No vector can be delivered: each is a #GP, which is contributory.
    registers.sregs.idt.limit = 0;
    let scene = Scene::new(&ram, &registers);
    for (vector, count) in [(0, 2), (6, 3), (8, 1), (13, 2), (14, 2), (1, 3), (16, 3)] {
        let chain = Chain::of(&scene, fails(vector));
        assert_eq!(chain.failures.len(), count, "vector {vector}");
        assert_eq!(chain.failures.last().map(|it| it.then), Some(Then::TripleFault));
    }
}

#[test]
fn the_longest_operands_stay_within_the_width() {
    let (ram, mut registers) = protected();
    (registers.sregs.efer, registers.sregs.cs.l, registers.sregs.cs.db) = (LME | LMA, 1, 0);
    // imul esi, [rel 0xFFFFFFFF8000100A], 0x10000000
    let code = [0x69, 0x35, 0, 0, 0, 0x80, 0, 0, 0, 0x10];
    ram.write_slice(&code, GuestAddress(CODE)).unwrap();
    let (cause, registers) = (Cause::TripleFault, Some(registers));
    let report =
        Autopsy { vcpu: 0, cause, registers, ram, replay: None, exits: vec![], finding: None }
            .to_string();
    assert!(report.contains("0xFFFFFFFF8000100A],0x10000000"), "{report}");
    assert!(report.lines().all(|line| line.chars().count() <= 80), "{report}");
}

proptest! {
    /// All of it is the guest's: registers, code, tables.
    #[test]
    fn any_guest_can_be_looked_at(
        bytes in prop::collection::vec(any::<u8>(), 64),
        words in prop::array::uniform32(any::<u64>()),
        selectors in prop::array::uniform8(any::<u16>()),
        types in prop::array::uniform8(any::<u8>()),
    ) {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        ram.write_slice(&bytes, GuestAddress(0x100)).unwrap();
        ram.write_slice(&bytes, GuestAddress(CODE)).unwrap();
        let segment = |at: usize| kvm_segment {
            base: words[at] >> (words[at] % 64),
            limit: words[at + 8] as u32,
            selector: selectors[at],
            type_: types[at] & 15,
            present: types[at] >> 4 & 1,
            dpl: types[at] >> 5 & 3,
            db: types[at] >> 7,
            l: selectors[at] as u8 & 1,
            s: selectors[at] as u8 >> 1 & 1,
            unusable: selectors[at] as u8 >> 2 & 1,
            ..Default::default()
        };
        let table = |at: usize| kvm_dtable { base: words[at] % 0x5000, limit: selectors[at % 8], ..Default::default() };
        let sregs = kvm_sregs {
            cs: segment(0), ss: segment(1), ds: segment(2), es: segment(3), fs: segment(4), gs: segment(5),
            tr: segment(6), ldt: segment(7),
            gdt: table(16), idt: table(17),
            cr0: words[18], cr2: words[19], cr3: words[20] % 0x5000, cr4: words[21], efer: words[22],
            ..Default::default()
        };
        let rip = [CODE, words[23]][words[24] as usize & 1];
        let regs = kvm_regs {
            rip, rax: words[25], rcx: words[26], rdx: words[27], rbx: words[28], rsp: words[29], rsi: words[30], rdi: words[31],
            rflags: words[24], ..Default::default()
        };
        let registers = Registers { regs, sregs };
        let causes = [
            Cause::TripleFault, Cause::Halted, Cause::FailEntry(1), Cause::Unexpected(9),
            Cause::Hang(Hang::Halted), Cause::Hang(Hang::Loop(vec![regs, regs])), Cause::Hang(Hang::Polls(vec![])),
        ];
        for cause in causes {
            let autopsy = Autopsy {
                vcpu: 0, cause, registers: Some(registers), ram: ram.clone(), replay: None, exits: vec![], finding: None,
            };
            let report = autopsy.to_string();
            prop_assert!(report.lines().all(|line| line.chars().count() <= 80), "{}", report);
        }
    }
}
