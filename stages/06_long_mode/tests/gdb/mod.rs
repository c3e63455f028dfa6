//! gdb follows the Rust kernel from real mode to its own code.

use super::*;

#[test]
fn gdb_goes_from_16_to_64_bit_code_with_the_guest() {
    let symbols = format!("symbol-file {}", guests::kernel_symbols().unwrap().display());
    // A line of the kernel's own source.
    let source = include_str!("../../../../guests/kernel/kernel/src/main.rs");
    let line =
        1 + source.lines().position(|line| line.contains("process::run(b\"shell\")")).unwrap();
    let (ran, gdb) = stage_06().args(["--enter", "climb"]).under_gdb(&[
        "p $pc",
        "hbreak *0x100000",
        "continue",
        // gdb takes it for 16-bit code until it is told to look again.
        "unset tdesc filename",
        &symbols,
        "info symbol $pc",
        "p $efer",
        "monitor cr",
        "monitor pagewalk 0x100000",
        "monitor gdt",
        "delete",
        // By line.
        &format!("hbreak main.rs:{line}"),
        "continue",
        "delete",
        // By name, with the kernel's own tables in force.
        "hbreak interrupt_common",
        "continue",
        "p $rsp",
        "stepi",
        "info registers rip",
        "kill",
    ]);
    gdb.ended(0)
        .stdout_has("$1 = (void (*)()) 0x1000")
        .stdout_has("Breakpoint 1, ")
        .stdout_has("_start in section .text")
        .stdout_has("[ LME LMA ]")
        .stdout_has("interrupt_common ()")
        .stdout_has(&format!("kernel/src/main.rs:{line}\n{line}\t    let outcome = "));
    gdb.stderr_has("vCPU 0 is in 64-bit code, and gdb shows it as 16-bit: `unset tdesc filename`")
        .stderr_has("long mode, 4-level paging")
        .stderr_has("-> guest-physical 0x100000, a page of ")
        .stderr_has("code rx, 64-bit, ring 0");
    ran.ended(0).stderr_has("gdb has killed the machine");
}
