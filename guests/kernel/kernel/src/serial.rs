//! The console: COM1, a 16550A. (National PC16550D data sheet.)

use core::fmt;

use kernel::input::Queue;

use crate::cpu::{input, out, out_string};
use crate::single::Single;

const COM1: u16 = 0x3f8;
/// THR on write, RBR on read; divisor low byte while DLAB is set.
const DATA: u16 = COM1;
/// Interrupt enable; divisor high byte while DLAB is set.
const IER: u16 = COM1 + 1;
/// FIFO control.
const FCR: u16 = COM1 + 2;
const LCR: u16 = COM1 + 3;
const MCR: u16 = COM1 + 4;
const LSR: u16 = COM1 + 5;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5;

/// How many bytes the transmitter takes at once when it is empty.
const FIFO_SIZE: usize = 16;

static TYPED: Single<Queue> = Single::new(Queue::new());

/// 115200 baud, 8 data bits, no parity, 1 stop bit; FIFOs on; no interrupts yet.
pub fn init() {
    // SAFETY: the registers of the serial port, in the order that the data sheet gives.
    unsafe {
        out(IER, 0);
        out(LCR, 0x80); // DLAB
        out(DATA, 1); // 115200 / 1
        out(IER, 0);
        out(LCR, 0x03);
        out(FCR, 0x07); // on, both cleared, trigger at one byte
        out(MCR, 0x0b); // DTR, RTS, OUT2: on a PC, OUT2 lets the interrupt through
    }
}

/// From now on received bytes interrupt. Comes after [`crate::pic::init`]: the PIC looks for edges,
/// and forgets those from before its initialization, so a byte that came too early would hold the
/// line up for ever without anybody noticing.
pub fn listen() {
    // SAFETY: as in `init`.
    unsafe { out(IER, 0x01) }
}

/// Prints bytes as they are, with a carriage return before each line feed.
pub fn write(bytes: &[u8]) {
    let mut chunk = [0; FIFO_SIZE];
    let mut length = 0;
    for &byte in bytes {
        if length + 2 > FIFO_SIZE {
            transmit(&chunk[..length]);
            length = 0;
        }
        if byte == b'\n' {
            chunk[length] = b'\r';
            length += 1;
        }
        chunk[length] = byte;
        length += 1;
    }
    transmit(&chunk[..length]);
}

/// Hands the transmitter up to [`FIFO_SIZE`] bytes. It is asked once whether it is empty, not for
/// each byte: in a virtual machine every access to a port is an exit.
fn transmit(bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // SAFETY: reading LSR and writing THR is what they are for.
    unsafe {
        while input(LSR) & LSR_TRANSMITTER_EMPTY == 0 {
            core::hint::spin_loop();
        }
        out_string(DATA, bytes);
    }
}

/// Moves what was received into the queue: on IRQ 4, and again when a reader has made room in a
/// queue that was full. What does not fit stays in the port, where it holds back the sender.
pub fn receive() {
    let mut typed = TYPED.borrow();
    // SAFETY: RBR is read only when LSR says that there is something.
    unsafe {
        while !typed.is_full() && input(LSR) & LSR_DATA_READY != 0 {
            typed.push(input(DATA));
        }
    }
}

/// A typed byte, if there is one.
pub fn read() -> Option<u8> {
    let was_full = TYPED.borrow().is_full();
    let byte = TYPED.borrow().pop();
    if was_full {
        receive();
    }
    byte
}

/// Whether Ctrl-C was typed; it is taken out of the queue.
pub fn take_interrupt() -> bool {
    TYPED.borrow().take_interrupt()
}

/// The console for Rust's formatting.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

macro_rules! println {
    ($($format:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::serial::Console, $($format)*);
    }};
}
pub(crate) use println;
