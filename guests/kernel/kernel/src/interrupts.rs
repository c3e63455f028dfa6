//! The interrupt descriptor table, and what happens on each vector. (SDM vol. 3, chapter 7.)

use core::arch::asm;
use core::mem::size_of;

use kernel::exception::{BREAKPOINT, DOUBLE_FAULT, Description};
use kernel_abi::syscall::VECTOR;

use crate::gdt::{
    IST_EXCEPTION, IST_INTERRUPT, IST_LAST_RESORT, KERNEL_CODE, TablePointer, kernel_stack,
};
use crate::serial::println;
use crate::stubs::{Frame, STUB_SIZE, STUBS, int_80_stub, interrupt_stubs};
use crate::{cpu, entry, gdt, memory, pic, pit, process, serial};

const NMI: usize = 2;
const MACHINE_CHECK: usize = 18;

/// A 64-bit interrupt gate (SDM vol. 3, figure 7-8).
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    const ABSENT: Self = Self {
        offset_low: 0,
        selector: 0,
        ist: 0,
        kind: 0,
        offset_middle: 0,
        offset_high: 0,
        reserved: 0,
    };

    /// An interrupt gate: it turns interrupts off on the way in. `ring` is the least privileged one
    /// that may come here by `int`; for hardware it does not matter.
    fn new(handler: u64, ist: u8, ring: u8) -> Self {
        Self {
            offset_low: handler as u16,
            selector: KERNEL_CODE,
            ist,
            kind: 0x8e | ring << 5,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

static mut IDT: [Gate; 256] = [Gate::ABSENT; 256];

/// Fills and loads the IDT.
pub fn init() {
    let mut gates = [Gate::ABSENT; 256];
    for (vector, gate) in gates.iter_mut().enumerate().take(STUBS) {
        let stub = interrupt_stubs as *const () as u64 + (vector * STUB_SIZE) as u64;
        let ist = match vector {
            NMI | MACHINE_CHECK => IST_LAST_RESORT,
            _ if vector == usize::from(DOUBLE_FAULT) => IST_LAST_RESORT,
            0..32 => IST_EXCEPTION,
            _ => IST_INTERRUPT,
        };
        // Ring 3 may raise a breakpoint on purpose, nothing else: `int 14` is a #GP, not a page
        // fault.
        let ring = if vector == usize::from(BREAKPOINT) { 3 } else { 0 };
        *gate = Gate::new(stub, ist, ring);
    }
    // The system call gate needs no IST stack: only ring 3 comes through it, and then the CPU
    // switches to RSP0. It must not have one either, for a call may sleep, and another program's
    // call would land on it.
    gates[usize::from(VECTOR)] = Gate::new(int_80_stub as *const () as u64, 0, 3);
    // SAFETY: nothing uses the IDT yet; from here on it stays as it is.
    unsafe {
        IDT = gates;
        let limit = size_of::<[Gate; 256]>() as u16 - 1;
        let pointer = TablePointer { limit, base: &raw const IDT as u64 };
        asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack));
    }
}

/// Called by the stubs with the interrupted registers; interrupts are off.
pub extern "sysv64" fn interrupt(frame: &mut Frame) {
    let vector = frame.vector as u8;
    match vector.checked_sub(pic::FIRST_VECTOR) {
        None => exception(frame),
        Some(7 | 15) if !pic::in_service(vector - pic::FIRST_VECTOR) => {}
        Some(line) => {
            match line {
                pic::TIMER => pit::tick(),
                pic::SERIAL => serial::receive(),
                _ => {}
            }
            pic::end_of_interrupt(line);
            if frame.in_user_mode() {
                process::check_interrupt();
            }
        }
    }
}

/// An exception in a program ends the program, one in the kernel the kernel.
fn exception(frame: &Frame) {
    let cr2 = cpu::cr2();
    let description = Description { vector: frame.vector as u8, error_code: frame.error_code, cr2 };
    if frame.in_user_mode() {
        process::kill(frame, &description, cr2);
    }
    println!("\nexception in the kernel: {description}, error code {:#x}", frame.error_code);
    let guards = [entry::stack_guard()].into_iter().chain(gdt::stack_guards());
    if guards.into_iter().any(|guard| cr2.wrapping_sub(guard) < memory::PAGE_SIZE) {
        println!("a kernel stack is full (CR2 {cr2:#x} is its guard page)");
    }
    println!(
        "RIP {:#x} RSP {:#x} RFLAGS {:#x} CS {:#x} SS {:#x} CR2 {cr2:#x} CR3 {:#x} RSP0 {:#x}",
        frame.rip,
        frame.rsp,
        frame.rflags,
        frame.cs,
        frame.ss,
        cpu::cr3(),
        kernel_stack(),
    );
    println!(
        "RAX {:#x} RBX {:#x} RCX {:#x} RDX {:#x} RSI {:#x} RDI {:#x} RBP {:#x}",
        frame.rax, frame.rbx, frame.rcx, frame.rdx, frame.rsi, frame.rdi, frame.rbp,
    );
    panic!("unhandled exception");
}
