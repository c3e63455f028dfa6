//! Stage 08: Linux boots. What it is told and how it is entered, small kernels of the grader's own show at their first
//! instruction; the rest Linux shows.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::criteria;
use crate::look::Look;
use crate::program::{Program, Ran};
use crate::witness::guest::{Guest, Regs, Sregs};
use crate::witness::record::{What, array};

criteria![
    kernel_and_initrd_are_loaded_where_they_belong,
    boot_params_tell_of_memory_and_command_line,
    the_kernel_is_entered_as_the_boot_protocol_says,
    acpi_tables_describe_the_machine,
    linux_boots_and_powers_off,
    linux_runs_on_every_processor,
    a_virtio_disk_serves_its_ring,
    linux_reads_and_writes_disks,
    a_machine_goes_on_from_its_snapshot,
    the_machine_ends_as_its_guest_wants,
];

const MIB: u64 = 1 << 20;
const FOUR_GIB: u64 = 1 << 32;
const SECTOR: usize = 512;
const SERIAL: u16 = 0x3F8;
const PROMPT: &str = "guest:/root# ";

/// A boot of Linux on a busy machine.
const PATIENCE: Duration = Duration::from_secs(200);

/// `mov dx, 0x3F8; mov al, '!'; out dx, al`: the same in 32- and 64-bit mode.
const SAYS_SO: [u8; 7] = [0x66, 0xBA, 0xF8, 0x03, 0xB0, b'!', 0xEE];
/// `jmp $`.
const STAYS: [u8; 2] = [0xEB, 0xFE];

/// A vmlinux that is entered at its first byte. Its one segment has `more` bytes beyond those of the file.
fn vmlinux(address: u64, segment: &[u8], more: u64) -> Vec<u8> {
    let mut elf = vec![0; 0x1000];
    elf[..20].copy_from_slice(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0");
    let size = segment.len() as u64;
    for (at, value) in [
        (24, address),
        (32, 64),
        (72, 0x1000),
        (80, address),
        (88, address),
        (96, size),
        (104, size + more),
    ] {
        elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    elf[20] = 1; // EV_CURRENT
    elf[52] = 64; // e_ehsize
    elf[54] = 56; // e_phentsize
    elf[56] = 1; // e_phnum
    elf[64] = 1; // PT_LOAD
    elf[68] = 7; // may be read, written and run
    elf.extend(segment);
    elf
}

/// A bzImage that is not compressed, with code at its 32-bit and at its 64-bit entry, and a limit for command lines.
fn bzimage(address: u64, entry_32: &[u8], entry_64: &[u8], cmdline_size: u32) -> Vec<u8> {
    let mut code = entry_32.to_vec();
    code.resize(0x200, 0x90);
    code.extend(entry_64);
    code.resize(0x1000, 0x90);
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects
    put(0x1F4, &(code.len() as u32 / 16).to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(0x202, b"HdrS\x0C\x02");
    put(0x211, &[1]); // LOADED_HIGH
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes());
    put(0x230, &(2_u32 << 20).to_le_bytes());
    put(0x234, &[1, 21, 1, 0]); // relocatable; it has a 64-bit entry
    put(0x238, &cmdline_size.to_le_bytes());
    put(0x258, &address.to_le_bytes());
    put(0x260, &(1_u32 << 20).to_le_bytes());
    image.extend(code);
    image
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The arguments with which a small kernel runs until it prints `!`.
fn small(kernel: &Path, more: &[&str]) -> Vec<String> {
    let first = ["--kernel", &path(kernel), "--exit-when", "!"].map(str::to_owned);
    first.into_iter().chain(more.iter().map(|&arg| arg.to_owned())).collect()
}

/// What a small kernel finds: at its first exit it has done nothing yet but name a port.
struct Found {
    regs: Regs,
    sregs: Sregs,
    /// The page that RSI points to.
    params: Vec<u8>,
    /// The first megabyte.
    low: Vec<u8>,
}

impl Found {
    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array(&self.params, offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(array(&self.params, offset))
    }

    /// The command line, up to its NUL.
    fn cmdline(&self) -> String {
        let text = self.low.get(self.u32(0x228) as usize..).unwrap_or(&[]);
        let text = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
        String::from_utf8_lossy(text).into_owned()
    }
}

/// Runs it; `see` may look for more at the first exit.
fn find(
    look: &mut Look,
    args: &[String],
    mut see: impl FnMut(&Found, &Guest<'_>),
) -> Result<(Ran, Found)> {
    let mut found = None;
    let ran = look
        .program(args)
        .at_exit(|_, guest| {
            if found.is_none() {
                let regs = guest.regs()?;
                let params = guest.read(regs.rsi, 4096).unwrap_or_default();
                let now = Found {
                    regs,
                    sregs: guest.sregs()?,
                    params,
                    low: guest.read(0, MIB as usize)?,
                };
                see(&now, guest);
                found = Some(now);
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let found = look.needs("an exit of the kernel's first instructions", found)?;
    look.wants_same("they print, by port 3F8h", vec![b'!'], ran.written(SERIAL));
    Ok((ran, found))
}

fn kernel_and_initrd_are_loaded_where_they_belong(look: &mut Look) -> Result<()> {
    let mib = look.random(48..128);
    let address = look.random(2..20) * MIB;
    let size = look.random(100_000..1_000_000) as usize;
    let segment = [&SAYS_SO[..], &STAYS, &look.random_bytes(size)].concat();
    let kernel = look.file("vmlinux", vmlinux(address, &segment, MIB))?;
    let size = look.random(1..3_000_000) as usize;
    let initrd = look.random_bytes(size);
    let file = look.file("initrd", &initrd)?;
    let args = small(&kernel, &["--initrd", &path(&file), "--memory", &format!("{mib}M")]);
    let (mut at_kernel, mut at_initrd) = (Vec::new(), Vec::new());
    let (_, found) = find(look, &args, |found, guest| {
        at_kernel = guest.read(address, segment.len()).unwrap_or_default();
        let size = found.u32(0x21C) as usize;
        at_initrd = guest.read(found.u32(0x218).into(), size.min(4 << 20)).unwrap_or_default();
    })?;
    look.wants(
        format!("{} bytes of the kernel at {address:#x}", segment.len()),
        at_kernel == segment,
    );
    look.wants_same("ramdisk_size", size, found.u32(0x21C) as usize);
    look.wants("the initrd at ramdisk_image", at_initrd == initrd);
    let start = u64::from(found.u32(0x218));
    look.wants_same("which is a page's start", 0, start % 4096);
    let end = start + size as u64;
    look.wants("as high as the memory goes", end <= mib * MIB && end + 4096 > mib * MIB);
    // It may not be in the way of what the kernel needs to start.
    let huge = vec![0x90; (mib * MIB - address - MIB) as usize];
    let huge = look.file("huge", huge)?;
    let args = small(&kernel, &["--initrd", &path(&huge), "--memory", &format!("{mib}M")]);
    let ran = look.program(&args).run(look)?;
    look.wants_refusal(2, "larger --memory", &ran);
    Ok(())
}

fn boot_params_tell_of_memory_and_command_line(look: &mut Look) -> Result<()> {
    let kernel = look.file("vmlinux", vmlinux(16 * MIB, &[&SAYS_SO[..], &STAYS].concat(), 0))?;
    let [first, second] = [look.random_word(12), look.random_word(12)];
    let (small_mib, large_mib) = (look.random(64..600), look.random(4000..6000));
    for (mib, options, expected) in [
        (small_mib, ["--append", &first], format!(" {first}")),
        (large_mib, ["--cmdline", &second], second.clone()),
    ] {
        let memory = format!("{mib}M");
        let args = small(&kernel, &["--no-initrd", "--memory", &memory, options[0], options[1]]);
        let (ran, found) = find(look, &args, |_, _| ())?;
        look.wants_same(
            "HdrS at 202h of what RSI points to",
            b"HdrS",
            &array(&found.params, 0x202),
        );
        look.wants_same("type_of_loader: one without a number", 0xFF, found.params[0x210]);
        look.wants_same("ramdisk_size without an initrd", 0, found.u32(0x21C));
        let cmdline = found.cmdline();
        let same = if options[0] == "--append" {
            cmdline.ends_with(&expected)
        } else {
            cmdline == expected
        };
        look.wants_near(
            format!("command line: {expected:?}"),
            same,
            &[format!("seen {cmdline:?}")],
        );
        let default = cmdline.contains("console=ttyS0");
        look.wants_same("the default one is there", options[0] == "--append", default);

        let entry = |n: usize| {
            let at = 0x2D0 + n * 20;
            (found.u64(at), found.u64(at) + found.u64(at + 8), found.u32(at + 16))
        };
        let map: Vec<_> = (0..usize::from(found.params[0x1E8])).map(entry).collect();
        let near: Vec<_> = map.iter().map(|entry| format!("{entry:x?}")).collect();
        let ram: Vec<_> = map.iter().filter(|entry| entry.2 == 1).collect();
        let slots = ran.slots();
        let in_slot = |&&(start, end, _): &&(u64, u64, u32)| {
            slots.iter().any(|slot| slot.start <= start && end <= slot.end())
        };
        look.wants_near(
            "each range of RAM in e820 has a memslot",
            !ram.is_empty() && ram.iter().all(in_slot),
            &near,
        );
        let above: u64 = ram.iter().filter(|e| e.0 >= MIB).map(|e| e.1 - e.0).sum();
        look.wants_near(format!("all of {mib} MiB but the first"), above == (mib - 1) * MIB, &near);
        look.wants_near(
            "640 KiB or a little less below",
            ram.iter().any(|e| e.0 == 0 && (0x8_0000..=0xA_0000).contains(&e.1)),
            &near,
        );
        look.forbids("RAM from A0000h to 100000h", ram.iter().any(|e| e.0 < MIB && e.1 > 0xA_0000));
        let sorted = map.windows(2).all(|two| two[0].1 <= two[1].0);
        look.wants_near("in ascending order, none over another", sorted, &near);
        if mib == large_mib {
            look.wants_near("RAM from 4 GiB on", ram.iter().any(|e| e.0 == FOUR_GIB), &near);
        }
    }
    Ok(())
}

/// Where page tables in guest memory lead (Intel SDM vol. 3, 5.5 "4-Level Paging").
fn walk(guest: &Guest<'_>, cr3: u64, address: u64) -> Option<u64> {
    const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
    let mut table = cr3 & FRAME;
    for shift in [39, 30, 21, 12] {
        let entry = guest.read_u64(table + (address >> shift & 0x1FF) * 8).ok()?;
        if entry & 1 == 0 {
            return None;
        }
        let offset = (1 << shift) - 1;
        if shift == 12 || shift < 39 && entry >> 7 & 1 == 1 {
            return Some(entry & FRAME & !offset | address & offset);
        }
        table = entry & FRAME;
    }
    None
}

fn the_kernel_is_entered_as_the_boot_protocol_says(look: &mut Look) -> Result<()> {
    let address = look.random(2..40) * MIB;
    let limit = look.random(200..1000) as u32;
    let code = [&SAYS_SO[..], &STAYS].concat();
    let image = look.file("bzImage", bzimage(address, &code, &code, limit))?;
    let plain = look.file("vmlinux", vmlinux(address, &code, 0))?;
    for (kernel, entry, offset) in
        [(&plain, "elf", 0), (&image, "packed", 0x200), (&image, "packed32", 0)]
    {
        let mut identity = Vec::new();
        let args = small(kernel, &["--no-initrd", "--entry", entry]);
        let (ran, found) = find(look, &args, |found, guest| {
            for address in [address, found.regs.rsi, found.u32(0x228).into()] {
                identity.push(walk(guest, found.sregs.cr3, address) == Some(address));
            }
        })?;
        let Found { regs, sregs, .. } = &found;
        let behind = regs.rip.wrapping_sub(address + offset);
        look.wants(
            format!("{entry}: it begins at {:#x}", address + offset),
            (6..=7).contains(&behind),
        );
        look.wants_same("HdrS in what RSI points to", b"HdrS", &array(&found.params, 0x202));
        look.wants_same(
            "CS and DS: __BOOT_CS, __BOOT_DS",
            (0x10, 0x18),
            (sregs.cs.selector, sregs.ds.selector),
        );
        look.wants_same("no interrupts: RFLAGS.IF", 0, regs.rflags >> 9 & 1);
        match entry {
            "packed32" => {
                let mode = (sregs.protected(), sregs.paging(), sregs.long(), sregs.cs.db);
                look.wants_same(
                    "protected mode without paging, 32-bit code",
                    (true, false, false, 1),
                    mode,
                );
                look.wants_same("EBX, EBP, EDI", (0, 0, 0), (regs.rbx, regs.rbp, regs.rdi));
                let flat = [sregs.cs, sregs.ds, sregs.es, sregs.ss].map(|s| (s.base, s.limit));
                look.wants_same("flat segments", [(0, u32::MAX); 4], flat);
            }
            _ => {
                look.wants(
                    "64-bit code in long mode",
                    sregs.long() && sregs.paging() && sregs.cs.l == 1,
                );
                look.wants_same(
                    "kernel, boot_params and command line are mapped to themselves",
                    vec![true; 3],
                    identity,
                );
            }
        }
        let first = ran.exits().first().map_or(0, |exit| exit.at);
        let irqchip = ran.obeyed("KVM_CREATE_IRQCHIP").next().map_or(u64::MAX, |call| call.at);
        let vcpu = ran.obeyed("KVM_CREATE_VCPU").next().map_or(0, |call| call.at);
        look.wants(
            "an irqchip, then a vCPU with a local APIC of it",
            irqchip < vcpu && vcpu < first,
        );
    }
    let text = look.random_word(limit as usize + 1);
    let args = small(&image, &["--no-initrd", "--cmdline", &text]);
    let ran = look.program(&args).run(look)?;
    look.wants_refusal(2, &format!("takes at most {limit}"), &ran);
    Ok(())
}

/// The tables that the RSDP leads to.
struct Tables {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    dsdt: Vec<u8>,
}

impl Tables {
    /// The ports of the PM1 registers: events and control.
    fn pm1(&self) -> [u16; 2] {
        [56, 64].map(|at| u32::from_le_bytes(array(&self.fadt, at)) as u16)
    }

    /// What `_S5_` gives for PM1a_CNT.SLP_TYP.
    fn s5(&self) -> Option<u8> {
        let at = self.dsdt.windows(4).position(|name| name == b"_S5_")?;
        // PackageOp, PkgLength, how many, then BytePrefix and a byte, or ZeroOp or OneOp.
        match self.dsdt.get(at + 4..at + 9)? {
            [0x12, _, _, 0x0A, value] | [0x12, _, _, value @ (0 | 1), _] => Some(*value),
            _ => None,
        }
    }

    /// Address and size of each Memory32Fixed.
    fn memory(&self) -> Vec<(u64, u32)> {
        let found = self.dsdt.windows(12).filter(|bytes| bytes.starts_with(&[0x86, 9, 0]));
        let u32_at = |bytes: &[u8], at| u32::from_le_bytes(array(bytes, at));
        found.map(|bytes| (u32_at(bytes, 4).into(), u32_at(bytes, 8))).collect()
    }
}

/// The ACPI tables of a machine with these arguments.
fn tables(look: &mut Look, args: &[&str]) -> Result<(Ran, Tables)> {
    let kernel = look.file("vmlinux", vmlinux(16 * MIB, &[&SAYS_SO[..], &STAYS].concat(), 0))?;
    let (ran, found) = find(look, &small(&kernel, args), |_, _| ())?;
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let rsdp = found.low.get(found.u64(0x70) as usize..).filter(|at| at.starts_with(b"RSD PTR "));
    let rsdp = look.needs("acpi_rsdp_addr leads to the RSDP", rsdp.and_then(|at| at.get(..36)))?;
    look.wants_same(
        "its bytes in sum, the first 20 and all",
        (0, 0),
        (sum(&rsdp[..20]), sum(rsdp)),
    );
    let mut table = |address: u64, name: &str| {
        let at = found.low.get(address as usize..).filter(|at| at.starts_with(name.as_bytes()));
        let table = at.and_then(|at| at.get(..u32::from_le_bytes(array(at, 4)) as usize));
        let table = look.needs(format!("{name} at {address:#x}"), table)?;
        look.wants_same(format!("bytes of {name} in sum"), 0, sum(table));
        Ok::<_, anyhow::Error>(table.to_vec())
    };
    let xsdt = table(u64::from_le_bytes(array(rsdp, 24)), "XSDT")?;
    let entries: Vec<_> =
        xsdt[36..].chunks(8).map(|entry| u64::from_le_bytes(array(entry, 0))).collect();
    let of = |name: &[u8]| {
        entries
            .iter()
            .copied()
            .find(|&at| found.low.get(at as usize..).is_some_and(|t| t.starts_with(name)))
    };
    let (fadt, madt) = (of(b"FACP").unwrap_or(0), of(b"APIC").unwrap_or(0));
    let fadt = table(fadt, "FACP")?;
    let madt = table(madt, "APIC")?;
    let dsdt = table(u64::from_le_bytes(array(&fadt, 140)), "DSDT")?;
    Ok((ran, Tables { fadt, madt, dsdt }))
}

fn acpi_tables_describe_the_machine(look: &mut Look) -> Result<()> {
    let cpus = look.random(1..9);
    let disks = look.random(1..6) as usize;
    let mut args =
        vec!["--no-initrd".to_owned(), "--cpus".to_owned(), cpus.to_string(), "--rng".to_owned()];
    for number in 0..disks {
        let disk = look.file(&format!("{number}.img"), [0; 4 * SECTOR])?;
        args.extend(["--disk".to_owned(), path(&disk)]);
    }
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let (ran, tables) = tables(look, &args)?;
    let made: Vec<_> = ran.obeyed("KVM_CREATE_VCPU").map(|call| call.arg).collect();
    look.wants_same("vCPUs", (0..cpus).collect::<Vec<_>>(), made);
    let (mut processors, mut ioapics, mut at) = (Vec::new(), Vec::new(), 44);
    while let Some([kind, len, ..]) = tables.madt.get(at..) {
        let (kind, len) = (*kind, (*len).max(2));
        match kind {
            0 => processors.push((tables.madt[at + 3].into(), tables.madt[at + 4] & 1)),
            1 => ioapics.push(u32::from_le_bytes(array(&tables.madt, at + 4))),
            _ => {}
        }
        at += usize::from(len);
    }
    let all: Vec<_> = (0..cpus).map(|id| (id, 1)).collect();
    look.wants_same("APIC: processors, by their local APICs, each usable", all, processors);
    look.wants_same("APIC: an IOAPIC where KVM has it", vec![0xFEC0_0000], ioapics);
    let [event, control] = tables.pm1();
    look.wants("FACP: PM1 registers", event != 0 && control != 0);
    look.wants(
        "FACP: a register that resets",
        tables.fadt[112 + 1] >> 2 & 1 == 1 && array::<8>(&tables.fadt, 120) != [0; 8],
    );
    look.wants("DSDT: sleep state S5", tables.s5().is_some());
    let named = tables.dsdt.windows(8).filter(|name| name == b"LNRO0005").count();
    look.wants_same("DSDT: virtio devices, disks and rng", disks + 1, named);
    let memory = tables.memory();
    let places: BTreeSet<_> = memory.iter().map(|memory| memory.0).collect();
    look.wants_same("each at a place of its own", disks + 1, places.len());
    look.forbids("one where there is RAM", {
        let slots = ran.slots();
        places.iter().any(|&at| slots.iter().any(|slot| (slot.start..slot.end()).contains(&at)))
    });
    // Where a driver rings the bell, KVM listens.
    let bells: BTreeSet<_> = ran.obeyed("KVM_IOEVENTFD").map(|call| call.u64(8)).collect();
    let expected: BTreeSet<_> = places.iter().map(|at| at + 0x50).collect();
    look.wants_same("QueueNotify of each is an ioeventfd", expected, bells);
    Ok(())
}

/// Linux with a shell, and what is typed there.
fn linux<'c>(look: &Look, args: &[&str], commands: &[String]) -> Program<'c> {
    let all: String = commands.iter().map(|command| format!("{command}\n")).collect();
    look.program(args).patience(PATIENCE).stdin(all)
}

/// What the guest printed when it was told to run `command`: up to its next prompt.
fn answer(look: &mut Look, ran: &Ran, command: &str) -> Result<String> {
    let out = ran.out().replace('\r', "");
    let asked = format!("{PROMPT}{command}\n");
    let answer = out.find(&asked).map(|at| &out[at + asked.len()..]);
    let answer = answer.and_then(|rest| Some(rest.split_once(PROMPT)?.0));
    Ok(look.needs(format!("Linux runs `{command}`"), answer)?.trim_end().to_owned())
}

/// GOOD if that was this.
fn wants_answer(look: &mut Look, ran: &Ran, what: &str, wanted: &str, command: &str) -> Result<()> {
    let said = answer(look, ran, command)?;
    look.wants_same(what, wanted, &said);
    Ok(())
}

/// What the guest wrote to the serial port for people: not to the divisor latch, which LCR's bit 7 puts at the same port.
fn printed(ran: &Ran) -> Vec<u8> {
    const LINE_CONTROL: u16 = SERIAL + 3;
    let (mut latch, mut printed) = (false, Vec::new());
    for exit in ran.exits() {
        if let Some([.., control]) = exit.out(LINE_CONTROL) {
            latch = control >> 7 == 1;
        }
        if !latch {
            printed.extend(exit.out(SERIAL).unwrap_or_default());
        }
    }
    printed
}

fn linux_boots_and_powers_off(look: &mut Look) -> Result<()> {
    let mib = look.random(200..500);
    let [a, b] = [look.random(1000..100_000), look.random(1000..100_000)];
    let word = look.random_word(10);
    let commands = [
        format!("echo $(({a}*{b}))"),
        "grep -o [a-z]*$ /proc/cmdline".to_owned(),
        "awk '/MemTotal/ {print $2}' /proc/meminfo".to_owned(),
        "grep -c 'IO-APIC.*ttyS0' /proc/interrupts".to_owned(),
        "true".to_owned(),
    ];
    let args = ["--memory", &format!("{mib}M"), "--append", &word];
    let ran = linux(look, &args, &commands).run(look)?;
    look.wants_code(0, &ran);
    let printed = printed(&ran);
    look.wants(
        "what one sees is what the guest wrote to port 3F8h",
        printed.len() > 200 && printed == ran.stdout,
    );
    let [product, cmdline, total, line] = [0, 1, 2, 3].map(|n| commands[n].clone());
    wants_answer(look, &ran, "a product", &(a * b).to_string(), &product)?;
    wants_answer(look, &ran, "the end of its command line", &word, &cmdline)?;
    let kib: u64 = answer(look, &ran, &total)?.parse().unwrap_or(0);
    look.wants(
        format!("its memory: {kib} of {} KiB", mib << 10),
        ((mib - 60) << 10..mib << 10).contains(&kib),
    );
    wants_answer(look, &ran, "its console interrupts by the IOAPIC", "1", &line)?;
    let last = ran.exits().iter().rev().find_map(|exit| match &exit.what {
        What::Out { data, size: 2, .. } => Some(u16::from_le_bytes(array(data, 0))),
        _ => None,
    });
    look.wants("it powers off: SLP_EN in PM1a_CNT", last.is_some_and(|value| value >> 13 & 1 == 1));
    Ok(())
}

fn linux_runs_on_every_processor(look: &mut Look) -> Result<()> {
    let cpus = look.random(2..5);
    // The clock's driver reads the CMOS by ports 70h and 71h, on the processor that the reader is bound to.
    let read = |cpu| format!("taskset {:x} cat /sys/class/rtc/rtc0/time", 1 << cpu);
    let mut commands: Vec<_> = (0..cpus).map(read).collect();
    commands.extend(["nproc", "true"].map(str::to_owned));
    let ran = linux(look, &["--cpus", &cpus.to_string()], &commands).run(look)?;
    look.wants_code(0, &ran);
    wants_answer(look, &ran, "nproc", &cpus.to_string(), "nproc")?;
    let clock = |what: &What| matches!(what, What::In { port: 0x71, .. });
    let on: BTreeSet<_> = ran.exits().iter().filter(|e| clock(&e.what)).map(|e| e.vcpu).collect();
    look.wants_same("vCPUs that read the clock", (0..cpus).collect(), on);
    // CPUID leaf 1, EBX: each vCPU has its own APIC ID in bits 24 to 31.
    let mut ids = Vec::new();
    for call in ran.obeyed("KVM_SET_CPUID2") {
        let leaf = call.given[8..].chunks(40).find(|entry| array(entry, 0) == [1, 0, 0, 0]);
        ids.extend(leaf.map(|leaf| u64::from(array::<1>(leaf, 19)[0])));
    }
    look.wants_same("APIC IDs in their CPUID", (0..cpus).collect::<Vec<_>>(), ids);
    Ok(())
}

/// Machine code that writes numbers of 32 bits to addresses below 4 GiB.
fn stores(writes: &[(u64, u32)]) -> Vec<u8> {
    // mov ebx, address; mov dword [rbx], value
    let store = |(address, value): &(u64, u32)| {
        [&[0xBB][..], &(*address as u32).to_le_bytes(), &[0xC7, 0x03], &value.to_le_bytes()]
            .concat()
    };
    writes.iter().flat_map(store).collect()
}

/// And code that reads them, for the exits.
fn loads(addresses: &[u64]) -> Vec<u8> {
    // mov ebx, address; mov eax, [rbx]
    let load =
        |address: &u64| [&[0xBB][..], &(*address as u32).to_le_bytes(), &[0x8B, 0x03]].concat();
    addresses.iter().flat_map(load).collect()
}

/// What the monitor answered to reads of these addresses, the first of each.
fn answers(ran: &Ran, addresses: &[u64]) -> Vec<Option<u32>> {
    let of = |wanted: &u64| {
        ran.exits().iter().find_map(|exit| match &exit.what {
            What::Read { addr, data } if addr == wanted => Some(u32::from_le_bytes(array(data, 0))),
            _ => None,
        })
    };
    addresses.iter().map(of).collect()
}

fn a_virtio_disk_serves_its_ring(look: &mut Look) -> Result<()> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let count = look.random(400..1000);
    // More than the monitor would move at once.
    let many = look.random(270..380);
    let [from, to] = [look.random(0..count - many), look.random(0..count - 8)];
    let image = look.random_bytes(count as usize * SECTOR);
    let disk = look.file("disk.img", &image)?;
    let args = ["--no-initrd", "--rng", "--disk", &path(&disk)];
    let (_, tables) = tables(look, &args)?;
    let devices: Vec<_> = tables.memory().iter().map(|memory| memory.0).collect();
    // Who is who, by DeviceID; then the disk's driver, whose rings and requests come with the kernel.
    let who: Vec<_> = devices.iter().flat_map(|at| [0, 4, 8].map(|offset| at + offset)).collect();
    let asks =
        look.file("asks", vmlinux(16 * MIB, &[&loads(&who)[..], &SAYS_SO, &STAYS].concat(), 0))?;
    let ran = look.program(&small(&asks, &args)).run(look)?;
    look.wants_code(0, &ran);
    let said = answers(&ran, &who);
    let (virt, modern) = (Some(u32::from_le_bytes(*b"virt")), Some(2));
    look.wants(
        "MagicValue and Version of each",
        said.len() == 6 && said.chunks(3).all(|said| said[..2] == [virt, modern]),
    );
    let kinds: BTreeSet<_> = said.chunks(3).filter_map(|said| said[2]).collect();
    look.wants_same("DeviceIDs: block and entropy", BTreeSet::from([2, 4]), kinds);
    let blk = said.chunks(3).position(|said| said[2] == Some(2)).map(|at| devices[at]);
    let blk = look.needs("the disk's registers", blk)?;

    let base = 16 * MIB;
    let [table, avail, used, requests, buffers] = [1, 2, 3, 4, 5].map(|page| base + page * 0x1000);
    let far = base + MIB;
    let status = |n: u64| requests + 0x100 + n;
    let new = look.random_bytes(3 * SECTOR);
    let descriptors = [
        // Many sectors are read in two pieces, three written, and a sector read behind the last.
        (requests, 16, NEXT, 1),
        (buffers, 512, NEXT | WRITE, 2),
        (far, many * 512 - 512, NEXT | WRITE, 3),
        (status(0), 1, WRITE, 0),
        (requests + 16, 16, NEXT, 5),
        (buffers + 0x1000, 1536, NEXT, 6),
        (status(1), 1, WRITE, 0),
        (requests + 32, 16, NEXT, 8),
        (buffers + 0x2000, 512, NEXT | WRITE, 9),
        (status(2), 1, WRITE, 0),
    ];
    let mut memory = vec![0; 0x8000];
    let mut put = |at: u64, bytes: &[u8]| {
        memory[(at - base) as usize..][..bytes.len()].copy_from_slice(bytes)
    };
    for (n, (address, len, flags, next)) in (0..).zip(descriptors) {
        let numbers = [
            address.to_le_bytes(),
            (len | u64::from(flags) << 32 | u64::from(next as u16) << 48).to_le_bytes(),
        ];
        put(table + n * 16, &numbers.concat());
    }
    put(avail, &[0, 3, 0, 4, 7].map(u16::to_le_bytes).concat());
    for (n, (kind, sector)) in (0..).zip([(0_u64, from), (1, to), (0, count)]) {
        put(requests + n * 16, &[kind.to_le_bytes(), sector.to_le_bytes()].concat());
        put(status(n), &[0xEE]);
    }
    put(buffers + 0x1000, &new);
    let r = |offset: u64| blk + offset;
    let setup = stores(&[
        (r(0x70), 1),
        (r(0x70), 3),
        (r(0x24), 0),
        (r(0x20), 0),
        (r(0x24), 1),
        (r(0x20), 1),
        (r(0x70), 0xB),
        (r(0x30), 0),
        (r(0x38), 16),
        (r(0x80), table as u32),
        (r(0x84), 0),
        (r(0x90), avail as u32),
        (r(0x94), 0),
        (r(0xA0), used as u32),
        (r(0xA4), 0),
        (r(0x44), 1),
        (r(0x70), 0xF),
        (r(0x50), 0),
    ]);
    // mov ebx, used; again: cmp word [rbx + 2], 3; pause; jne again
    let wait = [
        &[0xBB][..],
        &(used as u32).to_le_bytes(),
        &[0x66, 0x83, 0x7B, 0x02, 3, 0xF3, 0x90, 0x75, 0xF7],
    ]
    .concat();
    let asked = [r(0x100), r(0x70), r(0x60)];
    let code = [&setup[..], &wait, &loads(&asked), &SAYS_SO, &STAYS].concat();
    ensure!(code.len() < 0x1000, "the driver is too long");
    put(base, &code);
    let driver = look.file("driver", vmlinux(base, &memory, 0))?;
    let (mut after, mut read) = (Vec::new(), Vec::new());
    let ran = look
        .program(&small(&driver, &args))
        .at_exit(|exit, guest| {
            if exit.out(SERIAL).is_some() {
                after = guest.read(base, memory.len())?;
                read = guest.read(buffers, SECTOR)?;
                read.extend(guest.read(far, many as usize * SECTOR - SECTOR)?);
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let at = |address: u64, len: usize| {
        after.get((address - base) as usize..).and_then(|rest| rest.get(..len)).unwrap_or(&[])
    };
    look.wants_same(
        "capacity, Status, InterruptStatus",
        vec![Some(count as u32), Some(0xF), Some(1)],
        answers(&ran, &asked),
    );
    look.forbids(
        "an exit for QueueNotify",
        ran.exits()
            .iter()
            .any(|exit| matches!(exit.what, What::Write { addr, .. } if addr == r(0x50))),
    );
    look.wants_same("status: done, done, failed", &[0, 0, 1][..], at(status(0), 3));
    let there = &image[from as usize * SECTOR..][..many as usize * SECTOR];
    look.wants(format!("{many} sectors are in two buffers"), read == there);
    let element = |n: u64| {
        (
            u32::from_le_bytes(array(at(used + 4 + n * 8, 8), 0)),
            u32::from_le_bytes(array(at(used + 4 + n * 8, 8), 4)),
        )
    };
    look.wants_same(
        "used ring: chains and bytes written",
        [(0, many as u32 * 512 + 1), (4, 1)],
        [element(0), element(1)],
    );
    look.wants_same("and the third chain", 7, element(2).0);
    let mut expected = image.clone();
    expected[to as usize * SECTOR..][..new.len()].copy_from_slice(&new);
    look.wants("three sectors are in the file, and nothing else", fs::read(&disk)? == expected);
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let sum = Command::new("sha256sum").arg(path).output().context("cannot start sha256sum")?;
    let text = String::from_utf8_lossy(&sum.stdout).into_owned();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

fn linux_reads_and_writes_disks(look: &mut Look) -> Result<()> {
    let counts = [look.random(2000..6000), look.random(200..600), look.random(200..600)];
    let images = counts.map(|count| look.random_bytes(count as usize * SECTOR));
    let files = [0, 1, 2].map(|n| look.path(&format!("{n}.img")));
    for (file, image) in files.iter().zip(&images) {
        fs::write(file, image)?;
    }
    let serial = look.random_word(9);
    let to = look.random(100..1900);
    let sums = [sha256(&files[0])?, sha256(&files[1])?];
    let commands = [
        "sha256sum < /dev/vda".to_owned(),
        "sha256sum < /dev/vdb".to_owned(),
        "cat /sys/block/vda/serial".to_owned(),
        "cat /sys/class/misc/hw_random/rng_current".to_owned(),
        "head -c 65536 /dev/hwrng > x; sha256sum < x".to_owned(),
        format!("dd if=x of=/dev/vda bs=512 count=100 seek={to} conv=fsync"),
        "dd if=x of=/dev/vdb count=1 conv=fsync && echo written".to_owned(),
        "dd if=x of=/dev/vdc count=1 && cmp -n 512 x /dev/vdc && echo same".to_owned(),
        "head -c 51200 x | sha256sum".to_owned(),
        "echo do''ne".to_owned(),
    ];
    let disks = [
        format!("{},serial={serial}", path(&files[0])),
        format!("{},ro", path(&files[1])),
        format!("{},snapshot", path(&files[2])),
    ];
    // It is not the guest that ends the machine: what it has flushed stays all the same.
    let args = [
        "--rng",
        "--disk",
        &disks[0],
        "--disk",
        &disks[1],
        "--disk",
        &disks[2],
        "--exit-when",
        "\ndone",
    ];
    let ran = linux(look, &args, &commands).hold_stdin().without_exits().run(look)?;
    look.wants_code(0, &ran);
    look.wants_same("an ioeventfd and an irqfd for each device", (4, true), {
        (ran.obeyed("KVM_IOEVENTFD").count(), ran.obeyed("KVM_IRQFD").count() >= 4)
    });
    wants_answer(
        look,
        &ran,
        "what it reads of the first disk",
        &format!("{}  -", sums[0]),
        &commands[0],
    )?;
    wants_answer(look, &ran, "and of the second", &format!("{}  -", sums[1]), &commands[1])?;
    wants_answer(look, &ran, "the first one's serial number", &serial, &commands[2])?;
    wants_answer(look, &ran, "where its randomness comes from", "virtio_rng.0", &commands[3])?;
    let protected = answer(look, &ran, &commands[6])?;
    look.forbids("a write to the one with `ro`", protected.contains("written"));
    let kept = answer(look, &ran, &commands[7])?;
    look.wants("a write to the one with `snapshot` is there", kept.ends_with("same"));
    let after = fs::read(&files[0])?;
    let new = &after[to as usize * SECTOR..][..100 * SECTOR];
    let part = look.file("part", new)?;
    let sum = format!("{}  -", sha256(&part)?);
    wants_answer(look, &ran, "the sum of what it wrote, as in the file", &sum, &commands[8])?;
    let zeros = new.iter().filter(|&&byte| byte == 0).count();
    look.wants("which is random indeed", (100..400).contains(&zeros));
    let mut expected = images[0].clone();
    expected[to as usize * SECTOR..][..new.len()].copy_from_slice(new);
    look.wants("and nothing else has changed", after == expected && after != images[0]);
    let rest = fs::read(&files[1])? == images[1] && fs::read(&files[2])? == images[2];
    look.wants("the others' files are as they were", rest);
    Ok(())
}

/// Runs a machine with `--snapshot-to` and, once it has printed `text`, saves it.
fn save<'c>(program: Program<'c>, text: &'c [u8]) -> Program<'c> {
    let mut printed = Vec::new();
    let mut saved = false;
    program.hold_stdin().at_exit(move |exit, guest| {
        printed.extend(exit.out(SERIAL).unwrap_or_default());
        if !saved && printed.ends_with(text) {
            saved = true;
            guest.signal(Signal::SIGUSR1)?;
        }
        Ok(())
    })
}

fn a_machine_goes_on_from_its_snapshot(look: &mut Look) -> Result<()> {
    // R8 to R15 with random numbers; then it waits for a byte, and prints the next one.
    let numbers: [u64; 8] = std::array::from_fn(|_| look.random(..));
    let load = |(n, number): (u8, &u64)| [&[0x49, 0xB8 + n][..], &number.to_le_bytes()].concat();
    let registers: Vec<u8> = (0..).zip(&numbers).flat_map(load).collect();
    let poll = [
        &[0xB9, 0x00, 0x00, 0x01, 0x00, 0xF3, 0x90, 0xE2, 0xFC][..], // mov ecx, 0x10000; pause; loop
        &[0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xEE],     // in al, 0x3FD; test al, 1; jz
        &[0x66, 0xBA, 0xF8, 0x03, 0xEC, 0x04, 0x01, 0xEE], // in al, 0x3F8; add al, 1; out dx, al
        &STAYS,
    ];
    let listens = [0x66, 0xBA, 0xF9, 0x03, 0xB0, 0x01, 0xEE]; // mov dx, 0x3F9; mov al, 1; out dx, al
    let noise = look.random_bytes(50_000);
    let code = [&registers[..], &listens, &SAYS_SO, &poll.concat(), &noise].concat();
    let (kernel, folder) = (look.file("vmlinux", vmlinux(16 * MIB, &code, 0))?, look.path("saved"));
    let args = [
        "--kernel",
        &path(&kernel),
        "--no-initrd",
        "--memory",
        "64M",
        "--snapshot-to",
        &path(&folder),
    ];
    let ran = save(look.program(&args), b"!").run(look)?;
    look.wants_code(0, &ran);
    look.wants("the vCPU's registers were asked for", ran.obeyed("KVM_GET_REGS").count() > 0);
    let typed = look.random(u64::from(b'a')..u64::from(b'y')) as u8;
    let text = String::from_utf8_lossy(&[typed + 1]).into_owned();
    let args = ["--restore", &path(&folder), "--exit-when", &text];
    let mut found = None;
    let ran = look
        .program(&args)
        .stdin([typed])
        .hold_stdin()
        .at_exit(|_, guest| {
            if found.is_none() {
                found = Some((guest.regs()?, guest.read(16 * MIB, code.len())?));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let (regs, memory) = look.needs("it goes on", found)?;
    let Regs { r8, r9, r10, r11, r12, r13, r14, r15, .. } = regs;
    look.wants_same("with its registers", numbers, [r8, r9, r10, r11, r12, r13, r14, r15]);
    look.wants("and its memory", memory == code);
    look.wants_same(
        "it prints what only the saved program would",
        vec![typed + 1],
        ran.written(SERIAL),
    );

    // And Linux: a shell with a variable, and a clock that goes on.
    let (word, folder) = (look.random_word(10), look.path("linux"));
    let program = look.program(&["--memory", "256M", "--snapshot-to", &path(&folder)]);
    let program = program.patience(PATIENCE).stdin(format!("word={word}; echo rea''dy\n"));
    let ran = save(program, b"\nready").run(look)?;
    look.wants_code(0, &ran);
    let commands =
        ["", "echo $word is kept", "sleep 1; dmesg | grep -c stall; echo still $((6*7))"];
    let ran =
        linux(look, &["--restore", &path(&folder)], &commands.map(str::to_owned)).run(look)?;
    look.wants_code(0, &ran);
    let said = String::from_utf8_lossy(&ran.written(SERIAL)).into_owned();
    look.wants_in("the shell remembers", &format!("\n{word} is kept\r"), &said);
    look.wants_in("timers go on", "\nstill 42\r", &said);
    Ok(())
}

fn the_machine_ends_as_its_guest_wants(look: &mut Look) -> Result<()> {
    let (_, tables) = tables(look, &["--no-initrd"])?;
    let [event, control] = tables.pm1();
    let s5 = u16::from(look.needs("DSDT: sleep state S5", tables.s5())?);
    let out = |port: u16, value: u16| {
        // mov dx, port; mov ax, value; out dx, ax
        [&[0x66, 0xBA][..], &port.to_le_bytes(), &[0x66, 0xB8], &value.to_le_bytes(), &[0x66, 0xEF]]
            .concat()
    };
    let off = out(control, s5 << 10 | 1 << 13);
    let [low, high, ..] = array::<8>(&tables.fadt, 120);
    // mov dx, port; mov al, value; out dx, al
    let reset = [0x66, 0xBA, low, high, 0xB0, tables.fadt[128], 0xEE];
    let word = look.random_word(12);
    let last_words = format!("\nKernel panic - not syncing: {word}\n");
    // lea rsi, [rip + behind]; mov ecx, length; mov dx, 0x3F8; rep outsb; reset
    let length = last_words.len() as u32;
    let print = [
        &[0x48, 0x8D, 0x35, 20, 0, 0, 0, 0xB9][..],
        &length.to_le_bytes(),
        &[0x66, 0xBA, 0xF8, 0x03, 0xF3, 0x6E],
    ];
    let panic = [&print.concat()[..], &reset, &STAYS, last_words.as_bytes()].concat();
    // The power button is wanted; once it was pressed, off.
    let [event_low, event_high] = event.to_le_bytes();
    let wait = [0x66, 0xBA, event_low, event_high, 0x66, 0xED, 0xF6, 0xC4, 0x01, 0x74, 0xF5];
    let button = [&out(event + 2, 1 << 8)[..], &SAYS_SO, &wait, &off].concat();
    for (name, code, exit_code, says) in [
        ("power-off", &off, 0, ""),
        ("reset", &reset.to_vec(), 0, ""),
        ("panic", &panic, 1, &*word),
        ("triple fault", &vec![0x0F, 0x0B], 1, "triple fault"),
        ("power button", &button, 0, ""),
    ] {
        let kernel = look.file("kernel", vmlinux(16 * MIB, &[&code[..], &STAYS].concat(), 0))?;
        let pressed = Cell::new(false);
        let ran = look
            .program(&["--kernel", &path(&kernel), "--no-initrd"])
            .hold_stdin()
            .at_exit(|exit, guest| {
                if exit.out(SERIAL) == Some(b"!") && !pressed.replace(true) {
                    guest.signal(Signal::SIGTERM)?;
                }
                Ok(())
            })
            .run(look)?;
        look.wants_code(exit_code, &ran);
        look.wants_in(format!("{name}: what is told"), says, &ran.err());
        let last = ran.exits().iter().rev().find(|exit| !matches!(exit.what, What::Interrupted));
        let last = last.map(|exit| exit.what.clone());
        let wanted = match name {
            "power-off" | "power button" => What::Out {
                port: control,
                size: 2,
                data: (s5 << 10 | 1 << 13).to_le_bytes().into(),
            },
            "triple fault" => What::Shutdown,
            _ => What::Out {
                port: u16::from_le_bytes([low, high]),
                size: 1,
                data: vec![tables.fadt[128]],
            },
        };
        look.wants_same(format!("{name}: the last exit"), Some(wanted), last);
    }
    Ok(())
}
