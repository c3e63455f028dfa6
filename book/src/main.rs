//! `cargo xtask book`: the research notes of `notes/` as a book, and what keeps them true; `cargo xtask reports`: its
//! reports on paper ([`mod@reports`]).
//!
//! A note shows the project's own code and its programs' own output. So that neither can drift, excerpts are taken
//! from the sources when the book is built ([`excerpts`]), and what a command printed is made anew by the command
//! that stands above it ([`experiments`]). Links of all Markdown files are followed ([`links`]), and what is there in two
//! languages is compared ([`translations`]).

mod excerpts;
mod experiments;
mod html;
mod links;
mod reports;
mod search;
mod translations;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Parser;

/// What `cargo xtask` hands over.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Task {
    /// Builds the research notes as a book in target/book, after checking its excerpts and links
    Book(BookArgs),
    /// Writes the reports of notes/reports as PDF files to target/reports
    Reports(ReportsArgs),
}

#[derive(clap::Args)]
#[command(after_help = "\
Try: cargo xtask book --open        read it in a browser
     cargo xtask book --refresh     run the commands in notes and READMEs, paste what they print
     cargo xtask book --check       the same commands must print what is shown

A block of a note or README that is run looks so; its first line is the command,
for a POSIX shell, and `varies` names by a regular expression what differs from run
to run:

     <!-- varies: [0-9A-F]{8} -->
     ```console
     $ cargo run --bin 02_memory | tail -3
     ...
     ```

All run in the lab, so that they print the same everywhere. A block that cannot be
run is named `sh-session`: someone types into it, or it takes a network, root,
other files, a certain host, or many minutes.")]
struct BookArgs {
    /// Show the book in a browser (xdg-open)
    #[arg(long)]
    open: bool,

    /// Run the commands in notes and READMEs, and paste what they print where it has changed
    #[arg(long, conflicts_with = "check")]
    refresh: bool,

    /// Run the commands in notes and READMEs, and fail if one shows something else
    #[arg(long)]
    check: bool,
}

#[derive(clap::Args)]
#[command(after_help = "\
Try: cargo xtask setup --reports    brings what sets the pages: WeasyPrint, a Korean font
     cargo xtask reports            all of them
     cargo xtask reports 10         those with 10 in their names")]
struct ReportsArgs {
    /// Only the reports whose names contain one of these words
    names: Vec<String>,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Book(args) => book(&args),
        Task::Reports(args) => reports(&args),
    };
    done.map_or_else(
        |error| {
            cli::print_error(&error);
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn book(args: &BookArgs) -> Result<()> {
    let mut faults = links::check(root())?;
    faults.extend(excerpts::check(root())?);
    faults.extend(experiments::check(root())?);
    faults.extend(translations::check(root())?);
    if args.refresh || args.check {
        faults.extend(experiments::run(root(), &target(), args.refresh)?);
    }
    ensure!(faults.is_empty(), "the notes are not in order:\n  {}", faults.join("\n  "));
    let index = html::build(root(), &target().join("book"))?;
    println!("{}", index.display());
    if args.open {
        let opened = Command::new("xdg-open").arg(&index).status();
        let opened = opened.context("cannot start xdg-open: open the file above by hand")?;
        ensure!(opened.success(), "xdg-open failed: open the file above by hand");
    }
    Ok(())
}

fn reports(args: &ReportsArgs) -> Result<()> {
    for file in reports::export(root(), &target().join("reports"), &args.names)? {
        println!("{}", file.display());
    }
    Ok(())
}

/// The repository's folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("book is a folder of the workspace")
}

/// Cargo's target folder: the one that this very program was built in.
fn target() -> PathBuf {
    let built = std::env::current_exe().ok();
    let target = built.as_deref().and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
    target.unwrap_or_else(|| root().join("target"))
}
