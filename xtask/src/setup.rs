//! `cargo xtask setup`: brings what is missing, and says beforehand what that will be.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use cli::cache;

use crate::packages::{self, TOOLS, Tool};
use crate::progress::step;
use crate::{initramfs, workspace};

/// The kernel of the lab by the name that stays the same over its versions, as Debian and as Ubuntu
/// call it: a generic one, which has KVM and 9p.
const LAB_KERNELS: [&str; 2] = ["linux-image-amd64", "linux-image-generic"];

/// The kernel that stage 08 boots: one made for virtual machines, smaller and quicker.
const GUEST_KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// The package whose busybox needs no libraries, so that it can be all of a guest's user space.
const BUSYBOX: &str = "busybox-static";

/// The drivers of a kernel package that are kept; the others are most of its size and are for
/// hardware that the lab does not have.
const KEPT_DRIVERS: [&str; 6] = ["block", "char", "crypto", "net", "vhost", "virtio"];

/// Options of `cargo xtask setup`.
#[derive(clap::Args, Default)]
pub struct Args {
    /// Leave the lab out, on a machine whose own KVM runs every stage
    #[arg(long)]
    no_lab: bool,
}

/// Brings what is missing, and says whether anything was. With everything in place it only looks, and
/// prints nothing.
pub fn run(args: &Args) -> Result<bool> {
    let apt = packages::has_apt();
    let tools: Vec<_> =
        TOOLS.iter().filter(|tool| packages::find_command(tool.command).is_none()).collect();
    let lab_kernel = !args.no_lab && !cache::lab_kernel().exists();
    let guest_kernel = !cache::default_kernel().exists();
    let busybox = !busybox_path().exists();

    let mut plan = Vec::new();
    if !tools.is_empty() && apt {
        plan.push(format!("install {} with apt-get", names(&tools)));
    }
    if lab_kernel {
        plan.push("fetch the kernel of the lab".to_owned());
    }
    if guest_kernel {
        plan.push("fetch the kernel that stage 08 boots".to_owned());
    }
    if busybox {
        plan.push("fetch busybox, the user space that it boots to".to_owned());
    }
    let lab = !args.no_lab && (lab_kernel || !tools.is_empty() || !lab::is_ready());
    if lab {
        plan.push("make the lab: start its emulated machine once and save its state".to_owned());
    }
    if !plan.is_empty() {
        eprintln!("mini-kvm set-up will, with everything kept under {}:", cache::dir().display());
        plan.iter().for_each(|what| eprintln!("    - {what}"));
    }
    fs::create_dir_all(cache::dir())
        .with_context(|| format!("cannot make {}", cache::dir().display()))?;

    if !tools.is_empty() {
        if apt {
            install(&tools)?;
        } else {
            eprintln!("Not here yet: {}. Install with", names(&tools));
            packages::by_hand(&tools).iter().for_each(|line| eprintln!("    {line}"));
            eprintln!("Going on with what is there.");
        }
    }
    if lab_kernel {
        step("Fetching the lab's kernel", |_| bring_lab_kernel(apt))?;
    }
    if guest_kernel {
        step("Fetching the guest's kernel", |_| bring_guest_kernel(apt))?;
    }
    if busybox {
        step("Fetching busybox", |_| bring_busybox(apt))?;
    }
    write_initramfs()?;
    if lab {
        step("Making the lab", |step| lab::setup(&mut |what| step.note(what)))?;
    }
    if !plan.is_empty() {
        eprintln!("Set-up is complete.");
    }
    Ok(!plan.is_empty())
}

fn names(tools: &[&Tool]) -> String {
    tools.iter().map(|tool| tool.apt).collect::<Vec<_>>().join(", ")
}

fn log() -> PathBuf {
    cache::dir().join("setup.log")
}

fn busybox_path() -> PathBuf {
    cache::dir().join("guest/busybox")
}

fn install(tools: &[&Tool]) -> Result<()> {
    let packages: Vec<_> = tools.iter().map(|tool| tool.apt).collect();
    // Outside the moving line, for sudo may ask for a password.
    packages::ready_for_root()?;
    step(&format!("Installing {}", packages.join(", ")), |_| {
        packages::apt_update_if_unknown(&packages, &log())?;
        packages::apt_install(&packages, &log())
    })
}

/// Unpacks the first of `metas` that apt knows, and gives `keep` the folder.
fn unpack_kernel(metas: &[&str], keep: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if !metas.iter().any(|meta| packages::is_known(meta)) {
        packages::ready_for_root()?;
        packages::apt_update_if_unknown(&metas[..1], &log())?;
    }
    let meta = metas.iter().find(|meta| packages::is_known(meta)).unwrap_or(&metas[0]);
    unpack(&packages::kernel_packages(meta)?, keep)
}

/// Unpacks packages in a folder which is gone afterwards.
fn unpack(packages: &[String], keep: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir_in(cache::dir()).context("cannot make a folder")?;
    packages::unpack(packages, dir.path(), &log())?;
    keep(dir.path())
}

fn bring_lab_kernel(apt: bool) -> Result<()> {
    let to = cache::lab_kernel();
    if apt {
        return unpack_kernel(&LAB_KERNELS, |dir| {
            fs::remove_dir_all(dir.join("usr")).or_else(ignore_missing)?;
            let modules = only_entry(&dir.join("lib/modules"), "")?;
            fs::remove_dir_all(modules.join("kernel/sound")).or_else(ignore_missing)?;
            for driver in fs::read_dir(modules.join("kernel/drivers"))? {
                let driver = driver?;
                if !KEPT_DRIVERS.iter().any(|kept| driver.file_name() == *kept) {
                    fs::remove_dir_all(driver.path())
                        .or_else(|_| fs::remove_file(driver.path()))?;
                }
            }
            only_entry(&dir.join("boot"), "vmlinuz-")?;
            let staged = dir.with_extension("staged");
            fs::rename(dir, &staged)?;
            // For whoever comes to move it; the temporary folder's guard finds an empty one.
            fs::create_dir(dir)?;
            fs::rename(&staged, &to).with_context(|| format!("cannot make {}", to.display()))
        });
    }
    // Elsewhere the host's own kernel serves, where it may be read and is a modular one.
    let release = host_release()?;
    let (image, modules) = host_kernel(&release)?;
    ensure!(modules.is_dir(), "no modules of the running kernel in {}", modules.display());
    fs::create_dir_all(to.join("boot"))?;
    fs::create_dir_all(to.join("lib/modules"))?;
    symlink(image, to.join(format!("boot/vmlinuz-{release}")))?;
    symlink(modules, to.join(format!("lib/modules/{release}")))?;
    Ok(())
}

fn bring_guest_kernel(apt: bool) -> Result<()> {
    let to = cache::default_kernel();
    if apt {
        return unpack_kernel(&GUEST_KERNELS, |dir| {
            place(&only_entry(&dir.join("boot"), "vmlinuz-")?, &to)
        });
    }
    place(&host_kernel(&host_release()?)?.0, &to)
}

fn bring_busybox(apt: bool) -> Result<()> {
    if apt {
        if !packages::is_known(BUSYBOX) {
            packages::ready_for_root()?;
            packages::apt_update_if_unknown(&[BUSYBOX], &log())?;
        }
        return unpack(&[BUSYBOX.to_owned()], |dir| {
            let binary = ["bin/busybox", "usr/bin/busybox"].map(|path| dir.join(path));
            let binary =
                binary.iter().find(|path| path.exists()).context("the package has none")?;
            place(binary, &busybox_path())
        });
    }
    let binary = ["busybox-static", "busybox.static", "busybox"]
        .into_iter()
        .find_map(packages::find_command)
        .with_context(|| {
            format!("no busybox here; install it: {}", packages::by_hand(&[]).join(" or "))
        })?;
    place(&binary, &busybox_path())
}

/// Writes the initramfs again where it is not what the init script and busybox make now.
fn write_initramfs() -> Result<()> {
    let bytes = initramfs::build(&busybox_path(), &workspace::root().join("guests/linux/init"))?;
    let to = cache::default_initrd();
    if fs::read(&to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let file = tempfile::NamedTempFile::new_in(cache::dir())?;
    fs::write(file.path(), bytes)?;
    persist(file, &to)
}

/// Copies a file to where it is kept, whole or not at all.
fn place(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a path without a folder")?)?;
    let file = tempfile::NamedTempFile::new_in(cache::dir())?;
    fs::copy(from, file.path()).with_context(|| format!("cannot copy {}", from.display()))?;
    persist(file, to)
}

fn persist(file: tempfile::NamedTempFile, to: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o755))?;
    file.persist(to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}

/// The one entry of `dir` whose name begins with `prefix`.
fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .collect();
    match entries.as_slice() {
        [entry] => Ok(entry.clone()),
        found => bail!("{} {prefix}* in {}, expected 1", found.len(), dir.display()),
    }
}

fn host_release() -> Result<String> {
    let output = Command::new("uname").arg("-r").output().context("cannot start uname")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The running kernel's image and modules, where a distribution keeps them.
fn host_kernel(release: &str) -> Result<(PathBuf, PathBuf)> {
    let modules = Path::new("/lib/modules").join(release);
    let image = [PathBuf::from(format!("/boot/vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .chain(["/boot/vmlinuz-linux", "/boot/vmlinuz"].map(PathBuf::from))
        .find(|path| fs::File::open(path).is_ok())
        .with_context(|| format!("no kernel image of {release} that may be read in /boot"))?;
    Ok((image, modules))
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
