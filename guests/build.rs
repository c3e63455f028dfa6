//! Builds the kernel in `kernel/`, a workspace of its own, by a second cargo.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let kernel = here.join("kernel");

    // Everything in the kernel's folder but its own target folder.
    for path in [".cargo", "Cargo.lock", "Cargo.toml", "abi", "kernel", "mem", "user"] {
        println!("cargo::rerun-if-changed={}", kernel.join(path).display());
    }

    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .current_dir(&kernel)
        .args(["build", "--locked", "--release", "--package", "kernel", "--bin", "kernel"])
        .arg("--target-dir")
        .arg(out.join("target"));
    // The kernel is the same however the outer cargo was called: with flags for the host, as
    // clippy, for another target or with a runner. It takes its settings from
    // `kernel/.cargo/config.toml` alone.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let foreign = text.starts_with("CARGO_") && text != "CARGO_HOME"
            || text.starts_with("RUSTC")
            || text.starts_with("CLIPPY")
            || text == "RUSTFLAGS";
        if foreign {
            cargo.env_remove(&name);
        }
    }
    let output = match cargo.output() {
        Ok(output) => output,
        Err(error) => {
            println!("cargo::error=cargo does not start: {error}");
            return;
        }
    };
    if !output.status.success() {
        println!("cargo::error=the kernel in guests/kernel does not build");
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let built = out.join("target/x86_64-unknown-linux-gnu/release/kernel");
    // Line tables are several times as large as the kernel, and only gdb reads them. The tool comes with the linker.
    let stripped = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .args([&out.join("kernel.elf"), &built])
        .status();
    if !stripped.is_ok_and(|status| status.success()) {
        println!("cargo::error=strip, a part of binutils, cannot strip {}", built.display());
    }
    println!("cargo::rustc-env=KERNEL_SYMBOLS={}", built.display());
}
