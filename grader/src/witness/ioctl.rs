//! The ioctls of KVM by name. (Linux, `include/uapi/linux/kvm.h`.)
//!
//! A request is a number of 32 bits: two for the direction, fourteen for the size of what its argument points to, eight
//! for the type, which is 0xAE for KVM, and eight for the number. (Linux, `include/uapi/asm-generic/ioctl.h`.)

/// The type of KVM's ioctls.
pub const KVM: u8 = 0xAE;

/// `KVM_RUN`.
pub const RUN: u64 = none(0x80);
/// `KVM_CREATE_VM`.
pub const CREATE_VM: u64 = none(0x01);
/// `KVM_CREATE_VCPU`.
pub const CREATE_VCPU: u64 = none(0x41);
/// `KVM_SET_USER_MEMORY_REGION`.
pub const SET_USER_MEMORY_REGION: u64 = write(0x46, 32);
/// `KVM_GET_DIRTY_LOG`.
pub const GET_DIRTY_LOG: u64 = write(0x42, 16);
/// `KVM_GET_REGS`.
pub const GET_REGS: u64 = read(0x81, 144);
/// `KVM_GET_SREGS`.
pub const GET_SREGS: u64 = read(0x83, 312);

/// `_IO`: the argument is a number, or nothing.
const fn none(number: u8) -> u64 {
    (KVM as u64) << 8 | number as u64
}

/// `_IOW`: the argument points to `size` bytes that KVM reads.
const fn write(number: u8, size: u16) -> u64 {
    1 << 30 | (size as u64) << 16 | none(number)
}

/// `_IOR`: the argument points to `size` bytes that KVM writes.
const fn read(number: u8, size: u16) -> u64 {
    2 << 30 | (size as u64) << 16 | none(number)
}

/// `_IOWR`: both.
const fn both(number: u8, size: u16) -> u64 {
    write(number, size) | read(number, size)
}

/// The elements behind the header of an argument whose length stands in its first 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Bytes before the first element.
    pub header: usize,
    /// Bytes of an element.
    pub element: usize,
}

/// What is known of an ioctl.
#[derive(Debug)]
pub struct Ioctl {
    /// The request.
    pub request: u64,
    /// Its name in the KVM API.
    pub name: &'static str,
    /// For an argument that is longer than the request says.
    pub tail: Option<Tail>,
}

const fn plain(request: u64, name: &'static str) -> Ioctl {
    Ioctl { request, name, tail: None }
}

const fn list(request: u64, name: &'static str, header: usize, element: usize) -> Ioctl {
    Ioctl { request, name, tail: Some(Tail { header, element }) }
}

/// Those of x86 that a monitor may come to need.
pub const ALL: &[Ioctl] = &[
    // On /dev/kvm.
    plain(none(0x00), "KVM_GET_API_VERSION"),
    plain(CREATE_VM, "KVM_CREATE_VM"),
    list(both(0x02, 4), "KVM_GET_MSR_INDEX_LIST", 4, 4),
    plain(none(0x03), "KVM_CHECK_EXTENSION"),
    plain(none(0x04), "KVM_GET_VCPU_MMAP_SIZE"),
    list(both(0x05, 8), "KVM_GET_SUPPORTED_CPUID", 8, 40),
    list(both(0x09, 8), "KVM_GET_EMULATED_CPUID", 8, 40),
    list(both(0x0A, 4), "KVM_GET_MSR_FEATURE_INDEX_LIST", 4, 4),
    // On a VM.
    plain(CREATE_VCPU, "KVM_CREATE_VCPU"),
    plain(GET_DIRTY_LOG, "KVM_GET_DIRTY_LOG"),
    plain(both(0xC0, 24), "KVM_CLEAR_DIRTY_LOG"),
    plain(SET_USER_MEMORY_REGION, "KVM_SET_USER_MEMORY_REGION"),
    plain(write(0x49, 160), "KVM_SET_USER_MEMORY_REGION2"),
    plain(none(0x47), "KVM_SET_TSS_ADDR"),
    plain(write(0x48, 8), "KVM_SET_IDENTITY_MAP_ADDR"),
    plain(none(0x60), "KVM_CREATE_IRQCHIP"),
    plain(write(0x61, 8), "KVM_IRQ_LINE"),
    plain(both(0x67, 8), "KVM_IRQ_LINE_STATUS"),
    plain(both(0x62, 520), "KVM_GET_IRQCHIP"),
    plain(read(0x63, 520), "KVM_SET_IRQCHIP"),
    plain(none(0x64), "KVM_CREATE_PIT"),
    plain(write(0x77, 64), "KVM_CREATE_PIT2"),
    plain(read(0x9F, 112), "KVM_GET_PIT2"),
    plain(write(0xA0, 112), "KVM_SET_PIT2"),
    plain(none(0x71), "KVM_REINJECT_CONTROL"),
    plain(write(0x67, 16), "KVM_REGISTER_COALESCED_MMIO"),
    plain(write(0x68, 16), "KVM_UNREGISTER_COALESCED_MMIO"),
    list(write(0x6A, 8), "KVM_SET_GSI_ROUTING", 8, 48),
    plain(write(0x76, 32), "KVM_IRQFD"),
    plain(none(0x78), "KVM_SET_BOOT_CPU_ID"),
    plain(write(0x79, 64), "KVM_IOEVENTFD"),
    plain(write(0x7B, 48), "KVM_SET_CLOCK"),
    plain(read(0x7C, 48), "KVM_GET_CLOCK"),
    plain(write(0xA5, 32), "KVM_SIGNAL_MSI"),
    plain(both(0xE0, 12), "KVM_CREATE_DEVICE"),
    plain(write(0xA3, 104), "KVM_ENABLE_CAP"),
    plain(none(0xCE), "KVM_GET_STATS_FD"),
    // On a vCPU.
    plain(RUN, "KVM_RUN"),
    plain(GET_REGS, "KVM_GET_REGS"),
    plain(write(0x82, 144), "KVM_SET_REGS"),
    plain(GET_SREGS, "KVM_GET_SREGS"),
    plain(write(0x84, 312), "KVM_SET_SREGS"),
    plain(read(0xCC, 320), "KVM_GET_SREGS2"),
    plain(write(0xCD, 320), "KVM_SET_SREGS2"),
    plain(both(0x85, 24), "KVM_TRANSLATE"),
    plain(write(0x86, 4), "KVM_INTERRUPT"),
    list(both(0x88, 8), "KVM_GET_MSRS", 8, 16),
    list(write(0x89, 8), "KVM_SET_MSRS", 8, 16),
    plain(write(0x8B, 4), "KVM_SET_SIGNAL_MASK"),
    plain(read(0x8C, 416), "KVM_GET_FPU"),
    plain(write(0x8D, 416), "KVM_SET_FPU"),
    plain(read(0x8E, 1024), "KVM_GET_LAPIC"),
    plain(write(0x8F, 1024), "KVM_SET_LAPIC"),
    list(write(0x8A, 8), "KVM_SET_CPUID", 8, 24),
    list(write(0x90, 8), "KVM_SET_CPUID2", 8, 40),
    list(both(0x91, 8), "KVM_GET_CPUID2", 8, 40),
    plain(read(0x98, 4), "KVM_GET_MP_STATE"),
    plain(write(0x99, 4), "KVM_SET_MP_STATE"),
    plain(none(0x9A), "KVM_NMI"),
    plain(write(0x9B, 72), "KVM_SET_GUEST_DEBUG"),
    plain(read(0x9F, 64), "KVM_GET_VCPU_EVENTS"),
    plain(write(0xA0, 64), "KVM_SET_VCPU_EVENTS"),
    plain(read(0xA1, 128), "KVM_GET_DEBUGREGS"),
    plain(write(0xA2, 128), "KVM_SET_DEBUGREGS"),
    plain(none(0xA2), "KVM_SET_TSC_KHZ"),
    plain(none(0xA3), "KVM_GET_TSC_KHZ"),
    plain(read(0xA4, 4096), "KVM_GET_XSAVE"),
    plain(write(0xA5, 4096), "KVM_SET_XSAVE"),
    plain(read(0xCF, 4096), "KVM_GET_XSAVE2"),
    plain(read(0xA6, 392), "KVM_GET_XCRS"),
    plain(write(0xA7, 392), "KVM_SET_XCRS"),
    plain(none(0xAD), "KVM_KVMCLOCK_CTRL"),
];

/// The ioctl with this request, if it is a known one.
pub fn known(request: u64) -> Option<&'static Ioctl> {
    ALL.iter().find(|ioctl| ioctl.request == request)
}

/// How many bytes the argument points to before the tail: nothing for a number.
pub fn size(request: u64) -> usize {
    (request >> 16) as usize & 0x3FFF
}

/// Whether KVM reads the argument.
pub fn reads(request: u64) -> bool {
    request >> 30 & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_headers() {
        // As strace prints them.
        for (name, request) in [
            ("KVM_CREATE_VM", 0xAE01),
            ("KVM_SET_USER_MEMORY_REGION", 0x4020_AE46),
            ("KVM_GET_REGS", 0x8090_AE81),
            ("KVM_SET_SREGS", 0x4138_AE84),
            ("KVM_GET_SUPPORTED_CPUID", 0xC008_AE05),
            ("KVM_SET_IRQCHIP", 0x8208_AE63),
            ("KVM_IOEVENTFD", 0x4040_AE79),
        ] {
            assert_eq!(known(request).map(|ioctl| ioctl.name), Some(name));
        }
    }

    #[test]
    fn no_name_and_no_request_stands_twice() {
        for (at, ioctl) in ALL.iter().enumerate() {
            for other in &ALL[at + 1..] {
                assert!(ioctl.name != other.name && ioctl.request != other.request, "{ioctl:?}");
            }
        }
    }
}
