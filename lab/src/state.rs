//! The saved lab in the cache folder: made once, found by a hash of what it was made of.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
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
    _lock: File,
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
        Ok(Some(State { folder, arguments, _lock: lock }))
    }

    /// The saved lab, made first if it isn't there.
    ///
    /// # Errors
    /// A missing part that can't be got, or a lab that doesn't come up.
    pub fn ensure(progress: Progress<'_>) -> Result<State> {
        let kernel = Kernel::find()?;
        qemu::find()?;
        let initramfs = parts::initramfs(&kernel, progress)?;
        if let Some(state) = State::find()? {
            return Ok(state);
        }
        let lock = File::create(parts::folder().join("lock"))?;
        if lock.try_lock().is_err() {
            progress("waiting for another process that is making the lab");
            lock.lock()?;
        }
        if let Some(state) = State::find()? {
            return Ok(state);
        }
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

    /// Starts a machine from the saved one.
    ///
    /// # Errors
    /// QEMU can't be started or refuses what was saved.
    pub fn resume(&self) -> Result<Machine> {
        let mut machine = Machine::start(&self.arguments, &self.folder, Start::Resume)?;
        match machine.resume() {
            Ok(()) => Ok(machine),
            Err(error) => Err(error.context(format!(
                "the lab cannot be resumed from {}{}",
                self.folder.display(),
                machine.last_words()
            ))),
        }
    }
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

/// Removes what hasn't been used for longest. What a running lab uses is locked and stays.
fn prune(present: &Path) {
    let Ok(entries) = fs::read_dir(parts::folder()) else { return };
    let mut states: Vec<_> = entries
        .filter_map(|entry| {
            let folder = entry.ok()?.path();
            let is_state = folder.file_name()?.to_str()?.starts_with("state-");
            let used = folder.join("lock").metadata().and_then(|meta| meta.modified()).ok();
            (is_state && folder != present).then_some((used, folder))
        })
        .collect();
    states.sort();
    for (_, folder) in states.iter().rev().skip(KEPT - 1) {
        let lock = File::options().append(true).open(folder.join("lock"));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(folder);
        }
    }
}
