//! The system calls as functions, the console, and the start of every program.

use core::arch::{asm, naked_asm};
use core::fmt;
use core::panic::PanicInfo;

use kernel_abi::boot::E820Entry;
use kernel_abi::syscall::{ERROR, Syscall, status};
use user::line::{Event, Line};

/// Where the kernel enters: RDI is the address, RSI the length of the command line. The stack is
/// aligned as before a `call`, so this calls.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "sysv64" fn _start() -> ! {
    naked_asm!("call {start}", "ud2", start = sym start)
}

extern "sysv64" fn start(address: *const u8, length: usize) -> ! {
    // SAFETY: the kernel put the command line there, and it stays.
    let command = unsafe { core::slice::from_raw_parts(address, length) };
    exit(crate::main(core::str::from_utf8(command).unwrap_or_default()))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("panic: {info}");
    exit(101)
}

/// A system call by the `syscall` instruction.
fn call(call: Syscall, first: u64, second: u64) -> u64 {
    let result;
    // SAFETY: the kernel touches only memory that the arguments name; callers name their own.
    unsafe {
        asm!("syscall", inlateout("rax") call as u64 => result, in("rdi") first, in("rsi") second,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

/// A system call by the older way in, `int 0x80`.
pub fn call_by_interrupt(call: Syscall) -> u64 {
    let result;
    // SAFETY: as in `call`; and the kernel keeps all other registers.
    unsafe {
        asm!("int 0x80", inlateout("rax") call as u64 => result, in("rdi") 0, in("rsi") 0,
            options(nostack));
    }
    result
}

/// Ends the program.
pub fn exit(code: u8) -> ! {
    call(Syscall::Exit, code.into(), 0);
    unreachable!("exit returned")
}

/// Prints bytes.
pub fn write(bytes: &[u8]) {
    call(Syscall::Write, bytes.as_ptr() as u64, bytes.len() as u64);
}

/// Waits for a typed byte.
fn read() -> u8 {
    let mut byte = 0_u8;
    call(Syscall::Read, &raw mut byte as u64, 1);
    byte
}

/// Timer ticks since the kernel started.
pub fn ticks() -> u64 {
    call(Syscall::Ticks, 0, 0)
}

/// Waits.
pub fn sleep(ticks: u64) {
    call(Syscall::Sleep, ticks, 0);
}

/// How another program ended.
pub enum Ended {
    /// By itself.
    Exited,
    /// The kernel killed it, and said why.
    Killed,
    /// By Ctrl-C.
    Interrupted,
    /// It did not start: out of memory.
    NotStarted,
}

/// Runs another program and waits for its end.
pub fn run(command: &str) -> Ended {
    match call(Syscall::Run, command.as_ptr() as u64, command.len() as u64) {
        status::KILLED => Ended::Killed,
        status::INTERRUPTED => Ended::Interrupted,
        ERROR.. => Ended::NotStarted,
        _ => Ended::Exited,
    }
}

/// The memory map.
pub fn memory_map() -> impl Iterator<Item = E820Entry> {
    (0..).map_while(|index| {
        let mut entry = E820Entry::default();
        let result = call(Syscall::Memory, index, &raw mut entry as u64);
        (result < ERROR).then_some(entry)
    })
}

/// Free frames of 4 KiB, and all.
pub fn frames() -> (u32, u32) {
    let frames = call(Syscall::Frames, 0, 0);
    (frames as u32, (frames >> 32) as u32)
}

/// Prompts for a line and lets it be edited. `None` at the end of the input (Ctrl-D); a line given
/// up by Ctrl-C is empty.
pub fn read_line<'a>(line: &'a mut Line, prompt: &str) -> Option<&'a str> {
    print!("{prompt}");
    line.clear();
    loop {
        match line.feed(read(), write) {
            Event::More => {}
            Event::Complete => return Some(line.text()),
            Event::Cancelled => return Some(""),
            Event::End => return None,
        }
    }
}

/// The console for formatting. It collects a piece before it asks the kernel: `println!` comes in
/// fragments, and each write is a system call and, in a virtual machine, at least one exit.
pub struct Console {
    bytes: [u8; 256],
    length: usize,
}

impl Console {
    pub fn new() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.length == self.bytes.len() {
                write(&self.bytes);
                self.length = 0;
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        write(&self.bytes[..self.length]);
    }
}

macro_rules! print {
    ($($format:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::sys::Console::new(), $($format)*);
    }};
}

macro_rules! println {
    () => { print!("\n") };
    ($($format:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::sys::Console::new(), $($format)*);
    }};
}

pub(crate) use {print, println};
