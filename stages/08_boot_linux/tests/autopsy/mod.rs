//! A kernel that is given something wrong dies somewhere else. The autopsy names what was wrong.

use common::autopsy::{Autopsy, Watchdog};
use common::hypercall::{DEBUG_EXIT, DebugExit};
use common::layout::BOOT_PARAMS;
use common::run::{Crash, Ran};
use common::trace::Devices;
use vm_memory::Bytes;

use super::*;

const MEMORY: u64 = 256 << 20;

/// Where fields of `struct boot_params` stand (Linux boot protocol, "The Real-Mode Kernel Header" and "zero page").
const E820_ENTRIES: u64 = 0x1E8;
const RAMDISK_IMAGE: u64 = 0x218;
const RAMDISK_SIZE: u64 = 0x21C;
const E820_TABLE: u64 = 0x2D0;
const E820_ENTRY: u64 = 20;

/// What is done to what a kernel is told.
type Spoil = fn(&Ram, &linux::Kernel);

fn field(at: u64) -> GuestAddress {
    GuestAddress(BOOT_PARAMS.0 + at)
}

/// The kernel of a file in a small machine, with `spoil` done to what it is told. Gives what the check finds, too.
fn machine(kernel: &Path, spoil: Spoil) -> (Vcpu, Option<String>) {
    let kvm = kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, MEMORY).unwrap();
    let ram = vm.ram();
    let options = Options { way: Way::Elf, cache: None };
    let kernel = linux::load_kernel(&ram, kernel, &options).unwrap();
    let rsdp = acpi::write_tables(&ram, 1, 0).unwrap();
    linux::write_boot_params(&ram, &kernel, None, linux::DEFAULT_CMDLINE, rsdp).unwrap();
    assert_eq!(linux::check_boot_params(&ram, &kernel), None);
    spoil(&ram, &kernel);
    irqfd::create_irqchip(&vm).unwrap();
    irqfd::create_pit(&vm).unwrap();
    let vcpu = common::smp::create_vcpus(&kvm, &vm, 1).unwrap().remove(0);
    linux::enter(&vcpu, &ram, &kernel).unwrap();
    (vcpu, linux::check_boot_params(&ram, &kernel))
}

/// How it ends.
fn run(mut vcpu: Vcpu) -> Ran {
    let (stop, stopped) = run::stop();
    let mut ports = Bus::new();
    ports.insert("debug exit", DEBUG_EXIT, shared(DebugExit(stop))).unwrap();
    Watchdog::new(Duration::from_secs(2)).follow(&mut vcpu, &Devices::default());
    run::run(vec![vcpu], ports, Bus::new(), stopped, Some(PATIENCE)).unwrap()
}

/// How it dies.
fn autopsy(kernel: &Path, spoil: Spoil) -> Autopsy {
    let (vcpu, finding) = machine(kernel, spoil);
    let ran = run(vcpu);
    let Ran { ending: Ending::Crashed(Crash { cause, .. }), vcpus } = ran else {
        panic!("{:?}", ran.ending)
    };
    let mut again = || Ok(machine(kernel, spoil).0);
    Autopsy::of(&vcpus[0], cause, Some(&mut again)).unwrap().with_finding(finding)
}

#[test]
fn an_initrd_over_the_kernel_is_named() {
    // The initrd is where the kernel's first instructions are.
    let over = |ram: &Ram, kernel: &linux::Kernel| {
        let initrd = fs::read(cache::default_initrd()).unwrap();
        let (at, size) = (kernel.range.start as u32, initrd.len() as u32);
        ram.write_obj(at, field(RAMDISK_IMAGE)).unwrap();
        ram.write_obj(size, field(RAMDISK_SIZE)).unwrap();
        ram.write_slice(&initrd, GuestAddress(at.into())).unwrap();
    };
    let sentence = autopsy(&cache::default_kernel(), over).sentence();
    let expected = "the boot_params at 0x7000 are wrong: the initrd, 0x1000000 to ";
    assert!(sentence.starts_with(expected), "{sentence}");
    assert!(sentence.contains(", is in the kernel's memory, 0x1000000 to "), "{sentence}");
}

#[test]
fn a_memory_map_of_more_than_there_is_is_named() {
    // Debian's kernel gets by: it puts nothing at the end of the lowest RAM. This one does.
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    fs::write(&kernel, asm::mistakes::BELIEVES_ITS_MAP).unwrap();
    let (vcpu, finding) = machine(&kernel, |_, _| ());
    assert_eq!((finding, run(vcpu).ending), (None, Ending::Exited(0)));

    // The last entry of the memory map gets a size of 3 GiB.
    let boasts = |ram: &Ram, _: &linux::Kernel| {
        let count: u8 = ram.read_obj(field(E820_ENTRIES)).unwrap();
        let last = E820_TABLE + E820_ENTRY * (u64::from(count) - 1);
        ram.write_obj(3_u64 << 30, field(last + 8)).unwrap();
    };
    let sentence = autopsy(&kernel, boasts).sentence();
    let expected = "the boot_params at 0x7000 are wrong: its memory map (e820) calls 0x100000 to \
                    0xc0100000 RAM, where the machine has none from 0x10000000 on; then ";
    assert!(sentence.starts_with(expected), "{sentence}");
    assert!(sentence.contains("page fault at 0xffffffffffffffff"), "{sentence}");
}
