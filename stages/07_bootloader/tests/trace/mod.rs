//! A trace, whatever the guest and the terminal do.

use crate::{Disks, program};

#[test]
fn a_guest_that_runs_into_nothing_is_traced_to_its_end() {
    let disks = Disks::new();
    let sector = |code: &[u8]| {
        let mut sector = code.to_vec();
        sector.resize(510, 0);
        sector.extend([0x55, 0xAA]);
        sector
    };
    // jmp E000:0000, where no memory is; lidt [cs:0x7C20] with zeros, ud2.
    let nowhere = disks.write("nowhere", &sector(&[0xEA, 0, 0, 0, 0xE0]));
    let crash = disks.write("crash", &sector(&[0x2E, 0x0F, 0x01, 0x1E, 0x20, 0x7C, 0x0F, 0x0B]));
    for disk in [nowhere, crash] {
        let ran = program().args(["--timeout", "60", "--trace=post", "--disk"]).args([&disk]).run();
        ran.ended(1).stderr_has("the guest cannot go on: ").stderr_has("the guest crashed: ");
    }
}

#[test]
fn a_trace_is_not_written_into_a_picture() {
    let args = ["--no-disk", "--display", "text", "--timeout", "60", "--trace=post"];
    refused_beside_a_picture(&args, "--trace");
    let ran = program().args(args).run();
    ran.ended(1).stderr_has("POST code: 80 <- 51");
}

#[test]
fn nor_is_what_the_firmware_logs() {
    let disks = Disks::new();
    // mov dx, 402h; mov al, '!'; out dx, al; mov al, 10; out dx, al; mov al, 0; out F4h, al; and where a reset begins,
    // a jump there.
    let mut rom = vec![0; 0x1_0000];
    let code = [0xBA, 0x02, 0x04, 0xB0, b'!', 0xEE, 0xB0, 10, 0xEE, 0xB0, 0, 0xE6, 0xF4];
    rom[..code.len()].copy_from_slice(&code);
    rom[0xFFF0..0xFFF5].copy_from_slice(&[0xEA, 0, 0, 0, 0xF0]);
    let rom = disks.write("rom", &rom);
    let args = ["--no-disk", "--timeout", "60", "--firmware-log", "--firmware"];
    let args = [&args[..], &[rom.to_str().unwrap(), "--display", "text"]].concat();
    refused_beside_a_picture(&args, "--firmware-log");
    program().args(&args).run().ended(0).stderr_has("firmware: !\n");
}

fn refused_beside_a_picture(args: &[&str], option: &str) {
    let mut guest = program().args(args).on_terminal();
    let why = "would write into the text screen; send it to a file: 2> log.txt";
    guest.expect(&format!("{option} {why}"));
    assert_eq!(guest.end(), 2);
    assert!(!guest.is_raw());
}
