//! `--completions SHELL` and `--man`: what a shell and `man` know of a program, made from its command line.

use anyhow::Result;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

const HEADING: &str = "Help";

/// The command line's part of it.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = HEADING)]
#[group(skip)]
pub struct Flags {
    /// Print what a shell needs to complete these options: source <(08_boot_linux --completions bash)
    #[arg(long, value_name = "SHELL", exclusive = true)]
    completions: Option<Shell>,

    /// Print a manual page: 08_boot_linux --man | man -l -
    #[arg(long, exclusive = true)]
    man: bool,
}

/// Puts clap's own two beside them; they would stand in front of everything.
pub(crate) fn with_help(command: Command) -> Command {
    let option = |name: &'static str, short, action, help: &'static str| {
        Arg::new(name).long(name).short(short).action(action).help(help).help_heading(HEADING)
    };
    command
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(option("help", 'h', ArgAction::Help, "Print this; -h the short form of it"))
        .arg(option("version", 'V', ArgAction::Version, "Print the version"))
}

/// Whether it prints something and ends, as clap's own two do.
pub(crate) fn is_help(arg: &Arg) -> bool {
    use ArgAction::{Help, HelpLong, HelpShort, Version};
    matches!(arg.get_action(), Help | HelpLong | HelpShort | Version)
}

/// What `matches` asks for, if it asks for help of these kinds.
pub(crate) fn print(command: &Command, matches: &ArgMatches) -> Option<Result<String>> {
    // Other programs have no such options.
    matches.try_contains_id("completions").ok()?;
    let flags = Flags::from_arg_matches(matches).ok()?;
    let program = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let mut text = Vec::new();
    if let Some(shell) = flags.completions {
        clap_complete::generate(shell, &mut command.clone(), program, &mut text);
        return Some(String::from_utf8(text).map_err(Into::into));
    }
    flags.man.then(|| {
        let man = Man::new(command.clone().name(program));
        man.render_title(&mut text)?;
        man.render_name_section(&mut text)?;
        man.render_synopsis_section(&mut text)?;
        man.render_description_section(&mut text)?;
        man.render_options_section(&mut text)?;
        // As it is: examples stand in columns.
        let mut notes = Roff::default();
        notes.control("SH", ["NOTES"]).control("nf", []);
        let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        after.lines().for_each(|line| _ = notes.text([roman(line)]));
        notes.control("fi", []).to_writer(&mut text)?;
        Ok(String::from_utf8(text)?)
    })
}
