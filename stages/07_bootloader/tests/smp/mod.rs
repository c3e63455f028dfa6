//! Several processors: how many there may be, and what each of them can do.

use crate::program;

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
