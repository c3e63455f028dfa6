//! Introduced by stage 06: a 16550A serial port that interrupts.
//!
//! Stage 04 wrote a serial port by hand. An operating system wants the whole of it, with interrupts for
//! received bytes and for an empty transmitter (National PC16550D data sheet); that one is
//! [`vm_superio::Serial`]. Here it becomes a [`Device`] on the port bus, and gets somebody who types.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, PoisonError};
use std::time::Duration;

#[cfg(feature = "stage08")]
use serde::{Deserialize, Serialize, de::Error as _};
#[cfg(feature = "stage08")]
use serde_json::Value;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};

use crate::bus::{Device, Interrupt, Shared};
#[cfg(feature = "stage08")]
use crate::snapshot::{self, Keep};

/// First port of COM1, a PC's first serial port.
pub const COM1: u16 = 0x3F8;

/// How many ports it has.
pub const PORTS: u16 = 8;

/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;

const IER: u64 = 1;
const LCR: u8 = 3;
#[cfg(feature = "stage08")]
const MCR: u64 = 4;
#[cfg(feature = "stage08")]
const SCR: u64 = 7;
/// In IER: interrupt when a byte has been received.
const IER_RECEIVED: u8 = 1 << 0;
/// All of IER's bits. Linux writes them for a moment to see which kind of port this is.
const IER_ALL: u8 = 0x0F;
/// In LCR: offsets 0 and 1 are the baud rate's divisor.
const LCR_DLAB: u8 = 1 << 7;

/// A device's interrupt line, in the words of vm-superio.
struct Line(Box<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Wakes whoever types when the guest has read all there was.
struct Room(Arc<Condvar>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.notify_all();
    }
}

/// A serial port. What the guest sends goes to a [`Write`]; what [`type_in`] is given, the guest receives.
pub struct Uart {
    serial: Serial<Line, Room, Box<dyn Write + Send>>,
    changed: Arc<Condvar>,
    /// Whether the guest has asked for interrupts on received bytes.
    listening: bool,
}

impl Uart {
    /// A serial port whose interrupts go to `line` and whose bytes go to `out`.
    pub fn new(line: impl Interrupt + 'static, out: impl Write + Send + 'static) -> Self {
        let changed = Arc::new(Condvar::new());
        let serial = Serial::with_events(
            Line(Box::new(line)),
            Room(Arc::clone(&changed)),
            Box::new(out) as Box<dyn Write + Send>,
        );
        Self { serial, changed, listening: false }
    }
}

impl Device for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // All registers have 8 bits; a wider access reads ones above.
        data[0] = self.serial.read(offset as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // What cannot be printed is lost, as with a cable pulled out: the guest goes on.
        let _ = self.serial.write(offset as u8, data[0]);
        if offset == IER && self.serial.read(LCR) & LCR_DLAB == 0 {
            self.listening = data[0] & IER_RECEIVED != 0 && data[0] & IER_ALL != IER_ALL;
            self.changed.notify_all();
        }
    }
}

/// A serial port as it stands in a snapshot.
#[cfg(feature = "stage08")]
#[derive(Serialize, Deserialize)]
struct Kept {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    received: Vec<u8>,
}

#[cfg(feature = "stage08")]
impl Keep for Uart {
    fn keep(&self) -> Value {
        let state = self.serial.state();
        let kept = Kept {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            line_control: state.line_control,
            modem_control: state.modem_control,
            scratch: state.scratch,
            received: state.in_buffer,
        };
        serde_json::to_value(kept).expect("numbers")
    }

    /// As a driver would set it up. That the transmitter is empty, it hears once more.
    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let kept: Kept = snapshot::read(state)?;
        self.serial.enqueue_raw_bytes(&kept.received).map_err(serde_json::Error::custom)?;
        let registers = [
            (LCR.into(), LCR_DLAB),
            (0, kept.divisor[0]),
            (1, kept.divisor[1]),
            (LCR.into(), kept.line_control & !LCR_DLAB),
            (MCR, kept.modem_control),
            (SCR, kept.scratch),
        ];
        for (offset, value) in registers {
            self.write(offset, &[value]);
        }
        self.write(IER, &[kept.interrupt_enable]);
        self.write(LCR.into(), &[kept.line_control]);
        Ok(())
    }
}

/// Types `bytes` into the guest, as fast as it reads them. Blocks meanwhile.
///
/// Nothing is typed before the guest has enabled the interrupt for received bytes: a driver that starts
/// throws away what its port had received until then.
pub fn type_in(uart: &Shared<Uart>, mut bytes: &[u8]) {
    let mut guard = uart.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = Arc::clone(&guard.changed);
    while !bytes.is_empty() {
        let ready = |uart: &Uart| uart.listening && uart.serial.fifo_capacity() > 0;
        if !ready(&guard) {
            guard = changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        // In loopback mode, in which drivers look whether a port is there, nothing gets in.
        match guard.serial.enqueue_raw_bytes(bytes) {
            Ok(taken) if taken > 0 => bytes = &bytes[taken..],
            _ => {
                let tick = Duration::from_millis(1);
                (guard, _) =
                    changed.wait_timeout(guard, tick).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use testkit::Printed;

    use super::*;
    use crate::bus::{CountedLine, shared};

    const DATA: u64 = 0;
    const LSR: u64 = 5;
    const IER_EMPTY: u8 = 1 << 1;

    fn read(uart: &Shared<Uart>, offset: u64) -> u8 {
        let mut byte = [0];
        uart.lock().unwrap().read(offset, &mut byte);
        byte[0]
    }

    fn write(uart: &Shared<Uart>, offset: u64, value: u8) {
        uart.lock().unwrap().write(offset, &[value]);
    }

    #[test]
    fn sent_bytes_are_printed_and_an_empty_transmitter_interrupts() {
        let (line, screen) = (CountedLine::default(), Printed::default());
        let uart = shared(Uart::new(line.clone(), screen.clone()));
        write(&uart, DATA, b'a');
        assert_eq!(line.count(), 0, "interrupts are not enabled yet");
        write(&uart, IER, IER_EMPTY);
        write(&uart, DATA, b'b');
        assert!(line.count() >= 1);
        assert_eq!(screen.bytes(), b"ab");
    }

    #[test]
    fn nothing_is_typed_before_the_guest_listens_and_nothing_is_lost_after() {
        let line = CountedLine::default();
        let uart = shared(Uart::new(line.clone(), io::sink()));
        // The baud rate's divisor stands at IER's offset and is not IER.
        write(&uart, u64::from(LCR), LCR_DLAB);
        write(&uart, IER, IER_RECEIVED);
        write(&uart, u64::from(LCR), 0x03);
        // A driver looks what there is.
        write(&uart, IER, IER_ALL);

        // More than the port's FIFO holds.
        let text: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        let typist = thread::spawn({
            let (uart, text) = (Arc::clone(&uart), text.clone());
            move || type_in(&uart, &text)
        });
        thread::sleep(Duration::from_millis(20));
        assert_eq!(read(&uart, LSR) & 1, 0, "typed before the guest listened");

        write(&uart, IER, IER_RECEIVED);
        let mut received = Vec::new();
        while received.len() < text.len() {
            if read(&uart, LSR) & 1 == 1 {
                received.push(read(&uart, DATA));
            }
        }
        typist.join().unwrap();
        assert_eq!(received, text);
        assert!(line.count() > 1);
    }

    #[test]
    fn a_wide_access_reads_one_register_and_ones() {
        let uart = shared(Uart::new(CountedLine::default(), io::sink()));
        let mut data = [0xFF; 4];
        uart.lock().unwrap().read(LSR, &mut data);
        assert_eq!(data, [0x60, 0xFF, 0xFF, 0xFF]);
    }
}
