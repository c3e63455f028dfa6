//! Introduced by stage 03: the guest's own page tables, walked as its processor walks them.
//!
//! A *linear* address (segment base plus offset) becomes a guest-physical one through tables in guest memory: CR3
//! names the first, each entry the next, the last one a page. How many there are, and what an entry looks like,
//! depends on CR0.PG, CR4.PAE, CR4.LA57 and EFER.LMA (Intel SDM vol. 3, chapter 5 "Paging"; AMD APM vol. 2, chapter 5
//! "Page Translation and Protection"). KVM can translate, too (`KVM_TRANSLATE`, KVM API 4.15), but tells only the
//! result; a [`Walk`] has every entry that was read, and if it fails, where and why.

use std::fmt;

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::PAGE_SIZE;
use crate::memory::Ram;

// CR0, CR4 and EFER (Intel SDM vol. 3, 2.5 and 2.2.1).
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

// Bits of an entry.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// The widest guest-physical address that an architecture of x86 has, in bits.
const MOST_PHYSICAL_BITS: u32 = 52;

/// How linear addresses become guest-physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// CR0.PG is clear: they are the same.
    Off,
    /// Two levels of 32-bit entries; an entry of the first maps 4 MiB itself if CR4.PSE allows it.
    Bits32,
    /// CR4.PAE: three levels of 64-bit entries.
    Pae,
    /// EFER.LMA: four levels.
    FourLevel,
    /// And with CR4.LA57: five.
    FiveLevel,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "no paging",
            Self::Bits32 => "32-bit paging",
            Self::Pae => "PAE paging",
            Self::FourLevel => "4-level paging",
            Self::FiveLevel => "5-level paging",
        })
    }
}

/// A table, by the name of the level that it stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Page table: its entries map 4 KiB.
    Pt,
    /// Page directory: 2 MiB, or 4 MiB with 32-bit entries.
    Pd,
    /// Page-directory-pointer table: 1 GiB.
    Pdpt,
    /// The table of the fourth level, which 4-level paging starts from.
    Pml4,
    /// The one of the fifth.
    Pml5,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pt => "PT",
            Self::Pd => "PD",
            Self::Pdpt => "PDPT",
            Self::Pml4 => "PML4",
            Self::Pml5 => "PML5",
        })
    }
}

/// What pages a vCPU sees: its control registers, as far as they concern paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// How it translates.
    pub scheme: Scheme,
    cr3: u64,
    large_pages: bool,
    write_protect: bool,
    no_execute: bool,
    smep: bool,
    smap: bool,
    physical_bits: u32,
}

/// An entry that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The table's level.
    pub level: Level,
    /// The entry's number in it.
    pub index: u64,
    /// Where it stands.
    pub at: GuestAddress,
    /// What stands there: 32 or 64 bits.
    pub value: u64,
    /// Whether it maps a page, if it is present, and doesn't name another table.
    pub maps: bool,
    scheme: Scheme,
}

/// What a page may be used for, by the entries on the way to it taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// It may be written.
    pub write: bool,
    /// Ring 3 may use it.
    pub user: bool,
    /// Instructions may be fetched from it.
    pub execute: bool,
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The guest-physical address, of the byte and not of the page.
    pub physical: GuestAddress,
    /// The size of the page in bytes; without paging the address space's, 4 GiB.
    pub size: u64,
    /// What it may be used for.
    pub rights: Rights,
}

/// What an instruction wants of an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// It writes.
    pub write: bool,
    /// It is fetched from there.
    pub execute: bool,
    /// It runs in ring 3.
    pub user: bool,
    /// RFLAGS.AC is set, which lets the kernel reach user pages in spite of CR4.SMAP.
    pub ac: bool,
}

/// Why an address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its upper bits are not all like the highest one that paging looks at: #GP, or #SS for the stack.
    NonCanonical,
    /// A table is not in RAM.
    OutsideRam(GuestAddress),
    /// The entry's present bit is clear.
    NotPresent,
    /// The entry has these bits set, which are reserved.
    Reserved(u64),
    /// A write, and the entry allows none.
    ReadOnly,
    /// An instruction fetch, and the entry has NX set.
    NoExecute,
    /// Ring 3, and the entry is for the kernel alone.
    Supervisor,
    /// The kernel fetches an instruction from a page of ring 3: CR4.SMEP.
    UserCode,
    /// The kernel uses data in a page of ring 3 with RFLAGS.AC clear: CR4.SMAP.
    UserData,
}

/// A walk's end that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The entry that is the reason, if one is; its table and its number.
    pub entry: Option<(Level, u64)>,
    /// The reason.
    pub why: Why,
}

/// All of a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// The address asked for.
    pub linear: u64,
    /// The entries in the order in which they were read.
    pub entries: Vec<Entry>,
    /// Where they lead, whatever the page may be used for; [`allows`](Self::allows) asks that.
    pub page: Result<Page, Fault>,
    paging: Paging,
}

impl Paging {
    /// As the registers say (`KVM_GET_SREGS`).
    pub fn of(sregs: &kvm_sregs) -> Self {
        let has = |register: u64, bit: u64| register & bit != 0;
        let scheme = match (has(sregs.cr0, CR0_PG), has(sregs.efer, EFER_LMA)) {
            (false, _) => Scheme::Off,
            (true, true) if has(sregs.cr4, CR4_LA57) => Scheme::FiveLevel,
            (true, true) => Scheme::FourLevel,
            (true, false) if has(sregs.cr4, CR4_PAE) => Scheme::Pae,
            (true, false) => Scheme::Bits32,
        };
        Self {
            scheme,
            cr3: sregs.cr3,
            large_pages: scheme != Scheme::Bits32 || has(sregs.cr4, CR4_PSE),
            write_protect: has(sregs.cr0, CR0_WP),
            no_execute: has(sregs.efer, EFER_NXE),
            smep: has(sregs.cr4, CR4_SMEP),
            smap: has(sregs.cr4, CR4_SMAP),
            physical_bits: MOST_PHYSICAL_BITS,
        }
    }

    /// The same for a processor whose guest-physical addresses have `bits` bits (CPUID leaf 0x8000_0008), 32 to 52:
    /// what is above them in an entry is reserved. Without this it is taken to have 52.
    pub fn with_physical_bits(self, bits: u32) -> Self {
        Self { physical_bits: bits.clamp(32, MOST_PHYSICAL_BITS), ..self }
    }

    /// Walks the tables in `ram` for `linear`. Nothing is written: no accessed or dirty bit.
    ///
    /// A processor with PAE paging reads the four entries of the first table when CR3 is loaded, and so may use older
    /// ones than stand there; and every processor may use older ones that it has in its TLB.
    pub fn walk(&self, ram: &Ram, linear: u64) -> Walk {
        let mut entries = Vec::new();
        let page = self.steps(ram, linear, &mut entries);
        Walk { linear, entries, page, paging: *self }
    }

    /// The levels from the first table on, with the lowest bit of the address that chooses an entry of it.
    fn levels(&self) -> &'static [(Level, u32)] {
        const LONG: &[(Level, u32)] = &[
            (Level::Pml5, 48),
            (Level::Pml4, 39),
            (Level::Pdpt, 30),
            (Level::Pd, 21),
            (Level::Pt, 12),
        ];
        match self.scheme {
            Scheme::Off => &[],
            Scheme::Bits32 => &[(Level::Pd, 22), (Level::Pt, 12)],
            Scheme::Pae => &LONG[2..],
            Scheme::FourLevel => &LONG[1..],
            Scheme::FiveLevel => LONG,
        }
    }

    fn steps(&self, ram: &Ram, linear: u64, entries: &mut Vec<Entry>) -> Result<Page, Fault> {
        let mut rights = Rights { write: true, user: true, execute: true };
        let Some(&(_, first_shift)) = self.levels().first() else {
            let physical = GuestAddress(linear & 0xFFFF_FFFF);
            return Ok(Page { physical, size: 1 << 32, rights });
        };
        let long = matches!(self.scheme, Scheme::FourLevel | Scheme::FiveLevel);
        let linear = if long { linear } else { linear & 0xFFFF_FFFF };
        let unused = u64::BITS - (first_shift + 9);
        if long && (linear as i64) << unused >> unused != linear as i64 {
            return Err(Fault { entry: None, why: Why::NonCanonical });
        }
        let (bytes, index_bits) = if self.scheme == Scheme::Bits32 { (4, 10) } else { (8, 9) };
        let mut table = match self.scheme {
            // Four entries, aligned to 32 bytes.
            Scheme::Pae => self.cr3 & 0xFFFF_FFE0,
            Scheme::Bits32 => self.cr3 & 0xFFFF_F000,
            _ => self.address_bits() & self.cr3,
        };
        for &(level, shift) in self.levels() {
            let index = linear >> shift & ((1 << index_bits) - 1);
            let at = GuestAddress(table + index * bytes);
            let fault = |why| Err(Fault { entry: Some((level, index)), why });
            let value = match bytes {
                4 => ram.read_obj::<u32>(at).map(u64::from),
                _ => ram.read_obj::<u64>(at),
            };
            let Ok(value) = value else { return fault(Why::OutsideRam(at)) };
            let can_map = match level {
                Level::Pt => true,
                Level::Pd => self.large_pages && value & LARGE != 0,
                Level::Pdpt => long && value & LARGE != 0,
                _ => false,
            };
            entries.push(Entry { level, index, at, value, maps: can_map, scheme: self.scheme });
            if value & PRESENT == 0 {
                return fault(Why::NotPresent);
            }
            let reserved = value & self.reserved(level, can_map);
            if reserved != 0 {
                return fault(Why::Reserved(reserved));
            }
            if !(self.scheme == Scheme::Pae && level == Level::Pdpt) {
                rights.write &= value & WRITABLE != 0;
                rights.user &= value & USER != 0;
                rights.execute &= bytes == 4 || value & NO_EXECUTE == 0;
            }
            table = value & self.address_bits();
            if can_map {
                let size = 1u64 << shift;
                let mut start = table & !(size - 1);
                if bytes == 4 && level == Level::Pd {
                    // PSE-36: bits 13 to 20 are those of the address from 32 up.
                    start |= (value >> 13 & 0xFF) << 32;
                }
                let physical = GuestAddress(start | linear & (size - 1));
                return Ok(Page { physical, size, rights });
            }
        }
        unreachable!("an entry of the last level maps")
    }

    /// The bits of an entry that are an address.
    fn address_bits(&self) -> u64 {
        match self.scheme {
            Scheme::Bits32 => 0xFFFF_F000,
            _ => (1 << MOST_PHYSICAL_BITS) - PAGE_SIZE,
        }
    }

    /// The bits that must be clear in a present entry (Intel SDM vol. 3, 5.3 to 5.5: "Formats of … Entries").
    fn reserved(&self, level: Level, maps: bool) -> u64 {
        let bits = |low: u32, high: u32| (1u64 << high) - (1 << low);
        if self.scheme == Scheme::Bits32 {
            let above = bits(self.physical_bits.min(40) - 32 + 13, 22);
            return if maps && level == Level::Pd { above } else { 0 };
        }
        let mut reserved = bits(self.physical_bits, MOST_PHYSICAL_BITS);
        if self.scheme == Scheme::Pae {
            reserved |= bits(MOST_PHYSICAL_BITS, 63);
            if level == Level::Pdpt {
                return reserved | NO_EXECUTE | bits(1, 3) | bits(5, 9);
            }
        }
        if !self.no_execute {
            reserved |= NO_EXECUTE;
        }
        match (level, maps) {
            (Level::Pml4 | Level::Pml5, _) => reserved | LARGE,
            (Level::Pdpt, true) => reserved | bits(13, 30),
            (Level::Pd, true) => reserved | bits(13, 21),
            _ => reserved,
        }
    }

    /// Reads `bytes.len()` bytes from `linear` on, whatever the pages may be used for. Returns how many it read: fewer where a
    /// page is not mapped, or not RAM.
    pub fn read(&self, ram: &Ram, linear: u64, bytes: &mut [u8]) -> usize {
        self.each_page(ram, linear, bytes.len(), |physical, from, len| {
            ram.read_slice(&mut bytes[from..from + len], physical).is_ok()
        })
    }

    /// Writes, in the same way.
    pub fn write(&self, ram: &Ram, linear: u64, bytes: &[u8]) -> usize {
        self.each_page(ram, linear, bytes.len(), |physical, from, len| {
            ram.write_slice(&bytes[from..from + len], physical).is_ok()
        })
    }

    /// Calls `part` with guest-physical address, position and length of each part of a range that is within one
    /// page, until one fails. Returns the length up to there.
    fn each_page(
        &self,
        ram: &Ram,
        linear: u64,
        len: usize,
        mut part: impl FnMut(GuestAddress, usize, usize) -> bool,
    ) -> usize {
        let mut done = 0;
        while done < len {
            let at = linear.wrapping_add(done as u64);
            let Ok(page) = self.walk(ram, at).page else { break };
            let in_page = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
            if !part(page.physical, done, in_page) {
                break;
            }
            done += in_page;
        }
        done
    }
}

impl Walk {
    /// Where the address leads for `access`, or why it doesn't.
    pub fn allows(&self, access: Access) -> Result<Page, Fault> {
        let page = self.page?;
        if self.paging.scheme == Scheme::Off {
            return Ok(page);
        }
        let Rights { write, user, execute } = page.rights;
        let paging = &self.paging;
        let why = if access.user && !user {
            Why::Supervisor
        } else if access.write && !write && (access.user || paging.write_protect) {
            Why::ReadOnly
        } else if access.execute && !execute {
            Why::NoExecute
        } else if !access.user && user && access.execute && paging.smep {
            Why::UserCode
        } else if !access.user && user && !access.execute && paging.smap && !access.ac {
            Why::UserData
        } else {
            return Ok(page);
        };
        // The first entry that says so; that a page is the user's, all of them say.
        let says = |entry: &&Entry| match why {
            Why::Supervisor => entry.has_rights() && entry.value & USER == 0,
            Why::ReadOnly => entry.has_rights() && entry.value & WRITABLE == 0,
            Why::NoExecute => entry.value & NO_EXECUTE != 0,
            _ => entry.maps,
        };
        let entry = self.entries.iter().find(says).map(|entry| (entry.level, entry.index));
        Err(Fault { entry, why })
    }
}

impl Fault {
    /// The error code that the page fault has (Intel SDM vol. 3, 5.7 "Page-Fault Exceptions"); none where it is no page
    /// fault, but #GP or #SS.
    pub fn error_code(&self, access: Access) -> Option<u32> {
        let (present, reserved) = match self.why {
            Why::NonCanonical => return None,
            Why::NotPresent => (0, 0),
            // No RAM reads as ones, and those have reserved bits.
            Why::OutsideRam(_) | Why::Reserved(_) => (1, 1),
            _ => (1, 0),
        };
        let [write, user, fetch] = [access.write, access.user, access.execute].map(u32::from);
        Some(present | write << 1 | user << 2 | reserved << 3 | fetch << 4)
    }
}

impl Entry {
    /// PAE's first table has no rights in it.
    fn has_rights(&self) -> bool {
        !(self.scheme == Scheme::Pae && self.level == Level::Pdpt)
    }

    /// Its bits in words: `present writable supervisor accessed`.
    pub fn words(&self) -> String {
        if self.value & PRESENT == 0 {
            return "not present".into();
        }
        let bit = |bit: u32| self.value >> bit & 1 == 1;
        let mut words = vec!["present"];
        if self.has_rights() {
            words.push(if bit(1) { "writable" } else { "read-only" });
            words.push(if bit(2) { "user" } else { "supervisor" });
        }
        if self.scheme != Scheme::Bits32 && bit(63) {
            words.push("no-execute");
        }
        if bit(3) {
            words.push("write-through");
        }
        if bit(4) {
            words.push("uncached");
        }
        if self.has_rights() && bit(5) {
            words.push("accessed");
        }
        if self.maps {
            if bit(6) {
                words.push("dirty");
            }
            if self.level != Level::Pt {
                words.push("large");
            }
            if bit(8) {
                words.push("global");
            }
        }
        words.join(" ")
    }
}

/// One line: `PML4[511] at 0x9ff8 = 0x000000000000a003 present writable supervisor`.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, index, at, value, scheme, .. } = self;
        let digits = if *scheme == Scheme::Bits32 { 8 } else { 16 };
        let name = format!("{level}[{index}]");
        write!(f, "{name:<9} at {:#x} = 0x{value:0digits$x} {}", at.0, self.words())
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |is, yes, no| if is { yes } else { no };
        write!(
            f,
            "{}, {}, {}",
            word(self.write, "writable", "read-only"),
            word(self.user, "user", "supervisor"),
            word(self.execute, "executable", "no-execute"),
        )
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.size {
            size if size >= 1 << 30 => format!("{} GiB", size >> 30),
            size if size >= 1 << 20 => format!("{} MiB", size >> 20),
            size => format!("{} KiB", size >> 10),
        };
        write!(f, "guest-physical {:#x}, a page of {size}, {}", self.physical.0, self.rights)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((level, index)) = self.entry {
            write!(f, "{level}[{index}] ")?;
        }
        match self.why {
            Why::NonCanonical => write!(
                f,
                "the address is not canonical: its upper bits must all be like the highest that paging looks at"
            ),
            Why::OutsideRam(at) => write!(f, "is at {:#x}, where no RAM is", at.0),
            Why::NotPresent => write!(f, "is not present"),
            Why::Reserved(bits) => write!(f, "has reserved bits set: {bits:#x}"),
            Why::ReadOnly => write!(f, "is read-only"),
            Why::NoExecute => write!(f, "forbids execution (NX)"),
            Why::Supervisor => write!(f, "is for the kernel alone, and this is ring 3"),
            Why::UserCode => {
                write!(f, "is ring 3's, and CR4.SMEP forbids the kernel to execute it")
            }
            Why::UserData => write!(
                f,
                "is ring 3's, and CR4.SMAP forbids the kernel to use it while RFLAGS.AC is clear"
            ),
        }
    }
}

/// All of it, an entry a line.
impl fmt::Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Paging { scheme, cr3, .. } = self.paging;
        write!(f, "{:#x}: {scheme}", self.linear)?;
        if scheme != Scheme::Off {
            write!(f, ", cr3 {cr3:#x}")?;
        }
        for entry in &self.entries {
            write!(f, "\n  {entry}")?;
        }
        match &self.page {
            Ok(page) => write!(f, "\n  -> {page}"),
            Err(fault) => write!(f, "\n  -> fails: {fault}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PG: u64 = CR0_PG | 1;

    fn paging(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Paging {
        Paging::of(&kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() })
    }

    /// 64 KiB with these entries of 8 bytes.
    fn ram(entries: &[(u64, u64)]) -> Ram {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        for &(at, entry) in entries {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        ram
    }

    const USER_READ: Access = Access { user: true, write: false, execute: false, ac: false };

    #[test]
    fn without_paging_an_address_is_an_address_of_32_bits() {
        let walk = paging(1, 0x1000, 0, 0).walk(&ram(&[]), 0x1_2345_6789);
        assert_eq!(walk.page.unwrap().physical, GuestAddress(0x2345_6789));
        assert_eq!((walk.entries.len(), walk.to_string().lines().count()), (0, 2));
        assert!(walk.allows(Access { write: true, ..USER_READ }).is_ok());
    }

    #[test]
    #[cfg(feature = "stage06")]
    fn the_tables_that_the_host_writes_for_long_mode_map_4_gib_to_themselves() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let cr3 = crate::long_mode::write_identity_map(&ram).unwrap().0;
        let paging = paging(PG, cr3, CR4_PAE, EFER_LMA);
        for addr in [0, 0xFFF, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFEE0_0123, 0xFFFF_FFFF] {
            let walk = paging.walk(&ram, addr);
            let rights = Rights { write: true, user: false, execute: true };
            let page = Page { physical: GuestAddress(addr), size: 2 << 20, rights };
            assert_eq!(walk.page, Ok(page), "{walk}");
            assert_eq!(walk.entries.len(), 3);
        }
        for (addr, level) in [(1 << 32, Level::Pdpt), (1 << 39, Level::Pml4)] {
            let fault = paging.walk(&ram, addr).page.unwrap_err();
            assert_eq!((fault.entry.unwrap().0, fault.why), (level, Why::NotPresent));
        }
    }

    #[test]
    fn a_walk_reads_as_one_looks_at_it() {
        let ram = ram(&[(0x1FF8, 0x2003), (0x2FF0, 0x3003), (0x3000, 0x4007), (0x4008, 0x5101)]);
        let paging = paging(PG | CR0_WP, 0x1000, CR4_PAE, EFER_LMA | EFER_NXE);
        let walk = paging.walk(&ram, 0xFFFF_FFFF_8000_1234);
        assert_eq!(
            walk.to_string(),
            "0xffffffff80001234: 4-level paging, cr3 0x1000\n  \
             PML4[511] at 0x1ff8 = 0x0000000000002003 present writable supervisor\n  \
             PDPT[510] at 0x2ff0 = 0x0000000000003003 present writable supervisor\n  \
             PD[0]     at 0x3000 = 0x0000000000004007 present writable user\n  \
             PT[1]     at 0x4008 = 0x0000000000005101 present read-only supervisor global\n  \
             -> guest-physical 0x5234, a page of 4 KiB, read-only, supervisor, executable"
        );
        let fault = walk.allows(Access { write: true, ..Access::default() }).unwrap_err();
        assert_eq!(fault.to_string(), "PT[1] is read-only");
        assert_eq!(fault.error_code(Access { write: true, ..Access::default() }), Some(3));
        assert_eq!(walk.allows(USER_READ).unwrap_err().entry, Some((Level::Pml4, 511)));
        let walk = paging.walk(&ram, 0xFFFF_FFFF_8020_0000);
        assert!(walk.to_string().ends_with(
            "PD[1]     at 0x3008 = 0x0000000000000000 not present\n  -> fails: PD[1] is not present"
        ));
        assert_eq!(walk.page.unwrap_err().error_code(USER_READ), Some(4));
    }

    #[test]
    fn rights_are_those_that_every_level_gives() {
        let nx = NO_EXECUTE;
        let ram =
            ram(&[(0x1000, 0x2007 | nx), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5005)]);
        let protected = paging(PG | CR0_WP, 0x1000, CR4_PAE, EFER_LMA | EFER_NXE);
        let walk = protected.walk(&ram, 0);
        let rights = Rights { write: false, user: true, execute: false };
        assert_eq!(walk.page.unwrap().rights, rights);
        let fetch = Access { execute: true, ..Access::default() };
        assert_eq!(
            walk.allows(fetch),
            Err(Fault { entry: Some((Level::Pml4, 0)), why: Why::NoExecute })
        );
        // Without CR0.WP the kernel writes to read-only pages, and ring 3 doesn't.
        let write = Access { write: true, ..Access::default() };
        assert_eq!(walk.allows(write).unwrap_err().why, Why::ReadOnly);
        let walk = paging(PG, 0x1000, CR4_PAE, EFER_LMA | EFER_NXE).walk(&ram, 0);
        assert!(walk.allows(write).is_ok());
        assert!(walk.allows(Access { user: true, ..write }).is_err());
        // With NXE clear, NX is a reserved bit.
        let walk = paging(PG, 0x1000, CR4_PAE, EFER_LMA).walk(&ram, 0);
        assert_eq!(walk.page, Err(Fault { entry: Some((Level::Pml4, 0)), why: Why::Reserved(nx) }));
        assert_eq!(walk.page.unwrap_err().error_code(fetch), Some(0b11001));
    }

    #[test]
    fn smep_and_smap_keep_the_kernel_off_pages_of_ring_3() {
        let ram = ram(&[(0x1000, 0x2007), (0x2000, 0x87)]);
        let walk = paging(PG, 0x1000, CR4_PAE | CR4_SMEP | CR4_SMAP, EFER_LMA).walk(&ram, 0x1234);
        assert_eq!(walk.page.unwrap().size, 1 << 30);
        let why = |access| walk.allows(access).map_err(|fault| fault.why).err();
        assert_eq!(why(Access { execute: true, ..Access::default() }), Some(Why::UserCode));
        assert_eq!(why(Access::default()), Some(Why::UserData));
        assert_eq!(why(Access { ac: true, ..Access::default() }), None);
        assert_eq!(why(USER_READ), None);
    }

    #[test]
    fn addresses_that_are_not_canonical_have_no_entry() {
        let four = paging(PG, 0x1000, CR4_PAE, EFER_LMA);
        let five = paging(PG, 0x1000, CR4_PAE | CR4_LA57, EFER_LMA);
        let ram = ram(&[]);
        let why = |paging: Paging, at| paging.walk(&ram, at).page.unwrap_err();
        let none = Fault { entry: None, why: Why::NonCanonical };
        assert_eq!(why(four, 0x8000_0000_0000), none);
        assert_eq!(none.error_code(USER_READ), None);
        assert_eq!(why(four, 0xFFFF_8000_0000_0000).entry, Some((Level::Pml4, 256)));
        assert_eq!(why(five, 0x8000_0000_0000).entry, Some((Level::Pml5, 0)));
        assert_eq!(why(five, 0x0100_0000_0000_0000), none);
    }

    #[test]
    fn paging_of_32_bits_has_pages_of_4_kib_and_4_mib() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        for (at, entry) in [(0x1000, 0x2007u32), (0x2004, 0x5003), (0x1004, 0x0080_4087)] {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let with = paging(PG, 0x1000, CR4_PSE, 0);
        assert_eq!(with.walk(&ram, 0x1ABC).page.unwrap().physical, GuestAddress(0x5ABC));
        let walk = with.walk(&ram, 0x0041_2345);
        let page = walk.page.unwrap();
        assert_eq!((page.physical, page.size), (GuestAddress(0x2_0081_2345), 4 << 20));
        assert!(
            walk.to_string()
                .contains("PD[1]     at 0x1004 = 0x00804087 present writable user large")
        );
        // Without PSE it names a table, which is not in RAM.
        let walk = paging(PG, 0x1000, 0, 0).walk(&ram, 0x0041_2345);
        let outside = GuestAddress(0x0080_4000 + 0x12 * 4);
        assert_eq!(walk.page.unwrap_err().why, Why::OutsideRam(outside));
        let narrow = with.with_physical_bits(32);
        assert_eq!(narrow.walk(&ram, 0x0041_2345).page.unwrap_err().why, Why::Reserved(0x4000));
    }

    #[test]
    fn pae_starts_with_four_entries_without_rights() {
        let ram = ram(&[(0x1060 + 3 * 8, 0x2001), (0x2008, 0x80_0087), (0x2010, 0x80_2087)]);
        let pae = paging(PG, 0x1060, CR4_PAE, 0);
        let walk = pae.walk(&ram, 0xC020_1234);
        let page = walk.page.unwrap();
        assert_eq!((page.physical, page.size), (GuestAddress(0x80_1234), 2 << 20));
        assert!(page.rights.write && page.rights.user && page.rights.execute);
        assert_eq!(pae.walk(&ram, 0xC040_0000).page.unwrap_err().why, Why::Reserved(0x2000));
        ram.write_obj(0x2003u64, GuestAddress(0x1060 + 3 * 8)).unwrap();
        let fault = pae.walk(&ram, 0xC020_1234).page.unwrap_err();
        assert_eq!(fault, Fault { entry: Some((Level::Pdpt, 3)), why: Why::Reserved(2) });
    }

    #[test]
    fn bytes_are_read_and_written_across_pages_up_to_where_none_is() {
        let ram = ram(&[(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003)]);
        for (at, entry) in [(0x4000, 0x6001u64), (0x4008, 0x5001)] {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let paging = paging(PG, 0x1000, CR4_PAE, EFER_LMA);
        assert_eq!(paging.write(&ram, 0xFFE, &[1, 2, 3, 4]), 4);
        assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(0x6FFE)).unwrap(), [1, 2]);
        assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(0x5000)).unwrap(), [3, 4]);
        let mut bytes = [0; 4];
        assert_eq!(paging.read(&ram, 0xFFE, &mut bytes), 4);
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert_eq!(paging.read(&ram, 0x1FFE, &mut bytes), 2);
        assert_eq!(paging.read(&ram, u64::MAX, &mut bytes), 0);
    }

    proptest! {
        /// Tables are the guest's: whatever stands there, and wherever CR3 points, a walk ends.
        #[test]
        fn any_table_and_any_address_can_be_walked(
            words in prop::collection::vec(any::<u64>(), 512),
            cr0 in any::<u64>(), cr3 in any::<u64>(), cr4 in any::<u64>(), efer in any::<u64>(),
            linear in any::<u64>(), low in 0u64..0x2000, bits in any::<u32>(),
        ) {
            let ram = Ram::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
            for (at, word) in (0..).step_by(8).zip(&words) {
                // Entries that point into the RAM, so that there is something to walk.
                ram.write_obj(word & 0x1FFF | 1, GuestAddress(at)).unwrap();
            }
            for (cr3, linear) in [(cr3, linear), (low, linear), (low, low)] {
                let walk = paging(cr0, cr3, cr4, efer).with_physical_bits(bits).walk(&ram, linear);
                prop_assert!(walk.entries.len() <= 5);
                let access = Access { write: low & 1 == 1, user: low & 2 == 2, execute: low & 4 == 4, ac: false };
                if let Err(fault) = walk.allows(access) {
                    prop_assert!(!fault.to_string().is_empty());
                }
                prop_assert!(!walk.to_string().is_empty());
                let mut bytes = [0; 64];
                prop_assert!(paging(cr0, cr3, cr4, efer).read(&ram, linear, &mut bytes) <= 64);
            }
        }
    }
}
