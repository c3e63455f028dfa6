//! Introduced by stage 03: segment descriptors and gates, the words of a processor's GDT, LDT and IDT.
//!
//! A selector names an entry of the GDT or the LDT, which says what a segment is; a vector names an entry of the
//! IDT, which says where its handler begins. What a bit means depends on the mode (Intel SDM vol. 3, 3.4.5
//! "Segment Descriptors", 3.5 "System Descriptor Types", 6.11 "IDT Descriptors", 6.14.1 "64-Bit Mode IDT"; AMD APM
//! vol. 2, 4.7 and 4.8).

use std::fmt;

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::regs::{Mode, Registers};

/// How the tables of a vCPU look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Real mode: the IDT has 4 bytes a vector, offset and segment, and there is no GDT.
    Real,
    /// Protected mode: 8 bytes an entry.
    Protected,
    /// Long mode, also in 16- and 32-bit code: gates, TSS and LDT descriptors have 16 bytes.
    Long,
}

impl Layout {
    /// As CR0 and EFER say.
    pub fn of(registers: &Registers) -> Self {
        match registers.mode() {
            Mode::Real => Self::Real,
            Mode::Protected => Self::Protected,
            Mode::Compatibility | Mode::Long => Self::Long,
        }
    }

    /// The bytes of an entry of the IDT.
    pub fn gate_size(self) -> u64 {
        match self {
            Self::Real => 4,
            Self::Protected => 8,
            Self::Long => 16,
        }
    }
}

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data, and stacks.
    Data {
        /// It may be written, which a stack must.
        writable: bool,
        /// It is what lies above the limit.
        expands_down: bool,
    },
    /// Code.
    Code {
        /// It may be read as data.
        readable: bool,
        /// Code of outer rings may call it and stays in its ring.
        conforming: bool,
    },
    /// A local descriptor table.
    Ldt,
    /// A task-state segment: of 16 bits, or of 32, which in long mode is one of 64.
    Tss {
        /// Whether it is the old 16-bit one.
        bits16: bool,
        /// Whether TR holds it.
        busy: bool,
    },
    /// A gate: see [`Gate`].
    Gate(GateKind),
    /// A type that this mode doesn't have, by its number.
    Reserved(u8),
}

/// What a gate does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// Calls code of an inner ring.
    Call,
    /// Switches to another task.
    Task,
    /// Handles an interrupt, with IF cleared.
    Interrupt,
    /// Handles one and leaves IF alone.
    Trap,
}

/// A segment, decoded: from a table, or as a segment register holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first linear address.
    pub base: u64,
    /// The last offset that belongs to it, in bytes.
    pub limit: u32,
    /// What it is.
    pub kind: Kind,
    /// The ring that it is for.
    pub dpl: u8,
    /// Whether it may be used at all.
    pub present: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit code, or a stack that ESP points into.
    pub bits32: bool,
    /// G: the limit counts pages.
    pub granular: bool,
}

/// A gate, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// What it does; none of them if the type is one that an IDT of this mode doesn't have.
    pub kind: Kind,
    /// The code segment's selector, or for a task gate the TSS's.
    pub selector: u16,
    /// Where the handler begins in that segment.
    pub offset: u64,
    /// The outermost ring whose `int` may use it.
    pub dpl: u8,
    /// Whether it may be used at all.
    pub present: bool,
    /// In long mode: which of the TSS's stacks it switches to, 1 to 7; 0 for none.
    pub ist: u8,
    /// Whether it is for 16-bit handlers.
    pub bits16: bool,
}

/// What a segment is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Into CS.
    Code,
    /// Into SS.
    Stack,
    /// Into DS, ES, FS or GS.
    Data,
    /// Into TR.
    Task,
    /// Into the LDT register.
    Ldt,
}

/// Why a descriptor cannot be used for what it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It lies beyond the table's limit.
    BeyondLimit {
        /// The offset of its last byte.
        last: u64,
        /// The table's limit.
        limit: u16,
    },
    /// It isn't in memory.
    Unmapped,
    /// Its selector is 0.
    Null,
    /// Its present bit is clear.
    NotPresent,
    /// It is something else.
    Wrong {
        /// What it is.
        found: Kind,
        /// What it would have to be.
        expected: &'static str,
    },
    /// 64- and 32-bit code at once.
    LongAndBits32,
    /// In long mode a gate leads to code that is not of 64 bits.
    NotLong,
}

impl Unusable {
    /// The exception that its use raises (Intel SDM vol. 3, 6.15): of a stack's, #SS has the place of #NP.
    pub fn exception(self, stack: bool) -> &'static str {
        match self {
            Self::NotPresent if stack => "#SS",
            Self::NotPresent => "#NP",
            Self::Unmapped => "#PF",
            _ => "#GP",
        }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BeyondLimit { last, limit } => {
                write!(f, "its last byte is at {last:#x}, the table's limit is {limit:#x}")
            }
            Self::Unmapped => write!(f, "no RAM is mapped where it stands"),
            Self::Null => write!(f, "the selector is null"),
            Self::NotPresent => write!(f, "not present"),
            Self::Wrong { found, expected } => write!(f, "it is {found}, not {expected}"),
            Self::LongAndBits32 => write!(f, "it is 64- and 32-bit code at once (L and D)"),
            Self::NotLong => write!(f, "in long mode a handler's code segment must be 64-bit (L)"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Data { writable: false, expands_down: false } => "data r-",
            Self::Data { writable: true, expands_down: false } => "data rw",
            Self::Data { writable: false, expands_down: true } => "data r- down",
            Self::Data { writable: true, expands_down: true } => "data rw down",
            Self::Code { readable: false, conforming: false } => "code -x",
            Self::Code { readable: true, conforming: false } => "code rx",
            Self::Code { readable: false, conforming: true } => "code -x conforming",
            Self::Code { readable: true, conforming: true } => "code rx conforming",
            Self::Ldt => "LDT",
            Self::Tss { bits16: true, busy: false } => "16-bit TSS",
            Self::Tss { bits16: true, busy: true } => "16-bit TSS busy",
            Self::Tss { bits16: false, busy: false } => "TSS",
            Self::Tss { bits16: false, busy: true } => "TSS busy",
            Self::Gate(GateKind::Call) => "call gate",
            Self::Gate(GateKind::Task) => "task gate",
            Self::Gate(GateKind::Interrupt) => "interrupt gate",
            Self::Gate(GateKind::Trap) => "trap gate",
            Self::Reserved(number) => return write!(f, "reserved type {number}"),
        })
    }
}

impl Kind {
    /// By the S bit and the type's 4 bits.
    fn of(s: bool, type_: u8, layout: Layout) -> Self {
        let bit = |bit: u8| type_ >> bit & 1 == 1;
        if s {
            return match bit(3) {
                true => Self::Code { readable: bit(1), conforming: bit(2) },
                false => Self::Data { writable: bit(1), expands_down: bit(2) },
            };
        }
        match (type_ & 0xF, layout) {
            (2, _) => Self::Ldt,
            (9 | 11, _) => Self::Tss { bits16: false, busy: bit(1) },
            (12, _) => Self::Gate(GateKind::Call),
            (14, _) => Self::Gate(GateKind::Interrupt),
            (15, _) => Self::Gate(GateKind::Trap),
            // Long mode has neither task gates nor anything of 16 bits.
            (number, Layout::Long) => Self::Reserved(number),
            (1 | 3, _) => Self::Tss { bits16: true, busy: bit(1) },
            (4, _) => Self::Gate(GateKind::Call),
            (5, _) => Self::Gate(GateKind::Task),
            (6, _) => Self::Gate(GateKind::Interrupt),
            (7, _) => Self::Gate(GateKind::Trap),
            (number, _) => Self::Reserved(number),
        }
    }
}

impl Segment {
    /// The descriptor in `low`, 8 bytes as a little-endian number; `high` are the 8 that follow, which a system
    /// descriptor of long mode has too.
    pub fn decode(low: u64, high: u64, layout: Layout) -> Self {
        let bits = |from: u32, count: u32| low >> from & ((1 << count) - 1);
        let bit = |at: u32| bits(at, 1) == 1;
        let kind = Kind::of(bit(44), bits(40, 4) as u8, layout);
        let mut base = bits(16, 24) | bits(56, 8) << 24;
        if layout == Layout::Long && !bit(44) {
            base |= (high & 0xFFFF_FFFF) << 32;
        }
        let limit = (bits(0, 16) | bits(48, 4) << 16) as u32;
        Self {
            base,
            limit: if bit(55) { limit << 12 | 0xFFF } else { limit },
            kind,
            dpl: bits(45, 2) as u8,
            present: bit(47),
            long: bit(53),
            bits32: bit(54),
            granular: bit(55),
        }
    }

    /// What a segment register holds.
    pub fn loaded(segment: &kvm_segment) -> Self {
        Self {
            base: segment.base,
            limit: segment.limit,
            // A register that holds a type which long mode hasn't got was loaded before.
            kind: Kind::of(segment.s == 1, segment.type_, Layout::Protected),
            dpl: segment.dpl,
            present: segment.present == 1 && segment.unusable == 0,
            long: segment.l == 1,
            bits32: segment.db == 1,
            granular: segment.g == 1,
        }
    }

    /// Whether it may be loaded for `purpose`, privileges aside.
    pub fn usable(&self, purpose: Use) -> Result<(), Unusable> {
        let (fits, expected) = match (purpose, self.kind) {
            (Use::Code, kind) => (matches!(kind, Kind::Code { .. }), "code"),
            (Use::Stack, kind) => {
                (matches!(kind, Kind::Data { writable: true, .. }), "data that may be written")
            }
            (Use::Data, kind) => (
                matches!(kind, Kind::Data { .. } | Kind::Code { readable: true, .. }),
                "data, or code that may be read",
            ),
            (Use::Task, kind) => (matches!(kind, Kind::Tss { busy: false, .. }), "a TSS not busy"),
            (Use::Ldt, kind) => (kind == Kind::Ldt, "an LDT"),
        };
        match self {
            _ if !fits => Err(Unusable::Wrong { found: self.kind, expected }),
            _ if !self.present => Err(Unusable::NotPresent),
            _ if purpose == Use::Code && self.long && self.bits32 => Err(Unusable::LongAndBits32),
            _ => Ok(()),
        }
    }
}

/// `base 0x0, limit 0xffffffff, code rx, 64-bit, ring 0`.
impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base, limit, kind, .. } = self;
        write!(f, "base {base:#x}, limit {limit:#x}, {kind}{}", self.rights())
    }
}

impl Segment {
    /// Whether it is neither code nor data.
    pub fn is_system(&self) -> bool {
        !matches!(self.kind, Kind::Data { .. } | Kind::Code { .. })
    }

    /// Width, ring and presence: `, 64-bit, ring 0`.
    pub(crate) fn rights(&self) -> String {
        let bits = match (self.kind, self.long, self.bits32) {
            (Kind::Data { .. } | Kind::Code { .. }, false, false) => ", 16-bit",
            (Kind::Data { .. } | Kind::Code { .. }, false, true) => ", 32-bit",
            (Kind::Code { .. }, true, false) => ", 64-bit",
            (Kind::Code { .. }, true, true) => ", 64- and 32-bit at once, which is not allowed",
            // L means nothing for data.
            (Kind::Data { .. }, true, false) => ", 16-bit",
            (Kind::Data { .. }, true, true) => ", 32-bit",
            _ => "",
        };
        let absent = if self.present { "" } else { ", not present" };
        format!("{bits}, ring {}{absent}", self.dpl)
    }
}

impl Gate {
    /// The gate in `low` and `high`, the first 8 bytes and those that follow, as little-endian numbers. Of them,
    /// 4, 8 or 16 bytes belong to it: see [`Layout::gate_size`].
    pub fn decode(low: u64, high: u64, layout: Layout) -> Self {
        let bits = |from: u32, count: u32| low >> from & ((1 << count) - 1);
        if layout == Layout::Real {
            return Self {
                kind: Kind::Gate(GateKind::Interrupt),
                selector: bits(16, 16) as u16,
                offset: bits(0, 16),
                dpl: 3,
                present: true,
                ist: 0,
                bits16: true,
            };
        }
        let type_ = bits(40, 4) as u8;
        let bits16 = type_ & 8 == 0;
        let mut offset = bits(0, 16);
        if !bits16 {
            offset |= bits(48, 16) << 16;
        }
        if layout == Layout::Long {
            offset |= (high & 0xFFFF_FFFF) << 32;
        }
        Self {
            kind: Kind::of(bits(44, 1) == 1, type_, layout),
            selector: bits(16, 16) as u16,
            offset,
            dpl: bits(45, 2) as u8,
            present: bits(47, 1) == 1,
            ist: if layout == Layout::Long { bits(32, 3) as u8 } else { 0 },
            bits16,
        }
    }

    /// Whether an exception may use it, its target aside.
    pub fn usable(&self) -> Result<(), Unusable> {
        match self.kind {
            Kind::Gate(GateKind::Interrupt | GateKind::Trap | GateKind::Task) if self.present => {
                Ok(())
            }
            Kind::Gate(GateKind::Interrupt | GateKind::Trap | GateKind::Task) => {
                Err(Unusable::NotPresent)
            }
            found => Err(Unusable::Wrong { found, expected: "an interrupt, trap or task gate" }),
        }
    }
}

/// `interrupt gate to 0x8:0x1000, ring 0`.
impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, selector, offset, dpl, ist, .. } = self;
        match kind {
            Kind::Gate(GateKind::Task) => write!(f, "{kind} to TSS {selector:#x}")?,
            _ => write!(f, "{kind} to {selector:#x}:{offset:#x}")?,
        }
        write!(f, ", ring {dpl}")?;
        if *ist > 0 {
            write!(f, ", stack IST{ist}")?;
        }
        if !self.present {
            write!(f, ", not present")?;
        }
        Ok(())
    }
}

/// Reads linear memory: how many bytes of the slice from the address on could be filled.
pub trait Read: FnMut(u64, &mut [u8]) -> usize {}
impl<F: FnMut(u64, &mut [u8]) -> usize> Read for F {}

/// The 8 bytes at `offset` of `table` and the `size - 8` that follow as two numbers, if its limit and memory have them.
fn entry(
    table: kvm_dtable,
    offset: u64,
    size: u64,
    mut read: impl Read,
) -> Result<(u64, u64), Unusable> {
    let last = offset + size - 1;
    if last > table.limit.into() {
        return Err(Unusable::BeyondLimit { last, limit: table.limit });
    }
    let mut bytes = [0; 16];
    let size = size as usize;
    if read(table.base.wrapping_add(offset), &mut bytes[..size]) != size {
        return Err(Unusable::Unmapped);
    }
    let [low, high] = [0, 8].map(|at| {
        let half = bytes[at..at + 8].try_into().expect("8 bytes");
        u64::from_le_bytes(half)
    });
    Ok((low, high))
}

/// What `selector` names in `table`: the GDT, or if its bit 2 is set the LDT. `read` reads linear memory.
pub fn segment(
    table: kvm_dtable,
    selector: u16,
    layout: Layout,
    mut read: impl Read,
) -> Result<Segment, Unusable> {
    const IN_LDT: u16 = 4;
    let offset = u64::from(selector & !7);
    if selector & !3 == 0 && selector & IN_LDT == 0 {
        return Err(Unusable::Null);
    }
    let (low, _) = entry(table, offset, 8, &mut read)?;
    let short = Segment::decode(low, 0, layout);
    if layout == Layout::Long && short.is_system() && !matches!(short.kind, Kind::Reserved(_)) {
        let (low, high) = entry(table, offset, 16, read)?;
        return Ok(Segment::decode(low, high, layout));
    }
    Ok(short)
}

/// The gate of `vector` in `idt`. `read` reads linear memory.
pub fn gate(
    idt: kvm_dtable,
    vector: u8,
    layout: Layout,
    read: impl Read,
) -> Result<Gate, Unusable> {
    let size = layout.gate_size();
    let (low, high) = entry(idt, u64::from(vector) * size, size, read)?;
    Ok(Gate::decode(low, high, layout))
}

/// A segment register's contents as its 8 bytes in a table (Intel SDM vol. 3, figure 3-8).
pub fn encode(segment: &kvm_segment) -> u64 {
    let bits = |value: u8, shift: u32| u64::from(value) << shift;
    // With G set the limit counts pages.
    let limit = u64::from(segment.limit >> if segment.g == 1 { 12 } else { 0 });
    limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | bits(segment.type_, 40)
        | bits(segment.s, 44)
        | bits(segment.dpl, 45)
        | bits(segment.present, 47)
        | (limit >> 16 & 0xF) << 48
        | bits(segment.avl, 52)
        | bits(segment.l, 53)
        | bits(segment.db, 54)
        | bits(segment.g, 55)
        | (segment.base >> 24 & 0xFF) << 56
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Memory that has `entries` of 8 bytes at 0x500, and nothing else.
    fn memory(entries: &[u64]) -> impl Read {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        move |at: u64, to: &mut [u8]| {
            let from = at.wrapping_sub(0x500) as usize;
            let Some(there) = bytes.get(from..) else { return 0 };
            let len = to.len().min(there.len());
            to[..len].copy_from_slice(&there[..len]);
            len
        }
    }

    fn table(entries: u16) -> kvm_dtable {
        kvm_dtable { base: 0x500, limit: entries * 8 - 1, ..Default::default() }
    }

    // Linux's boot GDT: GDT_ENTRY_BOOT_CS, _DS and _TSS of arch/x86/boot/compressed/head_64.S, and a 16-bit segment.
    const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
    const CODE32: u64 = 0x00CF_9B00_0000_FFFF;
    const DATA: u64 = 0x00CF_9300_0000_FFFF;
    const TSS: u64 = 0x0080_8900_1000_0067;

    #[test]
    fn segments_read_as_in_a_manual() {
        let text = |low, high, layout| Segment::decode(low, high, layout).to_string();
        assert_eq!(
            text(CODE64, 0, Layout::Long),
            "base 0x0, limit 0xffffffff, code rx, 64-bit, ring 0"
        );
        assert_eq!(
            text(DATA, 0, Layout::Long),
            "base 0x0, limit 0xffffffff, data rw, 32-bit, ring 0"
        );
        assert_eq!(
            text(0x0000_7200_1234_0FFF, 0, Layout::Protected),
            "base 0x1234, limit 0xfff, data rw, 16-bit, ring 3, not present"
        );
        assert_eq!(
            text(TSS, 0xFFFF_FFFF, Layout::Long),
            "base 0xffffffff00001000, limit 0x67fff, TSS, ring 0"
        );
        assert_eq!(
            text(0x00EF_9B00_0000_FFFF, 0, Layout::Long),
            "base 0x0, limit 0xffffffff, code rx, 64- and 32-bit at once, which is not allowed, ring 0"
        );
    }

    #[test]
    fn what_a_register_holds_and_its_bytes_say_the_same() {
        for entry in [CODE64, CODE32, DATA] {
            let segment = Segment::decode(entry, 0, Layout::Protected);
            let register = kvm_segment {
                base: segment.base,
                limit: segment.limit,
                type_: (entry >> 40 & 0xF) as u8,
                present: 1,
                dpl: segment.dpl,
                db: segment.bits32.into(),
                s: 1,
                l: segment.long.into(),
                g: 1,
                ..Default::default()
            };
            assert_eq!(encode(&register), entry);
            assert_eq!(Segment::loaded(&register), segment);
            let unusable = kvm_segment { unusable: 1, ..register };
            assert!(!Segment::loaded(&unusable).present);
        }
    }

    #[test]
    fn a_selector_is_looked_up_within_the_limit() {
        let long = |selector| {
            segment(table(5), selector, Layout::Long, memory(&[0, CODE64, DATA, TSS, 1]))
        };
        assert_eq!(long(0), Err(Unusable::Null));
        assert_eq!(long(3), Err(Unusable::Null));
        assert!(long(8).unwrap().usable(Use::Code).is_ok());
        // The TSS takes two entries.
        let tss = long(0x18).unwrap();
        assert_eq!(tss.base, 0x1_0000_1000);
        assert!(tss.usable(Use::Task).is_ok());
        let beyond = Unusable::BeyondLimit { last: 0x2F, limit: 0x27 };
        assert_eq!(long(0x28), Err(beyond));
        assert_eq!(beyond.exception(false), "#GP");
        let no_memory = segment(table(5), 8, Layout::Long, memory(&[0]));
        assert_eq!(no_memory, Err(Unusable::Unmapped));
        assert_eq!(Unusable::Unmapped.exception(true), "#PF");
        // The LDT's first entry is one that can be used.
        let ldt = segment(table(1), 4, Layout::Protected, memory(&[CODE32]));
        assert_eq!(ldt.unwrap().kind, Kind::Code { readable: true, conforming: false });
    }

    #[test]
    fn what_is_unusable_says_why() {
        let why = |entry, purpose| {
            Segment::decode(entry, 0, Layout::Protected).usable(purpose).unwrap_err().to_string()
        };
        assert_eq!(why(DATA, Use::Code), "it is data rw, not code");
        assert_eq!(why(CODE32, Use::Stack), "it is code rx, not data that may be written");
        assert_eq!(why(DATA & !(1 << 47), Use::Stack), "not present");
        assert_eq!(why(CODE32, Use::Task), "it is code rx, not a TSS not busy");
        assert_eq!(
            why(0x00EF_9B00_0000_FFFF, Use::Code),
            "it is 64- and 32-bit code at once (L and D)"
        );
        assert_eq!(why(0, Use::Data), "it is reserved type 0, not data, or code that may be read");
        assert!(Segment::decode(CODE32, 0, Layout::Protected).usable(Use::Data).is_ok());
        assert_eq!(Unusable::NotPresent.exception(true), "#SS");
        assert_eq!(Unusable::NotPresent.exception(false), "#NP");
    }

    #[test]
    fn gates_read_by_mode() {
        let bytes = [0x1234_8E01_0008_5678, 0xFFFF_FFFF];
        let of = |vector, layout| gate(table(2), vector, layout, memory(&bytes));
        assert_eq!(
            of(0, Layout::Long).unwrap().to_string(),
            "interrupt gate to 0x8:0xffffffff12345678, ring 0, stack IST1"
        );
        assert_eq!(
            of(0, Layout::Protected).unwrap().to_string(),
            "interrupt gate to 0x8:0x12345678, ring 0"
        );
        assert_eq!(
            of(0, Layout::Real).unwrap().to_string(),
            "interrupt gate to 0x8:0x5678, ring 3"
        );
        assert_eq!(of(1, Layout::Long), Err(Unusable::BeyondLimit { last: 31, limit: 15 }));
        let why = of(1, Layout::Protected).unwrap().usable().unwrap_err();
        assert_eq!(why.to_string(), "it is reserved type 0, not an interrupt, trap or task gate");
        let absent = Gate::decode(bytes[0] & !(1 << 47), bytes[1], Layout::Long);
        assert_eq!(absent.usable(), Err(Unusable::NotPresent));
        let task = Gate::decode(0x0000_E500_0028_0000, 0, Layout::Protected);
        assert_eq!(task.to_string(), "task gate to TSS 0x28, ring 3");
        // Long mode has no task gates.
        assert!(Gate::decode(0x0000_E500_0028_0000, 0, Layout::Long).usable().is_err());
    }

    proptest! {
        /// Tables are the guest's.
        #[test]
        fn any_bytes_can_be_decoded(low in any::<u64>(), high in any::<u64>(), vector in any::<u8>(),
                                    selector in any::<u16>(), limit in any::<u16>()) {
            for layout in [Layout::Real, Layout::Protected, Layout::Long] {
                let table = kvm_dtable { base: u64::MAX, limit, ..Default::default() };
                prop_assert!(!Segment::decode(low, high, layout).to_string().is_empty());
                prop_assert!(!Gate::decode(low, high, layout).to_string().is_empty());
                let full = |_: u64, to: &mut [u8]| { to.fill(low as u8); to.len() };
                let _ = segment(table, selector, layout, full);
                let _ = gate(table, vector, layout, full);
            }
        }
    }
}
