//! What a maintainer of mini-kvm types: `cargo xtask setup | demo | test | bench | lab`.

mod bench;
mod demo;
mod initramfs;
mod packages;
mod progress;
mod setup;
mod test;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use setup::Done;

/// What a maintainer of mini-kvm types
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring what the project needs and this machine lacks: packages, kernels, the lab
    Setup(setup::Args),
    /// Set up, build, and boot Linux with stage 08 to a shell; without a terminal, play a short script
    Demo,
    /// Set up and run every check: format, clippy, docs, unit tests, and the milestones on /dev/kvm
    Test(test::Args),
    /// Measure what exits, starts, a boot and the lab cost, and print a table or JSON
    Bench(bench::Args),
    /// Open a shell in the lab, or run one command in it
    Lab {
        /// The command and its arguments; without one, a shell
        #[arg(last = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup(args) => setup::run(&args).map(|done| match done {
            Done::InPlace => {
                println!("Everything is in place.");
                ExitCode::SUCCESS
            }
            Done::Complete => ExitCode::SUCCESS,
            Done::Incomplete => ExitCode::FAILURE,
        }),
        Task::Demo => demo::run(),
        Task::Test(args) => test::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Lab { command } => lab::shell(&command),
    };
    done.unwrap_or_else(|error| {
        cli::print_error(&error);
        ExitCode::FAILURE
    })
}
