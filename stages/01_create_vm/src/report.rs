//! What was found, as tables of at most 80 columns.

use std::fmt::Display;
use std::io::{Result, Write};
use std::os::fd::RawFd;

use anstyle::{AnsiColor, Style};
use common::checkup::{Probe, Verdict};
use common::kvm::{DEVICE, Limits};

use crate::{Answer, Found};

/// What each stage is about, in its own word.
const STAGES: [&str; 8] =
    ["create_vm", "memory", "vcpu", "pio", "mmio", "long_mode", "bootloader", "boot_linux"];

/// What a heading is printed in.
pub const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default();

/// Where the text under a line of the check-up and the verdict begins.
const INDENT: &str = "       ";

/// Prints it all; `system` and `vm` are the two file descriptors.
pub fn print(out: &mut impl Write, found: &Found, system: RawFd, vm: RawFd) -> Result<()> {
    let version = found.api_version;
    writeln!(out, "{BOLD}{DEVICE}{BOLD:#} is file descriptor {system}.")?;
    writeln!(out, "It speaks API version {version}, as every KVM since Linux 2.6.22.")?;
    print_capabilities(out, &found.capabilities)?;
    print_limits(out, &found.limits)?;
    writeln!(out, "\n{BOLD}A virtual machine{BOLD:#}")?;
    let took = millis(found.create_vm_micros);
    writeln!(out, "  KVM_CREATE_VM gave file descriptor {vm} after {took}.")?;
    print_checkup(out, found)?;
    print_verdicts(out, &found.checkup.verdicts)?;
    if found.checkup.verdicts.iter().any(|verdict| !verdict.able) {
        writeln!(out, "\nWhat cannot run here runs in the lab: `cargo run` sees to that.")?;
        writeln!(out, "01_create_vm --doctor tells what else can be done.")?;
    }
    Ok(())
}

fn print_capabilities(out: &mut impl Write, capabilities: &[Answer]) -> Result<()> {
    let (name, value, stages) = ("Capabilities", "value", "stages");
    writeln!(out, "\n{BOLD}{name:32}{value:>6}  {stages:10}what for{BOLD:#}")?;
    for Answer { name, value, stages, what } in capabilities {
        let style = if *value > 0 { Style::new() } else { BAD };
        let stages = numbers(stages);
        writeln!(out, "  {name:30}{style}{value:>6}{style:#}  {stages:10}{what}")?;
    }
    Ok(())
}

fn print_limits(out: &mut impl Write, limits: &Limits) -> Result<()> {
    let Limits { vcpus_recommended, vcpus_max, msrs, feature_msrs, .. } = limits;
    writeln!(out, "\n{BOLD}Limits{BOLD:#}")?;
    let mut row = |name, value: &dyn Display| writeln!(out, "  {name:30}{value}");
    row("vCPUs", &format!("{vcpus_recommended} recommended, {vcpus_max} at most"))?;
    row("memslots", &limits.memslots)?;
    row("memory shared with a vCPU", &format!("{} bytes", limits.vcpu_mmap_size))?;
    row("CPUID entries for a guest", &limits.cpuid_entries)?;
    row("MSRs of a guest", &format!("{msrs}, and {feature_msrs} that tell features"))
}

fn print_checkup(out: &mut impl Write, found: &Found) -> Result<()> {
    writeln!(out, "\n{BOLD}Check-up{BOLD:#}: tiny guests, each in a virtual machine of its own")?;
    for outcome in &found.checkup.outcomes {
        let (what, took) = (outcome.probe.what(), millis(outcome.micros));
        let (style, word) = mark(outcome.failure.is_none());
        writeln!(out, "  {style}{word:4}{style:#} {what:40}{took:>10}")?;
        match (&outcome.failure, found.checkup.ring0_speed) {
            (Some(failure), _) => print_wrapped(out, &failure.to_string())?,
            (None, Some(speed)) if outcome.probe == Probe::Ring0Speed => {
                writeln!(out, "{INDENT}{:.0} M instructions/s", speed / 1e6)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Which stages can run here, and what the others lack.
pub fn print_verdicts(out: &mut impl Write, verdicts: &[Verdict]) -> Result<()> {
    writeln!(out, "\n{BOLD}Verdict{BOLD:#}: what this host's KVM can run")?;
    for (verdict, name) in verdicts.iter().zip(STAGES) {
        let (style, word) = mark(verdict.able);
        writeln!(out, "  {style}{word:4}{style:#} {:02}_{name}", verdict.stage)?;
        if !verdict.able {
            print_wrapped(out, &format!("lacks {}", verdict.lacks.join(", ")))?;
        }
    }
    Ok(())
}

fn mark(good: bool) -> (Style, &'static str) {
    if good { (GOOD, "yes") } else { (BAD, "no") }
}

/// `[1, 2, 3, 5]` as `1 to 3, 5`.
fn numbers(stages: &[u8]) -> String {
    let runs = stages.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, _, .., last] => format!("{first} to {last}"),
        run => run.iter().map(u8::to_string).collect::<Vec<_>>().join(", "),
    });
    runs.collect::<Vec<_>>().join(", ")
}

fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1e3)
}

fn print_wrapped(out: &mut impl Write, text: &str) -> Result<()> {
    print_indented(out, INDENT, text)
}

/// Prints `text` behind `begin`, in lines that all begin in the same column.
pub fn print_indented(out: &mut impl Write, begin: &str, text: &str) -> Result<()> {
    let indent = " ".repeat(begin.len());
    let options = textwrap::Options::new(80).initial_indent(begin).subsequent_indent(&indent);
    writeln!(out, "{}", textwrap::fill(text, options))
}
