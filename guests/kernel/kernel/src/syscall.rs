//! What a program may ask for. (The contract stands in `abi/src/syscall.rs`.)

use kernel_abi::syscall::{BAD_ADDRESS, NO_ROOM, NO_SUCH_CALL, OUT_OF_RANGE, Syscall};

use crate::gdt::{KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA};
use crate::memory::{self, map};
use crate::process::{self, MAX_COMMAND, Outcome};
use crate::stubs::{Frame, syscall_stub};
use crate::{cpu, pit, serial};

const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;

/// EFER: the `syscall` instruction exists.
const EFER_SCE: u64 = 1 << 0;

/// RFLAGS that `syscall` clears on the way in: AC, NT, IOPL, DF, IF, TF. A program must not be able
/// to bring the kernel its single-stepping or its backward string instructions.
const FLAGS_TO_CLEAR: u64 = 0x4_7700;

/// STAR holds two bases: `syscall` takes CS and SS from the first (+0, +8), `sysretq` from the
/// second (CS +16, SS +8).
const USER_BASE: u16 = USER_DATA - 8;
const _: () = assert!(KERNEL_DATA == KERNEL_CODE + 8 && USER_CODE == USER_BASE + 16);

/// Switches the `syscall` instruction on. (SDM vol. 3, 6.8.8; APM vol. 2, 6.1.1.)
pub fn init() {
    // SAFETY: the registers get the values that gdt.rs and stubs.rs were made for.
    unsafe {
        cpu::write_msr(STAR, u64::from(USER_BASE) << 48 | u64::from(KERNEL_CODE) << 32);
        cpu::write_msr(LSTAR, syscall_stub as *const () as u64);
        cpu::write_msr(SFMASK, FLAGS_TO_CLEAR);
        cpu::write_msr(EFER, cpu::read_msr(EFER) | EFER_SCE);
    }
}

/// Called by both stubs, `syscall`'s and `int 0x80`'s.
pub extern "sysv64" fn call(frame: &mut Frame) {
    let (first, second) = (frame.rdi, frame.rsi);
    let result = match Syscall::from_number(frame.rax) {
        Some(Syscall::Exit) => process::end(Outcome::Exited(first as u8)),
        Some(Syscall::Write) => write(first, second),
        Some(Syscall::Read) => read(first, second),
        Some(Syscall::Ticks) => Ok(pit::ticks()),
        Some(Syscall::Sleep) => sleep(first),
        Some(Syscall::Run) => run(first, second),
        Some(Syscall::Memory) => memory_range(first, second),
        Some(Syscall::Frames) => {
            let (free, total) = memory::frames();
            Ok(u64::from(total) << 32 | u64::from(free))
        }
        None => Err(NO_SUCH_CALL),
    };
    frame.rax = result.unwrap_or_else(|error| error);
    process::check_interrupt();
}

/// Copies through a small buffer: a program may ask for a long write without the kernel needing
/// that much memory.
fn write(address: u64, length: u64) -> Result<u64, u64> {
    let mut buffer = [0; 256];
    let mut done = 0;
    while done < length {
        let size = (length - done).min(buffer.len() as u64);
        let piece = &mut buffer[..size as usize];
        let here = address.checked_add(done).ok_or(BAD_ADDRESS)?;
        process::with_memory(|memory| memory.read(here, piece)).map_err(|_| BAD_ADDRESS)?;
        serial::write(piece);
        done += size;
        // A long write can be stopped, too.
        process::check_interrupt();
    }
    Ok(length)
}

fn read(address: u64, length: u64) -> Result<u64, u64> {
    let mut count = 0;
    while count < length {
        let here = address.checked_add(count).ok_or(BAD_ADDRESS)?;
        // Looked at first: a byte taken from the queue cannot be put back.
        if !process::with_memory(|memory| memory.may_write(here)) {
            return Err(BAD_ADDRESS);
        }
        match serial::read() {
            Some(byte) => {
                process::with_memory(|memory| memory.write(here, &[byte]))
                    .map_err(|_| BAD_ADDRESS)?;
                count += 1;
            }
            None if count > 0 => break,
            None => {
                process::check_interrupt();
                cpu::wait_for_interrupt();
                process::check_interrupt();
            }
        }
    }
    Ok(count)
}

fn sleep(ticks: u64) -> Result<u64, u64> {
    let end = pit::ticks().saturating_add(ticks);
    while pit::ticks() < end {
        process::check_interrupt();
        cpu::wait_for_interrupt();
    }
    Ok(0)
}

fn run(address: u64, length: u64) -> Result<u64, u64> {
    let mut command = [0; MAX_COMMAND];
    let command = usize::try_from(length).ok().and_then(|length| command.get_mut(..length));
    let command = command.ok_or(OUT_OF_RANGE)?;
    process::with_memory(|memory| memory.read(address, command)).map_err(|_| BAD_ADDRESS)?;
    process::run(command).map(Outcome::status).map_err(|_| NO_ROOM)
}

fn memory_range(index: u64, address: u64) -> Result<u64, u64> {
    let entry = usize::try_from(index).ok().and_then(map::entry).ok_or(OUT_OF_RANGE)?;
    process::with_memory(|memory| memory.write(address, &entry.to_bytes()))
        .map_err(|_| BAD_ADDRESS)?;
    Ok(0)
}
