//! The distribution's packages: those to install, and those that are only unpacked.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IsTerminal, Write, stdin};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::geteuid;

use crate::interrupt::{self, Running};

/// The commands that the project needs, and the packages that bring them, by package system.
pub const TOOLS: &[Tool] = &[
    Tool { command: "nasm", apt: "nasm", dnf: "nasm", pacman: "nasm", zypper: "nasm" },
    Tool {
        command: "qemu-system-x86_64",
        apt: "qemu-system-x86",
        dnf: "qemu-system-x86-core",
        pacman: "qemu-system-x86",
        zypper: "qemu-x86",
    },
    // Debian's small one has all that a guest wants of it.
    Tool { command: "gdb", apt: "gdb-minimal", dnf: "gdb", pacman: "gdb", zypper: "gdb" },
];

/// The commands that only the tests need: the guests' network is measured, and lies behind a NAT or is passt; their disks
/// are made and checked by the tools of others.
pub const TEST_TOOLS: &[Tool] = &[
    Tool { command: "iperf3", apt: "iperf3", dnf: "iperf3", pacman: "iperf3", zypper: "iperf" },
    Tool {
        command: "nft",
        apt: "nftables",
        dnf: "nftables",
        pacman: "nftables",
        zypper: "nftables",
    },
    Tool { command: "passt", apt: "passt", dnf: "passt", pacman: "passt", zypper: "passt" },
    Tool {
        command: "qemu-img",
        apt: "qemu-utils",
        dnf: "qemu-img",
        pacman: "qemu-img",
        zypper: "qemu-tools",
    },
    Tool {
        command: "mke2fs",
        apt: "e2fsprogs",
        dnf: "e2fsprogs",
        pacman: "e2fsprogs",
        zypper: "e2fsprogs",
    },
];

/// What sets the pages of the reports, and what their test reads them with. Not among [`TEST_TOOLS`]: with what they depend on
/// they are 140 packages of 170 MB on a bare Debian, and the test is skipped without them.
pub const REPORT_TOOLS: &[Tool] = &[
    Tool {
        command: "weasyprint",
        apt: "weasyprint",
        dnf: "weasyprint",
        pacman: "python-weasyprint",
        zypper: "python3-weasyprint",
    },
    Tool {
        command: "pdftotext",
        apt: "poppler-utils",
        dnf: "poppler-utils",
        pacman: "poppler",
        zypper: "poppler-tools",
    },
];

/// What films are made with, and the fonts that are drawn in them: where they lie on Debian, and other systems call them
/// something else.
pub const RECORD_TOOLS: &[Tool] = &[
    Tool {
        command: "ffmpeg",
        apt: "ffmpeg",
        dnf: "ffmpeg-free",
        pacman: "ffmpeg",
        zypper: "ffmpeg",
    },
    Tool {
        command: "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf",
        apt: "fonts-dejavu-core",
        dnf: "dejavu-sans-mono-fonts",
        pacman: "ttf-dejavu",
        zypper: "dejavu-fonts",
    },
    Tool {
        command: "/usr/share/fonts/truetype/nanum/NanumGothicCoding.ttf",
        apt: "fonts-nanum-coding",
        dnf: "naver-nanum-gothic-coding-fonts",
        pacman: "ttf-nanumgothic_coding",
        zypper: "nanum-gothic-coding-fonts",
    },
];

/// What the reports' text is set in. [`has_korean_font`] says whether there is one.
pub const KOREAN_FONT: Tool = Tool {
    command: "fc-list",
    apt: "fonts-nanum",
    dnf: "google-noto-sans-cjk-fonts",
    pacman: "noto-fonts-cjk",
    zypper: "noto-sans-cjk-fonts",
};

/// A command and the package that brings it.
pub struct Tool {
    /// Looked for in `PATH`; or a file, by its whole path.
    pub command: &'static str,
    /// Debian, Ubuntu.
    pub apt: &'static str,
    dnf: &'static str,
    pacman: &'static str,
    zypper: &'static str,
}

/// The path of a command, if it is in `PATH`. System folders are looked at as well, which a user's
/// `PATH` on Debian does not have.
pub fn find_command(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Whether this system has letters for Korean.
pub fn has_korean_font() -> bool {
    let listed = Command::new("fc-list").arg(":lang=ko").output();
    listed.is_ok_and(|listed| !listed.stdout.is_empty())
}

/// Whether packages come by apt here, which set-up can work.
pub fn has_apt() -> bool {
    find_command("apt-get").is_some() && find_command("dpkg-deb").is_some()
}

/// What a person has to type to install `tools` where set-up does not do it: one line for each package
/// system that is here, or for all of them if none is.
///
/// The last two packages of a line are what the guest's user space and the lab's agent are made of.
pub fn by_hand(tools: &[&Tool]) -> Vec<String> {
    type Name = fn(&Tool) -> &'static str;
    let systems: [(&str, &str, Name, &str); 3] = [
        ("dnf", "sudo dnf install", |tool| tool.dnf, "busybox glibc-static"),
        ("pacman", "sudo pacman -S", |tool| tool.pacman, "busybox"),
        ("zypper", "sudo zypper install", |tool| tool.zypper, "busybox-static glibc-devel-static"),
    ];
    let line = |(_, install, name, more): &(&str, &str, Name, &str)| {
        let names: Vec<_> = tools.iter().map(|tool| name(tool)).collect();
        format!("{install} {} {more}", names.join(" "))
    };
    let here: Vec<_> =
        systems.iter().filter(|(system, ..)| find_command(system).is_some()).map(line).collect();
    if here.is_empty() { systems.iter().map(line).collect() } else { here }
}

/// Installs packages with apt, as root or through sudo. Output goes to `log`.
pub fn apt_install(packages: &[&str], log: &Path) -> Result<()> {
    if !geteuid().is_root() && find_command("sudo").is_none() {
        let install = format!("apt-get update && apt-get install {}", packages.join(" "));
        bail!(
            "installing takes root, and there is no sudo: run `{install}` as root, then this again"
        )
    }
    apt_update_if_unknown(packages, log)?;
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(packages);
    apt_get_as_root(&args, log).with_context(|| format!("cannot install {}", packages.join(" ")))
}

/// Fetches the package lists unless they are there: a fresh machine or container has none.
pub fn apt_update_if_unknown(packages: &[&str], log: &Path) -> Result<()> {
    if packages.iter().all(|package| is_known(package)) {
        return Ok(());
    }
    // By itself apt takes it for a success when no list can be fetched.
    let updated = apt_get_as_root(&["-o", "APT::Update::Error-Mode=any", "update"], log);
    // One broken third-party source fails the whole update, though all that we need has come.
    match packages.iter().find(|package| !is_known(package)) {
        None => Ok(()),
        Some(package) => {
            updated.context("cannot fetch the package lists")?;
            bail!("apt knows no package {package}: is Debian's or Ubuntu's main archive enabled?")
        }
    }
}

/// Whether apt could fetch this package.
pub fn is_known(package: &str) -> bool {
    apt_cache("policy", package).is_ok_and(|text| {
        text.lines().any(|line| {
            line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)")
        })
    })
}

/// The packages of a kernel by the name that stays the same over its versions: the image, and on
/// Ubuntu its modules, which are packages of their own.
pub fn kernel_packages(meta: &str) -> Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    let mut queue = vec![meta.to_owned()];
    while let Some(package) = queue.pop() {
        for needed in depends(&apt_cache("depends", &package)?) {
            let kernel = ["linux-image-", "linux-modules-"].iter().any(|p| needed.starts_with(p));
            // Alternatives such as linux-image-unsigned-… repeat the same files.
            if kernel && !needed.contains("unsigned") && !found.iter().any(|name| name == needed) {
                found.push(needed.to_owned());
                queue.push(needed.to_owned());
            }
        }
    }
    ensure!(!found.is_empty(), "apt knows no kernel behind {meta}");
    Ok(found)
}

/// The package that `meta`, a name that stays the same over versions, stands for now, and the version of that. Their
/// names begin alike.
pub fn newest(meta: &str) -> Result<(String, String)> {
    let text = apt_cache("depends", meta)?;
    let name = depends(&text).find(|name| name.starts_with(meta));
    let name = name.with_context(|| format!("apt knows no package behind {meta}"))?.to_owned();
    let about = apt_cache("show", &name)?;
    // The newest comes first.
    let version = about.lines().find_map(|line| line.strip_prefix("Version: "));
    let version = version.with_context(|| format!("apt knows no version of {name}"))?.to_owned();
    Ok((name, version))
}

/// The packages that `apt-cache depends` lists as needed.
fn depends(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        line.trim_start_matches([' ', '|'])
            .strip_prefix("Depends: ")
            .filter(|name| !name.contains('<'))
    })
}

/// Downloads packages and unpacks them together into `dir`, without installing anything.
pub fn unpack(packages: &[impl AsRef<OsStr>], dir: &Path, log: &Path) -> Result<()> {
    let debs = tempfile::tempdir_in(dir).context("cannot make a folder for downloads")?;
    let mut download = Command::new("apt-get");
    download.arg("download").args(packages).current_dir(debs.path());
    run_logged(&mut download, log).context("the download failed")?;
    for deb in fs::read_dir(debs.path())? {
        let mut extract = Command::new("dpkg-deb");
        extract.arg("--extract").arg(deb?.path()).arg(dir);
        run_logged(&mut extract, log)?;
    }
    Ok(())
}

/// Asks for the password that sudo may want, before a moving line would write over the question.
pub fn ready_for_root() -> Result<()> {
    if geteuid().is_root() || !stdin().is_terminal() || find_command("sudo").is_none() {
        return Ok(());
    }
    let status = Command::new("sudo").arg("--validate").status().context("cannot start sudo")?;
    ensure!(status.success(), "sudo refused");
    Ok(())
}

fn apt_cache(what: &str, package: &str) -> Result<String> {
    let output = Command::new("apt-cache")
        .args([what, package])
        .env("LC_ALL", "C")
        .output()
        .context("cannot start apt-cache")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn apt_get_as_root(args: &[&str], log: &Path) -> Result<()> {
    let mut command = if geteuid().is_root() {
        Command::new("apt-get")
    } else if find_command("sudo").is_some() {
        let mut sudo = Command::new("sudo");
        if !stdin().is_terminal() {
            sudo.arg("--non-interactive");
        }
        sudo.arg("apt-get");
        sudo
    } else {
        bail!(
            "this takes root, and there is no sudo: run `apt-get {}` as root, then this again",
            args.join(" ")
        )
    };
    // Another apt may be at work, such as the one that an interrupted set-up has left behind.
    command.args(["-o", "DPkg::Lock::Timeout=120"]);
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    run_logged(&mut command, log)
}

/// Runs a command with its output added to `log`; its last error line becomes the error.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    run_followed(command, log, |_| {})
}

/// The same, and `line` gets each line of the output as it comes.
pub fn run_followed(command: &mut Command, log: &Path, mut line: impl FnMut(&str)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut file = File::options().create(true).append(true).open(log)?;
    let (output, end) = io::pipe()?;
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command.stdout(end.try_clone()?).stderr(end);
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    // The command here holds the pipe's end open, too.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let running = Running::new(&child);
    let (mut error, mut last) = (None, None);
    for said in BufReader::new(output).split(b'\n') {
        let said = said?;
        file.write_all(&said)?;
        file.write_all(b"\n")?;
        let said = String::from_utf8_lossy(&said).into_owned();
        line(&said);
        let is_error = said.starts_with("E:") || said.starts_with("sudo:");
        if is_error || said.contains("error: ") {
            error = Some(said);
        } else if !said.trim().is_empty() {
            last = Some(said);
        }
    }
    let status = child.wait()?;
    drop(running);
    ensure!(!interrupt::came(), "interrupted");
    if status.success() {
        return Ok(());
    }
    let said = error.or(last);
    let said = said.as_deref().unwrap_or("no reason given");
    bail!("{name}: {said} (all of it: {})", log.display())
}

/// Takes it for done that what is to be removed is not there.
pub fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_what_apt_cache_prints() {
        let text = "linux-image-generic\n  Depends: linux-image-6.8.0-31-generic\n |Depends: \
                    linux-modules-extra-6.8.0-31-generic\n  Depends: <virtual>\n  Recommends: thermald\n";
        assert_eq!(
            depends(text).collect::<Vec<_>>(),
            ["linux-image-6.8.0-31-generic", "linux-modules-extra-6.8.0-31-generic"]
        );
    }

    #[test]
    fn every_package_system_gets_a_line_that_names_all_tools() {
        let tools: Vec<_> = TOOLS.iter().chain(TEST_TOOLS).collect();
        for line in by_hand(&tools) {
            assert!(line.starts_with("sudo ") && line.contains(" nasm "), "{line}");
        }
    }

    #[test]
    fn commands_are_found_in_path_and_others_are_not() {
        assert!(find_command("sh").is_some());
        assert!(find_command("no-such-command-anywhere").is_none());
    }
}
