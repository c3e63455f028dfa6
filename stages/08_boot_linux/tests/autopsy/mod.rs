//! A kernel that is given something wrong dies somewhere else. The autopsy names what was wrong.

use common::autopsy::{Autopsy, Watchdog};
use common::layout::BOOT_PARAMS;
use common::run::{Crash, Ran};
use common::trace::Devices;
use vm_memory::Bytes;

use super::*;

const MEMORY: u64 = 256 << 20;

/// Where fields of `struct boot_params` stand (Linux boot protocol, "The Real-Mode Kernel Header" and "zero page").
const RAMDISK_IMAGE: u64 = 0x218;
const RAMDISK_SIZE: u64 = 0x21C;

fn field(at: u64) -> GuestAddress {
    GuestAddress(BOOT_PARAMS.0 + at)
}

/// The default kernel in a small machine, with `spoil` done to what it is told. Gives what the check finds, too.
fn machine(spoil: fn(&Ram, &linux::Kernel)) -> (Vcpu, Option<String>) {
    let kvm = kvm::open().unwrap();
    let vm = Vm::with_ram(&kvm, MEMORY).unwrap();
    let ram = vm.ram();
    let options = Options { way: Way::Elf, cache: None };
    let kernel = linux::load_kernel(&ram, &cache::default_kernel(), &options).unwrap();
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

/// How it dies.
fn autopsy(spoil: fn(&Ram, &linux::Kernel)) -> Autopsy {
    let (mut vcpu, finding) = machine(spoil);
    let (_, stopped) = run::stop();
    Watchdog::new(Duration::from_secs(2)).follow(&mut vcpu, &Devices::default());
    let ran = run::run(vec![vcpu], Bus::new(), Bus::new(), stopped, Some(PATIENCE)).unwrap();
    let Ran { ending: Ending::Crashed(Crash { cause, .. }), vcpus } = ran else {
        panic!("{:?}", ran.ending)
    };
    let mut again = || Ok(machine(spoil).0);
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
    let sentence = autopsy(over).sentence();
    let expected = "the boot_params at 0x7000 are wrong: the initrd, 0x1000000 to ";
    assert!(sentence.starts_with(expected), "{sentence}");
    assert!(sentence.contains(", is in the kernel's memory, 0x1000000 to "), "{sentence}");
}
