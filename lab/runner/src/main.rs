//! `mini-kvm-runner PROGRAM ARGUMENT...`: runs a stage, or a stage's milestone test, on this host's
//! KVM where that can do the stage's job, and in the lab where it can't.
//!
//! Cargo calls it through `lab/run`. `MINI_KVM=host` and `MINI_KVM=lab` choose by hand;
//! `MINI_KVM_LAB_MIN_TIMER_PERIOD_US` makes guests' timers slower in the lab.

mod verdict;

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow};
use cli::Ended;
use lab::parts::Progress;
use lab::session::{self, Program};
use lab::state::State;

fn main() -> ExitCode {
    let argv: Vec<_> = std::env::args_os().skip(1).collect();
    let Some(program) = argv.first() else {
        return fail(&anyhow!("usage: mini-kvm-runner PROGRAM ARGUMENT..."), Ended::BadInput);
    };
    let chosen = std::env::var_os("MINI_KVM");
    let inside = std::env::var_os(lab::INSIDE).is_some();
    // The doctor's patient is this host.
    let doctor = argv[1..].iter().any(|word| word == "--doctor");
    let reason = match place(chosen.as_deref(), inside, Path::new(program)) {
        Ok(Place::ByVerdict(1)) if doctor => None,
        Err(error) => return fail(&error, Ended::BadInput),
        Ok(Place::Host) => None,
        Ok(Place::Lab) => Some("MINI_KVM=lab".to_owned()),
        Ok(Place::ByVerdict(stage)) => verdict::reason_against(stage),
    };
    let end = match reason {
        None => here(&argv),
        Some(reason) => match Program::new(argv) {
            Err(error) => return fail(&error, Ended::BadInput),
            Ok(program) => in_lab(&program, &reason),
        },
    };
    end.unwrap_or_else(|error| fail(&error, Ended::HostCannot))
}

fn fail(error: &anyhow::Error, ended: Ended) -> ExitCode {
    cli::print_error(error);
    ExitCode::from(ended as u8)
}

/// Where a program is to run.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Host,
    Lab,
    /// Where the check-up says that this stage can run.
    ByVerdict(u8),
}

fn place(chosen: Option<&OsStr>, inside: bool, program: &Path) -> Result<Place> {
    match chosen.map(OsStr::as_encoded_bytes) {
        None | Some(b"" | b"host" | b"lab") if inside => Ok(Place::Host),
        Some(b"host") => Ok(Place::Host),
        Some(b"lab") => Ok(Place::Lab),
        // What isn't a stage has no verdict; it runs as if there were no runner.
        None | Some(b"") => Ok(stage(program).map_or(Place::Host, Place::ByVerdict)),
        Some(_) => Err(anyhow!(
            "MINI_KVM is {:?}: set it to host or lab, or unset it to let the check-up choose",
            chosen.unwrap_or_default()
        )),
    }
}

/// The stage that a program belongs to: 5 for `05_mmio` and for `stage_05-0123456789abcdef`.
fn stage(program: &Path) -> Option<u8> {
    let name = program.file_name()?.to_str()?;
    let digits = match name.strip_prefix("stage_") {
        Some(test) => test.split_once('-')?.0,
        None => name.split_once('_')?.0,
    };
    let is_number = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_digit());
    digits.parse().ok().filter(|stage| is_number && (1..=8).contains(stage))
}

/// Becomes the program. Returns only if that fails.
fn here(argv: &[OsString]) -> Result<ExitCode> {
    let error = Command::new(&argv[0]).args(&argv[1..]).exec();
    Err(error).with_context(|| format!("cannot run {}", argv[0].display()))
}

fn in_lab(program: &Program, reason: &str) -> Result<ExitCode> {
    let progress: Progress<'_> = &mut |what| cli::eprintln!("mini-kvm: {what}");
    let state = State::ready(progress).with_context(|| reason.to_owned())?;
    cli::eprintln!("mini-kvm: {reason}: running in the lab");
    let end = session::run(state, program, progress)?;
    Ok(ExitCode::from(end.code()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stages_are_told_by_their_file_names() {
        let of = |name: &str| stage(&Path::new("/t/debug").join(name));
        assert_eq!(of("01_create_vm"), Some(1));
        assert_eq!(of("08_boot_linux"), Some(8));
        assert_eq!(of("stage_05-0123456789abcdef"), Some(5));
        for other in
            ["xtask", "09_more", "00_none", "1_x", "001_x", "+1_x", "stage_05", "stage_x-0"]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_place_follows_the_variable_and_inside_the_lab_there_is_no_other() {
        let place = |chosen: Option<&str>, inside| {
            place(chosen.map(OsStr::new), inside, Path::new("x/05_mmio")).ok()
        };
        assert_eq!(place(None, false), Some(Place::ByVerdict(5)));
        assert_eq!(place(Some(""), false), Some(Place::ByVerdict(5)));
        assert_eq!(place(Some("host"), false), Some(Place::Host));
        assert_eq!(place(Some("lab"), false), Some(Place::Lab));
        for chosen in [None, Some("host"), Some("lab")] {
            assert_eq!(place(chosen, true), Some(Place::Host));
        }
        assert_eq!(place(Some("Lab"), false), None);
        assert_eq!(place(Some("both"), true), None);
    }

    proptest! {
        #[test]
        fn no_name_is_too_odd_to_be_looked_at(name in any::<String>()) {
            let found = stage(Path::new(&name));
            prop_assert!(found.is_none_or(|stage| (1..=8).contains(&stage)));
        }
    }
}
