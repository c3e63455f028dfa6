//! The boot disk's own code: what it loads, and what it says of a disk that is not as it should be.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};

use common::boot_disk::{self, PARTITION, TABLE};
use common::bus::{Device, shared};
use common::disk::SECTOR;
use common::hypercall;
use common::memory::Ram;
use common::run::{self, Ending, Stop};
use testkit::Program;
use vm_memory::{Bytes, GuestAddress};

use crate::{Disks, built_in_disk, machine, program};

/// The last thing that the second stage prints.
const ENTERING: &str = "stage 2: to long mode, and into the kernel\r\n";

/// The partition's first byte.
const VOLUME: usize = PARTITION * SECTOR;

// Fields of the FAT's boot sector.
const RESERVED: usize = VOLUME + 14;
const FAT_SECTORS: usize = VOLUME + 22;

/// A serial port that stops the machine at [`ENTERING`]: all is loaded then, and nothing has been run.
struct Serial {
    printed: String,
    stop: Stop,
    text: Sender<String>,
}

impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The line status: a byte can be sent.
        if offset == 5 {
            data[0] = 0x60;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 {
            return;
        }
        self.printed.extend(data.iter().map(|&byte| char::from(byte)));
        if self.printed.ends_with(ENTERING) {
            self.stop.now(Ending::Left);
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        let _ = self.text.send(self.printed.clone());
    }
}

/// What became of a disk.
struct Loaded {
    ending: Ending,
    printed: String,
    ram: Ram,
}

/// Boots a disk up to the kernel's entry, in a machine with `memory` bytes.
fn load_in(memory: u64, disk: Vec<u8>) -> Loaded {
    let (stop, stopped) = run::stop();
    let (text, printed) = channel();
    let serial = Serial { printed: String::new(), stop: stop.clone(), text };
    let (parts, ending) = machine::run(disk, memory, (stop, stopped), |_, _| shared(serial));
    let printed = printed.recv().unwrap();
    Loaded { ending: ending.unwrap(), printed, ram: parts.ram }
}

fn load(disk: Vec<u8>) -> Loaded {
    load_in(64 << 20, disk)
}

/// The built-in disk with these bytes in the place of what is there.
fn changed(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut disk = built_in_disk();
    for (at, bytes) in changes {
        disk[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    disk
}

/// A disk with another kernel.
fn disk_with(kernel: &[u8]) -> Vec<u8> {
    boot_disk::build(asm::boot::MBR, asm::boot::STAGE2, kernel).unwrap()
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// Where the parts of the built-in disk's file system begin, in bytes.
struct Places {
    fat: usize,
    root: usize,
    data: usize,
}

fn places(disk: &[u8]) -> Places {
    let fat = VOLUME + u16_at(disk, RESERVED) * SECTOR;
    let fats = usize::from(disk[VOLUME + 16]) * u16_at(disk, FAT_SECTORS) * SECTOR;
    let root = fat + fats;
    Places { fat, root, data: root + u16_at(disk, VOLUME + 17) * 32 }
}

/// The kernel's entry in the root directory.
fn kernel_entry(disk: &[u8]) -> usize {
    let Places { root, data, .. } = places(disk);
    (root..data).step_by(32).find(|&at| disk[at..].starts_with(b"KERNEL  ELF")).unwrap()
}

#[test]
fn what_is_in_memory_is_what_was_on_the_disk() {
    let disk = built_in_disk();
    let Loaded { ending, printed, ram } = load(disk.clone());
    assert_eq!(ending, Ending::Left, "{printed}");

    // The second stage stands behind the boot sector as on the disk, its own variables aside.
    let stage2 = u16_at(&disk, RESERVED) * SECTOR;
    assert_eq!(stage2, asm::boot::STAGE2.len());
    let mut loaded = vec![0; stage2];
    ram.read_slice(&mut loaded, GuestAddress(0x7C00)).unwrap();
    let other = (0..stage2).filter(|&at| loaded[at] != disk[VOLUME + at]).count();
    assert!(other < 64, "{other} bytes are others than on the disk");

    // Each segment of the kernel is where its program header says, zeros behind it.
    let elf = guests::KERNEL;
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let mut segments = 0;
    let headers = (0..u16_at(elf, 56)).map(|i| u64_at(32) as usize + 56 * i);
    for header in headers.filter(|&at| elf[at] == 1) {
        let (offset, paddr) = (u64_at(header + 8) as usize, u64_at(header + 24));
        let (filesz, memsz) = (u64_at(header + 32) as usize, u64_at(header + 40) as usize);
        let mut segment = vec![0xFF; memsz];
        ram.read_slice(&mut segment, GuestAddress(paddr)).unwrap();
        assert_eq!(segment[..filesz], elf[offset..offset + filesz], "segment at {paddr:#x}");
        assert!(segment[filesz..].iter().all(|&byte| byte == 0), "behind {paddr:#x}");
        segments += 1;
    }
    assert!(segments >= 2);

    // The file itself stands at the end of memory.
    let mut file = vec![0; elf.len()];
    let at = (64 << 20) - elf.len().next_multiple_of(16) as u64;
    ram.read_slice(&mut file, GuestAddress(at)).unwrap();
    assert_eq!(file, elf);
    assert_eq!(hypercall::DEBUG_EXIT.start, u64::from(guests::boot::DEBUG_EXIT_PORT));
}

/// The kernel's `mem` prints the map that it was given: the BIOS's, range by range.
#[test]
fn the_kernel_knows_the_whole_memory_map() {
    let ran = program().args(["--memory", "40M"]).stdin("mem\nexit\n").run();
    ran.ended(0);
    for range in [
        "0x0000000000 to 0x000009fc00       639 KiB RAM",
        "0x000009fc00 to 0x00000a0000         1 KiB reserved",
        "0x00000e0000 to 0x0000100000       128 KiB reserved",
        "0x0000100000 to 0x0002800000     39936 KiB RAM",
        "0x00ffff0000 to 0x0100000000        64 KiB reserved",
    ] {
        ran.stdout_has(range);
    }
}

#[test]
fn a_disk_of_many_clusters_in_any_order_is_read() {
    // The clusters of the kernel's file, turned round: the last one becomes the first. No two can be read together.
    let disk = built_in_disk();
    let Places { fat, data, .. } = places(&disk);
    let clusters = guests::KERNEL.len().div_ceil(SECTOR);
    let mut turned = disk.clone();
    for n in 0..clusters {
        let (from, to) = (2 + n, 2 + clusters - 1 - n);
        let sector = &disk[data + (from - 2) * SECTOR..][..SECTOR];
        turned[data + (to - 2) * SECTOR..][..SECTOR].copy_from_slice(sector);
        let next = if n + 1 == clusters { 0xFFFF } else { to as u16 - 1 };
        turned[fat + 2 * to..][..2].copy_from_slice(&next.to_le_bytes());
    }
    let entry = kernel_entry(&disk);
    turned[entry + 26..][..2].copy_from_slice(&(1 + clusters as u16).to_le_bytes());
    let loaded = load(turned);
    assert_eq!(loaded.ending, Ending::Left, "{}", loaded.printed);
    let mut file = vec![0; guests::KERNEL.len()];
    let at = (64 << 20) - file.len().next_multiple_of(16) as u64;
    loaded.ram.read_slice(&mut file, GuestAddress(at)).unwrap();
    assert_eq!(file, guests::KERNEL);
}

/// Checks that a disk ends with one line of its own code, which contains `why`.
#[track_caller]
fn refused(name: &str, loaded: Loaded, why: &str) {
    assert_eq!(loaded.ending, Ending::Exited(1), "{name}: {}", loaded.printed);
    let last = loaded.printed.lines().last().unwrap_or_default();
    assert!(last.contains(why), "{name}: {}", loaded.printed);
}

#[test]
fn a_table_without_one_active_partition_is_told() {
    let start = TABLE + 8;
    for (name, changes, why) in [
        ("none", &[(TABLE, &[0][..])][..], "MBR: no active partition"),
        ("two", &[(TABLE + 32, &[0x80])], "MBR: bad partition table"),
        ("status", &[(TABLE + 16, &[0x7F])], "MBR: bad partition table"),
        ("itself", &[(start, &[0; 4])], "MBR: bad partition table"),
        // The disk's first sectors behind the MBR are zeros.
        ("no boot sector", &[(start, &[1, 0, 0, 0])], "MBR: no boot sector"),
        ("beyond the disk", &[(start, &8192u32.to_le_bytes())], "MBR: disk error 04h"),
        ("far beyond", &[(start, &[0xFF; 4])], "MBR: disk error 04h"),
    ] {
        refused(name, load(changed(changes)), why);
    }
}

#[test]
fn a_disk_that_ends_before_its_partition_is_told() {
    let disk = built_in_disk();
    let Places { data, .. } = places(&disk);
    for (name, len, why) in [
        ("MBR alone", SECTOR, "MBR: disk error 04h"),
        ("boot sector", VOLUME + SECTOR, "stage 2: cannot read the disk, error 04h"),
        ("no FAT", places(&disk).fat, "stage 2: cannot read the disk, error 04h"),
        ("half a kernel", data + 20 * SECTOR, "stage 2: cannot read the disk, error 04h"),
    ] {
        refused(name, load(disk[..len].to_vec()), why);
    }
}

#[test]
fn a_damaged_file_system_is_told() {
    let disk = built_in_disk();
    let Places { fat, root, .. } = places(&disk);
    let entry = kernel_entry(&disk);
    let volume = |at| VOLUME + at;
    let unsound = "stage 2: the partition has no sound FAT16 file system";
    let broken = "stage 2: the FAT is damaged: KERNEL.ELF's chain of clusters is broken";
    let none = "stage 2: there is no KERNEL.ELF in the root directory";
    let magic = volume(asm::boot::STAGE2.len() - 1);
    for (name, change, why) in [
        ("the rest of stage 2", (magic, &[0][..]), "stage 2: the rest of it is not where it"),
        ("sectors of 4096 bytes", (volume(11), &[0, 16]), unsound),
        ("clusters of 0 sectors", (volume(13), &[0]), unsound),
        ("clusters of 3 sectors", (volume(13), &[3]), unsound),
        ("clusters of 128 sectors", (volume(13), &[128]), unsound),
        ("too few clusters", (volume(13), &[2]), unsound),
        ("nothing reserved", (volume(14), &[1, 0]), unsound),
        ("no FAT", (volume(16), &[0]), unsound),
        ("an odd root directory", (volume(17), &[1, 2]), unsound),
        ("no sectors", (volume(19), &[0, 0]), unsound),
        ("fewer than before the data", (volume(19), &[9, 0]), unsound),
        ("a FAT32's length", (volume(22), &[0, 0]), unsound),
        ("a short FAT", (volume(22), &[4, 0]), unsound),
        ("a partition elsewhere", (volume(28), &[0xFF; 4]), "stage 2: "),
        ("no root directory", (volume(17), &[0, 0]), none),
        ("another name", (entry, b"X"), none),
        ("deleted", (entry, &[0xE5]), none),
        ("the directory's end", (root, &[0]), none),
        ("a directory", (entry + 11, &[0x10]), none),
        ("a label", (entry + 11, &[0x08]), none),
        ("cluster 0", (entry + 26, &[0, 0]), broken),
        ("cluster 1", (entry + 26, &[1, 0]), broken),
        ("a cluster beyond the end", (entry + 26, &[0xF0, 0xFE]), broken),
        ("a free cluster in the chain", (fat + 2 * 9, &[0, 0]), broken),
        ("a bad cluster in the chain", (fat + 2 * 9, &[0xF7, 0xFF]), broken),
        ("a chain that ends early", (fat + 2 * 9, &[0xFF, 0xFF]), broken),
        ("a loop of one", (fat + 2 * 9, &[9, 0]), broken),
        ("a loop", (fat + 2 * 60, &[3, 0]), broken),
        ("a file shorter than its chain", (entry + 28, &[0, 0x10, 0, 0]), broken),
        ("a file longer than its chain", (entry + 28, &[0, 0, 0x10, 0]), broken),
        ("an empty file", (entry + 28, &[0; 4]), "stage 2: KERNEL.ELF is no ELF64"),
        ("4 GiB", (entry + 28, &[0xFF; 4]), "stage 2: KERNEL.ELF does not fit into memory"),
        ("64 MiB", (entry + 28, &[0, 0, 0, 4]), "stage 2: KERNEL.ELF does not fit into memory"),
    ] {
        refused(name, load(changed(&[change])), why);
    }
}

#[test]
fn a_kernel_that_is_none_is_not_entered() {
    let change = |at: usize, bytes: &[u8]| {
        let mut kernel = guests::KERNEL.to_vec();
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
        kernel
    };
    let headers = u64::from_le_bytes(guests::KERNEL[32..40].try_into().unwrap()) as usize;
    let at = |field| headers + field;
    let no_elf = "stage 2: KERNEL.ELF is no ELF64 file for x86-64";
    let cut_off = "stage 2: KERNEL.ELF is truncated";
    let no_place = "stage 2: a segment of KERNEL.ELF does not fit into memory";
    let bad_entry = "stage 2: the entry point of KERNEL.ELF is in none of its segments";
    let file_in_memory = (64u64 << 20) - guests::KERNEL.len().next_multiple_of(16) as u64;
    for (name, kernel, why) in [
        (
            "text",
            b"no kernel, only some text that is as long as a header of 64 bytes".to_vec(),
            no_elf,
        ),
        ("short", guests::KERNEL[..63].to_vec(), no_elf),
        ("32 bits", change(4, &[1]), no_elf),
        ("big-endian", change(5, &[2]), no_elf),
        ("shared object", change(16, &[3]), no_elf),
        ("machine", change(18, &[183]), no_elf),
        ("phentsize", change(54, &[32]), no_elf),
        ("phnum", change(56, &[65]), no_elf),
        ("no program headers", change(56, &[0]), bad_entry),
        ("header alone", guests::KERNEL[..64].to_vec(), cut_off),
        ("half", guests::KERNEL[..4096].to_vec(), cut_off),
        ("phoff", change(32, &[0xFF; 8]), cut_off),
        ("phoff below 4 GiB", change(32, &[0xFF; 4]), cut_off),
        ("offset", change(at(8), &[0xFF; 8]), cut_off),
        ("offset below 4 GiB", change(at(8), &[0xFF; 4]), cut_off),
        ("filesz", change(at(32), &[0xFF; 8]), cut_off),
        ("filesz below 4 GiB", change(at(32), &[0xFF; 4]), cut_off),
        ("paddr", change(at(24), &0x7C00u64.to_le_bytes()), no_place),
        ("over the end", change(at(24), &0xFFFF_FFF0u64.to_le_bytes()), no_place),
        ("beyond 4 GiB", change(at(24), &0x1_0010_0000u64.to_le_bytes()), no_place),
        ("over the file", change(at(24), &(file_in_memory - 4096).to_le_bytes()), no_place),
        ("memsz", change(at(40), &[0xFF; 8]), no_place),
        ("memsz below 4 GiB", change(at(40), &[0xFF; 4]), no_place),
        ("memsz less than filesz", change(at(40), &[1, 0, 0, 0]), no_place),
        ("entry", change(24, &[0; 8]), bad_entry),
        ("entry beyond 4 GiB", change(24, &0x1_0010_0000u64.to_le_bytes()), bad_entry),
    ] {
        refused(name, load(disk_with(&kernel)), why);
    }
}

#[test]
fn too_little_memory_is_told() {
    for (memory, why) in [
        (1 << 20, "stage 2: there is no memory beyond the first MiB"),
        ((1 << 20) + (64 << 10), "stage 2: KERNEL.ELF does not fit into memory"),
        ((1 << 20) + (256 << 10), "stage 2: a segment of KERNEL.ELF does not fit into memory"),
    ] {
        refused("memory", load_in(memory, built_in_disk()), why);
    }
}

/// Any one byte of what the loader reads, but its own code, may be wrong: it ends with a line, or as if nothing were.
#[test]
fn no_byte_of_damage_brings_the_loader_down() {
    let disk = built_in_disk();
    let Places { fat, root, data } = places(&disk);
    let chain = 2 * (2 + guests::KERNEL.len().div_ceil(SECTOR));
    let parts = [
        (TABLE, 64),
        (VOLUME + 11, 51),
        (fat, chain),
        (root, kernel_entry(&disk) + 32 - root),
        // The ELF header and the program headers.
        (data, 64 + 4 * 56),
    ];
    // A generator of numbers that is the same everywhere. (Knuth's MMIX.)
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let (mut refused, mut entered) = (0, 0);
    for n in 0..60 {
        let (start, len) = parts[n % parts.len()];
        let (at, value) = (start + random(len), random(256) as u8);
        let mut damaged = disk.clone();
        damaged[at] = value;
        let Loaded { ending, printed, .. } = load(damaged);
        let last = printed.lines().last().unwrap_or_default();
        match ending {
            Ending::Left => entered += 1,
            Ending::Exited(1) if last.starts_with("MBR: ") || last.starts_with("stage 2: ") => {
                refused += 1;
            }
            _ => panic!("byte {at:#x} = {value:#04x}: {ending:?}\n{printed}"),
        }
    }
    assert!(refused > 10 && entered > 10, "{refused} refused, {entered} entered");
}

/// The loader on a BIOS that knows neither linear addresses nor how to open the A20 gate.
fn old_bios_disk() -> Vec<u8> {
    let mut disk = built_in_disk();
    disk.copy_within(..SECTOR, SECTOR);
    disk[..TABLE].copy_from_slice(&asm::boot::OLD_BIOS[..TABLE]);
    disk
}

#[test]
fn an_old_bios_reads_by_cylinders() {
    let loaded = load(old_bios_disk());
    assert_eq!(loaded.ending, Ending::Left, "{}", loaded.printed);
}

/// What `cargo xtask image` runs.
#[test]
fn the_image_is_written_as_a_whole_or_not_at_all() {
    let disks = Disks::new();
    let binary = env!("CARGO_BIN_EXE_mini-kvm-image");
    let image = disks.path("boot.img");
    Program::new(binary).args([&image]).run().ended(0);
    assert!(fs::read(&image).unwrap() == built_in_disk());

    let write = |path: &Path| Program::new(binary).args([path]).run();
    write(disks.path(".").as_path()).refused(2, "this is a directory");
    write(Path::new("/dev/full")).refused(3, "cannot write the file: No space left");
    // A limit of one block is a full disk that nobody has to mount.
    let image = disks.path("large");
    let script = r#"trap '' XFSZ; ulimit -f 1; exec "$0" "$1""#;
    let args = ["-c", script, binary, image.to_str().unwrap()];
    Program::new("sh").args(args).run().refused(3, "cannot write the file");
    assert!(!image.exists());
}
