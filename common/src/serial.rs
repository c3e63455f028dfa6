//! Introduced by stage 04: a serial port, written by hand and as small as it can be.
//!
//! A PC's serial port is a 16550 UART: eight registers of one byte each (National PC16550D data sheet,
//! section 8). To print and to receive, a program needs three of them. Interrupts, the FIFO and the modem's
//! lines are not here: who wants these takes a finished UART, as stage 06 does.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::bus::Device;
use crate::teletype::{Teletype, Typed};

/// Its eight ports: where a PC has COM1.
pub const PORTS: Range<u64> = 0x3F8..0x400;

/// Written: transmitter holding register. Read: receiver buffer register.
const THR_RBR: u64 = 0;
/// Line control register.
const LCR: u64 = 3;
/// Line status register.
const LSR: u64 = 5;

/// In LCR: registers 0 and 1 are the divisor that sets the speed, until this is cleared.
const LCR_DLAB: u8 = 1 << 7;
/// In LSR: a byte can be read from RBR.
const LSR_DATA_READY: u8 = 1 << 0;
/// In LSR: a byte can be written to THR, and the line is idle. It always is: our line has no speed.
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;

/// What the guest receives once at the end of input: Ctrl-D, which ends a terminal's input.
const END_OF_TRANSMISSION: u8 = 0x04;

/// How long the guest is held in the reading of LSR, if it does nothing but look for a byte. It can't tell
/// that from a slow bus, and the host's CPU is free meanwhile.
const PATIENCE: Duration = Duration::from_millis(10);

/// A serial port at the end of whose line a [`Teletype`] is.
pub struct Serial {
    tty: Arc<Teletype>,
    line_control: u8,
    /// LSR was the last register that was touched: who transmits would have found what it wants.
    polling: bool,
    end_was_sent: bool,
}

impl Serial {
    /// A port with `tty` at its other end.
    pub fn new(tty: Arc<Teletype>) -> Self {
        Self { tty, line_control: 0, polling: false, end_was_sent: false }
    }

    // ANCHOR: read
    fn read_register(&mut self, register: u64) -> u8 {
        let was_polling = std::mem::replace(&mut self.polling, register == LSR);
        match register {
            THR_RBR if !self.divisor_is_selected() => self.receive(),
            LCR => self.line_control,
            LSR => {
                let typed = if was_polling { self.tty.wait_for(PATIENCE) } else { self.tty.look() };
                let ready = match typed {
                    Typed::Ready => true,
                    Typed::Nothing => false,
                    Typed::Ended => !self.end_was_sent,
                };
                LSR_TRANSMITTER_EMPTY | if ready { LSR_DATA_READY } else { 0 }
            }
            _ => 0,
        }
    }
    // ANCHOR_END: read

    fn write_register(&mut self, register: u64, byte: u8) {
        self.polling = false;
        match register {
            THR_RBR if !self.divisor_is_selected() => self.tty.print(&[byte]),
            LCR => self.line_control = byte,
            _ => {}
        }
    }

    fn receive(&mut self) -> u8 {
        if let Some(byte) = self.tty.take() {
            return byte;
        }
        if self.tty.look() == Typed::Ended && !self.end_was_sent {
            self.end_was_sent = true;
            return END_OF_TRANSMISSION;
        }
        0
    }

    fn divisor_is_selected(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }
}

/// A wider access reaches the registers that follow, one byte each: the ISA bus splits it for a device
/// of 8 bits.
impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            self.write_register(register, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use testkit::Printed;

    fn read(serial: &mut Serial, register: u64) -> u8 {
        let mut byte = [0xFF];
        serial.read(register, &mut byte);
        byte[0]
    }

    /// As a driver receives: poll LSR, read RBR, until Ctrl-D.
    fn receive(serial: &mut Serial) -> Vec<u8> {
        let mut bytes = vec![];
        loop {
            if read(serial, LSR) & LSR_DATA_READY != 0 {
                match read(serial, THR_RBR) {
                    END_OF_TRANSMISSION => return bytes,
                    byte => bytes.push(byte),
                }
            }
        }
    }

    #[test]
    fn the_end_of_input_is_one_ctrl_d() {
        let tty = Teletype::new(std::io::sink());
        let mut serial = Serial::new(Arc::clone(&tty));
        assert_eq!(read(&mut serial, LSR), 0x60);
        assert_eq!(read(&mut serial, THR_RBR), 0, "nothing was received");
        tty.end_of_input();
        assert_eq!(read(&mut serial, LSR), 0x61);
        assert_eq!(read(&mut serial, THR_RBR), END_OF_TRANSMISSION);
        assert_eq!(read(&mut serial, LSR), 0x60);
        assert_eq!(read(&mut serial, THR_RBR), 0);
    }

    #[test]
    fn setting_the_speed_prints_nothing() {
        let printed = Printed::default();
        let mut serial = Serial::new(Teletype::new(printed.clone()));
        serial.write(LCR, &[0x83]);
        assert_eq!(read(&mut serial, LCR), 0x83);
        serial.write(THR_RBR, &[1, 0]);
        assert_eq!(read(&mut serial, THR_RBR), 0);
        serial.write(LCR, &[0x03]);
        serial.write(THR_RBR, b"x");
        assert_eq!(printed.bytes(), b"x");
    }

    #[test]
    fn a_wide_access_reaches_the_next_registers() {
        let printed = Printed::default();
        let mut serial = Serial::new(Teletype::new(printed.clone()));
        // THR, the interrupt enable register, FIFO control, and LCR.
        serial.write(THR_RBR, &[b'a', b'b', b'c', 0x80]);
        assert_eq!(printed.bytes(), b"a");
        let mut data = [0xFF; 4];
        serial.read(2, &mut data);
        assert_eq!(data, [0, 0x80, 0, 0x60]);
    }

    proptest! {
        #[test]
        fn what_is_sent_is_printed_byte_for_byte(bytes: Vec<u8>) {
            let printed = Printed::default();
            let mut serial = Serial::new(Teletype::new(printed.clone()));
            for byte in &bytes {
                prop_assert_ne!(read(&mut serial, LSR) & LSR_TRANSMITTER_EMPTY, 0);
                serial.write(THR_RBR, &[*byte]);
            }
            prop_assert_eq!(printed.bytes(), bytes);
        }

        #[test]
        fn what_is_typed_is_received_byte_for_byte(mut bytes: Vec<u8>) {
            bytes.retain(|&byte| byte != END_OF_TRANSMISSION);
            let tty = Teletype::new(std::io::sink());
            let mut serial = Serial::new(Arc::clone(&tty));
            let source = bytes.clone();
            let typist = thread::spawn(move || tty.feed(&source[..]));
            prop_assert_eq!(receive(&mut serial), bytes);
            typist.join().unwrap().unwrap();
        }

        #[test]
        fn no_access_does_harm(accesses: Vec<(bool, u64, Vec<u8>)>) {
            let tty = Teletype::new(std::io::sink());
            tty.end_of_input();
            let mut serial = Serial::new(tty);
            for (write, offset, mut data) in accesses {
                let offset = offset % (PORTS.end - PORTS.start);
                if write {
                    serial.write(offset, &data);
                } else {
                    serial.read(offset, &mut data);
                }
            }
        }
    }
}
