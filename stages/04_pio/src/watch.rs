//! What the first thread does while the vCPUs run: show, wait, report.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cli::{CannotPrint, Ended};
use common::autopsy::Cause;
use common::teletype::Teletype;
use common::vcpu::{self, Vcpu};

use crate::output;
use crate::programs::Program;

/// How long a letter may wait to be shown. A guest may print one, and then compute for an hour.
const BLINK: Duration = Duration::from_millis(20);

/// A vCPU that has left, what it did, and whether all that it printed could be written.
pub type Report = (Vcpu, Result<Ran, vcpu::Error>, io::Result<()>);

/// The vCPUs of guests that died, each with how it did.
pub type Dead = Vec<(Vcpu, Cause)>;

/// What a guest did.
pub struct Ran {
    /// Exits for OUT, and for IN.
    pub outs: u64,
    pub ins: u64,
    /// How much data they had.
    pub bytes: usize,
    pub ending: Ending,
}

/// How a guest ended.
pub enum Ending {
    /// By HLT: no interrupt can wake it.
    Halted,
    /// By a port, with a code of its own: 0 says that it ended well.
    Exited(u32),
    /// By what no guest should do: in words, and for the autopsy.
    Crashed(String, Option<Cause>),
}

/// Waits until each guest has sent its report, or until the time is over. When this returns, the program
/// ends, and with it the vCPUs' threads, wherever they are: in the guest, or waiting for a key.
pub fn until_all_end(
    programs: &[Program],
    teletypes: &[Arc<Teletype>],
    reports: &Receiver<Report>,
    limit: Option<Duration>,
) -> Result<(Ended, Dead)> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let (mut ended, mut dead) = (Ended::Well, Dead::new());
    let mut running = programs.len();
    while running > 0 {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        match reports.recv_timeout(left.unwrap_or(BLINK).min(BLINK)) {
            Ok((vcpu, ran, flushed)) => {
                running -= 1;
                flushed.map_err(CannotPrint)?;
                let ran = ran?;
                if !tell(vcpu.id().into(), programs, &ran) {
                    ended = Ended::GuestCrashed;
                }
                if let Ending::Crashed(_, Some(cause)) = ran.ending {
                    dead.push((vcpu, cause));
                }
            }
            Err(RecvTimeoutError::Timeout) if left == Some(Duration::ZERO) => {
                teletypes.iter().try_for_each(|tty| tty.try_flush()).map_err(CannotPrint)?;
                let which = if programs.len() == 1 {
                    format!("{} was stopped", programs[0].name)
                } else {
                    format!("{running} of {} programs were stopped", programs.len())
                };
                cli::eprintln!("the time given with --timeout ran out: {which}");
                return Ok((Ended::TimedOut, dead));
            }
            Err(RecvTimeoutError::Timeout) => {
                // Among several guests a line is shown when it is whole.
                if let [tty] = teletypes {
                    tty.try_flush().map_err(CannotPrint)?;
                }
            }
            Err(RecvTimeoutError::Disconnected) => bail!("a vCPU's thread has died"),
        }
    }
    Ok((ended, dead))
}

/// Says on stderr how a guest ended, and returns whether it ended well.
fn tell(id: usize, programs: &[Program], ran: &Ran) -> bool {
    let Ran { outs, ins, bytes, ending } = ran;
    let name = &programs[id].name;
    let (well, how) = match ending {
        Ending::Halted => (true, "ended by HLT".to_owned()),
        Ending::Exited(0) => (true, "ended with code 0".to_owned()),
        Ending::Exited(code) => (false, format!("says that it failed, with code {code}")),
        Ending::Crashed(what, _) => (false, format!("crashed: {what}")),
    };
    let style = if programs.len() > 1 { output::colour(id) } else { anstyle::Style::new() };
    cli::eprintln!(
        "{style}vCPU {id}, {name}: {how} (exits: {outs} OUT, {ins} IN; bytes: {bytes}){style:#}"
    );
    well
}
