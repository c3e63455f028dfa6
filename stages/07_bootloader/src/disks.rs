//! The disks that `--disk` names, and whether one of them can be booted.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cli::list::List;
use common::boot_disk;
use common::disk::{self, Access, SECTOR, Sectors};
use common::ide::{self, Drive};

/// A disk as the command line has it: `[path=]FILE[,rw|ro|snapshot]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    path: PathBuf,
    access: Access,
}

impl Disk {
    /// Parses the value of `--disk`.
    pub fn parse(text: OsString) -> Result<Self, String> {
        let mut list = List::parse(&text)?;
        let path = list.first("path", "FILE")?.into();
        let access = list.access()?.unwrap_or(Access::ReadWrite);
        list.end()?;
        Ok(Self { path, access })
    }
}

/// Opens the disks and puts each into a drive. If the machine `boots` from one of them, a BIOS would find out as
/// well that it cannot, and say less.
pub fn open(disks: &[Disk], boots: bool) -> Result<Vec<Drive>> {
    if disks.len() > ide::DRIVES {
        bail!("--disk is given {} times, expected at most {}", disks.len(), ide::DRIVES);
    }
    let (mut drives, mut unbootable) = (Vec::new(), Vec::new());
    for (number, Disk { path, access }) in (1..).zip(disks) {
        let about = || format!("disk {}", path.display());
        let mut disk = disk::open(path, *access).with_context(about)?;
        unbootable.extend(check_boot_sector(&mut disk).with_context(about).err());
        drives.push(Drive::new(disk, &number.to_string()));
    }
    if boots && unbootable.len() == disks.len() {
        let first = unbootable.swap_remove(0);
        return Err(match disks.len() {
            1 => first,
            count => first.context(format!("none of the {count} disks can be booted")),
        });
    }
    Ok(drives)
}

/// Looks whether a disk can be booted.
fn check_boot_sector(disk: &mut impl Sectors) -> Result<()> {
    let mut boot_sector = [0; SECTOR];
    disk.read(0, &mut boot_sector).context("cannot read the first sector")?;
    Ok(boot_disk::check_boot_sector(&boot_sector)?)
}
