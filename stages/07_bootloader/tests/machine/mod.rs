//! The stage's machine inside the test, which so sees its memory.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::bus::{self, Bus, Device, Shared, shared};
use common::cmos::{self, BootFirst, Cmos};
use common::hypercall::{self, DebugExit};
use common::i8042::{self, I8042, SystemControl};
use common::ide::{self, Drive};
use common::irqfd::{self, Irqfd};
use common::memory::Ram;
use common::run::{self, Ending, Stop, Stopped};
use common::vga::{self, Vga};
use common::{firmware, kvm, smp, uart};

/// As much memory as a machine really has: the host of a test may have little.
const MOST: u64 = 64 << 20;

/// What a test sees of the machine.
#[derive(Clone)]
pub struct Parts {
    pub ram: Ram,
    pub i8042: Shared<I8042>,
    pub vga: Shared<Vga>,
}

/// Runs a machine with our BIOS and `disk` up to its end. Its CMOS says that it has `memory` bytes. `prepare` gets
/// its parts before and makes the serial port.
pub fn run<Serial: Device + 'static>(
    disk: Vec<u8>,
    memory: u64,
    ends: (Stop, Stopped),
    prepare: impl FnOnce(&Parts, Irqfd) -> Shared<Serial>,
) -> (Parts, Result<Ending, run::Error>) {
    let drives = vec![Drive::new(disk, "1")];
    run_with(Setup { drives, memory, ..Setup::default() }, ends, prepare)
}

/// A device and its ports.
pub type AtPorts = (Range<u64>, Arc<Mutex<dyn Device>>);

/// What a machine may have.
pub struct Setup {
    /// Up to four drives.
    pub drives: Vec<Drive>,
    pub first: BootFirst,
    pub memory: u64,
    /// Another device.
    pub other: Option<AtPorts>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { drives: Vec::new(), first: BootFirst::Floppies, memory: MOST, other: None }
    }
}

/// Runs such a machine.
pub fn run_with<Serial: Device + 'static>(
    Setup { drives, first, memory, other }: Setup,
    (stop, stopped): (Stop, Stopped),
    prepare: impl FnOnce(&Parts, Irqfd) -> Shared<Serial>,
) -> (Parts, Result<Ending, run::Error>) {
    let kvm = kvm::open().unwrap();
    let vm = firmware::create_vm(&kvm, memory.min(MOST), asm::bios::BIOS, false).unwrap();
    irqfd::create_irqchip(&vm).unwrap();
    irqfd::create_pit(&vm).unwrap();
    let vcpus = smp::create_vcpus(&kvm, &vm, 1).unwrap();
    let line = Irqfd::new(&vm, i8042::IRQ).unwrap();
    let i8042 = shared(I8042::new(line, stop.clone()));
    let parts = Parts { ram: vm.ram(), i8042, vga: shared(Vga::default()) };
    let serial = prepare(&parts, Irqfd::new(&vm, uart::COM1_IRQ).unwrap());

    let cmos = Cmos::new(memory).with_boot_order(first).with_serial_console(true);
    let mut ports = Bus::new();
    if let Some((range, device)) = other {
        ports.insert("other", range, device).unwrap();
    }
    for (socket, drives) in ide::CHANNELS.into_iter().zip(ide::cables(drives)) {
        let line = Irqfd::new(&vm, socket.irq).unwrap();
        ide::insert(&mut ports, socket, drives, line).unwrap();
    }
    ports.insert("CMOS", bus::ports(cmos::PORT, cmos::PORTS), shared(cmos)).unwrap();
    ports.insert("serial", bus::ports(uart::COM1, uart::PORTS), serial).unwrap();
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(stop))).unwrap();
    let control = shared(SystemControl(parts.i8042.clone()));
    ports.insert("port 92", bus::ports(i8042::SYSTEM_CONTROL_PORT, 1), control).unwrap();
    let i8042 = parts.i8042.clone();
    ports.insert("i8042", bus::ports(i8042::PORT, i8042::PORTS), i8042).unwrap();
    ports.insert("VGA", bus::ports(vga::PORT, vga::PORTS), parts.vga.clone()).unwrap();
    let limit = Some(Duration::from_secs(60));
    (parts, run::run(vcpus, ports, Bus::new(), stopped, limit).map(|ran| ran.ending))
}
