//! Introduced by stage 07: the MP table, which tells an operating system of a machine's processors.
//!
//! Before ACPI there was Intel's *MultiProcessor Specification* (1.4): a *floating pointer* of 16 bytes, which a
//! system finds by looking through the ROM, and behind it a *configuration table*:
//!
//! ```text
//! _MP_ --> PCMP   the local APICs' address, how many entries follow
//!          +-- processor   one for each: its local APIC's ID, and who boots
//!          +-- bus         ISA
//!          +-- I/O APIC    its ID and address
//!          +-- interrupt   one for each ISA line: to which pin of the I/O APIC it goes
//!          '-- local       what comes in at each local APIC's own two pins: the PICs, and NMI
//! ```
//!
//! The tables describe the machine, so whoever makes the machine writes them: into room that the BIOS in
//! `asm/bios` keeps free for them, before its ROM is mapped.

use std::mem::offset_of;

use thiserror::Error;
use vm_memory::ByteValued;

use crate::error::{Blame, Blamed};
use crate::layout::{HIGH_MEMORY, IOAPIC, LOCAL_APIC};

/// By which the room is found: `asm/bios/mp.inc`. Behind it stands how many bytes there are, in 16 bits.
const MARK: [u8; 16] = *b"MP TABLE'S ROOM:";

/// Version 1.4 of the specification.
const REVISION: u8 = 4;

/// The ID that KVM's IOAPIC has in its ID register after reset. An operating system may compare.
pub const IOAPIC_ID: u8 = 0;

// What KVM's APICs have in their version registers.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

/// The only bus.
const ISA: u8 = 0;

// Interrupt types (section 4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Every local APIC.
const ALL: u8 = 0xFF;

/// Line 2 of the first PIC is where the second one is: no device can have it.
const CASCADE: u8 = 2;

/// Why a ROM gets no MP table.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The ROM is none of ours.
    #[error("the ROM keeps no room for an MP table: expected {:?} at a multiple of 16", MARK.escape_ascii().to_string())]
    NoRoom,
    /// The room is too small.
    #[error("the MP table of {cpus} processors has {needed} bytes, the ROM has room for {room}")]
    TooLong {
        /// How many processors there are.
        cpus: u8,
        /// How many bytes that takes.
        needed: usize,
        /// How many there are.
        room: usize,
    },
}

impl Blamed for Error {
    /// Both are mistakes in the project's own BIOS.
    fn blame(&self) -> Blame {
        Blame::Host
    }
}

/// The MP floating pointer structure (section 4.1).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FloatingPointer {
    signature: [u8; 4],
    table: u32,
    /// In units of 16 bytes.
    length: u8,
    revision: u8,
    checksum: u8,
    /// Byte 1: 0 says that there is a configuration table. Byte 2: bit 7 would say that there is an IMCR, a switch
    /// between PICs and APICs.
    features: [u8; 5],
}

/// The configuration table's header (section 4.2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Header {
    signature: [u8; 4],
    length: u16,
    revision: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: u32,
    oem_table_size: u16,
    entries: u16,
    local_apic: u32,
    extended_length: u16,
    extended_checksum: u8,
    reserved: u8,
}

/// A processor (section 4.3.1).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Processor {
    kind: u8,
    local_apic: u8,
    local_apic_version: u8,
    /// Bit 0: usable. Bit 1: the bootstrap processor.
    flags: u8,
    /// CPUID leaf 1, EAX.
    signature: u32,
    /// CPUID leaf 1, EDX.
    features: u32,
    reserved: [u32; 2],
}

/// A bus (section 4.3.2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Bus {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

/// An I/O APIC (section 4.3.3).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    /// Bit 0: usable.
    flags: u8,
    address: u32,
}

/// Where an interrupt goes: to a pin of an I/O APIC (section 4.3.4) or of local APICs (4.3.5).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Interrupt {
    kind: u8,
    interrupt: u8,
    /// 0: polarity and trigger as is usual on the bus.
    flags: u16,
    bus: u8,
    line: u8,
    apic: u8,
    pin: u8,
}

// The sizes and offsets of the specification.
const _: () = {
    assert!(size_of::<FloatingPointer>() == 16 && offset_of!(FloatingPointer, features) == 11);
    assert!(size_of::<Header>() == 44 && offset_of!(Header, product) == 16);
    assert!(offset_of!(Header, oem_table) == 28 && offset_of!(Header, local_apic) == 36);
    assert!(size_of::<Processor>() == 20 && offset_of!(Processor, signature) == 4);
    assert!(offset_of!(Processor, features) == 8);
    assert!(size_of::<Bus>() == 8 && size_of::<IoApic>() == 8 && offset_of!(IoApic, address) == 4);
    assert!(size_of::<Interrupt>() == 8 && offset_of!(Interrupt, bus) == 4);
    assert!(cfg!(target_endian = "little"));
};

/// The numbers by which entries are told apart (section 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

macro_rules! byte_valued {
    ($($name:ident),*) => {
        $(
            #[expect(unsafe_code, reason = "the table is written as bytes")]
            // SAFETY: integers and arrays of bytes without padding between them, as the sizes above say.
            unsafe impl ByteValued for $name {}
        )*
    };
}
byte_valued!(FloatingPointer, Header, Processor, Bus, IoApic, Interrupt);

/// Writes the table of a machine with processors 0 to `cpus` - 1 into the room that the image `rom` of our BIOS
/// keeps for it; `rom` ends where the first megabyte does. `signature` is what [`crate::cpuid::signature`] tells.
pub fn put_into(rom: &mut [u8], cpus: u8, signature: (u32, u32)) -> Result<(), Error> {
    let room = rom.as_chunks::<16>().0.iter().position(|chunk| *chunk == MARK);
    let start = room.ok_or(Error::NoRoom)? * MARK.len();
    let address = HIGH_MEMORY.0 as usize - rom.len() + start;
    let room = &mut rom[start..];
    let size = room.get(MARK.len()..MARK.len() + 2).ok_or(Error::NoRoom)?;
    let size = usize::from(u16::from_le_bytes([size[0], size[1]]));
    let room = room.get_mut(..size).ok_or(Error::NoRoom)?;

    let tables = tables(address as u32, cpus, signature);
    let needed = tables.len();
    let to = room.get_mut(..needed).ok_or(Error::TooLong { cpus, needed, room: size })?;
    to.copy_from_slice(&tables);
    Ok(())
}

/// The floating pointer, which will stand at `address`, and the configuration table behind it.
fn tables(address: u32, cpus: u8, (signature, features): (u32, u32)) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    // The specification wants them in the order of their kinds.
    for id in 0..cpus {
        let flags = if id == 0 { 1 << 0 | 1 << 1 } else { 1 << 0 };
        let processor = Processor {
            kind: PROCESSOR,
            local_apic: id,
            local_apic_version: LOCAL_APIC_VERSION,
            flags,
            signature,
            features,
            ..Processor::default()
        };
        add(processor.as_slice());
    }
    add(Bus { kind: BUS, id: ISA, name: *b"ISA   " }.as_slice());
    let address_of_ioapic = IOAPIC.0 as u32;
    let (version, flags) = (IOAPIC_VERSION, 1 << 0);
    let ioapic =
        IoApic { kind: IO_APIC, id: IOAPIC_ID, version, flags, address: address_of_ioapic };
    add(ioapic.as_slice());
    // KVM's own choice: line n of the PICs is pin n of the IOAPIC.
    let isa = Interrupt { bus: ISA, ..Interrupt::default() };
    for line in (0..16).filter(|line| *line != CASCADE) {
        let (kind, apic, pin) = (IO_INTERRUPT, IOAPIC_ID, line);
        add(Interrupt { kind, interrupt: INT, line, apic, pin, ..isa }.as_slice());
    }
    let (kind, apic) = (LOCAL_INTERRUPT, ALL);
    add(Interrupt { kind, interrupt: EXT_INT, apic, pin: 0, ..isa }.as_slice());
    add(Interrupt { kind, interrupt: NMI, apic, pin: 1, ..isa }.as_slice());

    let pointer = FloatingPointer {
        signature: *b"_MP_",
        table: address + size_of::<FloatingPointer>() as u32,
        length: 1,
        revision: REVISION,
        ..FloatingPointer::default()
    };
    let header = Header {
        signature: *b"PCMP",
        length: (size_of::<Header>() + entries.len()) as u16,
        revision: REVISION,
        oem: *b"MINIKVM ",
        product: *b"PC          ",
        entries: count,
        local_apic: LOCAL_APIC.0 as u32,
        ..Header::default()
    };
    let mut pointer = pointer.as_slice().to_vec();
    pointer[offset_of!(FloatingPointer, checksum)] = checksum(&pointer);
    let mut table = [header.as_slice(), &entries].concat();
    table[offset_of!(Header, checksum)] = checksum(&table);
    [pointer, table].concat()
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smp::MAX_CPUS;

    const SIGNATURE: (u32, u32) = (0x0080_0F12, 0x178B_FBFF);

    /// A ROM with room at `at`.
    fn rom(at: usize, room: u16) -> Vec<u8> {
        let mut rom = vec![0xFF; 0x1_0000];
        rom[at..at + 16].copy_from_slice(&MARK);
        rom[at + 16..at + 18].copy_from_slice(&room.to_le_bytes());
        rom
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The number of `len` bytes at `at`.
    fn number(bytes: &[u8], at: usize, len: usize) -> usize {
        bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    /// The configuration table's entries, found as a system finds them: by what stands in a ROM that ends at 1 MiB.
    fn entries(rom: &[u8]) -> Vec<&[u8]> {
        let base = 0x10_0000 - rom.len();
        let pointer = rom
            .chunks(16)
            .find(|chunk| chunk.starts_with(b"_MP_") && sum(chunk) == 0)
            .expect("a floating pointer");
        assert_eq!((pointer[8], pointer[9]), (1, 4), "16 bytes, version 1.4");
        assert_eq!(pointer[11..], [0; 5], "a configuration table, and no IMCR");
        let table = &rom[number(pointer, 4, 4) - base..];
        let table = &table[..number(table, 4, 2)];
        assert_eq!((&table[..4], table[6], sum(table)), (&b"PCMP"[..], 4, 0));
        assert_eq!(&table[8..28], b"MINIKVM PC          ");
        assert_eq!(number(table, 28, 6), 0, "no table of the OEM's");
        assert_eq!(number(table, 36, 4), 0xFEE0_0000);
        assert_eq!(number(table, 40, 4), 0, "nothing extended");
        let (mut rest, mut entries) = (&table[44..], Vec::new());
        while let Some(kind) = rest.first() {
            let (entry, behind) = rest.split_at(if *kind == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = behind;
        }
        assert_eq!(entries.len(), number(table, 34, 2));
        assert!(entries.is_sorted_by_key(|entry| entry[0]));
        entries
    }

    #[test]
    fn a_system_finds_what_the_machine_has() {
        for cpus in [1, 2, 4, MAX_CPUS] {
            let mut rom = rom(0x4560, 0x1800);
            put_into(&mut rom, cpus, SIGNATURE).unwrap();
            let entries = entries(&rom);
            let of = |kind| entries.iter().filter(move |entry| entry[0] == kind);
            for (id, processor) in (0..=u8::MAX).zip(of(0)) {
                let flags = if id == 0 { 3 } else { 1 };
                assert_eq!(processor[1..4], [id, 0x14, flags]);
                assert_eq!(number(processor, 4, 4), 0x0080_0F12);
                assert_eq!(number(processor, 8, 4), 0x178B_FBFF);
                assert_eq!(processor[12..], [0; 8]);
            }
            assert_eq!(of(0).count(), usize::from(cpus));
            assert_eq!(of(1).collect::<Vec<_>>(), [b"\x01\0ISA   "]);
            assert_eq!(of(2).collect::<Vec<_>>(), [&[2, 0, 0x11, 1, 0, 0, 0xC0, 0xFE]]);
            let lines: Vec<u8> = of(3).map(|entry| entry[5]).collect();
            assert_eq!(lines, [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
            for line in of(3) {
                assert_eq!(line[1..], [0, 0, 0, 0, line[5], 0, line[5]]);
            }
            let local: Vec<_> = of(4).collect();
            assert_eq!(local, [&[4, 3, 0, 0, 0, 0, 0xFF, 0], &[4, 1, 0, 0, 0, 0, 0xFF, 1]]);
        }
    }

    #[test]
    fn what_is_behind_the_table_stays() {
        let (before, mut rom) = (rom(0x4560, 0x1800), rom(0x4560, 0x1800));
        put_into(&mut rom, 2, SIGNATURE).unwrap();
        let len = 16 + 44 + 2 * 20 + 8 + 8 + 15 * 8 + 2 * 8;
        assert_eq!(rom[..0x4560], before[..0x4560]);
        assert_eq!(rom[0x4560 + len..], before[0x4560 + len..]);
    }

    #[test]
    fn too_little_room_is_no_room() {
        let needed = tables(0, 2, SIGNATURE).len();
        let room = |room| put_into(&mut rom(0x4560, room), 2, SIGNATURE);
        assert_eq!(room(needed as u16), Ok(()));
        let error = Error::TooLong { cpus: 2, needed, room: needed - 1 };
        assert_eq!(room(needed as u16 - 1), Err(error));
        assert_eq!(put_into(&mut [0xFF; 0x1_0000], 2, SIGNATURE), Err(Error::NoRoom));
        assert_eq!(put_into(&mut rom(0xFFE0, 0x21), 2, SIGNATURE), Err(Error::NoRoom));
        // The mark, and the ROM's end.
        let cut = &mut rom(0x4560, 0x1800)[..0x4570];
        assert_eq!(put_into(cut, 2, SIGNATURE), Err(Error::NoRoom));
    }
}
