//! Introduced by stage 08: a console without the exits of a serial port (VIRTIO 1.2, 5.3 "Console Device").
//!
//! Two queues: the driver puts empty buffers on the first, for what is typed, and full ones on the second, to be
//! printed. A serial port exits twice for each byte; here a line, or a page, is one buffer. The console also knows how
//! large a window it has, and says when that changes.
//!
//! Linux prints with its console's lock held and waits until its buffer has come back, so a terminal that is slow to
//! print slows the guest down, as a cable does. But the device doesn't wait for the terminal: what can't be printed yet
//! stays on the ring.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Broken, Device, Rings, Wake, copy_config};
use crate::snapshot;

/// VIRTIO_CONSOLE_F_SIZE: the configuration has the window's size.
const F_SIZE: u64 = 1 << 0;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// As many typed bytes as may wait for the guest.
const TYPED: usize = 4096;

/// As much as is printed before others get their turn: the driver, to reset the device, and the machine's end.
const AT_ONCE: usize = 64 << 10;

/// How large a window is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A console device, with the hardware's side of a terminal.
pub struct Console<W> {
    line: Arc<Line>,
    out: W,
    /// How much of the buffer at the front of the ring has been printed.
    printed: usize,
    /// Whether the driver knows of sizes.
    sized: bool,
    /// Whether the driver has sent anything since it began.
    heard: bool,
}

/// The person's side: keys, and the window's size. Clones belong to the same console.
#[derive(Clone)]
pub struct Terminal(Arc<Line>);

/// What goes over the line from the terminal to the console.
struct Line {
    state: Mutex<State>,
    /// The guest has read.
    room: Condvar,
}

struct State {
    typed: VecDeque<u8>,
    size: Option<Size>,
    /// Whether the driver is to be told of `size`.
    resized: bool,
    wake: Option<Wake>,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write> Console<W> {
    /// A console that prints to `out`, and its terminal, of `size` if it has one.
    ///
    /// `out` must not wait: it takes what it can, or says [`ErrorKind::WouldBlock`], and then whoever makes it so calls
    /// [`Terminal::printed`] when it has room. What it fails to print otherwise is lost, as with a cable pulled out.
    pub fn new(out: W, size: Option<Size>) -> (Self, Terminal) {
        let state = State { typed: VecDeque::new(), size, resized: false, wake: None };
        let line = Arc::new(Line { state: Mutex::new(state), room: Condvar::new() });
        (Self { line: line.clone(), out, printed: 0, sized: false, heard: false }, Terminal(line))
    }

    /// Gives the driver what was typed.
    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        let mut line = self.line.lock();
        if std::mem::take(&mut line.resized)
            && self.sized
            && line.size.is_some()
            && let Some(wake) = &line.wake
        {
            wake.config_changed();
        }
        // Linux hands out its buffers before it has made a terminal, and throws away what comes until then.
        while self.heard && !line.typed.is_empty() {
            let Some(chain) = rings.take(RECEIVE)? else { break };
            let head = chain.head_index();
            let mut buffer =
                chain.writer(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            let len = buffer.available_bytes().min(line.typed.len());
            let typed: Vec<u8> = line.typed.drain(..len).collect();
            buffer.write_all(&typed).map_err(|_| Broken("buffers are too short"))?;
            rings.give(RECEIVE, head, len as u32)?;
            self.line.room.notify_all();
        }
        Ok(())
    }

    /// Prints what the driver has sent. Returns whether there is more that could be printed now.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<bool, Broken> {
        let mut bytes = [0; 4096];
        let mut left = AT_ONCE;
        while let Some(chain) = rings.take(TRANSMIT)? {
            self.heard = true;
            let head = chain.head_index();
            let mut buffer =
                chain.reader(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            let mut rest = buffer
                .split_at(self.printed)
                .map_err(|_| Broken("buffer has changed while it was printed"))?;
            while rest.available_bytes() > 0 {
                if left == 0 {
                    rings.put_back(TRANSMIT);
                    return Ok(true);
                }
                let len = rest.available_bytes().min(bytes.len()).min(left);
                let bytes = &mut bytes[..len];
                rest.read_exact(bytes).map_err(|_| Broken("buffers are not in its memory"))?;
                let printed = print(&mut self.out, bytes);
                self.printed += printed;
                left -= printed;
                if printed < len {
                    rings.put_back(TRANSMIT);
                    return Ok(false);
                }
            }
            self.printed = 0;
            rings.give(TRANSMIT, head, 0)?;
        }
        Ok(false)
    }
}

/// Prints as much of `bytes` as goes without waiting.
fn print(out: &mut impl Write, bytes: &[u8]) -> usize {
    let mut printed = 0;
    while printed < bytes.len() {
        match out.write(&bytes[printed..]) {
            Ok(written @ 1..) => printed += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return printed,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return bytes.len(),
        }
    }
    printed
}

impl Terminal {
    /// Types `bytes`, as fast as the guest reads them, once it has printed something. Blocks meanwhile.
    pub fn type_in(&self, mut bytes: &[u8]) {
        let mut line = self.0.lock();
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(TYPED - line.typed.len()));
            if now.is_empty() {
                line = self.0.room.wait(line).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            line.typed.extend(now);
            bytes = rest;
            line.serve();
        }
    }

    /// The window has another size.
    pub fn resize(&self, size: Size) {
        let mut line = self.0.lock();
        if line.size != Some(size) {
            line.size = Some(size);
            line.resized = true;
            line.serve();
        }
    }

    /// What prints has room again.
    pub fn printed(&self) {
        self.0.lock().serve();
    }
}

impl State {
    /// Has the device served, if the machine is there already.
    fn serve(&self) {
        if let Some(wake) = &self.wake {
            wake.now();
        }
    }
}

/// A console as it stands in a snapshot.
#[derive(Serialize, Deserialize)]
struct Kept {
    printed: usize,
    heard: bool,
    typed: VecDeque<u8>,
}

impl<W: Write + Send> Device for Console<W> {
    fn kind(&self) -> u32 {
        3
    }

    fn name(&self) -> &'static str {
        "virtio console"
    }

    fn queues(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        // Also without a window: who goes on with the machine another time may have one.
        F_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // VIRTIO 1.2, 5.3.4 "Device configuration layout": what follows belongs to features that are not offered. Linux
        // takes zeros for a size that isn't known.
        let Size { columns, rows } = self.line.lock().size.unwrap_or(Size { columns: 0, rows: 0 });
        let config = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        copy_config(&config, offset, data);
    }

    fn plug(&mut self, wake: Wake) -> io::Result<()> {
        self.line.lock().wake = Some(wake);
        Ok(())
    }

    fn activate(&mut self, features: u64) {
        self.sized = features & F_SIZE != 0;
        // Linux doesn't look at the size before it is told of a change.
        self.line.lock().resized = true;
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        if self.transmit(rings)? {
            self.line.lock().serve();
        }
        self.receive(rings)
    }

    fn reset(&mut self) {
        self.printed = 0;
        self.heard = false;
    }

    fn keep(&self) -> Value {
        let typed = self.line.lock().typed.clone();
        let kept = Kept { printed: self.printed, heard: self.heard, typed };
        serde_json::to_value(kept).expect("numbers")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let Kept { printed, heard, typed } = snapshot::read(state)?;
        (self.printed, self.heard) = (printed, heard);
        let mut line = self.line.lock();
        line.typed.extend(typed.into_iter().take(TYPED));
        line.serve();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;
    use testkit::Printed;

    use super::super::tests::{Buffer, Driver, hostile_chains};
    use super::*;

    /// Prints as much as it is allowed to.
    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Paper {
        fn allow(&self, more: usize) {
            self.0.lock().unwrap().0 += more;
        }

        fn bytes(&self) -> Vec<u8> {
            self.0.lock().unwrap().1.clone()
        }
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (allowed, printed) = &mut *self.0.lock().unwrap();
            let len = bytes.len().min(*allowed);
            if len == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            *allowed -= len;
            printed.extend(&bytes[..len]);
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const SIZE: Option<Size> = Some(Size { columns: 80, rows: 24 });

    #[test]
    fn what_the_driver_sends_is_printed() {
        let paper = Printed::default();
        let (console, _terminal) = Console::new(paper.clone(), None);
        let mut driver = Driver::new(console);
        assert_eq!(driver.read(8), 3);
        driver.put(TRANSMIT, &[Buffer::In(b"Hello, "), Buffer::In(b""), Buffer::In(b"world")]);
        driver.put(TRANSMIT, &[Buffer::In(b"!")]);
        driver.serve();
        assert_eq!(paper.bytes(), b"Hello, world!");
        assert_eq!(driver.used(TRANSMIT).unwrap().len, 0);
        assert_eq!(driver.used(TRANSMIT).unwrap().len, 0);
        // More than is printed at once, and a driver that counts on it.
        let text: Vec<u8> = (0..3 * AT_ONCE + 5).map(|i| (i % 251) as u8).collect();
        driver.put(TRANSMIT, &[Buffer::In(&text)]);
        let rounds = (1..).find(|_| {
            driver.serve();
            driver.used(TRANSMIT).is_some()
        });
        assert_eq!(rounds, Some(4));
        assert_eq!(paper.bytes()[13..], text);
    }

    #[test]
    fn a_terminal_that_is_slow_to_print_loses_nothing_and_keeps_nobody_waiting() {
        let paper = Paper::default();
        let (console, terminal) = Console::new(paper.clone(), None);
        let mut driver = Driver::new(console);
        driver.put(TRANSMIT, &[Buffer::In(b"one "), Buffer::In(b"two ")]);
        driver.put(TRANSMIT, &[Buffer::In(b"three")]);
        driver.serve();
        assert_eq!((paper.bytes(), driver.used(TRANSMIT)), (vec![], None));
        for (more, text, used) in [(3, "one", 0), (3, "one tw", 0), (3, "one two t", 1)] {
            paper.allow(more);
            terminal.printed();
            driver.serve();
            assert_eq!(paper.bytes(), text.as_bytes());
            assert_eq!(std::iter::from_fn(|| driver.used(TRANSMIT)).count(), used, "{text}");
        }
        // Keys go in meanwhile.
        driver.put(RECEIVE, &[Buffer::Out(8)]);
        terminal.type_in(b"k");
        driver.serve();
        assert_eq!(driver.used(RECEIVE).unwrap().data[..1], *b"k");
        // A driver that begins anew isn't blamed for the half of a buffer.
        let features = driver.offered();
        driver.begin(features);
        paper.allow(100);
        driver.put(TRANSMIT, &[Buffer::In(b"|anew")]);
        driver.serve();
        assert_eq!(paper.bytes(), b"one two t|anew");
    }

    #[test]
    fn what_is_typed_waits_for_buffers_and_the_typist_for_room() {
        let (console, terminal) = Console::new(io::sink(), None);
        let mut driver = Driver::new(console);
        let text: Vec<u8> = (0..3 * TYPED).map(|i| (i % 251) as u8).collect();
        let typist = thread::spawn({
            let text = text.clone();
            move || terminal.type_in(&text)
        });
        // Nothing comes before the driver has said that it is there.
        driver.put(RECEIVE, &[Buffer::Out(7)]);
        std::iter::repeat_with(|| driver.serve()).take(100).for_each(drop);
        assert_eq!(driver.used(RECEIVE), None);
        driver.put(TRANSMIT, &[Buffer::In(b"$ ")]);
        let mut received = Vec::<u8>::new();
        while received.len() < text.len() {
            driver.put(RECEIVE, &[Buffer::Out(7), Buffer::Out(500)]);
            let used = std::iter::repeat_with(|| {
                driver.serve();
                driver.used(RECEIVE)
            });
            let used = used.flatten().next().unwrap();
            assert!(used.len > 0, "an empty line");
            received.extend(&used.data[..used.len as usize]);
        }
        typist.join().unwrap();
        assert_eq!(received, text);
    }

    #[test]
    fn the_driver_is_told_of_sizes_if_there_are_any() {
        let (console, terminal) = Console::new(io::sink(), SIZE);
        let mut driver = Driver::new(console);
        assert_eq!(driver.offered() & 1, 1);
        assert_eq!(driver.config(0, 6), [80, 0, 24, 0, 0, 0]);
        let told = |driver: &mut Driver| {
            let before = driver.read(0xFC);
            driver.serve();
            driver.read(0xFC) != before
        };
        assert!(told(&mut driver), "of the first one");
        assert!(!told(&mut driver));
        terminal.resize(Size { columns: 300, rows: 50 });
        assert!(told(&mut driver));
        assert_eq!(driver.config(0, 4), [44, 1, 50, 0]);
        terminal.resize(Size { columns: 300, rows: 50 });
        assert!(!told(&mut driver), "of none");
        // One that hasn't asked for sizes.
        driver.begin(1 << 32);
        terminal.resize(SIZE.unwrap());
        assert!(!told(&mut driver));

        let (console, terminal) = Console::new(io::sink(), None);
        let mut driver = Driver::new(console);
        assert!(!told(&mut driver), "what is no terminal has no size");
        assert_eq!(driver.config(0, 4), [0, 0, 0, 0]);
        terminal.resize(SIZE.unwrap());
        assert!(told(&mut driver));
    }

    #[test]
    fn a_console_from_a_snapshot_goes_on_where_it_was() {
        let paper = Paper::default();
        let (console, terminal) = Console::new(paper.clone(), SIZE);
        let mut driver = Driver::new(console);
        driver.put(TRANSMIT, &[Buffer::In(b"printed and not")]);
        paper.allow(7);
        driver.serve();
        terminal.type_in(b"typed");
        driver.serve();
        let kept = driver.core.lock().device.keep();
        // Without a window, now. What was half printed is in the guest's memory still, here in another's.
        let (console, _) = Console::new(paper.clone(), None);
        let mut driver = Driver::new(console);
        driver.core.lock().device.restore(&kept).unwrap();
        driver.put(TRANSMIT, &[Buffer::In(b"printed and not")]);
        driver.put(RECEIVE, &[Buffer::Out(8)]);
        paper.allow(100);
        driver.serve();
        assert_eq!(paper.bytes(), b"printed and not");
        assert_eq!(driver.used(RECEIVE).unwrap().data, b"typed\0\0\0");
    }

    proptest! {
        /// Chains of any kind on both queues: the device takes them, or gives up on its driver.
        #[test]
        fn hostile_chains_do_no_harm(
            chains in hostile_chains(),
            typed in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let (console, terminal) = Console::new(io::sink(), SIZE);
            let driver = Driver::new(console);
            terminal.type_in(&typed);
            driver.survives(chains);
        }
    }
}
