//! `memcpy` and its siblings. The compiler calls them for copies and comparisons that it does not
//! write out, and for this target expects the C library to have them.
//!
//! In assembly, for a loop in Rust may be recognized as a `memcpy` and compiled into a call of
//! itself.

#![no_std]

use core::arch::asm;

/// Copies `length` bytes; the two ranges do not overlap.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _,
            inout("rcx") length => _, options(nostack, preserves_flags));
    }
    to
}

/// Copies `length` bytes; the two ranges may overlap.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= length {
        // `to` is below `from` or behind its end: forwards, nothing is overwritten before it is
        // read. SAFETY: the caller's promise.
        return unsafe { memcpy(to, from, length) };
    }
    // SAFETY: the caller's promise. `length` is not 0 here, so the last bytes exist.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(length - 1) => _,
            inout("rsi") from.add(length - 1) => _, inout("rcx") length => _, options(nostack));
    }
    to
}

/// Fills `length` bytes with the low byte of `value`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") length => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares `length` bytes: negative, 0 or positive.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    for index in 0..length {
        // SAFETY: the caller's promise. Volatile reads, so that the loop stays a loop.
        let (left, right) =
            unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// Compares `length` bytes: 0 if they are equal.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, length) }
}
