//! Set-up on machines that lack something, as a person there meets it.

use std::fs;
use std::process::Command;

use testkit::Program;

fn setup() -> Program {
    Program::new(env!("CARGO_BIN_EXE_xtask")).args(["setup"])
}

#[test]
fn without_apt_it_names_the_packages_goes_on_and_ends_as_not_complete() {
    let cache = tempfile::tempdir().unwrap();
    let leftover = cache.path().join("mini-kvm/.setup-of-yesterday");
    fs::create_dir_all(&leftover).unwrap();
    let ran = setup().env("XDG_CACHE_HOME", cache.path()).env("PATH", cache.path()).run();
    // There is not even `uname` here, so nothing can be taken over from the system.
    ran.ended(1)
        .stderr_has("    sudo ")
        .stderr_has(" nasm ")
        .stderr_has("FAIL Fetching the lab's kernel")
        .stderr_has("FAIL Fetching busybox")
        .stderr_has("Set-up is not complete");
    assert!(!leftover.exists(), "what an interrupted set-up left is still there");
}

#[test]
fn a_cache_folder_that_cannot_be_made_is_told_in_one_line() {
    let ran = setup().env("XDG_CACHE_HOME", "/proc/none").run();
    ran.ended(1).stderr_has("error: cannot make /proc/none/mini-kvm (XDG_CACHE_HOME names another");
    assert_eq!(ran.err().lines().count(), 1, "{}", ran.err());
}

#[test]
fn what_brings_nasm_is_built_without_it() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--prefix=none", "--edges=normal,build", "--package", "xtask"])
        .output()
        .unwrap();
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.contains("\ncommon v"), "{tree}");
    assert!(!tree.lines().any(|line| line.starts_with("asm ")), "{tree}");
}
