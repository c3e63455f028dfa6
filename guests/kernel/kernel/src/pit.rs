//! The 8254 timer's channel 0, which raises IRQ 0. (Intel 8254 data sheet.)

use core::sync::atomic::{AtomicU64, Ordering};

pub use kernel_abi::syscall::TICKS_PER_SECOND;

use crate::cpu::out;

/// The PC's timer crystal, in Hz.
const FREQUENCY: u64 = 1_193_182;

const CHANNEL_0: u16 = 0x40;
const MODE: u16 = 0x43;

static TICKS: AtomicU64 = AtomicU64::new(0);

/// Starts the ticks.
pub fn init() {
    let [low, high] = ((FREQUENCY / TICKS_PER_SECOND) as u16).to_le_bytes();
    // SAFETY: channel 0, low byte then high byte, mode 2 (rate generator).
    unsafe {
        out(MODE, 0x34);
        out(CHANNEL_0, low);
        out(CHANNEL_0, high);
    }
}

/// IRQ 0.
pub fn tick() {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

/// Ticks since the start.
pub fn ticks() -> u64 {
    TICKS.load(Ordering::Relaxed)
}
