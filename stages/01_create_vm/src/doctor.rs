//! `--doctor`: what this host can do stage by stage, what it lacks, and what to do about it.

use std::io::{Result, Write};

use cli::Ended;
use common::checkup::{self, Verdict};
use common::host::Host;
use common::kvm;

use crate::report::{self, BOLD};

/// Looks at the host, asks its KVM if there is one, and prints what was found.
pub fn run(out: &mut impl Write) -> Result<Ended> {
    let host = Host::look();
    let found = kvm::open().map(|kvm| checkup::run(&kvm, &asm::checkup()).verdicts);
    writeln!(out, "{BOLD}This host{BOLD:#}")?;
    write!(out, "{host}")?;
    let (node, ended) = match &found {
        Ok(_) => ("may be opened".to_owned(), Ended::Well),
        Err(error) => (first_words(error), Ended::HostCannot),
    };
    writeln!(out, "  {}        {node}", kvm::DEVICE)?;
    let none = |stage| Verdict { stage, able: false, lacks: vec!["KVM"], reason: String::new() };
    match &found {
        Ok(verdicts) => report::print_verdicts(out, verdicts)?,
        Err(_) => report::print_verdicts(out, &(1..=8).map(none).collect::<Vec<_>>())?,
    }
    let advice = host.advice(&found);
    if advice.is_empty() {
        writeln!(out, "\nNothing is missing: all stages run here.")?;
        return Ok(ended);
    }
    writeln!(out, "\n{BOLD}What to do{BOLD:#}")?;
    for (number, advice) in (1..).zip(advice) {
        report::print_indented(out, &format!("  {number}. "), &advice)?;
    }
    Ok(ended)
}

/// What is wrong, without what to do.
fn first_words(error: &kvm::Error) -> String {
    let text = error.to_string();
    let end = text.find([':', ';']).unwrap_or(text.len());
    text[..end].to_owned()
}
