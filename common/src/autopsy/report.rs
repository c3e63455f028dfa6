//! Introduced by stage 03: an autopsy's report, for a person with a terminal of 80 columns.

use std::fmt::{self, Write};

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess};

use super::fault::{self, Scene};
use super::watchdog::Hang;
use super::{Autopsy, Cause};
use crate::descriptor::{self, Segment};
use crate::disasm;
use crate::last_exits::{LastExit, Request, Space};
use crate::page_walk::Scheme;
use crate::regs::{Bits, CR0, CR4, EFER, Mode, RFLAGS, Registers};

/// How wide a report is.
const WIDTH: usize = 80;

/// How many entries of a GDT are told.
const ENTRIES: u64 = 16;

/// How many instructions before RIP, and from there on.
const BEFORE: usize = 4;
const AFTER: usize = 4;

/// Why a guest hangs, in one sentence.
pub(super) fn hang(scene: &Scene, hang: &Hang) -> String {
    let place = place(scene.registers);
    match hang {
        Hang::Halted => format!(
            "HLT before {place} with interrupts off (RFLAGS.IF is clear): no interrupt wakes this \
             processor"
        ),
        Hang::Loop(seen) => {
            let body = seen.iter().find_map(|regs| body(scene, regs.rip));
            let around = match body.as_deref() {
                Some([only]) => format!("an endless loop at {only:#x}"),
                Some([first, .., last]) => format!("an endless loop from {first:#x} to {last:#x}"),
                _ => format!("an endless loop around {place}"),
            };
            let interrupts = match scene.registers.regs.rflags >> 9 & 1 {
                0 => ", with interrupts off",
                _ => "",
            };
            match waits_for(scene, &body.unwrap_or_default()) {
                Some(what) => format!("{around}, which waits for {what}{interrupts}"),
                None => format!("{around}, which changes nothing{interrupts}"),
            }
        }
        Hang::Polls(exits) => {
            let asked = exits.iter().find(|(exit, _)| exit.request.is_some_and(|it| !it.write));
            let Some((exit, device)) = asked.or(exits.first()) else {
                return format!("it makes the same exits again and again at {place}");
            };
            let asked = exit.request.as_ref();
            let where_ = asked.map_or_else(|| "the monitor".into(), ToString::to_string);
            let answer = answer(exit).map_or_else(String::new, |it| format!(", which reads {it}"));
            match device {
                Some(name) => format!("it polls {where_} ({name}){answer} each time"),
                None => format!("it polls {where_}, where no device is{answer} each time"),
            }
        }
    }
}

/// What a guest wants that no device of its machine gives.
pub(super) fn no_device(request: &Request) -> String {
    let does = if request.write { "writes to" } else { "reads from" };
    match request.space {
        Space::Port => format!("it {does} {request}, and this machine has no devices"),
        Space::Memory => {
            format!("it {does} guest-physical {:#x}, where no memory is", request.addr)
        }
    }
}

/// CS:IP, or RIP alone in 64-bit code, for a sentence.
pub(super) fn place(registers: &Registers) -> String {
    match registers.mode() {
        Mode::Long => format!("{:#x}", registers.regs.rip),
        _ => registers.address(),
    }
}

/// What a device answered, as a number.
fn answer(exit: &LastExit) -> Option<String> {
    let request = exit.request.filter(|request| !request.write)?;
    let mut bytes = [0; 8];
    let size = usize::from(request.size).min(8);
    bytes[..size].copy_from_slice(&exit.data?[..size]);
    Some(format!("{:#x}", u64::from_le_bytes(bytes)))
}

/// The addresses of the instructions of the loop that RIP is in: from the target of the first branch that leads
/// back, to that branch. None if there is no such branch near.
fn body(scene: &Scene, rip: u64) -> Option<Vec<u64>> {
    const LONGEST: usize = 64;
    let follow = |from: u64| {
        let mut at = *scene.registers;
        at.regs.rip = from;
        std::iter::from_fn(move || {
            let instruction = Scene::new(scene.ram, &at).decoded()?;
            let here = at.regs.rip;
            at.regs.rip = here.wrapping_add(instruction.len() as u64);
            Some((here, instruction))
        })
    };
    let back = |(_, it): &(u64, Instruction)| {
        let branch = it.is_jmp_short_or_near() || it.is_jcc_short_or_near() || it.is_loop();
        branch && it.near_branch_target() <= rip
    };
    let (last, branch) = follow(rip).take(LONGEST).find(back)?;
    let body: Vec<_> = follow(branch.near_branch_target())
        .take(LONGEST)
        .map(|(at, _)| at)
        .take_while(|&at| at <= last)
        .collect();
    body.contains(&rip).then_some(body)
}

/// The memory that a loop reads and doesn't write.
fn waits_for(scene: &Scene, body: &[u64]) -> Option<String> {
    let mut info = InstructionInfoFactory::new();
    body.iter().find_map(|&rip| {
        let mut registers = *scene.registers;
        registers.regs.rip = rip;
        let there = Scene::new(scene.ram, &registers);
        let instruction = there.decoded().filter(|it| !it.is_stack_instruction())?;
        let info = info.info(&instruction);
        let memory = info.used_memory().iter().find(|it| it.access() == OpAccess::Read)?;
        let offset = memory.virtual_address(0, |register, _, _| {
            Some(if register.is_segment_register() { 0 } else { there.value(register) })
        })?;
        let linear = there.linear(memory.segment(), offset, 1, false).ok()?;
        let size = memory.memory_size().size().clamp(1, 8);
        let value = there.read(linear, size)?;
        Some(match size {
            1 => format!("the byte at {linear:#x}, which is {value:#x}, to change"),
            _ => format!("the {size} bytes at {linear:#x}, which are {value:#x}, to change"),
        })
    })
}

/// `text` in lines of 80 columns behind `head`, those after the first one indented as far as their first word allows.
fn wrapped(f: &mut fmt::Formatter<'_>, head: &str, text: &str) -> fmt::Result {
    let mut line = head.to_owned();
    let indent = head.chars().count();
    for word in text.split(' ') {
        let length = word.chars().count();
        if line.chars().count() + 1 + length > WIDTH && line.len() > indent {
            writeln!(f, "{}", line.trim_end())?;
            line = " ".repeat(indent.min(WIDTH.saturating_sub(length)));
        }
        if line.chars().count() > indent {
            line.push(' ');
        }
        line.push_str(word);
    }
    writeln!(f, "{}", line.trim_end())
}

/// The whole report, with a line feed at its end.
impl fmt::Display for Autopsy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match &self.cause {
            Cause::TripleFault => "triple fault",
            Cause::Halted => "halted for ever",
            Cause::FailEntry(_) => "failed entry",
            Cause::InternalError(error) => error.name(),
            Cause::NoDevice(_) => "nobody answers",
            Cause::Hang(_) => "hangs",
            Cause::Unexpected(_) => "unexpected exit",
        };
        let title = format!("-- autopsy: vCPU {}, {what} ", self.vcpu);
        writeln!(f, "{title:-<WIDTH$}")?;
        wrapped(f, "cause  ", &(self.sentence() + "."))?;
        if let Some(Ok(second)) = &self.replay {
            let steps = second.steps;
            let how = format!(
                "the registers were lost with the triple fault; the guest was run again, the last \
                 {steps} instructions step by step."
            );
            wrapped(f, "how    ", &how)?;
        }
        let Some(registers) = &self.registers else { return self.exits(f) };
        let scene = Scene::new(&self.ram, registers);
        writeln!(f, "\nregisters, {}", registers.mode())?;
        self::registers(f, registers)?;
        writeln!(f, "\ncode, {}-bit", registers.code_bits())?;
        self.code(f, &scene)?;
        self.pages(f, &scene)?;
        self.tables(f, &scene)?;
        self.exits(f)
    }
}

impl Autopsy {
    /// The instructions around RIP.
    fn code(&self, f: &mut fmt::Formatter<'_>, scene: &Scene) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, mark: &str, at: &Registers| {
            let scene = Scene::new(scene.ram, at);
            match scene.instruction() {
                Some(it) => {
                    let bytes: Vec<_> = it.bytes.iter().map(|byte| format!("{byte:02X}")).collect();
                    let head = format!("{mark} {}  {:<23} ", at.address(), bytes.join(" "));
                    wrapped(f, &head, &it.text)
                }
                None => writeln!(f, "{mark} {}  (cannot be fetched)", at.address()),
            }
        };
        if let Some(Ok(second)) = &self.replay {
            let trail = &second.trail;
            for at in &trail[trail.len().saturating_sub(BEFORE)..] {
                line(f, "  ", at)?;
            }
        } else {
            for rip in before(scene) {
                let mut at = *scene.registers;
                at.regs.rip = rip;
                line(f, "  ", &at)?;
            }
        }
        let mut at = *scene.registers;
        for nth in 0..=AFTER {
            line(f, if nth == 0 { "->" } else { "  " }, &at)?;
            let length = Scene::new(scene.ram, &at).instruction().map_or(0, |it| it.bytes.len());
            if length == 0 {
                break;
            }
            at.regs.rip = at.regs.rip.wrapping_add(length as u64);
        }
        Ok(())
    }

    /// The page walks for RIP, RSP and CR2.
    fn pages(&self, f: &mut fmt::Formatter<'_>, scene: &Scene) -> fmt::Result {
        let scheme = scene.paging.scheme;
        writeln!(f, "\npages, {scheme}")?;
        if scheme == Scheme::Off {
            return Ok(());
        }
        let Registers { regs, sregs } = scene.registers;
        let stack = match scene.registers.mode() {
            Mode::Long => regs.rsp,
            _ => sregs.ss.base.wrapping_add(regs.rsp) & 0xFFFF_FFFF,
        };
        let chain = self.chain();
        let fault = chain.as_ref().and_then(|chain| {
            let failed = chain.failures.iter().rev().find_map(|failure| failure.exception.cr2);
            chain.first.cr2.or(failed)
        });
        let mut told: Vec<u64> = Vec::new();
        for (name, linear) in [
            ("rip", Some(scene.registers.linear_rip())),
            ("rsp", Some(stack)),
            ("cr2", fault.or((sregs.cr2 != 0).then_some(sregs.cr2))),
        ] {
            let Some(linear) = linear else { continue };
            if told.contains(&linear) {
                writeln!(f, "{name} {linear:#x}: as above")?;
                continue;
            }
            told.push(linear);
            let walk = scene.paging.walk(scene.ram, linear);
            writeln!(f, "{name} {linear:#x}")?;
            for entry in &walk.entries {
                wrapped(f, "  ", &entry.to_string())?;
            }
            match &walk.page {
                Ok(page) => wrapped(f, "  -> ", &page.to_string())?,
                Err(fault) => wrapped(f, "  -> fails: ", &fault.to_string())?,
            }
        }
        Ok(())
    }

    /// The GDT with who uses its entries, and the gates of the IDT that were needed.
    fn tables(&self, f: &mut fmt::Formatter<'_>, scene: &Scene) -> fmt::Result {
        let sregs = &scene.registers.sregs;
        let layout = scene.layout();
        let read = |at, to: &mut [u8]| scene.paging.read(scene.ram, at, to);
        let chain = self.chain();
        let vectors = chain.as_ref().map(super::Chain::vectors).unwrap_or_default();
        let gates: Vec<_> = vectors
            .iter()
            .map(|&vector| (vector, descriptor::gate(sregs.idt, vector, layout, read)))
            .collect();
        if scene.protected() {
            writeln!(f, "\nGDT at {:#x}, limit {:#x}", sregs.gdt.base, sregs.gdt.limit)?;
            let count = (u64::from(sregs.gdt.limit) + 1) / 8;
            let mut skip = false;
            for selector in (1..count.min(ENTRIES)).map(|index| index as u16 * 8) {
                if std::mem::take(&mut skip) {
                    continue;
                }
                let used = users(scene, selector, &gates);
                let found = descriptor::segment(sregs.gdt, selector, layout, read);
                skip = found.is_ok_and(|it| is_long_system(&it, scene));
                // Without a GDT of its own a guest has one of 64 KiB, full of nothing.
                let nothing = match found {
                    Ok(it) => it.kind == descriptor::Kind::Reserved(0),
                    Err(_) => true,
                };
                if nothing && used.is_empty() {
                    continue;
                }
                match found {
                    Ok(it) if it.kind == descriptor::Kind::Reserved(0) => {
                        wrapped(f, &format!("  {selector:#04x}  "), &format!("empty{used}"))?;
                    }
                    Ok(it) => {
                        wrapped(f, &format!("  {selector:#04x}  "), &format!("{it}{used}"))?;
                    }
                    Err(why) => {
                        wrapped(f, &format!("  {selector:#04x}  "), &format!("{why}{used}"))?;
                    }
                }
            }
            if count > ENTRIES {
                writeln!(f, "  and {} more, not looked at", count - ENTRIES)?;
            }
        }
        writeln!(f, "\nIDT at {:#x}, limit {:#x}", sregs.idt.base, sregs.idt.limit)?;
        for (vector, gate) in gates {
            let name = fault::name(vector);
            let text = match gate {
                Ok(gate) if gate.kind == descriptor::Kind::Reserved(0) => format!("{name}: empty"),
                Ok(gate) => {
                    let verdict =
                        gate.usable().map_or_else(|why| format!(": {why}"), |()| "".into());
                    format!("{name}: {gate}{verdict}")
                }
                Err(why) => format!("{name}: {why}"),
            };
            wrapped(f, &format!("  {vector:>3}  "), &text)?;
        }
        Ok(())
    }

    fn exits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nlast exits")?;
        if self.exits.is_empty() {
            writeln!(f, "  none before")?;
        }
        for exit in &self.exits {
            writeln!(f, "  {:>6}  {exit}", exit.number)?;
        }
        writeln!(f, "{:-<WIDTH$}", "")
    }
}

/// Whether a descriptor takes the place of two.
fn is_long_system(segment: &Segment, scene: &Scene) -> bool {
    let system = matches!(
        segment.kind,
        descriptor::Kind::Tss { .. } | descriptor::Kind::Ldt | descriptor::Kind::Gate(_)
    );
    scene.long() && system
}

/// Who uses an entry of the GDT: segment registers and gates.
fn users(
    scene: &Scene,
    selector: u16,
    gates: &[(u8, Result<descriptor::Gate, descriptor::Unusable>)],
) -> String {
    let registers = scene.registers.segments();
    let held = registers[..7].iter().filter(|(_, it)| it.selector & !3 == selector);
    let mut users: Vec<_> = held.map(|(name, _)| name.to_uppercase()).collect();
    for (vector, gate) in gates {
        if gate.is_ok_and(|gate| gate.selector & !3 == selector) {
            users.push(format!("vector {vector}"));
        }
    }
    if users.is_empty() { String::new() } else { format!(" <- {}", users.join(", ")) }
}

/// Where up to [`BEFORE`] instructions before RIP may begin: the longest row of valid ones that leads to it. Zeroes are valid
/// code, too, but as a rule no code: a row begins behind them.
fn before(scene: &Scene) -> Vec<u64> {
    let rip = scene.registers.regs.rip;
    let row = |back: u64| {
        let mut at = *scene.registers;
        at.regs.rip = rip.wrapping_sub(back);
        let (mut row, mut left) = (Vec::new(), back);
        while left > 0 {
            let there = Scene::new(scene.ram, &at);
            let length = there.decoded()?.len() as u64;
            let zero = there.instruction().is_some_and(|it| it.bytes.starts_with(&[0]));
            row.push(at.regs.rip);
            at.regs.rip = at.regs.rip.wrapping_add(length);
            left = left.checked_sub(length)?;
            if zero {
                row.clear();
            }
        }
        Some(row)
    };
    let rows = (1..=(BEFORE * disasm::MAX_LEN) as u64).filter_map(row);
    let length = |row: &Vec<u64>| row.first().map_or(0, |first| rip.wrapping_sub(*first));
    let mut best = rows.max_by_key(length).unwrap_or_default();
    best.split_off(best.len().saturating_sub(BEFORE))
}

/// The registers of the mode.
fn registers(f: &mut fmt::Formatter<'_>, registers: &Registers) -> fmt::Result {
    let Registers { regs, sregs } = registers;
    // What was there in long mode stays in the upper halves.
    let upper = registers.list(false)[..9].iter().any(|&(_, value, _)| value >> 32 != 0);
    let wide = upper || matches!(registers.mode(), Mode::Long | Mode::Compatibility);
    let list = registers.list(wide);
    let (count, row) = if wide { (17, 3) } else { (9, 4) };
    for registers in list[..count].chunks(row) {
        let mut line = String::new();
        for (name, value, digits) in registers {
            write!(line, "  {name:>3} {value:0digits$X}")?;
        }
        writeln!(f, "{line}")?;
    }
    for (name, value, names) in [
        ("rflags", regs.rflags, RFLAGS),
        ("cr0", sregs.cr0, CR0),
        ("cr4", sregs.cr4, CR4),
        ("efer", sregs.efer, EFER),
    ] {
        wrapped(f, &format!("  {name} {value:08X} "), &Bits(value, names).to_string())?;
    }
    writeln!(f, "  cr2 {:08X}  cr3 {:08X}", sregs.cr2, sregs.cr3)?;
    for (name, segment) in &registers.segments()[..7] {
        let selector = segment.selector;
        match registers.mode() {
            Mode::Real => {
                writeln!(f, "  {name} {selector:04X}  base {:#x}", segment.base)?;
            }
            _ if segment.unusable != 0 => writeln!(f, "  {name} {selector:04X}  null")?,
            _ => {
                let text = Segment::loaded(segment).to_string();
                wrapped(f, &format!("  {name} {selector:04X}  "), &text)?;
            }
        }
    }
    Ok(())
}
