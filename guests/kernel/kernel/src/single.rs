//! Global state on a machine with one CPU.

use core::cell::{RefCell, RefMut};

/// A global that one CPU uses. Ring 0 runs with interrupts off except inside
/// [`crate::cpu::wait_for_interrupt`], so an interrupt handler never meets a half-done change, as
/// long as nobody sleeps with a borrow in hand; who does is caught by the `RefCell`.
pub struct Single<T>(RefCell<T>);

// SAFETY: there is one CPU, and no preemption inside the kernel (see above).
unsafe impl<T> Sync for Single<T> {}

impl<T> Single<T> {
    pub const fn new(value: T) -> Self {
        Self(RefCell::new(value))
    }

    /// The value, for as long as the result lives.
    pub fn borrow(&self) -> RefMut<'_, T> {
        self.0.borrow_mut()
    }
}
