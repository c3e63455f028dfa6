//! Stage 03: a vCPU, its registers, the run loop, the ways in which a VM ends.

use std::cell::{Cell, RefCell};

use anyhow::Result;
use nix::errno::Errno;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::guest::Regs;
use crate::witness::record::{Call, Exit, On, What};

criteria![
    a_vcpu_is_made_in_a_vm_with_memory,
    the_reset_state_is_what_kvm_tells,
    cpuid_is_given_to_the_vcpu_and_the_guest_reads_it,
    registers_are_set_before_the_first_run,
    the_guest_ends_with_hlt_and_leaves_its_results,
    registers_before_and_after_are_the_vcpus,
    every_instruction_is_an_exit_with_step,
    a_triple_fault_is_a_shutdown,
    what_cannot_be_run_is_told_by_its_exit,
    a_guest_without_exits_is_called_back,
];

/// Where a guest of this stage begins.
const PROGRAM: u64 = 0x1000;

/// Why the first machine's vCPU came back, without the signals. An autopsy may make a second machine.
fn exits(ran: &Ran) -> Vec<&Exit> {
    let of_guest = |exit: &&Exit| exit.vm == 0 && exit.what != What::Interrupted;
    ran.exits().iter().filter(of_guest).collect()
}

/// When the guest ran for the first time.
fn first_run(ran: &Ran) -> u64 {
    ran.exits().first().map_or(u64::MAX, |exit| exit.at)
}

/// The registers of `kvm_regs` that 16- and 32-bit code has, by their names in the table.
fn general(regs: &Regs) -> [(&'static str, u64); 10] {
    [
        ("eax", regs.rax),
        ("ebx", regs.rbx),
        ("ecx", regs.rcx),
        ("edx", regs.rdx),
        ("esi", regs.rsi),
        ("edi", regs.rdi),
        ("ebp", regs.rbp),
        ("esp", regs.rsp),
        ("eip", regs.rip),
        ("rflags", regs.rflags),
    ]
}

fn a_vcpu_is_made_in_a_vm_with_memory(look: &mut Look) -> Result<()> {
    let ran = look.program::<&str>(&[]).run(look)?;
    look.wants_code(0, &ran);
    let made = ran.obeyed("KVM_CREATE_VCPU").next();
    let made = look.needs("KVM_CREATE_VCPU", made)?;
    look.wants_same("on the VM", On::Vm(0), made.on);
    look.wants_same("its number", 0, made.arg);
    let size = ran.obeyed("KVM_GET_VCPU_MMAP_SIZE").any(|call| call.on == On::System);
    look.wants("the size of what it shares with KVM is asked", size);
    let program = ran.slots().into_iter().any(|slot| {
        slot.result.is_ok() && (slot.start..slot.end()).contains(&PROGRAM) && slot.flags == 0
    });
    look.wants("memory at 0x1000", program);
    // A host that refuses one, each time for another reason.
    let errno = [Errno::ENOMEM, Errno::EINVAL, Errno::EEXIST][look.random(0..3) as usize];
    let ran = look
        .program::<&str>(&[])
        .pretend(move |call| (call.name == "KVM_CREATE_VCPU").then_some(-(errno as i64)))
        .run(look)?;
    look.wants_refusal(3, "KVM_CREATE_VCPU", &ran);
    let refused = ran.calls_of("KVM_CREATE_VCPU").any(|call| call.result == Err(errno));
    look.wants(format!("it was told {errno:?}"), refused);
    Ok(())
}

/// The word behind the name of a register in what is printed of the reset state.
fn told<'o>(out: &'o str, register: &str) -> Option<&'o str> {
    let line = out.lines().find_map(|line| line.strip_prefix("  ")?.strip_prefix(register))?;
    line.split_whitespace().next().map(|word| word.trim_end_matches([':', ',']))
}

fn the_reset_state_is_what_kvm_tells(look: &mut Look) -> Result<()> {
    // The processor's family, model and stepping, as no processor has them.
    let model = look.random(0x1000..0xF_FFFF);
    let mut first = true;
    let ran = look
        .program::<&str>(&[])
        .forge(move |call| {
            (call.name == "KVM_GET_REGS" && std::mem::take(&mut first)).then(|| {
                let mut answer = call.answer.clone();
                answer[24..32].copy_from_slice(&model.to_le_bytes());
                answer
            })
        })
        .run(look)?;
    let made = ran.obeyed("KVM_CREATE_VCPU").next();
    let made = look.needs("KVM_CREATE_VCPU", made)?.at;
    let set = |call: &Call| ["KVM_SET_REGS", "KVM_SET_SREGS"].contains(&call.name);
    let set = ran.calls().iter().find(|call| set(call)).map_or(u64::MAX, |call| call.at);
    let mut asked = |name: &str| {
        let call = ran.obeyed(name).find(|call| (made..set).contains(&call.at));
        look.needs(format!("{name} before any register is set"), call)
    };
    let (regs, sregs) = (asked("KVM_GET_REGS")?, asked("KVM_GET_SREGS")?);
    let number = |call: &Call, at: usize| {
        u64::from(call.answer_u32(at)) | u64::from(call.answer_u32(at + 4)) << 32
    };
    // Of `struct kvm_sregs`: CS's base is the first field, its selector stands behind base and limit.
    let (base, selector) = (number(sregs, 0), u64::from(sregs.answer_u32(12) & 0xFFFF));
    look.wants_same("CS after reset", (0xF000, 0xFFFF_0000), (selector, base));
    look.wants_same("RIP after reset", 0xFFF0, number(regs, 128));
    let out = ran.out();
    for (register, value) in [("cs", selector), ("rip", number(regs, 128)), ("rdx", model)] {
        let seen = told(&out, register).and_then(|word| u64::from_str_radix(word, 16).ok());
        look.wants_same(format!("{register} is told"), Some(value), seen);
    }
    look.wants_in("the first instruction's address", &format!("{:08X}", base + 0xFFF0), &out);
    Ok(())
}

fn cpuid_is_given_to_the_vcpu_and_the_guest_reads_it(look: &mut Look) -> Result<()> {
    // A vendor that nobody has heard of, in the order of leaf 0: EBX, EDX, ECX.
    let vendor = look.random_word(12);
    let forged = vendor.clone().into_bytes();
    let at_halt = Cell::new(None);
    let in_memory = Cell::new(false);
    let ran = look
        .program::<&str>(&[])
        .forge(move |call| {
            // `struct kvm_cpuid2`: 8 bytes, then entries of 40: function, index, flags, EAX, EBX, ECX, EDX.
            let leaf = |entry: &usize| call.answer.get(*entry..*entry + 4) == Some(&[0; 4]);
            let entry = (8..call.answer.len()).step_by(40).find(leaf);
            let entry = entry.filter(|_| call.name == "KVM_GET_SUPPORTED_CPUID")?;
            let mut answer = call.answer.clone();
            for (register, letters) in [16, 24, 20].into_iter().zip(forged.chunks(4)) {
                answer[entry + register..][..4].copy_from_slice(letters);
            }
            Some(answer)
        })
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                at_halt.set(Some(guest.regs()?));
                in_memory.set(guest.find(vendor.as_bytes()).is_some());
            }
            Ok(())
        })
        .run(look)?;
    let asked = ran.obeyed("KVM_GET_SUPPORTED_CPUID").next();
    let asked = look.needs("KVM_GET_SUPPORTED_CPUID", asked)?;
    look.wants_same("on /dev/kvm", On::System, asked.on);
    let set = ran.obeyed("KVM_SET_CPUID2").find(|call| call.on == On::Vcpu(0, 0));
    let set = look.needs("KVM_SET_CPUID2 on the vCPU", set)?;
    look.wants("before its first run", set.at < first_run(&ran));
    look.wants_same("entries", asked.answer_u32(0), set.u32(0));
    look.wants("what KVM said is what it is given", set.given.get(8..) == asked.answer.get(8..));
    let regs = look.needs("the guest at HLT", at_halt.get())?;
    let seen = [regs.rbx, regs.rdx, regs.rcx].map(|register| (register as u32).to_le_bytes());
    let seen = String::from_utf8_lossy(&seen.concat()).into_owned();
    // The loop counts down in CX, so the last letters are gone from there.
    look.wants_same("the guest has read it: EBX, EDX", &vendor[..8], &seen[..8.min(seen.len())]);
    look.wants("and it stands in memory", in_memory.get());
    let line = format!("{} entries, vendor {vendor:?}", set.u32(0));
    look.wants_in("the program tells of it", &line, &ran.out());
    Ok(())
}

fn registers_are_set_before_the_first_run(look: &mut Look) -> Result<()> {
    let ran = look.program::<&str>(&[]).run(look)?;
    let before = |call: &&Call| call.on == On::Vcpu(0, 0) && call.at < first_run(&ran);
    let sregs = ran.obeyed("KVM_SET_SREGS").filter(before).last();
    let sregs = look.needs("KVM_SET_SREGS before the first run", sregs)?;
    // Of `struct kvm_sregs`: six segments of 24 bytes, base first, selector behind base and limit.
    let segments: Vec<_> = (0..6).map(|n| (sregs.u64(n * 24), sregs.u32(n * 24 + 12))).collect();
    let flat = segments.iter().all(|(base, selector)| *base == 0 && selector & 0xFFFF == 0);
    look.wants_near("all segments begin at 0", flat, &[format!("{segments:x?}")]);
    look.wants_same("CR0.PE: it is still real mode", 0, sregs.u64(224) & 1);
    let regs = ran.obeyed("KVM_SET_REGS").filter(before).last();
    let regs = look.needs("KVM_SET_REGS before the first run", regs)?;
    look.wants_same("RIP", PROGRAM, regs.u64(128));
    look.wants_same("RFLAGS: bit 1 and no other", 2, regs.u64(136));
    look.wants("a stack below the program", (0x100..=PROGRAM).contains(&regs.u64(48)));
    // A KVM that does not take them.
    for name in ["KVM_SET_REGS", "KVM_SET_SREGS", "KVM_SET_CPUID2"] {
        let ran = look
            .program::<&str>(&[])
            .pretend(move |call| (call.name == name).then_some(-i64::from(libc::EINVAL)))
            .run(look)?;
        look.wants_code(3, &ran);
        look.wants_in("the error names the ioctl", name, &ran.err());
        look.wants_same("runs of the guest", 0, ran.exit_count());
    }
    Ok(())
}

fn the_guest_ends_with_hlt_and_leaves_its_results(look: &mut Look) -> Result<()> {
    let (sum, square) = (look.random(56..60_000) as u16, look.random(70_000..4_000_000_000) as u32);
    let halted = Cell::new(None);
    let found = Cell::new(None);
    let ran = look
        .program::<&str>(&[])
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                halted.set(Some(guest.regs()?));
                // 1 + 2 + ... + 10 and its square; behind the guest's back they become others.
                let results = [&55_u16.to_le_bytes()[..], &3025_u32.to_le_bytes()].concat();
                found.set(guest.find(&results));
                if let Some(at) = found.get() {
                    guest.write(at, &sum.to_le_bytes())?;
                    guest.write(at + 2, &square.to_le_bytes())?;
                }
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let all = exits(&ran);
    let near: Vec<_> = all.iter().map(|exit| exit.to_string()).collect();
    look.wants_near("one exit, KVM_EXIT_HLT", all.len() == 1 && all[0].is_hlt(), &near);
    let regs = look.needs("the guest at HLT", halted.get())?;
    look.wants_same("EAX: the square of the sum", 3025, regs.rax);
    look.wants_same("CX: LOOP counted it down to 0", 0, regs.rcx & 0xFFFF);
    look.wants("sum and square in guest memory", found.get().is_some());
    look.forbids("a single step that nobody asked for", {
        ran.obeyed("KVM_SET_GUEST_DEBUG").any(|call| call.u32(0) & 1 == 1)
    });
    let out = ran.out();
    look.wants_in("the exit is named", "KVM_EXIT_HLT", &out);
    let line = format!("= {sum}, squared {square}");
    look.wants_in("the program tells what stands there now", &line, &out);
    Ok(())
}

/// The rows of the table of registers: name, before, whether it is marked, after.
fn table(out: &str) -> Vec<(String, u64, bool, u64)> {
    let is_head = |line: &&str| line.contains("before") && line.contains("after");
    let rows = out.lines().skip_while(|line| !is_head(line)).skip(1);
    rows.take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let marked = *words.get(2)? == "*";
            let hex = |at: usize| u64::from_str_radix(words.get(at)?, 16).ok();
            Some((words[0].to_owned(), hex(1)?, marked, hex(if marked { 3 } else { 2 })?))
        })
        .collect()
}

fn registers_before_and_after_are_the_vcpus(look: &mut Look) -> Result<()> {
    // Three registers that the guest leaves alone: RSI, RDI, RBP, at 32, 40 and 56 of `struct kvm_regs`.
    let values = [32, 40, 56].map(|at| (at, look.random(1..u64::from(u32::MAX))));
    let (halted, regs) = (Cell::new(false), Cell::new(None));
    let ran = look
        .program::<&str>(&[])
        .forge(|call| {
            (call.name == "KVM_GET_REGS" && halted.get()).then(|| {
                let mut answer = call.answer.clone();
                for (at, value) in values {
                    answer[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                answer
            })
        })
        .at_exit(|exit, guest| {
            if exit.is_hlt() {
                halted.set(true);
                let [rsi, rdi, rbp] = values.map(|(_, value)| value);
                regs.set(Some(Regs { rsi, rdi, rbp, ..guest.regs()? }));
            }
            Ok(())
        })
        .run(look)?;
    let after = look.needs("the guest at HLT", regs.get())?;
    let set = ran.obeyed("KVM_SET_REGS").last();
    let set = look.needs("KVM_SET_REGS", set)?;
    let rows = table(&ran.out());
    // The places of the same registers in `struct kvm_regs`.
    let places = [0, 8, 16, 24, 32, 40, 56, 48, 128, 136];
    for ((name, value), place) in general(&after).into_iter().zip(places) {
        let seen = rows.iter().find(|row| row.0 == name);
        let seen = seen.map(|(_, before, _, after)| (*before, *after));
        look.wants_same(format!("{name} before and after"), Some((set.u64(place), value)), seen);
    }
    let wrong = |row: &&(String, u64, bool, u64)| row.2 != (row.1 != row.3);
    let wrong: Vec<_> = rows.iter().filter(wrong).map(|row| format!("{row:x?}")).collect();
    look.wants_near("`*` where they differ, and only there", wrong.is_empty(), &wrong);
    Ok(())
}

/// A line of `--step`: the address without the segment, the instruction's bytes, what it changed, with the lines that go
/// on with that.
fn steps(out: &str) -> Vec<(u64, Vec<u8>, String)> {
    let mut steps = Vec::<(u64, Vec<u8>, String)>::new();
    for line in out.lines() {
        let (code, changes) = line.split_once(" ; ").unwrap_or((line, ""));
        let mut words = code.split_whitespace();
        let address = words.next().and_then(|word| word.split_once(':'));
        match address.and_then(|(_, offset)| u64::from_str_radix(offset, 16).ok()) {
            Some(address) => {
                let byte = |word: &str| {
                    u8::from_str_radix(word, 16).ok().filter(|_| {
                        word.len() == 2 && !word.bytes().any(|byte| byte.is_ascii_lowercase())
                    })
                };
                steps.push((address, words.map_while(byte).collect(), changes.to_owned()));
            }
            None if code.trim().is_empty() && !changes.is_empty() => {
                if let Some(last) = steps.last_mut() {
                    last.2 = format!("{}, {changes}", last.2);
                }
            }
            None => {}
        }
    }
    steps
}

fn every_instruction_is_an_exit_with_step(look: &mut Look) -> Result<()> {
    let seen = RefCell::new(Vec::<(Regs, Vec<u8>)>::new());
    let ran = look
        .program(&["--step"])
        .at_exit(|exit, guest| {
            if matches!(exit.what, What::Debug { .. }) {
                let regs = guest.regs()?;
                seen.borrow_mut().push((regs, guest.read(regs.rip & 0xFFFF, 16)?));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let step = ran.obeyed("KVM_SET_GUEST_DEBUG").next();
    let step = look.needs("KVM_SET_GUEST_DEBUG", step)?;
    look.wants_same("KVM_GUESTDBG_ENABLE and _SINGLESTEP", 3, step.u32(0));
    look.wants("before the first run", step.at < first_run(&ran));
    let (seen, out) = (seen.into_inner(), ran.out());
    // CPUID and some more, the loop ten times, the subroutine.
    look.wants_near(
        "an exit for each of 34 instructions",
        seen.len() >= 33,
        &[format!("{}", seen.len())],
    );
    let steps = steps(&out);
    // The first line is for the first instruction, whose end is the first exit; the last for HLT, which may be no step.
    let wanted: Vec<_> =
        std::iter::once(PROGRAM).chain(seen.iter().map(|(regs, _)| regs.rip)).collect();
    let lines: Vec<_> = steps.iter().map(|step| step.0).collect();
    let same = lines.len() >= seen.len() && wanted.starts_with(&lines);
    let near = [format!("wanted {wanted:x?}"), format!("seen   {lines:x?}")];
    look.wants_near("a line for each, with the address where it stood", same, &near);
    let mut wrong = Vec::new();
    for (step, pair) in steps.iter().skip(1).zip(seen.windows(2)) {
        let (address, bytes, changes) = step;
        let ((before, memory), (after, _)) = (&pair[0], &pair[1]);
        // LOOP, RET, CALL and JMP; every other instruction is followed by the one behind it.
        let jumps = bytes.first().is_some_and(|first| [0xE2, 0xC3, 0xE8, 0xEB].contains(first));
        let whole = jumps || after.rip == before.rip + bytes.len() as u64;
        if bytes.is_empty() || !memory.starts_with(bytes) || !whole {
            wrong.push(format!("at {address:#x}: {bytes:x?}, in memory {memory:x?}"));
        }
        for ((name, before), (_, after)) in general(before).into_iter().zip(general(after)) {
            let change = format!("{name} {before:08X} -> {after:08X}");
            if before != after && !["eip", "rflags"].contains(&name) && !changes.contains(&change) {
                wrong.push(format!("at {address:#x}: {change}"));
            }
        }
    }
    look.wants_near(
        "its bytes are those in guest memory, and what it changed is told",
        wrong.is_empty(),
        &wrong,
    );
    Ok(())
}

fn a_triple_fault_is_a_shutdown(look: &mut Look) -> Result<()> {
    let last = Cell::new(None);
    let ran = look
        .program(&["triple-fault", "--step"])
        .at_exit(|exit, guest| {
            if exit.vm == 0 && matches!(exit.what, What::Debug { .. }) {
                last.set(Some((guest.regs()?, guest.sregs()?)));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(1, &ran);
    let all = exits(&ran);
    let near: Vec<_> = all.iter().map(|exit| exit.to_string()).collect();
    let shutdowns = all.iter().filter(|exit| exit.what == What::Shutdown).count();
    let ends = all.last().is_some_and(|exit| exit.what == What::Shutdown);
    look.wants_near("KVM_EXIT_SHUTDOWN, once and last", ends && shutdowns == 1, &near);
    let (regs, sregs) = look.needs("the guest before its last instruction", last.get())?;
    look.wants("it is in protected mode", sregs.protected());
    look.wants_same("its IDT has not even one entry: the limit", 0, sregs.idt.limit);
    let out = ran.out();
    look.wants_in("the exit is named", "KVM_EXIT_SHUTDOWN", &out);
    let line = steps(&out).last().map(|step| step.0);
    look.wants_same("the last line is for the fatal instruction", Some(regs.rip), line);
    let err = ran.err();
    look.wants_in("the autopsy has a cause", "\ncause  invalid opcode (#UD)", &err);
    let stack = format!("esp {:08X}", regs.rsp);
    look.wants_in("the autopsy has its registers", &stack, &err);
    Ok(())
}

fn what_cannot_be_run_is_told_by_its_exit(look: &mut Look) -> Result<()> {
    let ran = look.program(&["fail-entry"]).run(look)?;
    look.wants_code(1, &ran);
    // Of `struct kvm_sregs`: CS's L and D, CR0, EFER. Long mode with a code segment that is 64-bit and 32-bit at once.
    let impossible = |call: &Call| {
        let (d, l) = (call.given.get(17) == Some(&1), call.given.get(19) == Some(&1));
        d && l && call.u64(224) & 1 << 31 != 0 && call.u64(264) & 1 << 10 != 0
    };
    look.wants("KVM_SET_SREGS of a state that no processor has", {
        ran.obeyed("KVM_SET_SREGS").any(|call| impossible(call) && call.at < first_run(&ran))
    });
    let end = exits(&ran).last().map(|exit| exit.what.clone());
    let out = ran.out();
    match look.needs("an exit", end)? {
        What::FailEntry { reason } => {
            look.wants_in("the exit is named", "KVM_EXIT_FAIL_ENTRY", &out);
            look.wants_in("with what the processor says", &format!("{reason:#X}"), &out);
        }
        // A KVM without VT-x and SVM runs it and lets it die.
        other => {
            look.forbids(format!("KVM_EXIT_FAIL_ENTRY told, where {other:?} came"), {
                out.lines().any(|line| line.starts_with("KVM_EXIT_FAIL_ENTRY"))
            });
            look.wants_in("it is told that hardware does otherwise", "Hardware answers", &out);
        }
    }

    // An entry refused for a reason that no processor has: `struct kvm_run`'s exit_reason, and of its union the reason and the CPU.
    let reason = look.random(1 << 32..1 << 48);
    let cpu = look.random(1 << 20..1 << 24) as u32;
    let ran = look
        .program(&["fail-entry"])
        .forge(move |call| {
            (call.name == "KVM_RUN").then(|| {
                let mut run = call.answer.clone();
                run[8..12].copy_from_slice(&9_u32.to_le_bytes());
                run[32..40].copy_from_slice(&reason.to_le_bytes());
                run[40..44].copy_from_slice(&cpu.to_le_bytes());
                run
            })
        })
        .run(look)?;
    look.wants_code(1, &ran);
    look.wants_in("KVM_EXIT_FAIL_ENTRY's reason", &format!("{reason:#X}"), &ran.out());

    let at = Cell::new(None);
    let ran = look
        .program(&["internal-error"])
        .at_exit(|exit, guest| {
            if exit.vm == 0 && matches!(exit.what, What::InternalError { .. }) {
                at.set(Some(guest.sregs()?.cs.base + guest.regs()?.rip));
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(1, &ran);
    let end = exits(&ran).last().map(|exit| exit.what.clone());
    let emulation = end == Some(What::InternalError { suberror: 1 });
    look.wants_near("KVM_EXIT_INTERNAL_ERROR: emulation", emulation, &[format!("{end:?}")]);
    let at = look.needs("the guest there", at.get())?;
    let memory = ran.slots().iter().any(|slot| (slot.start..slot.end()).contains(&at));
    look.forbids(format!("memory at {at:#x}, where it stands"), memory);
    let out = ran.out();
    look.wants_in("the exit is named", "KVM_EXIT_INTERNAL_ERROR", &out);
    look.wants_in("and the suberror", "KVM_INTERNAL_ERROR_EMULATION", &out);
    Ok(())
}

fn a_guest_without_exits_is_called_back(look: &mut Look) -> Result<()> {
    let at = RefCell::new(Vec::new());
    let ran = look
        .program(&["hang", "--watchdog", "1"])
        .at_exit(|exit, guest| {
            if exit.vm == 0 {
                at.borrow_mut().push(guest.regs()?.rip);
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(1, &ran);
    look.wants_same("exits of the guest's own", 0, exits(&ran).len());
    let called = ran.exits().iter().filter(|exit| exit.what == What::Interrupted).count();
    look.wants("KVM_RUN came back for a signal, more than once", called > 1);
    let at = at.into_inner();
    look.wants(
        "each time the guest stood in its loop",
        at.iter().all(|rip| (0x1000..0x1010).contains(rip)),
    );
    let err = ran.err();
    let cause = err.lines().skip_while(|line| !line.starts_with("cause "));
    let cause = cause.take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    look.wants_in("the autopsy's cause", "an endless loop from 0x", &cause);
    // The loop that is told is where it was seen.
    let ends: Vec<_> = cause
        .split(|letter: char| !letter.is_ascii_alphanumeric())
        .filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok())
        .take(2)
        .collect();
    let inside = ends.len() == 2 && at.iter().skip(1).all(|rip| (ends[0]..=ends[1]).contains(rip));
    look.wants_near(
        "it is the loop where the guest was seen",
        inside,
        &[format!("{at:x?}, told {ends:x?}")],
    );
    Ok(())
}
