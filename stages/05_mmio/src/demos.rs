//! The command line of stage 05, its demos, and what is printed about a machine that has ended.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cli::Ended;
use common::layout::{PROGRAM, VGA_HOLE};
use common::vcpu::Exit;

use crate::{Report, machine};

/// How many writes each way of the comparison gets.
const WRITES: u64 = 5_000;

/// How often each way runs, in turn with the others; the median counts.
const ROUNDS: usize = 3;

/// Memory-mapped I/O: devices at addresses where no memory is.
///
/// A guest's memory has holes. Where no memslot is, the hardware cannot do an access: KVM decodes the
/// instruction, and KVM_RUN returns with KVM_EXIT_MMIO, an address and the bytes. The monitor looks
/// the address up on its bus and asks the device that is there. A write to a read-only memslot comes
/// out in the same way.
///
/// The machine: RAM up to 0xA0000; there two pages of scratch registers; a text screen at 0xB8000; a
/// device with a doorbell and an interrupt at 0xD0000; a ROM at 0xF0000. The guest's screen and what it
/// sends to port 0xE9 go to stdout; what the monitor has to say goes to stderr.
#[derive(Debug, Parser)]
#[command(version, name = "05_mmio", after_help = format!("\
Try: 05_mmio                    all demos in turn
     05_mmio sizes              which exits the sizes and alignments cause
     05_mmio --trace doorbell   what a driver and its device say to each other
     05_mmio --program my.bin   a program of your own

{}", cli::EXIT_CODES))]
pub struct Args {
    /// The demos to show, one after the other; all of them if none is named.
    #[arg(value_name = "DEMO")]
    demos: Vec<Demo>,

    /// Tell what each demo shows, and end.
    #[arg(long)]
    list: bool,

    /// Run a flat 16-bit program instead. It is loaded at 0x1000 and entered there, with all segments
    /// 0, and ends itself by a byte to port 0xF4: 0 for well, another for not. HLT waits for an
    /// interrupt.
    #[arg(long, value_name = "FILE", conflicts_with = "demos")]
    program: Option<PathBuf>,

    /// Print every MMIO exit: direction, address, bytes, and the device that took it.
    #[arg(long)]
    trace: bool,

    /// End a guest that runs longer than this many seconds.
    #[arg(long, value_name = "SECS")]
    timeout: Option<u64>,
}

impl Args {
    /// How long a guest may run.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Demo {
    /// A text screen at 0xB8000: each character that is written is an exit
    Screen,
    /// Which exits an access causes: 1 to 8 bytes, unaligned, across pages, half in RAM
    Sizes,
    /// A device that gets its work by a doorbell and says by an interrupt that it is done
    Doorbell,
    /// A read-only memslot: reads are memory, writes exit
    Rom,
    /// The same writes as exits, as coalesced MMIO and into an ioeventfd: count and time
    Compare,
}

impl Demo {
    fn program(self) -> &'static [u8] {
        match self {
            Self::Screen => asm::real::SCREEN,
            Self::Sizes => asm::real::SIZES,
            Self::Doorbell => asm::real::DOORBELL,
            Self::Rom => asm::real::ROM,
            Self::Compare => asm::real::MANY_WRITES,
        }
    }

    /// Its name and what it shows, as `--list` and the headings tell it.
    fn title(self) -> String {
        let value = self.to_possible_value().expect("no demo is hidden");
        format!("{:8}  {}", value.get_name(), value.get_help().unwrap_or_default())
    }
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

/// A program to run, and what it finds in RCX.
pub struct Guest<'a> {
    pub program: &'a [u8],
    pub rcx: u64,
    pub trace: bool,
}

impl Guest<'_> {
    /// Prints one MMIO exit, if it is wanted.
    pub fn trace(&self, what: &str, addr: u64, data: &[u8], device: Option<&str>) {
        if self.trace {
            let bytes: Vec<_> = data.iter().map(|byte| format!("{byte:02x}")).collect();
            let device = device.unwrap_or("nobody");
            eprintln!("  {what:5} {addr:#07x}  {:23}  {device}", bytes.join(" "));
        }
    }
}

/// The program behind the command line.
pub fn run(args: &Args) -> Result<Ended> {
    if args.list {
        Demo::value_variants().iter().for_each(|demo| println!("{}", demo.title()));
        return Ok(Ended::Well);
    }
    if let Some(path) = &args.program {
        let program = common::file::read(path, VGA_HOLE.0 - PROGRAM.0)
            .with_context(|| format!("cannot use the program {}", path.display()))?;
        let guest = Guest { program: &program, rcx: 0, trace: args.trace };
        return Ok(tell(&machine(&guest, Delivery::Exits, args)?));
    }
    let demos = if args.demos.is_empty() { Demo::value_variants() } else { &args.demos };
    for &demo in demos {
        if demos.len() > 1 {
            eprintln!("== {}", demo.title());
        }
        let trace = args.trace || demo == Demo::Sizes;
        let guest = Guest { program: demo.program(), rcx: 0, trace };
        let ended = match demo {
            Demo::Compare => compare(args)?,
            _ => tell(&machine(&guest, Delivery::Exits, args)?),
        };
        if ended != Ended::Well {
            return Ok(ended);
        }
    }
    Ok(Ended::Well)
}

/// How a guest ends whose exit no monitor could answer.
pub fn bad_end(exit: &Exit) -> String {
    match exit {
        Exit::Shutdown => "KVM_EXIT_SHUTDOWN, a triple fault".into(),
        Exit::InternalError(error) => format!("KVM could not go on: {}", error.name()),
        exit => format!("{exit:x?}"),
    }
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
    let colon = if reasons.is_empty() { "" } else { ": " };
    eprintln!("The guest {how} after {count} exits in {ms:.1} ms{colon}{}.", reasons.join(", "));
    report.ended
}

/// The same guest with the same writes, delivered in three ways.
fn compare(args: &Args) -> Result<Ended> {
    const WAYS: [(Delivery, &str); 3] = [
        (Delivery::Exits, "an exit each"),
        (Delivery::Coalesced, "coalesced MMIO"),
        (Delivery::Ioeventfd, "ioeventfd"),
    ];
    let guest = Guest { program: Demo::Compare.program(), rcx: WRITES, trace: args.trace };
    let mut reports: [Vec<Report>; 3] = Default::default();
    for _ in 0..ROUNDS {
        for ((way, _), reports) in WAYS.iter().zip(&mut reports) {
            let report = machine(&guest, *way, args)?;
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
        let median = reports.swap_remove(ROUNDS / 2);
        let seconds = median.time.as_secs_f64();
        eprintln!(
            "{name:28} {:8} {:8} {:8.1} ms {:7.2} us {:7.3}",
            median.exits.values().sum::<u64>(),
            median.arrived,
            seconds * 1e3,
            seconds * 1e6 / WRITES as f64,
            seconds / *plain.get_or_insert(seconds),
        );
    }
    Ok(Ended::Well)
}
