//! Whose fault an error is: the host's, the input's or the guest's.
//!
//! Each module has its own typed `Error` that says what was found and what was expected. What the
//! programs at the edge need beyond the text is one bit more than "it failed": the exit code tells
//! apart a host that cannot do it, a bad input, and a guest that crashed. That table stands here.

use std::error::Error;

// ANCHOR: blame
/// Who has to change something for the program to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The host cannot do it: no `/dev/kvm`, no permission, a missing capability, no memory left.
    Host,
    /// What the user gave is wrong: a file, a size, a command line.
    Input,
    /// The guest did something that ends a virtual machine badly.
    Guest,
}
// ANCHOR_END: blame

/// Implemented by every module's error type.
pub trait Blamed: Error {
    /// Who has to change something.
    fn blame(&self) -> Blame;
}

/// Whose fault `error` is, if it is an error of this crate.
///
/// `dyn Error` cannot be asked for a second trait, so this tries the known types one by one: a
/// module that adds an error type adds a line here.
pub fn blame(error: &(dyn Error + 'static)) -> Option<Blame> {
    macro_rules! first_of {
        ($($(#[$cfg:meta])* $($module:ident)::+),*) => {
            $($(#[$cfg])* if let Some(error) = error.downcast_ref::<crate::$($module)::+::Error>() {
                return Some(error.blame());
            })*
        };
    }
    first_of!(
        #[cfg(feature = "stage01")]
        kvm,
        #[cfg(feature = "stage02")]
        memory,
        #[cfg(feature = "stage02")]
        touch,
        #[cfg(feature = "stage03")]
        deadline,
        #[cfg(feature = "stage03")]
        gdb,
        #[cfg(feature = "stage04")]
        file,
        #[cfg(feature = "stage03")]
        vcpu,
        #[cfg(feature = "stage04")]
        bus,
        #[cfg(feature = "stage05")]
        coalesced,
        #[cfg(feature = "stage05")]
        ioeventfd,
        #[cfg(feature = "stage05")]
        irqfd,
        #[cfg(feature = "stage06")]
        elf,
        #[cfg(feature = "stage06")]
        long_mode,
        #[cfg(feature = "stage06")]
        run,
        #[cfg(feature = "stage03")]
        trace,
        #[cfg(feature = "stage07")]
        boot_disk,
        #[cfg(feature = "stage07")]
        disk,
        #[cfg(feature = "stage07")]
        firmware,
        #[cfg(feature = "stage07")]
        mp_table,
        #[cfg(feature = "stage07")]
        multiboot,
        #[cfg(feature = "stage07")]
        smp,
        #[cfg(feature = "stage08")]
        acpi,
        #[cfg(feature = "stage08")]
        disk_image,
        #[cfg(feature = "stage08")]
        linux,
        #[cfg(feature = "stage08")]
        snapshot,
        #[cfg(feature = "stage08")]
        virtio,
        #[cfg(feature = "stage08")]
        virtio::net
    );
    let _ = error;
    None
}

/// Whether it is KVM that refused an ioctl: another one may be able to do it.
pub fn is_of_kvm(error: &(dyn Error + 'static)) -> bool {
    error.is::<kvm_ioctls::Error>()
}
