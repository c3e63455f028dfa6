//! `--watchdog` of stages 03 to 08, and the report on a guest that died.

use std::time::Duration;

use clap::Args;
use common::autopsy::{Autopsy, Cause, Watchdog};
#[cfg(feature = "stage06")]
use common::run::{Crash, Ending};
use common::vcpu::Vcpu;

/// The command line's part of the autopsy.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Debugging")]
#[group(skip)]
pub struct Flags {
    /// End with exit code 1, and say why, if the guest hangs for SECS seconds: halted with interrupts off, in a loop
    /// that changes nothing, or asking a device the same again and again
    #[arg(long, value_name = "SECS", allow_hyphen_values = true, value_parser = crate::seconds)]
    watchdog: Option<Duration>,
}

impl Flags {
    /// The watchdog that was asked for.
    pub fn watchdog(&self) -> Option<Watchdog> {
        self.watchdog.map(Watchdog::new)
    }
}

/// Says on stderr why a guest died whose `vcpu` ended by `cause`. `again` makes its machine once more, as it was before
/// the first instruction, if that can be done. `finding` is what is known to be wrong with what the guest was given.
pub fn report(
    vcpu: &Vcpu,
    cause: Cause,
    finding: Option<String>,
    again: Option<&mut dyn FnMut() -> anyhow::Result<Vcpu>>,
) -> anyhow::Result<()> {
    let autopsy = match again {
        None => Autopsy::of(vcpu, cause, None)?,
        Some(again) => Autopsy::of(vcpu, cause, Some(&mut || Ok(again()?)))?,
    };
    crate::eprint(format_args!("{}", autopsy.with_finding(finding)));
    Ok(())
}

/// The same for a machine that has ended, if it crashed. One with several vCPUs is not run again.
#[cfg(feature = "stage06")]
pub fn tell(
    ending: &Ending,
    vcpus: &[Vcpu],
    finding: Option<String>,
    again: Option<impl FnMut() -> anyhow::Result<Vcpu>>,
) -> anyhow::Result<()> {
    let Ending::Crashed(Crash { vcpu: id, cause, .. }) = ending else { return Ok(()) };
    let Some(vcpu) = vcpus.iter().find(|vcpu| vcpu.id() == *id) else { return Ok(()) };
    let mut again = again.filter(|_| vcpus.len() == 1);
    let again = again.as_mut().map(|again| again as &mut dyn FnMut() -> anyhow::Result<Vcpu>);
    report(vcpu, cause.clone(), finding, again)
}
