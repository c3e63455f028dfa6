//! The text screen in the terminal: drawn while the machine runs, gone when it ends, and left in words behind it.

use std::process::Command;

use common::boot_disk::SIGNATURE;
use common::disk::SECTOR;

use crate::{Disks, program};

/// What the BIOS says first.
const GREETING: &str = "mini-kvm BIOS, 256 MiB of memory";

/// A disk with `code` in its boot sector.
fn disk(code: &[u8]) -> Vec<u8> {
    let mut sector = code.to_vec();
    sector.resize(SECTOR - SIGNATURE.len(), 0);
    sector.extend(SIGNATURE);
    sector
}

/// `sti; hlt`, again and again.
const WAITS: [u8; 4] = [0xFB, 0xF4, 0xEB, 0xFC];

/// Sends a signal by the shell, whose own `kill` is there where no program of that name is.
fn kill(signal: &str, pid: u32) {
    let kill = format!("kill {signal} {pid}");
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

#[test]
fn it_is_drawn_where_the_program_ran_and_gives_the_terminal_back() {
    let disks = Disks::new();
    let waits = disks.write("waits", &disk(&WAITS));
    let start = || {
        let args = ["--display".as_ref(), "text".as_ref(), "--disk".as_ref(), waits.as_os_str()];
        let mut guest = program().args(args).on_terminal();
        // The greeting may be drawn before its line has ended.
        guest.shows(GREETING).shows_cursor_at((1, 0));
        assert!(guest.is_raw());
        assert!(guest.terminal().alternate_screen());
        guest
    };
    let mut guest = start();
    guest.send("\x01h").shows("Ctrl-A x");
    guest.send("a").hides("Ctrl-A x");
    guest.resize(10, 20).shows(&GREETING[..20]);
    guest.resize(30, 100).shows(GREETING).send("\x01x");
    assert_eq!(guest.end(), 0);
    assert!(!guest.is_raw());
    assert!(!guest.terminal().alternate_screen());
    guest.shows(GREETING);

    // A signal ends it as it ends other programs, but for the terminal.
    for signal in ["-TERM", "-HUP"] {
        let mut guest = start();
        kill(signal, guest.pid());
        assert_eq!(guest.end(), -1);
        assert!(!guest.is_raw());
        assert!(!guest.terminal().alternate_screen() && !guest.terminal().hide_cursor());
    }

    // Whoever stops it and goes on later gets the picture again.
    let mut guest = start();
    let pid = guest.pid();
    kill("-STOP", pid);
    guest.spoil();
    kill("-CONT", pid);
    guest.shows(GREETING).send("\x01x");
    assert_eq!(guest.end(), 0);
}

#[test]
fn what_is_typed_there_is_typed_on_the_keyboard() {
    let disks = Disks::new();
    let echo = disks.write("echo", asm::boot::ECHO);
    let args = ["--display".as_ref(), "text".as_ref(), "--disk".as_ref(), echo.as_os_str()];
    let mut guest = program().args(args).on_terminal();
    guest.shows(GREETING);
    let typed = r##"The quick brown fox, 0123456789 `-=[]\;',./ ~!@#$%^&*()_+{}|:"<>?"##;
    guest.send(typed).shows(typed).send("\x7f.\r\x1b[AHi");
    // Backspace, and a cursor key, whose character is 0.
    guest.shows(".\n Hi").send("\x04");
    assert_eq!(guest.end(), 0);
}

#[test]
fn a_machine_that_crashes_leaves_its_last_picture() {
    let disks = Disks::new();
    // lidt [cs:0x7C20]; ud2: an empty IDT, and then an exception.
    let crash = disks.write("crash", &disk(&[0x2E, 0x0F, 0x01, 0x1E, 0x20, 0x7C, 0x0F, 0x0B]));
    let args = ["--display".as_ref(), "text".as_ref(), "--disk".as_ref(), crash.as_os_str()];
    let mut guest = program().args(args).on_terminal();
    // Behind the window, which is closed, and before all that is said of the crash.
    guest.expect("\x1b[?1049l").expect(GREETING).expect("the guest crashed: triple fault");
    assert_eq!(guest.end(), 1);
    assert!(!guest.is_raw());
}

#[test]
fn without_a_terminal_the_last_picture_is_printed() {
    let args = ["--timeout", "60", "--display", "text"];
    let ran = program().args(args).args(["--no-disk"]).run();
    let text = format!("{GREETING}\nThere is no disk.\nNo bootable disk.\n");
    assert_eq!(ran.ended(1).out(), text);

    let disks = Disks::new();
    let waits = disks.write("waits", &disk(&WAITS));
    let ran =
        program().args(args).args(["--exit-when", "of memory", "--disk"]).args([&waits]).run();
    assert_eq!(ran.ended(0).out(), format!("{GREETING}\n"));
}

#[test]
fn the_serial_port_can_go_to_a_file_meanwhile() {
    let disks = Disks::new();
    let log = disks.path("log");
    let args = ["--timeout", "60", "--display", "text", "--serial"];
    // mov al, '!'; mov dx, 0x3F8; out dx, al; mov al, 0; out 0xF4, al. The BIOS says nothing there.
    let speaks = [0xB0, b'!', 0xBA, 0xF8, 0x03, 0xEE, 0xB0, 0, 0xE6, 0xF4];
    let speaks = disks.write("speaks", &disk(&speaks));
    let ran = program().args(args).args([&log]).args(["--disk"]).args([&speaks]).run();
    assert_eq!(ran.ended(0).out(), format!("{GREETING}\n"));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "!");

    // Nor does the second stage, for it speaks by the BIOS.
    let ran = program().args(args).args([&log]).args(["--memory", "1M"]).run();
    let why = "stage 2: there is no memory beyond the first MiB\n";
    assert!(ran.ended(1).out().ends_with(why), "{}", ran.out());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "");

    program().args(["--serial"]).args([&log]).run().refused(2, "--serial goes with --display text");
    program().args(args).args([disks.path("")]).run().refused(2, "this is a directory");
}

#[test]
fn a_line_feed_alone_begins_a_line_of_the_terminal() {
    // xv6 sends no carriage return, and would go down a stair.
    let mut code = vec![0xBA, 0xF8, 0x03]; // mov dx, 3F8h
    code.extend(b"ab\ncd\ne#".iter().flat_map(|&byte| [0xB0, byte, 0xEE])); // mov al, byte; out dx, al
    code.extend(WAITS);
    let disks = Disks::new();
    let mut guest =
        program().args(["--disk"]).args([disks.write("lines", &disk(&code))]).on_terminal();
    guest.shows("e#");
    assert_eq!(guest.terminal().cursor_position().1, 2);
    assert!(guest.terminal().contents().contains("\ncd\ne#"));
    guest.send("\x01x");
    assert_eq!(guest.end(), 0);
    assert!(!guest.is_raw());
}
