//! Where the loader jumps to. Nothing of what compiled Rust code takes for granted holds yet.

use core::arch::global_asm;

use crate::gdt::Stack;

/// The stack on which the kernel runs from entry to power-off.
static mut STACK: Stack<{ 16 * 4096 }> = Stack::new();

// 1. SSE. The `core` library that comes with the toolchain was compiled for Linux, where SSE
//    is always on, and so is what the compiler makes of our own code: XMM registers move and clear 16
//    bytes at a time. Such an
//    instruction raises #UD until CR4.OSFXSR is set, and #NM or #UD while CR0.EM or TS stand.
//    (SDM vol. 3, 15.1, "Providing operating system support for SSE".)
// 2. A stack of our own: the contract promises none.
// 3. A clear .bss: a small boot loader need not know how long it is.
global_asm!(
    ".section .text.entry, \"ax\"",
    ".global _start",
    "_start:",
    "cli",
    "cld",
    "mov rax, cr0",
    "and eax, {not_em_ts}",
    "or eax, {mp_ne_wp}",
    "mov cr0, rax",
    "mov rax, cr4",
    "or eax, {osfxsr_osxmmexcpt}",
    "mov cr4, rax",
    "mov rsi, rdi",
    "lea rdi, [rip + __bss_start]",
    "lea rcx, [rip + __bss_end]",
    "sub rcx, rdi",
    "shr rcx, 3",
    "xor eax, eax",
    "rep stosq",
    "mov rdi, rsi",
    "lea rsp, [rip + {stack} + {size}]",
    // A frame pointer of 0 ends a debugger's backtrace here.
    "xor ebp, ebp",
    "call {start}",
    "ud2",
    not_em_ts = const !(1 << 2 | 1 << 3),
    mp_ne_wp = const 1 << 1 | 1 << 5 | 1 << 16,
    osfxsr_osxmmexcpt = const 1 << 9 | 1 << 10,
    stack = sym STACK,
    size = const size_of::<Stack<{ 16 * 4096 }>>(),
    start = sym crate::start,
);

/// The page below the stack, which [`crate::memory`] leaves unmapped.
pub fn stack_guard() -> u64 {
    (&raw const STACK) as u64
}
