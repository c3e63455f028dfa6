//! The saved lab in the cache folder: made once, found by a hash of what it was made of.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::parts::{self, Kernel, Progress};
use crate::protocol::{Decoder, Frame, VERSION};
use crate::qemu::{self, Machine, Start};

/// How long the lab may take to boot on the slowest host that makes sense.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// How many saved labs stay in the cache: the present one, and those that were used last, such as
/// the ones of other work trees.
const KEPT: usize = 4;

/// A saved lab. It isn't pruned while this lives.
pub struct State {
    folder: PathBuf,
    arguments: Vec<OsString>,
    /// Locked as long as this lives. A file of its own for each lab that was ever saved.
    lock: File,
}

impl State {
    /// The saved lab, if it is there. Costs a few system calls.
    ///
    /// # Errors
    /// The lab is not set up, with what is missing.
    pub fn find() -> Result<Option<State>> {
        let kernel = Kernel::find()?;
        let initramfs = parts::initramfs_path(&kernel);
        if !initramfs.is_file() {
            qemu::find()?;
            return Ok(None);
        }
        let arguments = qemu::arguments(&kernel.image, &initramfs);
        State::open(place(&arguments, &kernel, &initramfs)?, arguments)
    }

    /// The saved lab, made first if only the saving is to be done.
    ///
    /// # Errors
    /// The lab is not set up, or doesn't come up.
    pub fn ready(progress: Progress<'_>) -> Result<State> {
        match State::find().context("the lab is not set up (run `cargo xtask setup`)")? {
            Some(state) => Ok(state),
            None => State::ensure(progress),
        }
    }

    fn open(folder: PathBuf, arguments: Vec<OsString>) -> Result<Option<State>> {
        let Ok(lock) = File::options().append(true).open(folder.join("lock")) else {
            return Ok(None);
        };
        lock.lock_shared()?;
        // It may have been pruned between these two lines.
        if !folder.join(qemu::DEVICES_FILE).is_file() {
            return Ok(None);
        }
        let _ = lock.set_modified(SystemTime::now());
        Ok(Some(State { folder, arguments, lock }))
    }

    /// The saved lab, made first if it isn't there.
    ///
    /// # Errors
    /// A missing part that can't be got, or a lab that doesn't come up.
    pub fn ensure(progress: Progress<'_>) -> Result<State> {
        if let Some(state) = State::find()? {
            return Ok(state);
        }
        let _making = lock(progress)?;
        if let Some(state) = State::find()? {
            return Ok(state);
        }
        let kernel = Kernel::find()?;
        let initramfs = parts::initramfs(&kernel, progress)?;
        // The initramfs may have been all that was missing.
        if let Some(state) = State::find()? {
            return Ok(state);
        }
        remove_leftovers();
        progress("starting the lab once and saving it (about ten seconds)");
        let arguments = qemu::arguments(&kernel.image, &initramfs);
        let folder = place(&arguments, &kernel, &initramfs)?;
        let new = TempDir::new_in(parts::folder())?;
        boot_and_save(&arguments, new.path())?;
        File::create(new.path().join("lock"))?;
        // A folder without its files is what is left of an interrupted pruning.
        let _ = fs::remove_dir_all(&folder);
        parts::publish(new, &folder)?;
        prune(&folder);
        State::open(folder, arguments)?.context("the saved lab has vanished")
    }

    /// Removes a saved lab that can't be resumed, so that it is made anew. If that has happened
    /// meanwhile, the new one stays.
    ///
    /// # Errors
    /// Its folder can't be removed.
    pub fn discard(&self) -> Result<()> {
        let _making = lock(&mut |_| {})?;
        let ours = self.lock.metadata()?.ino();
        if fs::metadata(self.folder.join("lock")).is_ok_and(|lock| lock.ino() == ours) {
            fs::remove_dir_all(&self.folder)
                .with_context(|| format!("cannot remove {}", self.folder.display()))?;
        }
        Ok(())
    }

    /// Starts a machine from the saved one.
    ///
    /// # Errors
    /// QEMU can't be started or refuses what was saved.
    pub fn resume(&self) -> Result<Machine> {
        let mut machine = Machine::start(&self.arguments, &self.folder, Start::Resume)?;
        match machine.resume() {
            Ok(()) => Ok(machine),
            Err(error) => bail!("{error:#}{}", machine.last_words()),
        }
    }
}

/// Lets one process at a time change what is in the lab's folder, which is made if it is missing.
fn lock(progress: Progress<'_>) -> Result<File> {
    fs::create_dir_all(parts::folder())
        .with_context(|| format!("cannot make the folder {}", parts::folder().display()))?;
    let path = parts::folder().join("lock");
    let lock = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    if lock.try_lock().is_err() {
        progress("waiting for another process that is making the lab");
        lock.lock()?;
    }
    Ok(lock)
}

/// Where the lab with these parts is saved: a folder named after all that determines it. Files are
/// told apart by path, size and time: reading them would cost more than the resume.
fn place(arguments: &[OsString], kernel: &Kernel, initramfs: &Path) -> Result<PathBuf> {
    let mut inputs: Vec<Vec<u8>> = vec![VERSION.to_le_bytes().to_vec()];
    inputs.extend(arguments.iter().map(|argument| argument.as_bytes().to_vec()));
    for file in [&qemu::find()?, &kernel.image, initramfs] {
        inputs.push(qemu::identity(file)?);
    }
    Ok(parts::folder().join(format!("state-{}", parts::hash(inputs))))
}

fn boot_and_save(arguments: &[OsString], folder: &Path) -> Result<()> {
    let mut machine = Machine::start(arguments, folder, Start::Boot)?;
    match wait_until_ready(&machine.port) {
        Ok(()) => machine.save(),
        Err(error) => {
            Err(error.context(format!("the lab does not come up{}", machine.last_words())))
        }
    }
}

fn wait_until_ready(mut port: &UnixStream) -> Result<()> {
    let deadline = Instant::now() + BOOT_LIMIT;
    let mut decoder = Decoder::default();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("not ready after {} s", BOOT_LIMIT.as_secs());
        }
        port.set_read_timeout(Some(left))?;
        match std::io::Read::read(&mut port, &mut buffer) {
            Ok(0) => bail!("the machine has ended"),
            Ok(bytes) => decoder.push(&buffer[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        match decoder.next_frame()? {
            None => {}
            Some(Frame::Ready(VERSION)) => return Ok(()),
            Some(frame) => bail!("the agent greets with {frame:?}"),
        }
    }
}

/// Removes what killed processes have left half made. Only who holds the lock makes such.
fn remove_leftovers() {
    for path in entries() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".tmp") {
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }
}

/// Removes what hasn't been used for longest. What a running lab uses is locked and stays.
fn prune(present: &Path) {
    for (_, folder) in by_use("state-", |folder| folder.join("lock")).into_iter().skip(KEPT) {
        let lock = File::options().append(true).open(folder.join("lock"));
        if folder != present && lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(folder);
        }
    }
    for (_, archive) in by_use("initramfs-", Path::to_path_buf).into_iter().skip(KEPT) {
        let _ = fs::remove_file(archive);
    }
}

/// The entries of the lab's folder whose names begin with `prefix`, the last used first; `dated`
/// gives the file whose date says so.
fn by_use(prefix: &str, dated: impl Fn(&Path) -> PathBuf) -> Vec<(Option<SystemTime>, PathBuf)> {
    let mut found: Vec<_> = entries()
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .map(|path| (dated(&path).metadata().and_then(|meta| meta.modified()).ok(), path))
        .collect();
    found.sort_by(|one, other| other.cmp(one));
    found
}

fn entries() -> impl Iterator<Item = PathBuf> {
    fs::read_dir(parts::folder()).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}
