//! Linux under gdb.

use super::*;

#[test]
fn gdb_looks_at_linux_before_its_first_instruction_and_lets_it_boot() {
    let linux = program().args(["--cpus", "2"]).stdin("nproc\n");
    let (ran, gdb) = linux.under_gdb(&[
        "info threads",
        "x/i $pc",
        "p $cr0",
        "monitor pagewalk 0xfee00000",
        "monitor msr 0xc0000080",
        "monitor idt",
        "stepi",
        "stepi",
        "info registers rip",
        "thread 2",
        "monitor regs",
        "detach",
    ]);
    gdb.ended(0)
        .stdout_has("Thread 1.1 (vCPU 0: long mode)")
        .stdout_has("Thread 1.2 (vCPU 1: real mode, waits for INIT)")
        .stdout_has("= [ PE ET PG ]");
    gdb.stderr_has(
        "-> guest-physical 0xfee00000, a page of 2 MiB, writable, supervisor, executable",
    )
    .stderr_has("LME LMA")
    .stderr_has("IDT at 0x0, limit 0x0")
    .stderr_has("efer 0000000 -, real mode");
    ran.ended(0).stderr_has("gdb has detached");
    assert_eq!(answer(&ran, "nproc"), ["2"]);
}

#[test]
fn gdb_stops_at_start_kernel_with_the_symbols_of_a_vmlinux() {
    let vmlinux = cache::small_kernel().with_file_name("vmlinux");
    if !vmlinux.exists() {
        println!("skipped: there is no {}: cargo xtask kernel makes it", vmlinux.display());
        return;
    }
    let symbols = format!("symbol-file {}", vmlinux.display());
    let linux = program().args(["--kernel", "small"]);
    let (ran, gdb) = linux.under_gdb(&[
        &symbols,
        "hbreak start_kernel",
        "continue",
        "info symbol $pc",
        "x/s (char *)&linux_banner",
        "monitor pagewalk 0xffffffff81000000",
        "delete",
        "break rest_init",
        "continue",
        "kill",
    ]);
    gdb.ended(0)
        .stdout_has("in start_kernel ()")
        .stdout_has("start_kernel in section .init.text")
        .stdout_has("in rest_init ()")
        .stdout_has("\"Linux version ");
    gdb.stderr_has("-> guest-physical 0x1000000, a page of 2 MiB");
    ran.ended(0).stderr_has("gdb has killed the machine");
}
