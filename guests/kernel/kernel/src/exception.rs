//! What the CPU's exceptions are called and what their error codes say. (Intel SDM vol. 3, 7.15.)

use core::fmt;

/// Breakpoint, the only exception that a program may raise on purpose (`int3`).
pub const BREAKPOINT: u8 = 3;
/// Double fault.
pub const DOUBLE_FAULT: u8 = 8;
/// Page fault.
pub const PAGE_FAULT: u8 = 14;

/// Names of vectors 0 to 31, with the mnemonic of the manuals.
const NAMES: [&str; 32] = [
    "divide error (#DE)",
    "debug (#DB)",
    "non-maskable interrupt (NMI)",
    "breakpoint (#BP)",
    "overflow (#OF)",
    "bound range exceeded (#BR)",
    "invalid opcode (#UD)",
    "device not available (#NM)",
    "double fault (#DF)",
    "coprocessor segment overrun",
    "invalid TSS (#TS)",
    "segment not present (#NP)",
    "stack-segment fault (#SS)",
    "general protection (#GP)",
    "page fault (#PF)",
    "reserved exception 15",
    "x87 floating-point error (#MF)",
    "alignment check (#AC)",
    "machine check (#MC)",
    "SIMD floating-point error (#XM)",
    "virtualization exception (#VE)",
    "control protection (#CP)",
    "reserved exception 22",
    "reserved exception 23",
    "reserved exception 24",
    "reserved exception 25",
    "reserved exception 26",
    "reserved exception 27",
    "hypervisor injection (#HV)",
    "VMM communication (#VC)",
    "security exception (#SX)",
    "reserved exception 31",
];

/// An exception in words: `page fault (#PF): write to 0x10, page not present`.
pub struct Description {
    /// The vector, below 32.
    pub vector: u8,
    /// What the CPU pushed, or 0.
    pub error_code: u64,
    /// CR2, which a page fault leaves the address in.
    pub cr2: u64,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES[usize::from(self.vector) % NAMES.len()])?;
        match self.vector {
            PAGE_FAULT => {
                f.write_str(": ")?;
                page_fault(f, self.error_code, self.cr2)
            }
            // #TS, #NP, #SS, #GP: a selector, if one is to blame (SDM vol. 3, 7.13).
            10..=13 if self.error_code != 0 => {
                let table = match self.error_code >> 1 & 3 {
                    0 => "GDT",
                    2 => "LDT",
                    _ => "IDT",
                };
                write!(f, ": {table} entry {}", self.error_code >> 3 & 0x1fff)
            }
            _ => Ok(()),
        }
    }
}

/// The bits of a page fault's error code (SDM vol. 3, 5.7; APM vol. 2, 8.4.2).
fn page_fault(f: &mut fmt::Formatter<'_>, code: u64, address: u64) -> fmt::Result {
    let bit = |number: u32| code >> number & 1 == 1;
    let access = match (bit(4), bit(1)) {
        (true, _) => "instruction fetch from",
        (_, true) => "write to",
        _ => "read of",
    };
    let who = if bit(2) { "user" } else { "supervisor" };
    let why = match (bit(3), bit(0)) {
        (true, _) => "a reserved bit is set in the page tables",
        (_, true) => "the page does not allow it",
        _ => "page not present",
    };
    write!(f, "{who} {access} {address:#x}, {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(vector: u8, error_code: u64, cr2: u64) -> String {
        Description { vector, error_code, cr2 }.to_string()
    }

    #[test]
    fn page_faults_say_who_did_what_and_why_not() {
        for (code, expected) in [
            (0x0, "supervisor read of 0x10, page not present"),
            (0x2, "supervisor write to 0x10, page not present"),
            (0x5, "user read of 0x10, the page does not allow it"),
            (0x7, "user write to 0x10, the page does not allow it"),
            (0x15, "user instruction fetch from 0x10, the page does not allow it"),
            (0xd, "user read of 0x10, a reserved bit is set in the page tables"),
        ] {
            assert_eq!(text(PAGE_FAULT, code, 0x10), format!("page fault (#PF): {expected}"));
        }
    }

    #[test]
    fn a_selector_is_named_if_there_is_one() {
        assert_eq!(text(13, 0, 0), "general protection (#GP)");
        assert_eq!(text(13, 0x18, 0), "general protection (#GP): GDT entry 3");
        assert_eq!(text(13, 0x402, 0), "general protection (#GP): IDT entry 128");
        assert_eq!(text(0, 0, 0), "divide error (#DE)");
    }
}
