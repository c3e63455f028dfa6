//! What the climb recorded at each of its stops (`RECORD_MODE` in `asm/include/modes.inc`).

use std::fmt::Write;

use anyhow::Result;
use common::layout::RECORDS;
use common::memory::Ram;
use common::regs::{Bits, CR0, CR4, EFER};
use vm_memory::{Bytes, GuestAddress};

const STOPS: [&str; 5] =
    ["real mode", "protected mode", "32-bit paging", "PAE paging", "long mode"];

/// The stops that were recorded, one a line, with the bits that tell the modes apart by name.
pub fn table(ram: &Ram) -> Result<String> {
    let mut table = String::from("\nWhat the guest read in its own registers:\n");
    for (index, stop) in (0..).zip(STOPS) {
        let at = GuestAddress(RECORDS.0 + index * size_of::<[u32; 5]>() as u64);
        let [cr0, cr3, cr4, efer, cs]: [u32; 5] = ram.read_obj(at)?;
        // ET is always set, so a CR0 of 0 is a stop that was not made.
        if cr0 == 0 {
            continue;
        }
        let (cr0, cr4) = (Bits(cr0.into(), CR0), Bits(cr4.into(), CR4));
        let efer = Bits(efer.into(), EFER);
        writeln!(
            table,
            "{stop:<14}  cs {cs:02x}  cr3 {cr3:05x}  cr0 {cr0:<15}  cr4 {cr4:<7}  efer {efer}"
        )?;
    }
    Ok(table)
}
