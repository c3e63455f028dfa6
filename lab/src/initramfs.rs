//! A `newc` archive, the form in which Linux takes its first file system.
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst.)
//!
//! Used for the lab's own initramfs and for the one that stage 08 boots by default.

use std::io;

use cpio::newc::{Builder, ModeFileType, trailer};

/// An archive that grows entry by entry. Everything in it belongs to root and has no date, so that
/// the same contents give the same bytes.
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive with nothing in it.
    pub fn new() -> Archive {
        Archive { bytes: Vec::new(), entries: 0 }
    }

    /// Adds an empty folder. A folder has to come before what it contains.
    ///
    /// # Errors
    /// None in practice: the archive is in memory. The same holds below.
    pub fn folder(&mut self, name: &str) -> io::Result<&mut Archive> {
        self.entry(name, ModeFileType::Directory, 0o755, &[])
    }

    /// Adds a file with the given permission bits.
    ///
    /// # Errors
    /// Contents of 4 GiB or more, which the format can't express.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<&mut Archive> {
        self.entry(name, ModeFileType::Regular, mode, contents)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// See [`Archive::folder`].
    pub fn link(&mut self, name: &str, target: &str) -> io::Result<&mut Archive> {
        self.entry(name, ModeFileType::Symlink, 0o777, target.as_bytes())
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// See [`Archive::folder`].
    pub fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<&mut Archive> {
        let builder = Builder::new(name).rdev_major(major).rdev_minor(minor);
        self.write(builder.mode(0o600).set_mode_file_type(ModeFileType::Char), &[])
    }

    /// The whole archive.
    ///
    /// # Errors
    /// See [`Archive::folder`].
    pub fn finish(self) -> io::Result<Vec<u8>> {
        trailer(self.bytes)
    }

    fn entry(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        contents: &[u8],
    ) -> io::Result<&mut Archive> {
        self.write(Builder::new(name).mode(mode).set_mode_file_type(kind), contents)
    }

    fn write(&mut self, builder: Builder, contents: &[u8]) -> io::Result<&mut Archive> {
        let size = u32::try_from(contents.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a file of 4 GiB or more"))?;
        self.entries += 1;
        let mut writer = builder.ino(self.entries).nlink(1).write(&mut self.bytes, size);
        io::Write::write_all(&mut writer, contents)?;
        writer.finish()?;
        Ok(self)
    }
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use cpio::newc::Reader;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kinds_and_modes_are_the_kernels() {
        let mut archive = Archive::new();
        archive.folder("dev").unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"#!").unwrap();
        archive.link("sh", "init").unwrap();
        let bytes = archive.finish().unwrap();
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        loop {
            let reader = Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            found.push((entry.name().to_owned(), entry.mode(), entry.rdev_major()));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("dev", 0o040_755, 0),
            ("dev/console", 0o020_600, 5),
            ("init", 0o100_755, 0),
            ("sh", 0o120_777, 0),
        ];
        assert_eq!(found, expected.map(|(name, mode, major)| (name.to_owned(), mode, major)));
    }

    proptest! {
        #[test]
        fn contents_of_any_length_come_back(files in vec(vec(any::<u8>(), 0..50), 0..6)) {
            let mut archive = Archive::new();
            for (number, contents) in files.iter().enumerate() {
                archive.file(&"f".repeat(number + 1), 0o644, contents).unwrap();
            }
            let bytes = archive.finish().unwrap();
            let mut rest = &bytes[..];
            for contents in &files {
                let mut reader = Reader::new(rest).unwrap();
                let mut found = Vec::new();
                reader.read_to_end(&mut found).unwrap();
                prop_assert_eq!(&found, contents);
                rest = reader.finish().unwrap();
            }
            prop_assert!(Reader::new(rest).unwrap().entry().is_trailer());
        }
    }
}
