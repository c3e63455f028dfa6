//! Links the user programs at their own address, without anything of Linux's.

fn main() {
    println!("cargo::rerun-if-changed=user.ld");
    let script = format!("{}/user.ld", std::env::var("CARGO_MANIFEST_DIR").unwrap());
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-s"]
    {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{script}");
}
