//! `cargo xtask grade`. The same binary is what runs where the stages run, what a watched program begins as, and the
//! cheat that the grader is tested with.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use grader::witness::launch;
use grader::{cheat, grade, inner};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let (name, args) =
        words.split_first().map_or((None, &[][..]), |(name, rest)| (Some(name), rest));
    if let Some(ended) = name.and_then(|name| cheat::main(name, args)) {
        return ended;
    }
    let ended = match args.first().and_then(|word| word.to_str()) {
        Some(launch::WORD) => launch::launch(&args[1..], true).map(|()| ExitCode::SUCCESS),
        Some(launch::WITHOUT_EXITS) => {
            launch::launch(&args[1..], false).map(|()| ExitCode::SUCCESS)
        }
        Some(inner::WORD) => {
            let order = args.get(1).and_then(|order| order.to_str()).unwrap_or_default();
            inner::run(order).map(|()| ExitCode::SUCCESS)
        }
        _ => grade::run(&grade::Args::parse()),
    };
    ended.unwrap_or_else(|error| {
        cli::print_error(&error);
        ExitCode::FAILURE
    })
}
