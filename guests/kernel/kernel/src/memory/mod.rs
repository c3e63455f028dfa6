//! Memory: what the loader reported ([`map`]), who owns which frame, and the page tables
//! ([`paging`]).

pub mod map;
pub mod paging;

use kernel::frame::Frames;

use crate::single::Single;

/// A page, and the frame behind it: 4 KiB.
pub const PAGE_SIZE: u64 = kernel::frame::FRAME_SIZE;

static FRAMES: Single<Frames> = Single::new(Frames::new());

/// Finds the free frames and puts the kernel's own page tables in force.
pub fn init() {
    // The first MiB is full of the PC's history; nothing there is worth having.
    FRAMES.borrow().add(&map::entries(), paging::kernel_end());
    paging::init();
}

/// Free frames and all frames.
pub fn frames() -> (u32, u32) {
    let frames = FRAMES.borrow();
    (frames.free(), frames.total())
}
