//! Stage 04: port I/O, a serial port, string I/O, a hypercall port, several vCPUs.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::Result;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::record::{Exit, On, What};

criteria![
    letters_go_out_by_the_serial_port,
    letters_come_in_by_the_serial_port,
    hypercalls_print_and_wait_for_keys,
    a_guest_ends_itself_with_a_code,
    ports_without_a_device_read_as_ones,
    every_size_of_access_is_one_access,
    string_instructions_are_an_access_an_element,
    several_vcpus_run_at_once_in_one_machine,
    what_each_guest_did_is_counted,
    a_guest_that_dies_or_never_ends_is_told,
];

const SERIAL: u16 = 0x3F8;
const STATUS: u16 = 0x3FD;
const EXIT: u16 = 0x500;
const PUTCHAR: u16 = 0x504;
const GETCHAR: u16 = 0x508;
const DEBUG_EXIT: u16 = 0xF4;

/// Where a program begins in its window, and how large that is.
const PROGRAM: u64 = 0x1000;
const WINDOW: u64 = 0x1_0000;

/// `mov` of 16 bits to these registers.
const DX: u8 = 0xBA;
const CX: u8 = 0xB9;
const SI: u8 = 0xBE;
const DI: u8 = 0xBF;

const OUT_AL: &[u8] = &[0xEE];
const OUT_AX: &[u8] = &[0xEF];
const OUT_EAX: &[u8] = &[0x66, 0xEF];
const IN_AL: &[u8] = &[0xEC];
const IN_AX: &[u8] = &[0xED];
const IN_EAX: &[u8] = &[0x66, 0xED];
const HLT: &[u8] = &[0xF4];
const JMP_SELF: &[u8] = &[0xEB, 0xFE];

/// A guest of 16-bit code, put together by bytes.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov register, value`
    fn mov(self, register: u8, value: u16) -> Self {
        self.put(&[register]).put(&value.to_le_bytes())
    }

    /// `mov al, value`
    fn al(self, value: u8) -> Self {
        self.put(&[0xB0, value])
    }

    /// `mov eax, value`
    fn eax(self, value: u32) -> Self {
        self.put(&[0x66, 0xB8]).put(&value.to_le_bytes())
    }

    /// `mov [address], eax`
    fn store_eax(self, address: u16) -> Self {
        self.put(&[0x66, 0xA3]).put(&address.to_le_bytes())
    }

    /// `mov si, text; mov cx, count; cld; rep outs…` to the port, with the text behind the code: `jmp` leads over it.
    fn rep_out(self, port: u16, size: u8, text: &[u8]) -> Self {
        // `jmp near`: an opcode and the distance.
        let distance = text.len() as u16;
        let begin = PROGRAM as u16 + self.0.len() as u16 + 3;
        let code = self.put(&[0xE9]).put(&distance.to_le_bytes()).put(text);
        let code = code.mov(DX, port).mov(SI, begin);
        let code = code.mov(CX, text.len() as u16 / u16::from(size)).put(&[0xFC]);
        code.put(match size {
            1 => &[0xF3, 0x6E],
            2 => &[0xF3, 0x6F],
            _ => &[0xF3, 0x66, 0x6F],
        })
    }

    /// As a file for the submission.
    fn file(self, look: &Look, name: &str) -> Result<PathBuf> {
        look.file(name, self.0)
    }
}

/// What the guest read from a port, in its order.
fn read(ran: &Ran, wanted: u16) -> Vec<Vec<u8>> {
    let read = ran.exits().iter().filter_map(|exit| match &exit.what {
        What::In { port, data, .. } if *port == wanted => Some(data.clone()),
        _ => None,
    });
    read.collect()
}

/// Exits for OUT and for IN, and the bytes that they had, of a vCPU of the first machine.
fn counts(ran: &Ran, vcpu: u64) -> (usize, usize, usize) {
    let mut counts = (0, 0, 0);
    for exit in ran.exits().iter().filter(|exit| (exit.vm, exit.vcpu) == (0, vcpu)) {
        match &exit.what {
            What::Out { data, .. } => counts = (counts.0 + 1, counts.1, counts.2 + data.len()),
            What::In { data, .. } => counts = (counts.0, counts.1 + 1, counts.2 + data.len()),
            _ => {}
        }
    }
    counts
}

/// Random text without what a terminal would take for the end of input.
fn keys(look: &mut Look, len: usize) -> Vec<u8> {
    look.random_bytes(len).into_iter().map(|byte| if byte == 4 { b'4' } else { byte }).collect()
}

fn letters_go_out_by_the_serial_port(look: &mut Look) -> Result<()> {
    let len = look.random(40..80) as usize;
    let text = look.random_bytes(len);
    // Before each letter it waits until LSR says that THR is empty: in al, dx; test al, 0x20; jz back.
    let code = text.iter().fold(Code::default(), |code, &letter| {
        let code = code.mov(DX, STATUS).put(IN_AL).put(&[0xA8, 0x20, 0x74, 0xFB]);
        code.mov(DX, SERIAL).al(letter).put(OUT_AL)
    });
    let file = code.put(HLT).file(look, "letters.bin")?;
    let ran = look.program(&[&file]).run(look)?;
    look.wants_code(0, &ran);
    look.wants_same("what the guest sent to port 0x3F8", &text, &ran.written(SERIAL));
    let status = read(&ran, STATUS);
    let ready = status.iter().all(|answer| answer[..] == [0x60]);
    look.wants_near(
        "LSR: THR is empty, the line is idle, no byte has come",
        ready && status.len() >= len,
        &[format!("{status:x?}")],
    );
    look.wants("KVM_EXIT_HLT", ran.exits().last().is_some_and(Exit::is_hlt));
    look.wants_same("stdout is what the guest sent, byte for byte", &text, &ran.stdout);
    look.wants_in("how it ended is told", "ended by HLT", &ran.err());
    Ok(())
}

fn letters_come_in_by_the_serial_port(look: &mut Look) -> Result<()> {
    let len = look.random(100..300) as usize;
    let typed = keys(look, len);
    let ran = look.program(&["echo"]).stdin(typed.clone()).run(look)?;
    look.wants_code(0, &ran);
    let received: Vec<u8> = read(&ran, SERIAL).concat();
    let wanted = [&typed[..], &[4]].concat();
    look.wants_same("what RBR gave the guest: stdin, then Ctrl-D", &wanted, &received);
    // Before each byte LSR has said that it is there.
    let mut ready = false;
    let mut unannounced = 0;
    for exit in ran.exits() {
        match &exit.what {
            What::In { port: STATUS, data, .. } => ready = data[..] == [0x61],
            What::In { port: SERIAL, .. } => {
                unannounced += usize::from(!std::mem::take(&mut ready));
            }
            _ => {}
        }
    }
    look.wants_same("bytes that LSR had not announced", 0, unannounced);
    look.wants_same("what the guest sent back", &typed, &ran.written(SERIAL));
    look.wants_same("stdout", &typed, &ran.stdout);
    Ok(())
}

fn hypercalls_print_and_wait_for_keys(look: &mut Look) -> Result<()> {
    let (len, key) = (look.random(50..150) as usize, look.random(1..=255) as u8);
    let typed = look.random_bytes(len);
    // in eax, dx; cmp eax, -1; je end; xor al, key; mov dx, PUTCHAR; out dx, al; jmp back
    let code = Code::default().mov(DX, GETCHAR).put(IN_EAX);
    let code = code.put(&[0x66, 0x83, 0xF8, 0xFF, 0x74, 0x08, 0x34, key]);
    let code = code.mov(DX, PUTCHAR).put(OUT_AL).put(&[0xEB, 0xED]).put(HLT);
    let file = code.file(look, "cipher.bin")?;
    let ran = look.program(&[&file]).stdin(typed.clone()).run(look)?;
    look.wants_code(0, &ran);
    let wanted = typed.iter().map(|&byte| vec![byte, 0, 0, 0]).chain([vec![0xFF; 4]]);
    let wanted: Vec<_> = wanted.collect();
    look.wants_same("each key in 32 bits, all ones at the end", wanted, read(&ran, GETCHAR));
    let cipher: Vec<u8> = typed.iter().map(|byte| byte ^ key).collect();
    look.wants_same("what the guest printed", &cipher, &ran.written(PUTCHAR));
    look.wants_same("stdout", &cipher, &ran.stdout);
    // One that is to be typed only when the guest has asked a question, which has to be seen.
    let (question, letter) = (look.random_word(12), b'a' + look.random(0..26) as u8);
    let code = Code::default().rep_out(PUTCHAR, 1, question.as_bytes());
    let code = code.mov(DX, GETCHAR).put(IN_AL).mov(DX, PUTCHAR).put(OUT_AL).put(HLT);
    let file = code.file(look, "question.bin")?;
    let program = look.program(&[&file]).reply(question.clone(), vec![letter]).hold_stdin();
    let ran = program.run(look)?;
    look.wants_code(0, &ran);
    look.wants_same("the key that answers a question", vec![vec![letter]], read(&ran, GETCHAR));
    Ok(())
}

fn a_guest_ends_itself_with_a_code(look: &mut Look) -> Result<()> {
    let (small, large) = (look.random(1..=255), look.random(0x1_0000..1 << 32));
    for (port, code) in [(DEBUG_EXIT, 0), (EXIT, 0), (DEBUG_EXIT, small), (EXIT, large)] {
        let ends = Code::default().mov(DX, port).eax(code as u32).put(if code == small {
            OUT_AL
        } else {
            OUT_EAX
        });
        // What stands behind it must not run.
        let file = ends.mov(DX, PUTCHAR).al(b'!').put(OUT_AL).put(HLT).file(look, "ends.bin")?;
        let ran = look.program(&[&file]).run(look)?;
        look.wants_code(i32::from(code != 0), &ran);
        let last = ran.exits().last().map(|exit| (exit.out(port).is_some(), exit.at));
        let runs_on = ran.exit_count() != 1 || !ran.stdout.is_empty();
        look.wants(format!("an exit for port {port:#x}"), last.is_some_and(|last| last.0));
        look.forbids("anything after it", runs_on);
        look.wants_in("the code is told", &format!("code {code} "), &ran.err());
    }
    Ok(())
}

fn ports_without_a_device_read_as_ones(look: &mut Look) -> Result<()> {
    // Right beside the devices, and anywhere.
    let mut ports = [0x3F7, 0x400, 0x4FF, 0x50C, 0xF3, 0xF8].map(|port| (port, 1)).to_vec();
    let anywhere = look.random_set(6, 0x600..0xFFF0).into_iter().map(|port| port as u16);
    ports.extend(anywhere.zip([4, 2, 1, 4, 2, 1]));
    let before = look.random(0..1 << 32) as u32;
    let (mut code, mut wanted) = (Code::default(), Vec::new());
    for (at, &(port, size)) in ports.iter().enumerate() {
        let (read, ones): (_, u32) = match size {
            1 => (IN_AL, 0xFF),
            2 => (IN_AX, 0xFFFF),
            _ => (IN_EAX, !0),
        };
        // What is written there is lost. A narrow read leaves the rest of EAX as it was.
        code = code.mov(DX, port).eax(before).put(OUT_AL).put(read);
        code = code.store_eax(0x8000 + 4 * at as u16);
        wanted.extend((before | ones).to_le_bytes());
    }
    let file = code.put(HLT).file(look, "nobody.bin")?;
    let memory = RefCell::new(Vec::new());
    let len = wanted.len();
    let ran = look
        .program(&[&file])
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                *memory.borrow_mut() = guest.read(0x8000, len)?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    for (port, size) in ports {
        let ones = vec![vec![0xFF; size]];
        look.wants_same(format!("what port {port:#x} gave"), ones, read(&ran, port));
    }
    look.wants_same("what the guest has in memory", wanted, memory.into_inner());
    look.forbids("anything on stdout", !ran.stdout.is_empty());
    Ok(())
}

fn every_size_of_access_is_one_access(look: &mut Look) -> Result<()> {
    let number = look.random(0..1 << 32) as u32;
    let typed = look.random_bytes(6);
    let before = look.random(0..1 << 32) as u32;
    let mut code = Code::default().mov(DX, PUTCHAR).eax(number);
    for out in [OUT_EAX, OUT_AL, OUT_AX] {
        code = code.put(out);
    }
    let mut wanted = Vec::new();
    for (at, (read, mask)) in
        [(IN_AX, 0xFFFF_u32), (IN_AL, 0xFF), (IN_EAX, !0)].into_iter().cycle().take(6).enumerate()
    {
        code = code.mov(DX, GETCHAR).eax(before).put(read).store_eax(0x8000 + 4 * at as u16);
        wanted.extend((before & !mask | u32::from(typed[at])).to_le_bytes());
    }
    let file = code.put(HLT).file(look, "sizes.bin")?;
    let memory = RefCell::new(Vec::new());
    let ran = look
        .program(&[&file])
        .stdin(typed)
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                *memory.borrow_mut() = guest.read(0x8000, 24)?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let bytes = number.to_le_bytes();
    let printed = [&bytes[..], &bytes[..1], &bytes[..2]].concat();
    look.wants_same("OUT of 4, 1 and 2 bytes", &printed, &ran.written(PUTCHAR));
    look.wants_same("stdout has as many characters as an access has bytes", &printed, &ran.stdout);
    look.wants_same("IN of 2, 1 and 4 bytes is a key each", wanted, memory.into_inner());
    Ok(())
}

fn string_instructions_are_an_access_an_element(look: &mut Look) -> Result<()> {
    let typed = look.random_bytes(3 * 40);
    let printed = look.random_bytes(3 * 40);
    let mut code = Code::default().mov(DX, GETCHAR).mov(DI, 0x8000).put(&[0xFC]);
    for rep in [&[0xF3, 0x6C][..], &[0xF3, 0x6D], &[0xF3, 0x66, 0x6D]] {
        code = code.mov(CX, 40).put(rep);
    }
    for (size, part) in [1, 2, 4].into_iter().zip(printed.chunks(40)) {
        code = code.rep_out(PUTCHAR, size, part);
    }
    let file = code.put(HLT).file(look, "strings.bin")?;
    let memory = RefCell::new(Vec::new());
    let ran = look
        .program(&[&file])
        .stdin(typed.clone())
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                *memory.borrow_mut() = guest.read(0x8000, 40 * (1 + 2 + 4))?;
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let wanted = typed.chunks(40).zip([1, 2, 4]).flat_map(|(part, size)| {
        let key = move |byte: &u8| [&[*byte][..], &[0; 3][..size - 1]].concat();
        part.iter().flat_map(key).collect::<Vec<_>>()
    });
    let wanted: Vec<u8> = wanted.collect();
    let memory = memory.into_inner();
    look.wants_same("rep insb, insw, insd: a key an element", &wanted, &memory);
    look.wants_same("the same in KVM's exits", &wanted, &read(&ran, GETCHAR).concat());
    look.wants_same("rep outsb, outsw, outsd", &printed, &ran.written(PUTCHAR));
    look.wants_same("stdout", &printed, &ran.stdout);
    Ok(())
}

/// A guest that waits until each of `count` guests has left a mark in the same memory, and then prints lines.
fn meets(id: u16, count: u16, lines: &[String]) -> Code {
    // Physical 0xF000 is the same for all through a segment register that the guest loads itself.
    // xor ax, ax; mov es, ax; mov byte [es:0xF000 + id], 1
    let code = Code::default().put(&[0x31, 0xC0, 0x8E, 0xC0, 0x26, 0xC6, 0x06]);
    let mut code = code.put(&(0xF000 + id).to_le_bytes()).put(&[1]);
    for other in 0..count {
        // pause; cmp byte [es:0xF000 + other], 1; jne back
        code = code.put(&[0xF3, 0x90, 0x26, 0x80, 0x3E]).put(&(0xF000 + other).to_le_bytes());
        code = code.put(&[1, 0x75, 0xF6]);
    }
    code.rep_out(PUTCHAR, 1, lines.join("\n").as_bytes()).put(HLT)
}

fn several_vcpus_run_at_once_in_one_machine(look: &mut Look) -> Result<()> {
    let count = look.random(3..6) as u16;
    let (mut files, mut texts, mut codes) = (Vec::new(), Vec::new(), Vec::new());
    for id in 0..count {
        let lines: Vec<_> = (0..5).map(|_| look.random_word(16)).collect();
        let code = meets(id, count, &lines);
        codes.push(code.0.clone());
        files.push(code.file(look, &format!("guest{id}.bin"))?);
        texts.push(lines);
    }
    let bases = RefCell::new(BTreeMap::new());
    let strangers = Cell::new(0);
    let ran = look
        .program(&files)
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                let base = guest.sregs()?.cs.base;
                bases.borrow_mut().insert(exit.vcpu, base);
                let code = codes.get(exit.vcpu as usize);
                let same = code.is_some_and(|code| {
                    guest.read(base + PROGRAM, code.len()).is_ok_and(|there| there == *code)
                });
                strangers.set(strangers.get() + u32::from(!same));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    look.wants_same("virtual machines", 1, ran.vms());
    let made = ran.obeyed("KVM_CREATE_VCPU").filter(|call| call.on == On::Vm(0));
    let made: Vec<_> = made.map(|call| call.arg).collect();
    look.wants_same("vCPUs by their numbers", (0..u64::from(count)).collect(), made);
    let bases = bases.into_inner();
    let windows: BTreeSet<_> = bases.values().map(|base| base / WINDOW).collect();
    let apart = windows.len() == usize::from(count);
    look.wants_near("a window of 64 KiB for each", apart, &[format!("{bases:x?}")]);
    look.wants_same("windows with another program than was given", 0, strangers.get());
    let out = ran.out();
    let printed: Vec<_> = out.lines().collect();
    for (id, lines) in texts.iter().enumerate() {
        let own: Vec<_> = printed.iter().filter(|line| lines.iter().any(|l| l == *line)).collect();
        let wanted: Vec<_> = lines.iter().map(String::as_str).collect();
        let own: Vec<_> = own.into_iter().copied().collect();
        look.wants_same(format!("the lines of vCPU {id}, whole and in order"), wanted, own);
        let told = ran
            .err()
            .lines()
            .any(|line| line.starts_with(&format!("vCPU {id}, ")) && line.contains("ended by HLT"));
        look.wants(format!("how vCPU {id} ended is told"), told);
    }
    look.wants_same("lines in all", 5 * usize::from(count), printed.len());
    Ok(())
}

fn what_each_guest_did_is_counted(look: &mut Look) -> Result<()> {
    let mut files = Vec::new();
    for id in 0..2 {
        let (outs, ins) = (look.random(1..30), look.random(1..30));
        let mut code = Code::default().mov(DX, 0x1234).eax(0);
        for number in 0..outs + ins {
            let size = look.random(0..3) as usize;
            code = code.put(match number < outs {
                true => [OUT_AL, OUT_AX, OUT_EAX][size],
                false => [IN_AL, IN_AX, IN_EAX][size],
            });
        }
        // And some that come in one exit.
        let count = look.random(2..20) as u16;
        let code = code.mov(DI, 0x8000).mov(CX, count).put(&[0xFC, 0xF3, 0x6D]);
        files.push(code.put(HLT).file(look, &format!("counted{id}.bin"))?);
    }
    let ran = look.program(&files).run(look)?;
    look.wants_code(0, &ran);
    let err = ran.err();
    for id in 0..2 {
        let (outs, ins, bytes) = counts(&ran, id);
        look.wants(format!("vCPU {id} had both"), outs > 0 && ins > 0);
        let line = err.lines().find(|line| line.starts_with(&format!("vCPU {id}, ")));
        let told = format!("(exits: {outs} OUT, {ins} IN; bytes: {bytes})");
        look.wants_in(format!("vCPU {id}"), &told, line.unwrap_or_default());
    }
    Ok(())
}

fn a_guest_that_dies_or_never_ends_is_told(look: &mut Look) -> Result<()> {
    let text = look.random_word(20);
    let lives = Code::default().rep_out(PUTCHAR, 1, text.as_bytes()).put(HLT);
    let lives = lives.file(look, "lives.bin")?;
    let dies = look.file("dies.bin", asm::real::TRIPLE_FAULT)?;
    let order = look.random(0..2) as usize;
    let files = if order == 0 { [&dies, &lives] } else { [&lives, &dies] };
    let ran = look.program(&files).run(look)?;
    look.wants_code(1, &ran);
    // The first machine's, for an autopsy may run it again. A KVM which interprets ring 0 may give up before the fault.
    let mut died = ran.exits().iter().filter_map(|exit| match (exit.vm, &exit.what) {
        (0, What::Shutdown) => Some((exit.vcpu, "KVM_EXIT_SHUTDOWN")),
        (0, What::InternalError { .. }) => Some((exit.vcpu, "KVM_EXIT_INTERNAL_ERROR")),
        _ => None,
    });
    let (vcpu, name) = look.needs("an exit that is a vCPU's end", died.next_back())?;
    look.wants_same("it is the vCPU of the guest that dies", order as u64, vcpu);
    let err = ran.err();
    let line = |id: usize| err.lines().find(|line| line.starts_with(&format!("vCPU {id}, ")));
    look.wants_in("it is told", &format!("crashed: {name}"), line(order).unwrap_or_default());
    look.wants_in("the other one has ended", "ended by HLT", line(1 - order).unwrap_or_default());
    look.wants_in("and printed", &text, &ran.out());
    look.wants_in("an autopsy says why", &format!("autopsy: vCPU {order}, "), &err);

    let text = look.random_word(8);
    let spins = Code::default().rep_out(SERIAL, 1, text.as_bytes()).put(JMP_SELF);
    let spins = spins.file(look, "spins.bin")?;
    let args = [spins.as_os_str(), "--timeout".as_ref(), "3".as_ref()];
    let ran = look.program(&args).run(look)?;
    look.wants_code(4, &ran);
    look.wants_same("what it had printed is there", &text, &ran.out());
    look.wants_same("and was sent", text.as_bytes(), &ran.written(SERIAL)[..]);
    look.wants_in("the reason", "--timeout", &ran.err());
    Ok(())
}
