//! A small x86-64 kernel: what a CPU in long mode needs before it can run a shell in ring 3.
//!
//! [`entry`] is where a loader jumps to, [`start`] the story from there on. The contract with the
//! loader stands in `abi/src/boot.rs`, the one with user programs in `abi/src/syscall.rs`.
//!
//! | module | what it sets up |
//! |---|---|
//! | [`entry`] | a stack, SSE, a clear `.bss`: what Rust code expects of its world |
//! | [`cpu`] | the instructions that Rust has no words for |
//! | [`gdt`] | segments for rings 0 and 3, the TSS and its stacks |
//! | [`interrupts`] | the IDT, and what happens on each vector |
//! | [`pic`], [`pit`] | interrupt controllers and the timer |
//! | [`serial`] | the console |
//! | [`memory`] | frames and page tables |
//! | [`process`] | entering ring 3 and coming back |
//! | [`syscall`] | what a program may ask for |
//! | [`stubs`] | the crossings between the rings |
//! | [`single`] | global state on a machine with one CPU |

#![no_std]
#![no_main]

mod cpu;
mod entry;
mod gdt;
mod interrupts;
mod memory;
mod pic;
mod pit;
mod process;
mod serial;
mod single;
mod stubs;
mod syscall;

// Only to be linked.
use mem as _;

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use kernel_abi::boot::{self, BootInfo, loader};

use crate::serial::println;

/// Continues from [`entry`], on the kernel's own stack, still with the loader's page tables.
extern "sysv64" fn start(boot_info: *const BootInfo) -> ! {
    serial::init();
    // SAFETY: the loader's tables still map the boot info (entry contract, point 2).
    let boot_info = unsafe { memory::map::copy(boot_info) };
    gdt::init();
    interrupts::init();
    memory::init();
    syscall::init();
    pic::init();
    pit::init();
    serial::listen();

    let entered = match boot_info.loader {
        loader::HOST => "by the VMM itself",
        loader::CLIMB => "by the climb from real mode",
        loader::DISK => "by a boot loader on a disk",
        _ => "by a loader that gives no name",
    };
    println!("mini-kvm kernel, entered in long mode {entered}");
    let frames = memory::frames();
    println!("memory: {} of {} KiB free", frames.0 * 4, frames.1 * 4);
    println!("timer: {} ticks a second; console: COM1, IRQ 4", pit::TICKS_PER_SECOND);

    let outcome = process::run(b"shell").expect("the shell starts");
    println!("the shell {outcome}: turning the machine off");
    match outcome {
        process::Outcome::Exited(code) => cpu::power_off(code),
        _ => cpu::power_off(boot::PANIC_EXIT),
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // A panic while reporting one must not go round in circles.
    static PANICKING: AtomicBool = AtomicBool::new(false);
    if !PANICKING.swap(true, Ordering::Relaxed) {
        println!("\nkernel panic: {info}");
    }
    cpu::power_off(boot::PANIC_EXIT)
}
