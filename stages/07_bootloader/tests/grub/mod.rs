//! GRUB, as Debian ships it: its rescue floppy, and a disk on which set-up has put it beside Debian's kernel. And SeaBIOS,
//! which is a package, too, in the place of our BIOS.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use cli::cache;

use super::{Disks, built_in_disk, program};

/// Linux unpacks itself in the guest, which is emulated twice in the lab.
const PATIENCE: Duration = Duration::from_secs(300);

/// The file that set-up makes of packages, where they are to be had.
fn made_by_setup(file: PathBuf) -> Option<PathBuf> {
    if !file.exists() {
        println!("skipped: {} is missing (cargo xtask setup)", file.display());
        return None;
    }
    Some(file)
}

#[test]
fn the_rescue_floppy_takes_commands() {
    let Some(floppy) = made_by_setup(cache::grub_floppy()) else { return };
    // A floppy of 1.44 MB has a length of its own, and GRUB's image is cut behind its last byte.
    let disks = Disks::new();
    let mut image = fs::read(floppy).unwrap();
    image.resize(1_474_560, 0);
    let machine = program().args(["--disk"]).args([disks.write("floppy.img", &image)]);
    let second = disks.write("disk.img", &built_in_disk());
    let mut guest = machine.args(["--disk"]).args([second]).patience(PATIENCE).on_terminal();
    guest
        .expect("GRUB loading")
        .expect("for a command-line.")
        .expect("Microsoft Windows")
        .send("c");
    guest.expect("grub> ").send("ls\r").expect("(hd0)").expect("(fd0)").expect("grub> ");
    guest.send("ls (fd0)/boot\r").expect("\rgrub/").expect("grub> ");
    guest.send("halt\r");
    assert_eq!(guest.end(), 0);
}

#[test]
fn grub_boots_linux_to_its_shell() {
    let Some(disk) = made_by_setup(cache::grub_disk()) else { return };
    let disk = format!("{},snapshot", disk.display());
    let machine = program().args(["--memory", "256M", "--cpus", "2", "--disk", &disk]);
    let mut guest = machine.patience(PATIENCE).on_terminal();
    guest.expect("GRUB loading").expect("for a command-line.").expect("*Linux").send("\r");
    guest.expect("mini-kvm: Linux ").expect(" reached user space").expect("# ");
    // The MP table named both processors and the IOAPIC, and the 8259s were left.
    guest.send("grep -c ^processor /proc/cpuinfo\r").expect("\n2\r").expect("# ");
    guest.send("grep ttyS0 /proc/interrupts\r").expect("IO-APIC   4-edge      ttyS0").expect("# ");
    guest.send("grep -o vmlinuz.console=ttyS0 /proc/cmdline\r").expect("\nvmlinuz console=ttyS0\r");
    guest.expect("# ").send("exit\r").expect("reboot: Restarting system");
    assert_eq!(guest.end(), 0);
}

#[test]
fn seabios_boots_our_disk() {
    let bios = PathBuf::from("/usr/share/seabios/bios.bin");
    if !bios.exists() {
        println!("skipped: {} is missing (Debian: seabios)", bios.display());
        return;
    }
    let machine = program().args(["--firmware-log", "--firmware"]).args([&bios]);
    let ran = machine.patience(PATIENCE).stdin("calc 6*7\nexit\n").run();
    ran.ended(0)
        .stderr_has("firmware: SeaBIOS (version ")
        .stderr_has("firmware: Booting from Hard Disk...")
        .stdout_has("by a boot loader on a disk")
        .stdout_has("calc 6*7\r\n42\r\n");
}
