//! int 15h, what is neither memory nor time: what kind of machine this is, and how to turn it off.

use super::{Call, DATA, DATA_SEGMENT, Machine, call};

#[test]
fn int_15_says_what_machine_this_is() {
    let calls = [
        call(0x15, 0xC000),
        call(0x15, 0xC100),
        call(0x15, 0x4F1E),
        call(0x15, 0x9000),
        call(0x15, 0x9100),
        call(0x15, 0xC200),
    ];
    let done = Machine::default().make(b"", &calls);
    let c = &done.calls;
    assert!(!c[0].carry() && c[0].ah() == 0 && c[0].es == 0xF000, "{:x?}", c[0]);
    let table = done.bytes(0xF_0000 + u64::from(c[0].ebx), 10);
    assert_eq!((table[..2].to_vec(), table[2]), (vec![8, 0], 0xFC), "8 bytes, a PC AT");
    assert_eq!(table[2], done.bytes(0xF_FFFE, 1)[0], "as at the ROM's end");
    assert!(!c[1].carry() && c[1].es == 0x9FC0);
    assert!(c[2].carry() && c[2].ax() == 0x4F1E, "the scan code is not swallowed");
    assert!(c[3..5].iter().all(|call| !call.carry() && call.ah() == 0));
    assert!(c[5].carry() && c[5].ah() == 0x86, "no pointing device");
    // 60h to 66h are for programs to find.
    assert_eq!(done.bytes(0x60 * 4, 7 * 4), [0; 28]);
}

#[test]
fn power_management_turns_the_machine_off() {
    let apm = |function: u16, ebx, ecx| Call { ebx, ecx, ..call(0x15, 0x5300 | function) };
    let calls = [
        apm(0x07, 1, 3), // before anybody has connected
        apm(0x00, 0, 0),
        apm(0x00, 7, 0),
        apm(0x01, 0, 0),
        apm(0x01, 0, 0),
        apm(0x0E, 0, 0x0101),
        apm(0x0E, 0, 0x0102),
        apm(0x08, 1, 1),
        apm(0x0A, 1, 0),
        apm(0x0B, 0, 0),
        apm(0x05, 0, 0),
        apm(0x07, 5, 3), // only all devices together
        apm(0x07, 1, 2), // there is no sleep
        apm(0x07, 1, 9),
        apm(0x03, 0, 0), // nor a 32-bit interface
        apm(0x04, 0, 0),
        apm(0x07, 1, 3),
        apm(0x01, 0, 0),
        apm(0x07, 1, 3),
        call(0x12, 0xDEAD), // never
    ];
    let done = Machine::default().make(b"", &calls);
    let c = &done.calls;
    for (n, why) in [(0, 3), (2, 9), (4, 2), (9, 0x80), (11, 9), (12, 0x60), (13, 0x0A), (16, 3)] {
        assert!(c[n].carry() && c[n].ah() == why, "{n}: {:x?}", c[n]);
    }
    assert!(c[14].carry() && c[14].ah() == 0x86, "{:x?}", c[14]);
    for n in [1, 3, 5, 6, 7, 8, 10, 15, 17] {
        assert!(!c[n].carry(), "{n}: {:x?}", c[n]);
    }
    assert_eq!((c[1].ax(), c[1].ebx, c[1].ecx), (0x0102, 0x504D, 0), "1.2, \"PM\"");
    assert_eq!((c[5].ax(), c[6].ax()), (0x0101, 0x0102));
    assert_eq!((c[8].ebx, c[8].ecx, c[8].edx), (0x01FF, 0x80FF, 0xFFFF));
    assert_eq!(c[19].ax(), 0xDEAD, "it went on after it was turned off");
}

#[test]
fn int_10_says_what_it_cannot() {
    let calls = [
        Call { ebp: 0x1234, es: 0x1234, ..call(0x10, 0x1130) },
        Call { ebx: 0x10, ..call(0x10, 0x1200) },
        call(0x10, 0x1A00),
        Call { edi: 0, es: DATA_SEGMENT, ..call(0x10, 0x4F00) },
        Call { ebx: 0x0101, ..call(0x10, 0x1001) },
    ];
    let done = Machine::default().make(b"VBE2", &calls);
    let c = &done.calls;
    assert_eq!((c[0].ecx, c[0].edx & 0xFF, c[0].es, c[0].ebp), (16, 24, 0, 0));
    assert_eq!((c[1].ebx, c[1].ecx), (3, 9));
    assert_eq!((c[2].ax(), c[2].ebx), (0x1A1A, 8));
    assert!(c[3].eax & 0xFF != 0x4F, "no VESA BIOS: {:x?}", c[3]);
    assert_eq!(done.bytes(DATA, 4), b"VBE2");
    assert_eq!((c[4].ax(), c[4].ebx), (0x1001, 0x0101));
    assert!(done.printed.is_empty(), "{:?}", done.printed);
}
