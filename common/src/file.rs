//! Introduced by stage 04: the files that guests are made of, opened without surprises.
//!
//! What a user names may be a directory, a FIFO that never delivers, or a device. A guest's program, kernel or
//! disk is a regular file with at least one byte; anything else is refused before it is read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use thiserror::Error;

use crate::error::{Blame, Blamed};

/// Why a file cannot be used. The text says nothing of its name: the caller knows it.
#[derive(Debug, Error)]
pub enum Error {
    /// `open` failed.
    #[error("{}", explain(.0))]
    Open(io::Error),
    /// It is something else than a regular file.
    #[error("this is {0}, expected a regular file")]
    NotRegular(&'static str),
    /// It is nothing that a disk could be on.
    #[error("this is {0}, expected a regular file or a block device")]
    NotDisk(&'static str),
    /// It has no byte.
    #[error("the file is empty")]
    Empty,
    /// It has more bytes than its use allows.
    #[error("the file has {found} bytes, expected at most {most}")]
    TooLong {
        /// Its length in bytes.
        found: u64,
        /// The most that is allowed.
        most: u64,
    },
    /// Reading failed, or the file became shorter meanwhile.
    #[error("cannot read the file: {0}")]
    Read(io::Error),
    /// Writing failed, for instance because the disk is full.
    #[error("cannot write the file: {0}")]
    Write(io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Write(_) => Blame::Host,
            _ => Blame::Input,
        }
    }
}

/// The system's words without its number.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".into(),
        io::ErrorKind::PermissionDenied => "no permission to open the file".into(),
        _ => format!("cannot open the file: {error}"),
    }
}

/// Opens a regular file that is not empty, for reading, and gives its length in bytes.
pub fn open(path: &Path) -> Result<(File, u64), Error> {
    open_with(path, OpenOptions::new().read(true))
}

/// The same with other options, such as writing.
pub fn open_with(path: &Path, options: &mut OpenOptions) -> Result<(File, u64), Error> {
    // A FIFO without a writer would block `open` itself. O_NONBLOCK means nothing to a regular file.
    let file = options
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| cannot_open(path, error))?;
    let meta = file.metadata().map_err(Error::Open)?;
    if !meta.is_file() {
        return Err(Error::NotRegular(kind(meta.file_type())));
    }
    match meta.len() {
        0 => Err(Error::Empty),
        len => Ok((file, len)),
    }
}

/// The same for a disk, which may be a block device, too; but none that the host has mounted.
pub fn open_disk(path: &Path, options: &mut OpenOptions) -> Result<(File, u64), Error> {
    if !path.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
        return open_with(path, options).map_err(|error| match error {
            Error::NotRegular(found) => Error::NotDisk(found),
            error => error,
        });
    }
    // Without O_CREAT, O_EXCL has a meaning for block devices: not if one is mounted (open(2)).
    let mut file = options.custom_flags(libc::O_EXCL).open(path).map_err(Error::Open)?;
    // Its metadata has no length.
    match file.seek(SeekFrom::End(0)).map_err(Error::Read)? {
        0 => Err(Error::Empty),
        len => Ok((file, len)),
    }
}

/// Reads a whole file of at most `most` bytes. Nothing is allocated for a longer one.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>, Error> {
    let (file, found) = open(path)?;
    if found > most {
        return Err(Error::TooLong { found, most });
    }
    let mut bytes = Vec::with_capacity(found as usize);
    io::Read::read_to_end(&mut io::Read::take(file, most), &mut bytes).map_err(Error::Read)?;
    if bytes.is_empty() { Err(Error::Empty) } else { Ok(bytes) }
}

/// Makes an empty file, in the place of one that may be there, or opens a device, for writing.
pub fn create(path: &Path) -> Result<File, Error> {
    // As above, here for a FIFO without a reader. One that has a reader may take its time.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| cannot_open(path, error))?;
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| Error::Write(errno.into()))?;
    Ok(file)
}

/// Writes `bytes` to a new file, in the place of one that may be there, or to a device. Where that fails, no
/// part of a file is left behind.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes).map_err(|error| {
        if file.metadata().is_ok_and(|meta| meta.is_file()) {
            // The first error is the one to tell.
            let _ = fs::remove_file(path);
        }
        Error::Write(error)
    })
}

/// Why `open` failed: opened for writing, a directory is an error already.
fn cannot_open(path: &Path, error: io::Error) -> Error {
    match path.metadata() {
        Ok(meta) if meta.is_dir() || meta.file_type().is_fifo() || meta.file_type().is_socket() => {
            Error::NotRegular(kind(meta.file_type()))
        }
        _ => Error::Open(error),
    }
}

fn kind(kind: std::fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "no file"
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_regular_files_with_content_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("empty"), []).unwrap();
        std::fs::write(at("four"), b"four").unwrap();
        assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());

        let text = |path: &Path| open(path).unwrap_err().to_string();
        assert_eq!(text(&at("none")), "there is no such file");
        assert_eq!(text(&at("empty")), "the file is empty");
        assert_eq!(text(dir.path()), "this is a directory, expected a regular file");
        assert_eq!(text(&at("fifo")), "this is a FIFO, expected a regular file");
        assert_eq!(
            text(Path::new("/dev/zero")),
            "this is a character device, expected a regular file"
        );
        assert_eq!(open(&at("four")).unwrap().1, 4);

        let writable = open_with(dir.path(), OpenOptions::new().read(true).write(true));
        assert!(matches!(writable, Err(Error::NotRegular("a directory"))));
    }

    #[test]
    fn what_cannot_be_written_is_told_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        write(&at("new"), b"longer").unwrap();
        write(&at("new"), b"new").unwrap();
        assert_eq!(std::fs::read(at("new")).unwrap(), b"new");
        let error = |path: &Path| write(path, b"bytes").unwrap_err();
        assert!(matches!(error(dir.path()), Error::NotRegular("a directory")));
        assert!(matches!(error(&at("fifo")), Error::NotRegular("a FIFO")));
        assert!(matches!(error(&at("none/file")), Error::Open(_)));
        let full = error(Path::new("/dev/full"));
        assert!(matches!(full, Error::Write(_)) && full.blame() == Blame::Host);
        assert!(Path::new("/dev/full").exists());
    }

    #[test]
    fn a_huge_file_is_refused_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let huge = dir.path().join("huge");
        File::create(&huge).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(read(&huge, 1 << 20), Err(Error::TooLong { most: 0x10_0000, .. })));
        std::fs::write(&huge, b"small").unwrap();
        assert_eq!(read(&huge, 5).unwrap(), b"small");
        assert!(matches!(read(&huge, 4), Err(Error::TooLong { found: 5, most: 4 })));
    }
}
