//! Introduced by stage 07: the ROM in which a PC's firmware stands, and where its first instruction comes from.
//!
//! After reset a processor is in real mode, but its CS begins at 0xFFFF0000: the first instruction is the one 16
//! bytes below 4 GiB (Intel SDM vol. 3, 11.1.4). So a PC's ROM ends there; and because real mode reaches no
//! further than the first megabyte, the end of the same ROM is seen there once more. A vCPU is made in
//! that state, so a machine whose memslots are right needs no register set to start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::Kvm;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::bus::Device;
use crate::error::{Blame, Blamed};
use crate::layout::{self, FIRMWARE_AREA, HIGH_MEMORY, MMIO_HOLE_END};
use crate::memory::{self, Pages, SlotFlags, Vm};

/// The longest image, in bytes.
pub const MAX: u64 = 256 << 10;

/// Why a machine cannot have this firmware.
#[derive(Debug, Error)]
pub enum Error {
    /// No ROM chip has this length.
    #[error("the firmware has {0} bytes, expected 65536, 131072 or 262144 (64, 128 or 256 KiB)")]
    Length(usize),
    /// There is no second megabyte.
    #[error("--memory is too small for a PC: {0} bytes, expected 1 MiB or more")]
    LittleMemory(u64),
    /// The memory could not be made.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The image could not be put into it.
    #[error("cannot write the firmware into its memslot: {0}")]
    Write(#[from] GuestMemoryError),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Length(_) | Self::LittleMemory(_) => Blame::Input,
            Self::Memory(error) => error.blame(),
            Self::Write(_) => Blame::Host,
        }
    }
}

/// Checks that `image` has the length of a ROM.
pub fn check(image: &[u8]) -> Result<(), Error> {
    match image.len() {
        0x1_0000 | 0x2_0000 | 0x4_0000 => Ok(()),
        found => Err(Error::Length(found)),
    }
}

/// Makes a VM with `memory` bytes of RAM around the ROM that holds `image`.
///
/// The ROM is two read-only memslots with the same bytes: all of it below 4 GiB, and its last 128 KiB below 1
/// MiB. A guest's write to either is an exit that changes nothing.
///
/// With `shadow` the lower one is RAM that holds the same bytes, all of them, in the beginning. In a PC a ROM is slow:
/// its firmware copies itself into RAM at the same addresses, by switches in the host bridge, and keeps its
/// variables there, too. Here there is no host bridge, so the copy is there from the start.
// ANCHOR: create_vm
pub fn create_vm(kvm: &Kvm, memory: u64, image: &[u8], shadow: bool) -> Result<Arc<Vm>, Error> {
    check(image)?;
    let vm = Vm::with_ranges(kvm, memory, layout::pc_ram_ranges(memory), Pages::Small)?;
    if memory < HIGH_MEMORY.0 {
        return Err(Error::LittleMemory(memory));
    }
    let area = (HIGH_MEMORY.0 - FIRMWARE_AREA.0) as usize;
    let end = &image[image.len().saturating_sub(area)..];
    let first = vm.slots().len() as u32;
    let [low, high] = [(first, HIGH_MEMORY, end, !shadow), (first + 1, MMIO_HOLE_END, image, true)];
    for (slot, end, bytes, read_only) in [low, high] {
        let start = GuestAddress(end.0 - bytes.len() as u64);
        let flags = SlotFlags { read_only, ..SlotFlags::default() };
        vm.add_slot(slot, start, bytes.len(), flags)?;
        vm.ram().write_slice(bytes, start)?;
    }
    if shadow {
        vm.ram().write_slice(image, GuestAddress(HIGH_MEMORY.0 - image.len() as u64))?;
    }
    Ok(vm)
}
// ANCHOR_END: create_vm

/// The port that firmware writes its progress to.
pub const POST_PORT: u16 = 0x80;

/// Remembers the last POST code, for which PCs had a card with two digits: when nothing else works yet, it says
/// how far the power-on self-test came.
#[derive(Clone, Debug, Default)]
pub struct PostCode(Arc<AtomicU8>);

impl PostCode {
    /// The last code, 0 if there was none.
    pub fn last(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Device for PostCode {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.last();
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0.store(data[0], Ordering::Relaxed);
    }
}

/// The port at which SeaBIOS and its relatives log what they do, a character a write.
pub const LOG_PORT: u16 = 0x402;

/// What a read of it gives where somebody listens. (QEMU's isa-debugcon.)
const LISTENING: u8 = 0xE9;

/// The longest line, in bytes: a guest may never end its own.
const LINE_MAX: usize = 512;

/// Takes the firmware's log, line by line.
pub struct Log<F> {
    line: Vec<u8>,
    tell: F,
}

impl<F: FnMut(&str) + Send> Log<F> {
    /// A log whose lines, in printable ASCII and without what ends them, go to `tell`.
    pub fn new(tell: F) -> Self {
        Self { line: Vec::new(), tell }
    }
}

impl<F: FnMut(&str) + Send> Device for Log<F> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = LISTENING;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data[0] {
            b'\r' => {}
            byte @ (b' '..=b'~') if self.line.len() < LINE_MAX => self.line.push(byte),
            b'\n' => {
                (self.tell)(&String::from_utf8_lossy(&self.line));
                self.line.clear();
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_log_has_lines_of_a_bounded_length_that_can_be_printed() {
        let (lines, logged) = channel();
        let mut log = Log::new(move |line: &str| lines.send(line.to_owned()).unwrap());
        let mut answer = [0];
        log.read(0, &mut answer);
        assert_eq!(answer, [0xE9]);
        for byte in b"one\r\n\x1b[2Jtwo\n".iter().chain(&[b'x'; 1000]).chain(b"\n\n") {
            log.write(0, &[*byte]);
        }
        let logged: Vec<_> = logged.try_iter().collect();
        assert_eq!(logged, ["one", "[2Jtwo", &"x".repeat(LINE_MAX), ""]);
    }
}
