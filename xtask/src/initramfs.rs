//! The user space that stage 08 boots when none is named: busybox and `guests/linux/init`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use cpio::NewcBuilder;

/// File types in the mode word of a newc header, as in `inode(7)`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// Writes the archive (Linux, "initramfs buffer format") from a static busybox and an init script.
pub fn build(busybox: &Path, init: &Path) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("cannot run {}", busybox.display()))?;
    let applets = String::from_utf8(list.stdout).context("busybox lists odd names")?;

    let mut archive = Archive { bytes: Vec::new(), entries: 0 };
    for dir in ["bin", "dev", "proc", "sys", "tmp", "root", "etc"] {
        archive.add(dir, DIRECTORY | 0o755, b"")?;
    }
    // The kernel opens it for init's stdin, stdout and stderr, before init can mount devtmpfs.
    archive.device("dev/console", CHARACTER | 0o600, 5, 1)?;
    archive.add("init", REGULAR | 0o755, &read(init)?)?;
    archive.add("bin/busybox", REGULAR | 0o755, &read(busybox)?)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.add(&format!("bin/{applet}"), SYMLINK | 0o777, b"busybox")?;
    }
    archive.finish()
}

/// A newc archive under way.
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let header = self.header(name, mode);
        self.write(header, content)
    }

    fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        let header = self.header(name, mode).rdev_major(major).rdev_minor(minor);
        self.write(header, b"")
    }

    /// Times and owners stay 0, so that the same input always gives the same archive.
    fn header(&mut self, name: &str, mode: u32) -> NewcBuilder {
        self.entries += 1;
        NewcBuilder::new(name).ino(self.entries).mode(mode).nlink(1)
    }

    fn write(&mut self, header: NewcBuilder, content: &[u8]) -> Result<()> {
        use std::io::Write;
        let size = u32::try_from(content.len()).context("a file over 4 GiB")?;
        let mut entry = header.write(&mut self.bytes, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        cpio::newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_reads_back_as_it_was_written() {
        let mut archive = Archive { bytes: Vec::new(), entries: 0 };
        archive.device("dev/console", CHARACTER | 0o600, 5, 1).unwrap();
        archive.add("init", REGULAR | 0o755, b"#!/bin/sh\n").unwrap();
        let bytes = archive.finish().unwrap();

        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        loop {
            let entry = cpio::NewcReader::new(rest).unwrap();
            if entry.entry().is_trailer() {
                break;
            }
            let meta = entry.entry().clone();
            let mut content = Vec::new();
            rest = entry.to_writer(&mut content).unwrap();
            seen.push((meta.name().to_owned(), meta.mode(), meta.rdev_major(), content));
        }
        assert_eq!(
            seen,
            [
                ("dev/console".to_owned(), 0o020_600, 5, vec![]),
                ("init".to_owned(), 0o100_755, 0, b"#!/bin/sh\n".to_vec()),
            ]
        );
    }
}
