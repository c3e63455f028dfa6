//! Page tables: the kernel's own, and one address space a program. (SDM vol. 3, 5.5; APM vol. 2,
//! 5.3.)
//!
//! ```text
//! 0x0000_0000  nothing: a null pointer faults, in the kernel too
//! 0x0010_0000  the kernel: code may not be written, data not executed      4 KiB pages
//! 0x0020_0000  the rest of RAM up to 1 GiB, each byte at its own address   2 MiB pages
//! 0x4000_0000  the program, its own in each address space                  4 KiB pages
//! 0x8000_0000  nothing
//! ```
//!
//! An address is cut into four indices of nine bits and a page offset. All of the above lies below
//! 512 GiB, in entry 0 of the top table (PML4), and then in entries 0 (kernel) and 1 (program) of
//! the next one (PDPT). The first of these is the same table in all address spaces, so a system
//! call or an interrupt needs no switch; the missing USER bit in it keeps ring 3 out of everything
//! below.

use kernel::frame::FRAME_SIZE;
use kernel_abi::boot::{KERNEL_LIMIT, KERNEL_START};

use super::{FRAMES, PAGE_SIZE, map};
use crate::{cpu, entry, gdt};

/// Where programs may have memory.
pub const USER_START: u64 = 0x4000_0000;
/// The first address that they may not use any more.
pub const USER_END: u64 = 0x8000_0000;

/// Bits of an entry, at every level (SDM vol. 3, tables 5-15 to 5-20).
const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// In a page directory: a 2 MiB page, not a table.
const LARGE: u64 = 1 << 7;
/// Stays in the TLB when CR3 changes (with CR4.PGE): right for what all address spaces share.
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const LARGE_PAGE_SIZE: u64 = 2 << 20;

const EFER: u32 = 0xc000_0080;
const EFER_NXE: u64 = 1 << 11;
const CR4_PGE: u64 = 1 << 7;
const CR4_UMIP: u64 = 1 << 11;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;

/// 512 entries: a page table of any level.
#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut TOP: Table = Table([0; 512]);
static mut POINTERS: Table = Table([0; 512]);
static mut DIRECTORY: Table = Table([0; 512]);
static mut KERNEL_PAGES: Table = Table([0; 512]);

unsafe extern "C" {
    static __text_end: u8;
    static __rodata_end: u8;
    static __kernel_end: u8;
}

/// The first address behind the kernel's image.
pub fn kernel_end() -> u64 {
    (&raw const __kernel_end) as u64
}

/// Builds the kernel's tables and puts them in force.
pub fn init() {
    let text_end = (&raw const __text_end) as u64;
    let rodata_end = (&raw const __rodata_end) as u64;
    let guards = {
        let [one, two, three] = gdt::stack_guards();
        [entry::stack_guard(), one, two, three]
    };
    // SAFETY: these tables are not in force yet, and this is the only code that knows them. The new
    // ones map the kernel where it is now.
    unsafe {
        TOP.0[0] = (&raw const POINTERS) as u64 | PRESENT | WRITE | USER;
        POINTERS.0[0] = (&raw const DIRECTORY) as u64 | PRESENT | WRITE;
        DIRECTORY.0[0] = (&raw const KERNEL_PAGES) as u64 | PRESENT | WRITE;
        for page in (KERNEL_START..KERNEL_LIMIT).step_by(PAGE_SIZE as usize) {
            if guards.contains(&page) {
                continue;
            }
            let rights = match page {
                _ if page < text_end => 0,
                _ if page < rodata_end => NO_EXECUTE,
                _ => NO_EXECUTE | WRITE,
            };
            KERNEL_PAGES.0[(page / PAGE_SIZE) as usize] = page | PRESENT | GLOBAL | rights;
        }
        for index in 1..512 {
            let page = index as u64 * LARGE_PAGE_SIZE;
            if map::has_ram(page, page + LARGE_PAGE_SIZE) {
                DIRECTORY.0[index] = page | PRESENT | WRITE | LARGE | GLOBAL | NO_EXECUTE;
            }
        }
        assert!(cpu::cpuid_extended_edx() >> 20 & 1 == 1, "this CPU has no NX bit");
        cpu::write_msr(EFER, cpu::read_msr(EFER) | EFER_NXE);
        cpu::set_cr3((&raw const TOP) as u64);
        cpu::set_cr4_bits(CR4_PGE | protections());
    }
}

/// What else this CPU has against a kernel that is tricked: ring 0 may not execute (SMEP) nor read
/// or write (SMAP) a program's pages, ring 3 may not ask where the tables are (UMIP).
fn protections() -> u64 {
    let (ebx, ecx) = cpu::cpuid_7();
    let bit = |register: u32, number: u32, flag| if register >> number & 1 == 1 { flag } else { 0 };
    bit(ebx, 7, CR4_SMEP) | bit(ebx, 20, CR4_SMAP) | bit(ecx, 2, CR4_UMIP)
}

/// No frame is left.
#[derive(Clone, Copy, Debug)]
pub struct OutOfMemory;

/// The address is not the program's own memory, or not with these rights.
#[derive(Clone, Copy, Debug)]
pub struct BadAddress;

/// What a program may do with a page besides reading it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rights {
    pub write: bool,
    pub execute: bool,
}

/// One program's memory. Dropping it gives all its frames back; it must not be in force then.
pub struct AddressSpace {
    top: u64,
}

impl AddressSpace {
    /// Only the kernel's half.
    pub fn new() -> Result<Self, OutOfMemory> {
        let top = fresh_frame()?;
        let Ok(pointers) = fresh_frame() else {
            FRAMES.borrow().give(top);
            return Err(OutOfMemory);
        };
        // SAFETY: both are fresh frames.
        unsafe {
            table(top)[0] = pointers | PRESENT | WRITE | USER;
            table(pointers)[0] = (&raw const DIRECTORY) as u64 | PRESENT | WRITE;
        }
        Ok(Self { top })
    }

    /// For CR3.
    pub fn top(&self) -> u64 {
        self.top
    }

    /// Gives the program a page, zeroed. If there is one already it gets the new rights in
    /// addition.
    ///
    /// # Panics
    /// If the page is not in the programs' range.
    pub fn map(&mut self, page: u64, rights: Rights) -> Result<(), OutOfMemory> {
        assert!((USER_START..USER_END).contains(&page));
        let mut entries = self.top;
        for level in [3, 2, 1] {
            // SAFETY: `entries` is a table of this address space.
            let entry = unsafe { &mut table(entries)[index(page, level)] };
            if *entry & PRESENT == 0 {
                *entry = fresh_frame()? | PRESENT | WRITE | USER;
            }
            entries = *entry & ADDRESS;
        }
        // SAFETY: as above.
        let entry = unsafe { &mut table(entries)[index(page, 0)] };
        if *entry & PRESENT == 0 {
            *entry = fresh_frame()? | PRESENT | USER | NO_EXECUTE;
        }
        if rights.write {
            *entry |= WRITE;
        }
        if rights.execute {
            *entry &= !NO_EXECUTE;
        }
        Ok(())
    }

    /// Copies bytes into the program's memory, whatever its own rights are: for loading it.
    pub fn load(&mut self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        self.pieces(address, bytes.len(), false, |physical, range| {
            let bytes = &bytes[range];
            // SAFETY: `physical` is in a frame of this program, which the kernel sees at its own
            // address.
            unsafe {
                (physical as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
        })
    }

    /// Copies bytes into memory that the program may write.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        self.pieces(address, bytes.len(), true, |_, _| ())?;
        self.load(address, bytes)
    }

    /// Whether the program may write to this byte.
    pub fn may_write(&self, address: u64) -> bool {
        self.translate(address, true).is_some()
    }

    /// Copies bytes out of the program's memory.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        self.pieces(address, bytes.len(), false, |physical, range| {
            let bytes = &mut bytes[range];
            // SAFETY: as in `load`.
            unsafe {
                bytes.as_mut_ptr().copy_from_nonoverlapping(physical as *const u8, bytes.len());
            }
        })
    }

    /// Walks `address..address + length` page by page: the physical address of each piece, and
    /// which part of the bytes it is. This walk, and not the CPU's, decides what a system call may
    /// touch, so a bad pointer is an error code and no page fault in the kernel.
    fn pieces(
        &self,
        address: u64,
        length: usize,
        write: bool,
        mut piece: impl FnMut(u64, core::ops::Range<usize>),
    ) -> Result<(), BadAddress> {
        let mut done = 0;
        while done < length {
            let here = address.checked_add(done as u64).ok_or(BadAddress)?;
            let size = ((PAGE_SIZE - here % PAGE_SIZE) as usize).min(length - done);
            let physical = self.translate(here, write).ok_or(BadAddress)?;
            piece(physical, done..done + size);
            done += size;
        }
        Ok(())
    }

    /// The physical address behind one of the program's addresses.
    fn translate(&self, address: u64, write: bool) -> Option<u64> {
        if !(USER_START..USER_END).contains(&address) {
            return None;
        }
        let wanted = PRESENT | USER | if write { WRITE } else { 0 };
        let mut entries = self.top;
        for level in [3, 2, 1, 0] {
            // SAFETY: `entries` is a table of this address space.
            let entry = unsafe { table(entries)[index(address, level)] };
            if entry & wanted != wanted {
                return None;
            }
            entries = entry & ADDRESS;
        }
        Some(entries | (address % PAGE_SIZE))
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        debug_assert_ne!(cpu::cr3() & ADDRESS, self.top);
        // SAFETY: these are tables of this address space, and nobody uses it any more. The kernel's
        // half (entry 0 of the second level) is not ours to give back.
        unsafe {
            let pointers = table(self.top)[0] & ADDRESS;
            for directory in present(&table(pointers)[1..]) {
                for pages in present(table(directory)) {
                    for frame in present(table(pages)) {
                        FRAMES.borrow().give(frame);
                    }
                    FRAMES.borrow().give(pages);
                }
                FRAMES.borrow().give(directory);
            }
            FRAMES.borrow().give(pointers);
        }
        FRAMES.borrow().give(self.top);
    }
}

/// Which entry of a table of `level` (3 the top, 0 the last) leads to `address`.
fn index(address: u64, level: u32) -> usize {
    (address >> (12 + 9 * level)) as usize % 512
}

/// What the present entries of a table point to.
fn present(entries: &[u64]) -> impl Iterator<Item = u64> {
    entries.iter().filter(|&entry| entry & PRESENT != 0).map(|entry| entry & ADDRESS)
}

/// The table in a frame, which the kernel sees at its own address.
///
/// # Safety
/// The frame must be a page table, and nobody else may hold a reference to it.
unsafe fn table<'a>(frame: u64) -> &'a mut [u64; 512] {
    // SAFETY: the caller's promise.
    unsafe { &mut *(frame as *mut [u64; 512]) }
}

/// A zeroed frame.
fn fresh_frame() -> Result<u64, OutOfMemory> {
    let frame = FRAMES.borrow().take().ok_or(OutOfMemory)?;
    // SAFETY: the frame is RAM, mapped, and ours alone now.
    unsafe { (frame as *mut u8).write_bytes(0, FRAME_SIZE as usize) };
    Ok(frame)
}
