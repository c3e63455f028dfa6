//! Where downloads and built guests are kept: outside the repository, in the user's cache folder.

use std::env;
use std::path::PathBuf;

/// `$XDG_CACHE_HOME/mini-kvm`, or `~/.cache/mini-kvm`, or, for a user without a home, a folder in
/// the system's temporary one.
pub fn dir() -> PathBuf {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(env::temp_dir)
        .join("mini-kvm")
}

/// The kernel that stage 08 boots when none is named: `cargo xtask setup` puts it here.
pub fn default_kernel() -> PathBuf {
    dir().join("guest/vmlinuz")
}

/// The initramfs that stage 08 boots with it.
pub fn default_initrd() -> PathBuf {
    dir().join("guest/initramfs.cpio")
}

/// Where set-up unpacks the lab's kernel: `boot/vmlinuz-VERSION` and `lib/modules/VERSION`, as on an
/// installed system.
pub fn lab_kernel() -> PathBuf {
    dir().join("lab-kernel")
}
