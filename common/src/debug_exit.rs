//! Introduced by stage 06: the debug-exit port as a device, with which a guest ends its machine.
//!
//! QEMU has it as `isa-debug-exit`, and it's at the same port. Stages 04 and 05 have it as an arm
//! of their `match`; now that the loop is in [`crate::run`], it becomes a [`Device`] that asks for
//! the end.

use crate::bus::Device;
use crate::run::{Ending, Stop};

/// Its port.
pub const PORT: u16 = 0xF4;

/// The device. The first byte written to it is the machine's exit code: 0 if all went well.
#[derive(Debug)]
pub struct DebugExit(Stop);

impl DebugExit {
    /// A port that ends the machine by `stop`.
    pub fn new(stop: Stop) -> Self {
        Self(stop)
    }
}

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0.now(Ending::Exited(data[0]));
    }
}
