//! A real-mode program under a real gdb.

use std::sync::mpsc::channel;
use std::thread;

use common::gdb::{Address, Gdb, Setup};
use common::vcpu::Standing;
use testkit::{PATIENCE, Program};

use super::*;

fn vcpu() -> Program {
    Program::new(env!("CARGO_BIN_EXE_03_vcpu"))
}

#[test]
fn gdb_steps_and_stops_a_real_mode_program() {
    let (ran, gdb) = vcpu().under_gdb(&[
        // The first instruction, with 16-bit code and 32-bit registers.
        "x/2i $pc",
        "p $cr0",
        "stepi",
        "stepi",
        "info threads",
        // A breakpoint, hidden in what gdb reads.
        "break *0x1019",
        "continue",
        "x/i $pc",
        "p $cx",
        "delete",
        "hbreak *0x1020",
        "continue",
        // Debug registers know accesses; a guest that goes step by step doesn't, and stays where it is.
        "awatch *(short*)0x2010",
        "continue",
        "delete",
        // Before the square is written, and behind that.
        "watch *(int*)0x2012",
        "continue",
        "p $pc",
        "p *(int*)0x2012",
        "delete",
        // What gdb writes is what the guest has.
        "set var *(int*)0x2012 = 77",
        "set var $ebx = 0x12345678",
        "monitor regs",
        "monitor code 0x1019 1",
        "monitor pagewalk 0x1000",
        "monitor stops",
        "monitor nonsense",
        "detach",
    ]);
    gdb.ended(0)
        .stdout_has("=> 0x1000:\txor    %eax,%eax\n   0x1003:\tcpuid")
        .stdout_has("= [ ET NW CD ]")
        .stdout_has("0x00001005 in ??")
        .stdout_has("Thread 1.1 (vCPU 0: real mode)")
        .stdout_has("Breakpoint 1, 0x00001019 in ??")
        .stdout_has("=> 0x1019:\tadd    %cx,%ax")
        .stdout_has("$2 = 10")
        .stdout_has("Breakpoint 2, 0x00001020 in ??")
        .stdout_has("Old value = 0\nNew value = 3025")
        .stdout_has("(void (*)()) 0x1027")
        .stdout_has("= 3025\n")
        // gdb shows on stderr what a monitor command answers.
        .stderr_has("ebx 12345678")
        .stderr_has("   0x1019: add ax,cx")
        .stderr_has("guest-physical 0x1000")
        .stderr_has("hbreak: ")
        .stderr_has("there is no `nonsense`");
    let refused = gdb.err().contains("rwatch and awatch are refused");
    match refused {
        true => gdb.stderr_has("Could not insert hardware watchpoint 3."),
        // The sum is written.
        false => gdb.stdout_has("*(short*)0x2010\n\nOld value = 0\nNew value = 55"),
    };
    ran.ended(0)
        .stderr_has("gdb has detached: the guest goes on")
        .stdout_has("= 55, squared 77")
        .stdout_has("KVM_EXIT_HLT");
}

#[test]
fn gdb_sees_a_guest_that_cannot_go_on_and_its_end() {
    let (ran, gdb) = vcpu().args(["triple-fault"]).under_gdb(&[
        "continue",
        "monitor exits",
        "continue",
        "info threads",
    ]);
    gdb.ended(0)
        .stdout_has("received signal SIGSEGV")
        .stderr_has("KVM_EXIT_SHUTDOWN")
        .stdout_has("Program terminated with signal SIGABRT")
        .stdout_has("No threads.");
    ran.ended(1).stdout_has("KVM_EXIT_SHUTDOWN");
}

#[test]
fn gdb_that_kills_ends_the_program() {
    let (ran, gdb) = vcpu().under_gdb(&["kill"]);
    gdb.ended(0);
    ran.ended(0).stderr_has("gdb has killed the machine");
    assert!(ran.took < PATIENCE);
}

#[test]
fn addresses_that_cannot_be_listened_on_are_refused() {
    vcpu().args(["--gdb=x"]).run().refused(2, "expected PORT, HOST:PORT or unix:PATH");
    vcpu().args(["--gdb", "--step"]).run().refused(2, "cannot be used with");
    vcpu().args(["--gdb", "--trace=step"]).run().refused(2, "leave one of them out");
    vcpu()
        .args(["--gdb=192.0.2.1:1234"])
        .run()
        .ended(2)
        .stderr_has("cannot listen on 192.0.2.1:1234 for gdb");
}

#[test]
fn a_vcpu_that_leaves_at_a_breakpoint_stands_at_the_guests_own_instruction() {
    let interrupted = |vcpu: &mut Vcpu| assert!(matches!(vcpu.run().unwrap(), Exit::Interrupted));
    const BYTES: [u8; 4] = [0x90, 0x90, 0x90, 0xF4]; // NOP, NOP, NOP, HLT
    let breakpoint = PROGRAM.0 + 1;
    // Right behind the exit, and after one more call. Only where the breakpoint is made of OUT (`monitor stops`) are
    // these two: KVM finishes that instruction in between.
    for calls in [0, 1] {
        let (mut vcpu, _) = super::vcpu(&BYTES);
        let (sender, said) = channel();
        let gdb = Gdb::start(Setup {
            address: Address::Tcp("127.0.0.1:0".into()),
            vcpus: 1,
            symbols: None,
            say: Box::new(move |line| drop(sender.send(line.to_owned()))),
            kill: Box::new(|| {}),
        });
        gdb.unwrap().follow(&mut vcpu);
        let line = said.recv().unwrap();
        let attach = line.split('\'').nth(1).unwrap().to_owned();
        let gdb = thread::spawn(move || {
            let set = format!("break *{breakpoint:#x}");
            let commands = ["-nx", "-batch", "-ex", &attach, "-ex", &set, "-ex", "continue"];
            Program::new("gdb").args(commands).run()
        });
        while vcpu.standing() == Standing::Between {
            interrupted(&mut vcpu);
        }
        if vcpu.standing() == Standing::Within {
            (0..calls).for_each(|_| interrupted(&mut vcpu));
        }
        vcpu.leave().unwrap();
        // As whoever saves it does.
        vcpu.set_immediate_exit(true);
        interrupted(&mut vcpu);

        assert_eq!(vcpu.regs().unwrap().rip, breakpoint, "after {calls} more calls");
        let bytes: [u8; 4] = vcpu.vm().ram().read_obj(PROGRAM).unwrap();
        assert_eq!(bytes, BYTES);
        gdb.join().unwrap().stdout_has("exited normally");
    }
}
