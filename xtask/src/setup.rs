//! `cargo xtask setup`: brings what is missing, and says beforehand what that will be.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use cli::cache;
use lab::parts::Kernel;
use tempfile::{NamedTempFile, TempDir};

use crate::packages::{
    self, KOREAN_FONT, RECORD_TOOLS, REPORT_TOOLS, TEST_TOOLS, TOOLS, Tool, ignore_missing,
};
use crate::progress::{Step, step};
use crate::{grub, initramfs};

/// The kernel of the lab by the name that stays the same over its versions, as Debian and as Ubuntu
/// call it: a generic one, which has KVM and 9p.
const LAB_KERNELS: [&str; 2] = ["linux-image-amd64", "linux-image-generic"];

/// The kernel that stage 08 boots: one made for virtual machines, smaller and quicker.
const GUEST_KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// The package whose busybox needs no libraries, so that it can be all of a guest's user space.
const BUSYBOX: &str = "busybox-static";

/// GRUB for PCs with a BIOS, from which stage 07 boots Linux: its tools, its modules, and a library that a small system
/// lacks.
const GRUB: [&str; 3] = ["grub-common", "grub-pc-bin", "libdevmapper1.02.1"];

/// A floppy with GRUB, for those who need to rescue a system.
const GRUB_RESCUE: &str = "grub-rescue-pc";

/// The package with another program than Linux that stage 08 starts.
const MEMTEST: &str = "memtest86+";

/// The drivers of a kernel package that are kept; the others are most of its size and are for
/// hardware that the lab does not have.
const KEPT_DRIVERS: [&str; 6] = ["block", "char", "crypto", "net", "vhost", "virtio"];

/// Options of `cargo xtask setup`.
#[derive(clap::Args, Default)]
pub struct Args {
    /// Leave the lab out, on a machine whose own KVM runs every stage
    #[arg(long)]
    pub no_lab: bool,

    /// Bring the tools, too, that only the tests need
    #[arg(long)]
    pub tests: bool,

    /// Bring the tools, too, that set the reports' pages
    #[arg(long)]
    pub reports: bool,

    /// Bring ffmpeg and the fonts, too, that films of `cargo xtask record` are made with
    #[arg(long)]
    pub record: bool,
}

/// What set-up has found and done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing was missing.
    InPlace,
    /// All that was missing is there now.
    Complete,
    /// Something is still missing, which has been said. Only where packages do not come by apt.
    Incomplete,
}

/// What this machine lacks.
struct Missing {
    tools: Vec<&'static Tool>,
    lab_kernel: bool,
    guest_kernel: bool,
    busybox: bool,
    grub: bool,
    memtest: bool,
    lab: bool,
}

impl Missing {
    fn look(args: &Args) -> Self {
        let lacking = |tools: &'static [Tool]| {
            tools.iter().filter(|tool| packages::find_command(tool.command).is_none())
        };
        let mut tools: Vec<_> = lacking(TOOLS).collect();
        let lab_kernel = !args.no_lab && Kernel::find().is_err();
        let lab = !args.no_lab && (lab_kernel || !tools.is_empty() || !lab::is_ready());
        if args.tests {
            tools.extend(lacking(TEST_TOOLS));
        }
        if args.record {
            tools.extend(lacking(RECORD_TOOLS));
        }
        if args.reports {
            tools.extend(lacking(REPORT_TOOLS));
            tools.extend((!packages::has_korean_font()).then_some(&KOREAN_FONT));
        }
        Self {
            lab_kernel,
            guest_kernel: !cache::default_kernel().exists()
                || !initramfs::has_modules(&modules_path()),
            busybox: !busybox_path().exists(),
            // Elsewhere the system's own tools serve, if it has them: nothing needs them but one stage.
            grub: packages::has_apt() && !cache::grub().exists(),
            memtest: packages::has_apt() && !cache::memtest().exists(),
            lab,
            tools,
        }
    }

    fn is_nothing(&self) -> bool {
        let Self { tools, lab_kernel, guest_kernel, busybox, grub, memtest, lab } = self;
        let parts = [lab_kernel, guest_kernel, busybox, grub, memtest, lab];
        tools.is_empty() && !parts.into_iter().any(|missing| *missing)
    }

    /// A line for each thing that is to be done about it.
    fn plan(&self, apt: bool) -> Vec<String> {
        let mut plan = Vec::new();
        if !self.tools.is_empty() && apt {
            plan.push(format!("install {} with apt-get", names(&self.tools)));
        }
        let from = if apt { "fetch" } else { "take over from this system" };
        if self.lab_kernel {
            plan.push(format!("{from} the kernel of the lab"));
        }
        if self.guest_kernel {
            plan.push(format!("{from} the kernel that stage 08 boots"));
        }
        if self.busybox {
            plan.push(format!("{from} busybox, the user space that it boots to"));
        }
        if self.grub {
            plan.push("fetch GRUB, which boots Linux from a disk".to_owned());
        }
        if self.memtest {
            plan.push("fetch memtest86+, which boots as Linux does".to_owned());
        }
        if self.lab {
            plan.push(
                "make the lab: start its emulated machine once and save its state".to_owned(),
            );
        }
        plan
    }
}

/// Brings what is missing. With everything in place it only looks, and prints nothing.
pub fn run(args: &Args) -> Result<Done> {
    let apt = packages::has_apt();
    if Missing::look(args).is_nothing() {
        write_guests()?;
        return Ok(Done::InPlace);
    }
    fs::create_dir_all(cache::dir()).with_context(|| {
        format!("cannot make {} (XDG_CACHE_HOME names another place)", cache::dir().display())
    })?;
    let _lock = lock()?;
    // Another set-up may have brought it while this one waited.
    let missing = Missing::look(args);
    let plan = missing.plan(apt);
    if !plan.is_empty() {
        eprintln!("mini-kvm set-up will, with everything kept under {}:", cache::dir().display());
        plan.iter().for_each(|what| eprintln!("    - {what}"));
    }
    remove_leftovers();
    let done = bring(&missing, apt)?;
    match done {
        Done::InPlace => {}
        Done::Complete => eprintln!("Set-up is complete."),
        Done::Incomplete => {
            eprintln!("Set-up is not complete: bring what is missing and run it again.")
        }
    }
    Ok(done)
}

fn bring(missing: &Missing, apt: bool) -> Result<Done> {
    let mut done = Done::InPlace;
    // Without apt each part is tried, for a machine may do without some of them: one with a KVM of
    // its own needs no lab.
    let mut part = |name: &str, work: &mut dyn FnMut(&mut Step) -> Result<()>| {
        match (step(name, work), done) {
            (Ok(()), Done::InPlace) => done = Done::Complete,
            (Ok(()), _) => {}
            (Err(error), _) if apt => return Err(error),
            (Err(error), _) => {
                cli::print_error(&error);
                done = Done::Incomplete;
            }
        }
        Ok(())
    };
    if !missing.tools.is_empty() && apt {
        // Outside the moving line, for sudo may ask for a password.
        packages::ready_for_root()?;
        let names = names(&missing.tools);
        part(&format!("Installing {names}"), &mut |_| install(&missing.tools))?;
    }
    if missing.lab_kernel {
        part("Fetching the lab's kernel", &mut |_| bring_lab_kernel(apt))?;
    }
    if missing.guest_kernel {
        part("Fetching the guest's kernel", &mut |_| bring_guest_kernel(apt))?;
    }
    if missing.busybox {
        part("Fetching busybox", &mut |_| bring_busybox(apt))?;
    }
    if missing.grub {
        part("Fetching GRUB", &mut |_| bring_grub())?;
    }
    if missing.memtest {
        part("Fetching memtest86+", &mut |_| bring_memtest())?;
    }
    write_guests()?;
    if missing.lab {
        part("Making the lab", &mut |step| lab::setup(&mut |what| step.note(what)))?;
    }
    if !apt && (done == Done::Incomplete || !missing.tools.is_empty()) {
        done = Done::Incomplete;
        eprintln!(
            "Packages do not come by apt here. The line for this system brings what it lacks:"
        );
        packages::by_hand(&missing.tools).iter().for_each(|line| eprintln!("    {line}"));
    }
    Ok(done)
}

fn names(tools: &[&Tool]) -> String {
    tools.iter().map(|tool| tool.apt).collect::<Vec<_>>().join(", ")
}

/// How the names of what is not finished yet begin in the cache folder.
const UNFINISHED: &str = ".setup-";

/// Lets one set-up work at a time.
fn lock() -> Result<File> {
    let path = cache::dir().join("setup.lock");
    let lock = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    if lock.try_lock().is_err() {
        eprintln!("Waiting for another set-up to end.");
        lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(lock)
}

/// Removes what an interrupted set-up has left. Only who holds the lock may.
fn remove_leftovers() {
    let entries = fs::read_dir(cache::dir()).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(UNFINISHED))
    {
        let path = entry.path();
        let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    }
}

/// A folder in the cache which is gone when this is dropped.
fn unfinished_folder() -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(cache::dir());
    dir.with_context(|| format!("cannot make a folder in {}", cache::dir().display()))
}

fn unfinished_file() -> Result<NamedTempFile> {
    let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(cache::dir());
    file.with_context(|| format!("cannot make a file in {}", cache::dir().display()))
}

fn log() -> PathBuf {
    cache::dir().join("setup.log")
}

fn busybox_path() -> PathBuf {
    cache::dir().join("guest/busybox")
}

/// The default kernel's modules for the initramfs: `RELEASE/NAME.ko` and the lists of them.
fn modules_path() -> PathBuf {
    cache::dir().join("guest/modules")
}

fn install(tools: &[&Tool]) -> Result<()> {
    let packages: Vec<_> = tools.iter().map(|tool| tool.apt).collect();
    packages::apt_install(&packages, &log())
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
    let dir = unfinished_folder()?;
    packages::unpack(packages, dir.path(), &log())?;
    keep(dir.path())
}

fn bring_lab_kernel(apt: bool) -> Result<()> {
    let to = cache::lab_kernel();
    if apt {
        return unpack_kernel(&LAB_KERNELS, |dir| {
            // Debian 13 has moved the modules from /lib, which is a link there, to /usr/lib.
            if dir.join("usr/lib/modules").is_dir() {
                fs::create_dir_all(dir.join("lib"))?;
                fs::rename(dir.join("usr/lib/modules"), dir.join("lib/modules"))?;
            }
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
            publish(dir, &to)
        });
    }
    // Elsewhere the host's own kernel serves, where it may be read and is a modular one.
    let release = host_release()?;
    let (image, modules) = host_kernel(&release)?;
    ensure!(modules.is_dir(), "no modules of the running kernel in {}", modules.display());
    let dir = unfinished_folder()?;
    fs::create_dir_all(dir.path().join("boot"))?;
    fs::create_dir_all(dir.path().join("lib/modules"))?;
    symlink(image, dir.path().join(format!("boot/vmlinuz-{release}")))?;
    symlink(modules, dir.path().join(format!("lib/modules/{release}")))?;
    publish(dir.path(), &to)
}

/// Moves a finished folder to where it is kept. Whoever then removes the old name finds nothing, which
/// a temporary folder's guard takes without complaint.
fn publish(dir: &Path, to: &Path) -> Result<()> {
    fs::remove_dir_all(to).or_else(ignore_missing)?;
    fs::rename(dir, to).with_context(|| format!("cannot make {}", to.display()))
}

fn bring_guest_kernel(apt: bool) -> Result<()> {
    if apt {
        return unpack_kernel(&GUEST_KERNELS, |dir| {
            // Debian 13 has moved the modules to /usr/lib.
            let modules = ["lib/modules", "usr/lib/modules"].map(|path| dir.join(path));
            let modules = modules.iter().find(|path| path.is_dir()).context("it has no modules")?;
            let image = only_entry(&dir.join("boot"), "vmlinuz-")?;
            place_guest_kernel(&image, &only_entry(modules, "")?)
        });
    }
    let (image, modules) = host_kernel(&host_release()?)?;
    place_guest_kernel(&image, &modules)
}

/// Keeps a kernel and the modules that its guest needs. The modules come last: where they are, both are.
fn place_guest_kernel(image: &Path, modules: &Path) -> Result<()> {
    let kept = unfinished_folder()?;
    // A kernel of one piece has none.
    if modules.is_dir() {
        initramfs::collect_modules(modules, kept.path())?;
    }
    fs::remove_dir_all(modules_path()).or_else(ignore_missing)?;
    place(image, &cache::default_kernel())?;
    publish(kept.path(), &modules_path())
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
        .context("there is no busybox here")?;
    place(&binary, &busybox_path())
}

fn bring_grub() -> Result<()> {
    if !GRUB.iter().all(|package| packages::is_known(package)) {
        packages::ready_for_root()?;
        packages::apt_update_if_unknown(&GRUB, &log())?;
    }
    let mut wanted: Vec<_> = GRUB.map(str::to_owned).into();
    wanted.extend(packages::is_known(GRUB_RESCUE).then(|| GRUB_RESCUE.to_owned()));
    unpack(&wanted, |dir| {
        let kept = unfinished_folder()?;
        let keep = |path: &str| fs::rename(dir.join(path), kept.path().join(file_name(path)));
        keep("usr/bin/grub-mkimage").context("grub-common has no grub-mkimage")?;
        keep("usr/lib/grub/i386-pc").context("grub-pc-bin has no i386-pc")?;
        // Debian 13 has moved the libraries from /lib to /usr/lib.
        let library = "lib/x86_64-linux-gnu/libdevmapper.so.1.02.1";
        keep(library).or_else(|_| keep(&format!("usr/{library}"))).context("no libdevmapper")?;
        keep("usr/lib/grub-rescue/grub-rescue-floppy.img").or_else(ignore_missing)?;
        publish(kept.path(), &cache::grub())
    })
}

fn bring_memtest() -> Result<()> {
    if !packages::is_known(MEMTEST) {
        packages::ready_for_root()?;
        packages::apt_update_if_unknown(&[MEMTEST], &log())?;
    }
    unpack(&[MEMTEST.to_owned()], |dir| publish(&dir.join("boot"), &cache::memtest()))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Writes what is made of what was fetched, as far as that is there: the initramfs, and the disk with GRUB.
fn write_guests() -> Result<()> {
    if busybox_path().exists() && packages::find_command(initramfs::NASM).is_some() {
        write_initramfs()?;
    }
    if cache::default_kernel().exists() && cache::default_initrd().exists() {
        grub::refresh()?;
    }
    Ok(())
}

/// Writes the initramfs again where it is not what the scripts, busybox and the modules make now.
fn write_initramfs() -> Result<()> {
    let bytes = initramfs::build(&busybox_path(), &modules_path())?;
    let to = cache::default_initrd();
    if fs::read(&to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write_whole(&to, &bytes)
}

/// Writes a file of the cache, whole or not at all.
pub fn write_whole(to: &Path, bytes: &[u8]) -> Result<()> {
    let file = unfinished_file()?;
    fs::write(file.path(), bytes)?;
    persist(file, to)
}

/// Copies a file to where it is kept, whole or not at all.
fn place(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a path without a folder")?)?;
    let file = unfinished_file()?;
    fs::copy(from, file.path()).with_context(|| format!("cannot copy {}", from.display()))?;
    persist(file, to)
}

fn persist(file: NamedTempFile, to: &Path) -> Result<()> {
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
