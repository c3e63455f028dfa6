//! Disks: the files that `--disk` takes, what becomes of writes to them, and the controller, by guests that use it.

mod kill;
mod ports;

use std::fs;

use common::disk::SECTOR;

use crate::{Disks, built_in_disk, program};

/// Runs the stage with these values of `--disk`, which it refuses for this reason.
fn refused(disks: &[&str], folder: &Disks, why: &str) {
    let args = disks.iter().flat_map(|disk| ["--disk", disk]);
    program().args(args).current_dir(folder.0.path()).run().refused(2, why);
}

#[test]
fn a_mode_behind_the_comma_says_what_becomes_of_writes() {
    let folder = Disks::new();
    folder.write("a.img", &built_in_disk());
    refused(
        &["a.img,readonly"],
        &folder,
        r#""readonly" is unknown, expected path=FILE, rw, ro, snapshot;"#,
    );
    refused(&["a.img,ro,rw"], &folder, "ro and rw exclude each other");
    refused(&["path=,ro"], &folder, "path has no value: path=FILE");
    // A comma that belongs to the name is there twice.
    refused(&["a,,ro.img,ro"], &folder, "disk a,ro.img: there is no such file");
    folder.write("a,ro", &built_in_disk());
    let boot = program().args(["--disk", "path=a,,ro,rw", "--exit-when", "stage 2: A20"]);
    boot.current_dir(folder.0.path()).run().ended(0);
}

#[test]
fn one_of_the_disks_can_be_booted() {
    let folder = Disks::new();
    folder.write("boot", &built_in_disk());
    folder.write("data", &[0; 4 * SECTOR]);
    folder.write("more", &[0; SECTOR]);
    let both = ["data", "more,ro"];
    refused(
        &both,
        &folder,
        "none of the 2 disks can be booted: disk data: the disk's first sector ends",
    );
    refused(
        &["boot", "data", "more", "data", "more"],
        &folder,
        "given 5 times, expected at most 4",
    );
    refused(&["boot", "data", "boot,ro"], &folder, "disk boot: the disk is in use already");
    let boot =
        ["--disk", "boot", "--disk", "data", "--disk", "more", "--exit-when", "stage 2: A20"];
    program().args(boot).current_dir(folder.0.path()).run().ended(0);
}

#[test]
fn a_disk_that_is_written_to_has_one_machine() {
    let folder = Disks::new();
    let image = folder.write("boot", &built_in_disk());
    let first = program().args(["--disk"]).args([&image]).on_terminal();
    let mut first = first;
    first.expect("> ");
    let again =
        |mode: &str| program().args(["--disk", &format!("{}{mode}", image.display())]).run();
    again("").refused(2, "the disk is in use already");
    again(",snapshot").refused(2, "the disk is in use already");
    first.send("\x01x");
    assert_eq!(first.end(), 0);
    assert_eq!(fs::read(&image).unwrap(), built_in_disk());
}
