//! Stage 07: from the reset vector to a kernel on a disk.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use asm::boot;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::guest::{Guest, Sregs};
use crate::witness::record::{Exit, SetSlot, What, array};

criteria![
    the_first_instruction_is_16_bytes_below_4_gib,
    the_bios_is_seen_at_both_ends,
    the_boot_sector_gets_what_a_bios_owes_it,
    the_bios_reads_and_writes_disks,
    the_bios_tells_the_memory_map,
    keyboard_and_screen_are_where_a_pc_has_them,
    ide_drives_move_sectors_through_their_ports,
    the_mp_table_names_the_processors,
    the_kernel_comes_from_the_disk,
    what_cannot_be_booted_is_told,
];

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;
const FOUR_GIB: u64 = 1 << 32;

/// Where a guest writes how far it is, and where it ends the machine.
const POST: u16 = 0x80;
const DEBUG_EXIT: u16 = 0xF4;
const SERIAL: u16 = 0x3F8;

/// A disk with these sectors behind `boot`, in all `count` of them: random ones.
fn disk(look: &mut Look, boot: &[&[u8]], count: usize) -> Vec<u8> {
    let mut disk = boot.concat();
    let rest = look.random_bytes(count * SECTOR - disk.len());
    disk.extend(rest);
    disk
}

/// A boot sector with this code.
fn boot_sector(code: &[u8]) -> Vec<u8> {
    let mut sector = code.to_vec();
    sector.resize(SECTOR - 2, 0);
    sector.extend([0x55, 0xAA]);
    sector
}

fn sectors(disk: &[u8], lba: u64, count: usize) -> &[u8] {
    disk.get(lba as usize * SECTOR..).and_then(|rest| rest.get(..count * SECTOR)).unwrap_or(&[])
}

/// `--disk FILE…` for each of them.
fn disks(files: &[(&Path, &str)]) -> Vec<String> {
    let value = |(path, mode): &(&Path, &str)| format!("{}{mode}", path.display());
    files.iter().flat_map(|file| ["--disk".to_owned(), value(file)]).collect()
}

/// Runs the program with these arguments. When the guest ends the machine by port F4h, `see` looks at it.
fn run_to_end(
    look: &mut Look,
    args: &[String],
    see: impl FnMut(&mut Guest<'_>) -> Result<()>,
) -> Result<Ran> {
    let see = RefCell::new(see);
    look.program(args)
        .at_exit(|exit, guest| match exit.out(DEBUG_EXIT) {
            Some(_) => see.borrow_mut()(guest),
            None => Ok(()),
        })
        .run(look)
}

/// Whether no register of a vCPU was set before the first exit.
fn starts_untouched(ran: &Ran) -> bool {
    let first = ran.exits().first().map_or(u64::MAX, |exit| exit.at);
    let set =
        ["KVM_SET_REGS", "KVM_SET_SREGS"].map(|name| ran.calls_of(name).any(|c| c.at < first));
    set == [false, false]
}

fn the_first_instruction_is_16_bytes_below_4_gib(look: &mut Look) -> Result<()> {
    // A ROM with code in a random place at its end, and another one that is reached below 1 MiB.
    let mut rom = look.random_bytes(64 << 10);
    let high = look.random(0x100..0xF000) as u16;
    let low = look.random(0xF100..0xFE00) as u16;
    let at = look.random(0x10..0x80) as u16;
    let [first, other, last] = [look.random(1..80), look.random(80..160), look.random(160..250)];
    let [at_low, at_high] = at.to_le_bytes();
    let there = rom[usize::from(at)];
    let new = there ^ look.random(1..256) as u8;
    let mut put = |at: u16, code: &[u8]| rom[usize::from(at)..][..code.len()].copy_from_slice(code);
    let far = high.wrapping_sub(0xFFF3).to_le_bytes();
    put(0xFFF0, &[0xE9, far[0], far[1]]); // jmp high: CS stays where it is
    let code = [
        &[0xB0, first as u8, 0xE6, 0x80][..], // mov al, first; out 0x80, al
        &[0x2E, 0xC6, 0x06, at_low, at_high, new], // mov byte [cs:at], new
        &[0x2E, 0xA0, at_low, at_high, 0xE6, 0x80], // mov al, [cs:at]; out 0x80, al
        &[0xB0, other as u8, 0xE6, 0x80],
        &[0xEA, low.to_le_bytes()[0], low.to_le_bytes()[1], 0x00, 0xF0], // jmp 0xF000:low
    ];
    put(high, &code.concat());
    put(low, &[0xB0, last as u8, 0xE6, 0x80, 0x30, 0xC0, 0xE6, 0xF4]); // …, xor al, al; out 0xF4, al
    let file = look.file("rom", &rom)?;
    let seen = RefCell::new(Vec::<(Sregs, Vec<u8>)>::new());
    let ran = look
        .program(&["--no-disk".as_ref(), "--firmware".as_ref(), file.as_os_str()])
        .at_exit(|exit, guest| {
            if exit.out(POST).is_some() {
                let rom = guest.read(FOUR_GIB - (64 << 10), 64 << 10).unwrap_or_default();
                seen.borrow_mut().push((guest.sregs()?, rom));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let seen = seen.into_inner();
    look.wants("no register is set from outside", starts_untouched(&ran));
    let post: Vec<_> = [first as u8, there, other as u8, last as u8].into();
    look.wants_same("what the ROM's code wrote to port 80h", post, ran.written(POST));
    let base = |at: usize| seen.get(at).map(|(sregs, _)| (sregs.cs.base, sregs.protected()));
    look.wants_same("CS base, and protected mode, at first", Some((0xFFFF_0000, false)), base(0));
    look.wants_same("and behind the far jump", Some((0xF_0000, false)), base(3));
    let written = What::Write { addr: 0xFFFF_0000 + u64::from(at), data: vec![new] };
    look.wants("its write to itself is an exit", ran.exits().iter().any(|e| e.what == written));
    look.wants("and changes nothing", seen.len() == 4 && seen.iter().all(|seen| seen.1 == rom));
    Ok(())
}

fn the_bios_is_seen_at_both_ends(look: &mut Look) -> Result<()> {
    let mib = look.random(2..64);
    let (low, high) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    let ran = look
        .program(&["--no-disk", "--memory", &format!("{mib}M")])
        .at_exit(|_, guest| {
            if low.borrow().is_empty() {
                *low.borrow_mut() = guest.read(MIB - (64 << 10), 64 << 10)?;
                *high.borrow_mut() = guest.read(FOUR_GIB - (64 << 10), 64 << 10)?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(1, &ran);
    look.wants("no register is set from outside", starts_untouched(&ran));
    for end in [MIB, FOUR_GIB] {
        let rom = |slot: &SetSlot| slot.end() == end && slot.has(SetSlot::READ_ONLY);
        look.wants(format!("a read-only slot that ends at {end:#x}"), ran.slots().iter().any(rom));
    }
    look.wants(
        "the same bytes in both",
        !low.borrow().is_empty() && *low.borrow() == *high.borrow(),
    );
    look.wants_same("a far jump at the reset vector", Some(&0xEA), high.borrow().get(0xFFF0));
    let said = String::from_utf8_lossy(&ran.written(SERIAL)).into_owned();
    look.wants_in("what it found in the CMOS", &format!("{mib} MiB of memory"), &said);
    look.wants_in("what it says without a disk", "No bootable disk", &said);
    look.wants_same("how far it came", Some(&0x51), ran.written(POST).last());
    Ok(())
}

fn the_boot_sector_gets_what_a_bios_owes_it(look: &mut Look) -> Result<()> {
    // xor al, al; out 0xF4, al; and what nobody runs.
    let code = [vec![0x30, 0xC0, 0xE6, 0xF4], look.random_bytes(500)].concat();
    let boot = look.file("boot", boot_sector(&code))?;
    let floppy = [boot_sector(&code), vec![0; 2879 * SECTOR]].concat();
    let floppy = look.file("floppy", floppy)?;
    let data = look.random_bytes(SECTOR - 2);
    let data = look.file("data", [&data[..], &[0, 0]].concat())?;
    for (what, files, order, drive) in [
        ("the only disk", vec![(&*boot, "")], "floppy", 0x80),
        (
            "the second, as the first is none to boot",
            vec![(&data, ",ro"), (&boot, "")],
            "floppy",
            0x81,
        ),
        ("a floppy before a disk", vec![(&*boot, ""), (&floppy, "")], "floppy", 0x00),
    ] {
        let args = [disks(&files), vec!["--boot".to_owned(), order.to_owned()]].concat();
        let mut seen = None;
        let ran = run_to_end(look, &args, |guest| {
            seen = Some((guest.regs()?, guest.sregs()?, guest.read(0x7C00, SECTOR)?));
            Ok(())
        })?;
        look.wants_code(0, &ran);
        let (regs, sregs, sector) = look.needs(format!("{what}: its code runs"), seen)?;
        look.wants_same("DL", drive, regs.rdx & 0xFF);
        look.wants("its sector is at 7C00h", sector == boot_sector(&code));
        look.wants("real mode, not far behind", {
            let ip = sregs.cs.base + regs.rip;
            !sregs.protected() && (0x7C02..=0x7C04).contains(&ip)
        });
    }
    Ok(())
}

/// Where [`boot::CHAIN`] puts a list, how many bytes it may have, and where the data behind it are.
const LIST: u64 = 0x1_0000;
const LIST_SIZE: usize = 16 * SECTOR;
const DATA: u64 = LIST + LIST_SIZE as u64;
const DATA_SEGMENT: u16 = (DATA / 16) as u16;
/// A disk's first sectors: two programs, a list and data.
const FIRST_FREE: u64 = 34;

/// A disk of `count` sectors with a guest that does what is on a list.
fn listed_disk(look: &mut Look, guest: &[u8], list: &[u8], data: &[u8], count: usize) -> Vec<u8> {
    let mut room = list.to_vec();
    room.resize(LIST_SIZE, 0);
    room.extend(data);
    room.resize(2 * LIST_SIZE, 0);
    disk(look, &[boot::CHAIN, guest, &room], count)
}

/// An `int` with its registers, as asm/boot/services.asm has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Call {
    number: u16,
    flags: u16,
    /// EAX, EBX, ECX, EDX, ESI, EDI, EBP.
    regs: [u32; 7],
    ds: u16,
    es: u16,
}

impl Call {
    const SIZE: usize = 36;

    fn new(number: u16, [ax, bx, cx, dx, si, di]: [u32; 6]) -> Self {
        let (ds, es) = (DATA_SEGMENT, DATA_SEGMENT);
        Self { number, flags: 1 << 9, regs: [ax, bx, cx, dx, si, di, 0], ds, es }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.number.to_le_bytes(), self.flags.to_le_bytes()].concat();
        bytes.extend(self.regs.iter().flat_map(|reg| reg.to_le_bytes()));
        bytes.extend([self.ds.to_le_bytes(), self.es.to_le_bytes()].concat());
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let word = |at| u16::from_le_bytes(array(bytes, at));
        let regs = std::array::from_fn(|n| u32::from_le_bytes(array(bytes, 4 + n * 4)));
        Self { number: word(0), flags: word(2), regs, ds: word(32), es: word(34) }
    }

    /// The carry flag says that it failed.
    fn failed(&self) -> bool {
        self.flags & 1 == 1
    }
}

/// Has a guest make these calls, with `data` in its memory. Gives what came of them, and the memory from there on.
fn services(
    look: &mut Look,
    calls: &[Call],
    data: &[u8],
    more: &[String],
) -> Result<(Vec<Call>, Vec<u8>, Vec<u8>)> {
    let list: Vec<u8> = calls.iter().flat_map(Call::bytes).collect();
    let image = listed_disk(look, boot::SERVICES, &list, data, 2000);
    let file = look.file("boot.img", &image)?;
    let mut made = Vec::new();
    let mut memory = Vec::new();
    let args = [disks(&[(&file, "")]), more.to_vec()].concat();
    let ran = run_to_end(look, &args, |guest| {
        let list = guest.read(LIST, calls.len() * Call::SIZE)?;
        made = list.chunks(Call::SIZE).map(Call::parse).collect();
        memory = guest.read(DATA, 0x2_0000)?;
        Ok(())
    })?;
    look.wants_code(0, &ran);
    look.wants_same("calls that were made", calls.len(), made.len());
    anyhow::ensure!(made.len() == calls.len(), "the guest has not come to its end");
    Ok((made, memory, fs::read(&file).context("the disk's file")?))
}

/// A packet of the extended services: so many sectors, between `at` in [`DATA`] and this place on the disk.
fn packet(count: u16, at: u16, lba: u64) -> Vec<u8> {
    let words = [16, count, at, DATA_SEGMENT].map(u16::to_le_bytes).concat();
    [words, lba.to_le_bytes().to_vec()].concat()
}

fn the_bios_reads_and_writes_disks(look: &mut Look) -> Result<()> {
    let [from, to] = [look.random(FIRST_FREE..1000), look.random(1000..1990)];
    // Both on the second head, in the floppy's first half and in its second.
    let floppy_from = look.random(0..39) * 36 + look.random(18..36);
    let floppy_to = look.random(41..79) * 36 + look.random(18..36);
    // It could be booted, and is not to be: mov al, 1; out 0xF4, al.
    let floppy = disk(look, &[&boot_sector(&[0xB0, 1, 0xE6, 0xF4])], 2880);
    let file = look.file("floppy.img", &floppy)?;
    // Sector, then head, then cylinder: 18 on a track, two tracks on a cylinder.
    let chs = |lba: u64| ((lba / 36) << 8 | (lba % 18 + 1), (lba / 18 % 2) << 8);
    let ((cx_from, dx_from), (cx_to, dx_to)) = (chs(floppy_from), chs(floppy_to));
    let new = look.random_bytes(2 * SECTOR);
    let mut data =
        [packet(3, 0x2000, from), packet(2, 0x400, to), packet(1, 0x2000, 2000)].concat();
    data.extend([0x1E, 0]); // of int 13h, AH = 48h: how much room there is
    data.resize(0x400, 0);
    data.extend(&new);
    let extended = |ah: u32, si: u32| Call::new(0x13, [ah << 8, 0, 0, 0x80, si, 0]);
    let old = |ax, cx: u64, dx: u64, bx| Call::new(0x13, [ax, bx, cx as u32, dx as u32, 0, 0]);
    let calls = [
        extended(0x42, 0),
        extended(0x43, 16),
        extended(0x42, 32),
        extended(0x48, 48),
        old(0x0201, cx_from, dx_from, 0x3000),
        old(0x0301, cx_to, dx_to, 0x600),
        old(0x0800, 0, 0, 0),
    ];
    let more = [disks(&[(&file, "")]), vec!["--boot".to_owned(), "disk".to_owned()]].concat();
    let (made, memory, after) = services(look, &calls, &data, &more)?;
    let failed: Vec<_> = made.iter().map(Call::failed).collect();
    look.wants_same(
        "which calls fail: one, beyond the end",
        vec![false, false, true, false, false, false, false],
        failed,
    );
    look.wants(
        "by linear address, three sectors are read",
        memory[0x2000..][..3 * SECTOR] == *sectors(&after, from, 3),
    );
    look.wants("and two are in the disk's file", *sectors(&after, to, 2) == new);
    look.wants_same("how many sectors it has", 2000, u64::from_le_bytes(array(&memory, 48 + 16)));
    look.wants(
        "by cylinder, head and sector, one is read",
        memory[0x3000..][..SECTOR] == *sectors(&floppy, floppy_from, 1),
    );
    let mut expected = floppy.clone();
    expected[floppy_to as usize * SECTOR..][..SECTOR].copy_from_slice(&new[SECTOR..]);
    look.wants("and one is in the floppy's file, nothing else", fs::read(&file)? == expected);
    let geometry = (made[6].regs[2] & 0xFFFF, made[6].regs[3] >> 8 & 0xFF);
    look.wants_same("the floppy's geometry: CX, DH", (79 << 8 | 18, 1), geometry);
    Ok(())
}

fn the_bios_tells_the_memory_map(look: &mut Look) -> Result<()> {
    let mib = look.random(20..600);
    let smap = u32::from_be_bytes(*b"SMAP");
    let entry = |n: u32| Call::new(0x15, [0xE820, n, 20, smap, 0, 0x1000 + n * 20]);
    let mut calls: Vec<_> = (0..10).map(entry).collect();
    let others = [(0x15, 0x8800), (0x15, 0xE801), (0x12, 0)];
    calls.extend(others.map(|(number, ax)| Call::new(number, [ax, 0, 0, 0, 0, 0])));
    let more = vec!["--memory".to_owned(), format!("{mib}M")];
    let (made, memory, _) = services(look, &calls, &[], &more)?;
    let last = made.iter().position(|call| call.failed() || call.regs[1] == 0);
    let last =
        look.needs("an entry with EBX = 0, the last", last.filter(|&n| !made[n].failed()))?;
    look.wants("SMAP in EAX each time", made[..=last].iter().all(|call| call.regs[0] == smap));
    let map: Vec<_> = (0..=last)
        .map(|n| {
            let number = |at| u64::from_le_bytes(array(&memory, 0x1000 + n * 20 + at));
            (number(0), number(8), number(16) as u32)
        })
        .collect();
    let near: Vec<_> = map.iter().map(|entry| format!("{entry:x?}")).collect();
    let has = |entry| map.contains(&entry);
    let high = (MIB, (mib - 1) * MIB, 1);
    look.wants_near(format!("all RAM above 1 MiB, of {mib} MiB"), has(high), &near);
    look.wants_near("639 KiB from 0 on", has((0, 639 << 10, 1)), &near);
    let rom = |&(start, size, kind): &(u64, u64, u32)| {
        kind != 1 && (start..start + size).contains(&0xF_FFF0)
    };
    look.wants_near("the ROM below 1 MiB is none of it", map.iter().any(rom), &near);
    let ax = |call: &Call| u64::from(call.regs[0] & 0xFFFF);
    look.wants_same(
        "int 15h, AH = 88h: KiB above 1 MiB",
        ((mib - 1) << 10).min(0xFFFF),
        ax(&made[10]),
    );
    let above_16 = (mib - 16) * 16;
    let e801 = (ax(&made[11]), u64::from(made[11].regs[1] & 0xFFFF));
    look.wants_same(
        "AX = E801h: KiB up to 16 MiB, units of 64 KiB beyond",
        (15 << 10, above_16),
        e801,
    );
    look.wants_same("int 12h: KiB", 639, ax(&made[12]));
    Ok(())
}

/// The codes of scan code set 1 for small letters.
fn scan_code(letter: u8) -> u8 {
    let rows = [(0x10, "qwertyuiop"), (0x1E, "asdfghjkl"), (0x2C, "zxcvbnm")];
    let code = |(first, row): (u8, &str)| Some(first + row.find(char::from(letter))? as u8);
    rows.into_iter().find_map(code).unwrap_or(0)
}

/// All that guests read from a port.
fn taken(ran: &Ran, wanted: u16) -> Vec<u8> {
    let data = ran.exits().iter().filter_map(|exit| match &exit.what {
        What::In { port, data, .. } if *port == wanted => Some(data.as_slice()),
        _ => None,
    });
    data.flatten().copied().collect()
}

fn has(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

fn keyboard_and_screen_are_where_a_pc_has_them(look: &mut Look) -> Result<()> {
    let echo = look.file("echo", boot::ECHO)?;
    let word = look.random_word(8);
    let cells: Vec<u8> = word.bytes().flat_map(|letter| [letter, 0x07]).collect();
    for display in ["serial", "text"] {
        let screen = RefCell::new(Vec::new());
        let ran = look
            .program(
                &[disks(&[(&echo, "")]), vec!["--display".to_owned(), display.to_owned()]].concat(),
            )
            // The BIOS's last POST code: what was typed before, the keyboard's reset has taken away.
            .type_at(|exit| exit.out(POST) == Some(&[0x60]), format!("{word}\x04"))
            .hold_stdin()
            .at_exit(|exit, guest| {
                if exit.out(DEBUG_EXIT).is_some() {
                    *screen.borrow_mut() = guest.read(0xB_8000, 80 * 25 * 2)?;
                }
                Ok(())
            })
            .run(look)?;
        look.wants_code(0, &ran);
        let there = has(&screen.borrow(), &cells);
        look.wants(format!("`{word}` on the text screen at B8000h"), there);
        if display == "serial" {
            look.wants("each letter came by port 3F8h", has(&taken(&ran, SERIAL), word.as_bytes()));
            look.wants("and went back by it", has(&ran.written(SERIAL), word.as_bytes()));
        } else {
            // A key that goes down, and then up.
            let keys: Vec<u8> = word.bytes().map(scan_code).flat_map(|c| [c, c | 0x80]).collect();
            let codes = taken(&ran, 0x60);
            let near = [format!("wanted {keys:02x?}"), format!("seen   {codes:02x?}")];
            look.wants_near("scan codes at port 60h", has(&codes, &keys), &near);
            look.wants_in("the last picture", &word, &ran.out());
        }
    }
    // A20 by both controllers, the beam and the cursor, timer 2 and the speaker's port.
    let ports = look.file("ports", boot::PORTS)?;
    let ran = run_to_end(look, &disks(&[(&ports, "")]), |_| Ok(()))?;
    look.wants_same(
        "a guest that tries ports 61h, 64h, 92h, 3DAh, 3D4h: which check fails",
        vec![0],
        ran.written(DEBUG_EXIT),
    );
    Ok(())
}

/// What asm/boot/ide.asm is to do: steps of four words.
#[derive(Default)]
struct Steps(Vec<[u16; 4]>);

impl Steps {
    fn write(&mut self, port: u16, value: u8) {
        self.0.push([1, port, value.into(), 0]);
    }

    /// Its number, by which one finds what was read.
    fn read(&mut self, port: u16) -> usize {
        self.0.push([2, port, 0, 0]);
        self.0.len() - 1
    }

    /// A command by a linear address of 28 bits.
    fn command(&mut self, port: u16, device: u8, command: u8, lba: u64, count: u8) {
        let [low, mid, high, top, ..] = lba.to_le_bytes();
        for (port, value) in
            (port + 2..).zip([count, low, mid, high, 0xE0 | device << 4 | top, command])
        {
            self.write(port, value);
        }
    }

    /// Moves sectors one after the other, from or to memory, with a look at the status before each.
    fn data(&mut self, port: u16, writes: bool, count: u16, segment: u16) -> Vec<usize> {
        let sector = |n| {
            let status = self.read(port + 7);
            self.0.push([if writes { 4 } else { 3 }, port, 256, segment + n * 32]);
            status
        };
        (0..count).map(sector).collect()
    }

    /// Waits for so many interrupts of a line; gives how many came.
    fn interrupts(&mut self, line: u16, count: u16) -> usize {
        self.0.push([5, line, count, 0]);
        self.0.len() - 1
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
    }
}

fn ide_drives_move_sectors_through_their_ports(look: &mut Look) -> Result<()> {
    const PRIMARY: u16 = 0x1F0;
    const SECONDARY: u16 = 0x170;
    let counts = [look.random(600..900), look.random(100..900), look.random(100..900)];
    let images = counts.map(|count| disk(look, &[], count as usize));
    let names = ["slave.img", "snapshot.img", "protected.img"];
    for (name, image) in names.iter().zip(&images) {
        look.file(name, image)?;
    }
    let count = look.random(2..6) as u8;
    let mut lba = counts.map(|count| look.random(0..count - 8));
    // One that takes more than eight bits.
    lba[0] = look.random(256..counts[0] - 8);
    let new = look.random_bytes(usize::from(count) * SECTOR);
    let (old_at, new_at, identity_at) = (0x3000_u16, 0x3400_u16, 0x3800_u16);

    let mut steps = Steps::default();
    // The primary slave says who it is; its sectors are read, overwritten and read again.
    steps.command(PRIMARY, 1, 0xEC, 0, 0);
    steps.data(PRIMARY, false, 1, identity_at);
    steps.interrupts(14, 0);
    steps.command(PRIMARY, 1, 0x20, lba[0], count);
    let mut ready = steps.data(PRIMARY, false, count.into(), old_at);
    let read_interrupts = steps.interrupts(14, count.into());
    steps.command(PRIMARY, 1, 0x30, lba[0], count);
    ready.extend(steps.data(PRIMARY, true, count.into(), DATA_SEGMENT));
    let write_interrupts = steps.interrupts(14, count.into());
    steps.command(PRIMARY, 1, 0x20, lba[0], count);
    steps.data(PRIMARY, false, count.into(), new_at);
    // One sector behind its last.
    steps.command(PRIMARY, 1, 0x20, counts[0], 1);
    let beyond = [steps.read(PRIMARY + 7), steps.read(PRIMARY + 1)];
    // The secondary master forgets, the secondary slave takes nothing.
    steps.interrupts(15, 0);
    steps.command(SECONDARY, 0, 0x30, lba[1], 1);
    steps.data(SECONDARY, true, 1, DATA_SEGMENT);
    let other_line = steps.interrupts(15, 1);
    steps.command(SECONDARY, 0, 0x20, lba[1], 1);
    steps.data(SECONDARY, false, 1, identity_at + 32);
    steps.command(SECONDARY, 1, 0x30, lba[2], 1);
    let protected = steps.read(SECONDARY + 7);

    let image = listed_disk(look, boot::IDE, &steps.bytes(), &new, 100);
    let boot = look.file("boot.img", image)?;
    let files = names.map(|name| look.path(name));
    let args = disks(&[(&boot, ""), (&files[0], ""), (&files[1], ",snapshot"), (&files[2], ",ro")]);
    let (mut list, mut memory) = (Vec::new(), Vec::new());
    let ran = run_to_end(look, &args, |guest| {
        list = guest.read(LIST, LIST_SIZE)?;
        memory = guest.read(u64::from(old_at) * 16, 0xA000)?;
        Ok(())
    })?;
    look.wants_code(0, &ran);
    look.wants("the guest comes to its end", !list.is_empty());
    let value = |step: usize| u16::from_le_bytes(array(&list, step * 8 + 4));
    let at = |segment: u16, len: usize| {
        memory
            .get(usize::from(segment - old_at) * 16..)
            .and_then(|rest| rest.get(..len))
            .unwrap_or(&[])
    };
    let size = u64::from(u32::from_le_bytes(array(at(identity_at, SECTOR), 120)));
    look.wants_same("IDENTIFY DEVICE: sectors", counts[0], size);
    let old = sectors(&images[0], lba[0], count.into());
    look.wants(format!("{count} sectors are read from the slave"), at(old_at, new.len()) == old);
    look.wants("what it has written it reads again", at(new_at, new.len()) == new);
    look.wants("DRQ before each, no error", ready.iter().all(|&step| value(step) & 0x89 == 0x08));
    let interrupts = [value(read_interrupts), value(write_interrupts), value(other_line)];
    look.wants_same(
        "interrupts: a sector read, a sector written, line 15",
        [count.into(), count.into(), 1],
        interrupts,
    );
    look.wants_same(
        "beyond the end: ERR, and IDNF",
        (1, 0x10),
        (value(beyond[0]) & 0x89, value(beyond[1])),
    );
    look.wants(
        "a disk with `snapshot` has what was written",
        at(identity_at + 32, SECTOR) == &new[..SECTOR],
    );
    look.wants_same("a write to one with `ro`: ERR, no DRQ", 1, value(protected) & 0x89);
    let mut expected = images.clone();
    expected[0][lba[0] as usize * SECTOR..][..new.len()].copy_from_slice(&new);
    for ((file, expected), name) in files.iter().zip(&expected).zip(names) {
        look.wants(format!("{name} is what it has to be in the end"), fs::read(file)? == *expected);
    }
    Ok(())
}

fn the_mp_table_names_the_processors(look: &mut Look) -> Result<()> {
    let cpus = look.random(2..5);
    let kernel = look.file("kernel", boot::SMP)?;
    let rom = RefCell::new(Vec::new());
    let ran = look
        .program(&[
            "--cpus".as_ref(),
            cpus.to_string().as_ref(),
            "--kernel".as_ref(),
            kernel.as_os_str(),
        ])
        .at_exit(|_, guest| {
            if rom.borrow().is_empty() {
                *rom.borrow_mut() = guest.read(0xF_0000, 0x1_0000)?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let made: Vec<_> = ran.obeyed("KVM_CREATE_VCPU").map(|call| call.arg).collect();
    look.wants_same("vCPUs", (0..cpus).collect::<Vec<_>>(), made);
    let rom = rom.into_inner();
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let pointer = rom.chunks(16).find(|chunk| chunk.starts_with(b"_MP_") && sum(chunk) == 0);
    let pointer = look.needs("a floating pointer in the ROM, its bytes 0 in sum", pointer)?;
    let table = u32::from_le_bytes(array(pointer, 4)) as usize;
    let table = table.checked_sub(0xF_0000).and_then(|at| rom.get(at..)).unwrap_or(&[]);
    let table = &table[..usize::from(u16::from_le_bytes(array(table, 4))).min(table.len())];
    look.wants("a table, its bytes 0 in sum", table.starts_with(b"PCMP") && sum(table) == 0);
    let (mut processors, mut at) = (Vec::new(), 44);
    while let Some(kind) = table.get(at) {
        if *kind == 0 {
            processors
                .push((u64::from(array::<1>(table, at + 1)[0]), array::<1>(table, at + 3)[0] & 3));
        }
        at += if *kind == 0 { 20 } else { 8 };
    }
    let expected: Vec<_> = (0..cpus).map(|id| (id, if id == 0 { 3 } else { 1 })).collect();
    look.wants_same("processors: local APIC's ID, usable and the first", expected, processors);
    let said = String::from_utf8_lossy(&ran.written(SERIAL)).into_owned();
    let all = format!("processors {cpus}\nready {cpus}\nline 0 at {}\nreset\n", cpus - 1);
    look.wants_in("a guest finds and starts them, and has the last take line 0", &all, &said);
    Ok(())
}

/// The POST codes of the stage's README, in their order: the BIOS's, the MBR's, the second stage's.
const POST_CODES: [u8; 24] = [
    0x01, 0x10, 0x11, 0x20, 0x21, 0x22, 0x30, 0x31, 0x32, 0x33, 0x40, 0x50, 0x51, 0x60, 0x70, 0x71,
    0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79,
];

fn the_kernel_comes_from_the_disk(look: &mut Look) -> Result<()> {
    let [a, b] = [look.random(100..1000), look.random(100..1000)];
    let mut sregs = None;
    let mut memory = Vec::new();
    let see = |exit: &Exit, guest: &mut Guest<'_>| {
        if exit.out(POST) == Some(&[0x79]) {
            sregs = Some(guest.sregs()?);
            memory = guest.read(MIB, MIB as usize)?;
        }
        Ok(())
    };
    let ran =
        look.program::<&str>(&[]).stdin(format!("calc {a}*{b}\nexit\n")).at_exit(see).run(look)?;
    look.wants_code(0, &ran);
    let codes = ran.written(POST);
    let expected: Vec<_> = POST_CODES.into();
    look.wants_same("POST codes, from the BIOS to the kernel", expected, codes);
    let read = taken(&ran, 0x1F0);
    // Its clusters lie side by side, so the file is in what went through the port from its magic number on.
    let elf =
        read.windows(7).position(|window| window == b"\x7FELF\x02\x01\x01").map(|at| &read[at..]);
    let elf = look.needs("an ELF file went through port 1F0h", elf)?;
    let number = |at| u64::from_le_bytes(array(elf, at));
    let header = number(32) as usize;
    let (offset, address, size) = (number(header + 8), number(header + 24), number(header + 32));
    let segment = elf.get(offset as usize..).and_then(|rest| rest.get(..size as usize));
    let there =
        address.checked_sub(MIB).and_then(|at| memory.get(at as usize..)?.get(..size as usize));
    look.wants("its first segment is in memory", size > 0 && segment.is_some() && segment == there);
    look.wants(
        "the last code comes from long mode",
        sregs.is_some_and(|sregs| sregs.long() && sregs.paging()),
    );
    let said = String::from_utf8_lossy(&ran.written(SERIAL)).into_owned();
    look.wants_in("what its shell computes goes to port 3F8h", &format!("\n{}\r", a * b), &said);
    look.forbids("a register set from outside", !starts_untouched(&ran));
    Ok(())
}

fn what_cannot_be_booted_is_told(look: &mut Look) -> Result<()> {
    let code = look.random(1..256) as u8;
    // mov al, code; out 0xF4, al
    let good = [boot_sector(&[0xB0, code, 0xE6, 0xF4]), look.random_bytes(3 * SECTOR)].concat();
    let mut unsigned = good.clone();
    unsigned[510] ^= look.random(1..256) as u8;
    let odd = look.random(1..512) as usize;
    for (name, bytes, why) in [
        ("short", &good[..odd], "sector of 512"),
        ("odd", &good[..SECTOR + odd], "multiple of 512"),
        ("unsigned", &unsigned, "55 aa"),
    ] {
        let file = look.file(name, bytes)?;
        let ran = look.program(&disks(&[(&file, "")])).run(look)?;
        look.wants_refusal(2, why, &ran);
        look.forbids("a machine for it", ran.vms() > 0);
    }
    let file = look.file("good", &good)?;
    let ran = look.program(&disks(&[(&file, "")])).run(look)?;
    look.wants_code(1, &ran);
    look.wants_same("the same disk with its 55 AA boots", vec![code], ran.written(DEBUG_EXIT));
    look.wants_in("the code that it gives", &format!("ended with code {code}"), &ran.err());
    // lidt [cs:5]; ud2: an exception without an IDT.
    let crash = boot_sector(&[0x2E, 0x0F, 0x01, 0x1E, 0x20, 0x7C, 0x0F, 0x0B]);
    let file = look.file("crash", crash)?;
    let ran = look.program(&disks(&[(&file, "")])).run(look)?;
    look.wants_code(1, &ran);
    look.wants(
        "a crash is KVM_EXIT_SHUTDOWN",
        ran.exits().iter().any(|e| e.what == What::Shutdown),
    );
    Ok(())
}
