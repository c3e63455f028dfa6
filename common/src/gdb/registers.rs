//! A vCPU's registers as gdb knows them: their names and sizes (the *target description*), and their bytes.
//!
//! gdb asks for a description when it attaches and takes it for the architecture of all that follows: 16-, 32- or 64-bit
//! registers and instructions. A vCPU changes its mode, and gdb doesn't notice. So the description is that of the mode in
//! which the vCPU stands when gdb asks, and `unset tdesc filename` has gdb ask again. (GDB manual, appendix G "Target
//! Descriptions", G.5.17 "i386 Features".)

use std::fmt::Write;

use gdbstub::arch::{Arch, Registers as GdbRegisters};
use gdbstub_arch::x86::reg::{
    F80, X86_64CoreRegs, X86CoreRegs, X86SegmentRegs, X87FpuInternalRegs,
};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::regs::{self, BitNames, Registers};

/// What gdb takes the vCPU for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Set {
    /// 32-bit registers, 16-bit instructions.
    Bits16,
    /// 32-bit registers and instructions.
    Bits32,
    /// 64-bit registers and instructions.
    #[default]
    Bits64,
}

impl Set {
    /// That of a vCPU's code.
    pub(super) fn of(registers: &Registers) -> Self {
        match registers.code_bits() {
            16 => Self::Bits16,
            32 => Self::Bits32,
            _ => Self::Bits64,
        }
    }

    /// How wide instructions are: 16, 32 or 64.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// The description that gdb asks for.
    pub(super) fn xml(self) -> String {
        let wide = self == Self::Bits64;
        let architecture = match self {
            Self::Bits16 => "i8086",
            Self::Bits32 => "i386",
            Self::Bits64 => "i386:x86-64",
        };
        let mut xml = format!(
            "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
             <target version=\"1.0\"><architecture>{architecture}</architecture>\
             <osabi>none</osabi>\
             <feature name=\"org.gnu.gdb.i386.core\">"
        );
        flags(&mut xml, "i386_eflags", 4, regs::RFLAGS);
        let general: &[&str] = match wide {
            true => &[
                "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
                "r12", "r13", "r14", "r15", "rip",
            ],
            false => &["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip"],
        };
        let bits = if wide { 64 } else { 32 };
        for name in general {
            let kind = match name[1..].as_ref() {
                "ip" => "code_ptr",
                "sp" | "bp" => "data_ptr",
                _ if wide => "int64",
                _ => "int32",
            };
            register(&mut xml, name, bits, kind);
        }
        register(&mut xml, "eflags", 32, "i386_eflags");
        for name in ["cs", "ss", "ds", "es", "fs", "gs"] {
            register(&mut xml, name, 32, "int32");
        }
        for number in 0..8 {
            register(&mut xml, &format!("st{number}"), 80, "i387_ext");
        }
        for name in ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"] {
            let _ =
                write!(xml, "<reg name=\"{name}\" bitsize=\"32\" type=\"int\" group=\"float\"/>");
        }
        xml.push_str("</feature><feature name=\"org.gnu.gdb.i386.sse\">");
        for (id, kind, count) in [
            ("v4f", "ieee_single", 4),
            ("v2d", "ieee_double", 2),
            ("v16i8", "int8", 16),
            ("v8i16", "int16", 8),
            ("v4i32", "int32", 4),
            ("v2i64", "int64", 2),
        ] {
            let _ = write!(xml, "<vector id=\"{id}\" type=\"{kind}\" count=\"{count}\"/>");
        }
        xml.push_str(
            "<union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
             <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/>\
             <field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>\
             <field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>",
        );
        for number in 0..if wide { 16 } else { 8 } {
            register(&mut xml, &format!("xmm{number}"), 128, "vec128");
        }
        let _ = write!(
            xml,
            "<reg name=\"mxcsr\" bitsize=\"32\" type=\"int\" group=\"vector\"/></feature>"
        );
        // A feature that gdb doesn't know: it shows such registers by their types.
        xml.push_str("<feature name=\"mini-kvm.system\">");
        for (name, names) in SYSTEM {
            match names {
                [] => register(&mut xml, name, 64, "int64"),
                names => {
                    let id = format!("{name}_bits");
                    flags(&mut xml, &id, 8, names);
                    register(&mut xml, name, 64, &id);
                }
            }
        }
        xml.push_str("</feature></target>");
        xml
    }
}

/// What gdb has no names for and a person who debugs a kernel wants, in all modes: name and, if they have names, bits.
const SYSTEM: [(&str, BitNames); 7] = [
    ("fs_base", &[]),
    ("gs_base", &[]),
    ("cr0", regs::CR0),
    ("cr2", &[]),
    ("cr3", &[]),
    ("cr4", regs::CR4),
    ("efer", regs::EFER),
];

fn register(xml: &mut String, name: &str, bits: u32, kind: &str) {
    let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
}

fn flags(xml: &mut String, id: &str, size: u32, names: BitNames) {
    let _ = write!(xml, "<flags id=\"{id}\" size=\"{size}\">");
    for (bit, name) in names {
        let _ = write!(xml, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
    }
    xml.push_str("</flags>");
}

/// The architecture, as gdbstub wants it.
#[derive(Debug)]
pub(super) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Bytes;
    type BreakpointKind = usize;
    type RegId = ();
}

/// A register file as it travels: gdbstub_arch's of the set that gdb was given, and behind it [`SYSTEM`]'s.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bytes {
    core: Core,
    system: [u64; SYSTEM.len()],
}

#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time, for one packet")]
enum Core {
    Narrow(X86CoreRegs),
    Wide(X86_64CoreRegs),
}

impl Default for Bytes {
    fn default() -> Self {
        Self { core: Core::Wide(X86_64CoreRegs::default()), system: [0; SYSTEM.len()] }
    }
}

impl GdbRegisters for Bytes {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        match &self.core {
            Core::Narrow(core) => core.eip.into(),
            Core::Wide(core) => core.rip,
        }
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        match &self.core {
            Core::Narrow(core) => core.gdb_serialize(&mut write_byte),
            Core::Wide(core) => core.gdb_serialize(&mut write_byte),
        }
        self.system.iter().flat_map(|value| value.to_le_bytes()).for_each(|b| write_byte(Some(b)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let end = bytes.len().checked_sub(SYSTEM.len() * 8).ok_or(())?;
        let (core, system) = bytes.split_at(end);
        // The shorter set is the one of 32-bit registers: gdb sends back as much as it got.
        let mut wide = X86_64CoreRegs::default();
        self.core = match wide.gdb_deserialize(core) {
            Ok(()) => Core::Wide(wide),
            Err(()) => {
                let mut narrow = X86CoreRegs::default();
                narrow.gdb_deserialize(core)?;
                Core::Narrow(narrow)
            }
        };
        let (words, _) = system.as_chunks();
        for (register, bytes) in self.system.iter_mut().zip(words) {
            *register = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

/// All of a vCPU that is in gdb's registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct State {
    pub(super) registers: Registers,
    pub(super) fpu: kvm_fpu,
}

/// A register that gdb wants to have changed, and that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused(pub(super) &'static str);

impl State {
    /// The vCPU as gdb sees it. RIP is the linear address of the next instruction, CS's base included: gdb knows no
    /// segments, and looks there for the instruction and for its breakpoints.
    pub(super) fn to_gdb(self, set: Set) -> Bytes {
        let Registers { regs, sregs } = self.registers;
        let segments = X86SegmentRegs {
            cs: sregs.cs.selector.into(),
            ss: sregs.ss.selector.into(),
            ds: sregs.ds.selector.into(),
            es: sregs.es.selector.into(),
            fs: sregs.fs.selector.into(),
            gs: sregs.gs.selector.into(),
        };
        let (st, fpu, xmm) = fpu_to_gdb(&self.fpu);
        let (pc, eflags, mxcsr) = (self.registers.linear_rip(), regs.rflags as u32, self.fpu.mxcsr);
        let core = match set {
            Set::Bits64 => Core::Wide(X86_64CoreRegs {
                regs: general(&regs).map(|register| *register),
                rip: pc,
                eflags,
                segments,
                st,
                fpu,
                xmm,
                mxcsr,
            }),
            _ => Core::Narrow(X86CoreRegs {
                eax: regs.rax as u32,
                ecx: regs.rcx as u32,
                edx: regs.rdx as u32,
                ebx: regs.rbx as u32,
                esp: regs.rsp as u32,
                ebp: regs.rbp as u32,
                esi: regs.rsi as u32,
                edi: regs.rdi as u32,
                eip: pc as u32,
                eflags,
                segments,
                st,
                fpu,
                xmm: xmm[..8].try_into().expect("eight of sixteen"),
                mxcsr,
            }),
        };
        let kvm_sregs { fs, gs, cr0, cr2, cr3, cr4, efer, .. } = sregs;
        Bytes { core, system: [fs.base, gs.base, cr0, cr2, cr3, cr4, efer] }
    }

    /// The vCPU with what gdb has changed since it was given `self`. What a set of 32-bit registers doesn't have stays as
    /// it is.
    pub(super) fn with(self, bytes: &Bytes) -> Result<Self, Refused> {
        let set = match &bytes.core {
            Core::Narrow(_) => Set::Bits32,
            Core::Wide(_) => Set::Bits64,
        };
        let given = self.to_gdb(set);
        let mut state = self;
        let (pc, eflags, segments, st, fpu, xmm, mxcsr) = match &bytes.core {
            Core::Wide(core) => {
                for (register, value) in general_mut(&mut state.registers.regs).zip(core.regs) {
                    *register = value;
                }
                let X86_64CoreRegs { rip, eflags, segments, st, fpu, xmm, mxcsr, .. } = core;
                (*rip, *eflags, segments, st, fpu, &xmm[..], *mxcsr)
            }
            Core::Narrow(core) => {
                let regs = &mut state.registers.regs;
                for (register, value) in [
                    (&mut regs.rax, core.eax),
                    (&mut regs.rcx, core.ecx),
                    (&mut regs.rdx, core.edx),
                    (&mut regs.rbx, core.ebx),
                    (&mut regs.rsp, core.esp),
                    (&mut regs.rbp, core.ebp),
                    (&mut regs.rsi, core.esi),
                    (&mut regs.rdi, core.edi),
                ] {
                    *register = *register & !0xFFFF_FFFF | u64::from(value);
                }
                let X86CoreRegs { eip, eflags, segments, st, fpu, xmm, mxcsr, .. } = core;
                ((*eip).into(), *eflags, segments, st, fpu, &xmm[..], *mxcsr)
            }
        };
        state.registers.regs.rflags = eflags.into();
        if pc != given.pc() {
            // Outside 64-bit code it counts from CS's base.
            state.registers.regs.rip = match self.registers.code_bits() {
                64 => pc,
                _ => pc.wrapping_sub(self.registers.sregs.cs.base) & 0xFFFF_FFFF,
            };
        }
        let sregs = &mut state.registers.sregs;
        let real = sregs.cr0 & 1 == 0;
        for (segment, selector) in [
            (&mut sregs.cs, segments.cs),
            (&mut sregs.ss, segments.ss),
            (&mut sregs.ds, segments.ds),
            (&mut sregs.es, segments.es),
            (&mut sregs.fs, segments.fs),
            (&mut sregs.gs, segments.gs),
        ] {
            select(segment, selector, real)?;
        }
        [sregs.fs.base, sregs.gs.base] = match [bytes.system[0], bytes.system[1]] {
            bases if bases == given.system[..2] => [sregs.fs.base, sregs.gs.base],
            bases => bases,
        };
        [sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer] =
            bytes.system[2..].try_into().expect("five of seven");
        fpu_from_gdb(&mut state.fpu, st, fpu, xmm);
        state.fpu.mxcsr = mxcsr;
        Ok(state)
    }
}

/// RAX to R15 in gdb's order.
fn general(regs: &kvm_regs) -> [&u64; 16] {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, .. } = regs;
    let kvm_regs { r8, r9, r10, r11, r12, r13, r14, r15, .. } = regs;
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15]
}

fn general_mut(regs: &mut kvm_regs) -> impl Iterator<Item = &mut u64> {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        ..
    } = regs;
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15].into_iter()
}

/// Puts a selector into a segment register. In real mode that is the base, too; in other modes it would take a
/// descriptor with all its checks.
fn select(segment: &mut kvm_segment, selector: u32, real: bool) -> Result<(), Refused> {
    if u32::from(segment.selector) == selector {
        return Ok(());
    }
    let selector = u16::try_from(selector).map_err(|_| Refused("a selector has 16 bits"))?;
    if !real {
        return Err(Refused("a selector can be changed in real mode only"));
    }
    (segment.selector, segment.base) = (selector, u64::from(selector) << 4);
    Ok(())
}

/// The tag word's two bits of a register that holds nothing.
const EMPTY: u32 = 0b11;

fn fpu_to_gdb(fpu: &kvm_fpu) -> ([F80; 8], X87FpuInternalRegs, [u128; 16]) {
    let st = fpu.fpr.map(|register| register[..10].try_into().expect("10 of 16 bytes"));
    // KVM has one bit a register, as FXSAVE: whether it holds something.
    let tag =
        |register: u32| if fpu.ftwx >> register & 1 == 1 { 0 } else { EMPTY << (2 * register) };
    let internal = X87FpuInternalRegs {
        fctrl: fpu.fcw.into(),
        fstat: fpu.fsw.into(),
        ftag: (0..8).map(tag).sum(),
        fioff: fpu.last_ip as u32,
        fiseg: (fpu.last_ip >> 32) as u32,
        fooff: fpu.last_dp as u32,
        foseg: (fpu.last_dp >> 32) as u32,
        fop: fpu.last_opcode.into(),
    };
    (st, internal, fpu.xmm.map(u128::from_le_bytes))
}

fn fpu_from_gdb(fpu: &mut kvm_fpu, st: &[F80; 8], internal: &X87FpuInternalRegs, xmm: &[u128]) {
    for (register, value) in fpu.fpr.iter_mut().zip(st) {
        register[..10].copy_from_slice(value);
    }
    fpu.fcw = internal.fctrl as u16;
    fpu.fsw = internal.fstat as u16;
    fpu.ftwx = (0..8)
        .filter(|register| internal.ftag >> (2 * register) & EMPTY != EMPTY)
        .map(|register| 1 << register)
        .sum();
    fpu.last_ip = u64::from(internal.fiseg) << 32 | u64::from(internal.fioff);
    fpu.last_dp = u64::from(internal.foseg) << 32 | u64::from(internal.fooff);
    fpu.last_opcode = internal.fop as u16;
    for (register, value) in fpu.xmm.iter_mut().zip(xmm) {
        *register = value.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(code_bits: u32) -> State {
        let cs = kvm_segment { selector: 0xF000, base: 0xF_0000, ..Default::default() };
        let mut sregs = kvm_sregs { cs, ..Default::default() };
        if code_bits > 16 {
            sregs.cr0 = 1;
            sregs.cs.base = 0x1000;
            sregs.cs.db = 1;
        }
        if code_bits == 64 {
            (sregs.efer, sregs.cs.db, sregs.cs.l) = (0x500, 0, 1);
        }
        let regs = kvm_regs {
            rax: 0x1111_2222_3333_4444,
            rsp: 0x7000,
            r15: 15,
            rip: 0xFFF0,
            rflags: 0x246,
            ..Default::default()
        };
        let mut fpu =
            kvm_fpu { fcw: 0x37F, ftwx: 0b1000_0001, mxcsr: 0x1F80, ..Default::default() };
        fpu.fpr[7][9] = 0x40;
        fpu.xmm[3] = [3; 16];
        State { registers: Registers { regs, sregs }, fpu }
    }

    /// Through the bytes of the protocol and back.
    fn round(state: State, set: Set) -> Bytes {
        let mut bytes = Vec::new();
        state.to_gdb(set).gdb_serialize(|byte| bytes.extend(byte));
        let mut back = Bytes::default();
        back.gdb_deserialize(&bytes).unwrap();
        back
    }

    #[test]
    fn what_gdb_gives_back_unchanged_changes_nothing() {
        for (bits, set) in [(16, Set::Bits16), (32, Set::Bits32), (64, Set::Bits64)] {
            let state = state(bits);
            assert_eq!(Set::of(&state.registers), set);
            for set in [Set::Bits16, Set::Bits32, Set::Bits64] {
                assert_eq!(state.with(&round(state, set)), Ok(state), "{bits} {set:?}");
            }
        }
    }

    #[test]
    fn the_program_counter_is_a_linear_address() {
        let real = state(16);
        let mut bytes = round(real, Set::Bits16);
        assert_eq!(bytes.pc(), 0xF_FFF0);
        let Core::Narrow(core) = &mut bytes.core else { panic!("32-bit registers") };
        core.eip = 0xF_1234;
        assert_eq!(real.with(&bytes).unwrap().registers.regs.rip, 0x1234);
        assert_eq!(round(state(64), Set::Bits64).pc(), 0xFFF0);
    }

    #[test]
    fn changes_reach_the_registers_and_leave_what_is_above_them() {
        let long = state(64);
        let mut bytes = round(long, Set::Bits32);
        let Core::Narrow(core) = &mut bytes.core else { panic!("32-bit registers") };
        core.eax = 5;
        bytes.system[3] = 0xFFF;
        let changed = long.with(&bytes).unwrap().registers;
        assert_eq!(changed.regs.rax, 0x1111_2222_0000_0005);
        assert_eq!((changed.sregs.cr2, changed.sregs.cr3), (0xFFF, 0));
    }

    #[test]
    fn selectors_can_be_changed_in_real_mode() {
        let change = |state: State| {
            let mut bytes = round(state, Set::Bits16);
            let Core::Narrow(core) = &mut bytes.core else { panic!("32-bit registers") };
            core.segments.ds = 0xB800;
            state.with(&bytes)
        };
        assert_eq!(change(state(16)).unwrap().registers.sregs.ds.base, 0xB_8000);
        assert!(change(state(32)).is_err());
    }

    #[test]
    fn registers_of_a_wrong_size_are_refused() {
        for len in [0, 55, 56, 100] {
            assert_eq!(Bytes::default().gdb_deserialize(&vec![0; len]), Err(()), "{len}");
        }
    }

    #[test]
    fn the_description_has_as_many_bits_as_the_registers_have() {
        for set in [Set::Bits16, Set::Bits32, Set::Bits64] {
            let xml = set.xml();
            let bits: usize = xml
                .split("bitsize=\"")
                .skip(1)
                .map(|rest| rest.split('"').next().unwrap().parse::<usize>().unwrap())
                .sum();
            let mut count = 0;
            state(set.bits()).to_gdb(set).gdb_serialize(|_| count += 8);
            assert_eq!(bits, count, "{set:?}");
        }
        assert!(Set::Bits16.xml().contains("<architecture>i8086</architecture>"));
    }
}
