//! Introduced by stage 03: how an exception reaches its handler, or leads to a double and a triple fault.
//!
//! The processor takes a gate from the IDT, a code segment from the GDT, if the ring changes a stack from the TSS, and
//! pushes a frame. Each of these can raise an exception of its own. Which two make a double fault is a table (Intel SDM
//! vol. 3, 7.15 "Interrupt 8—Double Fault Exception"; AMD APM vol. 2, 8.2.9); what is raised while that one is delivered
//! shuts the processor down.

use std::fmt;

use super::fault::{self, Exception, Scene, vector, what};
use crate::descriptor::{self, GateKind, Kind, Unusable};
use crate::page_walk::Access;
use crate::regs::Mode;

/// Where an exception's handler begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handler {
    /// The vector that it is for.
    pub vector: u8,
    /// CS and RIP.
    pub selector: u16,
    /// The offset in that segment.
    pub rip: u64,
    /// The linear address of its first instruction.
    pub linear: u64,
    /// The linear address of the RFLAGS in its frame.
    pub flags_at: u64,
}

/// What a failed delivery leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The exception that the delivery raised is delivered instead.
    Instead,
    /// A double fault is delivered.
    DoubleFault,
    /// The processor shuts down.
    TripleFault,
}

/// A delivery that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The vector that was to be delivered.
    pub vector: u8,
    /// What was raised instead.
    pub exception: Exception,
    /// What comes of it.
    pub then: Then,
}

/// An exception and all that comes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// What began it.
    pub first: Exception,
    /// Each delivery that failed.
    pub failures: Vec<Failure>,
    /// The handler that the last one reached; none if it ended in a triple fault.
    pub handler: Option<Handler>,
}

/// The classes of exceptions that a double fault is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    fn of(vector: u8) -> Self {
        match vector {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Self::Contributory,
            vector::PF => Self::PageFault,
            vector::DF => Self::DoubleFault,
            _ => Self::Benign,
        }
    }

    // ANCHOR: double_fault
    fn then(self, second: Self) -> Then {
        match (self, second) {
            (Self::DoubleFault, _) => Then::TripleFault,
            (Self::Contributory, Self::Contributory)
            | (Self::PageFault, Self::Contributory | Self::PageFault) => Then::DoubleFault,
            _ => Then::Instead,
        }
    }
    // ANCHOR_END: double_fault
}

impl Chain {
    /// Follows `first` until a handler has it or the processor shuts down.
    pub fn of(scene: &Scene, first: Exception) -> Self {
        let mut failures = Vec::new();
        let mut now = first.clone();
        let handler = loop {
            let failed = match deliver(scene, &now) {
                Ok(handler) => break Some(handler),
                Err(exception) => exception,
            };
            let then = Class::of(now.vector).then(Class::of(failed.vector));
            failures.push(Failure { vector: now.vector, exception: failed.clone(), then });
            now = match then {
                Then::TripleFault => break None,
                Then::Instead => Exception { software: false, ..failed },
                Then::DoubleFault => Exception::of(vector::DF, 0, "two exceptions at once"),
            };
        };
        Self { first, failures, handler }
    }

    /// Every vector that was to be delivered.
    pub fn vectors(&self) -> Vec<u8> {
        let failed = self.failures.iter().map(|failure| failure.vector);
        failed.chain(self.handler.map(|handler| handler.vector)).collect()
    }
}

/// What is wrong with a vector that has no gate.
fn absent(vector: u8, limit: u16) -> String {
    format!("IDT vector {vector} is not present (IDT limit {limit:#x})")
}

/// All of it as one sentence, without a full stop.
impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.first.told())?;
        let mut before: Option<&Failure> = None;
        for failure in &self.failures {
            let Failure { vector, exception, then } = failure;
            let is_absent = |failure: &Failure| {
                failure
                    .exception
                    .why
                    .starts_with(&format!("IDT vector {} is not present", failure.vector))
            };
            match before {
                None => write!(f, "; while delivering it, {}", exception.why)?,
                Some(before) if is_absent(before) && is_absent(failure) => {
                    write!(f, "; vector {vector} neither")?;
                }
                Some(before) if before.exception.why == exception.why => {
                    write!(f, "; vector {vector} meets the same")?;
                }
                Some(_) => write!(f, "; while delivering vector {vector}, {}", exception.why)?,
            }
            match then {
                Then::Instead => write!(f, ": {}", fault::name(exception.vector))?,
                Then::DoubleFault => write!(f, ": double fault")?,
                Then::TripleFault => write!(f, ": triple fault")?,
            }
            before = Some(failure);
        }
        Ok(())
    }
}

/// Delivers one exception: where its handler begins, or what that raises.
pub(super) fn deliver(scene: &Scene, exception: &Exception) -> Result<Handler, Exception> {
    let vector = exception.vector;
    let sregs = &scene.registers.sregs;
    let layout = scene.layout();
    // In the error codes of what goes wrong here, bit 1 says "IDT" and bit 0 "not the program's own doing".
    let external = u32::from(!exception.software);
    let code = u32::from(vector) << 3 | 2 | external;
    let gate = descriptor::gate(sregs.idt, vector, layout, |at, to: &mut [u8]| {
        scene.paging.read(scene.ram, at, to)
    });
    let gate = gate.map_err(|unusable| {
        let at = sregs.idt.base.wrapping_add(u64::from(vector) * layout.gate_size());
        if unusable == Unusable::Unmapped
            && let Err(found) = scene.page(at, layout.gate_size(), Access::default())
        {
            let why = format!("IDT vector {vector} cannot be read: {}", found.why);
            return Exception { why, ..found };
        }
        Exception::of(vector::GP, code, absent(vector, sregs.idt.limit))
    })?;
    if !scene.protected() {
        return real_mode(scene, vector, gate.selector, gate.offset);
    }

    if exception.software && scene.cpl() > gate.dpl {
        let why = format!(
            "the gate of IDT vector {vector} is for ring {}, not for an INT in ring {}",
            gate.dpl,
            scene.cpl()
        );
        return Err(Exception::of(vector::GP, code & !1, why));
    }
    match gate.usable() {
        Ok(()) => {}
        Err(Unusable::NotPresent) => {
            let why = absent(vector, sregs.idt.limit);
            return Err(Exception::of(vector::NP, code, why));
        }
        Err(Unusable::Wrong { found: Kind::Reserved(0), .. }) => {
            let why = absent(vector, sregs.idt.limit);
            return Err(Exception::of(vector::GP, code, why));
        }
        Err(_) => {
            let why = format!("IDT vector {vector} is no gate, but {}", what(gate.kind));
            return Err(Exception::of(vector::GP, code, why));
        }
    }
    if gate.kind == Kind::Gate(GateKind::Task) {
        let linear = sregs.tr.base;
        let (selector, rip) = (gate.selector, 0);
        return Ok(Handler { vector, selector, rip, linear, flags_at: linear });
    }

    // The handler's code segment.
    let selector = gate.selector;
    let says = |found: Exception| {
        let why = found.why.replacen("CS gets ", "its gate leads to ", 1);
        let why = format!("IDT vector {vector}: {why}");
        Exception { code: found.code.map(|code| code | external), why, ..found }
    };
    let target = target(scene, selector, gate.offset).map_err(says)?;
    let conforming = matches!(target.kind, Kind::Code { conforming: true, .. });
    let inner = !conforming && target.dpl < scene.cpl();
    let ring = if conforming { scene.cpl() } else { target.dpl };

    // The stack, and the frame on it.
    let pushes_code = exception.code.is_some();
    let flags_at = if scene.long() {
        long_frame(scene, vector, ring, inner, gate.ist, pushes_code)?
    } else {
        protected_frame(scene, vector, ring, inner, gate.bits16, pushes_code)?
    };
    let base = if scene.long() { 0 } else { target.base };
    let linear = base.wrapping_add(gate.offset);
    Ok(Handler { vector, selector, rip: gate.offset, linear, flags_at })
}

/// Checks the code segment that a gate names: of this ring or an inner one, and in long mode of 64 bits.
fn target(scene: &Scene, selector: u16, offset: u64) -> Result<descriptor::Segment, Exception> {
    let error = u32::from(selector & !3);
    if selector & !3 == 0 {
        return Err(Exception::gp(format!("CS gets the null selector {selector:#x}")));
    }
    let segment = scene.descriptor(selector)?;
    let gp = |why: String| {
        Err(Exception::of(vector::GP, error, format!("CS gets selector {selector:#x}, {why}")))
    };
    match segment.kind {
        Kind::Code { .. } if segment.dpl > scene.cpl() => {
            gp(format!("which is code of ring {}, from ring {}", segment.dpl, scene.cpl()))
        }
        Kind::Code { .. } if !segment.present => {
            let why = format!("CS gets selector {selector:#x}, whose segment is not present");
            Err(Exception::of(vector::NP, error, why))
        }
        Kind::Code { .. } if scene.long() && (!segment.long || segment.bits32) => {
            gp("which is not 64-bit code, as handlers in long mode must be".into())
        }
        Kind::Code { .. } => {
            if scene.long() && (offset as i64) << 16 >> 16 != offset as i64 {
                return Err(Exception::gp(format!(
                    "its handler is at {offset:#x}, no canonical address"
                )));
            }
            if !scene.long() && offset > u64::from(segment.limit) {
                return Err(Exception::gp(format!(
                    "its handler is at {offset:#x}, beyond the limit {:#x} of selector {selector:#x}",
                    segment.limit
                )));
            }
            Ok(segment)
        }
        kind => gp(format!("which is {}", what(kind))),
    }
}

/// What is raised when the frame cannot be pushed.
fn unpushed(vector: u8, found: Exception) -> Exception {
    let why = format!("the frame of vector {vector} cannot be pushed: {}", found.why);
    // A stack that isn't canonical is a stack fault.
    let number = if found.vector == vector::GP { vector::SS } else { found.vector };
    Exception { vector: number, why, ..found }
}

/// Long mode: the frame is of 5 or 6 words of 8 bytes, on a stack aligned to 16 bytes (Intel SDM vol. 3, 7.14).
fn long_frame(
    scene: &Scene,
    vector: u8,
    ring: u8,
    inner: bool,
    ist: u8,
    code: bool,
) -> Result<u64, Exception> {
    let tr = &scene.registers.sregs.tr;
    let mut whose = String::new();
    let rsp = if ist > 0 || inner {
        let (name, offset) = match ist {
            0 => (format!("RSP{ring}"), 4 + 8 * u64::from(ring)),
            ist => (format!("IST{ist}"), 0x24 + 8 * (u64::from(ist) - 1)),
        };
        let tss = tss(scene);
        if offset + 7 > u64::from(tr.limit) {
            let limit = tr.limit;
            let why = format!("{tss} has no {name} for vector {vector}: its limit is {limit:#x}");
            return Err(Exception::of(vector::TS, u32::from(tr.selector & !3), why));
        }
        let at = tr.base.wrapping_add(offset);
        scene.page(at, 8, Access::default()).map_err(|found| {
            let why = format!("{tss} cannot be read: {}", found.why);
            Exception { why, ..found }
        })?;
        let rsp = scene.read(at, 8).unwrap_or(0);
        whose = format!(" ({name} of {tss} is {rsp:#x})");
        rsp
    } else if scene.registers.mode() == Mode::Long {
        scene.registers.regs.rsp
    } else {
        scene.registers.regs.rsp & 0xFFFF_FFFF
    };
    let words = if code { 6 } else { 5 };
    let top = rsp & !0xF;
    let bottom = top.wrapping_sub(words * 8);
    let access = Access { write: true, user: ring == 3, ..Access::default() };
    scene.page(bottom, words * 8, access).map_err(|found| {
        let found = unpushed(vector, found);
        Exception { why: found.why + &whose, ..found }
    })?;
    Ok(top.wrapping_sub(24))
}

/// The task-state segment, for a sentence.
fn tss(scene: &Scene) -> String {
    let tr = &scene.registers.sregs.tr;
    match tr.selector {
        0 => format!("the TSS at {:#x} (TR was never loaded)", tr.base),
        _ => format!("the TSS at {:#x}", tr.base),
    }
}

/// Protected mode: 3 words, or 5 if the ring changes, and an error code (Intel SDM vol. 3, 7.12.1).
fn protected_frame(
    scene: &Scene,
    vector: u8,
    ring: u8,
    inner: bool,
    bits16: bool,
    code: bool,
) -> Result<u64, Exception> {
    let size = if bits16 { 2 } else { 4 };
    let (ss, sregs) = (&scene.registers.sregs.ss, &scene.registers.sregs);
    if !inner {
        let words = if code { 4 } else { 3 };
        let mask = if ss.db == 1 { 0xFFFF_FFFF } else { 0xFFFF };
        let bottom = scene.registers.regs.rsp.wrapping_sub(words * size) & mask;
        let linear = scene
            .linear(iced_x86::Register::SS, bottom, words * size, true)
            .map_err(|found| unpushed(vector, found))?;
        let access = Access { write: true, user: ring == 3, ..Access::default() };
        scene.page(linear, words * size, access).map_err(|found| unpushed(vector, found))?;
        return Ok(linear + (words - 1) * size);
    }
    let tr = &sregs.tr;
    let old = tr.type_ & 8 == 0;
    let (at, each) = if old { (2 + 4 * u64::from(ring), 2) } else { (4 + 8 * u64::from(ring), 4) };
    let tss = tss(scene);
    if at + 2 * each - 1 > u64::from(tr.limit) {
        let why = format!("{tss} has no stack for ring {ring}: its limit is {:#x}", tr.limit);
        return Err(Exception::of(vector::TS, u32::from(tr.selector & !3), why));
    }
    scene.page(tr.base.wrapping_add(at), 2 * each, Access::default()).map_err(|found| {
        let why = format!("{tss} cannot be read: {}", found.why);
        Exception { why, ..found }
    })?;
    let read = |offset, len| scene.read(tr.base.wrapping_add(at + offset), len as usize);
    let (esp, selector) = (read(0, each).unwrap_or(0), read(each, 2).unwrap_or(0) as u16);
    let ts = |why: String| {
        let why = format!("{tss} gives ring {ring} the stack {selector:#x}:{esp:#x}, {why}");
        Err(Exception::of(vector::TS, u32::from(selector & !3), why))
    };
    if selector & !3 == 0 {
        return ts("which has the null selector".into());
    }
    let stack = scene.descriptor(selector).map_err(|found| match found.vector {
        vector::GP => Exception { vector: vector::TS, ..found },
        _ => found,
    })?;
    if !matches!(stack.kind, Kind::Data { writable: true, .. }) || stack.dpl != ring {
        return ts(format!("which is {} of ring {}", what(stack.kind), stack.dpl));
    }
    let words = if code { 6 } else { 5 };
    let bottom = esp.wrapping_sub(words * size) & if stack.bits32 { 0xFFFF_FFFF } else { 0xFFFF };
    let linear = stack.base.wrapping_add(bottom) & 0xFFFF_FFFF;
    scene
        .page(linear, words * size, Access { write: true, ..Access::default() })
        .map_err(|found| unpushed(vector, found))?;
    Ok(linear + (words - 3) * size)
}

/// Real mode: the vector is a far pointer, and there is no check but for the limits (Intel SDM vol. 3, 22.1.4).
fn real_mode(scene: &Scene, vector: u8, selector: u16, rip: u64) -> Result<Handler, Exception> {
    let bottom = scene.registers.regs.rsp.wrapping_sub(6) & 0xFFFF;
    let stack = scene
        .linear(iced_x86::Register::SS, bottom, 6, true)
        .map_err(|found| unpushed(vector, found))?;
    let linear = u64::from(selector) * 16 + rip;
    Ok(Handler { vector, selector, rip, linear, flags_at: stack + 4 })
}
