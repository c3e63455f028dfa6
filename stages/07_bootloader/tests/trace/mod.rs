//! A trace, whatever the guest and the terminal do.

use crate::program;

#[test]
fn a_guest_that_runs_into_nothing_is_traced_to_its_end() {
    let disks = crate::Disks::new();
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
    let mut guest = program().args(args).on_terminal();
    guest.expect("--trace would write into the text screen; send it to a file: 2> trace.txt");
    assert_eq!(guest.end(), 2);
    assert!(!guest.is_raw());
    let ran = program().args(args).run();
    ran.ended(1).stderr_has("POST code: 80 <- 51");
}
