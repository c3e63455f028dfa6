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

/// The disk with a whole Debian that `cargo xtask rootfs` makes.
pub fn debian_disk() -> PathBuf {
    dir().join("debian.img")
}

/// The small kernel that `cargo xtask kernel` builds: stage 08's `--kernel small`. Beside it are the same with symbols
/// (`vmlinux`), its configuration, and what it was made from.
pub fn small_kernel() -> PathBuf {
    dir().join("small-kernel/vmlinuz")
}

/// Where set-up puts GRUB's tools and files: `grub-mkimage` with its libraries, and `i386-pc`.
pub fn grub() -> PathBuf {
    dir().join("grub")
}

/// GRUB's rescue floppy, which a milestone of stage 07 starts.
pub fn grub_floppy() -> PathBuf {
    grub().join("grub-rescue-floppy.img")
}

/// The disk with GRUB and Linux which another one boots: `cargo xtask grub-image` makes the same.
pub fn grub_disk() -> PathBuf {
    dir().join("guest/grub.img")
}

/// Where set-up puts memtest86+: a program that boots as Linux does, for the milestone tests of stage 08.
pub fn memtest() -> PathBuf {
    dir().join("memtest86+")
}

/// Where stage 08 keeps kernels that it has unpacked.
pub fn unpacked_kernels() -> PathBuf {
    dir().join("unpacked")
}

/// Where set-up unpacks the lab's kernel: `boot/vmlinuz-VERSION` and `lib/modules/VERSION`, as on an
/// installed system.
pub fn lab_kernel() -> PathBuf {
    dir().join("lab-kernel")
}
