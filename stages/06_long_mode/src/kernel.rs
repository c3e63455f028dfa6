//! The Rust kernel's loader: its segments, the boot info that it gets in RDI, and the two ways to enter it.
//! The contract stands in `guests/kernel/abi/src/boot.rs`.

use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result};
use common::layout::{BOOT_INFO, PROGRAM};
use common::memory::Ram;
use common::vcpu::Vcpu;
use common::{e820, elf, file, long_mode};
use guests::boot::{BootInfo, E820Entry, KERNEL_LIMIT, KERNEL_START, MAGIC, loader};
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::Args;
use crate::guest::{Guest, Way};

/// Where the climb (`asm/real/climb.asm`) looks for the entry point of a kernel and for its boot info.
const CLIMB_ENTRY: GuestAddress = GuestAddress(PROGRAM.0 + 8);
const CLIMB_BOOT_INFO: GuestAddress = GuestAddress(PROGRAM.0 + 16);

/// Copies the kernel, the built-in one or that in a file, to where it was linked. Returns its entry point.
pub fn load(ram: &Ram, path: Option<&Path>) -> Result<GuestAddress> {
    let allowed = KERNEL_START..KERNEL_LIMIT;
    let image = match path {
        None => elf::load(ram, &mut Cursor::new(guests::KERNEL), allowed)?,
        Some(path) => {
            let context = || format!("kernel {}", path.display());
            let (mut file, _) = file::open(path).with_context(context)?;
            elf::load(ram, &mut file, allowed).with_context(context)?
        }
    };
    Ok(image.entry)
}

/// What gdb may read the kernel's symbols from: its file, or that from which the built-in one was made. A gdb that has a
/// 64-bit file refuses to talk with a vCPU in real mode, where the climb begins.
pub fn symbols(args: &Args) -> Option<&Path> {
    let file = match &args.kernel {
        Some(file) => Some(file.as_path()),
        None => guests::kernel_symbols(),
    };
    file.filter(|_| args.guest == Guest::Kernel && args.enter == Way::Host)
}

/// Has the vCPU begin in long mode, with the kernel's first instruction.
pub fn enter(vcpu: &Vcpu, ram: &Ram, entry: GuestAddress) -> Result<()> {
    let info = write_boot_info(ram, loader::HOST)?;
    let regs = kvm_regs { rip: entry.0, rdi: info.0, ..Default::default() };
    Ok(long_mode::enter(vcpu, ram, regs)?)
}

/// Has the vCPU begin in real mode, with the climb, which ends with a jump to the kernel.
pub fn climb_to(vcpu: &Vcpu, ram: &Ram, entry: GuestAddress) -> Result<()> {
    let info = write_boot_info(ram, loader::CLIMB)?;
    ram.write_slice(asm::real::CLIMB, PROGRAM)?;
    ram.write_obj(entry.0, CLIMB_ENTRY)?;
    ram.write_obj(info.0, CLIMB_BOOT_INFO)?;
    Ok(vcpu.start_real_mode(PROGRAM)?)
}

// ANCHOR: boot_info
/// Tells the kernel which memory there is, and who loaded it. Returns the address for RDI.
fn write_boot_info(ram: &Ram, loader: u32) -> Result<GuestAddress> {
    let info_size = size_of::<BootInfo>() as u64;
    let map = e820::map(ram);
    let info = BootInfo {
        magic: MAGIC,
        e820: BOOT_INFO.0 + info_size,
        e820_count: map.len() as u32,
        loader,
    };
    ram.write_slice(&info.to_bytes(), BOOT_INFO)?;
    let mut at = BOOT_INFO.0 + info_size;
    for entry in map {
        let (base, length) = (entry.range.start, entry.range.end - entry.range.start);
        let entry = E820Entry { base, length, kind: entry.kind as u32, attributes: 0 };
        ram.write_slice(&entry.to_bytes(), GuestAddress(at))?;
        at += size_of::<E820Entry>() as u64;
    }
    Ok(BOOT_INFO)
}
// ANCHOR_END: boot_info
