//! A driver in place of a guest's, which goes through the registers and the rings as one does; and the tests of what
//! all devices share.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::mmio::{Mmio, QUEUE_NOTIFY};
use super::worker::{Core, Workers};
use super::*;
use crate::bus::{CountedLine, Device as _};
use crate::memory::Ram;
use crate::run::{self, Ending};

/// How many entries the driver gives each ring.
pub const SIZE: u16 = 8;

/// The driver's memory in bytes.
pub const MEMORY: u64 = 16 << 20;

const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;

// Offsets of a queue's parts from where it begins; buffers come behind all queues.
const QUEUES: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const QUEUE: u64 = 0x1000;
const BUFFERS: u64 = 0x10_0000;

const DEVICE_FEATURES: u64 = 0x10;
const DRIVER_FEATURES: u64 = 0x20;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xA0;

const READY: u32 = 1 | 2 | 8 | 4;
const NEEDS_RESET: u32 = 64;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Buffer<'a> {
    /// Which the device reads.
    In(&'a [u8]),
    /// Which it may write: so many bytes.
    Out(u32),
}

/// What a device gave back.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// How many bytes it says it has written.
    pub len: u32,
    /// What stands in the writable buffers, all of them.
    pub data: Vec<u8>,
}

/// A buffer's address and length.
type Piece = (u64, u32);

/// A driver and the device that it drives. No thread serves the device: [`Driver::serve`] does, once.
pub struct Driver {
    pub ram: Ram,
    pub core: Arc<Core>,
    mmio: Mmio,
    line: CountedLine,
    /// The next free descriptor of each queue, and how far its used ring has been read.
    queues: Vec<(u16, u16)>,
    next_buffer: u64,
    /// The writable buffers of each chain that is on its way.
    writable: BTreeMap<(usize, u16), Vec<Piece>>,
}

impl Driver {
    /// Plugs `device` in and leaves it as reset does.
    pub fn plugged(device: impl Device + 'static) -> Self {
        let ram = Ram::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let count = device.queues().len();
        let line = CountedLine::default();
        let core = Core::new(Box::new(device), ram.clone(), Box::new(line.clone())).unwrap();
        let mmio = Mmio::new(core.clone());
        let queues = vec![(0, 0); count];
        Self { ram, core, mmio, line, queues, next_buffer: BUFFERS, writable: BTreeMap::new() }
    }

    /// Goes through all of the initialization, with all features that the device offers.
    pub fn new(device: impl Device + 'static) -> Self {
        let mut driver = Self::plugged(device);
        let features = driver.offered();
        driver.begin(features);
        driver
    }

    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0xFF; 4];
        self.mmio.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: u64, value: u32) {
        self.mmio.write(register, &value.to_le_bytes());
    }

    /// `len` bytes of the configuration.
    pub fn config(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xFF; len];
        self.mmio.read(0x100 + offset, &mut data);
        data
    }

    /// Writes to the configuration.
    pub fn set_config(&mut self, offset: u64, data: &[u8]) {
        self.mmio.write(0x100 + offset, data);
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |which| {
            self.write(DEVICE_FEATURES + 4, which);
            u64::from(self.read(DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Initializes the device with `features` (VIRTIO 1.2, 3.1.1) and all its queues. Returns Status.
    pub fn begin(&mut self, features: u64) -> u32 {
        self.choose(features);
        for queue in 0..self.queues.len() {
            self.set_up(queue, QUEUES + QUEUE * queue as u64);
        }
        self.write(STATUS, READY);
        self.read(STATUS)
    }

    fn choose(&mut self, features: u64) {
        self.write(STATUS, 0);
        self.queues.fill((0, 0));
        self.writable.clear();
        self.ram.write_slice(&vec![0; (QUEUE * 16) as usize], GuestAddress(QUEUES)).unwrap();
        self.write(STATUS, 1 | 2);
        for which in [0, 1] {
            self.write(DRIVER_FEATURES + 4, which);
            self.write(DRIVER_FEATURES, (features >> (32 * which)) as u32);
        }
        self.write(STATUS, 1 | 2 | 8);
    }

    fn set_up(&mut self, queue: usize, at: u64) {
        self.write(QUEUE_SEL, queue as u32);
        self.write(QUEUE_NUM, SIZE.into());
        for (register, at) in
            [(QUEUE_DESC, at), (QUEUE_DRIVER, at + AVAIL), (QUEUE_DEVICE, at + USED)]
        {
            self.write(register, at as u32);
            self.write(register + 4, (at >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// Writes a descriptor (VIRTIO 1.2, 2.7.5).
    pub fn descriptor(&self, queue: usize, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let table = QUEUES + QUEUE * queue as u64;
        self.ram.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Puts the chain that begins with `head` on the available ring.
    pub fn offer(&self, queue: usize, head: u16) {
        let ring = QUEUES + QUEUE * queue as u64 + AVAIL;
        let index: u16 = self.ram.read_obj(GuestAddress(ring + 2)).unwrap();
        let entry = ring + 4 + 2 * u64::from(index % SIZE);
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        self.ram.write_obj(index.wrapping_add(1), GuestAddress(ring + 2)).unwrap();
    }

    /// Puts a chain of `buffers` on the ring, with descriptors that are free as long as no more than the ring has are
    /// on their way.
    pub fn put(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let head = self.queues[queue].0;
        let mut writable = Vec::new();
        for (number, buffer) in buffers.iter().enumerate() {
            let (len, write) = match buffer {
                Buffer::In(bytes) => (bytes.len() as u32, false),
                Buffer::Out(len) => (*len, true),
            };
            if self.next_buffer + u64::from(len) > MEMORY {
                self.next_buffer = BUFFERS;
            }
            let at = self.next_buffer;
            self.next_buffer += u64::from(len);
            match buffer {
                Buffer::In(bytes) => self.ram.write_slice(bytes, GuestAddress(at)).unwrap(),
                Buffer::Out(len) => writable.push((at, *len)),
            }
            let index = (head + number as u16) % SIZE;
            let more = number + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(write) << 1;
            self.descriptor(queue, index, at, len, flags, (index + 1) % SIZE);
        }
        self.queues[queue].0 = (head + buffers.len() as u16) % SIZE;
        self.writable.insert((queue, head), writable);
        self.offer(queue, head);
        head
    }

    /// What the worker does when it is woken.
    pub fn serve(&self) {
        self.core.serve();
    }

    /// The next chain that came back.
    pub fn used(&mut self, queue: usize) -> Option<Used> {
        let ring = QUEUES + QUEUE * queue as u64 + USED;
        let seen = &mut self.queues[queue].1;
        let index: u16 = self.ram.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == *seen {
            return None;
        }
        let entry = ring + 4 + 8 * u64::from(*seen % SIZE);
        *seen = seen.wrapping_add(1);
        let head = self.ram.read_obj::<u32>(GuestAddress(entry)).unwrap() as u16;
        let len = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
        let buffers = self.writable.remove(&(queue, head)).unwrap_or_default();
        let mut data = Vec::new();
        for (at, len) in buffers {
            let from = data.len();
            data.resize(from + len as usize, 0);
            self.ram.read_slice(&mut data[from..], GuestAddress(at)).unwrap();
        }
        Some(Used { head, len, data })
    }

    /// How often the interrupt line was pulsed.
    pub fn interrupts(&self) -> u32 {
        self.line.count()
    }

    // ANCHOR: survives
    /// Puts `chains` on the rings as they are. Whatever the device makes of them, it works after a reset.
    pub fn survives(mut self, chains: Vec<HostileChain>) {
        for (queue, index, at, len, flags, next, offered) in chains {
            let queue = queue.index(self.queues.len());
            self.descriptor(queue, index, at, len, flags, next);
            if offered {
                self.offer(queue, index);
            }
            self.serve();
        }
        let features = self.offered();
        assert_eq!(self.begin(features), READY);
        self.serve();
        assert!(!self.broken());
    }
    // ANCHOR_END: survives

    /// Whether the device has given up on its driver.
    pub fn broken(&mut self) -> bool {
        self.read(STATUS) & NEEDS_RESET != 0
    }
}

/// A descriptor that makes no sense, perhaps: its queue, index, address, length, flags and next one; and whether a chain
/// begins with it.
pub type HostileChain = (prop::sample::Index, u16, u64, u32, u16, u16, bool);

/// Descriptors of all flags: with a next one or not, to be read or written, and tables of more.
pub fn hostile_chains() -> impl Strategy<Value = Vec<HostileChain>> {
    // In memory, also where the rings are; around its end; or anywhere.
    let at = prop_oneof![
        4 => 0..MEMORY,
        2 => QUEUES..QUEUES + 4 * QUEUE,
        1 => MEMORY - 0x1000..MEMORY + 0x1000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..0x1000u32, 2 => 0..MEMORY as u32, 1 => any::<u32>()];
    let queue = any::<prop::sample::Index>();
    let chain = (queue, 0..SIZE, at, len, 0..8u16, 0..SIZE + 2, prop::bool::weighted(0.7));
    prop::collection::vec(chain, 1..30)
}

/// A device that gives back what it reads, reversed, and counts what it is told.
#[derive(Default)]
struct Mirror {
    activated: Option<u64>,
    config: Vec<u8>,
}

impl Device for Mirror {
    fn kind(&self) -> u32 {
        42
    }

    fn name(&self) -> &'static str {
        "mirror"
    }

    fn queues(&self) -> &[u16] {
        &[16, 64]
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config.clone();
        config.extend(self.activated.unwrap_or(0).to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, _: u64, data: &[u8]) {
        self.config = data.to_vec();
    }

    fn activate(&mut self, features: u64) {
        self.activated = Some(features);
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        // The second queue is one whose buffers are kept.
        while let Some(chain) = rings.take(0)? {
            let head = chain.head_index();
            let mut from = chain.clone().reader(rings.ram()).map_err(|_| Broken("readable"))?;
            let mut to = chain.writer(rings.ram()).map_err(|_| Broken("writable"))?;
            let mut bytes = vec![0; from.available_bytes().min(to.available_bytes())];
            io::Read::read_exact(&mut from, &mut bytes).map_err(|_| Broken("readable"))?;
            bytes.reverse();
            io::Write::write_all(&mut to, &bytes).map_err(|_| Broken("writable"))?;
            rings.give(0, head, bytes.len() as u32)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.activated = None;
    }
}

#[test]
fn a_driver_finds_a_modern_device() {
    let mut driver = Driver::plugged(Mirror::default());
    assert_eq!(driver.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.read(4), driver.read(8)), (2, 42));
    assert_eq!(driver.offered(), VERSION_1 | INDIRECT_DESC | 1 << 29 | 1 << 5);
    for (queue, most) in [(0, 16), (1, 64), (2, 0), (u32::MAX, 0)] {
        driver.write(QUEUE_SEL, queue);
        assert_eq!(driver.read(QUEUE_NUM_MAX), most, "queue {queue}");
    }
    // There is no shared memory, and no third word of features.
    assert_eq!((driver.read(0xB0), driver.read(0xB4)), (u32::MAX, u32::MAX));
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    // Registers are read as a whole.
    let mut byte = [0xFF];
    driver.mmio.read(0, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn buffers_go_there_and_back() {
    let mut driver = Driver::new(Mirror::default());
    for round in 0..40u8 {
        let text = [b'a', b'b', round];
        let head = driver.put(0, &[Buffer::In(&text[..1]), Buffer::In(&text[1..]), Buffer::Out(5)]);
        driver.serve();
        let data = vec![round, b'b', b'a', 0, 0];
        assert_eq!(driver.used(0), Some(Used { head, len: 3, data }));
        assert_eq!(driver.used(0), None);
    }
    assert_eq!(driver.read(INTERRUPT_STATUS), 1);
    driver.write(INTERRUPT_ACK, 1);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_is_interrupted_when_it_asked_to_be() {
    // With EVENT_IDX it says at which entry of the used ring, behind its available ring (VIRTIO 1.2, 2.7.7).
    let mut driver = Driver::new(Mirror::default());
    let used_event = QUEUES + AVAIL + 4 + 2 * u64::from(SIZE);
    driver.ram.write_obj(3u16, GuestAddress(used_event)).unwrap();
    let interrupts = [0; 6].map(|_| {
        driver.put(0, &[Buffer::In(b"x"), Buffer::Out(1)]);
        driver.serve();
        assert_eq!(driver.used(0).unwrap().data, b"x");
        driver.interrupts()
    });
    assert_eq!(interrupts, [0, 0, 0, 1, 1, 1]);
}

#[test]
fn the_configuration_is_read_and_written_in_any_piece() {
    let mut driver = Driver::new(Mirror::default());
    driver.set_config(0, b"abc");
    assert_eq!(driver.config(1, 2), b"bc");
    // There is nothing behind it.
    assert_eq!(driver.config(10, 4), [0, 0, 0, 0]);
    assert_eq!(driver.config(0xE00, 1), [0]);
    let generation = driver.read(0xFC);
    driver.core.wake.config_changed();
    assert_ne!(driver.read(0xFC), generation);
    assert_eq!((driver.read(INTERRUPT_STATUS) & 2, driver.interrupts()), (2, 1));
}

#[test]
fn features_that_were_not_offered_are_not_taken() {
    let mut driver = Driver::plugged(Mirror::default());
    for features in [VERSION_1 | 1 << 6, 1 << 5, 0] {
        assert_eq!(driver.begin(features) & (4 | 8), 0, "{features:#x}");
    }
    assert_eq!(driver.begin(VERSION_1 | 1 << 5), READY);
    // Now they are what they are.
    driver.write(DRIVER_FEATURES + 4, 0);
    driver.write(DRIVER_FEATURES, 0);
    assert_eq!(driver.config(0, 8), (VERSION_1 | 1 << 5).to_le_bytes());
}

#[test]
fn a_queue_does_not_move_once_the_device_works() {
    let mut driver = Driver::new(Mirror::default());
    driver.set_up(0, MEMORY + 0x1000);
    driver.write(QUEUE_READY, 0);
    assert_eq!(driver.read(QUEUE_READY), 1);
    driver.put(0, &[Buffer::In(b"ab"), Buffer::Out(2)]);
    driver.serve();
    assert_eq!(driver.used(0).unwrap().data, b"ba");
}

#[test]
fn a_ring_has_to_lie_in_memory_with_its_last_byte() {
    for at in [MEMORY - USED, MEMORY, u64::MAX - 0xFFF, MEMORY - USED - 4] {
        let mut driver = Driver::plugged(Mirror::default());
        driver.choose(VERSION_1);
        driver.set_up(0, at);
        driver.write(STATUS, READY);
        assert!(driver.broken(), "{at:#x}");
        assert_eq!(driver.read(STATUS) & 4, 0, "{at:#x}");
        driver.serve();
        // A reset mends it.
        assert_eq!(driver.begin(VERSION_1), READY);
    }
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_begin_anew() {
    type Harm = fn(&mut Driver);
    let harms: [(&str, Harm); 4] = [
        ("a buffer outside of memory", |driver| {
            driver.descriptor(0, 0, MEMORY - 1, 2, 0, 0);
            driver.offer(0, 0);
        }),
        ("a buffer around the end of the address space", |driver| {
            driver.descriptor(0, 0, u64::MAX - 1, 16, 0, 0);
            driver.offer(0, 0);
        }),
        ("more on the ring than it has entries", |driver| {
            driver.ram.write_obj(SIZE + 1, GuestAddress(QUEUES + AVAIL + 2)).unwrap();
        }),
        ("a chain that begins beyond the table", |driver| driver.offer(0, SIZE)),
    ];
    for (name, harm) in harms {
        let mut driver = Driver::new(Mirror::default());
        harm(&mut driver);
        driver.serve();
        assert!(driver.broken(), "{name}");
        assert_eq!(driver.read(INTERRUPT_STATUS) & 2, 2, "{name}");
        // It is left alone from then on.
        driver.put(0, &[Buffer::In(b"x"), Buffer::Out(1)]);
        driver.serve();
        assert_eq!(driver.used(0), None, "{name}");
        driver.write(STATUS, READY);
        assert!(driver.broken(), "{name}");
        let features = driver.offered();
        assert_eq!(driver.begin(features), READY, "{name}");
        driver.put(0, &[Buffer::In(b"xy"), Buffer::Out(2)]);
        driver.serve();
        assert_eq!(driver.used(0).unwrap().data, b"yx", "{name}");
    }
}

#[test]
fn a_chain_in_a_table_is_no_longer_than_its_queue() {
    const INDIRECT: u16 = 4;
    for (count, refused) in [(16u16, false), (17, true), (u16::MAX, true)] {
        let mut driver = Driver::new(Mirror::default());
        // Each has nothing in it, and the last one ends the chain.
        for index in 0..count {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&BUFFERS.to_le_bytes());
            bytes[12..14].copy_from_slice(&u16::from(index + 1 < count).to_le_bytes());
            bytes[14..].copy_from_slice(&(index + 1).to_le_bytes());
            driver.ram.write_slice(&bytes, GuestAddress(BUFFERS + 16 * u64::from(index))).unwrap();
        }
        driver.descriptor(0, 0, BUFFERS, 16 * u32::from(count), INDIRECT, 0);
        driver.offer(0, 0);
        driver.serve();
        assert_eq!(driver.broken(), refused, "{count}");
    }
}

proptest! {
    /// Registers written in any order, with what means something there or not, and bells between.
    #[test]
    fn hostile_registers_do_no_harm(
        steps in prop::collection::vec(
            (
                prop_oneof![
                    3 => prop::sample::select(vec![
                        STATUS, QUEUE_SEL, QUEUE_NUM, QUEUE_READY, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE,
                        DRIVER_FEATURES, DRIVER_FEATURES + 4, INTERRUPT_ACK, QUEUE_NOTIFY,
                    ]),
                    1 => 0..0x200u64,
                ],
                prop_oneof![
                    prop::sample::select(vec![0, 1, 3, 8, 11, 15, READY, NEEDS_RESET, 0x80, 0xFFFF_FFFF]),
                    (0..MEMORY as u32 / 0x1000).prop_map(|page| page * 0x1000),
                    0..70u32,
                    any::<u32>(),
                ],
            ),
            1..100,
        ),
    ) {
        let mut driver = Driver::plugged(Mirror::default());
        for (register, value) in steps {
            driver.write(register, value);
            driver.read(register);
            driver.serve();
        }
        // Whatever state that has led to, a driver that keeps to the rules can begin.
        prop_assert_eq!(driver.begin(VERSION_1), READY);
        driver.put(0, &[Buffer::In(b"xy"), Buffer::Out(2)]);
        driver.serve();
        prop_assert_eq!(driver.used(0).unwrap().data, b"yx");
    }

    #[test]
    fn randomness_survives_hostile_chains(chains in hostile_chains()) {
        Driver::new(rng::Rng).survives(chains);
    }
}

#[test]
fn a_chain_in_a_circle_ends() {
    let mut driver = Driver::new(Mirror::default());
    driver.descriptor(0, 0, BUFFERS, 1, 1, 1);
    driver.descriptor(0, 1, BUFFERS, 1, 1, 0);
    driver.offer(0, 0);
    driver.serve();
    // That it came back, one way or the other, is what counts.
    assert!(driver.broken() || driver.used(0).is_some());
}

#[test]
fn what_a_device_leaves_on_a_ring_does_not_keep_it_busy() {
    let mut driver = Driver::new(Mirror::default());
    driver.put(1, &[Buffer::Out(1)]);
    driver.serve();
    assert_eq!(driver.used(1), None);
}

#[test]
fn a_thread_serves_the_device_when_the_bell_rings_and_ends_with_the_machine() {
    let mut driver = Driver::new(Mirror::default());
    let (stop, stopped) = run::stop();
    let mut workers = Workers::default();
    workers.start(driver.core.clone(), &stop, None).unwrap();
    for text in [b"ab", b"cd"] {
        driver.put(0, &[Buffer::In(text), Buffer::Out(2)]);
        driver.write(QUEUE_NOTIFY, 0);
        let used = std::iter::repeat_with(|| {
            std::thread::yield_now();
            driver.used(0)
        });
        let data = used.flatten().next().unwrap().data;
        assert_eq!(data, [text[1], text[0]]);
    }
    drop(workers);
    assert_eq!(stopped.ending(), None::<Ending>);
}

#[test]
fn randomness_fills_buffers_of_all_sizes() {
    let mut driver = Driver::new(rng::Rng);
    let mut seen = Vec::new();
    for len in [1, 16, 256, 4096] {
        driver.put(0, &[Buffer::Out(len)]);
        driver.serve();
        let used = driver.used(0).unwrap();
        assert_eq!(used.len, len.min(256));
        assert!(used.data[used.len as usize..].iter().all(|byte| *byte == 0));
        seen.push(used.data);
    }
    assert_ne!(seen[1], seen[2][..16]);
    assert!(seen[2].iter().any(|byte| *byte != seen[2][0]));
    // A buffer that is not writable gets nothing.
    driver.put(0, &[Buffer::In(b"text")]);
    driver.serve();
    assert_eq!(driver.used(0).unwrap().len, 0);
}
