//! The disks that `--disk` names.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cli::list::List;
use common::disk::{Access, SECTOR};
use common::disk_image::{self, Format, Options};
use common::virtio::blk::{Blk, SERIAL_LEN};

/// A disk as the command line has it: `[path=]FILE[,rw|ro|snapshot][,format=raw|qcow2][,backing][,serial=TEXT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    path: PathBuf,
    options: Options,
    serial: OsString,
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
        check_serial(&serial)?;
        Ok(Self { path, options: Options { access, format, backing }, serial })
    }

    /// Whether what is written to it is thrown away at the end.
    pub fn forgets(&self) -> bool {
        self.options.access == Access::Snapshot
    }

    /// Opens it. With `verbose`, says on stderr what the guest's `name` is.
    pub fn open(&self, name: &str, verbose: bool) -> Result<Blk> {
        let path = self.path.display();
        let (sectors, format) =
            disk_image::open(&self.path, self.options).with_context(|| format!("disk {path}"))?;
        if verbose {
            let bytes = sectors.count() * SECTOR as u64;
            let writes = match self.options.access {
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

fn check_serial(serial: &OsStr) -> Result<(), String> {
    let bytes = serial.as_bytes();
    if bytes.len() > SERIAL_LEN || !bytes.iter().all(u8::is_ascii_graphic) {
        return Err(format!(
            "serial={} has to be at most {SERIAL_LEN} ASCII letters, digits and signs",
            serial.display()
        ));
    }
    Ok(())
}
