//! Stage 01: `/dev/kvm`, what it says it can do, a virtual machine, and what it can really do.

mod doctor;
mod report;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use cli::{CannotPrint, Ended};
use common::checkup::{self, Report};
use common::kvm::{self, CAPABILITIES, Limits};
use serde::Serialize;

/// Opens /dev/kvm, asks what it can do, makes a virtual machine, and checks this host up.
///
/// Everything in KVM is a file descriptor: /dev/kvm is the first one, and an ioctl on it gives one for
/// a virtual machine. What KVM can do it tells as capabilities. Whether it really works, only a guest can
/// tell: the check-up runs tiny ones, each of which tries one thing that a later stage needs.
#[derive(Parser)]
#[command(after_help = "\
Try: 01_create_vm           what this host offers, and which stages it can run
     01_create_vm --doctor  what is missing for the others, and what to do about it
     01_create_vm --json    the same for programs, the verdicts under `verdicts`

A stage that cannot run here is no error; KVM that cannot be used at all is.")]
struct Args {
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,

    /// Say what this host lacks for which stage, and what to do about it
    #[arg(long, conflicts_with = "json")]
    doctor: bool,
}

/// All that was found. `--json` prints it as it stands here; the names of the fields are a promise.
#[derive(Serialize)]
struct Found {
    api_version: i32,
    capabilities: Vec<Answer>,
    limits: Limits,
    create_vm_micros: u64,
    #[serde(flatten)]
    checkup: Report,
}

/// What `KVM_CHECK_EXTENSION` answered.
#[derive(Serialize)]
struct Answer {
    name: &'static str,
    value: i32,
    stages: &'static [u8],
    what: &'static str,
}

fn main() -> ExitCode {
    cli::main(create_vm)
}

fn create_vm(args: Args) -> Result<Ended> {
    if args.doctor {
        return Ok(doctor::run(&mut anstream::stdout().lock()).map_err(CannotPrint)?);
    }
    // ANCHOR: story
    // The system's file descriptor. Its API version comes before everything else: `open` has checked it.
    let kvm = kvm::open()?;
    let api_version = kvm.get_api_version();

    // What it says of itself.
    let capabilities = CAPABILITIES
        .iter()
        .map(|capability| Answer {
            name: capability.name,
            value: capability.value(&kvm),
            stages: capability.stages,
            what: capability.what,
        })
        .collect();
    let limits = Limits::new(&kvm)?;

    // A virtual machine: a second file descriptor, with nothing in it yet.
    let began = Instant::now();
    let vm = kvm::create_vm(&kvm)?;
    let create_vm_micros = began.elapsed().as_micros() as u64;

    // What it really does: tiny guests, and what follows from them for each stage.
    let checkup = checkup::run(&kvm, &asm::checkup());
    // ANCHOR_END: story

    let found = Found { api_version, capabilities, limits, create_vm_micros, checkup };
    let mut out = anstream::stdout().lock();
    let printed = if args.json {
        serde_json::to_writer_pretty(&mut out, &found)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        report::print(&mut out, &found, kvm.as_raw_fd(), vm.as_raw_fd())
    };
    printed.map_err(CannotPrint)?;
    Ok(Ended::Well)
}
