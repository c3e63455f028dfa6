//! Introduced by stage 03: the registers of a vCPU for a person: named, decoded by mode, compared.
//!
//! KVM gives them in two structures: `kvm_regs`, which every instruction works with, and `kvm_sregs`, which
//! decide what an instruction *means*: segments, control registers, EFER. (Intel SDM vol. 3, chapter 2
//! "System Architecture Overview"; AMD APM vol. 2, chapter 3 "System Resources".)

use std::fmt;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::descriptor;
use crate::vcpu::{Error, Vcpu};

/// The names of single bits, lowest first.
pub type BitNames = &'static [(u32, &'static str)];

/// RFLAGS (Intel SDM vol. 1, 3.4.3). Bit 1 is always set and has no name.
pub const RFLAGS: BitNames = &[
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (19, "VIF"),
    (20, "VIP"),
    (21, "ID"),
];

/// CR0 (Intel SDM vol. 3, 2.5).
pub const CR0: BitNames = &[
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];

/// CR4 (Intel SDM vol. 3, 2.5).
pub const CR4: BitNames = &[
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
];

/// The EFER register (Intel SDM vol. 4, MSR C000_0080; AMD APM vol. 2, 3.1.7).
pub const EFER: BitNames = &[
    (0, "SCE"),
    (8, "LME"),
    (10, "LMA"),
    (11, "NXE"),
    (12, "SVME"),
    (13, "LMSLE"),
    (14, "FFXSR"),
    (15, "TCE"),
];

/// A register's bits by their names: `PE ET PG`, or `-` if none of them is set.
#[derive(Clone, Copy, Debug)]
pub struct Bits(pub u64, pub BitNames);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(value, names) = *self;
        let set: Vec<_> =
            names.iter().filter(|(bit, _)| value >> bit & 1 == 1).map(|&(_, name)| name).collect();
        if set.is_empty() { f.pad("-") } else { f.pad(&set.join(" ")) }
    }
}

/// CS's base after reset, which no selector of real mode has.
pub const RESET_BASE: u64 = 0xFFFF_0000;

/// Where the first instruction comes from: 16 bytes below 4 GiB.
pub const RESET_VECTOR: u64 = 0xFFFF_FFF0;

/// How the processor reads its instructions (AMD APM vol. 2, 1.3 "Operating Modes").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CR0.PE is clear: a segment is its selector times 16, there is no protection.
    Real,
    /// CR0.PE is set: a segment is an entry of a table, with base, limit and rights.
    Protected,
    /// EFER.LMA is set and the code segment is a 16- or 32-bit one.
    Compatibility,
    /// EFER.LMA is set and the code segment has its L bit set: 64-bit code.
    Long,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Real => "real mode",
            Self::Protected => "protected mode",
            Self::Compatibility => "long mode (compatibility)",
            Self::Long => "long mode",
        })
    }
}

/// All registers of a vCPU at one moment, outside KVM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Registers {
    /// General registers, RIP, RFLAGS.
    pub regs: kvm_regs,
    /// Segments, descriptor tables, control registers, EFER.
    pub sregs: kvm_sregs,
}

/// One register that differs between two moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name, as in [`Registers::list`].
    pub name: &'static str,
    /// What it held.
    pub before: u64,
    /// What it holds.
    pub after: u64,
    /// Its width in hexadecimal digits.
    pub digits: usize,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, before, after, digits } = *self;
        match name {
            "rflags" => write!(f, "flags {} -> {}", Bits(before, RFLAGS), Bits(after, RFLAGS)),
            _ => write!(f, "{name} {before:0digits$X} -> {after:0digits$X}"),
        }
    }
}

impl Registers {
    /// The vCPU's registers now (`KVM_GET_REGS`, `KVM_GET_SREGS`).
    pub fn of(vcpu: &Vcpu) -> Result<Self, Error> {
        Ok(Self { regs: vcpu.regs()?, sregs: vcpu.sregs()? })
    }

    // ANCHOR: mode
    /// The mode that CR0, EFER and CS make together.
    pub fn mode(&self) -> Mode {
        match (self.sregs.cr0 & 1, self.sregs.efer >> 10 & 1, self.sregs.cs.l) {
            (0, _, _) => Mode::Real,
            (_, 0, _) => Mode::Protected,
            (_, _, 0) => Mode::Compatibility,
            _ => Mode::Long,
        }
    }
    // ANCHOR_END: mode

    /// The six segment registers, then TR and LDTR, by their names.
    pub fn segments(&self) -> [(&'static str, &kvm_segment); 8] {
        let s = &self.sregs;
        [
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("es", &s.es),
            ("fs", &s.fs),
            ("gs", &s.gs),
            ("tr", &s.tr),
            ("ldt", &s.ldt),
        ]
    }

    /// Whether the processor stands at its very first instruction, as after reset (Intel SDM vol. 3, 11.1.4).
    pub fn is_reset(&self) -> bool {
        self.linear_rip() == RESET_VECTOR && self.sregs.cs.base == RESET_BASE
    }

    /// The width of the code that CS selects: 16, 32 or 64 bits.
    pub fn code_bits(&self) -> u32 {
        match (self.mode(), self.sregs.cs.db) {
            (Mode::Long, _) => 64,
            (_, 0) => 16,
            _ => 32,
        }
    }

    /// Where the next instruction stands in the linear address space: CS's base plus RIP.
    pub fn linear_rip(&self) -> u64 {
        match self.mode() {
            Mode::Long => self.regs.rip,
            // Outside 64-bit code linear addresses wrap at 4 GiB.
            _ => self.sregs.cs.base.wrapping_add(self.regs.rip) & 0xFFFF_FFFF,
        }
    }

    /// Where the next instruction stands, as a debugger writes it: `cs:ip`, or RIP alone in 64-bit code.
    pub fn address(&self) -> String {
        let rip = self.regs.rip;
        match self.code_bits() {
            64 => format!("{rip:016X}"),
            32 => format!("{:04X}:{rip:08X}", self.sregs.cs.selector),
            _ => format!("{:04X}:{rip:04X}", self.sregs.cs.selector),
        }
    }

    /// Every register with its name and its width in hexadecimal digits, in the order in which people
    /// look for them. Names and widths are those of 64-bit code if `wide`, else of 32-bit code, where
    /// R8 to R15 do not exist.
    pub fn list(&self, wide: bool) -> Vec<(&'static str, u64, usize)> {
        let Self { regs: r, sregs: s } = self;
        let general = [
            ("rax", "eax", r.rax),
            ("rbx", "ebx", r.rbx),
            ("rcx", "ecx", r.rcx),
            ("rdx", "edx", r.rdx),
            ("rsi", "esi", r.rsi),
            ("rdi", "edi", r.rdi),
            ("rbp", "ebp", r.rbp),
            ("rsp", "esp", r.rsp),
        ];
        let extended = [
            ("r8", r.r8),
            ("r9", r.r9),
            ("r10", r.r10),
            ("r11", r.r11),
            ("r12", r.r12),
            ("r13", r.r13),
            ("r14", r.r14),
            ("r15", r.r15),
        ];
        let mut list = Vec::with_capacity(32);
        if wide {
            list.extend(general.map(|(name, _, value)| (name, value, 16)));
            list.extend(extended.map(|(name, value)| (name, value, 16)));
            list.push(("rip", r.rip, 16));
        } else {
            list.extend(general.map(|(_, name, value)| (name, value, 8)));
            list.push(("eip", r.rip, 8));
        }
        list.push(("rflags", r.rflags, 8));
        list.extend(self.segments().map(|(name, segment)| (name, segment.selector.into(), 4)));
        list.extend([
            ("cs.base", s.cs.base, 8),
            ("gdt.base", s.gdt.base, 8),
            ("gdt.limit", s.gdt.limit.into(), 4),
            ("idt.base", s.idt.base, 8),
            ("idt.limit", s.idt.limit.into(), 4),
            ("cr0", s.cr0, 8),
            ("cr2", s.cr2, 8),
            ("cr3", s.cr3, 8),
            ("cr4", s.cr4, 8),
            ("efer", s.efer, 8),
        ]);
        list
    }

    /// The registers that differ in `after`.
    pub fn changes(&self, after: &Self) -> Vec<Change> {
        let wide = self.is_wide() || after.is_wide();
        self.list(wide)
            .into_iter()
            .zip(after.list(wide))
            .filter(|((_, before, _), (_, after, _))| before != after)
            .map(|((name, before, digits), (_, after, _))| Change { name, before, after, digits })
            .collect()
    }

    /// Both moments side by side, one register a line, changed ones marked with `*`.
    pub fn beside<'a>(&'a self, after: &'a Self) -> impl fmt::Display + 'a {
        Beside { before: self, after }
    }

    fn is_wide(&self) -> bool {
        self.sregs.efer >> 10 & 1 == 1
    }
}

/// What [`Registers::beside`] prints.
struct Beside<'a> {
    before: &'a Registers,
    after: &'a Registers,
}

impl fmt::Display for Beside<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide = self.before.is_wide() || self.after.is_wide();
        let width = if wide { 16 } else { 8 };
        writeln!(f, "{:11} {:>width$}    {:>width$}", "", "before", "after")?;
        for ((name, before, digits), (_, after, _)) in
            self.before.list(wide).into_iter().zip(self.after.list(wide))
        {
            let [before_hex, after_hex] = [before, after].map(|v| format!("{v:0digits$X}"));
            let mark = if before == after { ' ' } else { '*' };
            write!(f, "{name:11} {before_hex:>width$}  {mark} {after_hex:>width$}")?;
            let names = match name {
                "rflags" => RFLAGS,
                "cr0" => CR0,
                "cr4" => CR4,
                "efer" => EFER,
                _ => &[],
            };
            if !names.is_empty() {
                write!(f, "  {}", Bits(after, names))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A segment register, decoded as `mode` reads it.
struct Segment<'a>(&'a kvm_segment, Mode);

impl fmt::Display for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(segment, mode) = *self;
        let kvm_segment { base, limit, selector, .. } = *segment;
        write!(f, "{selector:04X}  base {base:08X}  limit {limit:08X}")?;
        let loaded = descriptor::Segment::loaded(segment);
        match mode {
            Mode::Real => Ok(()),
            _ if !loaded.present => write!(f, "  unusable"),
            _ => write!(f, "  {}{}", loaded.kind, loaded.rights()),
        }
    }
}

/// The registers as a block of lines: for a person who asks "where does the guest stand?".
impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { regs, sregs } = self;
        let mode = self.mode();
        let list = self.list(self.is_wide());
        let general = if self.is_wide() { 16 } else { 8 };
        for row in list[..general].chunks(4) {
            for (at, (name, value, digits)) in row.iter().enumerate() {
                write!(f, "{}{name:>3} {value:0digits$X}", if at == 0 { "" } else { "  " })?;
            }
            writeln!(f)?;
        }
        let (name, value, digits) = list[general];
        writeln!(
            f,
            "{name} {value:0digits$X}  flags {:08X} {}",
            regs.rflags,
            Bits(regs.rflags, RFLAGS)
        )?;
        for (name, segment) in &self.segments()[..6] {
            writeln!(f, " {name} {}", Segment(segment, mode))?;
        }
        let table = |kvm_dtable { base, limit, .. }: &kvm_dtable| {
            format!("base {base:08X}  limit {limit:04X}")
        };
        writeln!(f, "gdt {}", table(&sregs.gdt))?;
        writeln!(f, "idt {}", table(&sregs.idt))?;
        writeln!(f, "cr0 {:08X} {}", sregs.cr0, Bits(sregs.cr0, CR0))?;
        writeln!(f, "cr2 {:08X}  cr3 {:08X}", sregs.cr2, sregs.cr3)?;
        writeln!(f, "cr4 {:08X} {}", sregs.cr4, Bits(sregs.cr4, CR4))?;
        write!(f, "efer {:07X} {}, {mode}", sregs.efer, Bits(sregs.efer, EFER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `KVM_GET_REGS` and `KVM_GET_SREGS` gave in 64-bit, 32-bit and 16-bit code.
    fn registers(pe: u64, efer: u64, l: u8, db: u8) -> Registers {
        let cs = kvm_segment { l, db, selector: 0x8, base: 0x10, ..Default::default() };
        let sregs = kvm_sregs { cr0: pe, efer, cs, ..Default::default() };
        let regs = kvm_regs { rip: 0x1234, rflags: 0x2, ..Default::default() };
        Registers { regs, sregs }
    }

    #[test]
    fn the_mode_follows_from_cr0_efer_and_cs() {
        let real = registers(0, 0, 0, 0);
        let protected = registers(1, 0, 0, 1);
        let compatibility = registers(1, 0x500, 0, 1);
        let long = registers(1, 0x500, 1, 0);
        let of = |r: Registers| (r.mode(), r.code_bits(), r.linear_rip(), r.address());
        assert_eq!(of(real), (Mode::Real, 16, 0x1244, "0008:1234".into()));
        assert_eq!(of(protected), (Mode::Protected, 32, 0x1244, "0008:00001234".into()));
        assert_eq!(of(compatibility), (Mode::Compatibility, 32, 0x1244, "0008:00001234".into()));
        assert_eq!(of(long), (Mode::Long, 64, 0x1234, "0000000000001234".into()));
    }

    #[test]
    fn linear_addresses_of_16_bit_code_wrap_at_4_gib() {
        let mut reset = registers(0, 0, 0, 0);
        reset.sregs.cs.base = RESET_BASE;
        reset.regs.rip = 0xFFF0;
        assert_eq!(reset.linear_rip(), RESET_VECTOR);
        assert!(reset.is_reset());
        reset.regs.rip = 0x1_0000;
        assert_eq!(reset.linear_rip(), 0);
        assert!(!reset.is_reset());
    }

    #[test]
    fn every_register_that_changes_is_found_and_no_other() {
        let before = registers(0, 0, 0, 0);
        let mut after = before;
        assert_eq!(before.changes(&after), []);
        after.regs.rax = 0x37;
        after.regs.rflags = 0x43;
        after.sregs.ds.selector = 0x1000;
        let changes: Vec<_> =
            before.changes(&after).iter().map(|change| change.to_string()).collect();
        assert_eq!(changes, ["eax 00000000 -> 00000037", "flags - -> CF ZF", "ds 0000 -> 1000"]);
        let table = before.beside(&after).to_string();
        let marked: Vec<_> = table
            .lines()
            .filter(|line| line.contains('*'))
            .map(|line| line.split_whitespace().next().unwrap())
            .collect();
        assert_eq!(marked, ["eax", "rflags", "ds"]);
    }

    #[test]
    fn r8_to_r15_are_shown_in_long_mode_only() {
        let long = registers(1, 0x500, 1, 0).to_string();
        assert!(long.contains("rax 0000000000000000") && long.contains("r15"), "{long}");
        let real = registers(0, 0, 0, 0).to_string();
        assert!(real.contains("eax 00000000") && !real.contains("r15"), "{real}");
        assert!(real.ends_with("efer 0000000 -, real mode"), "{real}");
    }

    #[test]
    fn bits_have_names() {
        assert_eq!(Bits(0x6000_0010, CR0).to_string(), "ET NW CD");
        assert_eq!(Bits(0x2, RFLAGS).to_string(), "-");
        assert_eq!(format!("{:>5}|", Bits(0x500, EFER)), "LME LMA|");
    }
}
