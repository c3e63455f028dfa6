//! Milestone 2: memslots as KVM and a guest see them, and what the program says of them.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use common::kvm;
use common::layout::{MMIO_HOLE, MMIO_HOLE_END, PAGE_SIZE, RESET_ROM, ram_ranges};
use common::memory::{Error, SlotFlags, Vm};
use common::touch::{Met, Touch};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::Kvm;
use testkit::{Program, Ran};
use vm_memory::{Bytes, GuestAddress, MmapRegion};

const PAGE: usize = PAGE_SIZE as usize;
const LOG_DIRTY: SlotFlags = SlotFlags { read_only: false, log_dirty: true };
const READ_ONLY: SlotFlags = SlotFlags { read_only: true, log_dirty: false };

fn stage_02(args: &[&str]) -> Ran {
    Program::new(env!("CARGO_BIN_EXE_02_memory")).args(args).run()
}

/// A VM with 1 MiB of RAM, and the guest that touches memory in it.
fn machine() -> (Arc<Vm>, Touch) {
    let kvm = kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, 1 << 20).unwrap();
    let guest = Touch::new(&kvm, &vm, asm::long::TOUCH).unwrap();
    (vm, guest)
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The words of those lines of `out` that come after the line that begins with `title`, up to an empty
/// line.
fn section<'a>(out: &'a str, title: &str) -> Vec<Vec<&'a str>> {
    let lines = out.lines().skip_while(|line| !line.starts_with(title)).skip(1);
    let lines: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    assert!(!lines.is_empty(), "{title:?} is missing from {out}");
    lines.iter().map(|line| line.split_whitespace().collect()).collect()
}

/// An address as the program prints it.
fn parsed(address: &str) -> u64 {
    u64::from_str_radix(&address.trim_start_matches("0x").replace('_', ""), 16).unwrap()
}

#[test]
fn all_paths_lead_to_the_same_bytes_and_a_rom_stays_as_it_is() {
    let out = stage_02(&[]).ended(0).out();
    let rows = section(&out, "Three ways");
    let names: Vec<_> = rows[2..].iter().map(|row| row[0]).collect();
    assert_eq!(names, ["RAM", "bank", "ROM", "window"]);
    let mut numbers = BTreeSet::new();
    for row in &rows[2..] {
        let [_, _, host, pointer, guest, ref rest @ ..] = row[..] else { panic!("{row:?}") };
        assert_eq!((host, host), (pointer, guest), "{row:?}");
        match rest {
            [writes, after] => assert_eq!(writes, after, "{row:?}"),
            ["an", "exit", after] => assert_eq!((row[0], *after), ("ROM", host), "{row:?}"),
            _ => panic!("{row:?}"),
        }
        numbers.insert(host.to_owned());
    }
    let again = stage_02(&[]).ended(0).out();
    for row in &section(&again, "Three ways")[2..] {
        assert!(numbers.insert(row[2].to_owned()), "{row:?} is no random number");
    }
}

#[test]
fn a_slot_takes_its_bytes_along_and_leaves_a_hole() {
    let out = stage_02(&[]).ended(0).out();
    let rows = section(&out, "A slot moves");
    let number = rows[2][3];
    assert_eq!(rows[2][3..].join(" "), format!("{number} {number} no slot an exit"));
    assert_eq!(rows[3][5..].join(" "), format!("no slot an exit {number} {number}"));
    assert_eq!(rows[4][1..].join(" "), "no slot an exit no slot an exit");
}

/// The map's edges and slots: start, end, name, slot number.
fn map(out: &str) -> Vec<(u64, u64, String, u32)> {
    let lines: Vec<_> = out.lines().skip(1).take_while(|line| !line.is_empty()).collect();
    let edge = |line: &str| parsed(line.split_whitespace().next().unwrap());
    let slots = lines.windows(3).filter(|three| three[1].contains('|'));
    slots
        .map(|three| {
            let mut parts = three[1].split('|').skip(1);
            let name = parts.next().unwrap().trim().to_owned();
            let number = parts.next().unwrap().split_whitespace().next().unwrap();
            (edge(three[0]), edge(three[2]), name, number.parse().unwrap())
        })
        .collect()
}

#[test]
fn the_map_shows_ram_around_the_hole() {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let kib = meminfo.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    // As much as goes around the hole, where the host has that much.
    for (memory, bytes) in [("84K", 84 << 10), ("64M", 64 << 20), ("4G", 4 << 30)] {
        let most = bytes.min((kib << 10) / 2 / PAGE_SIZE * PAGE_SIZE);
        let memory = if most == bytes { memory.to_owned() } else { format!("{}K", most >> 10) };
        let out = stage_02(&["--memory", &memory]).ended(0).out();
        assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
        let map = map(&out);
        let ram: Vec<_> = map.iter().filter(|slot| slot.2 == "RAM").collect();
        let expected = ram_ranges(most);
        assert_eq!(ram.len(), expected.len(), "{out}");
        for (number, (slot, (start, len))) in (0..).zip(ram.iter().zip(&expected)) {
            let end = start.0 + *len as u64;
            assert_eq!(**slot, (start.0, end, "RAM".to_owned(), number), "{out}");
        }
        let bank = map.iter().find(|slot| slot.2 == "bank").unwrap();
        assert!(bank.0 >= MMIO_HOLE_END.0, "{out}");
        let rom = map.iter().find(|slot| slot.2 == "ROM").unwrap();
        assert_eq!((rom.0, rom.1), (RESET_ROM.0, MMIO_HOLE_END.0), "{out}");
    }
}

#[test]
fn ram_of_4_gib_leaves_the_hole_to_devices() {
    let kvm = kvm::open().unwrap();
    let vm = Vm::new(&kvm).unwrap();
    // Nothing of it is allocated until it is touched, so this works on a host with less.
    for (slot, (start, len)) in (0..).zip(ram_ranges(4 << 30)) {
        vm.add_slot(slot, start, len, SlotFlags::default()).unwrap();
    }
    let mut guest = Touch::new(&kvm, &vm, asm::long::TOUCH).unwrap();
    let mut memory_at = |addr| {
        let number = random() as u32;
        let met = guest.write(GuestAddress(addr), number).unwrap();
        assert!(met == Met::Exit || guest.read(GuestAddress(addr)).unwrap() == met);
        if met == Met::Memory(number) {
            assert_eq!(vm.ram().read_obj::<u32>(GuestAddress(addr)).unwrap(), number);
        }
        met == Met::Memory(number)
    };
    assert!(memory_at(MMIO_HOLE.0 - 4));
    assert!(!memory_at(MMIO_HOLE.0));
    assert!(!memory_at(MMIO_HOLE_END.0 - 4));
    assert!(memory_at(MMIO_HOLE_END.0));
    let end = (4 << 30) + MMIO_HOLE_END.0 - MMIO_HOLE.0;
    assert!(memory_at(end - 4));
    assert!(!memory_at(end));
}

#[test]
fn the_dirty_log_names_the_pages_that_were_asked_for() {
    for _ in 0..3 {
        let pages: Vec<_> = (0..1 + random() % 20).map(|_| random() % 512).collect();
        let list: Vec<_> = pages.iter().map(u64::to_string).collect();
        let out = stage_02(&["--touch", &list.join(",")]).ended(0).out();
        let sorted: Vec<_> = pages.iter().collect::<BTreeSet<_>>().into_iter().collect();
        let line = |start| out.lines().find(|line| line.trim().starts_with(start)).unwrap();
        let log = line("KVM_GET_DIRTY_LOG gives");
        assert!(log.ends_with(&format!(" {sorted:?}")), "{pages:?}: {log}");
        assert!(line("and once more").ends_with(" []"), "{out}");
    }
}

#[test]
fn the_dirty_log_is_that_of_the_ioctl() {
    let (vm, mut guest) = machine();
    let bank = MMIO_HOLE_END;
    vm.add_slot(7, bank, 130 * PAGE, LOG_DIRTY).unwrap();
    let pages = [0, 63, 64, 129];
    let mut write_all = || {
        for page in pages {
            guest.write(GuestAddress(bank.0 + page * PAGE_SIZE + 8), 1).unwrap();
        }
    };
    write_all();
    assert_eq!(vm.dirty_log(7).unwrap(), pages);
    write_all();
    // The same by a bare ioctl: three words of 64 pages each.
    assert_eq!(vm.fd().get_dirty_log(7, 130 * PAGE).unwrap(), [1 | 1 << 63, 1, 1 << 1]);
    vm.set_flags(7, SlotFlags::default()).unwrap();
    assert!(vm.dirty_log(7).is_err(), "without the flag there is no log");
}

/// What `KVM_SET_USER_MEMORY_REGION` says to these regions, one after the other in one VM.
fn errnos(regions: &[(u32, u32, u64, u64)]) -> Vec<i32> {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let memory: MmapRegion = MmapRegion::new(16 * PAGE).unwrap();
    let said = regions.iter().map(|&(slot, flags, start, size)| {
        assert!(size <= memory.size() as u64);
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: `size` bytes from there are mapped until after the VM has been closed, and no guest runs.
        #[expect(unsafe_code, reason = "the ioctl itself is what is tested")]
        let result = unsafe { vm.set_user_memory_region(region) };
        result.map_or_else(|error| error.errno(), |()| 0)
    });
    let said = said.collect();
    drop(vm);
    said
}

#[test]
fn refusals_are_those_of_the_ioctl() {
    let out = stage_02(&[]).ended(0).out();
    let told: Vec<_> = section(&out, "What KVM refuses")
        .iter()
        .map(|row| row.iter().find(|word| word.ends_with(':')).map(|word| word.trim_matches(':')))
        .collect();
    let errnos = errnos(&[
        (0, 0, 0, 4 * PAGE_SIZE),
        (1, KVM_MEM_READONLY, RESET_ROM.0, 16 * PAGE_SIZE),
        (2, 0, 0, PAGE_SIZE),
        (2, 0, MMIO_HOLE.0 + 8, PAGE_SIZE),
        (2, 0, MMIO_HOLE.0, PAGE_SIZE * 3 / 2),
        (1, KVM_MEM_READONLY, RESET_ROM.0, 8 * PAGE_SIZE),
        (0, KVM_MEM_READONLY, 0, 4 * PAGE_SIZE),
    ]);
    assert_eq!(errnos[..2], [0, 0], "the regions that are in order");
    let names = errnos[2..].iter().map(|errno| match *errno {
        libc::EEXIST => Some("EEXIST"),
        libc::EINVAL => Some("EINVAL"),
        _ => None,
    });
    assert_eq!(told, names.collect::<Vec<_>>(), "{out}");
    assert!(told.iter().all(Option::is_some), "{out}");
}

#[test]
fn a_refused_slot_changes_nothing() {
    let (vm, mut guest) = machine();
    vm.add_slot(5, MMIO_HOLE, PAGE, SlotFlags::default()).unwrap();
    vm.ram().write_obj(0x1234_5678u32, MMIO_HOLE).unwrap();
    let before = vm.slots();
    let refusals = [
        vm.add_slot(6, MMIO_HOLE, PAGE, SlotFlags::default()),
        vm.add_slot(6, GuestAddress(MMIO_HOLE.0 + 1), PAGE, SlotFlags::default()),
        vm.add_slot(6, GuestAddress(u64::MAX - 0xFFF), PAGE, SlotFlags::default()),
        vm.add_slot(6, GuestAddress(u64::MAX - 0xFFF), 2 * PAGE, SlotFlags::default()),
        vm.add_slot(5, MMIO_HOLE, 2 * PAGE, SlotFlags::default()),
        vm.move_slot(5, GuestAddress(0)),
        vm.set_flags(5, READ_ONLY),
        vm.move_slot(9, MMIO_HOLE_END),
        vm.set_flags(9, LOG_DIRTY),
        vm.delete_slot(9),
    ];
    for (at, refusal) in refusals.iter().enumerate() {
        assert!(refusal.is_err(), "number {at} was taken");
    }
    assert!(matches!(refusals[9], Err(Error::NoSlot(9))));
    assert_eq!(vm.slots(), before);
    assert_eq!(guest.read(MMIO_HOLE).unwrap(), Met::Memory(0x1234_5678));
}

#[test]
fn sizes_that_no_machine_has_are_refused_in_one_line() {
    for (size, why) in [
        ("0K", "expected a multiple of 4 KiB"),
        ("3K", "guest memory of 3072 bytes"),
        ("1025K", "expected a multiple of 4 KiB"),
        ("64K", "84 KiB"),
        ("100T", "bytes of guest memory"),
        ("16777215T", "the host cannot map"),
        ("16777216T", "--memory"),
        ("64", "such as 512M"),
        ("64Q", "such as 512M"),
        ("-1M", "--memory"),
        ("", "--memory"),
    ] {
        stage_02(&[&format!("--memory={size}")]).refused(2, why);
    }
    stage_02(&["--memory", "-1M"]).refused(2, "such as 512M");
    stage_02(&["--touch", "512"]).refused(2, "0..512");
    stage_02(&["--touch", "x"]).refused(2, "--touch");
    stage_02(&["--help"]).ended(0).stdout_has("memslot").stdout_has("Exit codes:");
}

#[test]
fn a_full_disk_is_told() {
    Program::full_disk(env!("CARGO_BIN_EXE_02_memory"), &[]);
}
