//! Progress on stderr: one line a step, moving on a terminal, plain elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// How often a moving line is drawn again.
const TICK: Duration = Duration::from_millis(100);

/// A step that is under way.
pub struct Step {
    name: String,
    bar: Option<ProgressBar>,
}

impl Step {
    /// Says what goes on inside the step now.
    pub fn note(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}: {what}", self.name)),
            None => eprintln!("      {what}"),
        }
    }
}

/// Does `work` under the name `name`, shown from its start to its end with the time that it took.
pub fn step<T>(name: &str, work: impl FnOnce(&mut Step) -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let bar = stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("   {spinner} {msg} ({elapsed})")
            .expect("the template is well-formed");
        let bar = ProgressBar::new_spinner().with_style(style).with_message(name.to_owned());
        bar.enable_steady_tick(TICK);
        bar
    });
    if bar.is_none() {
        eprintln!("    … {name}");
    }
    let mut step = Step { name: name.to_owned(), bar };
    let result = work(&mut step);
    if let Some(bar) = step.bar {
        bar.finish_and_clear();
    }
    let mark = if result.is_ok() { "ok" } else { "FAIL" };
    eprintln!("{mark:>5} {name} ({:.1} s)", began.elapsed().as_secs_f64());
    result
}
