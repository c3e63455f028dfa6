//! The user space that stage 08 boots when none is named: busybox and `guests/linux/init`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use lab::initramfs::Archive;

/// Writes the archive (Linux, "initramfs buffer format") from a static busybox and an init script.
pub fn build(busybox: &Path, init: &Path) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("cannot run {}", busybox.display()))?;
    let applets = String::from_utf8(list.stdout).context("busybox lists odd names")?;

    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "root", "etc"] {
        archive.folder(dir)?;
    }
    // The kernel opens it for init's stdin, stdout and stderr, before init can mount devtmpfs.
    archive.device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &read(init)?)?;
    archive.file("bin/busybox", 0o755, &read(busybox)?)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    Ok(archive.finish()?)
}
