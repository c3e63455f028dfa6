//! `cargo xtask kernel`: a small Linux for stage 08, built from the distribution's own source.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail, ensure};
use cli::cache;

use crate::interrupt;
use crate::packages::{self, find_command};
use crate::progress::step;
use crate::workspace;

/// The package with the source of the distribution's kernel, by the name that stays the same over its versions.
const SOURCE: &str = "linux-source";

/// The commands that a build takes, with their packages on Debian.
const COMMANDS: [(&str, &str); 7] = [
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];

/// The header file that a build takes, with its package: objtool, which checks the kernel's code, reads ELF files.
const HEADER: (&str, &str) = ("gelf.h", "libelf-dev");

/// After how many files the progress says so.
const NOTE_EVERY: usize = 50;

/// Options of `cargo xtask kernel`.
#[derive(clap::Args)]
pub struct Args {
    /// Another kernel's source: a tar archive, as kernel.org has them
    #[arg(long, value_name = "FILE")]
    source: Option<PathBuf>,

    /// How many files to compile at a time. Without it: one for each processor
    #[arg(short, long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
}

/// Where the source comes from.
enum Source {
    /// A package of the distribution, in this version.
    Package { name: String, version: String },
    /// A file, as it was at that time.
    Archive { path: PathBuf, len: u64, modified: u64 },
}

impl Source {
    fn find(args: &Args) -> Result<Source> {
        if let Some(path) = &args.source {
            let look = || -> Result<Source> {
                let path = fs::canonicalize(path)?;
                let about = fs::metadata(&path)?;
                ensure!(about.is_file(), "this is no file");
                let modified = about.modified()?.duration_since(UNIX_EPOCH)?.as_secs();
                Ok(Source::Archive { path, len: about.len(), modified })
            };
            return look().with_context(|| format!("cannot read {}", path.display()));
        }
        ensure!(
            packages::has_apt(),
            "packages do not come by apt here: give --source FILE, a kernel's source from kernel.org"
        );
        if !packages::is_known(SOURCE) {
            packages::ready_for_root()?;
            packages::apt_update_if_unknown(&[SOURCE], &log())?;
        }
        let (name, version) = packages::newest(SOURCE)?;
        Ok(Source::Package { name, version })
    }

    /// One line that tells this source from others.
    fn tell(&self) -> String {
        match self {
            Source::Package { name, version } => format!("{name} {version}"),
            Source::Archive { path, len, modified } => {
                format!("{}, {len} bytes, of {modified}", path.display())
            }
        }
    }

    /// Unpacks it into the empty folder `to`.
    fn unpack(&self, to: &Path) -> Result<()> {
        let archive = match self {
            Source::Archive { path, .. } => path.clone(),
            Source::Package { name, .. } => {
                packages::unpack(&[name], to, &log())?;
                // In Debian the archive lies in usr/src, in Ubuntu in a folder there.
                let src = to.join("usr/src");
                let found = [src.clone(), src.join(name)].into_iter().find_map(|folder| {
                    let mut files = fs::read_dir(folder).ok()?.flatten().map(|file| file.path());
                    files.find(|path| path.to_string_lossy().contains(".tar."))
                });
                found.with_context(|| format!("the package {name} has no source in it"))?
            }
        };
        let tree = to.join("tree");
        fs::create_dir(&tree)?;
        let mut tar = Command::new("tar");
        tar.arg("--extract").arg("--strip-components=1").arg("--file").arg(&archive);
        packages::run_logged(tar.arg("--directory").arg(&tree), &log())?;
        fs::remove_dir_all(to.join("usr")).or_else(packages::ignore_missing)?;
        ensure!(tree.join("Kconfig").is_file(), "{} is no kernel's source", archive.display());
        Ok(())
    }
}

/// Builds the kernel, unless it is there and nothing that it is made from has changed.
pub fn run(args: &Args) -> Result<()> {
    let config = workspace::root().join("guests/linux/kernel.config");
    let wanted = fs::read_to_string(&config).context("cannot read guests/linux/kernel.config")?;
    fs::create_dir_all(cache::dir())
        .with_context(|| format!("cannot make {}", cache::dir().display()))?;
    let source = Source::find(args)?;
    let made_from = format!("{}\n{wanted}", source.tell());
    let same = |file: PathBuf| fs::read_to_string(file).is_ok_and(|text| text == made_from);

    let lock = cache::dir().join("kernel.lock");
    let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
    ensure!(lock.try_lock().is_ok(), "another `cargo xtask kernel` is at work");
    let kept = cache::small_kernel();
    let kept = kept.parent().expect("it is in a folder");
    if same(kept.join("made-from")) {
        println!("The small kernel is there, made from {}.", source.tell());
        tell();
        return Ok(());
    }
    need_tools()?;

    interrupt::end_commands_first()?;
    let made = build(&source, &config, &wanted, args.jobs);
    ensure!(
        !(interrupt::came() && build_dir().exists()),
        "interrupted: the next `cargo xtask kernel` goes on from here"
    );
    let Made { image, vmlinux, config } = made?;

    // Whoever finds `made-from` finds all of it.
    fs::create_dir_all(kept)?;
    fs::remove_file(kept.join("made-from")).or_else(packages::ignore_missing)?;
    fs::write(kept.join("config"), config)?;
    fs::rename(vmlinux, kept.join("vmlinux")).context("make has left no vmlinux")?;
    fs::rename(image, cache::small_kernel()).context("make has left no bzImage")?;
    fs::write(kept.join("made-from"), made_from)?;
    fs::remove_dir_all(build_dir())?;
    tell();
    Ok(())
}

/// What a build has left.
struct Made {
    image: PathBuf,
    vmlinux: PathBuf,
    /// The text of the whole configuration.
    config: String,
}

/// Where the source is unpacked and built.
fn build_dir() -> PathBuf {
    cache::dir().join("kernel-build")
}

/// Unpacks the source and builds it, or goes on with it.
fn build(
    source: &Source,
    config: &Path,
    wanted: &str,
    jobs: Option<NonZero<usize>>,
) -> Result<Made> {
    // What an interrupted build has left goes on, if it has the same source: make finds out what else has changed.
    let build = build_dir();
    let (tree, unpacked) = (build.join("tree"), build.join("source"));
    if fs::read_to_string(&unpacked).is_ok_and(|text| text == source.tell()) {
        eprintln!("      going on with what an earlier build has left");
    } else {
        step(&format!("Fetching the source: {}", source.tell()), |_| {
            fs::remove_dir_all(&build).or_else(packages::ignore_missing)?;
            fs::create_dir(&build)?;
            fs::remove_file(log()).or_else(packages::ignore_missing)?;
            // Half a source is of no use.
            source.unpack(&build).inspect_err(|_| drop(fs::remove_dir_all(&build)))?;
            Ok(fs::write(&unpacked, source.tell())?)
        })?;
    }
    step("Configuring the kernel", |_| {
        let mut allconfig = OsString::from("KCONFIG_ALLCONFIG=");
        allconfig.push(config);
        packages::run_logged(make(&tree).arg(allconfig).arg("allnoconfig"), &log())
    })?;
    let config = fs::read_to_string(tree.join(".config"))?;
    let lacks = missing(wanted, &config);
    if !lacks.is_empty() {
        eprintln!("      this version has no {}", lacks.join(", "));
    }
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let jobs = jobs.map_or(processors, NonZero::get);
    step("Building the kernel", |step| {
        let mut make = make(&tree);
        make.arg(format!("--jobs={jobs}")).arg("bzImage");
        let mut compiled = 0;
        packages::run_followed(&mut make, &log(), |line| {
            if line.trim_start().starts_with("CC ") {
                compiled += 1;
                if compiled % NOTE_EVERY == 0 {
                    step.note(&format!("{compiled} files compiled"));
                }
            }
        })
    })?;
    let (image, vmlinux) = (tree.join("arch/x86/boot/bzImage"), tree.join("vmlinux"));
    Ok(Made { image, vmlinux, config })
}

/// Where the kernel is, and how it is started.
fn tell() {
    println!("    {}", cache::small_kernel().display());
    println!("    cargo run --bin 08_boot_linux -- --kernel small");
}

/// Everything that the tools have said.
fn log() -> PathBuf {
    cache::dir().join("kernel.log")
}

/// An error that names all that a build takes and this machine lacks.
fn need_tools() -> Result<()> {
    let mut lacking: Vec<_> =
        COMMANDS.into_iter().filter(|(command, _)| find_command(command).is_none()).collect();
    let includes = |header: &str| {
        let mut gcc = Command::new("gcc")
            .args(["-E", "-x", "c", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        writeln!(gcc.stdin.take().expect("it is a pipe"), "#include <{header}>")?;
        gcc.wait()
    };
    if find_command("gcc").is_none() || !includes(HEADER.0)?.success() {
        lacking.push(HEADER);
    }
    let (names, packages): (Vec<_>, Vec<_>) = lacking.into_iter().unzip();
    if names.is_empty() {
        return Ok(());
    }
    let names = names.join(", ");
    if packages::has_apt() {
        let packages = packages.join(" ");
        bail!(
            "to build a kernel takes {names}: run `sudo apt-get install {packages}`, then this again"
        )
    }
    bail!("to build a kernel takes {names}: install what brings them, then run this again")
}

/// The kernel's own build, for this kind of machine, with nobody's name in it.
fn make(tree: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("--directory").arg(tree).arg("ARCH=x86").env("LC_ALL", "C");
    make.env("KBUILD_BUILD_USER", "mini-kvm").env("KBUILD_BUILD_HOST", "mini-kvm");
    for set in ["MAKEFLAGS", "CROSS_COMPILE", "KBUILD_OUTPUT", "O"] {
        make.env_remove(set);
    }
    make
}

/// The options that are wanted and that the configuration `has` not.
fn missing<'a>(wanted: &'a str, has: &str) -> Vec<&'a str> {
    let has = |line: &str| has.lines().any(|other| other == line);
    wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        // What answers a processor's leaks comes and goes with versions, and its names do.
        .filter(|line| !line.starts_with("CONFIG_MITIGATION_"))
        .filter(|line| {
            let renamed = line.replace("CONFIG_", "CONFIG_MITIGATION_").replace("_CPU_", "_");
            !has(line) && !has(&renamed)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_version_lacks_is_told_but_for_what_it_calls_otherwise() {
        let wanted = "# no option\n\nCONFIG_SMP=y\nCONFIG_GONE=y\nCONFIG_RETPOLINE=y\n\
                      CONFIG_CPU_SRSO=y\nCONFIG_MITIGATION_NEW=y\n";
        let has = "CONFIG_SMP=y\n# CONFIG_GONE is not set\nCONFIG_MITIGATION_RETPOLINE=y\n\
                   CONFIG_MITIGATION_SRSO=y\n";
        assert_eq!(missing(wanted, has), ["CONFIG_GONE=y"]);
        assert_eq!(missing(wanted, wanted), [] as [&str; 0]);
    }
}
