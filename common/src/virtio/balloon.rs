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
//! when it touches such a page again.

use std::io::Read as _;

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemory as _};

use super::{Broken, Chain, Device, Rings, copy_config};
use crate::layout::PAGE_SIZE;
use crate::memory::Ram;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Drivers number the queues that there are: those for statistics and for hints, which would come before, are not.
const REPORT: usize = 2;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back when it would run out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_PAGE_REPORTING: u64 = 1 << 5;

/// As many pages as one chain may name: 256 MiB of memory. Linux names 256.
const MOST: usize = 1 << 16;

/// A memory balloon.
pub struct Balloon {
    /// How many pages it wants.
    wanted: u32,
    /// How many it has, as the driver says.
    actual: [u8; 4],
}

impl Balloon {
    /// A balloon that wants `size` bytes of the guest's memory, in pages of 4 KiB.
    pub fn new(size: u64) -> Self {
        let wanted = u32::try_from(size / PAGE_SIZE).unwrap_or(u32::MAX);
        Self { wanted, actual: [0; 4] }
    }
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
        &[128, 128, 128]
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // VIRTIO 1.2, 5.5.4 "Device configuration layout": num_pages, actual.
        copy_config(&[self.wanted.to_le_bytes(), self.actual].concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.actual = actual;
        }
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
        // Each buffer is a free range (VIRTIO 1.2, 5.5.6.7).
        while let Some(chain) = rings.take(REPORT)? {
            let head = chain.head_index();
            for range in chain {
                give_back(rings.ram(), range.addr().0, range.len().into())?;
            }
            rings.give(REPORT, head, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.actual = [0; 4];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes as _;

    use super::super::tests::{Buffer, Driver, MEMORY};
    use super::*;

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

    proptest! {
        #[test]
        fn hostile_chains_do_no_harm(
            chains in prop::collection::vec(
                (0..3usize, 0..8u16, any::<u64>(), any::<u32>(), 0..8u16, 0..10u16, any::<bool>()),
                1..30,
            ),
        ) {
            let mut driver = Driver::new(Balloon::new(u64::MAX));
            for (queue, index, at, len, flags, next, near) in chains {
                let at = if near { at % MEMORY } else { at };
                driver.descriptor(queue, index, at, len % (32 << 20), flags, next);
                driver.offer(queue, index);
                driver.serve();
            }
            let features = driver.offered();
            driver.begin(features);
            prop_assert!(!driver.broken());
        }
    }
}
