//! `cargo xtask grub-image`: a disk from which GRUB boots Linux.
//!
//! Debian's `grub-mkimage` makes GRUB's core for it. `grub-bios-setup`, which would write that to a disk, is not used:
//! it wants to know on which device the folder with GRUB's files is, even where it needs nothing from
//! there, and fails in a container and for everybody who is not root. It isn't missed: boot.img,
//! GRUB's boot sector, loads the sector behind itself, and the core expects itself there, as both come.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cli::cache;
use common::boot_disk::Parts;
use lab::parts::Kernel;
use tempfile::tempdir;

use crate::packages;

/// Where GRUB finds the rest of itself.
const PREFIX: &str = "(hd0,msdos1)/boot/grub";

/// What is in the core: all that it takes to a menu, and to Linux. Other commands' modules are on the disk.
const CORE: [&str; 14] = [
    "biosdisk",
    "boot",
    "cat",
    "configfile",
    "echo",
    "fat",
    "halt",
    "linux",
    "ls",
    "normal",
    "part_msdos",
    "reboot",
    "serial",
    "terminal",
];

/// The menu. There is no ACPI on this machine, so Linux restarts it by the keyboard controller (`reboot=k`); the
/// other words are stage 08's.
const MENU: &str = "\
# What GRUB's menu shows: stage 07's disk. `c` is GRUB's own command line.
set timeout=5
menuentry 'Linux' {
    linux /vmlinuz console=ttyS0 quiet loglevel=3 pci=off reboot=k
    initrd /initramfs.cpio
}
menuentry 'Linux, with all that the kernel says' {
    linux /vmlinuz console=ttyS0 pci=off reboot=k
    initrd /initramfs.cpio
}
";

/// Options of `cargo xtask grub-image`.
#[derive(clap::Args)]
pub struct Args {
    /// The image to write
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Another kernel than the lab's, which is Debian's for any PC: it reads the MP table, and so finds all
    /// processors. The one that stage 08 boots does not, and uses one
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Another initramfs than stage 08's
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
}

/// Writes the image that was asked for.
pub fn run(args: &Args) -> Result<()> {
    crate::setup::run(&crate::setup::Args::default())?;
    let kernel = args.kernel.clone().unwrap_or_else(default_kernel);
    let initrd = args.initrd.clone().unwrap_or_else(cache::default_initrd);
    let image = build(&Tools::find()?, &kernel, &initrd)?;
    fs::write(&args.file, image).with_context(|| format!("cannot write {}", args.file.display()))
}

/// Debian's kernel for any PC; without it, the one that stage 08 boots.
fn default_kernel() -> PathBuf {
    Kernel::find().map_or_else(|_| cache::default_kernel(), |kernel| kernel.image)
}

/// GRUB's tools and files.
struct Tools {
    mkimage: PathBuf,
    /// Where `mkimage` finds libraries that this system does not have.
    libraries: Option<PathBuf>,
    /// Its modules and images for a PC with a BIOS.
    platform: PathBuf,
}

impl Tools {
    /// Those that set-up has unpacked, or this system's own.
    fn find() -> Result<Self> {
        let unpacked = cache::grub();
        if unpacked.exists() {
            return Ok(Self {
                mkimage: unpacked.join("grub-mkimage"),
                platform: unpacked.join("i386-pc"),
                libraries: Some(unpacked),
            });
        }
        let mkimage =
            ["grub-mkimage", "grub2-mkimage"].into_iter().find_map(packages::find_command);
        let platform = Path::new("/usr/lib/grub/i386-pc");
        ensure!(
            mkimage.is_some() && platform.is_dir(),
            "there is no GRUB for PCs with a BIOS here: install grub-mkimage and /usr/lib/grub/i386-pc (Fedora: \
             grub2-tools-minimal and grub2-pc-modules; Arch Linux and openSUSE: grub, grub2-i386-pc)"
        );
        Ok(Self { mkimage: mkimage.unwrap(), libraries: None, platform: platform.to_owned() })
    }

    /// GRUB's core, which the boot sector loads.
    fn core(&self) -> Result<Vec<u8>> {
        let dir = tempdir().context("cannot make a folder")?;
        let core = dir.path().join("core.img");
        let mut mkimage = Command::new(&self.mkimage);
        mkimage.args(["--format", "i386-pc", "--prefix", PREFIX, "--directory"]);
        mkimage.arg(&self.platform).arg("--output").arg(&core).args(CORE);
        if let Some(libraries) = &self.libraries {
            let others = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
            let paths = [libraries.clone()].into_iter().chain(env::split_paths(&others));
            mkimage.env("LD_LIBRARY_PATH", env::join_paths(paths)?);
        }
        let output =
            mkimage.output().with_context(|| format!("cannot start {}", self.mkimage.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "grub-mkimage: {}", said.trim());
        read(&core)
    }
}

/// Writes the disk that stage 07's milestone boots, unless it is newer than all that it is made of. Without GRUB
/// there is none.
pub fn refresh() -> Result<()> {
    let (disk, kernel, initrd) = (cache::grub_disk(), default_kernel(), cache::default_initrd());
    let Ok(tools) = Tools::find() else { return Ok(()) };
    let changed = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let parts =
        [env::current_exe()?, tools.platform.join("boot.img"), kernel.clone(), initrd.clone()];
    if parts.iter().all(|part| changed(part) <= changed(&disk)) {
        return Ok(());
    }
    crate::setup::write_whole(&disk, &build(&tools, &kernel, &initrd)?)
}

/// Makes the disk.
fn build(tools: &Tools, kernel: &Path, initrd: &Path) -> Result<Vec<u8>> {
    let boot = read(&tools.platform.join("boot.img"))?;
    let mut files = vec![
        ("boot/grub/grub.cfg".to_owned(), MENU.into()),
        ("vmlinuz".to_owned(), read(kernel)?),
        ("initramfs.cpio".to_owned(), read(initrd)?),
    ];
    for entry in fs::read_dir(&tools.platform)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if [".mod", ".lst"].iter().any(|ending| name.ends_with(ending)) {
            files.push((format!("boot/grub/i386-pc/{name}"), read(&path)?));
        }
    }
    // The same files, the same image: folders list theirs in any order.
    files[3..].sort();
    let files: Vec<_> = files.iter().map(|(path, bytes)| (&path[..], &bytes[..])).collect();
    let parts = Parts { mbr: &boot, gap: &tools.core()?, boot: &[], files: &files };
    parts.build().context("cannot make GRUB's disk")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
