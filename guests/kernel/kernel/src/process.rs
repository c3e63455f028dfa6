//! Programs: loading one, running it in ring 3, and the ways it ends.
//!
//! There is no scheduler. A program that runs another one waits for it, so the programs form a
//! stack, and [`run`] is a function that returns when the program is over, however that came about.

use core::fmt;

use kernel::elf;
use kernel::exception::{Description, PAGE_FAULT};
use kernel_abi::syscall::status;

use crate::memory::PAGE_SIZE;
use crate::memory::paging::{AddressSpace, BadAddress, OutOfMemory, Rights, USER_END};
use crate::serial::{self, println};
use crate::single::Single;
use crate::stubs::{self, Frame};
use crate::{cpu, gdt};

/// All user programs in one executable, built by build.rs; the command line's first word chooses.
static PROGRAMS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/user.elf"));

/// How many programs may wait for each other: each takes a piece of the one kernel stack.
const MAX_DEPTH: usize = 8;

/// The longest command line.
pub const MAX_COMMAND: usize = 1024;

/// The page above the stack: the command line.
const ARGUMENTS: u64 = USER_END - PAGE_SIZE;
const STACK_TOP: u64 = ARGUMENTS;
const STACK_BOTTOM: u64 = STACK_TOP - 16 * PAGE_SIZE;
/// A fault this close below the stack's bottom is called a stack overflow.
const STACK_GUARD: u64 = 16 * PAGE_SIZE;

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It called `exit`.
    Exited(u8),
    /// An exception ended it.
    Killed,
    /// Ctrl-C ended it.
    Interrupted,
}

impl Outcome {
    /// As the result of a `run` call.
    pub fn status(self) -> u64 {
        match self {
            Self::Exited(code) => code.into(),
            Self::Killed => status::KILLED,
            Self::Interrupted => status::INTERRUPTED,
        }
    }

    fn from_status(value: u64) -> Self {
        match value {
            status::KILLED => Self::Killed,
            status::INTERRUPTED => Self::Interrupted,
            code => Self::Exited(code as u8),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "ended with code {code}"),
            Self::Killed => f.write_str("was killed"),
            Self::Interrupted => f.write_str("was interrupted"),
        }
    }
}

/// Why a program could not start.
#[derive(Clone, Copy, Debug)]
pub enum Error {
    /// No frames are left.
    OutOfMemory,
    /// Too many programs wait for each other.
    TooDeep,
    /// The executable is damaged.
    Executable,
}

impl From<OutOfMemory> for Error {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl From<BadAddress> for Error {
    fn from(_: BadAddress) -> Self {
        Self::Executable
    }
}

impl From<elf::Error> for Error {
    fn from(_: elf::Error) -> Self {
        Self::Executable
    }
}

/// A program that runs, or waits for the one above it.
struct Process {
    space: AddressSpace,
    /// The command line's first word, for reports.
    name: [u8; 16],
    depth: usize,
}

/// The program that runs.
static CURRENT: Single<Option<Process>> = Single::new(None);

/// Runs a program until it ends.
pub fn run(command: &[u8]) -> Result<Outcome, Error> {
    let depth = CURRENT.borrow().as_ref().map_or(0, |process| process.depth + 1);
    if depth == MAX_DEPTH {
        return Err(Error::TooDeep);
    }
    let (space, entry) = load(command)?;
    let mut name = [0; 16];
    let first_word = command.split(|byte| *byte == b' ').next().unwrap_or_default();
    name.iter_mut().zip(first_word).for_each(|(to, from)| *to = *from);

    let outer_tables = cpu::cr3();
    let outer_stack = gdt::kernel_stack();
    let top = space.top();
    let outer = CURRENT.borrow().replace(Process { space, name, depth });
    // SAFETY: the new tables have the kernel in common with the old ones, and map the program.
    let value = unsafe {
        cpu::set_cr3(top);
        stubs::enter(entry, STACK_TOP, ARGUMENTS, command.len() as u64)
    };
    gdt::set_kernel_stack(outer_stack);
    // SAFETY: these were in force before.
    unsafe { cpu::set_cr3(outer_tables) };
    *CURRENT.borrow() = outer;
    Ok(Outcome::from_status(value))
}

/// Builds the address space of a new program; its entry point.
fn load(command: &[u8]) -> Result<(AddressSpace, u64), Error> {
    let mut space = AddressSpace::new()?;
    for segment in elf::segments(PROGRAMS)? {
        let segment = segment?;
        let rights = Rights { write: segment.write, execute: segment.execute };
        let first = segment.address / PAGE_SIZE * PAGE_SIZE;
        for page in (first..segment.address + segment.length).step_by(PAGE_SIZE as usize) {
            space.map(page, rights)?;
        }
        space.load(segment.address, segment.bytes)?;
    }
    for page in (STACK_BOTTOM..STACK_TOP).step_by(PAGE_SIZE as usize) {
        space.map(page, Rights { write: true, execute: false })?;
    }
    space.map(ARGUMENTS, Rights::default())?;
    space.load(ARGUMENTS, command)?;
    Ok((space, elf::entry(PROGRAMS)?))
}

/// Ends the running program.
pub fn end(outcome: Outcome) -> ! {
    // SAFETY: only called on the way back to ring 3, from a system call, an exception or an
    // interrupt of the running program, with nothing borrowed.
    unsafe { stubs::leave(outcome.status()) }
}

/// Ends the running program if Ctrl-C was typed. The first one, the shell, reads Ctrl-C like any
/// other key.
pub fn check_interrupt() {
    let may_be_ended = CURRENT.borrow().as_ref().is_some_and(|process| process.depth > 0);
    if may_be_ended && serial::take_interrupt() {
        println!("^C");
        end(Outcome::Interrupted);
    }
}

/// Ends the running program because of an exception, and says why.
pub fn kill(frame: &Frame, description: &Description, cr2: u64) -> ! {
    {
        let current = CURRENT.borrow();
        let name = current.as_ref().map_or(&[][..], |process| &process.name);
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        println!("\n*** {}: {description}", name.escape_ascii());
        println!(
            "    in ring {} at RIP {:#x}, RSP {:#x}, error code {:#x}: killed",
            frame.cs & 3,
            frame.rip,
            frame.rsp,
            frame.error_code,
        );
        let overflow = (STACK_BOTTOM - STACK_GUARD..STACK_BOTTOM).contains(&cr2);
        if description.vector == PAGE_FAULT && overflow {
            println!("    the stack is full: it ends at {STACK_BOTTOM:#x}");
        }
    }
    end(Outcome::Killed)
}

/// Calls `f` with the running program's memory.
pub fn with_memory<T>(f: impl FnOnce(&mut AddressSpace) -> T) -> T {
    let mut current = CURRENT.borrow();
    f(&mut current.as_mut().expect("a program is running").space)
}
