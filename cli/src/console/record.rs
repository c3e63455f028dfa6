//! `--record`: what the guest printed, and when, in a file.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};

use crate::cast::{Event, Header, LIMIT, Writer};

/// The window where stdout is no terminal.
const SIZE: (u16, u16) = (80, 24);

/// Writes a recording.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    began: Instant,
    cast: Writer<File>,
    /// Why it has come to an end before the machine.
    ended: Option<io::Error>,
}

impl Recorder {
    /// Begins now, for a window of `size`, with a file that is not there yet: it may be somebody's only recording.
    pub fn start(path: &Path, size: Option<(u16, u16)>) -> Result<Self> {
        let (width, height) = size.unwrap_or(SIZE);
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let header = Header { timestamp: Some(since_1970.as_secs()), ..Header::new(width, height) };
        let cast = File::create_new(path).and_then(|file| Writer::new(file, &header));
        let cast = cast.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                anyhow!("it is there already: remove it, or name another file")
            }
            _ => error.into(),
        });
        let cast = cast.with_context(|| format!("cannot record to {}", path.display()))?;
        Ok(Self { path: path.to_owned(), began: Instant::now(), cast, ended: None })
    }

    /// The guest has printed `bytes`.
    pub fn printed(&mut self, bytes: &[u8]) {
        self.write(|cast, at| cast.output(at, bytes));
    }

    /// The window has another size.
    pub fn resized(&mut self, columns: u16, rows: u16) {
        self.write(|cast, at| cast.event(at, &Event::Resize(columns, rows)));
    }

    fn write(&mut self, event: impl FnOnce(&mut Writer<File>, Duration) -> io::Result<()>) {
        if self.ended.is_none() {
            self.ended = event(&mut self.cast, self.began.elapsed()).err();
        }
    }

    /// Says on stderr what became of it. The guest was not to suffer from a full disk.
    pub fn tell(self) {
        let path = self.path.display();
        match self.ended {
            None => crate::eprintln!("recorded to {path}"),
            Some(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                let limit = LIMIT >> 20;
                crate::eprintln!("recorded to {path} until that had its {limit} MiB, no further");
            }
            Some(error) => {
                crate::eprintln!("recorded to {path} until that could not be written: {error}");
            }
        }
    }
}
