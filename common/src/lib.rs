//! The crate that grows: one module a capability, in the order in which the stages introduce them.
//!
//! | stage | modules |
//! |---|---|
//! | 01 | [`kvm`], [`checkup`], [`host`] |
//! | 02 | [`layout`], [`memory`], [`touch`] |
//! | 03 | [`autopsy`], [`deadline`], [`descriptor`], [`disasm`], [`gdb`], [`journal`], [`last_exits`], [`page_walk`], [`regs`], [`step`], [`trace`], [`vcpu`] |
//! | 04 | [`mod@file`], [`bus`], [`hypercall`], [`serial`], [`teletype`] |
//! | 05 | [`text_screen`], [`scratch`], [`doorbell`], [`irqfd`], [`coalesced`], [`ioeventfd`] |
//! | 06 | [`e820`], [`elf`], [`long_mode`], [`uart`], [`run`] |
//! | 07 | [`firmware`], [`disk`], [`boot_disk`], [`ide`], [`cmos`], [`i8042`], [`keyboard`], [`vga`], [`cpuid`], [`smp`], [`mp_table`], [`multiboot`], [`protected_mode`] |
//! | 08 | [`linux`], [`acpi`], [`msr`], [`panic_watch`], [`disk_image`], [`virtio`], [`snapshot`] |
//!
//! Nothing here parses arguments, colours text or knows a terminal: what a guest prints goes to a
//! [`std::io::Write`] that the caller hands in, so tests read a console without a process.

pub mod error;

#[cfg(feature = "stage01")]
pub mod checkup;
#[cfg(feature = "stage01")]
pub mod host;
#[cfg(feature = "stage01")]
pub mod kvm;

// The check-up runs guests before stages 02 and 03 have introduced how: it uses these modules as a black
// box, and until a stage asks for them nobody else sees them.
#[cfg(feature = "stage03")]
pub mod autopsy;
#[cfg(all(feature = "stage01", not(feature = "stage03")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod deadline;
#[cfg(feature = "stage03")]
pub mod deadline;
#[cfg(feature = "stage03")]
pub mod disasm;

#[cfg(all(feature = "stage01", not(feature = "stage03")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod journal;
#[cfg(feature = "stage03")]
pub mod journal;
#[cfg(all(feature = "stage01", not(feature = "stage03")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod last_exits;
#[cfg(feature = "stage03")]
pub mod last_exits;

#[cfg(all(feature = "stage01", not(feature = "stage02")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod layout;
#[cfg(feature = "stage02")]
pub mod layout;
#[cfg(all(feature = "stage01", not(feature = "stage02")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod memory;
#[cfg(feature = "stage02")]
pub mod memory;
#[cfg(feature = "stage02")]
pub mod touch;
#[cfg(all(feature = "stage01", not(feature = "stage03")))]
#[allow(dead_code, reason = "the check-up uses a part of it")]
mod vcpu;
#[cfg(feature = "stage03")]
pub mod vcpu;

#[cfg(feature = "stage03")]
pub mod descriptor;
#[cfg(feature = "stage03")]
pub mod gdb;
#[cfg(feature = "stage03")]
pub mod page_walk;
#[cfg(feature = "stage03")]
pub mod regs;
#[cfg(feature = "stage03")]
pub mod step;
#[cfg(feature = "stage03")]
pub mod trace;

#[cfg(feature = "stage04")]
pub mod bus;
#[cfg(feature = "stage04")]
pub mod file;
#[cfg(feature = "stage04")]
pub mod hypercall;
#[cfg(feature = "stage04")]
pub mod serial;
#[cfg(feature = "stage04")]
pub mod teletype;

#[cfg(feature = "stage05")]
pub mod coalesced;
#[cfg(feature = "stage05")]
pub mod doorbell;
#[cfg(feature = "stage05")]
pub mod ioeventfd;
#[cfg(feature = "stage05")]
pub mod irqfd;
#[cfg(feature = "stage05")]
pub mod scratch;
#[cfg(feature = "stage05")]
pub mod text_screen;

#[cfg(feature = "stage06")]
pub mod e820;
#[cfg(feature = "stage06")]
pub mod elf;
#[cfg(feature = "stage06")]
pub mod long_mode;
#[cfg(feature = "stage06")]
pub mod run;
#[cfg(feature = "stage06")]
pub mod uart;

#[cfg(feature = "stage07")]
pub mod boot_disk;
#[cfg(feature = "stage07")]
pub mod cmos;
#[cfg(feature = "stage07")]
pub mod cpuid;
#[cfg(feature = "stage07")]
pub mod disk;
#[cfg(feature = "stage07")]
pub mod firmware;
#[cfg(feature = "stage07")]
pub mod i8042;
#[cfg(feature = "stage07")]
pub mod ide;
#[cfg(feature = "stage07")]
pub mod keyboard;
#[cfg(feature = "stage07")]
pub mod mp_table;
#[cfg(feature = "stage07")]
pub mod multiboot;
#[cfg(feature = "stage07")]
pub mod protected_mode;
#[cfg(feature = "stage07")]
pub mod smp;
#[cfg(feature = "stage07")]
pub mod vga;

#[cfg(feature = "stage08")]
pub mod acpi;
#[cfg(feature = "stage08")]
pub mod disk_image;
#[cfg(feature = "stage08")]
pub mod linux;
#[cfg(feature = "stage08")]
pub mod msr;
#[cfg(feature = "stage08")]
pub mod panic_watch;
#[cfg(feature = "stage08")]
pub mod snapshot;
#[cfg(feature = "stage08")]
pub mod virtio;
