//! Stage 06: long mode, and a kernel. How a guest gets there, and what interrupts, exceptions and rings do in it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::time::Duration;

use anyhow::Result;

use super::criteria;
use crate::look::Look;
use crate::program::{Program, Ran};
use crate::witness::guest::{Guest, Regs, Sregs};
use crate::witness::record::{Exit, What};

criteria![
    the_climb_passes_every_mode,
    the_host_enters_long_mode,
    a_kernel_is_loaded_as_its_file_says,
    the_kernel_is_told_where_memory_is,
    exceptions_are_caught,
    the_timer_interrupts_without_an_exit,
    the_serial_port_interrupts,
    ring_3_is_entered_and_left,
    a_shell_outlives_its_programs,
    a_guest_that_dies_is_explained,
];

const COM1: u16 = 0x3F8;
const DEBUG_EXIT: u16 = 0xF4;
/// Where a kernel may be loaded (guests/kernel/abi/src/boot.rs).
const KERNEL: std::ops::Range<u64> = 0x10_0000..0x20_0000;

/// A part of a kernel's file, and where it belongs in memory.
struct Segment {
    addr: u64,
    bytes: Vec<u8>,
}

/// An ELF64 file with these segments, which are mixed with bytes that belong nowhere.
fn elf(look: &mut Look, entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // an executable for x86-64
    file.extend(entry.to_le_bytes());
    file.extend(64_u64.to_le_bytes()); // the program headers follow this one
    file.extend([0; 12]);
    file.extend([64, 0, 56, 0, segments.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
    let mut bytes = Vec::new();
    for Segment { addr, bytes: part } in segments {
        let len = look.random(1..300) as usize;
        bytes.extend(look.random_bytes(len));
        let offset = (64 + 56 * segments.len() + bytes.len()) as u64;
        bytes.extend(part);
        let size = part.len() as u64;
        file.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, to be read, written and executed
        // The virtual address is another one: no tables are there yet in which it could stand.
        for field in [offset, addr + 0x4000_0000, *addr, size, size, 1] {
            file.extend(field.to_le_bytes());
        }
    }
    file.extend(bytes);
    file
}

/// A random place for a kernel of so many bytes.
fn place(look: &mut Look, len: usize) -> u64 {
    look.random(KERNEL.start / 4096..(KERNEL.end - len as u64) / 4096) * 4096
}

/// The program with a kernel of the grader's own, and these options; and where the kernel is.
fn with_kernel<'c>(
    look: &mut Look,
    kernel: Vec<u8>,
    options: &[&str],
) -> Result<(Program<'c>, u64)> {
    let addr = place(look, kernel.len());
    let file = elf(look, addr, &[Segment { addr, bytes: kernel }]);
    let mut args: Vec<OsString> = options.iter().map(OsString::from).collect();
    args.extend(["--kernel".into(), look.file("kernel", file)?.into()]);
    Ok((look.program(&args), addr))
}

/// `asm/criteria/kernel_entry.asm` with a text and the code with which it ends.
fn kernel_entry(text: &str, code: u8) -> Vec<u8> {
    let mut kernel = asm::criteria::KERNEL_ENTRY.to_vec();
    kernel[8..8 + text.len()].copy_from_slice(text.as_bytes());
    kernel[40..44].copy_from_slice(&u32::from(code).to_le_bytes());
    kernel[44..48].copy_from_slice(&(text.len() as u32).to_le_bytes());
    kernel
}

/// Registers at the exits for a port, in their order.
fn states(program: Program<'_>, port: u16, look: &mut Look) -> Result<(Ran, Vec<(Regs, Sregs)>)> {
    let states = RefCell::new(Vec::new());
    let ran = program
        .at_exit(|exit, guest| {
            if exit.out(port).is_some() {
                states.borrow_mut().push((guest.regs()?, guest.sregs()?));
            }
            Ok(())
        })
        .run(look)?;
    Ok((ran, states.into_inner()))
}

/// Walks the four levels of tables in guest memory: where an address leads, and the bits that all levels have.
fn walk(guest: &Guest<'_>, cr3: u64, addr: u64) -> Option<(u64, u64)> {
    let (mut table, mut rights) = (cr3 & !0xFFF, u64::MAX);
    for shift in [39, 30, 21, 12] {
        let entry = guest.read_u64(table + (addr >> shift & 0x1FF) * 8).ok()?;
        if entry & 1 == 0 {
            return None;
        }
        rights &= entry;
        table = entry & 0x000F_FFFF_FFFF_F000;
        let large = shift != 39 && entry & 0x80 != 0;
        if large || shift == 12 {
            let within = (1 << shift) - 1;
            return Some((table & !within | addr & within, rights));
        }
    }
    None
}

/// Bits of the tables' entries.
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;

/// An entry of the IDT: the handler's address, its IST, and the ring from which INT may use it.
fn gate(guest: &Guest<'_>, sregs: &Sregs, vector: u64) -> Option<(u64, u8, u8)> {
    let at = walk(guest, sregs.cr3, sregs.idt.base + vector * 16)?.0;
    let bytes = guest.read(at, 16).ok()?;
    let part = |range: std::ops::Range<usize>| {
        bytes[range].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    };
    let handler = part(0..2) | part(6..8) << 16 | part(8..12) << 32;
    (bytes[5] & 0x80 != 0).then_some((handler, bytes[4] & 7, bytes[5] >> 5 & 3))
}

fn the_climb_passes_every_mode(look: &mut Look) -> Result<()> {
    let kib = look.random(16 << 8..256 << 8) * 4;
    let program = look.program(&["climb", "--memory", &format!("{kib}K")]);
    let (ran, states) = states(program, COM1, look)?;
    look.wants_code(0, &ran);
    let ram: u64 = ran.slots().iter().map(|slot| slot.size).sum();
    look.wants_same("RAM as asked for", kib << 10, ram);
    let mut modes: Vec<(&str, u64)> = Vec::new();
    for (_, sregs) in &states {
        let pae = sregs.cr4 & 1 << 5 != 0;
        let mode = match (sregs.protected(), sregs.paging(), sregs.long()) {
            (false, ..) => "real mode",
            (true, false, _) => "protected mode",
            (true, true, false) if !pae => "32-bit paging",
            (true, true, false) => "PAE paging",
            (true, true, true) if sregs.cs.l == 1 => "long mode",
            _ => "compatibility mode",
        };
        if modes.last().map(|last| last.0) != Some(mode) {
            modes.push((mode, sregs.cr3));
        }
    }
    let steps = ["real mode", "protected mode", "32-bit paging", "PAE paging", "long mode"];
    let names: Vec<_> = modes.iter().map(|mode| mode.0).collect();
    look.wants_same("the modes in which it printed", steps.to_vec(), names);
    let tables: BTreeSet<_> = modes.iter().skip(2).map(|mode| mode.1).collect();
    look.wants_same("tables of its own for each kind of paging", 3, tables.len());
    for (mode, cr3) in modes {
        let cr3 = format!("cr3 {cr3:05x}");
        let row = ran.err().lines().any(|line| line.starts_with(mode) && line.contains(&cr3));
        look.wants(format!("the table has {mode} with {cr3}"), row);
    }
    Ok(())
}

fn the_host_enters_long_mode(look: &mut Look) -> Result<()> {
    let text = look.random_word(20);
    let code = look.random(0..256) as u8;
    let addrs: Vec<u64> = (0..64).map(|_| look.random(..4 << 30)).collect();
    let (program, _) = with_kernel(look, kernel_entry(&text, code), &[])?;
    let first = RefCell::new(None);
    let ran = program
        .at_exit(|_, guest| {
            if first.borrow().is_none() {
                let (regs, sregs) = (guest.regs()?, guest.sregs()?);
                let astray = addrs.iter().filter_map(|&addr| {
                    let to = walk(guest, sregs.cr3, addr);
                    let itself =
                        to.is_some_and(|(to, rights)| to == addr && rights & WRITABLE != 0);
                    (!itself).then(|| format!("{addr:#x} leads to {to:x?}"))
                });
                let astray: Vec<_> = astray.collect();
                *first.borrow_mut() = Some((regs, sregs, astray));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(i32::from(code != 0), &ran);
    let (regs, sregs, astray) = look.needs("an exit of the kernel", first.take())?;
    look.wants_near("64 addresses below 4 GiB lead to themselves", astray.is_empty(), &astray);
    look.wants("long mode at its first exit", sregs.long() && sregs.paging());
    look.wants_same("a 64-bit code segment (L, not D)", (1, 0), (sregs.cs.l, sregs.cs.db));
    look.wants_same("ring 0", 0, sregs.ring());
    look.wants_same("interrupts off", 0, regs.rflags & 1 << 9);
    // No instruction of the guest did that: the host has set all of it at once.
    let set = ran.obeyed("KVM_SET_SREGS").last();
    let set = look.needs("KVM_SET_SREGS", set)?;
    let has = |at: usize, bits: u64| set.u64(at) & bits == bits;
    // `struct kvm_sregs`: ten segments and tables come before the control registers.
    look.wants("with CR0.PE and PG", has(224, 1 << 31 | 1));
    look.wants("with CR4.PAE", has(248, 1 << 5));
    look.wants("with EFER.LME and LMA", has(264, 1 << 10 | 1 << 8));
    let cpuid = ran.obeyed("KVM_SET_CPUID2").next();
    look.wants("after KVM_SET_CPUID2", cpuid.is_some_and(|cpuid| cpuid.at < set.at));
    look.wants_same("what it printed", text.as_bytes().to_vec(), ran.written(COM1));
    look.wants("on stdout, too", ran.stdout.starts_with(text.as_bytes()));
    // It gets there only if the GDT has the segments that the host has put into CS and SS.
    let ends = |exit: &Exit| exit.out(DEBUG_EXIT).map(<[u8]>::to_vec);
    look.wants_same("CS loads again, and it ends", Some(vec![code]), {
        ran.exits().iter().find_map(ends)
    });
    look.forbids("a triple fault", ran.exits().iter().any(|exit| exit.what == What::Shutdown));
    Ok(())
}

fn a_kernel_is_loaded_as_its_file_says(look: &mut Look) -> Result<()> {
    let (text, code) = (look.random_word(12), look.random(0..256) as u8);
    // Code in the middle of the second segment; data in the others.
    let before = look.random(1..2000) as usize;
    let mut middle = look.random_bytes(before);
    middle.extend(kernel_entry(&text, code));
    let mut segments = Vec::new();
    for (index, page) in look.random_set(3, 0..14).into_iter().enumerate() {
        let addr = KERNEL.start + page * 0x1_1000 + look.random(0..4096);
        let len = look.random(1..40_000) as usize;
        let bytes = if index == 1 { middle.clone() } else { look.random_bytes(len) };
        segments.push(Segment { addr, bytes });
    }
    let entry = segments[1].addr + before as u64;
    let file = elf(look, entry, &segments);
    let path = look.file("kernel", &file)?;
    let seen = RefCell::new(None);
    let ran = look
        .program(&["--kernel".as_ref(), path.as_os_str()])
        .at_exit(|_, guest| {
            if seen.borrow().is_none() {
                let parts = segments.iter().map(|part| guest.read(part.addr, part.bytes.len()));
                *seen.borrow_mut() = Some((parts.collect::<Result<Vec<_>>>()?, guest.regs()?.rip));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(i32::from(code != 0), &ran);
    look.wants_same("what it printed", text.as_bytes().to_vec(), ran.written(COM1));
    let (parts, rip) = look.needs("an exit of the kernel", seen.take())?;
    for (index, (segment, part)) in segments.iter().zip(&parts).enumerate() {
        // The kernel keeps a few words in its own segment.
        let same = segment.bytes.iter().zip(part).filter(|(a, b)| a == b).count();
        let len = segment.bytes.len();
        let changed = if index == 1 { 300 } else { 0 };
        let text = format!("{len} bytes of a segment at {:#x}", segment.addr);
        look.wants(text, same + changed >= len);
    }
    look.wants("it runs there", (entry..entry + 400).contains(&rip));

    // A file that ends early, and one whose segment lies beyond what a kernel may have.
    let cut = file.len() - look.random(1..200) as usize;
    let cut = look.file("cut", &file[..cut])?;
    let ran = look.program(&["--kernel".as_ref(), cut.as_os_str()]).run(look)?;
    look.wants_refusal(2, "truncated", &ran);
    let addr = KERNEL.end - look.random(1..16);
    let outside = elf(look, addr, &[Segment { addr, bytes: vec![0xF4; 16] }]);
    let outside = look.file("outside", outside)?;
    let ran = look.program(&["--kernel".as_ref(), outside.as_os_str()]).run(look)?;
    look.wants_refusal(2, &format!("{addr:#x}"), &ran);
    Ok(())
}

fn the_kernel_is_told_where_memory_is(look: &mut Look) -> Result<()> {
    let kib = look.random(16 << 8..256 << 8) * 4;
    let memory = format!("{kib}K");
    for (way, loader) in [("host", 1), ("climb", 2)] {
        let text = look.random_word(12);
        let options = ["--memory", &memory, "--enter", way];
        let (program, addr) = with_kernel(look, kernel_entry(&text, 0), &options)?;
        let seen = RefCell::new(None);
        let ran = program
            .at_exit(|exit, guest| {
                if exit.out(DEBUG_EXIT).is_some() {
                    // The kernel has kept RDI.
                    let info = guest.read_u64(addr + 48)?;
                    let magic = guest.read(info, 8)?;
                    let (map, count) = (guest.read_u64(info + 8)?, guest.read_u32(info + 16)?);
                    let entries = (0..u64::from(count.min(32))).map(|index| {
                        let at = map + index * 24;
                        Ok((guest.read_u64(at)?, guest.read_u64(at + 8)?, guest.read_u32(at + 16)?))
                    });
                    let entries = entries.collect::<Result<Vec<_>>>()?;
                    *seen.borrow_mut() = Some((magic, guest.read_u32(info + 20)?, entries));
                }
                Ok(())
            })
            .run(look)?;
        look.wants_code(0, &ran);
        let (magic, by, map) = look.needs(format!("boot info in RDI, by {way}"), seen.take())?;
        look.wants_same("its magic number", b"mini-kvm".to_vec(), magic);
        look.wants_same("who has loaded it", loader, by);
        let near: Vec<_> =
            map.iter().map(|(base, len, kind)| format!("{base:#x}: {len:#x}, {kind}")).collect();
        let ram = || map.iter().filter(|entry| entry.2 == 1);
        let high = ram().any(|&(base, len, _)| (base, base + len) == (1 << 20, kib << 10));
        look.wants_near("RAM from 1 MiB to the end of memory", high, &near);
        let low = ram().any(|&(base, len, _)| base == 0 && (0x8_0000..=0xA_0000).contains(&len));
        look.wants_near("and low RAM", low, &near);
        let firmware = ram().any(|&(base, len, _)| base < 1 << 20 && base + len > 0xA_0000);
        look.forbids("RAM where video card and firmware are", firmware);
    }
    Ok(())
}

fn exceptions_are_caught(look: &mut Look) -> Result<()> {
    // The gates, and how each report of the guest fits what the processor has: by the exit that ends its line.
    let line = RefCell::new(String::new());
    let seen = RefCell::new((Vec::new(), None));
    let ran = look
        .program(&["exceptions"])
        .at_exit(|exit, guest| {
            let Some(bytes) = exit.out(COM1) else { return Ok(()) };
            line.borrow_mut().push_str(&String::from_utf8_lossy(bytes));
            if !line.borrow().ends_with('\n') {
                return Ok(());
            }
            let line = line.take();
            let sregs = guest.sregs()?;
            let number = |name: &str| {
                let (_, rest) = line.split_once(name)?;
                u64::from_str_radix(rest.get(..16)?, 16).ok()
            };
            let (mut seen, numbers) = (seen.borrow_mut(), (number("rip "), number("cr2 ")));
            if let (Some(rip), Some(cr2)) = numbers {
                let before = guest.read(rip - 1, 4)?;
                seen.0.push((before, number("error code "), cr2 == sregs.cr2, cr2));
                let tss = guest.read_u64(sregs.tr.base + 36)?; // IST 1
                let gates = [0, 3, 6, 13, 14, 8].map(|vector| gate(guest, &sregs, vector));
                seen.1 = Some((gates, tss));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let (reports, tables) = seen.into_inner();
    look.wants_same("reports", 6, reports.len());
    let (gates, ist1) = look.needs("tables of the guest's", tables)?;
    look.wants("a gate for each of the six vectors", gates.iter().all(Option::is_some));
    let ist = gates[5].map(|gate| gate.1);
    look.wants_same("the double fault has a stack of its own (IST 1)", Some(1), ist);
    look.wants("which the TSS names", ist1 != 0);
    let codes = [(1, &[0xF7][..]), (0, &[0xCC]), (1, &[0x0F, 0x0B]), (1, &[0x8E])];
    let whats = ["a division", "a breakpoint", "UD2", "a load of a segment"];
    for ((what, (at, code)), report) in whats.iter().zip(codes).zip(&reports) {
        look.wants(format!("the reported RIP is at {what}"), report.0[at..].starts_with(code));
    }
    look.wants("the reported CR2 is the processor's", reports.iter().all(|report| report.2));
    let writes = reports.get(4).and_then(|report| report.1);
    look.wants_same("error code of a write to no page", Some(2), writes);
    look.wants("and its address", reports.get(4).is_some_and(|report| report.3 != 0));
    look.forbids("a triple fault", ran.exits().iter().any(|exit| exit.what == What::Shutdown));
    Ok(())
}

/// No exit for HLT or for the ports of the PICs and the PIT.
fn forbids_exits_of_the_irqchip(look: &mut Look, ran: &Ran) {
    look.forbids("an exit for HLT", ran.exits().iter().any(|exit| exit.is_hlt()));
    let theirs = |port: u16| matches!(port, 0x20 | 0x21 | 0xA0 | 0xA1 | 0x40..0x44);
    let seen = ran.exits().iter().any(|exit| match exit.what {
        What::In { port, .. } | What::Out { port, .. } => theirs(port),
        _ => false,
    });
    look.forbids("an exit for a port of the PICs or the timer", seen);
}

fn the_timer_interrupts_without_an_exit(look: &mut Look) -> Result<()> {
    // A kernel of the grader's: vectors, frequency, number of ticks and what it prints are random.
    let (wanted, vectors) = (look.random(5..30) as u8, look.random(4..30) as u8 * 8);
    let text = look.random_word(32);
    let mut kernel = asm::criteria::KERNEL_TICKS.to_vec();
    kernel[8..10].copy_from_slice(&[vectors, wanted]);
    kernel[10..12].copy_from_slice(&(look.random(6000..24_000) as u16).to_le_bytes());
    kernel[12..44].copy_from_slice(text.as_bytes());
    let (program, _) = with_kernel(look, kernel, &[])?;
    let program = program.patience(Duration::from_secs(30));
    let (ran, states) = states(program, COM1, look)?;
    look.wants_code(0, &ran);
    let made = |name: &str| ran.obeyed(name).next().map(|call| call.at);
    let order = [made("KVM_CREATE_IRQCHIP"), made("KVM_CREATE_PIT2"), made("KVM_CREATE_VCPU")];
    look.wants("irqchip, PIT and vCPU, in this order", order[0].is_some() && order.is_sorted());
    let slots = ran.slots();
    look.wants("after the memory", slots.iter().all(|slot| Some(slot.at) < order[0]));
    let printed = text.as_bytes()[..wanted.into()].to_vec();
    look.wants_same("a byte for each tick", printed, ran.written(COM1));
    look.wants("each from a handler, with interrupts off", {
        states.iter().all(|(regs, sregs)| regs.rflags & 1 << 9 == 0 && sregs.long())
    });
    forbids_exits_of_the_irqchip(look, &ran);

    let ran = look.program(&["interrupts"]).patience(Duration::from_secs(30)).run(look)?;
    look.wants_code(0, &ran);
    // On a slow host one or two more have come before it looks again.
    let dots = ran.written(COM1).iter().filter(|byte| **byte == b'.').count();
    look.wants("ten ticks of the guest that comes with the stage", dots >= 10);
    forbids_exits_of_the_irqchip(look, &ran);
    Ok(())
}

fn the_serial_port_interrupts(look: &mut Look) -> Result<()> {
    // More than the port's queue has room for. Ctrl-A is the monitor's.
    let len = look.random(200..400) as u16;
    let input: Vec<u8> = (0..len).map(|_| look.random(0x20..0x7F) as u8).collect();
    let (key, vectors) = (look.random(1..128) as u8, look.random(4..30) as u8 * 8);
    let mut kernel = asm::criteria::KERNEL_SERIAL.to_vec();
    kernel[8..10].copy_from_slice(&[vectors, key]);
    kernel[10..12].copy_from_slice(&len.to_le_bytes());
    let (program, _) = with_kernel(look, kernel, &[])?;
    let program = program.stdin(input.clone()).hold_stdin();
    let ran = program.patience(Duration::from_secs(30)).run(look)?;
    look.wants_code(0, &ran);
    let lines: Vec<_> = ran.obeyed("KVM_IRQFD").map(|call| call.u32(4)).collect();
    look.wants_near("an irqfd on line 4", lines.contains(&4), &[format!("irqfds: {lines:?}")]);
    let mut listens = false;
    let (mut early, mut got) = (false, Vec::<u8>::new());
    for exit in ran.exits() {
        match &exit.what {
            What::Out { port, data, .. } if *port == COM1 + 1 => listens |= data[0] & 1 == 1,
            What::In { port, data, .. } if *port == COM1 + 5 && !listens => {
                early |= data.first().is_some_and(|status| status & 1 == 1);
            }
            What::In { port: COM1, data, .. } => got.extend(data),
            _ => {}
        }
    }
    look.forbids("a byte for a kernel that does not listen yet", early);
    look.wants("every byte of stdin in its turn", got == input);
    let sent: Vec<_> = input.iter().map(|byte| byte ^ key).collect();
    look.wants("every byte sent back", ran.written(COM1) == sent);
    look.wants("on stdout", ran.stdout == sent);
    forbids_exits_of_the_irqchip(look, &ran);
    Ok(())
}

/// Where ring 3 was interrupted, if a frame of that stands on the stack: the bytes there and before.
fn frame_of_ring_3(guest: &Guest<'_>, regs: &Regs, sregs: &Sregs) -> Option<(u64, u64)> {
    let at = |addr: u64| guest.read_u64(walk(guest, sregs.cr3, addr)?.0).ok();
    // RIP, CS, RFLAGS, RSP, SS; what the handler has pushed, and an error code, come before.
    (0..16).find_map(|slot| {
        let frame = regs.rsp + slot * 8;
        let [rip, cs, flags, ss] = [0, 8, 16, 32].map(|offset| at(frame + offset));
        let (rip, cs, flags, ss) = (rip?, cs?, flags?, ss?);
        let user = cs & 3 == 3 && ss & 3 == 3 && cs < 0x100 && ss < 0x100 && flags & 2 != 0;
        let (phys, rights) = walk(guest, sregs.cr3, rip)?;
        (user && rights & USER != 0).then_some((rip, phys))
    })
}

fn ring_3_is_entered_and_left(look: &mut Look) -> Result<()> {
    let seen = RefCell::new(Vec::<(String, Vec<u8>)>::new());
    let kernel_is_open = RefCell::new(false);
    let ran = look
        .program(&["rings"])
        .at_exit(|exit, guest| {
            if exit.out(COM1).is_none() && exit.out(DEBUG_EXIT).is_none() {
                return Ok(());
            }
            let (regs, sregs) = (guest.regs()?, guest.sregs()?);
            let open =
                walk(guest, sregs.cr3, regs.rip).is_none_or(|(_, rights)| rights & USER != 0);
            *kernel_is_open.borrow_mut() |= open || sregs.cs.selector & 3 != 0;
            let mut seen = seen.borrow_mut();
            if let Some((_, phys)) = frame_of_ring_3(guest, &regs, &sregs) {
                seen.push(("frame".into(), guest.read(phys - 2, 3)?));
            }
            // SYSCALL leaves the address behind itself in RCX, which the handler keeps on its stack while it prints.
            for slot in 0..4 {
                let at = walk(guest, sregs.cr3, regs.rsp + slot * 8).map(|to| to.0);
                let rcx = at.and_then(|at| guest.read_u64(at).ok()).unwrap_or(0);
                let user = walk(guest, sregs.cr3, rcx).filter(|(_, rights)| rights & USER != 0);
                if let Some((phys, _)) = user
                    && phys >= 2
                {
                    seen.push(("syscall".into(), guest.read(phys - 2, 3)?));
                }
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let seen = seen.into_inner();
    let near: Vec<_> = seen.iter().map(|(what, bytes)| format!("{what}: {bytes:02x?}")).collect();
    let mut wants = |text: &str, what: &str, code: &[u8], at: usize| {
        let found = seen.iter().any(|(kind, bytes)| kind == what && bytes[at..].starts_with(code));
        look.wants_near(text, found, &near);
    };
    wants("in ring 0 from SYSCALL of ring 3", "syscall", &[0x0F, 0x05], 0);
    wants("in ring 0 from INT 80h of ring 3", "frame", &[0xCD, 0x80], 0);
    wants("in ring 0 from a fault at HLT in ring 3", "frame", &[0xF4], 2);
    look.forbids("kernel code that ring 3 may touch", kernel_is_open.into_inner());
    look.forbids("HLT of ring 3 obeyed", ran.exits().iter().any(|exit| exit.is_hlt()));
    Ok(())
}

fn a_shell_outlives_its_programs(look: &mut Look) -> Result<()> {
    let (a, b) = (look.random(1000..99_999), look.random(1000..99_999));
    let word = look.random_word(9);
    let script = format!("ring\ncrash null\ncalc {a}*{b}\ncrash out\necho {word} {word}\n");
    let tables = RefCell::new(BTreeSet::new());
    let shares = RefCell::new(false);
    let last = RefCell::new(0);
    let ran = look
        .program::<&str>(&[])
        .stdin(script)
        .patience(Duration::from_secs(60))
        .at_exit(|exit, guest| {
            // A look now and then is enough: registers take time.
            if exit.at >= *last.borrow() + 40 {
                *last.borrow_mut() = exit.at;
                let (regs, sregs) = (guest.regs()?, guest.sregs()?);
                tables.borrow_mut().insert(sregs.cr3);
                let own = walk(guest, sregs.cr3, regs.rip).filter(|(_, rights)| rights & USER != 0);
                *shares.borrow_mut() |= own.is_some() && sregs.idt.base >= KERNEL.start;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let printed = String::from_utf8_lossy(&ran.written(COM1)).replace('\r', "");
    look.wants_in("computed in the guest", &format!("\n{}\n", a * b), &printed);
    look.wants_in("echoed", &format!("\n{word} {word}\n"), &printed);
    look.wants_in("ring 3", "CS is 0x23", &printed);
    let killed = printed.matches(": killed").count();
    look.wants_same("programs that were killed", 2, killed);
    look.wants("address spaces of their own", tables.borrow().len() > 2);
    look.forbids("kernel code that programs may touch", shares.into_inner());
    look.wants("the kernel ends the machine", ran.written(DEBUG_EXIT) == [0]);
    // Before that, the port's speed has been set.
    let given = ran.written(COM1);
    look.wants("stdout is what the port was given", {
        !ran.stdout.is_empty() && given.ends_with(&ran.stdout)
    });
    Ok(())
}

fn a_guest_that_dies_is_explained(look: &mut Look) -> Result<()> {
    // mov rbx, a random number; then an instruction that does not exist, and no IDT.
    let rbx = look.random(1 << 60..);
    let mut kernel = vec![0x48, 0xBB];
    kernel.extend(rbx.to_le_bytes());
    kernel.extend([0x0F, 0x0B]);
    let (program, _) = with_kernel(look, kernel, &[])?;
    let ran = program.run(look)?;
    look.wants_code(1, &ran);
    look.wants("KVM_EXIT_SHUTDOWN", ran.exits().iter().any(|exit| exit.what == What::Shutdown));
    let err = ran.err();
    look.wants_in("what happened", "triple fault", &err);
    look.wants_in("the cause", "invalid opcode (#UD)", &err);
    look.wants_in("a register", &format!("rbx {rbx:016X}"), &err);
    look.forbids("anything on stdout", !ran.stdout.is_empty());
    // The guest's own word for a bad end.
    let code = look.random(1..256) as u8;
    let text = look.random_word(8);
    let ran = with_kernel(look, kernel_entry(&text, code), &[])?.0.run(look)?;
    look.wants_code(1, &ran);
    look.wants_in("the guest's code", &format!("code {code}"), &ran.err());
    // One that halts with interrupts off never ends by itself.
    let ran = with_kernel(look, vec![0xFA, 0xF4, 0xEB, 0xFC], &["--timeout", "1"])?.0.run(look)?;
    look.wants_code(4, &ran);
    look.forbids("an exit for HLT", ran.exits().iter().any(|exit| exit.is_hlt()));
    Ok(())
}
