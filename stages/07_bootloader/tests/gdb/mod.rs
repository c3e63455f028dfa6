//! gdb at a machine that boots: from the reset vector to the boot sector, which is not there yet when it is named.

use crate::program;

#[test]
fn gdb_waits_at_the_reset_vector_and_stops_in_the_boot_sector() {
    let (ran, gdb) = program().args(["--cpus", "2"]).under_gdb(&[
        "p/x $pc",
        "x/i $pc",
        "info threads",
        "hbreak *0x7c00",
        "continue",
        "p/x $pc",
        "monitor phys 0x7dfe 2",
        "delete",
        "stepi",
        "p $cr0",
        "kill",
    ]);
    gdb.ended(0)
        .stdout_has("$1 = 0xfffffff0")
        .stdout_has("=> 0xfffffff0:\t")
        .stdout_has("Thread 1.1 (vCPU 0: real mode)")
        .stdout_has("Thread 1.2 (vCPU 1: real mode, waits for INIT)")
        .stdout_has("hit Breakpoint 1, 0x00007c00 in ")
        .stdout_has("$2 = 0x7c00")
        .stdout_has("$3 = [ ET");
    gdb.stderr_has("0x7dfe: 55 aa");
    ran.ended(0).stderr_has("gdb has killed the machine");
}
