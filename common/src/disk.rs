//! Introduced by stage 07: disks, sectors in a file.
//!
//! A drive reads and writes sectors of 512 bytes by number, and from time to time is told to see to it that
//! they would survive a power cut. [`Sectors`] is that and no more, so a drive does not know what
//! is behind it: an image that its writes change, one that stays as it is, or a list in a test.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FallocateFlags;
use thiserror::Error;

use crate::error::{Blame, Blamed};
use crate::file;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// What is written where zeros have to be.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a file cannot be a disk. The text says nothing of its name: the caller knows it.
#[derive(Debug, Error)]
pub enum Error {
    /// It is no file that could be one, or cannot be read.
    #[error(transparent)]
    File(#[from] file::Error),
    /// It can be read, but not written.
    #[error("cannot write to the file ({0}): give the disk as `ro` or `snapshot`")]
    NotWritable(io::Error),
    /// Somebody else has it.
    #[error(
        "the disk is in use already, by another machine or as another disk of this one: while it is written to it \
         can have one user only; give it as `ro` or `snapshot` to all of them"
    )]
    InUse,
    /// It ends within its first sector.
    #[error("the disk has {0} bytes, expected at least one sector of 512")]
    Short(u64),
    /// It ends within a sector.
    #[error("the disk has {0} bytes, expected a multiple of 512")]
    Odd(u64),
    /// There is nowhere to put what the guest writes.
    #[error("cannot make a temporary file for what the guest will write: {0}")]
    Overlay(io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::File(error) => error.blame(),
            Self::Overlay(_) => Blame::Host,
            _ => Blame::Input,
        }
    }
}

/// Where a disk's sectors are kept.
pub trait Sectors: Send {
    /// How many there are.
    fn count(&self) -> u64;
    /// Reads sectors from `lba` on: as many as `data`, whose length is a multiple of [`SECTOR`], has room for. All
    /// of them are below [`Sectors::count`].
    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes sectors in the same manner. They can be read from then on.
    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()>;
    /// Returns when all that was written would survive a power cut.
    fn flush(&mut self) -> io::Result<()>;
    /// Makes `count` sectors from `lba` on read as zeros. With `unmap` they need not keep their room on the host.
    fn write_zeroes(&mut self, lba: u64, count: u64, unmap: bool) -> io::Result<()> {
        let _ = unmap;
        write_zeros(self, lba, count)
    }
    /// Nobody needs what is in `count` sectors from `lba` on: they may read as anything from now on.
    fn discard(&mut self, lba: u64, count: u64) -> io::Result<()> {
        let _ = (lba, count);
        Ok(())
    }
    /// Whether every write fails.
    fn write_protected(&self) -> bool {
        false
    }
}

/// A disk chosen at run time.
impl<S: Sectors + ?Sized> Sectors for Box<S> {
    fn count(&self) -> u64 {
        (**self).count()
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        (**self).read(lba, data)
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        (**self).write(lba, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }

    fn write_zeroes(&mut self, lba: u64, count: u64, unmap: bool) -> io::Result<()> {
        (**self).write_zeroes(lba, count, unmap)
    }

    fn discard(&mut self, lba: u64, count: u64) -> io::Result<()> {
        (**self).discard(lba, count)
    }

    fn write_protected(&self) -> bool {
        (**self).write_protected()
    }
}

/// What becomes of a guest's writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "stage08", derive(serde::Serialize, serde::Deserialize))]
pub enum Access {
    /// They go to the file.
    ReadWrite,
    /// They fail: the disk is write-protected.
    ReadOnly,
    /// The guest sees them until the machine ends, the file never does.
    Snapshot,
}

/// Opens a file, or a block device, as a disk.
///
/// A disk that is written to has no other user: two systems that each keep in mind what they take to be on
/// it would ruin its file system. The lock (`flock`) binds all who ask for one, this program's other instances
/// among them, and goes with the program, however it ends. Where a file system has no locks there is none.
pub fn open(path: &Path, access: Access) -> Result<Box<dyn Sectors>, Error> {
    let (file, len) = open_file(path, access)?;
    with_access(FileSectors::whole(file, len)?, access)
}

/// Opens and locks what is to be a disk, for [`open`] and for formats of which a sector is not simply at its place in
/// the file. Gives its length in bytes.
pub(crate) fn open_file(path: &Path, access: Access) -> Result<(File, u64), Error> {
    let write = access == Access::ReadWrite;
    let opened = file::open_disk(path, OpenOptions::new().read(true).write(write));
    let (file, len) = match opened {
        Err(file::Error::Open(why))
            if write && file::open_disk(path, OpenOptions::new().read(true)).is_ok() =>
        {
            return Err(Error::NotWritable(why));
        }
        opened => opened?,
    };
    let locked = if write { file.try_lock() } else { file.try_lock_shared() };
    if let Err(TryLockError::WouldBlock) = locked {
        return Err(Error::InUse);
    }
    Ok((file, len))
}

/// Has the guest's writes go where `access` says.
pub(crate) fn with_access(
    disk: impl Sectors + 'static,
    access: Access,
) -> Result<Box<dyn Sectors>, Error> {
    Ok(match access {
        Access::ReadWrite => Box::new(disk),
        Access::ReadOnly => Box::new(WriteProtected(disk)),
        Access::Snapshot => {
            let overlay = tempfile::tempfile().map_err(Error::Overlay)?;
            Box::new(Snapshot::new(disk, overlay))
        }
    })
}

/// Where sector `lba` begins, in bytes.
fn offset(lba: u64) -> u64 {
    lba * SECTOR as u64
}

/// Writes zeros as one writes anything else.
pub(crate) fn write_zeros(
    disk: &mut (impl Sectors + ?Sized),
    lba: u64,
    count: u64,
) -> io::Result<()> {
    let end = lba + count;
    for lba in (lba..end).step_by(ZEROS.len() / SECTOR) {
        let bytes = (ZEROS.len() as u64).min(offset(end - lba));
        disk.write(lba, &ZEROS[..bytes as usize])?;
    }
    Ok(())
}

/// A disk in a file: sector n is at byte 512 × n.
///
/// What has been written is in the host's page cache. There every program sees it, and there it is when this
/// one has been killed.
pub struct FileSectors {
    file: File,
    count: u64,
    /// The host could not write all of its cache back.
    lost: bool,
    /// What no first sector may begin with.
    never: Option<[u8; 4]>,
}

impl FileSectors {
    /// A disk of `len` bytes. Bytes behind the last whole sector are not part of it.
    pub fn new(file: File, len: u64) -> Self {
        Self { file, count: len / SECTOR as u64, lost: false, never: None }
    }

    /// The same for a file that has to consist of whole sectors.
    pub(crate) fn whole(file: File, len: u64) -> Result<Self, Error> {
        match len {
            0..512 => Err(Error::Short(len)),
            len if !len.is_multiple_of(SECTOR as u64) => Err(Error::Odd(len)),
            _ => Ok(Self::new(file, len)),
        }
    }

    /// From now on, a first sector that begins so is not written.
    #[cfg(feature = "stage08")]
    pub(crate) fn never_begin_with(&mut self, bytes: [u8; 4]) {
        self.never = Some(bytes);
    }

    /// Has the file system itself make zeros of sectors, which takes no time.
    fn fallocate(&self, lba: u64, count: u64, how: FallocateFlags) -> io::Result<()> {
        let how = how | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, how, offset(lba), offset(count))?)
    }
}

impl Sectors for FileSectors {
    fn count(&self) -> u64 {
        self.count
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset(lba))
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        if lba == 0 && self.never.is_some_and(|bytes| data.starts_with(&bytes)) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.file.write_all_at(data, offset(lba))
    }

    /// `fdatasync`. Linux reports a failure of it once; what could not be written is then clean in its cache, and the
    /// next call succeeds. It would be a lie to the guest, so a disk that has failed once fails for good.
    fn flush(&mut self) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.file.sync_data().inspect_err(|_| self.lost = true)
    }

    /// Not all file systems, and not all devices, can do it by themselves.
    fn write_zeroes(&mut self, lba: u64, count: u64, unmap: bool) -> io::Result<()> {
        let hole = unmap && self.fallocate(lba, count, FallocateFlags::PUNCH_HOLE).is_ok();
        if hole || self.fallocate(lba, count, FallocateFlags::ZERO_RANGE).is_ok() {
            return Ok(());
        }
        write_zeros(self, lba, count)
    }

    /// Gives the room back to the host. Where that can't be, the sectors stay as they are.
    fn discard(&mut self, lba: u64, count: u64) -> io::Result<()> {
        let _ = self.fallocate(lba, count, FallocateFlags::PUNCH_HOLE);
        Ok(())
    }
}

/// A disk that can only be read.
struct WriteProtected<S>(S);

impl<S: Sectors> Sectors for WriteProtected<S> {
    fn count(&self) -> u64 {
        self.0.count()
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read(lba, data)
    }

    fn write(&mut self, _lba: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn discard(&mut self, _lba: u64, _count: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn write_protected(&self) -> bool {
        true
    }
}

/// A disk of which only the machine knows that it was written to.
///
/// Sectors that were written are in a second file, at the same place as in the first: a sparse file, which takes as
/// much room as the guest has written. It has no name, so it is gone when the program is.
struct Snapshot<S> {
    base: S,
    overlay: File,
    /// One bit a sector that has been written, 64 sectors to a number.
    written: HashMap<u64, u64>,
}

impl<S: Sectors> Snapshot<S> {
    fn new(base: S, overlay: File) -> Self {
        Self { base, overlay, written: HashMap::new() }
    }

    fn is_written(&self, lba: u64) -> bool {
        self.written.get(&(lba / 64)).is_some_and(|bits| bits & 1 << (lba % 64) != 0)
    }

    /// Cuts a range into runs of sectors that are all in the same file.
    fn runs(&self, mut range: Range<u64>) -> impl Iterator<Item = (bool, Range<u64>)> {
        std::iter::from_fn(move || {
            let first = range.start;
            let written = (first < range.end).then(|| self.is_written(first))?;
            range.start = (first..range.end)
                .find(|&lba| self.is_written(lba) != written)
                .unwrap_or(range.end);
            Some((written, first..range.start))
        })
    }
}

impl<S: Sectors> Sectors for Snapshot<S> {
    fn count(&self) -> u64 {
        self.base.count()
    }

    fn read(&mut self, lba: u64, mut data: &mut [u8]) -> io::Result<()> {
        let runs: Vec<_> = self.runs(lba..lba + (data.len() / SECTOR) as u64).collect();
        for (written, run) in runs {
            let (now, later) = data.split_at_mut((run.end - run.start) as usize * SECTOR);
            data = later;
            match written {
                true => self.overlay.read_exact_at(now, offset(run.start))?,
                false => self.base.read(run.start, now)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        self.overlay.write_all_at(data, offset(lba))?;
        for lba in lba..lba + (data.len() / SECTOR) as u64 {
            *self.written.entry(lba / 64).or_default() |= 1 << (lba % 64);
        }
        Ok(())
    }

    /// What will be thrown away needs no power cut to be lost.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk in memory, gone with the machine.
impl Sectors for Vec<u8> {
    fn count(&self) -> u64 {
        (self.len() / SECTOR) as u64
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self[offset(lba) as usize..][..data.len()]);
        Ok(())
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        self[offset(lba) as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    /// A file of `sectors` sectors, each filled with its number.
    fn image(dir: &tempfile::TempDir, sectors: u8) -> PathBuf {
        let path = dir.path().join("disk.img");
        fs::write(&path, numbered(sectors)).unwrap();
        path
    }

    fn numbered(sectors: u8) -> Vec<u8> {
        (0..sectors).flat_map(|n| [n; SECTOR]).collect()
    }

    fn refused(path: &Path, access: Access) -> Error {
        open(path, access).err().expect("it was opened")
    }

    #[test]
    fn what_is_written_goes_where_the_access_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 4);
        let mut sector = [0; SECTOR];

        let mut disk = open(&path, Access::ReadOnly).unwrap();
        assert!(disk.write_protected());
        assert!(disk.write(1, &[9; SECTOR]).is_err());
        disk.read(1, &mut sector).unwrap();
        assert_eq!(sector, [1; SECTOR]);
        drop(disk);

        let mut disk = open(&path, Access::Snapshot).unwrap();
        disk.write(1, &[9; SECTOR]).unwrap();
        disk.flush().unwrap();
        disk.read(1, &mut sector).unwrap();
        assert_eq!((sector, disk.write_protected()), ([9; SECTOR], false));
        drop(disk);
        assert_eq!(fs::read(&path).unwrap(), numbered(4));

        let mut disk = open(&path, Access::ReadWrite).unwrap();
        disk.write(1, &[9; SECTOR]).unwrap();
        assert_eq!(fs::read(&path).unwrap()[SECTOR..2 * SECTOR], [9; SECTOR], "at once");
    }

    #[test]
    fn a_disk_that_is_written_to_has_one_user() {
        use Access::*;
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 1);
        for (first, second, together) in [
            (ReadWrite, ReadWrite, false),
            (ReadWrite, ReadOnly, false),
            (Snapshot, ReadWrite, false),
            (ReadOnly, Snapshot, true),
            (Snapshot, Snapshot, true),
        ] {
            let _first = open(&path, first).unwrap();
            match open(&path, second) {
                Ok(_) => assert!(together, "{first:?} {second:?}"),
                Err(error) => assert!(matches!(error, Error::InUse) && !together, "{error}"),
            }
        }
        open(&path, ReadWrite).unwrap();
    }

    /// As a user who isn't root: to root all files are writable.
    #[test]
    fn a_file_that_cannot_be_written_is_no_disk_to_write_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 1);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
        let open_all = move || {
            #[expect(unsafe_code, reason = "the standard library has no way to be somebody else")]
            // SAFETY: the call takes no pointer, and changes this thread only.
            unsafe {
                libc::setfsuid(65534);
            }
            let error = refused(&path, Access::ReadWrite);
            assert!(matches!(error, Error::NotWritable(_)) && error.blame() == Blame::Input);
            assert!(error.to_string().ends_with("give the disk as `ro` or `snapshot`"), "{error}");
            open(&path, Access::ReadOnly).unwrap();
            open(&path, Access::Snapshot).unwrap();
        };
        std::thread::spawn(open_all).join().unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 2);
        let file = File::options().write(true).open(&path).unwrap();
        for (len, expected) in [
            (1023, "the disk has 1023 bytes, expected a multiple of 512"),
            (511, "the disk has 511 bytes, expected at least one sector of 512"),
            (0, "the file is empty"),
        ] {
            file.set_len(len).unwrap();
            assert_eq!(refused(&path, Access::ReadOnly).to_string(), expected);
        }
        for (path, what) in
            [(dir.path(), "a directory"), (Path::new("/dev/null"), "a character device")]
        {
            let error = refused(path, Access::ReadWrite);
            let expected = format!("this is {what}, expected a regular file or a block device");
            assert_eq!(error.to_string(), expected);
            assert_eq!(error.blame(), Blame::Input);
        }
    }

    proptest! {
        #[test]
        fn a_snapshot_reads_as_a_disk_that_was_written_to(
            operations in prop::collection::vec((any::<bool>(), 0..200u64, 1..100usize, any::<u8>()), 1..60),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&numbered(200), 0).unwrap();
            let base = FileSectors::new(file.try_clone().unwrap(), offset(200));
            let mut snapshot = Snapshot::new(base, tempfile::tempfile().unwrap());
            let mut model = numbered(200);
            for (write, lba, count, byte) in operations {
                let count = count.min(200 - lba as usize);
                let mut data = vec![byte; count * SECTOR];
                if write {
                    snapshot.write(lba, &data).unwrap();
                    model.write(lba, &data).unwrap();
                } else {
                    snapshot.read(lba, &mut data).unwrap();
                    prop_assert_eq!(&data, &model[offset(lba) as usize..][..data.len()]);
                }
            }
            let mut base = vec![0; 200 * SECTOR];
            file.read_exact_at(&mut base, 0).unwrap();
            prop_assert_eq!(base, numbered(200));
        }
    }
}
