//! Introduced by stage 04: ports that no hardware has, by which a guest calls its host.
//!
//! A device may do whatever the monitor's author likes. This one ends the guest, prints, and waits for a
//! key, each with one instruction and without a status register to poll.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::bus::Device;
use crate::teletype::Teletype;

/// The hypercall's ports.
pub const PORTS: Range<u64> = 0x500..0x50C;

/// The usual ports of QEMU's `isa-debug-exit`: a guest that writes to the first one wants to end.
pub const DEBUG_EXIT: Range<u64> = 0xF4..0xF8;

/// Written: the guest ends with this code; 0 says that it ended well.
const EXIT: u64 = 0;
/// Written: prints as many characters as the access has bytes.
const PUTCHAR: u64 = 4;
/// Read: waits for a key and gives it, zero-extended; at the end of input all bits are set, which is C's
/// `EOF` if the access has more than one byte.
const GETCHAR: u64 = 8;

/// What ends a guest that asks for it: an [`ExitCode`] that the run loop looks at, or, from stage 06 on, one
/// that stops the loop.
pub trait End: Send {
    /// The guest wants to end with this code; 0 says that it ended well. Only the first call counts.
    fn end(&self, code: u32);
}

/// The code with which a guest wants to end, once it does. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct ExitCode(Arc<OnceLock<u32>>);

impl ExitCode {
    /// The code, if the guest has ended: to be asked after each write to a port.
    pub fn get(&self) -> Option<u32> {
        self.0.get().copied()
    }
}

impl End for ExitCode {
    fn end(&self, code: u32) {
        let _ = self.0.set(code);
    }
}

/// The number that an access of at most four bytes writes.
fn number(data: &[u8]) -> u32 {
    data.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte))
}

/// The hypercall ports. An access that begins in the middle of one is dropped, or reads as ones.
pub struct Hypercall {
    tty: Arc<Teletype>,
    exit: ExitCode,
}

impl Hypercall {
    /// Prints to `tty`, gets its keys from there, and ends the guest by `exit`.
    pub fn new(tty: Arc<Teletype>, exit: ExitCode) -> Self {
        Self { tty, exit }
    }
}

impl Device for Hypercall {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == GETCHAR
            && let Some(key) = self.tty.get()
        {
            data.fill(0);
            data[0] = key;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            EXIT => self.exit.end(number(data)),
            PUTCHAR => self.tty.print(data),
            _ => {}
        }
    }
}

/// The debug-exit port: the value written is the guest's exit code, 0 meaning that it ended well.
///
/// QEMU's device makes an odd exit code of it, `value << 1 | 1`; here the exit codes have names of their own.
pub struct DebugExit<E>(pub E);

impl<E: End> Device for DebugExit<E> {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            self.0.end(number(data));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use testkit::Printed;

    #[test]
    fn the_first_exit_code_counts_and_has_the_width_of_the_access() {
        let exit = ExitCode::default();
        let mut hypercall = Hypercall::new(Teletype::new(std::io::sink()), exit.clone());
        assert_eq!(exit.get(), None);
        hypercall.write(EXIT, &[0x34, 0x12]);
        hypercall.write(EXIT, &[0]);
        assert_eq!(exit.get(), Some(0x1234));

        let exit = ExitCode::default();
        DebugExit(exit.clone()).write(0, &[1, 0, 0, 0x80]);
        assert_eq!(exit.get(), Some(0x8000_0001));
    }

    #[test]
    fn getchar_tells_the_end_from_the_byte_ff_by_its_width() {
        let tty = Teletype::new(std::io::sink());
        let feeder = Arc::clone(&tty);
        let typist = thread::spawn(move || feeder.feed(&[0xFF, 7][..]));
        let mut hypercall = Hypercall::new(tty, ExitCode::default());
        let mut key = [0xFF; 4];
        hypercall.read(GETCHAR, &mut key);
        assert_eq!(key, [0xFF, 0, 0, 0]);
        let mut short = [0xFF];
        hypercall.read(GETCHAR, &mut short);
        assert_eq!(short, [7]);
        let mut end = [0xFF; 2];
        hypercall.read(GETCHAR, &mut end);
        assert_eq!(end, [0xFF; 2]);
        typist.join().unwrap().unwrap();
    }

    proptest! {
        #[test]
        fn putchar_prints_whatever_width_it_is_used_with(words: Vec<u32>, bytes: Vec<u8>) {
            let printed = Printed::default();
            let tty = Teletype::new(printed.clone());
            let mut hypercall = Hypercall::new(tty, ExitCode::default());
            let mut expected = vec![];
            for word in words {
                hypercall.write(PUTCHAR, &word.to_le_bytes());
                expected.extend(word.to_le_bytes());
            }
            for byte in bytes {
                hypercall.write(PUTCHAR, &[byte]);
                expected.push(byte);
            }
            prop_assert_eq!(printed.bytes(), expected);
        }

        #[test]
        fn other_offsets_do_nothing(offset in 0..PORTS.end - PORTS.start, data: [u8; 4]) {
            prop_assume!(![EXIT, PUTCHAR, GETCHAR].contains(&offset));
            let (printed, exit) = (Printed::default(), ExitCode::default());
            let mut hypercall = Hypercall::new(Teletype::new(printed.clone()), exit.clone());
            hypercall.write(offset, &data);
            let mut read = [0xFF; 4];
            hypercall.read(offset, &mut read);
            prop_assert_eq!((printed.bytes(), exit.get(), read), (vec![], None, [0xFF; 4]));
        }
    }
}
