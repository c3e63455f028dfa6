//! `cargo xtask rootfs`: a disk image with a whole Debian, for stage 08.
//!
//! mmdebstrap unpacks and sets up the packages, and `mke2fs -d` makes a file system of the folder: no loop device. It is
//! root's work, for what is in the image belongs to many users.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use cli::{cache, size};
use rustix::process::geteuid;

use crate::interrupt;
use crate::packages::{self, find_command, run_followed, run_logged};
use crate::progress::step;

/// What is in it besides Debian's essential packages and apt: systemd, the network, and what one looks around with.
const PACKAGES: &str = "systemd-sysv,systemd-resolved,udev,dbus,libpam-systemd,kmod,iproute2,iputils-ping,netbase,\
                        procps,less,busybox,iperf3,wget";

/// What mmdebstrap runs last, with the new root as its first argument: what makes the packages this machine's.
const CUSTOMIZE: &str = r#"
set -e
cd "$1"
# The kernel mounts what it finds read-only; this has systemd check it and mount it read-write.
echo 'LABEL=debian / ext4 defaults 0 1' > etc/fstab
echo "$HOSTNAME" > etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost\n' "$HOSTNAME" > etc/hosts
echo 'LANG=C.UTF-8' > etc/default/locale
# Who sits at the console is root, without a password; nothing listens on the network.
chroot . passwd --delete root
# Interfaces keep the kernel's names, as `ip=` on its command line has them.
ln -sf /dev/null etc/systemd/network/99-default.link
# systemd-network-generator makes networks of `ip=`, whose names come first; where it says nothing, there is DHCP.
printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\n' > etc/systemd/network/95-dhcp.network
# It fails at the short form of `ip=`, which the kernel and the default initramfs take.
mkdir -p etc/systemd/system/systemd-network-generator.service.d
cat > etc/systemd/system/systemd-network-generator.service.d/short.conf << 'END'
[Service]
ExecStart=
ExecStart=/bin/sh -c 'export SYSTEMD_PROC_CMDLINE="$$(sed -E "s/(ip=([0-9.]*:){3}[0-9.]+)( |$$)/\\1:::off\\3/" /proc/cmdline)"; exec /lib/systemd/systemd-network-generator'
END
systemctl --root=. enable systemd-networkd systemd-network-generator systemd-resolved
# It would wait for a network where there is none.
systemctl --root=. disable systemd-networkd-wait-online
# By default systemd gives up devices and services after 90 seconds. In the lab, an emulated machine, and on a busy host, some
# have taken longer.
mkdir -p etc/systemd/system.conf.d
cat > etc/systemd/system.conf.d/patience.conf << END
[Manager]
DefaultTimeoutStartSec=5min
DefaultTimeoutStopSec=5min
DefaultDeviceTimeoutSec=5min
END
ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
# Each copy of the image makes itself one at its first start.
: > etc/machine-id
"#;

/// Options of `cargo xtask rootfs`.
#[derive(clap::Args)]
pub struct Args {
    /// The image to write. Without it: debian.img in the cache folder
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// How large the disk is. The file takes only as much as is in it
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = size::parse)]
    size: u64,

    /// Debian's release by its name. Without it: this system's, or bookworm
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,

    /// More packages, such as `curl,iperf3`; may be given several times
    #[arg(long, value_name = "PACKAGE", value_delimiter = ',')]
    include: Vec<String>,

    /// What the machine calls itself
    #[arg(long, value_name = "NAME", default_value = "debian")]
    hostname: String,
}

/// Makes the image, unless the one in the cache folder is of the same packages and settings.
pub fn run(args: &Args) -> Result<()> {
    let suite = args.suite.clone().unwrap_or_else(this_suite);
    let name = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.+:".contains(&byte))
    };
    for text in args.include.iter().chain([&suite, &args.hostname]) {
        ensure!(name(text) && !text.starts_with('-'), "`{text}` is no name");
    }
    let packages: Vec<_> =
        [PACKAGES].into_iter().chain(args.include.iter().map(String::as_str)).collect();
    let packages = packages.join(",");
    let size = args.size;
    let made_from =
        format!("Debian {suite}\n{packages}\n{}, {size} bytes\n{CUSTOMIZE}", args.hostname);

    let to = args.file.clone().unwrap_or_else(cache::debian_disk);
    let shown = to.display();
    let kept = args.file.is_none().then(|| to.with_extension("made-from"));
    if to.exists() {
        let same = |kept: &PathBuf| fs::read_to_string(kept).is_ok_and(|text| text == made_from);
        if kept.as_ref().is_some_and(same) {
            println!("The disk is there, made from the same: {shown}");
            tell(&to);
            return Ok(());
        }
        bail!(
            "there is {shown}, and what was done on it would be lost: remove it, or name another FILE"
        )
    }
    let mke2fs = tools()?;
    let folder = match to.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(cache::dir())
        .with_context(|| format!("cannot make {}", cache::dir().display()))?;
    let log = cache::dir().join("rootfs.log");
    fs::remove_file(&log).or_else(packages::ignore_missing)?;

    interrupt::end_commands_first()?;
    let image = tempfile::Builder::new().prefix(".rootfs-").tempfile_in(folder);
    let image = image.with_context(|| format!("cannot write to {}", folder.display()))?;
    image.as_file().set_len(size).with_context(|| format!("cannot make a file of {size} bytes"))?;
    let work = tempfile::Builder::new().prefix("mini-kvm-rootfs-").tempdir()?;
    let root = work.path().join("root");
    step(&format!("Unpacking and setting up Debian {suite}"), |step| {
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap.args(["--variant=minbase", "--format=directory"]);
        mmdebstrap.arg(format!("--include={packages}"));
        mmdebstrap.arg(r#"--aptopt=APT::Install-Recommends "false""#);
        mmdebstrap.arg(format!("--customize-hook={CUSTOMIZE}"));
        // It would write back that the machine's identity is not known yet, by which systemd takes a first start
        // for one where it is to enable all that it can.
        mmdebstrap.arg("--skip=cleanup/reproducible");
        mmdebstrap.env("HOSTNAME", &args.hostname).arg(&suite).arg(&root);
        run_followed(&mut mmdebstrap, &log, |line| {
            // The hook's text is among what it does.
            if let Some(does) = line.strip_prefix("I: ").filter(|does| does.ends_with("...")) {
                step.note(does.trim_end_matches('.'));
            }
        })
    })?;
    step("Making the disk", |_| {
        let mut mke2fs = Command::new(&mke2fs);
        mke2fs.args(["-q", "-F", "-t", "ext4", "-L", "debian", "-m", "1"]);
        // The file is new: what is not written is zero.
        mke2fs.args(["-E", "assume_storage_prezeroed=1"]);
        mke2fs.arg("-d").arg(&root).arg(image.path());
        run_logged(&mut mke2fs, &log)
    })?;
    fs::set_permissions(image.path(), Permissions::from_mode(0o644))?;
    let taken = image.as_file().metadata()?.blocks() * 512;
    // Whoever finds `made-from` beside it finds what it says.
    if let Some(kept) = &kept {
        fs::remove_file(kept).or_else(packages::ignore_missing)?;
    }
    image.persist_noclobber(&to).with_context(|| format!("cannot write {shown}"))?;
    if let Some(kept) = &kept {
        fs::write(kept, &made_from).with_context(|| format!("cannot write {}", kept.display()))?;
    }
    println!("    {shown}: {} MiB, of which {} MiB are on this disk", size >> 20, taken >> 20);
    tell(&to);
    Ok(())
}

/// How the disk is started.
fn tell(disk: &Path) {
    // In an option a comma is written twice.
    let disk = disk.display().to_string().replace(',', ",,");
    println!("    cargo run --bin 08_boot_linux -- --disk path={disk} --append root=/dev/vda");
    println!("    At the login prompt: root, without a password.");
}

/// Where mke2fs is, or what is missing.
fn tools() -> Result<PathBuf> {
    ensure!(
        geteuid().is_root(),
        "this takes root, for what is in the image belongs to many users: run it as root, in a container, for example"
    );
    let mke2fs = find_command("mke2fs");
    let mmdebstrap = find_command("mmdebstrap");
    let lacking: Vec<_> = [("mmdebstrap", mmdebstrap.is_none()), ("e2fsprogs", mke2fs.is_none())]
        .into_iter()
        .filter_map(|(package, lacks)| lacks.then_some(package))
        .collect();
    match mke2fs {
        Some(mke2fs) if lacking.is_empty() => Ok(mke2fs),
        _ if packages::has_apt() => {
            let packages = lacking.join(" ");
            bail!("this takes {packages}: run `sudo apt-get install {packages}`, then this again")
        }
        _ => bail!("this takes {}, and a Debian to run on", lacking.join(", ")),
    }
}

/// The release that this system is, if it is a Debian.
fn this_suite() -> String {
    let about = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |name: &str| {
        about
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    };
    match (value("ID"), value("VERSION_CODENAME")) {
        (Some("debian"), Some(suite)) => suite.to_owned(),
        _ => "bookworm".to_owned(),
    }
}
