//! The device between a driver and the other end of a passt-like stream, or a link that says what it was given.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::passt::Passt;
use super::*;
use crate::virtio::tests::{Buffer, Driver, MEMORY, SIZE as RING, hostile_chains};

const MAC: Mac = Mac([2, 0, 0, 0x12, 0x34, 0x56]);
const VERSION_1: u64 = 1 << 32;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// A buffer that holds any frame.
const LARGE: u32 = 66_000;

/// A frame of `len` bytes, no two alike.
fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + len) as u8).collect()
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame].concat()
}

/// A device on a stream, and the stream's other end.
fn connected() -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Net::new(Passt::new(ours.into()).unwrap(), MAC), theirs)
}

/// A driver that has chosen all features, and the stream's other end.
fn ready() -> (Driver, UnixStream) {
    let (net, theirs) = connected();
    (Driver::new(net), theirs)
}

fn send(stream: &mut UnixStream, frame: &[u8]) {
    stream.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    stream.write_all(frame).unwrap();
}

fn next(stream: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

/// The status in the configuration: whether the guest sees a cable.
fn is_up(driver: &mut Driver) -> bool {
    driver.config(6, 2) == [1, 0]
}

/// What a [`Told`] was told.
#[derive(Default)]
struct Heard {
    features: Vec<u64>,
    frames: Vec<Vec<u8>>,
}

/// A link that keeps what it is given, offers an offload, and has more frames than anyone can take.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Heard>>);

impl Link for Told {
    fn offloads(&self) -> u64 {
        1
    }

    fn activate(&mut self, features: u64) {
        self.0.lock().unwrap().features.push(features);
    }

    fn mtu(&self) -> u16 {
        9000
    }

    fn watch(&self, _: &Wake) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Down> {
        // What lies in the header's last field is nobody's.
        frame[..60].fill(0xFF);
        Ok(Some(60))
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Down> {
        self.0.lock().unwrap().frames.push(frame.to_vec());
        Ok(())
    }
}

#[test]
fn the_configuration_says_address_status_and_mtu() {
    let told = Told::default();
    let mut driver = Driver::plugged(Net::new(told.clone(), MAC));
    let own = 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16;
    assert_eq!(driver.offered() & 0xFF_FFFF, own | 1);
    // struct virtio_net_config.
    assert_eq!(driver.config(0, 12), [2, 0, 0, 0x12, 0x34, 0x56, 1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(driver.config(12, 4), [0; 4]);
    // The link learns what was chosen, and that it no longer is.
    driver.begin(VERSION_1 | 1);
    driver.begin(VERSION_1);
    let chosen = [0, VERSION_1 | 1, 0, VERSION_1];
    assert_eq!(told.0.lock().unwrap().features, chosen);
}

#[test]
fn frames_go_to_the_link_and_their_buffers_come_back() {
    let (mut driver, mut stream) = ready();
    for len in [14, 60, 1514, 65_534] {
        let frame = frame(len);
        let all = with_header(&frame);
        // However the driver cuts it: header and frame together or apart, or in the middle of the header.
        for cut in [0, 5, 12, 13, all.len()] {
            let head = driver.put(1, &[Buffer::In(&all[..cut]), Buffer::In(&all[cut..])]);
            driver.serve();
            let used = driver.used(1).unwrap();
            assert_eq!((used.head, used.len), (head, 0));
            assert_eq!(next(&mut stream), frame, "{len} bytes, cut at {cut}");
        }
    }
    // As many pieces as the ring has.
    let frame = frame(800);
    let all = with_header(&frame);
    let pieces: Vec<_> = all.chunks(all.len().div_ceil(RING.into())).map(Buffer::In).collect();
    assert_eq!(pieces.len(), usize::from(RING));
    driver.put(1, &pieces);
    driver.serve();
    assert!(driver.used(1).is_some());
    assert_eq!(next(&mut stream), frame);
}

#[test]
fn the_header_goes_to_a_link_that_knows_it() {
    let told = Told::default();
    let mut driver = Driver::new(Net::new(told.clone(), MAC));
    // Nonsense in it is the host's kernel to refuse.
    let all = [&[0xFF; HEADER][..], &frame(40)].concat();
    driver.put(1, &[Buffer::In(&all)]);
    driver.serve();
    assert!(driver.used(1).is_some());
    assert_eq!(told.0.lock().unwrap().frames, [all]);
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (mut driver, mut stream) = ready();
    let long = vec![1; MOST + 1];
    let short = vec![1; HEADER + ETHERNET - 1];
    let good = with_header(&frame(60));
    let empty: &[Buffer<'_>] = &[Buffer::In(&[])];
    for bad in [empty, &[Buffer::In(&long)], &[Buffer::In(&short)], &[Buffer::Out(100)]] {
        let head = driver.put(1, bad);
        driver.serve();
        assert_eq!(driver.used(1).unwrap().head, head);
        driver.put(1, &[Buffer::In(&good)]);
        driver.serve();
        assert!(driver.used(1).is_some());
        assert_eq!(next(&mut stream), good[HEADER..]);
    }
    assert!(!driver.broken() && is_up(&mut driver));
}

#[test]
fn a_frame_from_the_link_fills_a_buffer() {
    let (mut driver, mut stream) = ready();
    for len in [14, 60, 1514, 65_534] {
        let frame = frame(len);
        let head = driver.put(0, &[Buffer::Out(10), Buffer::Out(LARGE)]);
        send(&mut stream, &frame);
        driver.serve();
        let used = driver.used(0).unwrap();
        assert_eq!((used.head, used.len as usize), (head, HEADER + len));
        // One buffer of no offloads.
        assert_eq!(used.data[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(used.data[HEADER..HEADER + len], frame);
        assert!(used.data[HEADER + len..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_frame_fills_several_buffers_which_the_driver_sees_together() {
    let (mut driver, mut stream) = ready();
    // Where the driver finds the used ring's index, and where it says at which entry it wants an interrupt.
    let (index, used_event) = (GuestAddress(0x1802), GuestAddress(0x1404 + 2 * u64::from(RING)));
    for round in 0..40 {
        let frame = frame(1000 + round);
        for _ in 0..5 {
            driver.put(0, &[Buffer::Out(300)]);
        }
        send(&mut stream, &frame);
        let before: u16 = driver.ram.read_obj(index).unwrap();
        driver.ram.write_obj(before.wrapping_add(2), used_event).unwrap();
        let interrupts = driver.interrupts();
        driver.serve();
        let chains = (HEADER + frame.len()).div_ceil(300);
        assert_eq!(driver.ram.read_obj::<u16>(index).unwrap(), before + chains as u16);
        assert_eq!(driver.interrupts(), interrupts + 1);
        let mut data: Vec<u8> = Vec::new();
        while let Some(used) = driver.used(0) {
            data.extend_from_slice(&used.data[..used.len as usize]);
        }
        assert_eq!(data[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, chains as u8, 0]);
        assert_eq!(data[HEADER..], frame);
        // The fifth buffer would be the next frame's.
        let features = driver.offered();
        driver.begin(features);
    }
}

#[test]
fn a_frame_waits_until_there_are_buffers_for_it() {
    let (mut driver, mut stream) = ready();
    let frames = [frame(1000), frame(60), frame(200)];
    for frame in &frames {
        send(&mut stream, frame);
    }
    driver.serve();
    assert_eq!(driver.used(0), None);
    // Not enough for the first; nothing of it may go into what is there.
    driver.put(0, &[Buffer::Out(600)]);
    driver.serve();
    assert_eq!(driver.used(0), None);
    driver.put(0, &[Buffer::Out(600)]);
    driver.serve();
    let both = [driver.used(0).unwrap(), driver.used(0).unwrap()];
    assert_eq!((both[0].len, both[1].len), (600, HEADER as u32 + 400));
    assert_eq!(driver.used(0), None);
    for frame in &frames[1..] {
        driver.put(0, &[Buffer::Out(600)]);
        driver.serve();
        let used = driver.used(0).unwrap();
        assert_eq!(used.data[HEADER..used.len as usize], *frame);
    }
}

#[test]
fn a_frame_that_is_too_large_for_one_buffer_is_dropped_where_they_are_not_merged() {
    let (net, mut stream) = connected();
    let mut driver = Driver::plugged(net);
    driver.begin(VERSION_1);
    driver.put(0, &[Buffer::Out(600)]);
    driver.put(0, &[Buffer::Out(600)]);
    send(&mut stream, &frame(1000));
    send(&mut stream, &frame(500));
    driver.serve();
    let used = driver.used(0).unwrap();
    assert_eq!(used.data[HEADER..used.len as usize], frame(500));
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_driver_that_begins_anew_gets_no_frame_of_its_former_life() {
    let (mut driver, mut stream) = ready();
    send(&mut stream, &frame(60));
    driver.serve();
    driver.begin(VERSION_1 | MERGE);
    driver.put(0, &[Buffer::Out(LARGE)]);
    driver.serve();
    assert_eq!(driver.used(0), None);
    send(&mut stream, &frame(100));
    driver.serve();
    assert_eq!(driver.used(0).unwrap().len as usize, HEADER + 100);
}

#[test]
fn a_link_that_is_slow_gets_everything_in_the_end() {
    let (mut driver, mut stream) = ready();
    let frames: Vec<_> = (0..64).map(|i| frame(60_000 + i)).collect();
    let mut put = 0;
    let mut came = 0;
    // Nobody reads at first: the socket fills up, and then the ring.
    let mut given_back = 0;
    while came < frames.len() {
        while put < frames.len() && put - given_back < usize::from(RING) {
            driver.put(1, &[Buffer::In(&with_header(&frames[put]))]);
            put += 1;
        }
        driver.serve();
        let before = given_back;
        while driver.used(1).is_some() {
            given_back += 1;
        }
        if given_back == before {
            // What is on its way is finished when the device is served next: on the rest of a frame, too.
            let reader = {
                let mut stream = stream.try_clone().unwrap();
                std::thread::spawn(move || next(&mut stream))
            };
            while !reader.is_finished() {
                driver.serve();
                std::thread::yield_now();
            }
            assert_eq!(reader.join().unwrap(), frames[came]);
            came += 1;
        }
    }
    assert_eq!(given_back, frames.len());
    stream.set_nonblocking(true).unwrap();
    assert!(stream.read(&mut [0]).is_err(), "more came than was sent");
}

#[test]
fn a_link_that_ends_takes_the_cable_out() {
    type End = fn(&mut UnixStream);
    let ends: [(&str, End); 3] = [
        ("hangs up", |stream| stream.shutdown(std::net::Shutdown::Both).unwrap()),
        ("sends a frame of 4 GiB", |stream| stream.write_all(&[0xFF; 4]).unwrap()),
        ("sends a frame of nothing", |stream| stream.write_all(&[0; 4]).unwrap()),
    ];
    for (name, end) in ends {
        let (mut driver, mut stream) = ready();
        assert!(is_up(&mut driver));
        end(&mut stream);
        driver.put(0, &[Buffer::Out(LARGE)]);
        driver.serve();
        assert!(!is_up(&mut driver), "{name}");
        // VIRTIO_MMIO_INT_CONFIG.
        assert_eq!(driver.read(0x60) & 2, 2, "{name}");
        // The driver goes on without it, and is not told again.
        let interrupts = driver.interrupts();
        driver.serve();
        assert_eq!(driver.interrupts(), interrupts, "{name}");
        driver.put(1, &[Buffer::In(&with_header(&frame(60)))]);
        driver.serve();
        assert!(driver.used(1).is_some() && !driver.broken(), "{name}");
    }
    // Or on a frame of the guest's own.
    let (mut driver, stream) = ready();
    drop(stream);
    driver.put(1, &[Buffer::In(&with_header(&frame(60)))]);
    driver.serve();
    assert!(driver.used(1).is_some() && !is_up(&mut driver));
}

#[test]
fn one_direction_does_not_keep_the_other_from_its_turn() {
    let told = Told::default();
    let mut driver = Driver::new(Net::new(told.clone(), MAC));
    driver.put(1, &[Buffer::In(&with_header(&frame(60)))]);
    // The link never runs out of frames, nor does this ring: it goes around, and its buffers hold nothing.
    for index in 0..RING {
        driver.descriptor(0, index, MEMORY - 100, 100, 2, 0);
        driver.offer(0, index);
    }
    driver.serve();
    assert_eq!(told.0.lock().unwrap().frames.len(), 1);
    let used = driver.used(0).unwrap();
    assert_eq!((used.head, used.len), (0, 60));
    let mut header = [0; HEADER];
    driver.ram.read_slice(&mut header, GuestAddress(MEMORY - 100)).unwrap();
    assert_eq!(header, [255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0]);
}

#[test]
fn buffers_outside_of_memory_break_the_device_and_nothing_else() {
    for queue in [0, 1] {
        for (at, len) in [(MEMORY - 100, 200), (u64::MAX - 50, 100), (MEMORY + 4096, 100)] {
            let (mut driver, mut stream) = ready();
            let flags = if queue == 0 { 2 } else { 0 };
            driver.descriptor(queue, 0, at, len, flags, 0);
            driver.offer(queue, 0);
            send(&mut stream, &frame(60));
            driver.serve();
            assert!(driver.broken(), "queue {queue}, {len} bytes at {at:#x}");
            // After a reset all is well.
            let features = driver.offered();
            driver.begin(features);
            driver.put(1, &[Buffer::In(&with_header(&frame(70)))]);
            driver.serve();
            assert_eq!(next(&mut stream), frame(70));
        }
    }
}

#[test]
fn buffers_that_hold_nothing_are_not_gathered_for_ever() {
    let (mut driver, mut stream) = ready();
    for index in 0..RING {
        driver.descriptor(0, index, 0x10_0000, 0, 2, 0);
        driver.offer(0, index);
    }
    send(&mut stream, &frame(60));
    driver.serve();
    assert_eq!(driver.used(0), None);
    // Transmission goes on.
    driver.put(1, &[Buffer::In(&with_header(&frame(70)))]);
    driver.serve();
    assert_eq!(next(&mut stream), frame(70));
}

#[test]
fn addresses_are_read_and_made() {
    assert_eq!("02:00:00:12:34:56".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "02:00:00:12:34:56");
    assert_eq!("aA:bB:cc:DD:ee:ff".parse(), Ok(Mac([0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF])));
    for bad in [
        "",
        "02:00:00:12:34",
        "02:00:00:12:34:56:78",
        "02-00-00-12-34-56",
        "2:0:0:12:34:56",
        "02:00:00:12:34:+6",
        "02:00:00:12:34:5g",
        "02:00:00:12:34:é",
        "01:00:00:12:34:56",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
    ] {
        assert!(bad.parse::<Mac>().unwrap_err().contains(bad), "{bad}");
    }
    let made = Mac::for_link("tap0", 0);
    assert_eq!(made, Mac::for_link("tap0", 0));
    assert_ne!(made, Mac::for_link("tap1", 0));
    assert_ne!(made, Mac::for_link("tap0", 1));
    assert_eq!(made.0[0] & 3, 2);
    assert_eq!(made.to_string().parse(), Ok(made));
}

#[test]
fn a_tap_that_cannot_be_is_refused() {
    for bad in ["", "a-name-of-sixteen", "sixteen-letters-", "a b", "a/b", "tap%d", "a:b"] {
        let Err(error) = tap::Tap::open(bad) else { panic!("{bad:?} was opened") };
        assert!(matches!(error, Error::Name { .. }), "{bad:?}: {error}");
    }
    let Err(error) = tap::Tap::open("no-such-tap") else { panic!("it was opened") };
    assert!(matches!(error, Error::NoTap { .. }), "{error}");
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(chains in hostile_chains()) {
        let told = Told::default();
        Driver::new(Net::new(told.clone(), MAC)).survives(chains);
        for frame in &told.0.lock().unwrap().frames {
            prop_assert!((HEADER + ETHERNET..=MOST).contains(&frame.len()));
        }
    }
}
