//! What mini-kvm costs: the measurements behind `cargo xtask bench`.
//!
//! This program runs where a `/dev/kvm` is, which may be in the lab; `cargo xtask bench` builds it,
//! picks the place and makes the table. `bench/README.md` explains the rows.

mod compare;
mod disk;
mod exits;
mod linux;
mod restore;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use cli::Ended;
use common::checkup;
use serde::Serialize;

/// Takes measurements of mini-kvm and prints them as JSON, one row a line
///
/// Exit code 3 says that this machine's KVM cannot do what the measurement needs.
#[derive(Parser)]
#[command(version, name = "mini-kvm-bench")]
struct Args {
    /// What to measure
    measurement: Measurement,

    /// The folder with the stages' programs
    #[arg(long, value_name = "FOLDER")]
    programs: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Measurement {
    /// One port I/O and one MMIO exit through our bus, against a bare loop
    Exits,
    /// From the start of a process to its first KVM_RUN
    Start,
    /// From the start of a process to the next instruction of the guest that it restores
    Restore,
    /// A disk, from inside Linux and from outside
    Disk,
    /// Stage 08 to Linux's first user-space line, and the monitor's own memory then
    Linux,
    /// The same boot in other monitors that this machine has: QEMU, kvmtool
    Compare,
}

impl Measurement {
    /// The stage whose verdict of the check-up decides where this can be measured.
    fn stage(self) -> u8 {
        match self {
            Self::Exits | Self::Start => 5,
            Self::Restore | Self::Disk | Self::Linux | Self::Compare => 8,
        }
    }
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    /// Stays the same from version to version, so that results can be compared.
    name: String,
    /// For a person.
    what: String,
    /// The median of all runs.
    value: f64,
    unit: &'static str,
    /// What `value` should not exceed.
    aim: Option<f64>,
    /// What `value` comes from, or how it scatters.
    detail: String,
    /// How often it was measured.
    runs: usize,
}

fn main() -> ExitCode {
    cli::main(|args: Args| {
        let kvm = common::kvm::open()?;
        // A KVM that can't do a stage would give figures of something else. The lab's can.
        if std::env::var_os(lab::INSIDE).is_none() {
            let stage = args.measurement.stage();
            let verdict = checkup::run_for(&kvm, &asm::checkup(), stage);
            if !verdict.able {
                eprintln!("error: this KVM cannot do stage {stage}: {}", verdict.reason);
                return Ok(Ended::HostCannot);
            }
        }
        let rows = match args.measurement {
            Measurement::Exits => exits::rows()?,
            Measurement::Start => start::rows(&args.programs)?,
            Measurement::Restore => restore::rows(&args.programs)?,
            Measurement::Disk => disk::rows(&args.programs)?,
            Measurement::Linux => linux::rows(&args.programs)?,
            Measurement::Compare => compare::rows(&args.programs)?,
        };
        for row in rows {
            println!("{}", serde_json::to_string(&row)?);
        }
        Ok(Ended::Well)
    })
}

/// The middle of some durations.
fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
