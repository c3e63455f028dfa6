//! The user space that stage 08 boots when none is named: busybox, what `guests/linux` has, and the default kernel's
//! virtio drivers.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::initramfs::Archive;
use lab::modules::Folder;

use crate::workspace;

/// The drivers of what stage 08 can offer, for kernels that have them as modules. Each brings what it depends on. The first
/// two are the power button's: its own, and the one by which programs see it pressed. The third is for systemd, which wants
/// it before it can look for modules on its own disk.
const WANTED: [&str; 10] = [
    "button",
    "evdev",
    "autofs4",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];

/// The assembler's command.
pub const NASM: &str = "nasm";

/// Writes the archive (Linux, "initramfs buffer format") from a static busybox, the scripts in `guests/linux`, and
/// a folder that [`collect_modules`] has filled.
pub fn build(busybox: &Path, modules: &Path) -> Result<Vec<u8>> {
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("cannot run {}", busybox.display()))?;
    let applets = String::from_utf8(list.stdout).context("busybox lists odd names")?;

    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "root", "etc", "etc/udhcpc"] {
        archive.folder(dir)?;
    }
    // The kernel opens it for init's stdin, stdout and stderr, before init can mount devtmpfs.
    archive.device("dev/console", 5, 1)?;
    let guests = workspace::root().join("guests/linux");
    archive.file("init", 0o755, &read(&guests.join("init"))?)?;
    // Where busybox's udhcpc looks for it.
    archive.file("etc/udhcpc/default.script", 0o755, &read(&guests.join("dhcp"))?)?;
    archive.file("bin/busybox", 0o755, &read(busybox)?)?;
    // busybox knows no vsock.
    archive.file("bin/vsock", 0o755, &assembled(&guests.join("vsock.asm"))?)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    for dir in ["lib", "lib/modules"] {
        archive.folder(dir)?;
    }
    // Set-up fetches them with the kernel, which a machine may not have yet.
    let releases = if modules.is_dir() { entries(modules)? } else { Vec::new() };
    for release in releases {
        let folder = format!("lib/modules/{}", file_name(&release)?);
        archive.folder(&folder)?;
        for file in entries(&release)? {
            archive.file(&format!("{folder}/{}", file_name(&file)?), 0o644, &read(&file)?)?;
        }
    }
    Ok(archive.finish()?)
}

/// A program for Linux, which NASM makes of one source. The package `asm` has those for the bare machine, but it cannot be
/// built before set-up has brought NASM.
fn assembled(source: &Path) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("program");
    let nasm = Command::new(NASM).args(["-fbin", "-o"]).arg(&program).arg(source).output();
    let nasm = nasm.context("cannot start NASM")?;
    ensure!(
        nasm.status.success(),
        "NASM refuses {}: {}",
        source.display(),
        String::from_utf8_lossy(&nasm.stderr).trim_end()
    );
    read(&program)
}

/// Fills the new folder `to/RELEASE` with the wanted modules of `from`, a kernel's `lib/modules/RELEASE`, not
/// compressed, and with the two lists that `modprobe` reads.
///
/// A kernel that has some of them built in, or not at all, is none the worse for it here.
pub fn collect_modules(from: &Path, to: &Path) -> Result<()> {
    let folder = Folder::open(from)?;
    let wanted: Vec<_> = WANTED.into_iter().filter(|name| folder.has(name)).collect();
    let to = to.join(from.file_name().context("a folder without a name")?);
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    let (mut dep, mut alias) = (String::new(), String::new());
    for module in folder.load(&wanted)? {
        fs::write(to.join(format!("{}.ko", module.name)), &module.elf)?;
        // What has to be loaded first stands last.
        let mut needed = folder.load(&[&module.name])?;
        needed.pop();
        let needed: String =
            needed.iter().rev().map(|needed| format!(" {}.ko", needed.name)).collect();
        writeln!(dep, "{}.ko:{needed}", module.name)?;
        for pattern in &module.aliases {
            writeln!(alias, "alias {pattern} {}", module.name)?;
        }
    }
    fs::write(to.join("modules.dep"), dep)?;
    fs::write(to.join("modules.alias"), alias)?;
    fs::write(to.join(STAMP), WANTED.join("\n"))?;
    Ok(())
}

/// The list of what was wanted when the modules were collected.
const STAMP: &str = "modules.wanted";

/// Whether `modules` has been filled with what is wanted now. A kernel without modules leaves it empty.
pub fn has_modules(modules: &Path) -> bool {
    let current = |release: PathBuf| {
        fs::read_to_string(release.join(STAMP)).is_ok_and(|had| had == WANTED.join("\n"))
    };
    entries(modules).is_ok_and(|releases| releases.into_iter().all(current))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What is in a folder, in an order that stays the same.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(OsStr::to_str)
        .with_context(|| format!("an odd name: {}", path.display()))
}
