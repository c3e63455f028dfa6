//! Ways to misbehave. The kernel has to end each of them, and nothing else.

use core::arch::asm;
use core::hint::black_box;

/// One way.
pub struct Way {
    pub name: &'static str,
    pub help: &'static str,
    pub act: fn(),
}

/// All of them. What each does is undefined for Rust, so it is done in assembly, where it is an
/// instruction like any other.
pub const WAYS: &[Way] = &[
    Way { name: "null", help: "reads address 0", act: null },
    Way { name: "hlt", help: "a privileged instruction", act: hlt },
    Way { name: "cli", help: "turns interrupts off, or tries", act: cli },
    Way { name: "out", help: "writes to an I/O port", act: out },
    Way { name: "cr3", help: "changes the page tables", act: cr3 },
    Way { name: "kernel", help: "reads the kernel's memory", act: kernel },
    Way { name: "code", help: "writes to its own code", act: code },
    Way { name: "data", help: "executes its own stack", act: data },
    Way { name: "stack", help: "calls itself without end", act: stack },
    Way { name: "divide", help: "divides by zero", act: divide },
    Way { name: "invalid", help: "an invalid instruction", act: invalid },
    Way { name: "int", help: "raises the timer's interrupt", act: int },
    Way { name: "panic", help: "a Rust panic", act: panic },
];

fn null() {
    // SAFETY: there is nothing at address 0, so the program ends here.
    unsafe { asm!("mov {0}, [{0}]", inout(reg) 0_u64 => _, options(nostack)) }
}

fn hlt() {
    // SAFETY: ring 3 may not, so the program ends here.
    unsafe { asm!("hlt", options(nostack)) }
}

fn cli() {
    // SAFETY: ring 3 may not, so the program ends here.
    unsafe { asm!("cli", options(nostack)) }
}

fn out() {
    // SAFETY: ring 3 may not, so the program ends here, and not the machine.
    unsafe { asm!("out dx, al", in("dx") kernel_abi::boot::DEBUG_EXIT_PORT, in("al") 66_u8) }
}

fn cr3() {
    // SAFETY: ring 3 may not, so the program ends here.
    unsafe { asm!("mov cr3, {}", in(reg) 0_u64, options(nostack)) }
}

fn kernel() {
    let address = kernel_abi::boot::KERNEL_START;
    // SAFETY: ring 3 may not, so the program ends here.
    unsafe { asm!("mov {0}, [{0}]", inout(reg) address => _, options(nostack)) }
}

fn code() {
    // SAFETY: code pages are read-only, so the program ends here.
    unsafe { asm!("mov byte ptr [{}], 0x90", in(reg) code as *const (), options(nostack)) }
}

fn data() {
    // `ret`, so that nothing bad happens if this works.
    let instructions = black_box([0xc3_u8]);
    // SAFETY: the stack's pages are not executable, so the program ends here.
    unsafe { asm!("call {}", in(reg) &raw const instructions) }
}

fn stack() {
    // SAFETY: below the stack there is nothing, so the program ends here.
    unsafe { asm!("2: call 2b") }
}

fn divide() {
    // SAFETY: this raises an exception, so the program ends here.
    unsafe {
        asm!("div {0:e}", in(reg) 0_u32, inout("eax") 1_u32 => _, inout("edx") 0_u32 => _,
            options(nostack));
    }
}

fn invalid() {
    // SAFETY: this raises an exception, so the program ends here.
    unsafe { asm!("ud2", options(nostack)) }
}

fn int() {
    // SAFETY: the gate is closed to ring 3, so the program ends here.
    unsafe { asm!("int 0x20", options(nostack)) }
}

fn panic() {
    panic!("as ordered");
}
