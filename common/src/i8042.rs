//! Introduced by stage 08: of the i8042, a PC's keyboard controller, the one wire that resets the processor.
//!
//! Since the PC AT the controller's output port holds the processor's reset line, and command 0xFE pulses
//! it. Without a keyboard there is nothing else to it; that much is [`vm_superio::I8042Device`].

use std::io;

use vm_superio::{I8042Device, Trigger};

use crate::bus::Device;
use crate::run::{Ending, Stop};

/// First port: data at 0x60; status and command at 0x64.
pub const PORT: u16 = 0x60;

/// How many ports the device has.
pub const PORTS: u16 = 5;

/// The command register's offset.
pub const COMMAND: u64 = 4;

/// The command that resets the processor.
pub const RESET: u8 = 0xFE;

struct Reset(Stop);

impl Trigger for Reset {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.now(Ending::Reset);
        Ok(())
    }
}

/// The controller. It reads as one without anything to say, always ready for a command.
pub struct I8042(I8042Device<Reset>);

impl I8042 {
    /// A controller whose reset line ends the machine through `stop`.
    pub fn new(stop: Stop) -> Self {
        Self(I8042Device::new(Reset(stop)))
    }
}

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data[0] = self.0.read(offset as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // `Reset` cannot fail.
        let _ = self.0.write(offset as u8, data[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run;

    #[test]
    fn only_the_reset_command_resets() {
        let (stop, stopped) = run::stop();
        let mut i8042 = I8042::new(stop);
        let mut status = [0xFF];
        i8042.read(COMMAND, &mut status);
        assert_eq!(status, [0], "bit 1 clear: ready for a command");
        i8042.write(0, &[RESET]);
        i8042.write(COMMAND, &[0xAA]);
        assert_eq!(stopped.ending(), None);
        i8042.write(COMMAND, &[RESET]);
        assert_eq!(stopped.ending(), Some(Ending::Reset));
    }
}
