//! `--trace` of stages 06 to 08: what the guest asks of its machine, a line for each exit on stderr.

use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use clap::Args;
use common::trace::{Filter, Lines, Marks, Trace};

/// What `--help` says of the trace.
pub(crate) const HELP: &str = "\
Trace: --trace shows each exit, with the instruction that made it, the device's
answer and how long that took; repeated ones are counted. --trace=WORD,...
chooses: io, mmio, nobody (no device answers), a device by a part of its name,
step or step:N (the first N instructions, one by one), every (count nothing).";

/// The command line's part of the trace.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Debugging")]
#[group(skip)]
pub struct Flags {
    /// Print a line for each exit on stderr, or for those that WORDS name: see below
    #[arg(long, value_name = "WORDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "all")]
    trace: Option<Filter>,
}

impl Flags {
    /// Whether there is to be one.
    pub fn is_wanted(&self) -> bool {
        self.trace.is_some()
    }

    /// The trace that was asked for.
    pub fn start(&self) -> Option<Trace> {
        let filter = self.trace.clone()?;
        let lines = Lines::new(Stderr, marks(), filter.every());
        Some(Trace::new(filter, lines))
    }
}

/// Colours. Where they are not wanted, [`crate::eprint`] leaves them out.
fn marks() -> Marks {
    let around = |style: Style| [style.render().to_string(), style.render_reset().to_string()];
    Marks {
        when: around(Style::new().dimmed()),
        instruction: around(Style::new().bold()),
        what: around(AnsiColor::Cyan.on_default()),
    }
}

/// Our stderr, with the line ends of a terminal, which may be in raw mode.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        if io::stderr().is_terminal() {
            text = text.replace('\n', "\r\n");
        }
        crate::try_eprint(format_args!("{text}"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
