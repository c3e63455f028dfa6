//! int 18h and int 19h: which drive's first sector gets to run.

use std::io;

use common::boot_disk::SIGNATURE;
use common::bus::shared;
use common::cmos::BootFirst;
use common::disk::SECTOR;
use common::disk::Sectors;
use common::ide::Drive;
use common::run::{self, Ending};
use common::uart::Uart;
use testkit::Printed;

use crate::machine::{self, Setup};

/// What makes a disk a floppy.
const FLOPPY: usize = 1_474_560 / SECTOR;

/// A disk that prints `name` and its number, as it stands in DL, and gives up.
fn disk(name: u8, sectors: usize, signature: [u8; 2]) -> Vec<u8> {
    let mut disk = vec![
        0xB8, name, 0x0E, // mov ax, 0x0E00 | name
        0xCD, 0x10, // int 10h
        0x88, 0xD0, // mov al, dl
        0x24, 0x7F, // and al, 0x7F
        0x04, b'0', // add al, '0'
        0xCD, 0x10, // int 10h
        0xCD, 0x18, // int 18h
    ];
    disk.resize(SECTOR - 2, 0);
    disk.extend(signature);
    disk.resize(sectors * SECTOR, 0);
    disk
}

/// A disk that has never been written to, and now cannot be read.
struct Scratched;

impl Sectors for Scratched {
    fn count(&self) -> u64 {
        5000
    }
    fn read(&mut self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::InvalidData.into())
    }
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is printed until nothing is left that could boot.
pub fn said(drives: Vec<Drive>, first: BootFirst) -> String {
    let screen = Printed::default();
    let setup = Setup { drives, first, ..Setup::default() };
    let (_, ending) =
        machine::run_with(setup, run::stop(), |_, line| shared(Uart::new(line, screen.clone())));
    assert_eq!(ending.unwrap(), Ending::Exited(1));
    String::from_utf8(screen.bytes()).unwrap().split_once("of memory\r\n").unwrap().1.to_owned()
}

fn drives() -> Vec<Drive> {
    vec![
        Drive::new(disk(b'h', 100, SIGNATURE), "1"),
        Drive::new(disk(b'f', FLOPPY, SIGNATURE), "2"),
        Drive::new(Scratched, "3"),
        Drive::new(disk(b'g', FLOPPY, [0xAA, 0x55]), "4"),
    ]
}

const FLOPPIES: &str = "f0\r\n\
    Floppy 00h: its program gave up.\r\n\
    Floppy 01h: its first sector does not end in 55 AA.\r\n";
const DISKS: &str = "h0\r\n\
    Disk 80h: its program gave up.\r\n\
    Disk 81h: its first sector cannot be read.\r\n";
const NONE: &str = "No bootable disk.\r\n";

#[test]
fn floppies_are_tried_first() {
    assert_eq!(said(drives(), BootFirst::Floppies), format!("{FLOPPIES}{DISKS}{NONE}"));
}

#[test]
fn disks_are_tried_first_if_the_cmos_says_so() {
    assert_eq!(said(drives(), BootFirst::Disks), format!("{DISKS}{FLOPPIES}{NONE}"));
}

#[test]
fn a_third_floppy_is_a_disk_and_four_disks_have_numbers() {
    let floppies = (1..=4).map(|n| Drive::new(disk(b'e' + n, FLOPPY, SIGNATURE), "n")).collect();
    let said_of_floppies = said(floppies, BootFirst::Floppies);
    let letters: Vec<_> = said_of_floppies.lines().step_by(2).collect();
    assert_eq!(letters, ["f0", "g1", "h0", "i1", "No bootable disk."]);
    let disks = (1..=4).map(|n| Drive::new(disk(b'e' + n, 1, SIGNATURE), "n")).collect();
    let said_of_disks = said(disks, BootFirst::Floppies);
    let letters: Vec<_> = said_of_disks.lines().step_by(2).collect();
    assert_eq!(letters, ["f0", "g1", "h2", "i3", "No bootable disk."]);
}

#[test]
fn the_order_is_an_option() {
    let disks = crate::Disks::new();
    let floppy = disks.write("floppy.img", &disk(b'f', FLOPPY, SIGNATURE));
    let hard = disks.write("hard.img", &disk(b'h', 10, SIGNATURE));
    for (args, first) in [(&[][..], "f0"), (&["--boot", "disk"][..], "h0")] {
        let program = crate::program().args(args).args(["--timeout", "60"]);
        let ran = program.args(["--disk"]).args([&floppy]).args(["--disk"]).args([&hard]).run();
        ran.ended(1).stdout_has(&format!("MiB of memory\r\n{first}\r\n"));
    }
}
