//! The disks that `--disk` names.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{self, Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use cli::list::List;
use common::disk::{Access, SECTOR};
use common::disk_image::{self, Format, Options};
use common::virtio::blk::{Blk, SERIAL_LEN};
use serde::{Deserialize, Serialize};

/// A disk as the command line has it: `[path=]FILE[,rw|ro|snapshot][,format=raw|qcow2][,backing][,serial=TEXT]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    path: PathBuf,
    access: Option<Access>,
    format: Option<Format>,
    backing: bool,
    serial: String,
    /// In a snapshot: when the file was written to last.
    changed: Option<SystemTime>,
}

impl Disk {
    /// Parses the value of `--disk`.
    pub fn parse(text: OsString) -> Result<Self, String> {
        let mut list = List::parse(&text)?;
        let path = list.first("path", "FILE")?.into();
        let access = list.access()?;
        let format = match list.value("format", "raw|qcow2")? {
            None => None,
            Some(word) if word == "raw" => Some(Format::Raw),
            Some(word) if word == "qcow2" => Some(Format::Qcow2),
            Some(word) => {
                return Err(format!("format={} is unknown, expected raw or qcow2", word.display()));
            }
        };
        let backing = list.word(&[("backing", true)])?.unwrap_or(false);
        let serial = list.value("serial", "TEXT")?.unwrap_or_default();
        list.end()?;
        let serial = check_serial(&serial)?;
        Ok(Self { path, access, format, backing, serial, changed: None })
    }

    fn access(&self) -> Access {
        self.access.unwrap_or(Access::ReadWrite)
    }

    /// Whether what is written to it is thrown away at the end.
    pub fn forgets(&self) -> bool {
        self.access() == Access::Snapshot
    }

    /// With its place as any process finds it, and when it was written to last.
    pub fn to_keep(&self) -> Result<Self> {
        let path = path::absolute(&self.path)?;
        let changed = changed(&path);
        Ok(Self { path, changed, ..self.clone() })
    }

    /// A disk that was saved, and is not named again, has to be what it was: the guest knows what it has read.
    pub fn check_unchanged(&self) -> Result<()> {
        // That it isn't there, is found when it is opened.
        let now = changed(&self.path);
        ensure!(
            now.is_none() || now == self.changed,
            "disk {} was written to after the machine had been saved; put it back as it was, or give it by \
             --disk if that does the guest no harm",
            self.path.display()
        );
        Ok(())
    }

    /// This file in the place of an `old` one that a guest knows, and has used in the same way unless it is said.
    pub fn in_place_of(&self, old: &Self) -> Self {
        let serial = if self.serial.is_empty() { &old.serial } else { &self.serial };
        Self { access: self.access.or(old.access), serial: serial.clone(), ..self.clone() }
    }

    /// Opens it. With `verbose`, says on stderr what the guest's `name` is.
    pub fn open(&self, name: &str, verbose: bool) -> Result<Blk> {
        let path = self.path.display();
        let &Self { format, backing, .. } = self;
        let options = Options { access: self.access(), format, backing };
        let (sectors, format) =
            disk_image::open(&self.path, options).with_context(|| format!("disk {path}"))?;
        if verbose {
            let bytes = sectors.count() * SECTOR as u64;
            let writes = match self.access() {
                Access::ReadWrite => "writes go to it",
                Access::ReadOnly => "write-protected",
                Access::Snapshot => "writes are thrown away at the end",
            };
            let format = match format {
                Format::Raw => "raw",
                Format::Qcow2 => "qcow2",
            };
            cli::eprintln!("disk {name} is {path}: {format}, {bytes} bytes, {writes}");
        }
        Ok(Blk::new(sectors, self.serial.as_bytes()))
    }
}

/// What the kernel calls the disk with this number, from 0 on.
pub fn name(number: usize) -> String {
    // After z comes aa: there is no zero among the digits.
    let (mut number, mut letters) = (number + 1, Vec::new());
    while number > 0 {
        letters.insert(0, b'a' + ((number - 1) % 26) as u8);
        number = (number - 1) / 26;
    }
    format!("/dev/vd{}", String::from_utf8_lossy(&letters))
}

/// When a file was written to last. Of block devices nobody keeps that.
fn changed(path: &Path) -> Option<SystemTime> {
    let meta = fs::metadata(path).ok().filter(|meta| meta.is_file())?;
    meta.modified().ok()
}

fn check_serial(serial: &OsStr) -> Result<String, String> {
    let bytes = serial.as_bytes();
    if bytes.len() > SERIAL_LEN || !bytes.iter().all(u8::is_ascii_graphic) {
        return Err(format!(
            "serial={} has to be at most {SERIAL_LEN} ASCII letters, digits and signs",
            serial.display()
        ));
    }
    Ok(serial.to_string_lossy().into_owned())
}
