//! Stage 02: guest-physical memory. A memslot is what KVM was told, and what a guest meets there.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use nix::errno::Errno;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::record::{SetSlot, What};

criteria![
    ram_is_a_slot_of_the_size_asked_for,
    ram_leaves_a_hole_below_4_gib,
    host_and_guest_use_the_same_bytes,
    a_rom_is_read_and_never_written,
    a_slot_moves_and_goes,
    kvm_refuses_what_is_no_slot,
    the_dirty_log_names_the_pages_that_were_written,
];

const MIB: u64 = 1 << 20;
const HOLE_END: u64 = 4 << 30;
/// Where the local and the I/O APIC of every PC are.
const APICS: std::ops::Range<u64> = 0xFEC0_0000..0xFEF0_0000;

/// The slots that were made and then left alone, of a VM: no flag, never moved, never deleted. That is RAM.
fn ram(ran: &Ran) -> Vec<SetSlot> {
    let slots: Vec<_> = ran.slots().into_iter().filter(|slot| slot.result.is_ok()).collect();
    let times = |number| slots.iter().filter(|slot| slot.slot == number).count();
    slots.iter().filter(|slot| slot.flags == 0 && times(slot.slot) == 1).copied().collect()
}

/// What is left of a slot's call for a person.
fn lines(slots: &[SetSlot]) -> Vec<String> {
    let line = |slot: &SetSlot| {
        let SetSlot { slot, flags, start, size, result, .. } = slot;
        format!("slot {slot}, flags {flags}, {size:#x} bytes at {start:#x}: {result:?}")
    };
    slots.iter().map(line).collect()
}

fn ram_is_a_slot_of_the_size_asked_for(look: &mut Look) -> Result<()> {
    let kib = look.random(256..16 << 10) * 4;
    let ran = look.program(&["--memory", &format!("{kib}K")]).run(look)?;
    look.wants_code(0, &ran);
    let ram = ram(&ran);
    look.wants_near(
        format!("a memslot of {kib} KiB at 0"),
        ram.iter().any(|slot| slot.start == 0 && slot.size == kib << 10),
        &lines(&ran.slots()),
    );
    look.wants("its host memory begins with a page", ram.iter().all(|slot| slot.host % 4096 == 0));
    let small = look.program(&["--memory", &format!("{}", kib * 1024 + 1)]).run(look)?;
    look.wants_refusal(2, "--memory", &small);
    Ok(())
}

fn ram_leaves_a_hole_below_4_gib(look: &mut Look) -> Result<()> {
    let mib = look.random(4000..5000);
    let ran = look.program(&["--memory", &format!("{mib}M")]).run(look)?;
    look.wants_code(0, &ran);
    let (ram, all) = (ram(&ran), lines(&ran.slots()));
    let sum: u64 = ram.iter().map(|slot| slot.size).sum();
    look.wants_near(format!("{mib} MiB of RAM in all"), sum == mib * MIB, &all);
    look.wants_near("RAM from 4 GiB on", ram.iter().any(|slot| slot.start == HOLE_END), &all);
    let in_hole = |slot: &SetSlot| slot.start < APICS.end && slot.end() > APICS.start;
    look.forbids("RAM where the APICs are", ram.iter().any(in_hole));
    let across = |slot: &SetSlot| slot.start < HOLE_END && slot.end() > HOLE_END;
    look.forbids("a slot across 4 GiB", ran.slots().iter().any(across));
    Ok(())
}

/// The rows under "Three ways": slot's name, address, and what stands behind.
fn three_ways(ran: &Ran) -> Vec<(String, u64, Vec<String>)> {
    let out = ran.out();
    let rows = out.lines().skip_while(|line| !line.starts_with("Three ways")).skip(3);
    rows.take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            let (name, address) = (words.next()?, words.next()?);
            let digits = address.trim_start_matches("0x").replace('_', "");
            Some((name, u64::from_str_radix(&digits, 16).ok()?, words.collect()))
        })
        .collect()
}

/// A run, and what was seen of its guest from exit to exit.
struct Touched {
    ran: Ran,
    /// What stood in the last four bytes of a slot, one value after the other.
    stood: BTreeMap<u64, Vec<u32>>,
    /// What the guest has had in a register.
    had: BTreeSet<u32>,
}

fn touched(look: &mut Look) -> Result<Touched> {
    let mib = look.random(2..64);
    let (mut stood, mut had) = (BTreeMap::<u64, Vec<u32>>::new(), BTreeSet::new());
    let ends: Vec<u64> = vec![mib * MIB, HOLE_END, HOLE_END + 2 * MIB, 0xD001_0000];
    let ran = look
        .program(&["--memory", &format!("{mib}M")])
        .at_exit(|_, guest| {
            for addr in ends.iter().map(|end| end - 4) {
                let Ok(value) = guest.read_u32(addr) else { continue };
                let values = stood.entry(addr).or_default();
                if values.last() != Some(&value) {
                    values.push(value);
                }
            }
            let regs = guest.regs()?;
            had.extend([regs.rax, regs.rbx, regs.rcx, regs.rdx].map(|value| value as u32));
            had.extend([regs.rsi, regs.rdi, regs.r8, regs.r9].map(|value| value as u32));
            Ok(())
        })
        .run(look)?;
    Ok(Touched { ran, stood, had })
}

fn host_and_guest_use_the_same_bytes(look: &mut Look) -> Result<()> {
    let Touched { ran, stood, had } = touched(look)?;
    look.wants_code(0, &ran);
    let rows: Vec<_> = three_ways(&ran).into_iter().filter(|(name, ..)| name != "ROM").collect();
    look.wants_same("rows of slots that can be written", 3, rows.len());
    for (name, addr, words) in rows {
        let hex = |at: usize| words.get(at).and_then(|word| u32::from_str_radix(word, 16).ok());
        let pair = hex(0).zip(hex(3));
        let (host, guest) = look.needs(format!("{name}: two numbers"), pair)?;
        let there = stood.get(&addr).cloned().unwrap_or_default();
        let at = |number| there.iter().position(|&value| value == number);
        let near = [format!("at {addr:#x} stood {there:x?}")];
        let in_order = at(host).zip(at(guest)).is_some_and(|(first, then)| first < then);
        let what = format!("{name}: {host:08X} of the host, then {guest:08X} of the guest");
        look.wants_near(format!("{what} in guest memory at {addr:#x}"), in_order, &near);
        look.wants_same(format!("{name}: what the guest read"), Some(host), hex(2));
        look.wants(format!("{name}: {host:08X} in a register of the guest"), had.contains(&host));
        look.wants(format!("{name}: {guest:08X} in a register of the guest"), had.contains(&guest));
    }
    Ok(())
}

fn a_rom_is_read_and_never_written(look: &mut Look) -> Result<()> {
    let Touched { ran, stood, .. } = touched(look)?;
    let slots = ran.slots();
    let rom = slots
        .iter()
        .find(|slot| slot.has(SetSlot::READ_ONLY) && slot.end() == HOLE_END && slot.result.is_ok());
    let rom = *look.needs("a read-only slot that ends at 4 GiB", rom)?;
    let last = HOLE_END - 4;
    let row = three_ways(&ran).into_iter().find(|(name, ..)| name == "ROM");
    let (_, addr, words) = look.needs("the ROM's row", row)?;
    look.wants_same("its address", last, addr);
    let number = words.first().and_then(|word| u32::from_str_radix(word, 16).ok());
    let number = look.needs("the host's number", number)?;
    let written = ran.exits().iter().find_map(|exit| match &exit.what {
        What::Write { addr, data } if *addr == last => Some(data.clone()),
        _ => None,
    });
    let written = look.needs("an exit for the guest's write to it", written)?;
    look.forbids("a write of what stands there already", written == number.to_le_bytes());
    let values = stood.get(&last).cloned().unwrap_or_default();
    look.wants_same("what stands there in the end", Some(&number), values.last());
    let reads = |exit: &What| matches!(exit, What::Read { addr, .. } if (rom.start..rom.end()).contains(addr));
    look.forbids("an exit for a read of it", ran.exits().iter().any(|exit| reads(&exit.what)));
    Ok(())
}

fn a_slot_moves_and_goes(look: &mut Look) -> Result<()> {
    let ran = look.program::<&str>(&[]).run(look)?;
    look.wants_code(0, &ran);
    let slots: Vec<_> = ran.slots().into_iter().filter(|slot| slot.result.is_ok()).collect();
    let moved = slots.iter().enumerate().find_map(|(at, old)| {
        let new = slots[at + 1..].iter().find(|new| new.slot == old.slot && new.vm == old.vm)?;
        (new.size == old.size && new.host == old.host && new.start != old.start)
            .then_some((*old, *new))
    });
    let (old, new) = look.needs("a slot that is set again elsewhere, with its bytes", moved)?;
    let gone = slots.iter().find(|slot| slot.at > new.at && slot.slot == old.slot);
    let gone = look.needs("the same slot with size 0", gone.filter(|slot| slot.size == 0))?;
    let met = |slot: &SetSlot, from: u64, to: u64| {
        let inside = |addr: &u64| (slot.start..slot.end()).contains(addr);
        let exits = ran.exits().iter().filter(|exit| (from..to).contains(&exit.at));
        exits.filter(|exit| matches!(&exit.what, What::Read { addr, .. } if inside(addr))).count()
    };
    look.wants_same("exits where it is not yet", 1, met(&new, old.at, new.at));
    look.wants_same("exits where it is still", 0, met(&old, old.at, new.at));
    look.wants_same("exits where it was", 1, met(&old, new.at, gone.at));
    look.wants_same("exits where it is now", 0, met(&new, new.at, gone.at));
    look.wants_same("exits at both places when it has gone", (1, 1), {
        (met(&old, gone.at, u64::MAX), met(&new, gone.at, u64::MAX))
    });
    let out = ran.out();
    let row = |name: &str| {
        let line = out.lines().find(|line| line.trim_start().starts_with(name))?;
        let words = line.split_whitespace().filter(|word| word.len() == 8);
        words.clone().next().map(|number| (number.to_owned(), words.count()))
    };
    look.wants("the same number, twice each time", {
        let (before, after) = (row("where it was"), row("moved up by 16 MiB"));
        before.is_some() && before == after && before.is_some_and(|(_, count)| count == 2)
    });
    Ok(())
}

fn kvm_refuses_what_is_no_slot(look: &mut Look) -> Result<()> {
    let ran = look.program::<&str>(&[]).run(look)?;
    let slots = ran.slots();
    let (taken, refused): (Vec<_>, Vec<_>) = slots.iter().partition(|slot| slot.result.is_ok());
    let near = lines(&refused.iter().map(|&&slot| slot).collect::<Vec<_>>());
    let known = |refused: &SetSlot| {
        let same = taken.iter().filter(|slot| slot.slot == refused.slot && slot.at < refused.at);
        same.max_by_key(|slot| slot.at).filter(|slot| slot.size > 0).map(|slot| **slot)
    };
    let mut wants = |what: &str, errno: Errno, is_it: &dyn Fn(&SetSlot) -> bool| {
        let found = refused.iter().any(|slot| slot.result == Err(errno) && is_it(slot));
        look.wants_near(format!("{errno:?}: {what}"), found, &near);
    };
    wants("a slot over another one", Errno::EEXIST, &|slot| {
        slot.start == 0 && slot.size.is_multiple_of(4096)
    });
    wants("a start within a page", Errno::EINVAL, &|slot| !slot.start.is_multiple_of(4096));
    wants("a size that is no number of pages", Errno::EINVAL, &|slot| {
        slot.start.is_multiple_of(4096) && !slot.size.is_multiple_of(4096)
    });
    wants("another size for a slot that is there", Errno::EINVAL, &|slot| {
        known(slot).is_some_and(|before| before.size != slot.size && slot.size % 4096 == 0)
    });
    wants("another flag for a slot that is there", Errno::EINVAL, &|slot| {
        let (log, before) = (SetSlot::LOG_DIRTY, known(slot));
        before.is_some_and(|before| (before.flags ^ slot.flags) & !log != 0 && slot.start == 0)
    });
    let out = ran.out();
    let told = |word: &str| out.lines().filter(|line| line.contains(word)).count();
    let errno = |errno| refused.iter().filter(|slot| slot.result == Err(errno)).count();
    look.wants_same("EEXIST told as often as it came", errno(Errno::EEXIST), told("EEXIST: "));
    look.wants_same("EINVAL told as often as it came", errno(Errno::EINVAL), told("EINVAL: "));
    Ok(())
}

// ANCHOR: dirty_log
fn the_dirty_log_names_the_pages_that_were_written(look: &mut Look) -> Result<()> {
    let count = look.random(3..12) as usize;
    let pages = look.random_set(count, 0..512);
    let list: Vec<_> = pages.iter().map(u64::to_string).collect();
    let mut seen = BTreeSet::new();
    let ran = look
        .program(&["--touch", &list.join(",")])
        .at_exit(|_, guest| {
            // The log's slot is a bank above 4 GiB: which of its pages hold something?
            for page in 0..512 {
                if guest.read(HOLE_END + page * 4096, 4).is_ok_and(|bytes| bytes != [0; 4]) {
                    seen.insert(page);
                }
            }
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let slots = ran.slots();
    let bank = slots.iter().find(|slot| slot.has(SetSlot::LOG_DIRTY) && slot.result.is_ok());
    let bank = look.needs("a slot with a log", bank)?;
    let logs: Vec<_> = ran.dirty_logs().into_iter().filter(|log| log.1 == bank.slot).collect();
    let near: Vec<_> = logs.iter().map(|(at, _, pages)| format!("{at}: {pages:?}")).collect();
    let full = logs.iter().position(|log| log.2 == pages);
    look.wants_near(format!("KVM's log has {pages:?}"), full.is_some(), &near);
    look.wants_near(
        "the next log has nothing",
        full.and_then(|full| logs.get(full + 1)).is_some_and(|log| log.2.is_empty()),
        &near,
    );
    look.wants("the guest wrote to these pages", pages.iter().all(|page| seen.contains(page)));
    look.wants_in("the program says the same", &format!("gives  {pages:?}"), &ran.out());
    Ok(())
}
// ANCHOR_END: dirty_log
