//! The system calls: number in `RAX`, arguments in `RDI` and `RSI`, result in `RAX`.
//!
//! Two ways lead in and mean the same: the `syscall` instruction, which also overwrites `RCX` and
//! `R11`, and `int 0x80`. A result of [`ERROR`] or more (as an unsigned number) is an error.

/// What a user program may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Syscall {
    /// `exit(code)`: ends the program. The first program's end turns the machine off.
    Exit = 0,
    /// `write(address, length)`: prints bytes on the console.
    Write = 1,
    /// `read(address, length)`: waits for at least one byte from the console; returns how many
    /// were stored.
    Read = 2,
    /// `ticks()`: timer ticks since the kernel started, [`TICKS_PER_SECOND`] a second.
    Ticks = 3,
    /// `sleep(ticks)`: waits.
    Sleep = 4,
    /// `run(address, length)`: runs another program, with this command line, in an address space
    /// of its own and waits for it to end; returns a status (see [`status`]).
    Run = 5,
    /// `memory(index, address)`: stores the memory map's entry number `index`, a
    /// [`crate::boot::E820Entry`].
    Memory = 6,
    /// `frames()`: free frames of 4 KiB in the low half, all frames in the high half.
    Frames = 7,
}

impl Syscall {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Exit,
        Self::Write,
        Self::Read,
        Self::Ticks,
        Self::Sleep,
        Self::Run,
        Self::Memory,
        Self::Frames,
    ];

    /// The call with this number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }
}

/// The interrupt vector that is the second way in.
pub const VECTOR: u8 = 0x80;

/// How often the timer ticks.
pub const TICKS_PER_SECOND: u64 = 100;

/// Results from here on are errors.
pub const ERROR: u64 = -4095_i64 as u64;
/// There is no call with this number.
pub const NO_SUCH_CALL: u64 = -1_i64 as u64;
/// An address and length that are not all the program's own memory.
pub const BAD_ADDRESS: u64 = -2_i64 as u64;
/// No frames left, or too many programs inside each other.
pub const NO_ROOM: u64 = -3_i64 as u64;
/// An index or length that is out of range.
pub const OUT_OF_RANGE: u64 = -4_i64 as u64;

/// The result of [`Syscall::Run`]: the program's exit code in the low byte, or one of these.
pub mod status {
    /// An exception ended the program.
    pub const KILLED: u64 = 0x100;
    /// Ctrl-C ended the program.
    pub const INTERRUPTED: u64 = 0x200;
}
