//! Introduced by stage 03: which exception a vCPU's next instruction raises, told without executing it.
//!
//! A processor checks an instruction in an order: can it be fetched, is it one, may this ring execute it, are its
//! operands in reach. The checks here are those of the Intel SDM (vol. 3, chapters 3, 5 and 6; vol. 2, "Protected Mode
//! Exceptions" of each instruction) and the AMD APM (vol. 2, chapters 4, 5 and 8), for the instructions with which
//! operating systems begin. What they don't know they call no exception.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, EncodingKind, Instruction,
    InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use kvm_bindings::{kvm_dtable, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use crate::descriptor::{self, GateKind, Kind, Layout, Segment, Unusable};
use crate::disasm::{self, MAX_LEN};
use crate::layout::PAGE_SIZE;
use crate::memory::Ram;
use crate::page_walk::{Access, Paging, Why};
use crate::regs::{Mode, Registers};

// RFLAGS, CR0, CR4, EFER (Intel SDM vol. 1, 3.4.3; vol. 3, 2.5 and 2.2.1).
const IOPL: u64 = 3 << 12;
const OF: u64 = 1 << 11;
const NT: u64 = 1 << 14;
const CR0_PE: u64 = 1 << 0;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER: u64 = 0xC000_0080;
const EFER_SCE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Exceptions by their vectors (Intel SDM vol. 3, table 7-1).
pub(super) mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
}

/// A vector's name.
pub fn name(vector: u8) -> String {
    let known = match vector {
        vector::DE => "divide error (#DE)",
        vector::DB => "debug exception (#DB)",
        2 => "non-maskable interrupt",
        vector::BP => "breakpoint (#BP)",
        vector::OF => "overflow (#OF)",
        5 => "bound range (#BR)",
        vector::UD => "invalid opcode (#UD)",
        vector::NM => "no FPU (#NM)",
        vector::DF => "double fault (#DF)",
        vector::TS => "invalid TSS (#TS)",
        vector::NP => "segment not present (#NP)",
        vector::SS => "stack fault (#SS)",
        vector::GP => "general protection (#GP)",
        vector::PF => "page fault (#PF)",
        16 => "x87 error (#MF)",
        17 => "alignment check (#AC)",
        18 => "machine check (#MC)",
        19 => "SIMD error (#XM)",
        _ => return format!("interrupt {vector:#x}"),
    };
    known.into()
}

/// An exception, and why it is raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// The error code that is pushed, for those that have one.
    pub code: Option<u32>,
    /// The address that a page fault leaves in CR2.
    pub cr2: Option<u64>,
    /// Raised by INT, INT3 or INTO, which have to be allowed to use the vector.
    pub software: bool,
    /// What is wrong, in words.
    pub why: String,
}

impl Exception {
    fn new(vector: u8, code: Option<u32>, why: impl Into<String>) -> Self {
        Self { vector, code, cr2: None, software: false, why: why.into() }
    }

    /// #GP with error code 0.
    pub(super) fn gp(why: impl Into<String>) -> Self {
        Self::new(vector::GP, Some(0), why)
    }

    /// An exception whose error code names a selector or a vector.
    pub(super) fn of(vector: u8, code: u32, why: impl Into<String>) -> Self {
        Self::new(vector, Some(code), why)
    }

    fn ud(why: impl Into<String>) -> Self {
        Self::new(vector::UD, None, why)
    }

    /// Name and reason.
    pub fn told(&self) -> String {
        match self.vector {
            vector::PF => self.why.clone(),
            vector => format!("{}: {}", name(vector), self.why),
        }
    }
}

/// What a vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// An exception.
    Raises(Exception),
    /// Nothing that is known to fail.
    Executes,
    /// It fetches an instruction from this guest-physical address, where no RAM is: KVM gives up.
    NoMemory(u64),
}

/// Why an instruction's bytes end.
enum End {
    Exception(Exception),
    NoMemory(u64),
}

/// How a code segment is entered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    Jump,
    Return,
}

/// A vCPU between two instructions, and the memory that it sees.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The machine's memory.
    pub ram: &'a Ram,
    /// The vCPU's registers.
    pub registers: &'a Registers,
    /// How it translates addresses.
    pub paging: Paging,
}

impl<'a> Scene<'a> {
    /// A vCPU with `registers` in `ram`.
    pub fn new(ram: &'a Ram, registers: &'a Registers) -> Self {
        Self { ram, registers, paging: Paging::of(&registers.sregs) }
    }

    /// Whether there are rings and segments with limits: all but real mode.
    pub(super) fn protected(&self) -> bool {
        self.registers.mode() != Mode::Real
    }

    /// Whether EFER.LMA is set: descriptor tables are those of long mode.
    pub(super) fn long(&self) -> bool {
        matches!(self.registers.mode(), Mode::Long | Mode::Compatibility)
    }

    /// The current privilege level; KVM has it in SS.
    pub(super) fn cpl(&self) -> u8 {
        if self.protected() { self.registers.sregs.ss.dpl } else { 0 }
    }

    /// `len` bytes from the linear address `linear` on, if all of them can be used for `access`.
    pub(super) fn page(&self, linear: u64, len: u64, access: Access) -> Result<(), Exception> {
        let len = len.max(1);
        let in_first = (PAGE_SIZE - linear % PAGE_SIZE).min(len);
        let others = (in_first..len).step_by(PAGE_SIZE as usize);
        for at in std::iter::once(0).chain(others).map(|part| linear.wrapping_add(part)) {
            let Err(fault) = self.paging.walk(self.ram, at).allows(access) else { continue };
            let verb = match access {
                Access { execute: true, .. } => "fetching code",
                Access { write: true, .. } => "writing",
                _ => "reading",
            };
            let Some(code) = fault.error_code(access) else {
                debug_assert_eq!(fault.why, Why::NonCanonical);
                return Err(Exception::gp(format!("{at:#x} is no canonical address")));
            };
            let why = format!("page fault at {at:#x}, {verb}: {fault}");
            return Err(Exception { cr2: Some(at), ..Exception::of(vector::PF, code, why) });
        }
        Ok(())
    }

    /// What an access of the instruction stream's ring is.
    fn mine(&self, write: bool) -> Access {
        let ac = self.registers.regs.rflags >> 18 & 1 == 1;
        Access { write, user: self.cpl() == 3, ac, ..Access::default() }
    }

    /// Up to 8 bytes at a linear address, whoever may read them.
    pub(super) fn read(&self, linear: u64, len: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        (self.paging.read(self.ram, linear, &mut bytes[..len]) == len)
            .then(|| u64::from_le_bytes(bytes))
    }

    fn segment_of(&self, register: Register) -> &kvm_segment {
        let sregs = &self.registers.sregs;
        match register {
            Register::ES => &sregs.es,
            Register::CS => &sregs.cs,
            Register::SS => &sregs.ss,
            Register::FS => &sregs.fs,
            Register::GS => &sregs.gs,
            _ => &sregs.ds,
        }
    }

    /// The linear address of `len` bytes at an offset in a segment, if the segment allows the access.
    pub(super) fn linear(
        &self,
        register: Register,
        offset: u64,
        len: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        let segment = self.segment_of(register);
        let name = format!("{register:?}");
        if self.registers.mode() == Mode::Long {
            let base = match register {
                Register::FS | Register::GS => segment.base,
                _ => 0,
            };
            return Ok(base.wrapping_add(offset));
        }
        let vector = if register == Register::SS { vector::SS } else { vector::GP };
        let fault = |why| Err(Exception::of(vector, 0, why));
        if self.protected() && segment.unusable != 0 {
            return fault(format!("{name} is used, and holds the null selector"));
        }
        let code = segment.type_ & 8 != 0;
        if self.protected() && write && (code || segment.type_ & 2 == 0) {
            let what = if code { "a code segment" } else { "a read-only data segment" };
            return fault(format!("a write to {name}, which is {what}"));
        }
        if self.protected() && !write && code && segment.type_ & 2 == 0 {
            return fault(format!("a read from {name}, a code segment that can't be read"));
        }
        let (limit, last) = (u64::from(segment.limit), offset.saturating_add(len.max(1) - 1));
        let expands_down = self.protected() && segment.type_ & 0xC == 4;
        let top = if segment.db == 1 { 0xFFFF_FFFF } else { 0xFFFF };
        let outside = if expands_down { offset <= limit || last > top } else { last > limit };
        if outside {
            return fault(format!("{name}:{offset:#x} is beyond {name}'s limit {limit:#x}"));
        }
        Ok(segment.base.wrapping_add(offset) & 0xFFFF_FFFF)
    }

    /// The same, with the pages.
    fn reach(
        &self,
        register: Register,
        offset: u64,
        len: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        let linear = self.linear(register, offset, len, write)?;
        self.page(linear, len, self.mine(write)).map_err(|exception| {
            let stack = register == Register::SS && exception.vector == vector::GP;
            Exception { vector: if stack { vector::SS } else { exception.vector }, ..exception }
        })?;
        Ok(linear)
    }

    /// The bytes from RIP on that can be fetched, at most [`MAX_LEN`], and why there are no more.
    fn fetch(&self) -> (Vec<u8>, Option<End>) {
        let mut code = Vec::with_capacity(MAX_LEN);
        let Registers { regs, sregs } = self.registers;
        while code.len() < MAX_LEN {
            let rip = regs.rip.wrapping_add(code.len() as u64);
            let limit = u64::from(sregs.cs.limit);
            if self.registers.mode() != Mode::Long && rip > limit {
                let why = format!("RIP {rip:#x} is beyond CS's limit {limit:#x}");
                return (code, Some(End::Exception(Exception::gp(why))));
            }
            let linear = self.registers.linear_rip().wrapping_add(code.len() as u64);
            let access = Access { execute: true, ..self.mine(false) };
            if let Err(exception) = self.page(linear, 1, access) {
                return (code, Some(End::Exception(exception)));
            }
            let mut byte = [0];
            if self.paging.read(self.ram, linear, &mut byte) == 0 {
                let page = self.paging.walk(self.ram, linear).page;
                let physical = page.map_or(linear, |page| page.physical.0);
                return (code, Some(End::NoMemory(physical)));
            }
            code.push(byte[0]);
        }
        (code, None)
    }

    /// The next instruction, if there is one.
    pub fn instruction(&self) -> Option<disasm::Instruction> {
        let code = self.fetch().0;
        let (bits, rip) = (self.registers.code_bits(), self.registers.regs.rip);
        (!code.is_empty()).then(|| disasm::decode(&code, bits, rip))
    }

    /// The next instruction as data, if there is one and it is valid.
    pub(super) fn decoded(&self) -> Option<Instruction> {
        let code = self.fetch().0;
        let (bits, rip) = (self.registers.code_bits(), self.registers.regs.rip);
        let instruction = Decoder::with_ip(bits, &code, rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// What happens next.
    pub fn next(&self) -> Next {
        let (code, end) = self.fetch();
        let (bits, rip) = (self.registers.code_bits(), self.registers.regs.rip);
        let mut decoder = Decoder::with_ip(bits, &code, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match (decoder.last_error(), end) {
            (DecoderError::NoMoreBytes, Some(End::Exception(exception))) => Next::Raises(exception),
            (DecoderError::NoMoreBytes, Some(End::NoMemory(physical))) => Next::NoMemory(physical),
            (DecoderError::NoMoreBytes, None) => {
                Next::Raises(Exception::gp("an instruction of more than 15 bytes"))
            }
            (DecoderError::None, _) => match self.check(&instruction, &code) {
                Ok(()) => Next::Executes,
                Err(exception) => Next::Raises(exception),
            },
            _ => {
                let bytes: Vec<_> = code.iter().take(4).map(|byte| format!("{byte:02X}")).collect();
                let why = format!("{} is no instruction of {bits}-bit code", bytes.join(" "));
                Next::Raises(Exception::ud(why))
            }
        }
    }

    fn check(&self, instruction: &Instruction, code: &[u8]) -> Result<(), Exception> {
        let Registers { regs, sregs } = self.registers;
        let text = disasm::decode(code, self.registers.code_bits(), regs.rip).text;
        self.privilege(instruction, &text)?;
        self.units(instruction, &text)?;
        let mnemonic = instruction.mnemonic();
        match mnemonic {
            Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
                return Err(Exception::ud(format!("{text} raises it")));
            }
            Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq
                if sregs.efer & EFER_SCE == 0 =>
            {
                return Err(Exception::ud(format!("{text} with EFER.SCE clear")));
            }
            Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Int1 | Mnemonic::Into => {
                let vector = match mnemonic {
                    Mnemonic::Int => instruction.immediate8(),
                    Mnemonic::Int3 => vector::BP,
                    Mnemonic::Int1 => vector::DB,
                    _ if regs.rflags & OF == 0 => return Ok(()),
                    _ => vector::OF,
                };
                let software = mnemonic != Mnemonic::Int1;
                let exception = Exception::new(vector, None, format!("{text} raises it"));
                return Err(Exception { software, ..exception });
            }
            _ => {}
        }
        self.operands(instruction, &text)?;
        match mnemonic {
            Mnemonic::Div | Mnemonic::Idiv => self.division(instruction, &text),
            Mnemonic::Mov if instruction.op0_register().is_cr() => {
                self.control(instruction.op0_register(), self.value(instruction.op1_register()))
            }
            Mnemonic::Lmsw => Ok(()),
            Mnemonic::Wrmsr => self.msr(),
            Mnemonic::Ltr => {
                self.task(self.operand(instruction, 0).map_or(0, |value| value as u16))
            }
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => self.iret(mnemonic),
            Mnemonic::Retf => self.retf(instruction),
            Mnemonic::Jmp | Mnemonic::Call => self.far(instruction),
            Mnemonic::Mov
            | Mnemonic::Pop
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Lss => self.data_segment(instruction),
            _ => Ok(()),
        }
    }

    /// What only ring 0 may do, or the ring that RFLAGS.IOPL names.
    fn privilege(&self, instruction: &Instruction, text: &str) -> Result<(), Exception> {
        let cpl = self.cpl();
        if cpl == 0 || !instruction.is_privileged() {
            return Ok(());
        }
        let iopl = ((self.registers.regs.rflags & IOPL) >> 12) as u8;
        let by_iopl = matches!(instruction.mnemonic(), Mnemonic::Cli | Mnemonic::Sti);
        let port = matches!(
            instruction.mnemonic(),
            Mnemonic::In
                | Mnemonic::Insb
                | Mnemonic::Insw
                | Mnemonic::Insd
                | Mnemonic::Out
                | Mnemonic::Outsb
                | Mnemonic::Outsw
                | Mnemonic::Outsd
        );
        if (by_iopl || port) && cpl <= iopl || port && self.port_allowed(instruction) {
            return Ok(());
        }
        Err(Exception::gp(match by_iopl || port {
            true => format!("{text} in ring {cpl}, with RFLAGS.IOPL {iopl}"),
            false => format!("{text} in ring {cpl}, which only ring 0 may execute"),
        }))
    }

    /// Whether the TSS's bitmap allows the port (Intel SDM vol. 1, 19.5.2).
    fn port_allowed(&self, instruction: &Instruction) -> bool {
        let (base, limit) = (self.registers.sregs.tr.base, self.registers.sregs.tr.limit);
        let port = match instruction.op1_kind() {
            OpKind::Immediate8 => instruction.immediate8().into(),
            _ if instruction.op0_kind() == OpKind::Immediate8 => instruction.immediate8().into(),
            _ => self.registers.regs.rdx & 0xFFFF,
        };
        let Some(bitmap) = self.read(base.wrapping_add(0x66), 2) else { return false };
        let at = bitmap + port / 8;
        at < u64::from(limit)
            && self.read(base.wrapping_add(at), 1).is_some_and(|bits| bits >> (port % 8) & 1 == 0)
    }

    /// Whether FPU, SSE or AVX are switched on.
    fn units(&self, instruction: &Instruction, text: &str) -> Result<(), Exception> {
        let (cr0, cr4) = (self.registers.sregs.cr0, self.registers.sregs.cr4);
        let nm = |bit| Err(Exception::new(vector::NM, None, format!("{text} with {bit} set")));
        let ud = |state: &str| Err(Exception::ud(format!("{text} with {state}")));
        let vector = (0..instruction.op_count()).any(|op| {
            let register = instruction.op_register(op);
            instruction.op_kind(op) == OpKind::Register && register.is_vector_register()
        });
        if instruction.encoding() != EncodingKind::Legacy {
            if vector && cr4 & CR4_OSXSAVE == 0 {
                return ud("CR4.OSXSAVE clear");
            }
            return Ok(());
        }
        if vector {
            return match (cr4 & CR4_OSFXSR, cr0 & CR0_EM, cr0 & CR0_TS) {
                (0, _, _) => ud("CR4.OSFXSR clear"),
                (_, CR0_EM, _) => ud("CR0.EM set"),
                (_, _, CR0_TS) => nm("CR0.TS"),
                _ => Ok(()),
            };
        }
        if instruction.cpuid_features().contains(&CpuidFeature::FPU) {
            return match (cr0 & CR0_EM, cr0 & CR0_TS) {
                (CR0_EM, _) => nm("CR0.EM"),
                (_, CR0_TS) => nm("CR0.TS"),
                _ => Ok(()),
            };
        }
        Ok(())
    }

    /// Everything that an instruction reads and writes in memory, the stack included.
    fn operands(&self, instruction: &Instruction, text: &str) -> Result<(), Exception> {
        let bits = self.registers.code_bits();
        let count = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let counter = [Register::CX, Register::ECX, Register::RCX][bits as usize / 32];
        if count && instruction.is_string_instruction() && self.value(counter) == 0 {
            return Ok(());
        }
        let mut info = InstructionInfoFactory::new();
        for memory in info.info(instruction).used_memory() {
            let write = match memory.access() {
                OpAccess::None | OpAccess::NoMemAccess => continue,
                OpAccess::Read | OpAccess::CondRead => false,
                _ => true,
            };
            let offset = memory.virtual_address(0, |register, _, _| {
                Some(if register.is_segment_register() { 0 } else { self.value(register) })
            });
            let Some(offset) = offset else { continue };
            let size = memory.memory_size().size() as u64;
            let at = self.reach(memory.segment(), offset, size, write)?;
            let aligned = matches!(
                instruction.mnemonic(),
                Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa | Mnemonic::Cmpxchg16b
            );
            if aligned && at % 16 != 0 && size == 16 {
                let why = format!("{text} with {at:#x}, which is no multiple of 16");
                return Err(Exception::gp(why));
            }
        }
        Ok(())
    }

    /// A general register's value.
    pub(super) fn value(&self, register: Register) -> u64 {
        let Registers { regs, sregs } = self.registers;
        disasm::register(register, regs, sregs, self.registers.code_bits())
    }

    /// The value of operand `op`: a register's or what is in memory, of 8 bytes at most.
    fn operand(&self, instruction: &Instruction, op: u32) -> Option<u64> {
        match instruction.op_kind(op) {
            OpKind::Register => Some(self.value(instruction.op_register(op))),
            OpKind::Memory => {
                let linear = self.operand_address(instruction, op)?;
                self.read(linear, instruction.memory_size().size().min(8))
            }
            _ => None,
        }
    }

    /// The linear address of operand `op` in memory.
    fn operand_address(&self, instruction: &Instruction, op: u32) -> Option<u64> {
        let offset = instruction.virtual_address(op, 0, |register, _, _| {
            Some(if register.is_segment_register() { 0 } else { self.value(register) })
        })?;
        self.linear(instruction.memory_segment(), offset, 1, false).ok()
    }

    fn division(&self, instruction: &Instruction, text: &str) -> Result<(), Exception> {
        let Some(divisor) = self.operand(instruction, 0) else { return Ok(()) };
        let size = match instruction.op0_kind() {
            OpKind::Register => instruction.op0_register().size(),
            _ => instruction.memory_size().size(),
        };
        let de = |why: &str| Err(Exception::new(vector::DE, None, format!("{text} {why}")));
        if divisor == 0 {
            return de("divides by zero");
        }
        let regs = &self.registers.regs;
        let bits = size as u32 * 8;
        let mask =
            |value: u64| u128::from(if bits == 64 { value } else { value & ((1 << bits) - 1) });
        let dividend = match size {
            1 => u128::from(regs.rax & 0xFFFF),
            _ => mask(regs.rdx) << bits | mask(regs.rax),
        };
        let fits = if instruction.mnemonic() == Mnemonic::Div {
            dividend / mask(divisor) < 1 << bits
        } else {
            let extend = |value: u128, bits: u32| (value as i128) << (128 - bits) >> (128 - bits);
            let (dividend, divisor) = (extend(dividend, bits * 2), extend(mask(divisor), bits));
            dividend.checked_div(divisor).is_some_and(|quotient| {
                (-(1i128 << (bits - 1))..1i128 << (bits - 1)).contains(&quotient)
            })
        };
        if fits { Ok(()) } else { de("has a quotient that does not fit") }
    }

    /// What control registers refuse (Intel SDM vol. 2, "MOV—Move to/from Control Registers").
    fn control(&self, register: Register, value: u64) -> Result<(), Exception> {
        let sregs = &self.registers.sregs;
        let gp = |why: String| Err(Exception::gp(why));
        match register {
            Register::CR0 => {
                if value >> 32 != 0 {
                    return gp(format!("CR0 gets {value:#x}, which has bits above 31"));
                }
                if value & (CR0_PG | CR0_PE) == CR0_PG {
                    return gp("CR0 gets PG without PE: paging needs protected mode".into());
                }
                if value & (CR0_NW | CR0_CD) == CR0_NW {
                    return gp("CR0 gets NW without CD".into());
                }
                if value & !sregs.cr0 & CR0_PG == 0 {
                    return Ok(());
                }
                if sregs.efer & EFER_LME != 0 {
                    if sregs.cr4 & CR4_PAE == 0 {
                        return gp("CR0 gets PG with EFER.LME set and CR4.PAE clear: long mode \
                                   needs PAE"
                            .into());
                    }
                    return Ok(());
                }
                self.directory_pointers(sregs.cr3, "CR0 gets PG")
            }
            Register::CR3 if self.long() && value << 1 >> 53 != 0 => {
                gp(format!("CR3 gets {value:#x}, which has reserved bits set"))
            }
            Register::CR3 if sregs.cr0 & CR0_PG != 0 && !self.long() => {
                self.directory_pointers(value, "CR3 is set")
            }
            Register::CR4 if sregs.efer & EFER_LMA != 0 && value & CR4_PAE == 0 => {
                gp("CR4 loses PAE in long mode".into())
            }
            Register::CR4 if value >> 32 != 0 => {
                gp(format!("CR4 gets {value:#x}, which has reserved bits set"))
            }
            _ => Ok(()),
        }
    }

    /// PAE paging reads the four entries of its first table at once, and refuses those with reserved bits (Intel SDM vol.
    /// 3, 5.4.1). A PML4 that is taken for such a table has them.
    fn directory_pointers(&self, cr3: u64, what: &str) -> Result<(), Exception> {
        let sregs = &self.registers.sregs;
        if sregs.cr4 & CR4_PAE == 0 {
            return Ok(());
        }
        const RESERVED: u64 = 0b1_1110_0110;
        for index in 0..4 {
            let at = (cr3 & 0xFFFF_FFE0) + index * 8;
            let entry: u64 = self.ram.read_obj(GuestAddress(at)).unwrap_or(u64::MAX);
            let bits = entry & RESERVED;
            if entry & 1 == 1 && bits != 0 {
                return Err(Exception::gp(format!(
                    "{what} with CR4.PAE set and EFER.LME clear, which is PAE paging and not long \
                     mode: PDPT[{index}] at {at:#x} has reserved bits set: {bits:#x}"
                )));
            }
        }
        Ok(())
    }

    fn msr(&self) -> Result<(), Exception> {
        let Registers { regs, sregs } = self.registers;
        let value = regs.rdx << 32 | regs.rax & 0xFFFF_FFFF;
        const KNOWN: u64 = 0x20_FD01;
        match regs.rcx & 0xFFFF_FFFF {
            EFER if value & !KNOWN != 0 => {
                Err(Exception::gp(format!("EFER gets {value:#x}, which has reserved bits set")))
            }
            EFER if sregs.cr0 & CR0_PG != 0 && (value ^ sregs.efer) & EFER_LME != 0 => {
                Err(Exception::gp("EFER.LME changes while paging is on"))
            }
            // FS.base, GS.base, KernelGSbase, LSTAR, CSTAR.
            msr @ (0xC000_0100..=0xC000_0102 | 0xC000_0082 | 0xC000_0083)
                if (value as i64) << 16 >> 16 != value as i64 =>
            {
                Err(Exception::gp(format!("MSR {msr:#x} gets {value:#x}, no canonical address")))
            }
            _ => Ok(()),
        }
    }

    /// How the descriptor tables look.
    pub(super) fn layout(&self) -> Layout {
        Layout::of(self.registers)
    }

    /// The segment that a selector names.
    pub(super) fn descriptor(&self, selector: u16) -> Result<Segment, Exception> {
        let sregs = &self.registers.sregs;
        let ldt = &sregs.ldt;
        let (name, table) = match selector & 4 {
            0 => ("GDT", sregs.gdt),
            _ => {
                let limit = ldt.limit.min(0xFFFF) as u16;
                ("LDT", kvm_dtable { base: ldt.base, limit, ..Default::default() })
            }
        };
        let found = descriptor::segment(table, selector, self.layout(), |at, to: &mut [u8]| {
            self.paging.read(self.ram, at, to)
        });
        found.map_err(|unusable| {
            let at = table.base.wrapping_add(u64::from(selector & !7));
            if unusable == Unusable::Unmapped
                && let Err(exception) = self.page(at, 8, Access::default())
            {
                return exception;
            }
            let why = match unusable {
                Unusable::BeyondLimit { limit, .. } => {
                    format!("selector {selector:#x} is beyond the {name}'s limit {limit:#x}")
                }
                _ => format!("selector {selector:#x}: {unusable}"),
            };
            Exception::of(vector::GP, u32::from(selector & !3), why)
        })
    }

    /// Checks that CS can be loaded with `selector`, to go on at `offset`. Returns its descriptor.
    pub(super) fn code_segment(
        &self,
        selector: u16,
        offset: u64,
        transfer: Transfer,
    ) -> Result<Option<Segment>, Exception> {
        if !self.protected() {
            return Ok(None);
        }
        let (rpl, cpl) = ((selector & 3) as u8, self.cpl());
        if selector & !3 == 0 {
            return Err(Exception::gp(format!("CS gets the null selector {selector:#x}")));
        }
        let error = u32::from(selector & !3);
        let gp = |why: String| {
            let why = format!("CS gets selector {selector:#x}, {why}");
            Err(Exception::of(vector::GP, error, why))
        };
        let descriptor = self.descriptor(selector)?;
        let Kind::Code { conforming, .. } = descriptor.kind else {
            // Call gates and tasks are other ways to go on.
            if transfer == Transfer::Jump && leads_on(&descriptor.kind) {
                return Ok(None);
            }
            return gp(format!("which is {}", what(descriptor.kind)));
        };
        let dpl = descriptor.dpl;
        match transfer {
            Transfer::Jump if conforming && dpl > cpl || !conforming && dpl != cpl => {
                return gp(format!("which is code of ring {dpl}, in ring {cpl}"));
            }
            Transfer::Return if rpl < cpl => {
                return gp(format!("a return from ring {cpl} to ring {rpl}"));
            }
            Transfer::Return if conforming && dpl > rpl || !conforming && dpl != rpl => {
                return gp(format!("which is code of ring {dpl}, for ring {rpl}"));
            }
            _ => {}
        }
        if !descriptor.present {
            let why = format!("CS gets selector {selector:#x}, whose segment is not present");
            return Err(Exception::of(vector::NP, error, why));
        }
        if self.long() && descriptor.long && descriptor.bits32 {
            return gp("whose descriptor has both L and D set".into());
        }
        if self.long() && descriptor.long {
            if (offset as i64) << 16 >> 16 != offset as i64 {
                return Err(Exception::gp(format!("RIP gets {offset:#x}, no canonical address")));
            }
        } else if offset > u64::from(descriptor.limit) {
            let limit = descriptor.limit;
            return Err(Exception::gp(format!(
                "RIP gets {offset:#x}, beyond the limit {limit:#x} of selector {selector:#x}"
            )));
        }
        Ok(Some(descriptor))
    }

    /// Far jumps and calls.
    fn far(&self, instruction: &Instruction) -> Result<(), Exception> {
        let (selector, offset) = match instruction.op0_kind() {
            OpKind::FarBranch16 => {
                (instruction.far_branch_selector(), u64::from(instruction.far_branch16()))
            }
            OpKind::FarBranch32 => {
                (instruction.far_branch_selector(), u64::from(instruction.far_branch32()))
            }
            OpKind::Memory
                if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() =>
            {
                let size = instruction.memory_size().size() - 2;
                let Some(at) = self.operand_address(instruction, 0) else { return Ok(()) };
                let offset = self.read(at, size);
                let selector = self.read(at.wrapping_add(size as u64), 2);
                let (Some(offset), Some(selector)) = (offset, selector) else { return Ok(()) };
                (selector as u16, offset)
            }
            // Near ones. Where they lead to is the next instruction's business, except for this.
            OpKind::Register | OpKind::Memory => {
                let target = self.operand(instruction, 0).unwrap_or(0);
                let long = self.registers.mode() == Mode::Long;
                if long && (target as i64) << 16 >> 16 != target as i64 {
                    let why = format!("RIP gets {target:#x}, no canonical address");
                    return Err(Exception::gp(why));
                }
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.code_segment(selector, offset, Transfer::Jump).map(|_| ())
    }

    /// The words of `size` bytes on the stack, from its top.
    fn stack<const N: usize>(&self, size: usize) -> Result<[u64; N], Exception> {
        let rsp = match (self.registers.mode(), self.registers.sregs.ss.db) {
            (Mode::Long, _) => self.registers.regs.rsp,
            (_, 1) => self.registers.regs.rsp & 0xFFFF_FFFF,
            _ => self.registers.regs.rsp & 0xFFFF,
        };
        let at = self.reach(Register::SS, rsp, (N * size) as u64, false)?;
        Ok(std::array::from_fn(|index| {
            self.read(at.wrapping_add((index * size) as u64), size).unwrap_or(0)
        }))
    }

    fn retf(&self, instruction: &Instruction) -> Result<(), Exception> {
        let size = match instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let [rip, cs] = self.stack(size)?;
        self.code_segment(cs as u16, rip, Transfer::Return).map(|_| ())
    }

    fn iret(&self, mnemonic: Mnemonic) -> Result<(), Exception> {
        let size = match mnemonic {
            Mnemonic::Iret => 2,
            Mnemonic::Iretd => 4,
            _ => 8,
        };
        let [rip, cs, _] = self.stack(size)?;
        if !self.protected() {
            return Ok(());
        }
        if self.registers.regs.rflags & NT != 0 {
            return match self.long() {
                true => {
                    Err(Exception::gp("IRET with RFLAGS.NT set, which long mode has no use for"))
                }
                false => Ok(()),
            };
        }
        let frame = |exception: Exception| {
            let rsp = self.registers.regs.rsp;
            let why = format!("IRET takes what is at RSP {rsp:#x} for a frame: {}", exception.why);
            Exception { why, ..exception }
        };
        self.code_segment(cs as u16, rip, Transfer::Return).map_err(frame)?;
        let rpl = (cs & 3) as u8;
        if self.registers.mode() != Mode::Long && rpl == self.cpl() {
            return Ok(());
        }
        let [_, _, _, _, ss] = self.stack(size)?;
        self.stack_segment(ss as u16, rpl).map_err(frame)
    }

    /// Checks that SS can be loaded in ring `cpl`.
    fn stack_segment(&self, selector: u16, cpl: u8) -> Result<(), Exception> {
        let error = u32::from(selector & !3);
        let gp = |why: String| {
            let why = format!("SS gets selector {selector:#x}, {why}");
            Err(Exception::of(vector::GP, error, why))
        };
        if selector & !3 == 0 {
            // 64-bit code does without, but in ring 3.
            if self.long() && cpl < 3 && (selector & 3) as u8 == cpl {
                return Ok(());
            }
            return gp("which is null".into());
        }
        let descriptor = self.descriptor(selector)?;
        let rpl = (selector & 3) as u8;
        if rpl != cpl || descriptor.dpl != cpl {
            return gp(format!("of ring {}, for ring {cpl}", descriptor.dpl.max(rpl)));
        }
        if !matches!(descriptor.kind, Kind::Data { writable: true, .. }) {
            return gp(format!("which is {}", what(descriptor.kind)));
        }
        if !descriptor.present {
            let why = format!("SS gets selector {selector:#x}, whose segment is not present");
            return Err(Exception::of(vector::SS, error, why));
        }
        Ok(())
    }

    /// Loads of DS, ES, FS, GS and SS.
    fn data_segment(&self, instruction: &Instruction) -> Result<(), Exception> {
        let register = match instruction.mnemonic() {
            Mnemonic::Lds => Register::DS,
            Mnemonic::Les => Register::ES,
            Mnemonic::Lfs => Register::FS,
            Mnemonic::Lgs => Register::GS,
            Mnemonic::Lss => Register::SS,
            _ => instruction.op0_register(),
        };
        if !register.is_segment_register() || !self.protected() {
            return Ok(());
        }
        let selector = match instruction.mnemonic() {
            Mnemonic::Mov => self.operand(instruction, 1).unwrap_or(0) as u16,
            Mnemonic::Pop => self.stack::<1>(2)?[0] as u16,
            _ => {
                let size = instruction.memory_size().size() as u64 - 2;
                let at = self.operand_address(instruction, 1).unwrap_or(0);
                self.read(at.wrapping_add(size), 2).unwrap_or(0) as u16
            }
        };
        if register == Register::SS {
            return self.stack_segment(selector, self.cpl());
        }
        if selector & !3 == 0 {
            return Ok(());
        }
        let error = u32::from(selector & !3);
        let says = |why: String| format!("{register:?} gets selector {selector:#x}, {why}");
        let descriptor = self.descriptor(selector)?;
        let conforming = match descriptor.kind {
            Kind::Data { .. } => false,
            Kind::Code { readable: true, conforming } => conforming,
            kind => {
                return Err(Exception::of(
                    vector::GP,
                    error,
                    says(format!("which is {}", what(kind))),
                ));
            }
        };
        let ring = self.cpl().max((selector & 3) as u8);
        if !conforming && ring > descriptor.dpl {
            let why = says(format!("of ring {}, in ring {ring}", descriptor.dpl));
            return Err(Exception::of(vector::GP, error, why));
        }
        if !descriptor.present {
            let why = says("whose segment is not present".into());
            return Err(Exception::of(vector::NP, error, why));
        }
        Ok(())
    }

    /// LTR.
    fn task(&self, selector: u16) -> Result<(), Exception> {
        let error = u32::from(selector & !3);
        let gp = |why: String| {
            let why = format!("TR gets selector {selector:#x}, {why}");
            Err(Exception::of(vector::GP, error, why))
        };
        if selector & !3 == 0 || selector & 4 != 0 {
            return gp("which names no entry of the GDT".into());
        }
        let descriptor = self.descriptor(selector)?;
        match descriptor.kind {
            Kind::Tss { busy: false, .. } if descriptor.present => Ok(()),
            Kind::Tss { busy: false, .. } => {
                let why = format!("TR gets selector {selector:#x}, whose TSS is not present");
                Err(Exception::of(vector::NP, error, why))
            }
            Kind::Tss { .. } => gp("whose TSS is busy: it is loaded already".into()),
            kind => gp(format!("which is {}", what(kind))),
        }
    }
}

/// Whether a far jump or call to it goes on: by a call gate, or to another task.
fn leads_on(kind: &Kind) -> bool {
    matches!(kind, Kind::Gate(GateKind::Call | GateKind::Task) | Kind::Tss { busy: false, .. })
}

/// What a descriptor is, for a sentence.
pub(super) fn what(kind: Kind) -> String {
    match kind {
        Kind::Data { .. } => "a data segment".into(),
        Kind::Code { .. } => "a code segment".into(),
        Kind::Ldt => "an LDT".into(),
        Kind::Tss { .. } => "a TSS".into(),
        Kind::Gate(_) => format!("a gate ({kind})"),
        Kind::Reserved(0) => "an empty entry".into(),
        Kind::Reserved(_) => format!("of a {kind}"),
    }
}
