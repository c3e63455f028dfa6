//! Introduced by stage 08: unpacked kernels, kept for the next boot.
//!
//! A file is named after the BLAKE3 hash of the payload that it came out of, so that another kernel, or a newer one
//! at the same path, is another file. It holds the vmlinux, which tools for ELF files read, and behind it 32 bytes:
//! the hash of all before them. What does not have its hash is not used.
//!
//! Two programs may fill the cache at once: a file gets its name when it is complete, and is never changed.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use blake3::{Hash, Hasher, OUT_LEN};

/// How many kernels are kept, the ones last used.
pub const KEPT: usize = 4;

/// How many bytes they may have together.
pub const KEPT_BYTES: u64 = 512 << 20;

/// How the names of files begin that are not complete yet.
const UNFINISHED: &str = ".unfinished-";

/// After so long nobody is at work on such a file any more.
const FORGOTTEN: Duration = Duration::from_secs(3600);

/// A folder with unpacked kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// A cache in `folder`, which is made when something is kept.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where the kernel that comes out of `payload` is kept, or would be.
    pub fn path(&self, payload: &[u8]) -> PathBuf {
        self.folder.join(format!("{}.elf", blake3::hash(payload).to_hex()))
    }

    /// The kernel that is kept at `path`, from its start on, if it is there and whole.
    pub fn find(&self, path: &Path) -> Option<File> {
        let mut file = File::open(path).ok()?;
        if !is_whole(&mut file).unwrap_or(false) {
            // Another program may have replaced it meanwhile; then it is lost, and unpacked once more.
            let _ = fs::remove_file(path);
            return None;
        }
        // Without it the kernel only leaves the cache earlier.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// Keeps `kernel` at `path`, and removes what has not been used for longest if that is too much.
    pub fn keep(&self, path: &Path, kernel: &[u8]) -> io::Result<()> {
        if kernel.len() as u64 > KEPT_BYTES {
            return Ok(());
        }
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.folder)?;
        file.write_all(kernel)?;
        file.write_all(blake3::hash(kernel).as_bytes())?;
        file.persist(path)?;
        self.trim()
    }

    fn trim(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let (path, meta) = match entry.and_then(|entry| Ok((entry.path(), entry.metadata()?))) {
                Ok(entry) => entry,
                // Another program has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let used = meta.modified()?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with(UNFINISHED) {
                kept.push((used, meta.len(), path));
            } else if now.duration_since(used).is_ok_and(|age| age > FORGOTTEN) {
                remove(&path)?;
            }
        }
        kept.sort_unstable_by(|a, b| b.cmp(a));
        let mut bytes = 0;
        for (at, (_, len, path)) in kept.into_iter().enumerate() {
            bytes += len;
            if at >= KEPT || bytes > KEPT_BYTES {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Removes a file that another program may remove at the same time.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether a file ends in the hash of what stands before. It is left at its start.
fn is_whole(file: &mut File) -> io::Result<bool> {
    let Some(len) = file.metadata()?.len().checked_sub(OUT_LEN as u64) else { return Ok(false) };
    let mut hasher = Hasher::new();
    hasher.update_reader(Read::by_ref(file).take(len))?;
    let mut hash = [0; OUT_LEN];
    file.read_exact(&mut hash)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(hasher.finalize() == Hash::from_bytes(hash))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn content(cache: &Cache, path: &Path) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        cache.find(path)?.read_to_end(&mut bytes).unwrap();
        bytes.truncate(bytes.len() - OUT_LEN);
        Some(bytes)
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn what_is_kept_is_found_again_by_what_it_came_from() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("not/there/yet"));
        let (path, other) = (cache.path(b"packed"), cache.path(b"packed otherwise"));
        assert_ne!(path, other);
        assert!(cache.find(&path).is_none());
        cache.keep(&path, b"kernel").unwrap();
        assert_eq!(content(&cache, &path).unwrap(), b"kernel");
        assert!(cache.find(&other).is_none());
    }

    #[test]
    fn what_is_not_whole_is_not_used_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let path = cache.path(b"packed");
        cache.keep(&path, &[7; 100_000]).unwrap();
        let whole = fs::read(&path).unwrap();
        let mut damaged = Vec::from([whole[..10].to_vec(), whole[..50_000].to_vec(), vec![]]);
        for at in [0, 99_999, 100_000, 100_031] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            damaged.push(flipped);
        }
        damaged.push([&whole[..], b"x"].concat());
        for bytes in damaged {
            fs::write(&path, &bytes).unwrap();
            assert!(cache.find(&path).is_none(), "{}", bytes.len());
            assert!(!path.exists());
        }
        fs::write(&path, &whole).unwrap();
        assert!(cache.find(&path).is_some());
    }

    #[test]
    fn only_the_last_used_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let path = |i: usize| cache.path(&[i as u8]);
        for i in 0..KEPT {
            cache.keep(&path(i), b"kernel").unwrap();
            let ago = Duration::from_secs(1000 - i as u64);
            let file = File::open(path(i)).unwrap();
            file.set_modified(SystemTime::now() - ago).unwrap();
        }
        // The oldest has been used since; the next one is the one that has to go.
        cache.find(&path(0)).unwrap();
        cache.keep(&path(KEPT), b"kernel").unwrap();
        let mut left: Vec<_> = (0..=KEPT).filter(|i| *i != 1).map(path).collect();
        left.sort();
        assert_eq!(files(dir.path()), left);
    }

    #[test]
    fn together_they_stay_below_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let old = dir.path().join("old.elf");
        // Sparse: it has this length, and no bytes.
        let file = File::create(&old).unwrap();
        file.set_len(KEPT_BYTES - 10).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
        let path = cache.path(b"packed");
        cache.keep(&path, b"kernel").unwrap();
        assert_eq!(files(dir.path()), [path]);
    }

    #[test]
    fn what_an_interrupted_program_left_goes_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let [young, old] =
            ["young", "old"].map(|name| dir.path().join(UNFINISHED.to_owned() + name));
        File::create(&young).unwrap();
        let long_ago = SystemTime::now() - 2 * FORGOTTEN;
        File::create(&old).unwrap().set_modified(long_ago).unwrap();
        let path = cache.path(b"packed");
        cache.keep(&path, b"kernel").unwrap();
        let mut left = vec![young, path];
        left.sort();
        assert_eq!(files(dir.path()), left);
    }

    #[test]
    fn several_at_once_never_see_a_part() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let path = cache.path(b"packed");
        let kernel = vec![7; 300_000];
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        cache.keep(&path, &kernel).unwrap();
                        // Always there from the first time on, and always whole.
                        assert!(content(&cache, &path).unwrap() == kernel);
                    }
                });
            }
        });
        assert_eq!(files(dir.path()), [path]);
    }
}
