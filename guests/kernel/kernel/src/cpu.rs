//! The instructions that Rust has no words for, one function each.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

use kernel_abi::boot::DEBUG_EXIT_PORT;

/// `out`, 8 bits.
///
/// # Safety
/// The write must be one that the device behind the port is meant to get: a device can do
/// anything, memory included.
pub unsafe fn out(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// `rep outsb`: all of `bytes` to one port.
///
/// # Safety
/// As for [`out`].
pub unsafe fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: the caller's promise; the CPU only reads the slice.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _, options(readonly, nostack));
    }
}

/// `in`, 8 bits.
///
/// # Safety
/// As for [`out`]: reading a port can change a device's state.
pub unsafe fn input(port: u16) -> u8 {
    let value;
    // SAFETY: the caller's promise.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// `wrmsr` (SDM vol. 4 lists the registers).
///
/// # Safety
/// The value must leave the CPU in a state that the running code expects.
pub unsafe fn write_msr(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack)) }
}

/// `rdmsr`.
///
/// # Safety
/// The register must exist, or the CPU raises #GP.
pub unsafe fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// CR2: the address of the last page fault.
pub fn cr2() -> u64 {
    let value;
    // SAFETY: reading it has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack)) }
    value
}

/// CR3: the physical address of the page tables in force.
pub fn cr3() -> u64 {
    let value;
    // SAFETY: reading it has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack)) }
    value
}

/// Puts other page tables in force, and forgets what the TLB knows of the old ones.
///
/// # Safety
/// The new tables must map everything that the kernel uses, where it is now.
pub unsafe fn set_cr3(tables: u64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mov cr3, {}", in(reg) tables, options(nostack)) }
}

/// Sets bits in CR4.
///
/// # Safety
/// The CPU must know them, or it raises #GP, and the kernel must be ready for what they switch on.
pub unsafe fn set_cr4_bits(bits: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {cr4}, cr4", "or {cr4}, {bits}", "mov cr4, {cr4}",
            cr4 = out(reg) _, bits = in(reg) bits, options(nostack));
    }
}

/// CPUID leaf 7, subleaf 0: EBX and ECX, or zeros if there is no such leaf.
pub fn cpuid_7() -> (u32, u32) {
    if __cpuid_count(0, 0).eax < 7 {
        return (0, 0);
    }
    let leaf = __cpuid_count(7, 0);
    (leaf.ebx, leaf.ecx)
}

/// CPUID leaf 8000_0001h: EDX, where AMD put NX and its neighbours.
pub fn cpuid_extended_edx() -> u32 {
    __cpuid_count(0x8000_0001, 0).edx
}

/// Sleeps until an interrupt has been served. The only place in ring 0 where interrupts are on.
///
/// `sti` lets interrupts in only after the instruction that follows it, so none can slip in
/// between it and `hlt` and leave the CPU asleep with its work waiting (SDM vol. 2, STI).
pub fn wait_for_interrupt() {
    // SAFETY: every interrupt runs on a stack of its own (see gdt.rs) and keeps all registers.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
}

/// Ends the machine: 0 if all went well, else why not.
pub fn power_off(code: u8) -> ! {
    loop {
        // SAFETY: this is what the debug-exit device is for. Without one nothing happens.
        unsafe {
            out(DEBUG_EXIT_PORT, code);
            asm!("cli", "hlt", options(nomem, nostack));
        }
    }
}
