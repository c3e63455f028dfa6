//! `cargo xtask rootfs` with an mmdebstrap that only pretends: what it makes, keeps and refuses.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use testkit::Program;

fn rootfs(dir: &tempfile::TempDir) -> Program {
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", dir.path().display());
    Program::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["rootfs", "--size", "16M"])
        .env("XDG_CACHE_HOME", dir.path())
        .env("PATH", path)
}

#[test]
fn a_disk_is_made_once_and_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let mmdebstrap = |does: &str| {
        let tool = dir.path().join("mmdebstrap");
        fs::write(&tool, format!("#!/bin/sh\nfor root; do :; done\n{does}\n")).unwrap();
        fs::set_permissions(tool, fs::Permissions::from_mode(0o755)).unwrap();
    };
    mmdebstrap("echo 'E: Unable to locate package nosuch' >&2; echo 'I: cleaning up'; exit 1");
    let ran = rootfs(&dir).args(["--include", "nosuch"]).run();
    if ran.err().contains("this takes ") {
        println!("skipped: making a disk takes root and mke2fs");
        return;
    }
    ran.ended(1).stderr_has("\nerror: mmdebstrap: E: Unable to locate package nosuch (all of it: ");
    let left = fs::read_dir(dir.path().join("mini-kvm")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["rootfs.log"]);

    mmdebstrap(
        "mkdir -p $root/etc; echo 'I: running apt-get update...'; echo $* > $root/etc/asked",
    );
    let ran = rootfs(&dir).args(["--include", "curl,nano", "--suite", "trixie"]).run();
    ran.ended(0).stderr_has("      running apt-get update\n").stdout_has("--append root=/dev/vda");
    let image = dir.path().join("mini-kvm/debian.img");
    let disk = fs::read(&image).unwrap();
    assert_eq!(disk.len(), 16 << 20);
    // The superblock's magic number and label.
    assert_eq!((&disk[0x438..0x43A], &disk[0x478..0x47E]), (&[0x53, 0xEF][..], &b"debian"[..]));
    let asked = disk.windows(11).any(|text| text == b",curl,nano ");
    assert!(asked, "the packages were not asked for");

    let again = rootfs(&dir).args(["--include", "curl,nano", "--suite", "trixie"]).run();
    again.ended(0).stdout_has("The disk is there, made from the same: ");
    let other = rootfs(&dir).args(["--suite", "trixie"]).run();
    other.ended(1).stderr_has("what was done on it would be lost: remove it, or name another FILE");
    assert!(fs::read(&image).unwrap() == disk);
}

#[test]
fn what_is_no_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (option, text) in
        [("--suite", "a b"), ("--include", "--hook=x"), ("--hostname", "$(reboot)")]
    {
        let ran = rootfs(&dir).args([&format!("{option}={text}")]).run();
        ran.ended(1).stderr_has(&format!("error: `{text}` is no name"));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something was made");
}
