//! Two vCPUs under gdb, as two threads.

use std::fs;

use testkit::Program;

#[test]
fn ctrl_c_stops_both_vcpus_and_each_goes_on_where_gdb_puts_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loop.bin");
    // `jmp $`, and behind it, where only gdb leads, `hlt`.
    fs::write(&path, [0xEB, 0xFE, 0xF4]).unwrap();
    let path = path.to_str().unwrap();
    let (ran, gdb) = Program::new(env!("CARGO_BIN_EXE_04_pio")).args([path, path]).under_gdb(&[
        "shell (sleep 1; kill -INT $PPID) &",
        "continue",
        "info threads",
        "x/i $pc",
        // One moves, the other stands still: its code begins at 0x10000.
        "set scheduler-locking on",
        "thread 2",
        "p/x $pc",
        "set var $eip = 0x11002",
        "thread 1",
        "stepi",
        "p/x $pc",
        "set var $eip = 0x1002",
        "x/i $pc",
        "thread 2",
        "p/x $pc",
        "set scheduler-locking off",
        "continue",
    ]);
    gdb.ended(0)
        .stdout_has("received signal SIGINT")
        .stdout_has("Thread 1.1 (vCPU 0: real mode)")
        .stdout_has("Thread 1.2 (vCPU 1: real mode)")
        .stdout_has("=> 0x1000:\tjmp    0x1000")
        .stdout_has("$1 = 0x11000")
        .stdout_has("$2 = 0x1000\n")
        .stdout_has("=> 0x1002:\thlt")
        .stdout_has("$3 = 0x11002")
        .stdout_has("exited normally");
    ran.ended(0).stderr_has("vCPU 0").stderr_has("vCPU 1").stderr_has("ended by HLT");
}
