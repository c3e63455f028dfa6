//! `cargo xtask record`: recordings of the stages, made by a script ([`script`], [`mod@play`]), and the pictures and films of them
//! ([`film`], [`svg`], [`raster`], [`files`]).

mod files;
mod film;
mod play;
mod raster;
mod script;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cli::cast::Cast;
use common::file;

use script::Script;

/// Plays scripted sessions of the stages in a terminal, and makes recordings and films of them
///
/// A script of record/scripts says what a person types, what is waited for, and the captions in Korean and English. Made
/// of it are, in notes/recordings: a recording (.cast, asciicast v2), a picture that moves (.svg), one that doesn't
/// (.still.svg), a film (.mp4), and the captions alone (.ko.vtt, .en.vtt).
///
/// The times in a film are those of a person who types, not those of the machine: waiting is cut to a third of a second, and
/// each printed line takes as long as the others. What is printed is what the programs print.
#[derive(Parser)]
#[command(name = "cargo xtask record", bin_name = "cargo xtask record", max_term_width = 100)]
#[command(after_help = "\
Try: cargo xtask record                     the film of stage 08
     cargo xtask record 03 05               those of the stages 03 and 05
     cargo xtask record mine.toml --to .    a script of yours
     cargo xtask record session.cast        pictures and a film of what
                                            08_boot_linux --record session.cast wrote
     cargo xtask record 08 --again --png 60 look at a moment of what was recorded
     cargo xtask record --check             recordings and scripts fit together

Films take ffmpeg and two fonts: `cargo xtask setup --record` brings them.
record/README.md says what a script looks like.")]
struct Args {
    /// What to play: parts of the names of scripts in record/scripts, `all` of them, files that end in .toml; or files that
    /// end in .cast, of which pictures and films are made
    #[arg(value_name = "SCRIPT", default_value = "08_boot_linux")]
    what: Vec<String>,

    /// Where the files are put. Without it: notes/recordings, and for a .cast beside it
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,

    /// Play nothing: make pictures and films of the recordings that are there once more
    #[arg(long)]
    again: bool,

    /// Make no film
    #[arg(long)]
    no_mp4: bool,

    /// Make nothing but a PNG of the moment SECS, in target/record
    #[arg(long, value_name = "SECS", value_parser = moment)]
    png: Option<Duration>,

    /// Let nothing last longer than SECS in a .cast without a change
    #[arg(long, value_name = "SECS", default_value = "2", value_parser = moment)]
    idle: Duration,

    /// Check the scripts, and that all that is in notes/recordings was made from them
    #[arg(long, exclusive = true)]
    check: bool,

    /// Print the names of the scripts
    #[arg(long, exclusive = true)]
    list: bool,
}

fn moment(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "expected a number of seconds".to_owned())
}

fn main() -> ExitCode {
    run(&Args::parse()).map_or_else(
        |error| {
            cli::print_error(&error);
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn run(args: &Args) -> Result<()> {
    if args.check {
        let faults = faults()?;
        ensure!(
            faults.is_empty(),
            "the recordings are not in order:\n  {}\n`cargo xtask record NAME` makes one anew",
            faults.join("\n  ")
        );
        return Ok(());
    }
    if args.list {
        for path in scripts()? {
            cli::println!("{}", files::stem(&path)?);
        }
        return Ok(());
    }
    for what in &args.what {
        if what.ends_with(".cast") {
            let cast = Path::new(what);
            let to = args.to.as_deref().or(cast.parent()).unwrap_or(Path::new("."));
            render(cast, to, Some(args.idle), args)?;
            continue;
        }
        for path in named(what)? {
            let to = args.to.clone().unwrap_or_else(recordings);
            let cast = to.join(format!("{}.cast", files::stem(&path)?));
            if !args.again && args.png.is_none() {
                play(&path, &cast)?;
            }
            render(&cast, &to, None, args)?;
        }
    }
    Ok(())
}

/// Plays a script, and writes the recording.
fn play(path: &Path, cast: &Path) -> Result<()> {
    let script = Script::read(path)?;
    let stem = files::stem(path)?;
    build(&script.build)?;
    let steps = script.steps.len();
    cli::eprintln!("{stem}: {steps} steps");
    let session = sessions().join(&stem);
    let recorded = play::play(&script, &session, |number, what| {
        cli::eprintln!("    {number:3}/{steps} {what}");
    });
    let recorded = recorded.with_context(|| format!("script {}", path.display()))?;
    if let Some(folder) = cast.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    files::write(cast, &recorded.written().with_context(|| cast.display().to_string())?)
}

/// Builds what a session starts, so that nobody has to watch that.
fn build(programs: &[String]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--bin", "mini-kvm-runner"]).current_dir(root());
    programs.iter().for_each(|program| _ = cargo.args(["--bin", program]));
    let status = cargo.status().context("cannot start cargo")?;
    ensure!(status.success(), "the programs do not build");
    Ok(())
}

/// Makes the pictures and the film of a recording.
fn render(cast: &Path, to: &Path, idle: Option<Duration>, args: &Args) -> Result<()> {
    let (film, made_from) = files::read(cast, idle)?;
    let stem = files::stem(cast)?;
    if let Some(at) = args.png {
        let path = sessions().join(format!("{stem}.{}.png", at.as_secs_f64()));
        files::png(&film, at, &path)?;
        cli::println!("{}", path.display());
        return Ok(());
    }
    let told = |path: &Path| {
        let size = fs::metadata(path).map_or(0, |file| file.len());
        cli::println!("{} ({} KiB)", path.display(), size.div_ceil(1024));
    };
    told(cast);
    for (name, text) in files::texts(&film, &stem) {
        let path = to.join(name);
        files::write(&path, text.as_bytes())?;
        told(&path);
    }
    if !args.no_mp4 {
        let path = to.join(format!("{stem}.mp4"));
        let mut shown = 0;
        files::mp4(&film, &made_from, &path, |percent| {
            if percent >= shown + 20 {
                shown = percent;
                cli::eprintln!("    {percent:3} % of the film");
            }
        })?;
        told(&path);
    }
    Ok(())
}

/// The scripts that a word of the command line means.
fn named(what: &str) -> Result<Vec<PathBuf>> {
    if what.ends_with(".toml") {
        return Ok(vec![what.into()]);
    }
    let mut found = scripts()?;
    found.retain(|path| what == "all" || files::stem(path).is_ok_and(|stem| stem.contains(what)));
    if found.is_empty() {
        bail!("no script's name contains `{what}`: `cargo xtask record --list` prints them");
    }
    Ok(found)
}

/// What is wrong with the scripts and with what is kept in the repository.
fn faults() -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut stems = Vec::new();
    for path in scripts()? {
        let (script, stem) = (Script::read(&path)?, files::stem(&path)?);
        let cast = recordings().join(format!("{stem}.cast"));
        let recorded = Cast::parse(
            &file::read(&cast, cli::cast::LIMIT)
                .with_context(|| format!("recording {}", cast.display()))?,
        )?;
        if recorded.header.script != Some(script.fingerprint()) {
            faults.push(format!("{stem}.cast was made by another script than {stem}.toml"));
        }
        faults.extend(files::faults(&cast)?);
        stems.push(stem);
    }
    for entry in recordings().read_dir()? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let stem = name.split('.').next().unwrap_or_default();
        if !stems.iter().any(|known| known == stem) {
            faults.push(format!("{name} belongs to no script"));
        }
    }
    Ok(faults)
}

/// The project's scripts.
fn scripts() -> Result<Vec<PathBuf>> {
    files::with_extension(&root().join("record/scripts"), "toml")
}

/// Where their recordings are kept: the book takes them along.
fn recordings() -> PathBuf {
    root().join("notes/recordings")
}

/// Where sessions have their folders, and single pictures are put.
fn sessions() -> PathBuf {
    root().join("target/record")
}

/// The repository's folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("record is a folder of the workspace")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_kept_was_made_by_the_scripts_as_they_are() {
        assert_eq!(faults().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_word_means_the_scripts_that_have_it_in_their_names() {
        let all = named("all").unwrap();
        assert_eq!(named("05").unwrap(), [root().join("record/scripts/05_mmio.toml")]);
        assert_eq!(named("x.toml").unwrap(), [PathBuf::from("x.toml")]);
        assert_eq!(all.len(), scripts().unwrap().len());
        assert!(named("nothing").unwrap_err().to_string().contains("no script's name contains"));
    }
}
