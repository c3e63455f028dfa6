//! Milestone 7: a disk boots, byte by byte what was on it, and a bad one says what is wrong with it.

mod bios;
mod disks;
mod display;
mod machine;
mod multiboot;
mod smp;
mod trace;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use common::bus::{Device, shared};
use common::disk_image::{self, SECTOR};
use common::hypercall;
use common::run::{self, Ending, Stop, Stopped};
use machine::Parts;
use testkit::{Program, Ran};
use vm_memory::{Bytes, GuestAddress};

const PROMPT: &str = "> ";

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_07_bootloader"))
}

fn built_in_disk() -> Vec<u8> {
    disk_image::build(asm::boot::SECTOR, asm::boot::STAGE2, guests::KERNEL).unwrap()
}

/// A folder that goes away with the test, for disks.
struct Disks(tempfile::TempDir);

impl Disks {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

fn boot(disk: &Path) -> Ran {
    program().args(["--timeout", "60", "--disk"]).args([disk]).run()
}

#[test]
fn the_kernel_on_the_disk_runs_its_shell() {
    let ran = program().args(["--memory", "32M", "--stats"]).stdin("calc 6*7\nexit\n").run();
    ran.ended(0)
        .stdout_has("boot sector: loading stage 2\r\nstage 2: A20, memory, page tables\r\n")
        .stdout_has("by a boot loader on a disk")
        .stdout_has("calc 6*7\r\n42\r\n");
    // It was told of 31 MiB above the first and of 639 KiB below, and not of more.
    let out = ran.out();
    let free = out.split("memory: ").nth(1).unwrap().split_whitespace().nth(2).unwrap();
    let free: u32 = free.parse().unwrap();
    assert!((30 << 10..32 << 10).contains(&free), "{free} KiB");
    // Each sector costs seven accesses to registers and one string instruction for its 256 words.
    let sectors = built_in_disk().len() / SECTOR - 1;
    let err = ran.err();
    let exits = err.lines().find(|line| line.ends_with("exits: disk")).unwrap();
    let exits: usize = exits.split_whitespace().next().unwrap().parse().unwrap();
    assert!(exits >= 8 * sectors && exits <= 9 * sectors, "{exits} exits for {sectors} sectors");
}

#[test]
fn a_written_image_boots_as_the_built_in_one_does() {
    let disks = Disks::new();
    let image = disks.path("boot.img");
    program().args(["--write-image"]).args([&image]).run().ended(0);
    assert_eq!(fs::read(&image).unwrap(), built_in_disk());
    let mut guest = program().args(["--disk"]).args([&image]).on_terminal();
    guest.expect(PROMPT).send("gcd 12 18\r").expect("6\r\n").send("\x01x");
    assert_eq!(guest.end(), 0);
    assert!(!guest.is_raw());
    assert_eq!(fs::read(&image).unwrap(), built_in_disk(), "booting wrote to the disk");
}

/// Stops at the first byte that the kernel itself prints: after the boot loader, before anything changes.
struct Serial {
    printed: String,
    stop: Stop,
    lines: Sender<String>,
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
        if self.printed.ends_with("entering the kernel\r\n") {
            self.lines.send(self.printed.clone()).unwrap();
            self.stop.now(Ending::Left);
        }
    }
}

/// Boots the built-in disk with `serial` for a serial port.
fn run_with(
    serial: impl Device + 'static,
    ends: (Stop, Stopped),
) -> (Parts, Result<Ending, run::Error>) {
    machine::run(built_in_disk(), 64 << 20, ends, |_, _| shared(serial))
}

#[test]
fn a_device_that_panics_does_not_leave_the_machine_waiting() {
    struct Broken;
    impl Device for Broken {
        fn read(&mut self, _: u64, _: &mut [u8]) {
            panic!("this panic is part of the test");
        }
        fn write(&mut self, _: u64, _: &[u8]) {}
    }
    let (_, ending) = run_with(Broken, run::stop());
    assert!(matches!(ending, Err(run::Error::Panic(0))), "{ending:?}");
}

#[test]
fn what_is_in_memory_is_what_was_on_the_disk() {
    let disk = built_in_disk();
    let (stop, stopped) = run::stop();
    let (lines, printed) = channel();
    let serial = Serial { printed: String::new(), stop: stop.clone(), lines };
    let (Parts { ram, .. }, ending) = run_with(serial, (stop, stopped));
    assert_eq!(ending.unwrap(), Ending::Left, "{:?}", printed.try_recv());

    // The second stage, header included, stands at 0x8000 as on the disk.
    let mut loaded = [0; 20];
    ram.read_slice(&mut loaded, GuestAddress(0x8000)).unwrap();
    assert_eq!(loaded, disk[SECTOR..SECTOR + 20]);
    let lba = u32::from_le_bytes(loaded[8..12].try_into().unwrap()) as usize;
    assert_eq!(disk[lba * SECTOR..][..guests::KERNEL.len()], *guests::KERNEL);

    // Each segment of the kernel is where its program header says, zeros behind it.
    let elf = guests::KERNEL;
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let headers = usize::from(u16::from_le_bytes([elf[56], elf[57]]));
    let mut segments = 0;
    for header in (0..headers).map(|i| u64_at(32) as usize + 56 * i).filter(|&at| elf[at] == 1) {
        let (offset, paddr) = (u64_at(header + 8) as usize, u64_at(header + 24));
        let (filesz, memsz) = (u64_at(header + 32) as usize, u64_at(header + 40) as usize);
        let mut segment = vec![0xFF; memsz];
        ram.read_slice(&mut segment, GuestAddress(paddr)).unwrap();
        assert_eq!(segment[..filesz], elf[offset..offset + filesz], "segment at {paddr:#x}");
        assert!(segment[filesz..].iter().all(|&byte| byte == 0), "behind {paddr:#x}");
        segments += 1;
    }
    assert!(segments >= 2);

    // The boot info, by the kernel's own definition of it.
    let magic: u64 = ram.read_obj(GuestAddress(0x5000)).unwrap();
    assert_eq!(magic, guests::boot::MAGIC);
    let (base, length): (u64, u64) =
        (ram.read_obj(GuestAddress(0x5038)).unwrap(), ram.read_obj(GuestAddress(0x5040)).unwrap());
    assert_eq!((base, length), (1 << 20, 63 << 20));
    assert_eq!(hypercall::DEBUG_EXIT.start, u64::from(guests::boot::DEBUG_EXIT_PORT));
}

#[test]
fn damage_on_the_disk_is_found_before_it_is_run() {
    let disks = Disks::new();
    let disk = built_in_disk();
    let flip = |at: usize| {
        let mut disk = disk.clone();
        disk[at] ^= 0x10;
        disk
    };
    let kernel = disk.len() - guests::KERNEL.len().next_multiple_of(SECTOR);
    for (name, bytes, why) in [
        ("nothing", disk[..SECTOR].to_vec(), "boot sector: disk error"),
        ("half", disk[..2 * SECTOR].to_vec(), "boot sector: disk error"),
        ("no-kernel", disk[..kernel].to_vec(), "stage 2: the disk cannot be read"),
        ("magic", flip(SECTOR), "boot sector: no stage 2"),
        ("length", flip(SECTOR + 5), "boot sector: bad length of stage 2"),
        ("stage2", flip(SECTOR + 700), "boot sector: bad checksum of stage 2"),
        ("kernel", flip(kernel + 5000), "stage 2: the kernel's checksum is wrong"),
    ] {
        let ran = boot(&disks.write(name, &bytes));
        ran.ended(1).stdout_has(why).stderr_has("the guest ended with code 1");
    }
}

#[test]
fn a_kernel_that_is_none_is_not_entered() {
    let disks = Disks::new();
    let change = |at: usize, bytes: &[u8]| {
        let mut kernel = guests::KERNEL.to_vec();
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
        kernel
    };
    let headers = u64::from_le_bytes(guests::KERNEL[32..40].try_into().unwrap()) as usize;
    for (name, kernel, why) in [
        (
            "text",
            b"no kernel, only some text that is long enough to be one, of a hundred bytes".to_vec(),
            "is no ELF64",
        ),
        ("machine", change(18, &[183]), "is no ELF64"),
        ("phoff", change(32, &[0xFF; 8]), "segments make no sense"),
        ("entry", change(24, &[0; 8]), "segments make no sense"),
        ("offset", change(headers + 8, &[0xFF; 8]), "segments make no sense"),
        ("paddr", change(headers + 24, &0x7C00u64.to_le_bytes()), "segments make no sense"),
        ("memsz", change(headers + 40, &[0xFF; 8]), "segments make no sense"),
    ] {
        let disk = disk_image::build(asm::boot::SECTOR, asm::boot::STAGE2, &kernel).unwrap();
        boot(&disks.write(name, &disk)).ended(1).stdout_has(why);
    }
}

#[test]
fn what_is_no_boot_disk_gets_one_line() {
    let disks = Disks::new();
    let huge = disks.path("huge");
    File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    let random: Vec<u8> = (1..1025u32).map(|i| (i.wrapping_mul(i) >> 5) as u8).collect();
    for (disk, why) in [
        (disks.path("missing"), "there is no such file"),
        (disks.write("empty", b""), "the file is empty"),
        (disks.write("short", &built_in_disk()[..511]), "expected at least one sector of 512"),
        (disks.write("odd", &built_in_disk()[..1000]), "expected a multiple of 512"),
        (disks.write("random", &random[..1024]), "a boot sector ends in 55 aa"),
        (huge, "ends in 00 00, a boot sector ends in 55 aa"),
        (disks.0.path().to_owned(), "this is a directory"),
    ] {
        program().args(["--disk"]).args([&disk]).run().refused(2, why);
    }
}

#[test]
fn an_image_is_written_as_a_whole_or_not_at_all() {
    let disks = Disks::new();
    let write = |path: &Path| program().args(["--write-image".as_ref(), path.as_os_str()]);
    write(disks.0.path()).run().refused(2, "this is a directory");
    write(Path::new("/dev/full")).run().refused(3, "cannot write the file: No space left");
    // A limit of one block is a full disk that nobody has to mount.
    let image = disks.path("image");
    let script = r#"trap '' XFSZ; ulimit -f 1; exec "$0" --write-image "$1""#;
    let binary = env!("CARGO_BIN_EXE_07_bootloader");
    let args = ["-c", script, binary, image.to_str().unwrap()];
    Program::new("sh").args(args).run().refused(3, "cannot write the file");
    assert!(!image.exists());
}

#[test]
fn a_boot_sector_may_spin_or_crash() {
    let disks = Disks::new();
    let sector = |code: &[u8]| {
        let mut sector = code.to_vec();
        sector.resize(SECTOR - 2, 0);
        sector.extend(disk_image::SIGNATURE);
        sector
    };
    // jmp $
    let spin = disks.write("spin", &sector(&[0xEB, 0xFE]));
    let ran = program().args(["--timeout", "0.5", "--disk"]).args([&spin]).run();
    ran.ended(4).stderr_has("the time given with --timeout ran out");
    // lidt [cs:5]; ud2: an empty IDT, and then an exception.
    let crash = [0x2E, 0x0F, 0x01, 0x1E, 0x20, 0x7C, 0x0F, 0x0B];
    let crash = disks.write("crash", &sector(&crash));
    boot(&crash).ended(1).stderr_has("the guest crashed: triple fault");
}

#[test]
fn the_old_ports_do_what_programs_wait_for() {
    let disks = Disks::new();
    boot(&disks.write("ports", asm::boot::PORTS)).ended(0);
}

#[test]
fn the_time_limit_holds_for_what_a_guest_has_left_to_print() {
    let disks = Disks::new();
    let mut sector = [0; 512];
    // mov ecx, 70000; mov dx, 0x3F8; again: mov al, 'x'; out dx, al; dec ecx; jnz again; then 0 to port
    // 0xF4. That is more than a pipe holds and no more than may wait to be printed.
    let code = b"\x66\xB9\x70\x11\x01\0\xBA\xF8\x03\xB0x\xEE\x66\x49\x75\xF9\xBA\xF4\0\x30\xC0\xEE";
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&disk_image::SIGNATURE);
    let disk = disks.write("flood", &sector);
    program().args(["--timeout", "8", "--disk"]).args([&disk]).unread().run().ended(4);
}

#[test]
fn too_little_memory_is_said_by_who_notices() {
    let ran = program().args(["--memory", "4M", "--timeout", "60"]).run();
    ran.ended(1).stdout_has("stage 2: less than 8 MiB of memory");
    program().args(["--memory", "4K"]).run().refused(2, "--memory is too small for a PC");
    program().args(["--memory", "0M"]).run().refused(2, "expected a multiple of 4 KiB");
}

/// The image leans on nothing that only our machine has.
#[test]
fn the_image_boots_a_pc_with_a_firmware_of_its_own() {
    let disks = Disks::new();
    let image = disks.write("boot.img", &built_in_disk());
    if std::process::Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("skipped: QEMU is not installed here");
        return;
    }
    let drive = format!("file={},format=raw", image.display());
    let mut pc = Program::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "64", "-nographic", "-no-reboot", "-drive", &drive])
        .args(["-device", "isa-debug-exit,iobase=0xf4"])
        .on_terminal();
    pc.expect("boot sector: loading stage 2").expect("by a boot loader on a disk");
    // QEMU's memory registers say the same as ours.
    pc.expect("of 64244 KiB free").expect(PROMPT).send("calc 6*7\r").expect("\n42");
    pc.expect(PROMPT).send("exit\r");
    // isa-debug-exit makes 2n + 1 of n.
    assert_eq!(pc.end(), 1);
}

#[test]
fn without_a_disk_the_bios_says_so() {
    let ran = program().args(["--no-disk", "--timeout", "60"]).run();
    ran.ended(1)
        .stdout_has("mini-kvm BIOS, 64 MiB of memory\r\n")
        .stdout_has("There is no disk.\r\nNo bootable disk.\r\n")
        .stderr_has("the guest ended with code 1")
        .stderr_has("the last POST code was 51h");
}

#[test]
fn another_firmware_starts_at_the_reset_vector() {
    let disks = Disks::new();
    // At the reset vector a far jump to E000:0000, or F000:0000; there, out 0xF4, al = 0.
    for (name, size, segment) in [("64", 64, 0xF0), ("128", 128, 0xE0), ("256", 256, 0xE0)] {
        let mut image = vec![0xF4; size << 10];
        let low = image.len() - image.len().min(128 << 10);
        image[low..low + 4].copy_from_slice(&[0xB0, 0, 0xE6, 0xF4]);
        let reset = image.len() - 16;
        image[reset..reset + 5].copy_from_slice(&[0xEA, 0, 0, 0, segment]);
        let image = disks.write(name, &image);
        program().args(["--timeout", "60", "--firmware"]).args([&image]).run().ended(0);
    }
    let huge = disks.path("huge");
    File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    for (image, why) in [
        (disks.path("missing"), "there is no such file"),
        (disks.write("short", &[0xF4; 1000]), "has 1000 bytes, expected 65536, 131072 or 262144"),
        (disks.write("odd", &[0xF4; 0x1_8000]), "has 98304 bytes, expected"),
        (huge, "expected at most 262144"),
    ] {
        program().args(["--firmware"]).args([&image]).run().refused(2, why);
    }
}
