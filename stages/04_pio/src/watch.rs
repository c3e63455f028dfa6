//! What the first thread does while the vCPUs run: show, wait, report.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cli::{CannotPrint, Ended};
use common::teletype::Teletype;
use common::vcpu;

use crate::programs::Program;
use crate::{Ending, Ran, output};

/// How long a letter may wait to be shown. A guest may print one, and then compute for an hour.
const BLINK: Duration = Duration::from_millis(20);

/// A vCPU's number, what it did, and whether all that it printed could be written.
pub type Report = (usize, Result<Ran, vcpu::Error>, io::Result<()>);

/// Waits until each guest has sent its report, or until the time is over. When this returns, the program
/// ends, and with it the vCPUs' threads, wherever they are: in the guest, or waiting for a key.
pub fn until_all_end(
    programs: &[Program],
    teletypes: &[Arc<Teletype>],
    reports: &Receiver<Report>,
    limit: Option<Duration>,
) -> Result<Ended> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut ended = Ended::Well;
    let mut running = programs.len();
    while running > 0 {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        match reports.recv_timeout(left.unwrap_or(BLINK).min(BLINK)) {
            Ok((id, ran, flushed)) => {
                running -= 1;
                flushed.map_err(CannotPrint)?;
                if !tell(id, programs, &ran?) {
                    ended = Ended::GuestCrashed;
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
                return Ok(Ended::TimedOut);
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
    Ok(ended)
}

/// Says on stderr how a guest ended, and returns whether it ended well.
fn tell(id: usize, programs: &[Program], ran: &Ran) -> bool {
    let Ran { outs, ins, bytes, ending } = ran;
    let name = &programs[id].name;
    let (well, how) = match ending {
        Ending::Halted => (true, "ended by HLT".to_owned()),
        Ending::Exited(0) => (true, "ended with code 0".to_owned()),
        Ending::Exited(code) => (false, format!("says that it failed, with code {code}")),
        Ending::Crashed(why) => (false, format!("crashed: {why}")),
    };
    let style = if programs.len() > 1 { output::colour(id) } else { anstyle::Style::new() };
    cli::eprintln!(
        "{style}vCPU {id}, {name}: {how} (exits: {outs} OUT, {ins} IN; bytes: {bytes}){style:#}"
    );
    well
}
