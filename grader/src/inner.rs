//! The part of the grader that runs where the stages run: the criteria of one stage, one after the other, on a
//! `/dev/kvm`. What came of each goes to stdout, a line of JSON each.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::criteria::{self, Criterion};
use crate::look::{Line, Look, Mark};

/// The first word of its command line.
pub const WORD: &str = "--inner";

/// What is to be graded, and how. It is given as one word of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The stage, 1 to 8.
    pub stage: usize,
    /// The criteria, by name.
    pub criteria: Vec<String>,
    /// Where the submission's programs are.
    pub bins: PathBuf,
    /// Where criteria have their files and where logs are kept.
    pub folder: PathBuf,
    /// What random values follow from.
    pub seed: u64,
    /// Where outputs are kept for a cheat.
    pub recordings: Option<PathBuf>,
}

/// What goes to stdout.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// This criterion begins.
    Begins(String),
    /// It has ended.
    Ended(Met),
}

/// How one criterion went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Met {
    /// Its name.
    pub name: String,
    /// Whether it is met.
    pub met: bool,
    /// How long it took.
    pub seconds: f64,
    /// What it saw.
    pub lines: Vec<Line>,
    /// Where all that was printed and recorded is kept.
    pub log: PathBuf,
}

/// The grader itself cannot go on: nothing that the submission has to do with.
#[derive(Debug)]
pub struct Trouble(pub String);

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Trouble {}

/// How long a criterion may take in all.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the criteria that `order` names.
///
/// # Errors
/// The order makes no sense.
pub fn run(order: &str) -> Result<()> {
    let order: Order = serde_json::from_str(order).context("the order cannot be read")?;
    let known = criteria::of(order.stage);
    for name in &order.criteria {
        let found = known.iter().find(|(known, _)| known == name);
        let (_, criterion) = found.with_context(|| format!("no criterion is called {name}"))?;
        tell(&News::Begins(name.clone()))?;
        tell(&News::Ended(one(&order, name, *criterion)))?;
    }
    // A criterion that hangs still runs: it ends with us.
    std::process::exit(0);
}

fn tell(news: &News) -> Result<()> {
    println!("{}", serde_json::to_string(news)?);
    Ok(())
}

/// Runs one criterion in a thread of its own. Whatever it does, something comes of it.
fn one(order: &Order, name: &str, criterion: Criterion) -> Met {
    let began = Instant::now();
    let (send, receive) = channel();
    let (of_thread, name_of_thread) = (order.clone(), name.to_owned());
    thread::spawn(move || {
        let look = catch_unwind(AssertUnwindSafe(|| look(&of_thread, &name_of_thread, criterion)));
        let _ = send.send(look.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            (vec![bad(format!("the criterion panicked: {text}"))], String::new())
        }));
    });
    let (lines, log) = receive.recv_timeout(LIMIT).unwrap_or_else(|_| {
        let text = format!("the criterion has not ended within {} s", LIMIT.as_secs());
        (vec![bad(text)], String::new())
    });
    let path = order.folder.join(format!("{name}.log"));
    let written = fs::write(&path, &log).with_context(|| format!("log {}", path.display()));
    let mut met = Met {
        name: name.to_owned(),
        met: lines.iter().all(|line| line.mark == Mark::Good),
        seconds: began.elapsed().as_secs_f64(),
        lines,
        log: path,
    };
    if let Err(error) = written {
        met.met = false;
        met.lines.push(bad(format!("{error:#}")));
    }
    met
}

fn bad(text: String) -> Line {
    Line { mark: Mark::Bad, text, near: Vec::new() }
}

fn look(order: &Order, name: &str, criterion: Criterion) -> (Vec<Line>, String) {
    let look = || -> Result<(Vec<Line>, String)> {
        let launcher = std::env::current_exe().context("cannot find this program itself")?;
        let mut look = Look::new(order, name, &launcher)?;
        match criterion(&mut look) {
            Ok(()) => {}
            Err(error) if error.is::<Trouble>() => {
                eprintln!("{error:#}");
                std::process::exit(1);
            }
            Err(error) => look.missing(&format!("{error:#}"), &[]),
        }
        look.done()
    };
    look().unwrap_or_else(|error| (vec![bad(format!("{error:#}"))], String::new()))
}
