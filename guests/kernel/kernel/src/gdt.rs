//! Segments, and the stacks that the CPU switches to by itself.
//!
//! Long mode hardly uses segmentation: base and limit of code and data are ignored. What is left is
//! the privilege level, and the TSS with its stack pointers. (SDM vol. 3, 3.2.4, 3.4.5, 8.7; APM
//! vol. 2,
//! 4.8, 12.2.5.)

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};

/// Selectors. `sysret` fixes the order: user code must be 16 above the base in STAR, user data 8
/// above it, each with RPL 3 (APM vol. 2, 6.1.1).
pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x18 | 3;
pub const USER_CODE: u16 = 0x20 | 3;
const TSS: u16 = 0x28;

/// Interrupt stack table entries, 1 to 7; 0 in a gate means "no switch inside ring 0".
///
/// The `core` library uses the *red zone*: System V code may keep data in the 128 bytes below RSP
/// without moving RSP. An interrupt that arrives in ring 0 without a stack switch would push its
/// frame right over them. So whatever can interrupt the kernel gets an IST stack, and each kind has
/// one of its own, for the CPU starts at its top every time: an exception in an interrupt handler
/// must not land on that handler's frame, nor a double fault on the exception's.
pub const IST_INTERRUPT: u8 = 1;
pub const IST_EXCEPTION: u8 = 2;
pub const IST_LAST_RESORT: u8 = 3;

/// A stack whose lowest page is its guard: the kernel's page tables leave it out, so that an
/// overflow is a double fault with a report instead of silent damage.
#[repr(C, align(4096))]
pub struct Stack<const SIZE: usize> {
    guard: [u8; 4096],
    bytes: [u8; SIZE],
}

impl<const SIZE: usize> Stack<SIZE> {
    pub const fn new() -> Self {
        Self { guard: [0; 4096], bytes: [0; SIZE] }
    }
}

type InterruptStack = Stack<{ 4 * 4096 }>;
static mut INTERRUPT_STACKS: [InterruptStack; 3] = [const { Stack::new() }; 3];

/// The 64-bit task state segment (SDM vol. 3, figure 8-11). Packed, for its 64-bit fields stand at
/// odd multiples of four.
#[repr(C, packed(4))]
pub struct TaskState {
    reserved0: u32,
    /// Stack pointers for a switch to rings 0, 1, 2.
    rsp: [u64; 3],
    reserved1: u64,
    /// The interrupt stack table; IST 1 is the first.
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    /// Where the I/O permission bitmap starts; at the segment's end there is none, so no port is
    /// open to ring 3.
    io_map: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);
const _: () = assert!(offset_of!(TaskState, rsp) == RSP0_OFFSET);
const _: () = assert!(offset_of!(TaskState, ist) == 36);
const _: () = assert!(offset_of!(TaskState, io_map) == 102);

/// Where RSP0 stands in the TSS, for the assembly of [`crate::syscall`].
pub const RSP0_OFFSET: usize = 4;

/// The TSS. The CPU reads it behind the compiler's back, hence the cell.
#[repr(transparent)]
pub struct TssCell(UnsafeCell<TaskState>);

// SAFETY: there is one CPU, and only `init` and `set_kernel_stack` write.
unsafe impl Sync for TssCell {}

pub static TASK_STATE: TssCell = TssCell(UnsafeCell::new(TaskState {
    reserved0: 0,
    rsp: [0; 3],
    reserved1: 0,
    ist: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: size_of::<TaskState>() as u16,
}));

static mut GDT: [u64; 7] = [
    0,
    // Present, type code/data, 64-bit code (L) or writable data; base and limit do not count.
    0x0020_9a00_0000_0000, // kernel code: DPL 0, L
    0x0000_9200_0000_0000, // kernel data: DPL 0
    0x0000_f200_0000_0000, // user data: DPL 3
    0x0020_fa00_0000_0000, // user code: DPL 3, L
    0,                     // TSS, two entries long: its base has 64 bits
    0,
];

/// What `lgdt` and `lidt` read.
#[repr(C, packed)]
pub struct TablePointer {
    pub limit: u16,
    pub base: u64,
}

/// Loads the GDT with the TSS.
pub fn init() {
    let tss = TASK_STATE.0.get();
    for index in 0..3 {
        // SAFETY: nothing uses the TSS yet.
        unsafe { (*tss).ist[index] = stack_guards()[index] + size_of::<InterruptStack>() as u64 };
    }
    let base = tss as u64;
    let limit = size_of::<TaskState>() as u64 - 1;
    let descriptor = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    // SAFETY: nothing uses the GDT yet; from here on it stays as it is. The far return reloads CS,
    // which no `mov` can.
    unsafe {
        let gdt = &raw mut GDT;
        (*gdt)[5] = descriptor;
        (*gdt)[6] = base >> 32;
        let pointer = TablePointer { limit: size_of::<[u64; 7]>() as u16 - 1, base: gdt as u64 };
        asm!(
            "lgdt [{pointer}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            "mov ss, {data:x}",
            "mov fs, {zero:x}",
            "mov gs, {zero:x}",
            "ltr {tss:x}",
            pointer = in(reg) &raw const pointer,
            code = const KERNEL_CODE,
            scratch = out(reg) _,
            data = in(reg) u64::from(KERNEL_DATA),
            zero = in(reg) 0_u64,
            tss = in(reg) u64::from(TSS),
        );
    }
}

/// Sets the stack on which the kernel starts when ring 3 calls (RSP0, and `syscall`'s).
pub fn set_kernel_stack(top: u64) {
    // SAFETY: the kernel runs on another stack pointer now; the CPU reads RSP0 only on the way out
    // of ring 3.
    unsafe { (*TASK_STATE.0.get()).rsp[0] = top }
}

/// The stack set by [`set_kernel_stack`].
pub fn kernel_stack() -> u64 {
    // SAFETY: as above.
    unsafe { (*TASK_STATE.0.get()).rsp[0] }
}

/// The guard pages of the interrupt stacks.
pub fn stack_guards() -> [u64; 3] {
    let first = (&raw const INTERRUPT_STACKS) as u64;
    [0, 1, 2].map(|index| first + index * size_of::<InterruptStack>() as u64)
}
