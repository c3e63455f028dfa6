//! Introduced by stage 04: what a guest prints, and what is typed to it.
//!
//! A device that prints and one that receives share this: the serial port and the hypercall port are
//! two ways to the same paper and the same keys. It knows no terminal: it is given a [`Write`] and fed
//! from a [`Read`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many bytes are read at once from whatever is typed, and so the most that waits for the guest.
const CHUNK: usize = 4096;

/// What there is to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// A byte is there.
    Ready,
    /// Nothing yet.
    Nothing,
    /// Nothing, and nothing will come.
    Ended,
}

/// Output and input of one guest.
pub struct Teletype {
    paper: Mutex<Paper>,
    keys: Mutex<Keys>,
    /// Something in `keys` has changed.
    changed: Condvar,
}

struct Paper {
    out: Box<dyn Write + Send>,
    failed: Option<io::Error>,
}

#[derive(Default)]
struct Keys {
    bytes: VecDeque<u8>,
    /// The guest waits for a byte. Nothing is read from the outside before that, so that a program which
    /// reads nothing leaves everything in its stdin to the next one.
    wanted: bool,
    ended: bool,
}

impl Teletype {
    /// A teletype that prints to `out`. Give it a buffered one: the guest prints byte by byte.
    pub fn new(out: impl Write + Send + 'static) -> Arc<Self> {
        Arc::new(Self {
            paper: Mutex::new(Paper { out: Box::new(out), failed: None }),
            keys: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The guest prints. What cannot be printed is lost, and [`Self::flush`] tells why.
    pub fn print(&self, bytes: &[u8]) {
        let mut paper = lock(&self.paper);
        if let Err(error) = paper.out.write_all(bytes) {
            paper.failed.get_or_insert(error);
        }
    }

    /// Hands on all that was printed. The error is that of the first failure since the last call.
    pub fn flush(&self) -> io::Result<()> {
        lock(&self.paper).flush()
    }

    /// The same for somebody who must not wait: does nothing while the guest is printing, which may take
    /// for ever if nobody reads.
    pub fn try_flush(&self) -> io::Result<()> {
        self.paper.try_lock().map_or(Ok(()), |mut paper| paper.flush())
    }

    /// Types what `from` delivers, whenever the guest has read everything and wants more; returns at its
    /// end. An error is an end, too.
    pub fn feed(&self, mut from: impl Read) -> io::Result<()> {
        let mut buffer = [0; CHUNK];
        loop {
            drop(self.wait(|keys| !keys.wanted));
            let read = from.read(&mut buffer);
            let mut keys = lock(&self.keys);
            match read {
                Ok(len @ 1..) => {
                    keys.bytes.extend(&buffer[..len]);
                    keys.wanted = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                ended => {
                    keys.ended = true;
                    self.changed.notify_all();
                    return ended.map(drop);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Nothing will be typed.
    pub fn end_of_input(&self) {
        lock(&self.keys).ended = true;
        self.changed.notify_all();
    }

    /// Looks whether a byte is there, without waiting.
    pub fn look(&self) -> Typed {
        lock(&self.keys).state()
    }

    /// Waits at most `limit` for a byte or for the end. What was printed so far is shown first: it may be
    /// the question that somebody is to answer.
    pub fn wait_for(&self, limit: Duration) -> Typed {
        if let Typed::Nothing = self.look() {
            // The error stays for whoever asks next.
            lock(&self.paper).show();
            let mut keys = lock(&self.keys);
            keys.wanted = true;
            self.changed.notify_all();
            let waits = |keys: &mut Keys| keys.state() == Typed::Nothing;
            let waited = self.changed.wait_timeout_while(keys, limit, waits);
            return waited.unwrap_or_else(PoisonError::into_inner).0.state();
        }
        self.look()
    }

    /// Takes the next byte, if one is there.
    pub fn take(&self) -> Option<u8> {
        lock(&self.keys).bytes.pop_front()
    }

    /// Waits for a byte and takes it; none at the end of input.
    pub fn get(&self) -> Option<u8> {
        if let Typed::Nothing = self.look() {
            lock(&self.paper).show();
            lock(&self.keys).wanted = true;
            self.changed.notify_all();
        }
        self.wait(|keys| keys.state() == Typed::Nothing).bytes.pop_front()
    }

    fn wait(&self, condition: impl FnMut(&mut Keys) -> bool) -> MutexGuard<'_, Keys> {
        let mut condition = condition;
        self.changed
            .wait_while(lock(&self.keys), |keys| condition(keys))
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Paper {
    fn show(&mut self) {
        if let Err(error) = self.out.flush() {
            self.failed.get_or_insert(error);
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.show();
        self.failed.take().map_or(Ok(()), Err)
    }
}

impl Keys {
    fn state(&self) -> Typed {
        match (self.bytes.is_empty(), self.ended) {
            (false, _) => Typed::Ready,
            (true, false) => Typed::Nothing,
            (true, true) => Typed::Ended,
        }
    }
}

/// A thread that panicked here has left a queue of bytes, which is as good as any other.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use testkit::Printed;

    use super::*;

    #[test]
    fn nothing_is_read_before_the_guest_wants_it() {
        struct Forbidden;
        impl Read for Forbidden {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("nobody wanted this")
            }
        }
        let tty = Teletype::new(io::sink());
        let feeder = Arc::clone(&tty);
        let thread = thread::spawn(move || feeder.feed(Forbidden));
        tty.print(b"no question");
        assert_eq!(tty.look(), Typed::Nothing);
        assert_eq!(tty.take(), None);
        thread::sleep(Duration::from_millis(20));
        assert!(!thread.is_finished());
    }

    #[test]
    fn all_that_is_typed_arrives_and_then_the_end() {
        let tty = Teletype::new(io::sink());
        let text: Vec<u8> = (0..3 * CHUNK + 7).map(|n| n as u8).collect();
        let (feeder, source) = (Arc::clone(&tty), text.clone());
        let thread = thread::spawn(move || feeder.feed(&source[..]));
        let got: Vec<u8> = std::iter::from_fn(|| tty.get()).collect();
        assert!(got == text);
        assert_eq!(tty.look(), Typed::Ended);
        assert_eq!(tty.get(), None, "and it stays so");
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn waiting_ends_with_a_byte_or_when_time_is_over() {
        let tty = Teletype::new(io::sink());
        assert_eq!(tty.wait_for(Duration::from_millis(1)), Typed::Nothing);
        let feeder = Arc::clone(&tty);
        let thread = thread::spawn(move || feeder.feed(&b"x"[..]));
        assert_eq!(tty.wait_for(Duration::from_secs(60)), Typed::Ready);
        assert_eq!(tty.take(), Some(b'x'));
        assert_eq!(tty.wait_for(Duration::from_secs(60)), Typed::Ended);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_question_is_shown_before_the_answer_is_awaited() {
        let printed = Printed::default();
        let tty = Teletype::new(io::BufWriter::new(printed.clone()));
        tty.print(b"name? ");
        assert_eq!(printed.bytes(), b"");
        tty.end_of_input();
        assert_eq!(tty.get(), None);
        assert_eq!(printed.bytes(), b"", "nobody is asked");

        let tty = Teletype::new(io::BufWriter::new(printed.clone()));
        tty.print(b"name? ");
        assert_eq!(tty.wait_for(Duration::ZERO), Typed::Nothing);
        assert_eq!(printed.bytes(), b"name? ");
    }

    #[test]
    fn the_first_failure_is_told_once() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let tty = Teletype::new(Full);
        tty.print(b"a");
        tty.print(b"b");
        assert_eq!(tty.try_flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
        tty.flush().unwrap();
    }
}
