//! `--trace`, `--trace-file`, `--stats` and `--stats-plot` of stages 03 to 08: what the guest asks of its machine, as
//! lines on stderr, as a file for a viewer, counted, and as a picture of that.

mod plot;
mod table;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anstyle::{AnsiColor, Style};
use anyhow::{Context, Result};
use clap::Args;
use common::memory::Vm;
use common::trace::{self, Devices, File, Filter, Lines, Marks, Trace};
use common::vcpu::Vcpu;

/// What `--help` says of the trace.
pub(crate) const HELP: &str = "\
Trace: --trace shows each exit, with the instruction that made it, the device's
answer and how long the monitor took; repeated ones are counted, and what is
more than 1000 lines a second. --trace=WORD,... chooses: io, mmio, irq (the
interrupt lines that devices raise), nobody (no device answers), a device by a
part of its name, step or step:N (the first N instructions, one by one), rate:N
(lines a second), every (count nothing). https://ui.perfetto.dev opens what
--trace-file writes.";

/// The command line's part of the trace.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Debugging")]
#[group(skip)]
pub struct Flags {
    /// Print a line for each exit on stderr, or for those that WORDS name: see below
    #[arg(long, value_name = "WORDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "all")]
    trace: Option<Filter>,

    /// Write to FILE when each vCPU runs the guest and when an exit is dealt with, and what devices do: JSON in
    /// Chrome's trace event format
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,

    /// The most that --trace-file writes
    #[arg(long, value_name = "SIZE", requires = "trace_file", default_value = "256M",
          hide_default_value = false, allow_hyphen_values = true, value_parser = crate::size::parse)]
    trace_max: u64,

    /// At the end, print how often the guest exited, for what, and how long the monitor took for it
    #[arg(long)]
    pub stats: bool,

    /// And draw it: an SVG picture in FILE
    #[arg(long, value_name = "FILE")]
    stats_plot: Option<PathBuf>,
}

impl Flags {
    /// Whether lines are to be printed while the guest runs.
    pub fn is_wanted(&self) -> bool {
        self.trace.is_some()
    }

    /// Whether it goes step by step.
    pub fn steps(&self) -> bool {
        self.trace.as_ref().is_some_and(Filter::steps)
    }

    /// Whether files are to be written, which several machines would write over.
    pub fn writes_files(&self) -> bool {
        self.trace_file.is_some() || self.stats_plot.is_some()
    }

    /// The same, but with `words` for a trace if nothing is said of one.
    pub fn or_trace(mut self, words: &str) -> Result<Self> {
        if self.trace.is_none() {
            self.trace = Some(words.parse()?);
        }
        Ok(self)
    }

    /// Begins to watch a machine that has neither devices nor vCPUs yet. If nothing was asked for, nothing is done.
    pub fn start(&self, vm: &Vm) -> Result<Watch> {
        let plot = self.stats_plot.as_ref().map(|path| {
            // Whoever waits for the end of a guest wants to know before that it cannot be written.
            let file = fs::File::create(path);
            let file = file.with_context(|| format!("cannot draw to {}", path.display()))?;
            anyhow::Ok((path.clone(), file))
        });
        let (stats, plot, began) = (self.stats, plot.transpose()?, Instant::now());
        if self.trace.is_none() && self.trace_file.is_none() && !stats && plot.is_none() {
            return Ok(Watch { trace: None, stats, plot, began });
        }
        let mut trace = Trace::default();
        if let Some(filter) = &self.trace {
            trace = trace.with_lines(filter.clone(), Lines::new(Stderr, marks(), filter));
        }
        if let Some(path) = &self.trace_file {
            let told = |word| _ = Stderr.write_all(format!("{word}\n").as_bytes());
            trace = trace.with_file(File::create(path, self.trace_max, told)?);
        }
        if stats || plot.is_some() {
            trace = trace.with_stats();
        }
        let trace = Arc::new(trace);
        trace.attach(vm);
        Ok(Watch { trace: Some(trace), stats, plot, began })
    }
}

/// A machine that is watched, or isn't.
#[derive(Debug)]
pub struct Watch {
    trace: Option<Arc<Trace>>,
    stats: bool,
    plot: Option<(PathBuf, fs::File)>,
    began: Instant,
}

impl Watch {
    /// Follows a vCPU that is about to take its first instruction.
    pub fn follow(&self, vcpu: &mut Vcpu, devices: &Devices) -> Result<(), trace::Error> {
        self.trace.as_ref().map_or(Ok(()), |trace| trace.follow(vcpu, devices))
    }

    /// Writes, prints and draws what is to be seen at the end. What a vCPU did last is in it if its watch has ended.
    pub fn finish(mut self) -> Result<()> {
        let (ran, plot) = (self.began.elapsed(), self.plot.take());
        let Some(trace) = &self.trace else { return Ok(()) };
        trace.finish();
        let Some(stats) = trace.stats() else { return Ok(()) };
        if self.stats {
            crate::eprint(format_args!("{}", table::table(&stats, ran)));
        }
        if let Some((path, mut file)) = plot {
            let drawn = file.write_all(plot::svg(&stats, ran)?.as_bytes());
            drawn.with_context(|| format!("cannot draw to {}", path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Also where an error ends the program.
        if let Some(trace) = &self.trace {
            trace.finish();
        }
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
