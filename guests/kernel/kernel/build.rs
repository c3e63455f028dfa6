//! Builds the user programs, which the kernel carries inside itself, and links the kernel at 1 MiB.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());

    for path in ["kernel.ld", "../user", "../abi"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // Cargo cannot (yet) make one executable wait for another, so a second cargo builds the
    // programs first, in a target folder of its own: the outer cargo holds the lock on this one.
    let status = Command::new(env::var_os("CARGO").unwrap())
        .current_dir(here.join("../user"))
        .args(["build", "--release", "--package", "user", "--bin", "user", "--target-dir"])
        .arg(out.join("target"))
        // What this cargo told its own build scripts and linters must not reach the inner one.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo starts");
    assert!(status.success(), "the user programs do not build");
    let user = out.join("target/x86_64-unknown-linux-gnu/release/user");
    fs::copy(user, out.join("user.elf")).expect("the user programs were built");

    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", here.join("kernel.ld").display());
}
