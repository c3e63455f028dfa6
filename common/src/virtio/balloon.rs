//! Introduced by stage 08: taking memory back from a guest (VIRTIO 1.2, 5.5 "Traditional Memory Balloon Device").
//!
//! The host gives a page of memory when the guest first touches it, and does not learn when the guest needs it no
//! more. This device tells it, in two ways:
//!
//! - the *balloon*: the device says how many pages it wants, and the driver allocates so many, which nobody in the guest
//!   uses then, and sends their numbers (*inflates* the balloon);
//! - *free page reporting*: the driver sends ranges that are free right now. The guest takes them again whenever it
//!   likes.
//!
//! Either way the host takes the memory back by `madvise(MADV_DONTNEED)`: the guest finds a page of zeros
//! when it touches such a page again, or what the snapshot has in it, if it comes from one.
//!
//! How large the balloon should be depends on how much memory the guest needs, of which it tells in its *statistics*. The
//! driver puts one buffer with them on a queue of their own; whenever it gets that back, it sends new ones. A
//! [`Control`] asks for them, and changes the size while the machine runs.

use std::fmt;
use std::io::{self, Read as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::{Broken, Chain, Device, Rings, Wake, copy_config};
use crate::layout::PAGE_SIZE;
use crate::memory::Ram;
use crate::snapshot;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The first of the queues that there are only if the driver has chosen their feature: the one for statistics and the one
/// for free pages. Drivers number the queues that there are.
const OPTIONAL: usize = 2;

/// VIRTIO_BALLOON_F_STATS_VQ.
const F_STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back when it would run out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_PAGE_REPORTING: u64 = 1 << 5;

/// As many pages as one chain may name: 256 MiB of memory. Linux names 256.
const MOST: usize = 1 << 16;

/// As many statistics as are read; VIRTIO 1.2 has ten.
const STATISTICS: usize = 64;

// Their tags (VIRTIO 1.2, 5.5.6.4 "Memory Statistics Tags").
const MEMORY_FREE: u16 = 4;
const MEMORY_TOTAL: u16 = 5;
const MEMORY_AVAILABLE: u16 = 6;

/// A memory balloon.
pub struct Balloon {
    control: Control,
    /// What the driver has chosen.
    features: u64,
    /// The chain with the statistics, which the device has until it wants new ones.
    statistics: Option<u16>,
}

/// The host's side of a balloon. Clones belong to the same one.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Statistics have come.
    reported: Condvar,
}

struct State {
    status: Status,
    /// What it was when the driver left, if it did: at the end a guest resets its devices.
    last: Option<Status>,
    /// How often statistics have come.
    reports: u64,
    /// New ones are wanted.
    asked: bool,
    wake: Option<Wake>,
}

/// How much memory a balloon has, and how much its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// How many pages of 4 KiB it wants.
    pub wanted: u32,
    /// How many it has, as the driver says.
    pub actual: u32,
    /// What the driver has said of the guest's memory.
    pub memory: Option<Memory>,
}

/// A guest's memory, in bytes, as it says itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All.
    pub total: u64,
    /// What nothing is in.
    pub free: u64,
    /// What programs could have without swapping.
    pub available: u64,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let pages = |count: u32| mib(u64::from(count) * PAGE_SIZE);
        write!(f, "the balloon has {} of {} MiB", pages(self.actual), pages(self.wanted))?;
        match self.memory {
            None => write!(f, "; the guest has said nothing of its memory"),
            Some(Memory { total, free, available }) => write!(
                f,
                "; of the guest's {} MiB {} are free, {} available",
                mib(total),
                mib(free),
                mib(available)
            ),
        }
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the balloon want `more` bytes than it does, or fewer, but never more than `most`.
    pub fn resize(&self, more: i64, most: u64) {
        let mut state = self.lock();
        let bytes = u64::from(state.status.wanted) * PAGE_SIZE;
        state.status.wanted = pages(bytes.saturating_add_signed(more).min(most));
        if let Some(wake) = &state.wake {
            wake.config_changed();
        }
    }

    /// What is known of the balloon and the guest, without asking it.
    pub fn status(&self) -> Status {
        self.lock().status
    }

    /// The same at the machine's end, when the driver may have left.
    pub fn last(&self) -> Status {
        let state = self.lock();
        state.last.unwrap_or(state.status)
    }

    /// Asks the guest, and waits for its answer for as long as `patience`. What it hasn't answered is as it was.
    pub fn ask(&self, patience: Duration) -> Status {
        let mut state = self.lock();
        state.asked = true;
        if let Some(wake) = &state.wake {
            wake.now();
        }
        let before = state.reports;
        let unanswered = |state: &mut State| state.reports == before;
        let waited = self.0.reported.wait_timeout_while(state, patience, unanswered);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.status
    }
}

/// So many whole pages.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}

impl Balloon {
    /// A balloon that wants `size` bytes of the guest's memory, in pages of 4 KiB.
    pub fn new(size: u64) -> Self {
        let status = Status { wanted: pages(size), actual: 0, memory: None };
        let state = State { status, last: None, reports: 0, asked: false, wake: None };
        let shared = Shared { state: Mutex::new(state), reported: Condvar::new() };
        Self { control: Control(Arc::new(shared)), features: 0, statistics: None }
    }

    /// What changes its size.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// The numbers of the queues for statistics and for free pages.
    fn optional(&self) -> [Option<usize>; 2] {
        let has = |feature| self.features & feature != 0;
        let report = OPTIONAL + usize::from(has(F_STATS));
        [has(F_STATS).then_some(OPTIONAL), has(F_PAGE_REPORTING).then_some(report)]
    }

    /// Takes statistics, and asks for more if somebody wants them.
    fn exchange(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Broken> {
        let mut state = self.control.lock();
        if self.statistics.is_none()
            && let Some(chain) = rings.take(queue)?
        {
            self.statistics = Some(chain.head_index());
            state.status.memory = Some(memory(rings.ram(), chain)?);
            state.reports += 1;
            self.control.0.reported.notify_all();
        }
        if state.asked
            && let Some(head) = self.statistics.take()
        {
            state.asked = false;
            rings.give(queue, head, 0)?;
        }
        Ok(())
    }
}

/// Reads statistics: tags of 16 bits, each followed by a value of 64 (VIRTIO 1.2, 5.5.6.3).
fn memory(ram: &Ram, chain: Chain<'_>) -> Result<Memory, Broken> {
    let mut statistics = chain.reader(ram).map_err(|_| Broken("buffers are not in its memory"))?;
    let mut memory = Memory::default();
    for _ in 0..(statistics.available_bytes() / 10).min(STATISTICS) {
        let mut statistic = [0; 10];
        statistics
            .read_exact(&mut statistic)
            .map_err(|_| Broken("buffers are not in its memory"))?;
        let [low, high, value @ ..] = statistic;
        let value = u64::from_le_bytes(value);
        match u16::from_le_bytes([low, high]) {
            MEMORY_FREE => memory.free = value,
            MEMORY_TOTAL => memory.total = value,
            MEMORY_AVAILABLE => memory.available = value,
            _ => {}
        }
    }
    Ok(memory)
}

/// Gives the host the pages back whose numbers `chain` has (VIRTIO 1.2, 5.5.6.1).
fn inflate(ram: &Ram, chain: Chain<'_>) -> Result<(), Broken> {
    let mut numbers = chain.reader(ram).map_err(|_| Broken("buffers are not in its memory"))?;
    let count = numbers.available_bytes() / 4;
    if count > MOST {
        return Err(Broken("list of pages is too long"));
    }
    let mut pages = Vec::with_capacity(count);
    for _ in 0..count {
        let mut number = [0; 4];
        numbers.read_exact(&mut number).map_err(|_| Broken("buffers are not in its memory"))?;
        pages.push(u64::from(u32::from_le_bytes(number)));
    }
    // A driver gets its pages one by one; they stand side by side more often than not.
    pages.sort_unstable();
    pages.dedup();
    for pages in pages.chunk_by(|one, next| one + 1 == *next) {
        give_back(ram, pages[0] * PAGE_SIZE, pages.len() as u64 * PAGE_SIZE)?;
    }
    Ok(())
}

/// Takes the whole pages between `start` and `start + len` from the guest. It finds zeros there when it comes again.
fn give_back(ram: &Ram, start: u64, len: u64) -> Result<(), Broken> {
    const NOT_RAM: Broken = Broken("pages are not in its memory");
    let end = start.checked_add(len).ok_or(NOT_RAM)? / PAGE_SIZE * PAGE_SIZE;
    let start = start.checked_next_multiple_of(PAGE_SIZE).ok_or(NOT_RAM)?;
    let len = usize::try_from(end.saturating_sub(start)).map_err(|_| NOT_RAM)?;
    // A range may go from one memory region into the next.
    let slices = ram.get_slices(GuestAddress(start), len, vm_memory::Permissions::Write);
    for slice in slices.map_err(|_| NOT_RAM)? {
        let slice = slice.map_err(|_| NOT_RAM)?;
        let pages = slice.ptr_guard_mut();
        // SAFETY: `get_slices` gives only parts of guest RAM, which is mapped as long as `ram` is there. Guest and host
        // read and write it as bytes that may change at any time, and zeros are bytes, so that its contents
        // change here is nothing new to anyone.
        #[expect(unsafe_code, reason = "madvise takes an address")]
        let result = unsafe { madvise(pages.as_ptr().cast(), slice.len(), Advice::LinuxDontNeed) };
        // Memory that the host can't take back, such as the half of a huge page, the guest just keeps.
        let _ = result;
    }
    Ok(())
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        5
    }

    fn name(&self) -> &'static str {
        "virtio balloon"
    }

    fn queues(&self) -> &[u16] {
        &[128, 128, 128, 128]
    }

    fn features(&self) -> u64 {
        F_STATS | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // VIRTIO 1.2, 5.5.4 "Device configuration layout": num_pages, actual.
        let Status { wanted, actual, .. } = self.control.status();
        copy_config(&[wanted.to_le_bytes(), actual.to_le_bytes()].concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.control.lock().status.actual = u32::from_le_bytes(actual);
        }
    }

    fn plug(&mut self, wake: Wake) -> io::Result<()> {
        self.control.lock().wake = Some(wake);
        Ok(())
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.control.lock().last = None;
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        while let Some(chain) = rings.take(INFLATE)? {
            let head = chain.head_index();
            inflate(rings.ram(), chain)?;
            rings.give(INFLATE, head, 0)?;
        }
        // The guest gets its pages back by touching them.
        while let Some(chain) = rings.take(DEFLATE)? {
            rings.give(DEFLATE, chain.head_index(), 0)?;
        }
        let [statistics, report] = self.optional();
        if let Some(queue) = statistics {
            self.exchange(queue, rings)?;
        }
        let Some(queue) = report else { return Ok(()) };
        // Each buffer is a free range (VIRTIO 1.2, 5.5.6.7).
        while let Some(chain) = rings.take(queue)? {
            let head = chain.head_index();
            for range in chain {
                give_back(rings.ram(), range.addr().0, range.len().into())?;
            }
            rings.give(queue, head, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.statistics = None;
        let mut state = self.control.lock();
        if std::mem::take(&mut self.features) != 0 {
            state.last = Some(state.status);
        }
        (state.status.actual, state.status.memory) = (0, None);
    }

    fn keep(&self) -> Value {
        let Status { wanted, actual, .. } = self.control.status();
        let kept = Kept { wanted, actual, statistics: self.statistics };
        serde_json::to_value(kept).expect("numbers")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let Kept { wanted, actual, statistics } = snapshot::read(state)?;
        self.statistics = statistics;
        let mut state = self.control.lock();
        (state.status.wanted, state.status.actual) = (wanted, actual);
        Ok(())
    }
}

/// A balloon as it stands in a snapshot.
#[derive(Serialize, Deserialize)]
struct Kept {
    wanted: u32,
    actual: u32,
    statistics: Option<u16>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes as _;

    use super::super::tests::{Buffer, Driver, MEMORY, hostile_chains};
    use super::*;

    const STATS: usize = OPTIONAL;
    const REPORT: usize = OPTIONAL + 1;

    const FULL: [u8; PAGE_SIZE as usize] = [0xA5; PAGE_SIZE as usize];

    /// Pages in the upper half of memory, where nothing else is.
    const FIRST: u32 = (MEMORY / PAGE_SIZE / 2) as u32;

    fn at(page: u32) -> GuestAddress {
        GuestAddress(u64::from(page) * PAGE_SIZE)
    }

    fn fill(driver: &Driver, pages: std::ops::Range<u32>) {
        for page in pages {
            driver.ram.write_slice(&FULL, at(page)).unwrap();
        }
    }

    /// Which of `pages` have become zeros; none has changed otherwise.
    fn gone(driver: &Driver, pages: std::ops::Range<u32>) -> Vec<u32> {
        pages
            .filter(|page| {
                let mut content = FULL;
                driver.ram.read_slice(&mut content, at(*page)).unwrap();
                let zeros = content.iter().all(|byte| *byte == 0);
                assert!(zeros || content == FULL, "page {page}");
                zeros
            })
            .collect()
    }

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    #[test]
    fn the_host_takes_the_pages_in_the_balloon() {
        let mut driver = Driver::new(Balloon::new(5 * PAGE_SIZE));
        assert_eq!(driver.read(8), 5);
        assert_eq!(driver.config(0, 8), [5, 0, 0, 0, 0, 0, 0, 0]);
        let pages = FIRST..FIRST + 12;
        fill(&driver, pages.clone());
        // As Linux sends them: in no order.
        let list = numbers(&[FIRST + 9, FIRST + 1, FIRST + 3, FIRST + 2, FIRST + 3]);
        driver.put(INFLATE, &[Buffer::In(&list[..6]), Buffer::In(&list[6..])]);
        driver.serve();
        assert_eq!(driver.used(INFLATE).unwrap().len, 0);
        assert_eq!(gone(&driver, pages), [FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 9]);
        driver.set_config(4, &[4, 0, 0, 0]);
        assert_eq!(driver.config(4, 4), [4, 0, 0, 0]);
        driver.put(DEFLATE, &[Buffer::In(&list)]);
        driver.serve();
        assert!(driver.used(DEFLATE).is_some());
    }

    #[test]
    fn the_host_takes_the_whole_pages_that_are_reported_free() {
        let driver = Driver::new(Balloon::new(0));
        let pages = FIRST..FIRST + 12;
        fill(&driver, pages.clone());
        let page = PAGE_SIZE as u32;
        driver.descriptor(REPORT, 0, at(FIRST + 1).0, 3 * page, 1 | 2, 1);
        // Not from the start of a page, nor to the end of one.
        driver.descriptor(REPORT, 1, at(FIRST + 6).0 + 1, 3 * page, 2, 0);
        driver.offer(REPORT, 0);
        driver.serve();
        assert_eq!(gone(&driver, pages), [FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 7, FIRST + 8]);
    }

    #[test]
    fn what_is_no_memory_of_the_guest_is_left_alone() {
        let end = (MEMORY / PAGE_SIZE) as u32;
        for pages in [vec![end], vec![u32::MAX], vec![FIRST, end - 1, end, end + 1]] {
            let mut driver = Driver::new(Balloon::new(0));
            driver.put(INFLATE, &[Buffer::In(&numbers(&pages))]);
            driver.serve();
            assert!(driver.broken(), "{pages:?}");
        }
        for (start, len) in
            [(MEMORY, 1 << 20), (MEMORY - PAGE_SIZE, 1 << 20), (u64::MAX - 1, 8), (u64::MAX - 9, 8)]
        {
            let mut driver = Driver::new(Balloon::new(0));
            driver.descriptor(REPORT, 0, start, len, 2, 0);
            driver.offer(REPORT, 0);
            driver.serve();
            assert!(driver.broken(), "{start:#x}");
        }
        let mut driver = Driver::new(Balloon::new(0));
        driver.put(INFLATE, &[Buffer::In(&vec![0; 4 * MOST + 4])]);
        driver.serve();
        assert!(driver.broken());
    }

    /// Statistics as Linux sends them, with some that nobody here knows.
    fn statistics(free: u64, total: u64, available: u64) -> Vec<u8> {
        [(0, 7), (MEMORY_FREE, free), (MEMORY_TOTAL, total), (MEMORY_AVAILABLE, available), (99, 1)]
            .iter()
            .flat_map(|(tag, value): &(u16, u64)| {
                [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
            })
            .collect()
    }

    #[test]
    fn the_guest_tells_of_its_memory_when_it_is_asked() {
        let balloon = Balloon::new(0);
        let control = balloon.control();
        let mut driver = Driver::new(balloon);
        assert_eq!(control.ask(Duration::ZERO).memory, None);
        // What was asked before there was anybody, the first answer asks again.
        driver.put(STATS, &[Buffer::In(&statistics(1, 2, 3))]);
        driver.serve();
        assert_eq!(control.status().memory, Some(Memory { free: 1, total: 2, available: 3 }));
        assert!(driver.used(STATS).is_some());
        // The device keeps the buffer until somebody asks.
        driver.put(STATS, &[Buffer::In(&statistics(4 << 20, 5 << 20, 6 << 20)[..35])]);
        driver.serve();
        assert_eq!(driver.used(STATS), None);
        let text = "the balloon has 0 of 0 MiB; of the guest's 5 MiB 4 are free, 0 available";
        assert_eq!(control.status().to_string(), text);
        let asking = std::thread::spawn({
            let control = control.clone();
            move || control.ask(Duration::from_secs(60))
        });
        let used = std::iter::repeat_with(|| {
            driver.serve();
            std::thread::yield_now();
            driver.used(STATS)
        });
        assert!(used.flatten().next().is_some());
        driver.put(STATS, &[Buffer::In(&statistics(8, 9, 7))]);
        driver.serve();
        let memory = Some(Memory { free: 8, total: 9, available: 7 });
        assert_eq!(asking.join().unwrap().memory, memory);
        // The guest powers off.
        driver.write(0x70, 0);
        assert_eq!((control.status().memory, control.last().memory), (None, memory));
    }

    #[test]
    fn the_size_changes_while_the_machine_runs() {
        let balloon = Balloon::new(10 * PAGE_SIZE);
        let control = balloon.control();
        let mut driver = Driver::new(balloon);
        let generation = driver.read(0xFC);
        for (more, wanted) in [(6, 16), (-1, 15), (100, 20), (-100, 0), (i64::MAX >> 12, 20)] {
            control.resize(more * PAGE_SIZE as i64, 20 * PAGE_SIZE);
            assert_eq!(driver.config(0, 4), u32::to_le_bytes(wanted));
        }
        assert_ne!(driver.read(0xFC), generation, "the driver was not told");
    }

    #[test]
    fn a_driver_without_statistics_has_its_reports_in_their_place() {
        let mut driver = Driver::plugged(Balloon::new(0));
        driver.begin(1 << 32 | F_PAGE_REPORTING);
        fill(&driver, FIRST..FIRST + 2);
        driver.descriptor(OPTIONAL, 0, at(FIRST).0, PAGE_SIZE as u32, 2, 0);
        driver.offer(OPTIONAL, 0);
        driver.serve();
        assert_eq!(gone(&driver, FIRST..FIRST + 2), [FIRST]);
    }

    proptest! {
        #[test]
        fn hostile_chains_do_no_harm(
            chains in hostile_chains(),
        ) {
            let balloon = Balloon::new(u64::MAX);
            // Somebody asks, so that the buffer with the statistics comes and goes.
            let control = balloon.control();
            control.ask(Duration::ZERO);
            Driver::new(balloon).survives(chains);
            let _ = control.status().to_string();
        }
    }
}
