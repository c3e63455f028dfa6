//! int 14h and int 17h: the serial port, and printers that aren't there.

use std::time::{Duration, Instant};

use super::{Call, Machine, call};

#[test]
fn int_14_sends_and_receives() {
    let port = |ax, edx| Call { edx, ..call(0x14, ax) };
    let wait = Call { edx: 50_000, ..call(0x15, 0x8600) };
    let calls = [
        port(0x00E3, 0), // 9600 8N1
        wait,            // for what is typed
        port(0x0100 | u16::from(b'A'), 0),
        port(0x0100 | u16::from(b'B'), 0),
        port(0x0200, 0),
        port(0x0300, 0),
        port(0x0200, 0),
        port(0x0200, 0), // nothing comes: a second
        port(0x0141, 1), // ports that aren't there
        port(0x0141, 4),
        port(0x7700, 0),
    ];
    let start = Instant::now();
    let done = Machine { keys: b"x\x80", ..Machine::default() }.make(b"", &calls);
    assert!(start.elapsed() > Duration::from_secs(1));
    let c = &done.calls;
    const READY: u8 = 0x60;
    assert_eq!(c[0].ah() & !1, READY);
    assert_eq!(c[0].eax & 0x30, 0x30, "DSR and CTS");
    assert_eq!((c[2].ax() & 0xFEFF, c[3].ax() & 0xFEFF), (0x6041, 0x6042));
    assert_eq!(c[4].ax(), u16::from(b'x'));
    assert_eq!(c[5].ah(), READY | 1, "another one has come");
    assert_eq!(c[6].ax(), 0x80);
    assert_eq!(c[7].ah(), 0x80, "timed out");
    assert_eq!((c[8].ax(), c[9].ax(), c[10].ax()), (0x8041, 0x0141, 0x7700));
    assert_eq!(done.printed, "AB");
}

#[test]
fn int_17_has_no_printer() {
    let printer = |ax| call(0x17, ax);
    let done = Machine::default().make(b"", &[printer(0x0041), printer(0x0100), printer(0x0200)]);
    assert!(done.calls.iter().all(|call| call.ah() == 1), "{:x?}", done.calls);
    assert_eq!(done.bytes(0x400, 8), [0xF8, 3, 0, 0, 0, 0, 0, 0], "one serial port");
    assert_eq!(done.bytes(0x408, 6), [0; 6], "and no parallel one");
}
