//! Stage 05: memory-mapped I/O. What a guest did where no memory is, and what it was answered.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::record::{SetSlot, What};

criteria![
    a_program_finds_ram_a_hole_and_a_rom,
    a_rom_is_read_without_an_exit_and_never_written,
    interrupt_controllers_are_in_kvm,
    registers_keep_what_is_written,
    an_access_across_pages_is_two,
    where_nobody_is_ones_are_read,
    the_text_screen_is_drawn,
    the_doorbell_is_answered_by_an_interrupt,
    writes_can_be_gathered_or_counted,
    the_trace_tells_each_access,
];

/// Where programs are put, and what the README's table has.
const PROGRAM: u64 = 0x1000;
const SCRATCH: u64 = 0xA_0000;
const SCRATCH_END: u64 = 0xA_2000;
const SCREEN: u64 = 0xB_8000;
const SCREEN_END: u64 = SCREEN + 80 * 25 * 2;
const BELL: u64 = 0xD_0000;
const ROM: u64 = 0xF_0000;

/// By this port a guest ends.
const DEBUG_EXIT: u16 = 0xF4;

/// The entries of the list of `asm/criteria/accesses.asm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    size: u64,
    write: bool,
    addr: u64,
    value: u64,
}

fn read(size: u64, addr: u64) -> Access {
    Access { size, write: false, addr, value: 0 }
}

fn write(look: &mut Look, size: u64, addr: u64) -> Access {
    Access { size, write: true, addr, value: look.random(..) & ones(size) }
}

/// All ones in so many bytes.
fn ones(size: u64) -> u64 {
    u64::MAX >> (64 - size * 8)
}

/// A program that does them.
fn program(accesses: &[Access]) -> Vec<u8> {
    let mut program = asm::criteria::ACCESSES.to_vec();
    for Access { size, write, addr, value } in accesses {
        program.extend([*size as u8, u8::from(*write), 0, 0]);
        program.extend((*addr as u32).to_le_bytes());
        program.extend(value.to_le_bytes());
    }
    program.extend([0; 16]);
    program
}

/// A run of such a program.
struct Accessed {
    ran: Ran,
    /// What each access read; what it wrote, if it did.
    values: Vec<u64>,
    /// What stood at the end of the RAM and in the ROM when it ended.
    ram: Vec<u8>,
    rom: Vec<u8>,
}

/// Runs it with these options.
fn access(look: &mut Look, options: &[&str], accesses: &[Access]) -> Result<Accessed> {
    let file = look.file("accesses.bin", program(accesses))?;
    let mut args: Vec<_> = options.iter().map(std::ffi::OsString::from).collect();
    args.push(file.into());
    let seen = RefCell::new((Vec::new(), Vec::new(), Vec::new()));
    let ran = look
        .program(&args)
        .at_exit(|exit, guest| {
            if exit.out(DEBUG_EXIT).is_some() {
                let list = PROGRAM + asm::criteria::ACCESSES.len() as u64;
                let list = guest.read(list, accesses.len() * 16)?;
                let value = |entry: &[u8]| u64::from_le_bytes(entry[8..16].try_into().unwrap());
                let values = list.chunks(16).map(value).collect();
                *seen.borrow_mut() = (values, guest.read(0x9_FFF0, 16)?, guest.read(ROM, 256)?);
            }
            Ok(())
        })
        .run(look)?;
    let (values, ram, rom) = seen.into_inner();
    Ok(Accessed { ran, values, ram, rom })
}

impl Accessed {
    /// The accesses that left the guest, each with its bytes: what was written or answered.
    fn exits(&self) -> Vec<Access> {
        let number =
            |data: &[u8]| data.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let exits = self.ran.exits().iter().filter_map(|exit| match &exit.what {
            What::Read { addr, data } => Some((false, *addr, data)),
            What::Write { addr, data } => Some((true, *addr, data)),
            _ => None,
        });
        exits
            .map(|(write, addr, data)| Access {
                size: data.len() as u64,
                write,
                addr,
                value: number(data),
            })
            .collect()
    }

    /// What the guest read last at this address.
    fn last_read(&self, accesses: &[Access], addr: u64) -> Option<u64> {
        let at = accesses.iter().rposition(|access| access.addr == addr && !access.write)?;
        self.values.get(at).copied()
    }
}

/// What is to be seen of accesses to bytes that keep what is written to them, and are zero before: each with its value.
fn kept(accesses: &[Access]) -> Vec<Access> {
    let mut bytes = BTreeMap::new();
    accesses
        .iter()
        .map(|access| {
            let mut value = 0;
            for at in 0..access.size {
                let byte = bytes.entry(access.addr + at).or_insert(0);
                if access.write {
                    *byte = access.value >> (at * 8) & 0xFF;
                }
                value |= *byte << (at * 8);
            }
            Access { value, ..*access }
        })
        .collect()
}

/// The same accesses as KVM hands them over: in pieces that lie in one page each, without those to memory.
fn pieces(accesses: &[Access]) -> Vec<Access> {
    let in_pages = accesses.iter().flat_map(|access| {
        let first = access.size.min(4096 - access.addr % 4096);
        let piece = |from: u64, size: u64| Access {
            size,
            addr: access.addr + from,
            value: access.value.checked_shr(from as u32 * 8).unwrap_or(0) & ones(size.max(1)),
            ..*access
        };
        [piece(0, first), piece(first, access.size - first)]
    });
    in_pages.filter(|piece| piece.size > 0 && piece.addr >= SCRATCH).collect()
}

fn lines(accesses: &[Access]) -> Vec<String> {
    accesses.iter().map(|access| format!("{access:x?}")).collect()
}

fn a_program_finds_ram_a_hole_and_a_rom(look: &mut Look) -> Result<()> {
    let code = look.random(0..256) as u8;
    let len = look.random(1..120) as u8;
    let mut program = vec![0xEB, len]; // jmp over the bytes
    program.extend(look.random_bytes(len.into()));
    program.extend([0xB0, code, 0xE6, DEBUG_EXIT as u8]); // mov al, code; out 0xF4, al
    let tail = look.random(1..5000) as usize;
    program.extend(look.random_bytes(tail));
    let file = look.file("random.bin", &program)?;
    let seen = RefCell::new(None);
    let ran = look
        .program(&[file.as_os_str()])
        .at_exit(|_, guest| {
            let all = guest.read(PROGRAM, program.len())?;
            let (regs, sregs) = (guest.regs()?, guest.sregs()?);
            *seen.borrow_mut() = Some((all, sregs.protected(), sregs.cs.base + regs.rip));
            Ok(())
        })
        .run(look)?;
    look.wants_code(i32::from(code != 0), &ran);
    let (all, protected, rip) = look.needs("an exit of the program", seen.take())?;
    look.wants("the file's bytes at 0x1000", all == program);
    look.wants("it ran there", (PROGRAM..PROGRAM + program.len() as u64).contains(&rip));
    look.forbids("protected mode", protected);
    let ends = |exit: &crate::witness::record::Exit| exit.out(DEBUG_EXIT).map(<[u8]>::to_vec);
    look.wants_same("its byte to port 0xF4", Some(vec![code]), ran.exits().last().and_then(ends));

    let slots: Vec<_> = ran.slots().into_iter().filter(|slot| slot.result.is_ok()).collect();
    let inside = |from: u64, to: u64| slots.iter().any(|slot| slot.start < to && slot.end() > from);
    look.wants("RAM up to 0xA0000", (0..0xA0).all(|page| inside(page << 12, (page + 1) << 12)));
    look.forbids("a memslot where the devices are", inside(0xA_0000, ROM));
    let rom = slots.iter().find(|slot| slot.start == ROM).copied();
    let rom = look.needs("a memslot at 0xF0000", rom)?;
    look.wants("which is read-only", rom.has(SetSlot::READ_ONLY));

    let more = look.random(1..5000) as usize;
    let big = look.file("big.bin", vec![0; (0xA_0000 - PROGRAM) as usize + more])?;
    let size = (0xA_0000 - PROGRAM + more as u64).to_string();
    let ran = look.program(&[big.as_os_str()]).run(look)?;
    look.wants_refusal(2, &size, &ran);
    Ok(())
}

fn a_rom_is_read_without_an_exit_and_never_written(look: &mut Look) -> Result<()> {
    let places: Vec<_> = look.random_set(4, 0..16).into_iter().zip([1, 2, 4, 8]).collect();
    let places: Vec<_> = places.iter().map(|(at, size)| (ROM + at * 8, *size)).collect();
    let mut accesses: Vec<_> = places.iter().map(|&(addr, size)| read(size, addr)).collect();
    accesses.extend(places.iter().map(|&(addr, size)| write(look, size, addr)));
    accesses.extend(places.iter().map(|&(addr, size)| read(size, addr)));
    let seen = access(look, &[], &accesses)?;
    look.wants_code(0, &seen.ran);
    let exits = seen.exits();
    look.wants_near(
        "an exit for each write, and no other",
        exits == accesses[4..8],
        &lines(&exits),
    );
    look.wants("something stands in the ROM", seen.rom.iter().any(|byte| *byte != 0));
    for (index, (addr, size)) in places.into_iter().enumerate() {
        let mut rom = seen.rom.get((addr - ROM) as usize..).unwrap_or_default().to_vec();
        rom.resize(8, 0);
        let there = u64::from_le_bytes(rom[..8].try_into()?) & ones(size);
        let read = |at: usize| seen.values.get(at).copied();
        look.wants_same(format!("what was read at {addr:#x}"), Some(there), read(index));
        look.wants_same("and after the write", Some(there), read(8 + index));
    }
    Ok(())
}

fn interrupt_controllers_are_in_kvm(look: &mut Look) -> Result<()> {
    // The first PIC's mask is written and read back. Then it sleeps with interrupts off.
    let mask = look.random(1..256) as u8;
    let program = [
        &[0xB0, mask, 0xE6, 0x21, 0x30, 0xC0, 0xE4, 0x21][..], // out 0x21, al; xor al, al; in al, 0x21
        &[0xBA, 0xF8, 0x03, 0xEE, 0xFA, 0xF4],                 // out 0x3F8, al; cli; hlt
    ];
    let file = look.file("mask.bin", program.concat())?;
    let args = ["--timeout".as_ref(), "1".as_ref(), file.as_os_str()];
    let ran = look.program(&args).run(look)?;
    look.wants_code(4, &ran);
    let made = ran.obeyed("KVM_CREATE_IRQCHIP").next();
    let made = look.needs("KVM_CREATE_IRQCHIP", made)?.at;
    let vcpu = ran.obeyed("KVM_CREATE_VCPU").next().map_or(0, |call| call.at);
    look.wants("before the vCPU", made < vcpu);
    let slots = ran.slots();
    look.wants("after the memory", slots.iter().all(|slot| slot.at < made || slot.at > vcpu));
    look.wants_same("the mask that the guest read back", vec![mask], ran.written(0x3F8));
    let at_pic =
        |what: &What| matches!(what, What::In { port: 0x21, .. } | What::Out { port: 0x21, .. });
    look.forbids("an exit for the controller's port", ran.exits().iter().any(|e| at_pic(&e.what)));
    look.forbids("an exit for HLT", ran.exits().iter().any(|exit| exit.is_hlt()));
    Ok(())
}

fn registers_keep_what_is_written(look: &mut Look) -> Result<()> {
    let mut accesses = Vec::new();
    for _ in 0..24 {
        let size = 1 << look.random(0..4);
        // In one page, in whatever alignment.
        let addr = SCRATCH + look.random(0..2) * 4096 + look.random(0..4096 - size);
        accesses.push(write(look, size, addr));
        accesses.push(read(size, addr));
        let near = look.random(0..7);
        accesses.push(read(1, (addr + near).min(SCRATCH_END - 1)));
    }
    let seen = access(look, &[], &accesses)?;
    look.wants_code(0, &seen.ran);
    let wanted = kept(&accesses);
    let values: Vec<_> = wanted.iter().map(|access| access.value).collect();
    look.wants_same("what the guest got", &values, &seen.values);
    let exits = seen.exits();
    let differs = exits.iter().zip(&wanted).position(|(seen, wanted)| seen != wanted);
    let from = differs.unwrap_or(exits.len().min(wanted.len()));
    let near = lines(exits.get(from..).unwrap_or_default());
    look.wants_near("an exit for each access, with its bytes", exits == wanted, &near);
    look.wants_in("the report", &format!("{} for scratch", wanted.len()), &seen.ran.err());
    Ok(())
}

fn an_access_across_pages_is_two(look: &mut Look) -> Result<()> {
    // Between the device's pages, from RAM into the device, and out of its end.
    let ends = [SCRATCH + 4096, SCRATCH, SCRATCH_END];
    let mut accesses = Vec::new();
    for end in ends {
        let addr = end - look.random(1..4);
        accesses.push(write(look, 4, addr));
        accesses.push(read(4, addr));
    }
    let seen = access(look, &[], &accesses)?;
    look.wants_code(0, &seen.ran);
    // Behind the device nobody is: ones are read there.
    let mut wanted = kept(&accesses);
    let past = &mut wanted[5];
    let inside = SCRATCH_END - past.addr;
    past.value |= ones(4) & !ones(inside);
    let values: Vec<_> = wanted.iter().map(|access| access.value).collect();
    look.wants_same("what the guest got", &values, &seen.values);
    let (exits, wanted) = (seen.exits(), pieces(&wanted));
    let near = [vec!["wanted".into()], lines(&wanted), vec!["seen".into()], lines(&exits)];
    look.wants_near("an exit for each piece in a page", exits == wanted, &near.concat());
    let half = &accesses[2];
    let in_ram = (SCRATCH - half.addr) as usize;
    let ram = seen.ram.get(16 - in_ram..).map(<[u8]>::to_vec);
    look.wants_same("the half in RAM", Some(half.value.to_le_bytes()[..in_ram].to_vec()), ram);
    Ok(())
}

fn where_nobody_is_ones_are_read(look: &mut Look) -> Result<()> {
    let mut accesses = Vec::new();
    let holes = [SCRATCH_END..SCREEN, 0xC_0000..BELL, 0xE_0000..ROM];
    for hole in holes.iter().chain(&holes) {
        let size = 1 << look.random(0..4);
        let addr = look.random(hole.start / 8..hole.end / 8) * 8;
        accesses.push(write(look, size, addr));
        accesses.push(read(size, addr));
    }
    let alone = accesses.len();
    // One that lies in part on a device: the screen's last cell, and two bytes more.
    let last = SCREEN_END - 2;
    accesses.push(write(look, 2, last));
    accesses.push(write(look, 4, last));
    accesses.push(read(4, last));
    accesses.push(read(2, last));
    let seen = access(look, &[], &accesses)?;
    look.wants_code(0, &seen.ran);
    for (access, value) in accesses[..alone].iter().zip(&seen.values) {
        if !access.write {
            look.wants_same(format!("ones at {:#x}", access.addr), ones(access.size), *value);
        }
    }
    let at = |index: usize| seen.values.get(alone + index).copied();
    look.wants_same("ones where only half is a device's", Some(ones(4)), at(2));
    look.wants_same("whose bytes are what they were", Some(accesses[alone].value), at(3));
    look.wants_same("an exit for each access", accesses.len(), seen.exits().len());
    look.wants_in("the report", &format!("{} for nobody", alone + 2), &seen.ran.err());
    Ok(())
}

fn the_text_screen_is_drawn(look: &mut Look) -> Result<()> {
    // Codes of code page 437 with their shapes, beside ASCII.
    let shapes = [(0x01, '☺'), (0x80, 'Ç'), (0xB0, '░'), (0xC9, '╔'), (0xE1, 'ß'), (0xFE, '■')];
    let mut picture = vec![vec![' '; 80]; 25];
    let mut accesses = Vec::new();
    for place in look.random_set(24, 0..80 * 25) {
        let (code, shape) = match look.random(0..2) {
            0 => shapes[look.random(0..6) as usize],
            _ => Some(look.random(0x21..0x7F)).map(|code| (code, code as u8 as char)).unwrap(),
        };
        picture[place as usize / 80][place as usize % 80] = shape;
        let addr = SCREEN + place * 2;
        let value = look.random(0..256) << 8 | code;
        accesses.push(Access { size: 2, write: true, addr, value });
        accesses.push(read(2, addr));
        accesses.push(read(1, addr + 1));
    }
    let seen = access(look, &[], &accesses)?;
    look.wants_code(0, &seen.ran);
    let values: Vec<_> = kept(&accesses).iter().map(|access| access.value).collect();
    look.wants_same("the cells that the guest read back", &values, &seen.values);
    look.wants_same("an exit for each access", accesses.len(), seen.exits().len());
    let rows: Vec<String> = picture.iter().map(|row| row.iter().collect()).collect();
    let rows: Vec<_> = rows.iter().map(|row| row.trim_end()).collect();
    let rows = rows.join("\n").trim_end().to_owned();
    let out = seen.ran.out();
    let near: Vec<_> = out.lines().map(str::to_owned).collect();
    look.wants_near("the picture in plain text on stdout", out.trim_end() == rows, &near);
    Ok(())
}

fn the_doorbell_is_answered_by_an_interrupt(look: &mut Look) -> Result<()> {
    // The demo's driver, with other numbers.
    let mut driver = asm::real::DOORBELL.to_vec();
    let table: Vec<u8> =
        [144, 1_000_000, 2, u32::MAX].into_iter().flat_map(u32::to_le_bytes).collect();
    let table = driver.windows(table.len()).position(|window| window == table);
    let table = table.expect("the driver's numbers are these");
    let numbers: Vec<u32> = (1..5).map(|size| look.random(1..1 << (size * 8)) as u32).collect();
    for (index, number) in numbers.iter().enumerate() {
        driver[table + index * 4..][..4].copy_from_slice(&number.to_le_bytes());
    }
    let file = look.file("driver.bin", driver)?;
    let ran = look.program(&[file.as_os_str()]).patience(Duration::from_secs(30)).run(look)?;
    look.wants_code(0, &ran);
    let line = ran.obeyed("KVM_IRQFD").map(|call| call.u32(4)).collect::<Vec<_>>();
    look.wants_near("an irqfd on line 5", line.contains(&5), &[format!("irqfds: {line:?}")]);
    let word = |data: &[u8]| data.try_into().map_or(0, u32::from_le_bytes);
    // Number, ring, result from the interrupt's handler, acknowledgement.
    let said: Vec<_> = ran
        .exits()
        .iter()
        .filter_map(|exit| match &exit.what {
            What::Write { addr, data } if (BELL..BELL + 0x14).contains(addr) => {
                Some((addr - BELL, "write", word(data)))
            }
            What::Read { addr, data } if *addr == BELL + 0x10 => Some((0x10, "read", word(data))),
            _ => None,
        })
        .collect();
    let four = |number: &u32| {
        [(4, "write", *number), (8, "write", 1), (0x10, "read", number.isqrt()), (0xC, "write", 1)]
    };
    let wanted: Vec<_> = numbers.iter().flat_map(four).collect();
    look.wants_same("what driver and device said", wanted, said);
    look.forbids("an exit for HLT", ran.exits().iter().any(|exit| exit.is_hlt()));
    for number in &numbers {
        let text = format!("The root of {number} is {}\n", number.isqrt());
        look.wants_in("on the screen", &text, &ran.out());
    }

    // The same registers without interrupts.
    let number = look.random(2..1 << 32);
    let write = |offset, value| Access { size: 4, write: true, addr: BELL + offset, value };
    let accesses = [
        read(4, BELL),
        write(4, number),
        read(4, BELL + 4),
        write(8, 1),
        read(4, BELL + 0x10),
        write(0xC, 0),
        read(4, BELL + 0xC),
    ];
    let seen = access(look, &[], &accesses)?;
    let got = |offset| seen.last_read(&accesses, BELL + offset);
    look.wants_same("its name", Some(u32::from_le_bytes(*b"ROOT").into()), got(0));
    look.wants_same("the number", Some(number), got(4));
    look.wants_same("its root", Some(number.isqrt()), got(0x10));
    look.wants_same("pending until it is acknowledged", Some(1), got(0xC));
    Ok(())
}

/// The ring of gathered writes as it was at an exit: where the monitor takes the next one, where KVM puts it.
type Ring = (u64, u64);

fn writes_can_be_gathered_or_counted(look: &mut Look) -> Result<()> {
    const ENTRIES: u64 = (4096 - 8) / 24;
    // A guest that exits with each write ends after so many: what follows its instruction becomes NOPs and its end.
    let some = look.random(100..400) as usize;
    let end = [&[0x90; 60][..], &[0xB0, 0, 0xE6, DEBUG_EXIT as u8]].concat();
    // By VM: how often it has written, and its ring, which is two pages behind `struct kvm_run`, at each exit.
    let machines = RefCell::new(BTreeMap::<usize, (usize, Vec<Ring>)>::new());
    let ran = look
        .program(&["compare"])
        .at_exit(|exit, guest| {
            let mut machines = machines.borrow_mut();
            let (writes, rings) = machines.entry(exit.vm).or_default();
            let ring = guest.run_page(2 * 4096, 8)?;
            let half = |at: usize| u32::from_le_bytes(ring[at..at + 4].try_into().unwrap()).into();
            rings.push((half(0), half(4)));
            *writes += usize::from(matches!(exit.what, What::Write { addr: SCRATCH, .. }));
            if *writes == some {
                let rip = guest.regs()?.rip;
                guest.write(rip, &end)?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let vm_of = |name: &str, place: usize| {
        let calls = ran.obeyed(name).filter(|call| call.u64(place) == SCRATCH);
        calls.filter_map(|call| call.on.vm()).collect::<Vec<_>>()
    };
    let gathered = vm_of("KVM_REGISTER_COALESCED_MMIO", 0);
    let counted = vm_of("KVM_IOEVENTFD", 8);
    let machines = machines.into_inner();
    let exits = |vm: usize| machines.get(&vm).map_or(0, |machine| machine.0);
    let plain = (0..ran.vms()).find(|vm| !gathered.contains(vm) && !counted.contains(vm));
    let plain = look.needs("a machine without either", plain)?;
    look.wants_same("exits until it was ended", some, exits(plain));

    let vm =
        *look.needs("a machine that gathers (KVM_REGISTER_COALESCED_MMIO)", gathered.first())?;
    let there = machines.get(&vm).map(|machine| machine.1.clone()).unwrap_or_default();
    let near: Vec<_> = there.iter().map(|(first, last)| format!("{first} to {last}")).collect();
    let in_ring: u64 = there.iter().map(|(first, last)| (last + ENTRIES - first) % ENTRIES).sum();
    look.wants_same("5000 writes in exits and in the ring", 5000, in_ring + exits(vm) as u64);
    look.wants("few exits", exits(vm) < 100);
    let emptied = there.windows(2).all(|pair| pair[0].1 == pair[1].0);
    look.wants_near("the ring is emptied after each exit", emptied, &near);

    let vm = *look.needs("a machine that counts (KVM_IOEVENTFD)", counted.first())?;
    look.wants_same("no exit there", 0, exits(vm));
    let err = ran.err();
    let row = |name: &str| {
        let line = err.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    for (way, writes) in [("an exit each", some), ("coalesced MMIO", 5000), ("ioeventfd", 5000)] {
        look.wants_same(format!("{way}: writes that arrived"), Some(writes), row(way));
    }
    Ok(())
}

fn the_trace_tells_each_access(look: &mut Look) -> Result<()> {
    let mut accesses = Vec::new();
    for start in [SCRATCH, SCREEN, 0xC_0000] {
        for size in [1, 2, 4, 8] {
            let addr = start + look.random(0..400) * 8;
            accesses.push(write(look, size, addr));
            accesses.push(read(size, addr));
        }
    }
    let seen = access(look, &["--trace=mmio,every"], &accesses)?;
    look.wants_code(0, &seen.ran);
    let line = |access: Access| {
        let Access { size, write, addr, value } = access;
        let whose = match addr {
            SCRATCH..SCRATCH_END => "scratch",
            SCREEN..SCREEN_END => "text screen",
            _ => "nobody",
        };
        let arrow = if write { "<-" } else { "->" };
        let digits = size as usize * 2;
        format!(" {whose}: {addr:08X} {arrow} {value:0digits$X}, ")
    };
    let err = seen.ran.err();
    let mut lines = err.lines();
    let exits = seen.exits();
    look.wants_same("an exit for each access", accesses.len(), exits.len());
    for exit in exits {
        let line = line(exit);
        let there = lines.any(|traced| traced.contains(&line));
        look.wants(format!("its line, behind the one before:{line}"), there);
    }
    Ok(())
}
