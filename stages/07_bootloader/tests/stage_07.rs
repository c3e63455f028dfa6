//! Milestone 7: a disk boots, byte by byte what was on it, and a bad one says what is wrong with it.

mod bios;
mod disks;
mod display;
mod gdb;
mod grub;
mod loader;
mod machine;
mod multiboot;
mod smp;
mod trace;
mod walk;
mod xv6;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use common::boot_disk;
use common::bus::{Device, shared};
use common::disk::SECTOR;
use common::run::{self, Ending, Stop, Stopped};
use machine::Parts;
use testkit::{Program, Ran};

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_07_bootloader"))
}

fn built_in_disk() -> Vec<u8> {
    boot_disk::build(asm::boot::MBR, asm::boot::STAGE2, guests::KERNEL).unwrap()
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
        .stdout_has("stage 2: loading\r\nstage 2: loading KERNEL.ELF\r\nstage 2: to long mode")
        .stdout_has("by a boot loader on a disk")
        .stdout_has("calc 6*7\r\n42\r\n");
    // It was told of 31 MiB above the first and of 639 KiB below, and not of more.
    let out = ran.out();
    let free = out.split("memory: ").nth(1).unwrap().split_whitespace().nth(2).unwrap();
    let free: u32 = free.parse().unwrap();
    assert!((30 << 10..32 << 10).contains(&free), "{free} KiB");
    // The file's clusters lie side by side: the BIOS reads up to 64 sectors by one command.
    let exits = ran.exits("disk") as usize;
    let sectors = guests::KERNEL.len() / SECTOR;
    assert!((sectors..4 * sectors).contains(&exits), "{exits} exits for {sectors} sectors");
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
    assert!(matches!(&ending, Err(run::Error::Panic(who)) if who == "vCPU 0"), "{ending:?}");
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
fn a_boot_sector_may_spin_or_crash() {
    let disks = Disks::new();
    let sector = |code: &[u8]| {
        let mut sector = code.to_vec();
        sector.resize(SECTOR - 2, 0);
        sector.extend(boot_disk::SIGNATURE);
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
    // jmp 0xE000:0. There is nothing: neither RAM nor ROM.
    let nowhere = disks.write("nowhere", &sector(&[0xEA, 0, 0, 0, 0xE0]));
    boot(&nowhere).ended(1).stderr_has("the guest crashed: KVM_INTERNAL_ERROR_EMULATION");
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
    sector[510..].copy_from_slice(&boot_disk::SIGNATURE);
    let disk = disks.write("flood", &sector);
    program().args(["--timeout", "8", "--disk"]).args([&disk]).unread().run().ended(4);
}

#[test]
fn too_little_memory_is_said_by_who_notices() {
    let ran = program().args(["--memory", "1M", "--timeout", "60"]).run();
    ran.ended(1).stdout_has("stage 2: there is no memory beyond the first MiB");
    program().args(["--memory", "4K"]).run().refused(2, "--memory is too small for a PC");
    program().args(["--memory", "0M"]).run().refused(2, "expected a multiple of 4 KiB");
}

#[test]
fn without_a_disk_the_bios_says_so() {
    let ran = program().args(["--no-disk", "--timeout", "60"]).run();
    ran.ended(1)
        .stdout_has("mini-kvm BIOS, 256 MiB of memory\r\n")
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
