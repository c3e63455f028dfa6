//! The command line of stage 05, its demos, and what is printed about a machine that has ended.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cli::{Ended, debug, eprintln};
use common::file;
use common::layout::{PROGRAM, VGA_HOLE};

use crate::{Report, boot, machine};

/// How many writes each way of the comparison gets.
const WRITES: u64 = 5_000;

/// How often each way runs, in turn with the others. The fastest counts: whatever else the host does can only
/// slow it down.
const ROUNDS: usize = 3;

/// The most bytes that a program may have: from where it is loaded to the end of the RAM.
const MOST: u64 = VGA_HOLE.0 - PROGRAM.0;

/// Name, code, and what it shows.
const DEMOS: [(&str, &[u8], &str); 5] = [
    ("screen", asm::real::SCREEN, "a text screen at 0xB8000: each character written is an exit"),
    ("sizes", asm::real::SIZES, "the exits of 1 to 8 bytes, unaligned, across pages, half in RAM"),
    ("doorbell", asm::real::DOORBELL, "a device with registers, a doorbell and an interrupt"),
    ("rom", asm::real::ROM, "a read-only memslot: reads are memory, writes exit"),
    (COMPARE, asm::real::MANY_WRITES, "the same writes as exits, coalesced, and into an ioeventfd"),
];

/// The demo that runs three machines.
const COMPARE: &str = "compare";

/// Runs programs that reach devices through memory addresses.
///
/// A guest's memory has holes. Where no memslot is, the hardware cannot do an access: KVM decodes the
/// instruction, and KVM_RUN returns with KVM_EXIT_MMIO, an address and the bytes. The monitor looks
/// the address up on its bus and asks the device that is there. A write to a read-only memslot comes
/// out in the same way.
///
/// The machine: RAM up to 0xA0000; there two pages of scratch registers; a text screen at 0xB8000; a
/// device with a doorbell at 0xD0000, which interrupts on line 5; a ROM at 0xF0000; interrupt
/// controllers in KVM; a serial port (0x3F8) and the debug exit (0xF4), by which a guest ends. HLT only
/// waits for an interrupt. The screen and the serial port go to stdout, what the monitor says to stderr.
#[derive(Clone, Debug, Parser)]
#[command(after_help = format!("\
Demos:
{}
Try: 05_mmio                       all demos in turn
     05_mmio sizes                 the exits of each access
     05_mmio --trace=doorbell,irq doorbell
                                   what driver and device say to each other
     05_mmio --stats screen        how often the guest exited, and how long that took
     05_mmio --gdb doorbell        driver and interrupt handler under gdb
     05_mmio --timeout 5 ./my.bin  flat 16-bit code, started at 0x1000",
    list("  ")))]
pub struct Args {
    /// Names of demos, or files with flat 16-bit code; all demos if nothing is named
    #[arg(value_name = "DEMO")]
    programs: Vec<PathBuf>,

    /// Print the names of the demos, with what they show
    #[arg(long)]
    list: bool,

    /// End with exit code 4 if a guest has not ended after SECS seconds
    #[arg(long, value_name = "SECS", allow_hyphen_values = true, value_parser = cli::seconds, conflicts_with = "gdb")]
    timeout: Option<Duration>,

    #[command(flatten)]
    debug: debug::Flags,
}

/// The demos, one a line.
fn list(indent: &str) -> String {
    DEMOS.iter().map(|(name, _, what)| format!("{indent}{name:9} {what}\n")).collect()
}

/// How the guest's writes to the scratch registers reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Each by an exit of its own.
    Exits,
    /// Collected by KVM in a ring that is emptied at the next exit.
    Coalesced,
    /// Counted by KVM in an eventfd; the data is gone.
    Ioeventfd,
}

/// A program to run.
#[derive(Clone)]
pub struct Guest {
    name: String,
    /// Its code.
    pub program: Cow<'static, [u8]>,
    /// What it finds in RCX.
    pub rcx: u64,
    /// Who looks on.
    pub debug: debug::Flags,
}

impl Guest {
    /// The demo of that name, or else the file.
    fn find(path: &Path, debug: &debug::Flags) -> Result<Self> {
        let (name, mut debug) = (path.display().to_string(), debug.clone());
        if let Some(&(_, code, _)) = DEMOS.iter().find(|(demo, ..)| *demo == name) {
            // The exits are all that `sizes` has to show.
            if name == "sizes" {
                debug = debug.or_trace("mmio,every")?;
            }
            let rcx = if name == COMPARE { WRITES } else { 0 };
            return Ok(Self { name, program: code.into(), rcx, debug });
        }
        match file::read(path, MOST) {
            Ok(code) => Ok(Self { name, program: code.into(), rcx: 0, debug }),
            Err(file::Error::Open(error)) if error.kind() == ErrorKind::NotFound => {
                bail!("{name}: neither a demo (05_mmio --list names them) nor a file")
            }
            Err(error) => Err(error).context(name),
        }
    }
}

/// The program behind the command line.
pub fn run(args: &Args) -> Result<Ended> {
    if args.list {
        cli::print(format_args!("{}", list("")));
        return Ok(Ended::Well);
    }
    let mut names = args.programs.clone();
    if names.is_empty() {
        names = DEMOS.iter().map(|(name, ..)| name.into()).collect();
    }
    ensure!(
        !args.debug.wants_gdb() || matches!(names.as_slice(), [name] if name != Path::new(COMPARE)),
        "--gdb is for one machine: name one demo, and not {COMPARE}, which runs several"
    );
    // All of them are looked for before the first one runs.
    let guests: Vec<_> =
        names.iter().map(|name| Guest::find(name, &args.debug)).collect::<Result<_>>()?;
    let machines = guests.len() > 1 || guests.iter().any(|guest| guest.name == COMPARE);
    if machines && args.debug.writes_files() {
        bail!(
            "--trace-file and --stats-plot are for one machine: name one demo, and not {COMPARE}"
        );
    }
    for guest in &guests {
        if guests.len() > 1 {
            let what =
                DEMOS.iter().find(|(name, ..)| *name == guest.name).map_or("", |demo| demo.2);
            eprintln!("== {:9} {what}", guest.name);
        }
        let ended = match guest.name.as_str() {
            COMPARE => compare(guest, args)?,
            _ => match in_time(guest, Delivery::Exits, args)? {
                Some(report) => {
                    let ended = tell(&report);
                    autopsy(guest, report)?;
                    ended
                }
                None => Ended::TimedOut,
            },
        };
        if ended != Ended::Well {
            return Ok(ended);
        }
    }
    Ok(Ended::Well)
}

/// Runs a machine on a thread of its own: there it may wait for whoever reads stdout, who may never do so.
/// No report means that it was given up when the time was over.
fn in_time(guest: &Guest, delivery: Delivery, args: &Args) -> Result<Option<Report>> {
    let (guest, timeout) = (guest.clone(), args.timeout);
    cli::within(timeout, move || machine(&guest, delivery, timeout))?.transpose()
}

/// Says how a machine ended and what it exited for.
fn tell(report: &Report) -> Ended {
    let how = match report.ended {
        Ended::TimedOut => "was stopped by --timeout",
        Ended::Well => "ended well",
        _ => "failed",
    };
    let reasons: Vec<_> =
        report.exits.iter().map(|(reason, count)| format!("{count} for {reason}")).collect();
    let count: u64 = report.exits.values().sum();
    let ms = report.time.as_secs_f64() * 1e3;
    let colon = if reasons.is_empty() { "" } else { ":\n  " };
    eprintln!("The guest {how} after {count} exits in {ms:.1} ms{colon}{}.", reasons.join(", "));
    report.ended
}

/// Says why a guest died, if it did: from what it left, or by making its machine again and running it a second time.
fn autopsy(guest: &Guest, report: Report) -> Result<()> {
    let Some((vcpu, cause)) = report.dead else { return Ok(()) };
    let again = &mut || boot(&common::kvm::open()?, guest);
    cli::autopsy::report(&vcpu, cause, None, Some(again))
}

/// The same guest with the same writes, delivered in three ways.
fn compare(guest: &Guest, args: &Args) -> Result<Ended> {
    const WAYS: [(Delivery, &str); 3] = [
        (Delivery::Exits, "an exit each"),
        (Delivery::Coalesced, "coalesced MMIO"),
        (Delivery::Ioeventfd, "ioeventfd"),
    ];
    let mut reports: [Vec<Report>; 3] = Default::default();
    for _ in 0..ROUNDS {
        for ((way, _), reports) in WAYS.iter().zip(&mut reports) {
            let Some(report) = in_time(guest, *way, args)? else { return Ok(Ended::TimedOut) };
            if report.ended != Ended::Well {
                return Ok(tell(&report));
            }
            reports.push(report);
        }
    }
    eprintln!("{WRITES} writes to one register     exits  arrived        time  per write   ratio");
    let mut plain = None;
    for ((_, name), mut reports) in WAYS.iter().zip(reports) {
        reports.sort_by_key(|report| report.time);
        let fastest = reports.swap_remove(0);
        let seconds = fastest.time.as_secs_f64();
        eprintln!(
            "{name:28} {:8} {:8} {:8.1} ms {:7.2} us {:7.3}",
            fastest.exits.values().sum::<u64>(),
            fastest.arrived,
            seconds * 1e3,
            seconds * 1e6 / WRITES as f64,
            seconds / *plain.get_or_insert(seconds),
        );
    }
    Ok(Ended::Well)
}
