//! Stage 07's boot disk on a PC with another firmware than ours: QEMU's. It needs no KVM.

use std::fs;
use std::path::Path;

use testkit::{Dialogue, Program};

/// The image's drive as an IDE disk.
const IDE: [&str; 2] = ["-device", "ide-hd,drive=boot"];

/// QEMU with an image for a drive that `args` plug in.
fn pc(image: &Path, args: &[&str]) -> Dialogue {
    let file = format!("if=none,id=boot,format=raw,file={}", image.display());
    Program::new(lab::qemu::find().unwrap())
        .args(["-accel", "tcg", "-m", "64", "-nographic", "-no-reboot", "-nic", "none"])
        .args(["-drive", &file])
        .args(args)
        .args(["-device", "isa-debug-exit,iobase=0xf4"])
        .on_terminal()
}

/// Boots an image to the kernel's shell, has it calculate, and leaves it.
fn boots(image: &Path, args: &[&str]) {
    let disk = fs::read(image).unwrap();
    let mut pc = pc(image, args);
    pc.expect("stage 2: loading KERNEL.ELF").expect("by a boot loader on a disk");
    // SeaBIOS keeps its tables at the end of memory, and says so in its map.
    pc.expect("> ").send("mem\r").expect(" to 0x0004000000 ").expect(" KiB reserved");
    pc.expect("> ").send("calc 6*7\r").expect("\n42");
    pc.expect("> ").send("exit\r");
    // isa-debug-exit makes 2n + 1 of n.
    assert_eq!(pc.end(), 1, "{args:?}");
    assert!(fs::read(image).unwrap() == disk, "{args:?}: booting wrote to the disk");
}

#[test]
fn the_image_is_a_pcs_disk() {
    if lab::qemu::find().is_err() {
        assert!(
            std::env::var_os("MINI_KVM_REQUIRE_LAB").is_none(),
            "QEMU is not installed: run `cargo xtask setup`"
        );
        println!("skipped: QEMU is not installed (cargo xtask setup)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("boot.img");
    let xtask = || Program::new(env!("CARGO_BIN_EXE_xtask")).args(["image"]);
    // Building it may take longer than a program usually has.
    let patience = std::time::Duration::from_secs(600);
    xtask().args([&image]).patience(patience).run().ended(0);
    xtask().args([folder.path()]).patience(patience).run().refused(2, "this is a directory");

    boots(&image, &IDE);
    boots(&image, &["-M", "q35", "-device", "ide-hd,drive=boot"]);
    boots(&image, &["-device", "qemu-xhci", "-device", "usb-storage,drive=boot"]);

    // The loader on a BIOS that knows neither linear addresses nor how to open the A20 gate, which shuts here.
    let mut disk = fs::read(&image).unwrap();
    disk.copy_within(..512, 512);
    disk[..446].copy_from_slice(&asm::boot::OLD_BIOS[..446]);
    let old = folder.path().join("old.img");
    fs::write(&old, disk).unwrap();
    boots(&old, &IDE);

    // A processor of the nineties. (SeaBIOS has not yet put the last letters on the serial port when the machine ends.)
    let mut pc = pc(&image, &[&["-cpu", "qemu32"], &IDE[..]].concat());
    pc.expect("stage 2: this processor has no long");
    assert_eq!(pc.end(), 3);
}
