//! xv6 by its own boot block, and its kernel by Multiboot. The images are not in the repository: the variable
//! `MINI_KVM_XV6` names the folder in which xv6 has been built.
//!
//! In the lab, xv6's ticks have to be fewer than its hundred a second, for its shell with several processors
//! (`MINI_KVM_LAB_MIN_TIMER_PERIOD_US=50000`) and for its `usertests` (1000000). The stage's README says why.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::Dialogue;

use crate::{Disks, program};

const FOLDER: &str = "MINI_KVM_XV6";

/// How long xv6 may be silent. Its idle processors wait without HLT: on a host with fewer, each of its processors
/// waits for the others.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long its own tests may take, all together. In the lab that is an hour.
const USERTESTS: Duration = Duration::from_secs(3 * 3600);

/// Copies of what xv6's Makefile has built, since xv6 writes to its disk.
struct Xv6(Disks);

impl Xv6 {
    fn new() -> Option<Self> {
        let Some(folder) = std::env::var_os(FOLDER) else {
            eprintln!("skipped: {FOLDER} does not name a folder with xv6.img, fs.img and kernel");
            return None;
        };
        let disks = Disks::new();
        for name in ["xv6.img", "fs.img", "kernel"] {
            let from = Path::new(&folder).join(name);
            let bytes = fs::read(&from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
            disks.write(name, &bytes);
        }
        Some(Self(disks))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// Boots to the shell.
    fn boot(&self, cpus: u8, options: &[&str], patience: Duration) -> Dialogue {
        let mut xv6 = program()
            .args(["--cpus", &cpus.to_string()])
            .args(options)
            .args(["--disk".as_ref(), self.path("xv6.img").as_os_str()])
            .args(["--disk".as_ref(), self.path("fs.img").as_os_str()])
            .patience(patience)
            .on_terminal();
        xv6.expect("xv6...\r\n");
        // The first processor comes last.
        for cpu in (1..cpus).chain([0]) {
            xv6.expect(&format!("cpu{cpu}: starting {cpu}\r\n"));
        }
        xv6.expect("init: starting sh\r\n").expect("$ ");
        xv6
    }
}

/// Leaves the machine, which nothing in xv6 turns off.
fn leave(mut xv6: Dialogue) {
    xv6.send("\x01x");
    assert_eq!(xv6.end(), 0);
}

fn shell(cpus: u8) {
    let Some(disks) = Xv6::new() else { return };
    let mut xv6 = disks.boot(cpus, &[], PATIENCE);
    xv6.send("ls\r").expect("README         2 2 ").expect("console        3 ").expect("$ ");
    xv6.send("cat README\r").expect("xv6 is a re-implementation of").expect("$ ");
    xv6.send("echo hi | wc\r").expect("1 1 3").expect("$ ");
    xv6.send("echo x > f\r").expect("$ ");
    leave(xv6);
    // After a restart, the file is there.
    let mut xv6 = disks.boot(cpus, &[], PATIENCE);
    xv6.send("cat f\r").expect("cat f\r\nx\r\n$ ");
    leave(xv6);
}

fn usertests(cpus: u8) {
    let Some(disks) = Xv6::new() else { return };
    let mut xv6 = disks.boot(cpus, &[], USERTESTS);
    xv6.send("usertests\r").expect("usertests starting\r\n").expect("ALL TESTS PASSED\r\n");
    leave(xv6);
}

#[test]
fn shell_on_one_processor() {
    shell(1);
}

#[test]
fn shell_on_two_processors() {
    shell(2);
}

#[test]
fn shell_on_four_processors() {
    shell(4);
}

#[test]
fn usertests_on_one_processor() {
    usertests(1);
}

#[test]
fn usertests_on_two_processors() {
    usertests(2);
}

#[test]
fn usertests_on_four_processors() {
    usertests(4);
}

#[test]
fn the_kernel_by_multiboot() {
    let Some(disks) = Xv6::new() else { return };
    let kernel = disks.path("kernel");
    let mut xv6 = disks.boot(2, &["--kernel", kernel.to_str().unwrap()], PATIENCE);
    xv6.send("echo hi | wc\r").expect("1 1 3").expect("$ ");
    leave(xv6);
}
