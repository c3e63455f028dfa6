//! The crossings between ring 3 and ring 0, in assembly: the only code that runs with half of one
//! world and half of the other.

use core::arch::{global_asm, naked_asm};
use core::mem::{offset_of, size_of};

use crate::gdt::{KERNEL_CODE, RSP0_OFFSET, TASK_STATE, USER_CODE, USER_DATA};

/// The registers of whatever was interrupted or called, as they lie on the stack: the stub's
/// pushes, then what the CPU pushed.
#[repr(C)]
#[derive(Debug)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    /// What the CPU pushes for some exceptions; the stub pushes 0 for the others.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 22 * 8);
const _: () = assert!(offset_of!(Frame, rip) == 17 * 8);

impl Frame {
    /// Whether it is a user program that was interrupted.
    pub fn in_user_mode(&self) -> bool {
        self.cs & 3 == 3
    }
}

/// Vectors with a stub: exceptions, the PICs' lines. `int 0x80` has one of its own.
pub const STUBS: usize = 48;
/// Bytes from one stub to the next.
pub const STUB_SIZE: usize = 16;

unsafe extern "C" {
    /// The first stub; the others follow every [`STUB_SIZE`] bytes.
    pub safe fn interrupt_stubs();
    /// Where `int 0x80` leads.
    pub safe fn int_80_stub();
    /// Where the `syscall` instruction leads.
    pub safe fn syscall_stub();
}

global_asm!(
    // Saves everything that Rust code may change, calls it with the frame in RDI, restores.
    // FXSAVE keeps x87, MMX and SSE state: the handlers use XMM registers as much as the
    // interrupted code does. RBX survives the call, so it remembers where the frame is.
    ".macro call_with_frame handler",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "mov rbx, rsp",
    "sub rsp, 512",
    "and rsp, -16",
    "fxsave64 [rsp]",
    "call \\handler",
    "fxrstor64 [rsp]",
    "mov rsp, rbx",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    // Vector and error code.
    "add rsp, 16",
    ".endm",
    "",
    // The CPU does not say which vector it came through, hence one stub a vector. Exceptions 8, 10
    // to 14, 17, 21, 29 and 30 come with an error code.
    ".balign 16",
    "interrupt_stubs:",
    ".set vector, 0",
    ".rept {stubs}",
    ".balign 16",
    ".if ((0x60227d00 >> vector) & 1) == 0 || vector > 31",
    "push 0",
    ".endif",
    "push vector",
    "jmp interrupt_common",
    ".set vector, vector + 1",
    ".endr",
    "",
    "interrupt_common:",
    "call_with_frame {interrupt}",
    "iretq",
    "",
    // A call through the IDT: the CPU has switched to RSP0 and pushed SS, RSP, RFLAGS, CS, RIP.
    "int_80_stub:",
    "push 0",
    "push 0x80",
    "call_with_frame {call}",
    "iretq",
    "",
    // A call by `syscall`: faster, for the CPU does less. RIP went to RCX, RFLAGS to R11, and RSP
    // is still the program's: nothing may be pushed yet. This builds the frame that `int 0x80` gets
    // for free. Interrupts are off (SFMASK), and what can't be turned off has an IST stack. (SDM
    // vol. 2, SYSCALL; APM vol. 2, 6.1.1.)
    "syscall_stub:",
    "mov [rip + user_rsp], rsp",
    "mov rsp, [rip + {tss} + {rsp0}]",
    "push {user_data}",
    "push qword ptr [rip + user_rsp]",
    "push r11",
    "push {user_code}",
    "push rcx",
    "push 0",
    "push 0x80",
    "call_with_frame {call}",
    "mov rsp, [rsp + 24]",
    // RCX is an address below 2 GiB here. An Intel CPU that is told to return to a non-canonical
    // one raises #GP in ring 0 on the program's stack: the flaw in many kernels known as
    // CVE-2012-0217.
    "sysretq",
    "",
    ".pushsection .bss",
    ".balign 8",
    "user_rsp: .skip 8",
    ".popsection",
    stubs = const STUBS,
    interrupt = sym crate::interrupts::interrupt,
    call = sym crate::syscall::call,
    tss = sym TASK_STATE,
    rsp0 = const RSP0_OFFSET,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
);

/// FXRSTOR's image of a fresh FPU: x87 control word 37Fh, MXCSR 1F80h (all exceptions masked), all
/// registers zero, so that no program sees what another one or the kernel left in them.
#[repr(C, align(16))]
struct FreshFpu([u32; 128]);

static FRESH_FPU: FreshFpu = {
    let mut image = [0; 128];
    image[0] = 0x37f;
    image[6] = 0x1f80;
    FreshFpu(image)
};

/// Enters ring 3 at `rip` with stack pointer `rsp` and two arguments in RDI and RSI. Returns, with
/// the value given to it, when [`leave`] is called.
///
/// What must survive is pushed, and the stack pointer is left where the next entry from ring 3
/// takes it, in RSP0: system calls and interrupts stack up right below, and `leave` finds its way
/// back. A program is a function call that takes its time.
///
/// # Safety
/// The page tables in force must map the user program, and RSP0 must be restored afterwards.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(rip: u64, rsp: u64, rdi: u64, rsi: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        // The stack was at 8 modulo 16; system calls want to start aligned.
        "sub rsp, 8",
        "mov [rip + {tss} + {rsp0}], rsp",
        "push {user_data}",
        "push rsi",
        "push 0x202", // RFLAGS: interrupts on
        "push {user_code}",
        "push rdi",
        "mov rdi, rdx",
        "mov rsi, rcx",
        "fxrstor64 [rip + {fpu}]",
        "xor eax, eax",
        "xor ebx, ebx",
        "xor ecx, ecx",
        "xor edx, edx",
        "xor ebp, ebp",
        "xor r8d, r8d",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "xor r11d, r11d",
        "xor r12d, r12d",
        "xor r13d, r13d",
        "xor r14d, r14d",
        "xor r15d, r15d",
        "iretq",
        tss = sym TASK_STATE,
        rsp0 = const RSP0_OFFSET,
        user_data = const USER_DATA,
        user_code = const USER_CODE,
        fpu = sym FRESH_FPU,
    )
}

/// Gives up the running program and lets its [`enter`] return `value`. What is on the stack below,
/// the program's last system call or interrupt, is forgotten.
///
/// # Safety
/// A program must be running, and no borrow may be alive.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn leave(value: u64) -> ! {
    naked_asm!(
        "mov rsp, [rip + {tss} + {rsp0}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "mov rax, rdi",
        "ret",
        tss = sym TASK_STATE,
        rsp0 = const RSP0_OFFSET,
    )
}

const _: () = assert!(KERNEL_CODE & 3 == 0 && USER_CODE & 3 == 3 && USER_DATA & 3 == 3);
