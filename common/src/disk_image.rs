//! Introduced by stage 08: disks in a format of their own: qcow2.
//!
//! In a raw image a sector is at its place in the file. A qcow2 image ("QEMU copy on write", QEMU's
//! docs/interop/qcow2.rst) has tables for that, like the page tables of a processor, and grows as it is written to; it
//! may be an overlay, of which the sectors that were never written come from another image, its *backing file*. The
//! crate `imago` knows the format. Here stands what may be opened:
//!
//! - A file is qcow2 if it begins with the format's magic number, unless somebody says what it is. So that no guest
//!   turns its raw disk into a qcow2 image, which could name any file of the host as its backing file, a disk that was
//!   found to be raw takes no such first sector.
//! - Backing files are opened only if the caller says so, and read-only.
//! - Images whose data is in another file, or encrypted, are refused.
//!
//! For each image `imago` keeps up to 128 tables of clusters and 32 of their reference counts in memory, a cluster each:
//! 10 MiB with QEMU's clusters of 64 KiB, 320 MiB with the largest of 2 MiB.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, StorageOpenOptions};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::disk::{self, Access, FileSectors, SECTOR, Sectors};
use crate::error::{Blame, Blamed};

/// What a qcow2 image begins with.
const MAGIC: [u8; 4] = *b"QFI\xFB";

/// Images in a row, each the backing file of the one before.
const CHAIN_MAX: usize = 8;

/// Why a file cannot be a disk. The text says nothing of its name: the caller knows it.
#[derive(Debug, Error)]
pub enum Error {
    /// What holds for disks of any format.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// It is said to be qcow2, and isn't.
    #[error("this is no qcow2 image: it begins with {found:02x?}, expected {MAGIC:02x?}")]
    NotQcow2 {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// Its tables are not all there.
    #[error(
        "the qcow2 image is truncated: its table of {what} ends at byte {end}, the file at {len}"
    )]
    Truncated {
        /// What the table has.
        what: &'static str,
        /// Where the table ends.
        end: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// It needs a key.
    #[error(
        "the qcow2 image is encrypted, which is not supported: convert it with `qemu-img convert`"
    )]
    Encrypted,
    /// Its data is in another file.
    #[error(
        "the qcow2 image keeps its data in another file, which is not supported: convert it with `qemu-img convert`"
    )]
    DataFile,
    /// It is an overlay, and the caller does not want that.
    #[error(
        "the qcow2 image is an overlay over {0:?}: if you trust the image to name files of this machine, give the disk \
         with `backing`"
    )]
    Backing(String),
    /// What it is an overlay of cannot be used.
    #[error("the qcow2 image's backing file {name:?}: {source}")]
    BadBacking {
        /// As the image has it.
        name: String,
        /// What is wrong.
        source: io::Error,
    },
    /// The format's rules are broken.
    #[error("the qcow2 image is damaged or of an unknown kind: {0}")]
    Damaged(io::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Disk(error) => error.blame(),
            _ => Blame::Input,
        }
    }
}

/// How a disk lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// Sector n is at byte 512 × n.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// What the caller says of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What becomes of the guest's writes.
    pub access: Access,
    /// The format, or to look at the file.
    pub format: Option<Format>,
    /// Whether a qcow2 image may name a backing file.
    pub backing: bool,
}

/// Opens a file, or a block device, as a disk, as [`disk::open`] does it. Gives the format, too.
pub fn open(path: &Path, options: Options) -> Result<(Box<dyn Sectors>, Format), Error> {
    let Options { access, format, backing } = options;
    let (file, len) = disk::open_file(path, access)?;
    let is_qcow2 = first_bytes(&file)? == MAGIC;
    match format {
        Some(Format::Qcow2) | None if is_qcow2 || format.is_some() => {
            let image = Image::open(file, len, path, access == Access::ReadWrite, backing)?;
            Ok((disk::with_access(image, access)?, Format::Qcow2))
        }
        _ => {
            let mut raw = FileSectors::whole(file, len)?;
            if format.is_none() {
                raw.never_begin_with(MAGIC);
            }
            Ok((disk::with_access(raw, access)?, Format::Raw))
        }
    }
}

/// What the file begins with; zeros if it is shorter.
fn first_bytes(file: &File) -> Result<[u8; 4], Error> {
    let mut bytes = [0; 4];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(disk::Error::from(crate::file::Error::Read(error)).into())
        }
        _ => Ok(bytes),
    }
}

/// Looks at the fields of the header that `imago` leaves to others. Gives the binary logarithm of a cluster's length.
fn check_header(file: &File, len: u64) -> Result<u32, Error> {
    let mut header = [0; 60];
    file.read_exact_at(&mut header, 0).map_err(Error::Damaged)?;
    let found = [header[0], header[1], header[2], header[3]];
    if found != MAGIC {
        return Err(Error::NotQcow2 { found });
    }
    let u32_at = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    if u32_at(32) != 0 {
        return Err(Error::Encrypted);
    }
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    // Behind the end of a file `imago` finds zeros, which would be an empty disk.
    let within = |what, table: u64, bytes: u64| match table.saturating_add(bytes) {
        end if end > len => Err(Error::Truncated { what, end, len }),
        _ => Ok(()),
    };
    within("clusters", u64_at(40), 8 * u64::from(u32_at(36)))?;
    // What has no count of the first cluster's use, the header's own, makes `imago` 0.2.6 put that count there, take the
    // count for missing, and begin again without an end.
    let counts = u64_at(48);
    within("reference counts", counts, 8)?;
    let mut first = [0; 8];
    file.read_exact_at(&mut first, counts).map_err(Error::Damaged)?;
    // The table may have no cluster, nor its first entry a place: the lowest 9 bits mean nothing.
    if u32_at(56) == 0 || u64::from_be_bytes(first) >> 9 == 0 {
        let none = "nothing counts the use of its first cluster, try `qemu-img check -r all`";
        return Err(Error::Damaged(io::Error::other(none)));
    }
    Ok(u32_at(20))
}

/// A qcow2 image.
struct Image {
    image: FormatAccess<Storage>,
    count: u64,
    /// All of it is a part of one cluster.
    tiny: bool,
    /// The host could not write all of its cache back: see [`FileSectors`].
    lost: bool,
}

impl Image {
    fn open(file: File, len: u64, path: &Path, write: bool, backing: bool) -> Result<Self, Error> {
        let cluster_bits = check_header(&file, len)?;
        let options = StorageOpenOptions::new().filename(path).write(write);
        let storage = Storage::from_open_file(file, options).map_err(Error::Damaged)?;
        let mut qcow2 = Qcow2::<Storage>::open_image(storage, write).map_err(Error::Damaged)?;
        if qcow2.requires_external_data_file() {
            return Err(Error::DataFile);
        }
        match qcow2.implicit_backing_file().cloned() {
            Some(name) if !backing => return Err(Error::Backing(name)),
            Some(name) => {
                let gate = ReadOnly { deeper: CHAIN_MAX - 1 };
                let opened = qcow2.open_implicit_dependencies_gated(gate);
                opened.map_err(|source| Error::BadBacking { name, source })?;
            }
            None => qcow2.set_backing(None),
        }
        let image = FormatAccess::new(qcow2);
        match image.size() {
            size @ 0..512 => Err(disk::Error::Short(size).into()),
            size if !size.is_multiple_of(SECTOR as u64) => Err(disk::Error::Odd(size).into()),
            size => {
                let tiny = size.checked_shr(cluster_bits).unwrap_or(0) == 0;
                Ok(Self { image, count: size / SECTOR as u64, tiny, lost: false })
            }
        }
    }
}

/// Where sectors begin, in bytes, and how many bytes they have.
fn bytes(lba: u64, count: u64) -> (u64, u64) {
    (lba * SECTOR as u64, count * SECTOR as u64)
}

impl Sectors for Image {
    fn count(&self) -> u64 {
        self.count
    }

    fn read(&mut self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        self.image.read(data, bytes(lba, 0).0)
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> io::Result<()> {
        self.image.write(data, bytes(lba, 0).0)
    }

    /// The tables go to the file, which is then flushed as a raw one is.
    fn flush(&mut self) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.image.flush().and_then(|()| self.image.sync()).inspect_err(|_| self.lost = true)
    }

    fn write_zeroes(&mut self, lba: u64, count: u64, unmap: bool) -> io::Result<()> {
        // `imago` 0.2.6 would look for the end of the cluster before the last one: before the beginning, that is.
        if self.tiny {
            return disk::write_zeros(self, lba, count);
        }
        let (offset, len) = bytes(lba, count);
        match unmap {
            true => self.image.discard_to_zero(offset, len),
            false => self.image.write_zeroes(offset, len),
        }
    }

    /// Whole clusters are given back.
    fn discard(&mut self, lba: u64, count: u64) -> io::Result<()> {
        if self.tiny {
            return Ok(());
        }
        let (offset, len) = bytes(lba, count);
        match self.image.discard_to_any(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }
}

/// Opens the files that an image names: as disks that nobody writes to meanwhile, a limited number deep.
#[derive(Clone)]
struct ReadOnly {
    deeper: usize,
}

impl ImplicitOpenGate<Storage> for ReadOnly {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        let deeper = self.deeper.checked_sub(1).ok_or_else(|| {
            io::Error::other(format!("more than {CHAIN_MAX} images are overlays of one another"))
        })?;
        Ok(FormatAccess::new(builder.open(Self { deeper })?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options.get_filename().map(PathBuf::from).unwrap_or_default();
        let (file, _) = disk::open_file(&path, Access::ReadOnly).map_err(io::Error::other)?;
        Storage::from_open_file(file, options.write(false))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use imago::FormatCreateBuilder as _;
    use proptest::prelude::*;

    use super::*;

    /// Bytes in each test's disk: some clusters.
    const SIZE: usize = 16 << 10;
    const CLUSTER: usize = 2 << 10;

    /// An image in a file of that name, over another one.
    fn create(dir: &tempfile::TempDir, name: &str, backing: Option<(&str, &str)>) -> PathBuf {
        create_with(dir, name, backing, CLUSTER)
    }

    fn create_with(
        dir: &tempfile::TempDir,
        name: &str,
        backing: Option<(&str, &str)>,
        cluster: usize,
    ) -> PathBuf {
        let path = dir.path().join(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let options = StorageOpenOptions::new().filename(&path).write(true);
        let storage = Storage::from_open_file(file.unwrap(), options).unwrap();
        let mut builder = Qcow2::<Storage>::create_builder(storage).cluster_size(cluster);
        if let Some((name, format)) = backing {
            builder = builder.backing(name.into(), format.into());
        }
        builder.size(SIZE as u64).create().unwrap();
        path
    }

    fn options(access: Access) -> Options {
        Options { access, format: None, backing: false }
    }

    const WRITE: Options = Options { access: Access::ReadWrite, format: None, backing: false };
    const BACKING: Options = Options { access: Access::ReadOnly, format: None, backing: true };

    fn refused(path: &Path, options: Options) -> String {
        let error = open(path, options).err().expect("it was opened");
        assert_eq!(error.blame(), Blame::Input);
        error.to_string()
    }

    fn whole(disk: &mut dyn Sectors) -> Vec<u8> {
        let mut data = vec![0xEE; disk.count() as usize * SECTOR];
        disk.read(0, &mut data).unwrap();
        data
    }

    #[test]
    fn an_image_keeps_what_is_written_as_the_access_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = create(&dir, "image", None);
        let mut expected = vec![0; SIZE];
        for (access, byte, kept) in [
            (Access::ReadWrite, 1, true),
            (Access::Snapshot, 2, false),
            (Access::ReadOnly, 3, false),
        ] {
            let (mut disk, format) = open(&path, options(access)).unwrap();
            assert_eq!((format, disk.count()), (Format::Qcow2, (SIZE / SECTOR) as u64));
            assert!(whole(&mut *disk) == expected, "{access:?}");
            let written = disk.write(3, &[byte; 5 * SECTOR]);
            assert_eq!(written.is_ok(), access != Access::ReadOnly);
            disk.flush().unwrap();
            if kept {
                expected[3 * SECTOR..8 * SECTOR].fill(byte);
            }
            assert!(matches!(open(&path, WRITE), Err(Error::Disk(disk::Error::InUse))));
        }
        assert!(whole(&mut *open(&path, WRITE).unwrap().0) == expected);
    }

    #[test]
    fn a_raw_disk_does_not_become_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = fs::read(create(&dir, "image", None)).unwrap();
        let path = dir.path().join("raw");
        fs::write(&path, [0; 4 * SECTOR]).unwrap();
        let mut evil = image[..2 * SECTOR].to_vec();
        evil[..SECTOR].reverse();
        evil[..4].copy_from_slice(&MAGIC);

        let (mut disk, format) = open(&path, WRITE).unwrap();
        assert_eq!(format, Format::Raw);
        assert!(disk.write(0, &evil).is_err());
        disk.write(1, &evil).unwrap();
        disk.write(0, &[1; SECTOR]).unwrap();
        drop(disk);
        // Who says that it is raw has nothing to fear.
        let raw = Options { format: Some(Format::Raw), ..WRITE };
        open(&path, raw).unwrap().0.write(0, &evil).unwrap();
        let (mut disk, format) = open(&path, raw).unwrap();
        assert_eq!((format, &whole(&mut *disk)[..4]), (Format::Raw, &MAGIC[..]));
    }

    #[test]
    fn what_is_no_good_image_gets_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = create(&dir, "image", None);
        let image = fs::read(&path).unwrap();
        let with = |at: usize, bytes: &[u8], options: Options| {
            let mut image = image.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            fs::write(&path, image).unwrap();
            refused(&path, options)
        };
        let qcow2 = Options { format: Some(Format::Qcow2), ..WRITE };
        assert_eq!(
            with(0, b"MZ\0\0", qcow2),
            "this is no qcow2 image: it begins with [4d, 5a, 00, 00], expected [51, 46, 49, fb]"
        );
        let version = with(4, &9u32.to_be_bytes(), WRITE);
        assert!(
            version.starts_with("the qcow2 image is damaged or of an unknown kind: "),
            "{version}"
        );
        assert!(with(32, &1u32.to_be_bytes(), WRITE).starts_with("the qcow2 image is encrypted"));
        assert!(
            with(36, &u32::MAX.to_be_bytes(), WRITE).starts_with("the qcow2 image is truncated")
        );
        assert!(with(40, &[0xFF; 8], WRITE).starts_with("the qcow2 image is truncated"));
        assert_eq!(
            with(48, &[0xFF; 8], WRITE),
            format!(
                "the qcow2 image is truncated: its table of reference counts ends at byte {}, the file at {}",
                u64::MAX,
                image.len()
            )
        );
        let counts = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
        for (at, bytes) in [(counts, &[0, 0, 0, 0, 0, 0, 1, 0xFF][..]), (56, &[0; 4])] {
            let nothing =
                "the qcow2 image is damaged or of an unknown kind: nothing counts the use";
            assert!(with(at, bytes, WRITE).starts_with(nothing));
        }
        assert!(with(24, &513u64.to_be_bytes(), WRITE).starts_with("the disk has 513 bytes"));
        assert!(with(24, &0u64.to_be_bytes(), WRITE).starts_with("the disk has 0 bytes"));
        // A feature bit that nobody knows, and the one for a data file.
        assert!(
            with(72, &[0x80], WRITE).starts_with("the qcow2 image is damaged or of an unknown")
        );
        assert!(with(79, &[4], WRITE).starts_with("the qcow2 image keeps its data in another"));
        // Cut off, with as many entries as a table may have, though the file is long enough.
        fs::write(&path, &image[..40]).unwrap();
        assert!(refused(&path, WRITE).starts_with("the qcow2 image is damaged"));
        let mut huge = image.clone();
        huge[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
        fs::write(&path, huge).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(refused(&path, WRITE).starts_with("the qcow2 image is damaged"));
        fs::write(&path, []).unwrap();
        assert_eq!(refused(&path, WRITE), "the file is empty");
    }

    #[test]
    fn an_image_may_be_smaller_than_its_clusters() {
        let dir = tempfile::tempdir().unwrap();
        let path = create_with(&dir, "image", None, 64 << 10);
        let mut disk = open(&path, WRITE).unwrap().0;
        let mut expected = vec![7; SIZE];
        disk.write(0, &expected).unwrap();
        for (lba, count, unmap) in [(3, 2, true), (9, 1, false), (30, 2, true)] {
            disk.write_zeroes(lba, count, unmap).unwrap();
            expected[lba as usize * SECTOR..(lba + count) as usize * SECTOR].fill(0);
        }
        disk.discard(20, 4).unwrap();
        assert!(whole(&mut *disk)[..20 * SECTOR] == expected[..20 * SECTOR]);
        assert!(whole(&mut *disk)[24 * SECTOR..] == expected[24 * SECTOR..]);
    }

    #[test]
    fn an_overlay_is_opened_if_the_caller_wants_that() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("base"), vec![7; SIZE]).unwrap();
        let path = create(&dir, "over", Some(("base", "raw")));
        assert!(refused(&path, WRITE).starts_with("the qcow2 image is an overlay over \"base\": "));
        let backing = Options { backing: true, ..WRITE };
        let (mut disk, _) = open(&path, backing).unwrap();
        disk.write(1, &[8; SECTOR]).unwrap();
        let expected = [vec![7; SECTOR], vec![8; SECTOR], vec![7; SIZE - 2 * SECTOR]].concat();
        assert!(whole(&mut *disk) == expected);
        // Nobody writes to what is below it, and it does not either.
        assert!(matches!(
            disk::open(&dir.path().join("base"), Access::ReadWrite),
            Err(disk::Error::InUse)
        ));
        disk.flush().unwrap();
        drop(disk);
        assert!(fs::read(dir.path().join("base")).unwrap() == [7; SIZE]);

        for (name, base) in [("none", "nothing"), ("folder", "."), ("self", "self")] {
            let path = create(&dir, name, Some((base, "qcow2")));
            let why = refused(&path, BACKING);
            assert!(
                why.starts_with(&format!("the qcow2 image's backing file {base:?}: ")),
                "{why}"
            );
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Operation {
        Read,
        Write(u8),
        Zero(bool),
        Discard,
        Reopen,
    }

    fn operation() -> impl Strategy<Value = (Operation, u64, u64)> {
        let what = prop_oneof![
            Just(Operation::Read),
            any::<u8>().prop_map(Operation::Write),
            any::<bool>().prop_map(Operation::Zero),
            Just(Operation::Discard),
            Just(Operation::Reopen),
        ];
        (what, 0..(SIZE / SECTOR) as u64, 1..12u64)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_image_reads_as_a_raw_disk_does(operations in prop::collection::vec(operation(), 1..40)) {
            let dir = tempfile::tempdir().unwrap();
            let path = create(&dir, "image", None);
            let mut disk = Some(open(&path, WRITE).unwrap().0);
            let mut model = vec![0; SIZE];
            for (what, lba, count) in operations {
                let count = count.min((SIZE / SECTOR) as u64 - lba);
                let range = lba as usize * SECTOR..(lba + count) as usize * SECTOR;
                let now = disk.as_mut().unwrap();
                match what {
                    Operation::Read => {
                        let mut data = vec![0xEE; range.len()];
                        now.read(lba, &mut data).unwrap();
                        prop_assert!(data == model[range]);
                    }
                    Operation::Write(byte) => {
                        model[range.clone()].fill(byte);
                        now.write(lba, &model[range]).unwrap();
                    }
                    Operation::Zero(unmap) => {
                        now.write_zeroes(lba, count, unmap).unwrap();
                        model[range].fill(0);
                    }
                    Operation::Discard => {
                        now.discard(lba, count).unwrap();
                        // What is there now may be anything; what is beside it, not.
                        now.read(lba, &mut model[range]).unwrap();
                    }
                    Operation::Reopen => {
                        now.flush().unwrap();
                        drop(disk.take());
                        disk = Some(open(&path, WRITE).unwrap().0);
                    }
                }
                prop_assert!(whole(disk.as_deref_mut().unwrap()) == model);
            }
        }

        /// It is refused, or works as far as it does.
        #[test]
        fn damage_to_an_image_does_no_harm(
            damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in prop::option::of(any::<prop::sample::Index>()),
            overwrite: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = create(&dir, "image", None);
            open(&path, WRITE).unwrap().0.write(5, &[5; 9 * SECTOR]).unwrap();
            let mut image = fs::read(&path).unwrap();
            // Not in the data, where it would be found at once.
            let tables: Vec<usize> =
                (0..image.len()).filter(|&at| at < 120 || image[at] != 0 && image[at] != 5).collect();
            for (at, byte) in damages {
                image[tables[at.index(tables.len())]] = byte;
            }
            image.truncate(cut.map_or(image.len(), |cut| cut.index(image.len())));
            fs::write(&path, image).unwrap();
            if let Ok((mut disk, _)) = open(&path, WRITE) {
                let mut data = vec![0; SECTOR];
                let last = disk.count() - 1;
                for lba in [0, 6, 20, last] {
                    let _ = disk.read(lba.min(last), &mut data);
                    if overwrite {
                        let _ = disk.write(lba.min(last), &data);
                        let _ = disk.write_zeroes(lba.min(last), 1, true);
                        let _ = disk.discard(lba.min(last), 1);
                    }
                }
                let _ = disk.flush();
            }
        }
    }
}
