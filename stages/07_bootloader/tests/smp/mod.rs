//! Several processors: how many there may be, and what a system does with them.

use crate::{Disks, program};

#[test]
fn as_many_processors_as_there_are_apic_ids() {
    for (cpus, why) in [
        ("0", "0 is not in 1..=255"),
        ("256", "256 is not in 1..=255"),
        ("-1", "-1 is not in 1..=255"),
        ("two", "invalid digit"),
    ] {
        program().args(["--cpus", cpus]).run().refused(2, why);
    }
}

/// The guest is asm/boot/smp.asm, which says what each line means and ends with code 1 where something is wrong.
fn every_processor_works(cpus: u8) {
    let disks = Disks::new();
    let kernel = disks.write("kernel", asm::boot::SMP);
    let ran = program().args(["--cpus", &cpus.to_string(), "--timeout", "55", "--kernel"]);
    let ran = ran.args([&kernel]).run();
    let last = cpus - 1;
    let said = format!("processors {cpus}\nready {cpus}\nline 0 at {last}\nreset\n");
    assert_eq!(ran.ended(0).out(), said);
}

#[test]
fn one_processor_finds_itself_in_the_mp_table() {
    every_processor_works(1);
}

#[test]
fn two_processors_start_and_take_interrupts() {
    every_processor_works(2);
}

#[test]
fn four_processors_start_and_take_interrupts() {
    every_processor_works(4);
}
