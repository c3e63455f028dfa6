//! Whatever a guest does at its ports and device addresses, the monitor lives on.

#![cfg(feature = "stage08")]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::acpi::{self, Pm1};
use common::bus::{Bus, Interrupt, ports, shared};
use common::cmos::{self, Cmos};
use common::disk::{FileSectors, Sectors};
use common::doorbell::{self, Doorbell};
use common::hypercall::{self, DebugExit, ExitCode, Hypercall};
use common::i8042::{self, I8042, SystemControl};
use common::ide::{self, Drive};
use common::panic_watch::PanicWatch;
use common::run;
use common::scratch::Scratch;
use common::serial::{self, Serial};
use common::teletype::Teletype;
use common::text_screen::{self, TextScreen};
use common::uart::{self, Uart};
use common::vga::{self, Vga};
use proptest::prelude::*;

/// Where the tests put the devices that have no port, and the hand-written serial port beside the other one.
const SERIAL: u64 = 0x1000;
const DOORBELL: u64 = 0x2000;
const SCRATCH: u64 = 0x3000;
const SCREEN: u64 = 0x4000;

/// A line that fails now and then, as an eventfd does that is full.
struct Line(AtomicU64);

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        match self.0.fetch_add(1, Ordering::Relaxed) % 3 {
            2 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

/// All devices of all stages on one bus, with `disk` in the drive, and where each is.
fn machine(disk: impl Sectors + 'static) -> (Bus, Vec<u64>) {
    let (stop, _stopped) = run::stop();
    let tty = Teletype::new(io::sink());
    tty.end_of_input();
    let line = || Line(AtomicU64::new(0));
    let (watch, _) = PanicWatch::new(io::sink(), stop.clone());
    let hypercall = Hypercall::new(Arc::clone(&tty), ExitCode::default());
    let mut bus = Bus::new();
    let mut starts = Vec::new();
    let mut plug = |range: std::ops::Range<u64>, device| {
        starts.push(range.start);
        bus.insert("device", range, device).unwrap();
    };
    plug(ports(cmos::PORT, cmos::PORTS), shared(Cmos::new(64 << 20)));
    plug(ports(uart::COM1, uart::PORTS), shared(Uart::new(line(), watch)));
    let i8042 = shared(I8042::new(line(), stop.clone()));
    plug(ports(i8042::SYSTEM_CONTROL_PORT, 1), shared(SystemControl(i8042.clone())));
    plug(ports(i8042::PORT, i8042::PORTS), i8042);
    plug(ports(vga::PORT, vga::PORTS), shared(Vga::default()));
    plug(ports(acpi::PM1_PORT, acpi::PM1_PORTS), shared(Pm1::new(line(), stop.clone())));
    plug(hypercall::PORTS, shared(hypercall));
    plug(hypercall::DEBUG_EXIT, shared(DebugExit(stop)));
    let ports = serial::PORTS.end - serial::PORTS.start;
    plug(SERIAL..SERIAL + ports, shared(Serial::new(tty)));
    plug(DOORBELL..DOORBELL + doorbell::SIZE, shared(Doorbell::new(line())));
    plug(SCRATCH..SCRATCH + 0x25, shared(Scratch::new(0x25)));
    plug(SCREEN..SCREEN + text_screen::SIZE as u64, shared(TextScreen::new()));
    // One channel with both drives, the other with one.
    let drives =
        vec![Drive::new(disk, "1"), Drive::new(vec![1; 512], "2"), Drive::new(vec![], "3")];
    for (socket, drives) in ide::CHANNELS.into_iter().zip(ide::cables(drives)) {
        starts.extend([socket.port, socket.control_port].map(u64::from));
        ide::insert(&mut bus, socket, drives, line()).unwrap();
    }
    (bus, starts)
}

/// One exit: which device and how far from its start, the size of an access and how many there are.
#[derive(Clone, Debug)]
struct Access {
    device: prop::sample::Index,
    offset: u64,
    size: usize,
    count: usize,
    write: bool,
    byte: u8,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![8 => 0..9_u64, 1 => 0..5000_u64];
    // A string instruction's exit has up to a page.
    let count = prop_oneof![4 => Just(1_usize), 1 => 1..1025_usize];
    let size = prop::sample::select(vec![1_usize, 2, 4, 8]);
    // The bytes are commands now and then: ATA's, and what ends a machine.
    let byte = prop_oneof![
        any::<u8>(),
        prop::sample::select(vec![
            0x20_u8, 0x30, 0xE7, 0xEC, 0xE0, 0xFE, 0x04, 0x80, 0x10, 0x24, 0x29, 0x34, 0x39, 0x42,
            0x91, 0xC4, 0xC5, 0xC6, 0xEF
        ])
    ];
    (any::<prop::sample::Index>(), offset, size, count, any::<bool>(), byte).prop_map(
        |(device, offset, size, count, write, byte)| Access {
            device,
            offset,
            size,
            count,
            write,
            byte,
        },
    )
}

// ANCHOR: touch
/// Does them all; a read from where nobody is gives ones.
fn touch(disk: impl Sectors + 'static, accesses: &[Access]) -> Result<(), TestCaseError> {
    let (bus, starts) = machine(disk);
    for Access { device, offset, size, count, write, byte } in accesses {
        let addr = device.get(&starts) + offset;
        let mut data = vec![*byte; size * count];
        if *write {
            bus.write_each(addr, *size, &data);
        } else if bus.read_each(addr, *size, &mut data).is_none() {
            prop_assert!(data.iter().all(|&byte| byte == 0xFF));
        }
    }
    Ok(())
}
// ANCHOR_END: touch

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn no_access_brings_a_device_down(accesses in prop::collection::vec(access(), 1..200)) {
        touch(vec![0xA5; 3 * 512 + 7], &accesses)?;
    }

    /// A disk image of 1 TiB that can only be read, and has become 700 bytes long since it was opened.
    #[test]
    fn nor_does_a_file_that_is_no_longer_what_it_was(
        accesses in prop::collection::vec(access(), 1..200),
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(700).unwrap();
        touch(FileSectors::new(File::open(file.path()).unwrap(), 1 << 40), &accesses)?;
    }
}
