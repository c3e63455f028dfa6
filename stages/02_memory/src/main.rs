//! Stage 02: guest-physical memory is host memory with a second address.

mod show;

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anstyle::Style;
use anyhow::{Context, Result};
use clap::{Parser, value_parser};
use cli::{Ended, println, size};
use common::layout::{MMIO_HOLE, MMIO_HOLE_END, PAGE_SIZE, RESET_ROM, RESET_ROM_SIZE};
use common::memory::{SlotFlags, Vm};
use common::touch::Touch;
use vm_memory::{Bytes, GuestAddress};

use crate::show::{address, met, told};

/// Gives a guest its memory: memslots, a hole for devices, a ROM, and a log of written pages.
///
/// The host maps some memory, and a memslot (KVM_SET_USER_MEMORY_REGION) says at which guest-physical
/// address the guest sees it. From then on both read and write the same bytes. Slots can be read-only, be
/// moved and be deleted; where none is, an access leaves the guest, which is how devices are made later.
#[derive(Parser)]
#[command(after_help = "\
Try: 02_memory                   the whole walk with 64 MiB
     02_memory --memory 4G       RAM on both sides of the hole below 4 GiB
     02_memory --touch 7,100     which pages the guest writes, and the log names")]
struct Args {
    /// The guest's RAM
    #[arg(long, value_name = "SIZE", default_value = "64M",
          allow_hyphen_values = true, value_parser = size::parse)]
    memory: u64,

    /// The pages of the bank, 0 to 511, that the guest writes for the dirty log
    #[arg(long, value_name = "PAGES", default_value = "1,2,5,30", value_delimiter = ',',
          value_parser = value_parser!(u64).range(..BANK_SIZE / PAGE_SIZE))]
    touch: Vec<u64>,
}

/// A second bank of RAM behind the first, always above 4 GiB, whose writes are logged.
const BANK_SIZE: u64 = 2 << 20;

/// A slot that is going to move: at the start of the MMIO hole, where no RAM is.
const WINDOW: GuestAddress = MMIO_HOLE;
const WINDOW_SIZE: u64 = 64 << 10;
const WINDOW_MOVED: GuestAddress = GuestAddress(MMIO_HOLE.0 + (16 << 20));

const BOLD: Style = Style::new().bold();

fn main() -> ExitCode {
    cli::main(memory)
}

fn memory(args: Args) -> Result<Ended> {
    // A VM with RAM: below the hole as much as fits there, the rest from 4 GiB on.
    let kvm = common::kvm::open()?;
    let vm = Vm::with_ram(&kvm, args.memory)?;
    let ram = vm.slots();
    // The guest that will touch what we show. How it runs is stage 03's subject.
    let mut guest = Touch::new(&kvm, &vm, asm::long::TOUCH)?;

    // ANCHOR: slots
    // More slots. Their numbers are ours to choose.
    let above = ram.iter().map(|slot| slot.start.0 + slot.size).fold(MMIO_HOLE_END.0, u64::max);
    let (bank, rom, window) = (ram.len() as u32, ram.len() as u32 + 1, ram.len() as u32 + 2);
    let log_dirty = SlotFlags { log_dirty: true, ..Default::default() };
    let read_only = SlotFlags { read_only: true, ..Default::default() };
    vm.add_slot(bank, GuestAddress(above), BANK_SIZE as usize, log_dirty)?;
    vm.add_slot(rom, RESET_ROM, RESET_ROM_SIZE, read_only)?;
    vm.add_slot(window, WINDOW, WINDOW_SIZE as usize, SlotFlags::default())?;
    // ANCHOR_END: slots
    let name = |slot| match slot {
        slot if slot == bank => "bank",
        slot if slot == rom => "ROM",
        slot if slot == window => "window",
        _ => "RAM",
    };
    show::draw(vm.slots(), name);

    println!("\n{BOLD}Three ways to the same bytes{BOLD:#}: the last four of each slot");
    println!("  slot    address         host     by its    guest    guest    by the host's");
    println!("                          writes   pointer   reads    writes   pointer");
    for slot in vm.slots() {
        let last = slot.size - 4;
        let at = GuestAddress(slot.start.0 + last);
        let (number, answer) = (random(), random());
        vm.ram().write_obj(number, at)?;
        let pointer = read_pointer(slot.host + last)?;
        let guest_reads = met(guest.read(at)?);
        let guest_writes = met(guest.write(at, answer)?);
        let afterwards = read_pointer(slot.host + last)?;
        println!(
            "  {:7} {:15} {number:08X} {pointer:08X}  {guest_reads:8} {guest_writes:8} {afterwards:08X}",
            name(slot.slot),
            address(at.0),
        );
    }

    println!("\n{BOLD}A slot moves, and goes{BOLD:#}");
    let (old, new) = (address(WINDOW.0), address(WINDOW_MOVED.0));
    println!("  {:24}{old:22}{new}", "the window");
    println!("  {:24}host      guest       host      guest", "");
    vm.ram().write_obj(random(), WINDOW)?;
    let mut look = |what: &str| -> Result<()> {
        let mut line = format!("  {what:24}");
        for at in [WINDOW, WINDOW_MOVED] {
            let host = vm.ram().read_obj::<u32>(at);
            let host = host.map_or("no slot".into(), |value| format!("{value:08X}"));
            line += &format!("{host:9} {:12}", met(guest.read(at)?));
        }
        println!("{}", line.trim_end());
        Ok(())
    };
    look("where it was")?;
    vm.move_slot(window, WINDOW_MOVED)?;
    look("moved up by 16 MiB")?;
    vm.delete_slot(window)?;
    look("deleted")?;

    println!("\n{BOLD}What KVM refuses{BOLD:#}");
    let add = |start, size| vm.add_slot(window, start, size, SlotFlags::default());
    let page = PAGE_SIZE as usize;
    told("a slot over RAM", "other slots have these addresses", add(GuestAddress(0), page));
    told("from between two pages", "pages cannot be split", add(GuestAddress(WINDOW.0 + 8), page));
    told("of one and a half pages", "pages cannot be split", add(WINDOW, page * 3 / 2));
    let half = vm.add_slot(rom, RESET_ROM, RESET_ROM_SIZE / 2, read_only);
    told("half of the ROM", "slots keep their size", half);
    let frozen = vm.set_flags(ram[0].slot, read_only);
    told("RAM made read-only", "only the log can be switched", frozen);

    println!("\n{BOLD}The dirty log{BOLD:#} of the bank, in pages of 4 KiB");
    // Reading the log empties it: what was written until now is forgotten.
    vm.dirty_log(bank)?;
    for page in &args.touch {
        guest.write(GuestAddress(above + page * PAGE_SIZE), random())?;
    }
    println!("  the guest writes to      {:?}", args.touch);
    println!("  KVM_GET_DIRTY_LOG gives  {:?}", vm.dirty_log(bank)?);
    println!("  and once more            {:?}", vm.dirty_log(bank)?);
    Ok(Ended::Well)
}

/// A number that nobody can have written down in advance.
fn random() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}

/// What stands at an address of this very process. The kernel reads it for us, where a program in C would
/// follow the pointer.
fn read_pointer(addr: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    let memory = File::open("/proc/self/mem").context("cannot open our own memory")?;
    memory.read_exact_at(&mut bytes, addr).context("cannot read our own memory")?;
    Ok(u32::from_le_bytes(bytes))
}
