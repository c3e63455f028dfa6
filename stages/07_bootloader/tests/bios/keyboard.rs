//! int 09h and 16h: the keyboard, by its scan codes; and what it resets.

use common::boot_disk;
use common::bus::{Device, Shared};
use common::i8042::{self, I8042};
use common::keyboard::{Key, Stroke};

use super::*;

fn of(text: &str) -> impl Iterator<Item = Stroke> {
    text.chars().map(|typed| Stroke::of(typed).unwrap())
}

fn held(key: Key, shift: bool, ctrl: bool, alt: bool) -> Stroke {
    Stroke { key, shift, ctrl, alt }
}

/// Runs a boot sector with a serial port that nobody listens to, while `user` does something once the BIOS has
/// said its greeting.
fn run(code: &[u8], user: impl FnOnce(&Parts, &Shared<Uart>) + Send + 'static) -> (Parts, Ending) {
    let mut disk = code.to_vec();
    disk.resize(SECTOR - 2, 0);
    disk.extend(boot_disk::SIGNATURE);
    run_disk(disk, GREETING, &[], user)
}

/// The end of what the BIOS says before it boots.
const GREETING: &str = "of memory\r\n";

/// The same with a whole disk that has begun when `begun` was printed, and with `calls` in memory.
fn run_disk(
    disk: Vec<u8>,
    begun: &'static str,
    calls: &[Call],
    user: impl FnOnce(&Parts, &Shared<Uart>) + Send + 'static,
) -> (Parts, Ending) {
    let (parts, ending) = machine::run(disk, 64 << 20, run::stop(), |parts, line| {
        write_calls(&parts.ram, calls);
        let printed = Printed::default();
        let uart = shared(Uart::new(line, printed.clone()));
        let (parts, port) = (parts.clone(), Arc::clone(&uart));
        thread::spawn(move || {
            while !printed.text().contains(begun) {
                thread::sleep(Duration::from_millis(1));
            }
            user(&parts, &port);
        });
        uart
    });
    (parts, ending.unwrap())
}

/// The keys that `function` of int 16h gives when `strokes` are typed.
fn typed(function: u16, strokes: Vec<Stroke>, count: usize) -> Vec<u16> {
    let calls = vec![call(0x16, function << 8); count];
    let disk = asm::boot::SERVICES.to_vec();
    let (parts, ending) =
        run_disk(disk, GREETING, &calls, move |parts, _| i8042::type_in(&parts.i8042, strokes));
    assert_eq!(ending, Ending::Exited(0));
    read_calls(&parts.ram, count).iter().map(Call::ax).collect()
}

#[test]
fn int_16_takes_what_is_typed_on_the_keyboard() {
    let x = Stroke::of('x').unwrap();
    let f1 = Key::FUNCTION[0];
    let mut strokes: Vec<_> = of("aZ1!* \r\t\x08\x1b\x04\x1e\0").collect();
    strokes.extend([
        held(Key::TAB, true, false, false),
        held(Key::TAB, false, true, false),
        held(Key::BACKSPACE, false, true, false),
        Stroke { alt: true, ..x },
        // Alt is more than Ctrl, and that is more than Shift.
        Stroke { alt: true, shift: true, ..x },
        f1.into(),
        held(f1, true, false, false),
        held(f1, false, true, false),
        held(f1, false, false, true),
        Key::FUNCTION[10].into(),
        held(Key::FUNCTION[11], true, false, false),
        Key::UP.into(),
        held(Key::LEFT, false, true, false),
        held(Key::DELETE, false, false, true),
        Key::PAGE_DOWN.into(),
    ]);
    // As every PC has it. (Ralf Brown's Interrupt List, int 16h, table 00006.)
    let keys = [
        0x1E61, 0x2C5A, 0x0231, 0x0221, 0x092A, 0x3920, 0x1C0D, 0x0F09, 0x0E08, 0x011B, 0x2004,
        0x071E, 0x0300, 0x0F00, 0x9400, 0x0E7F, 0x2D00, 0x2D00, 0x3B00, 0x5400, 0x5E00, 0x6800,
        0x8500, 0x8800, 0x48E0, 0x73E0, 0xA300, 0x51E0,
    ];
    assert_eq!(typed(0x10, strokes.clone(), keys.len()), keys);
    // Programs of 1981 do not know of the keys above 84, and of E0.
    let old: Vec<u16> = keys
        .into_iter()
        .filter(|key| key >> 8 <= 0x84)
        .map(|key| if key & 0xFF == 0xE0 { key & 0xFF00 } else { key })
        .collect();
    assert_eq!(typed(0x00, strokes, old.len()), old);
}

/// Has the controller say that the keyboard has sent `codes` of set 1, one as soon as the last has been read.
fn sends(i8042: &Shared<I8042>, codes: &[u8]) {
    for &code in codes {
        loop {
            let mut i8042 = i8042.lock().unwrap();
            let mut status = [0];
            i8042.read(i8042::COMMAND, &mut status);
            if status[0] & 1 == 0 {
                i8042.write(i8042::COMMAND, &[0xD2]);
                i8042.write(0, &[code]);
                break;
            }
            drop(i8042);
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn int_16_tells_what_is_held_and_locked() {
    // What happens before each A; its key, Shift and locks, and which of the keys are down.
    let steps: [(&[u8], u16, u16); 14] = [
        (&[0x2A], 0x1E41, 0x0002),                               // left Shift
        (&[0xAA, 0x36], 0x1E41, 0x0001),                         // right instead
        (&[0xB6, 0x1D], 0x1E01, 0x0104),                         // left Ctrl
        (&[0xE0, 0x1D], 0x1E01, 0x0504),                         // both
        (&[0x9D], 0x1E01, 0x0404),                               // right only
        (&[0xE0, 0x9D, 0xE0, 0x38], 0x1E00, 0x0808),             // right Alt
        (&[0xE0, 0xB8, 0x38], 0x1E00, 0x0208),                   // left Alt
        (&[0xB8, 0x3A], 0x1E41, 0x4040),                         // Caps Lock
        (&[0x3A, 0x3A, 0xBA], 0x1E41, 0x0040), // held: it repeats, and is no other
        (&[0x2A], 0x1E61, 0x0042),             // and Shift
        (&[0xAA, 0x3A, 0xBA, 0x45, 0xC5], 0x1E61, 0x0020), // Num Lock instead
        (&[0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5], 0x1E61, 0x0020), // Pause is none of them
        (&[0xE0, 0x2A, 0xE0, 0x36], 0x1E61, 0x0020), // nor are the Shifts that come with other keys
        (&[0x45, 0xC5], 0x1E61, 0x0000),
    ];
    let calls: Vec<_> =
        steps.iter().flat_map(|_| [call(0x16, 0x1000), call(0x16, 0x1200)]).collect();
    let (parts, ending) =
        run_disk(asm::boot::SERVICES.to_vec(), GREETING, &calls, move |parts, _| {
            for (n, (codes, _, _)) in steps.iter().enumerate() {
                sends(&parts.i8042, codes);
                sends(&parts.i8042, &[0x1E, 0x9E]);
                // The next ones wait until this one has been asked for.
                while read_calls(&parts.ram, 2 * n + 2)[2 * n + 1].ax() == 0x1200 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
    assert_eq!(ending, Ending::Exited(0));
    let done = read_calls(&parts.ram, calls.len());
    for (step, done) in steps.iter().zip(done.chunks(2)) {
        assert_eq!((done[0].ax(), done[1].ax()), (step.1, step.2), "{step:x?}");
    }
}

#[test]
fn int_16_gives_the_keypad_by_its_lock_and_stores_what_it_is_told() {
    let store = |key| Call { ecx: key, ..call(0x16, 0x0500) };
    let mut calls: Vec<_> = (0..7).map(|_| call(0x16, 0x1000)).collect();
    // The ring has room for 15.
    calls.extend((1..=16).map(|n| store(0x1200 + n)));
    calls.extend([call(0x16, 0x0100), call(0x16, 0x0000), call(0x16, 0x0200)]);
    let (parts, ending) = run_disk(asm::boot::SERVICES.to_vec(), GREETING, &calls, |parts, _| {
        // 7 and its Home, with Num Lock and Shift; + and Enter.
        sends(&parts.i8042, &[0x47, 0xC7, 0x45, 0xC5, 0x47, 0xC7, 0x2A, 0x47, 0xC7, 0xAA]);
        sends(&parts.i8042, &[0x4E, 0xCE, 0xE0, 0x1C, 0xE0, 0x9C, 0xE0, 0x35, 0xE0, 0xB5]);
        sends(&parts.i8042, &[0x1D, 0xE0, 0x1C, 0xE0, 0x9C, 0x9D]);
    });
    assert_eq!(ending, Ending::Exited(0));
    let done = read_calls(&parts.ram, calls.len());
    let keys: Vec<_> = done[..7].iter().map(Call::ax).collect();
    assert_eq!(keys, [0x4700, 0x4737, 0x4700, 0x4E2B, 0xE00D, 0xE02F, 0xE00A]);
    let stored: Vec<_> = done[7..23].iter().map(|call| call.eax as u8).collect();
    assert_eq!(stored, [[0; 15].as_slice(), &[1]].concat());
    assert_eq!((done[23].zero(), done[23].ax(), done[24].ax()), (false, 0x1201, 0x1201));
    assert_eq!(done[25].ax() & 0x20, 0x20, "Num Lock is still on");
}

#[test]
fn a_program_may_have_scan_codes_for_itself() {
    let user = |parts: &Parts, _: &_| i8042::type_in(&parts.i8042, of("ax\r"));
    assert_eq!(run_disk(asm::boot::INTERCEPT.to_vec(), ">", &[], user).1, Ending::Exited(0));
}

#[test]
fn keys_of_keyboard_and_serial_port_come_in_one_row() {
    let calls = vec![call(0x16, 0x1000); 4];
    let (parts, ending) =
        run_disk(asm::boot::SERVICES.to_vec(), GREETING, &calls, |parts, uart| {
            let taken = |count: usize| {
                while read_calls(&parts.ram, count)[count - 1].ax() == 0x1000 {
                    thread::sleep(Duration::from_millis(1));
                }
            };
            uart::type_in(uart, b"a");
            taken(1);
            i8042::type_in(&parts.i8042, of("b"));
            taken(2);
            uart::type_in(uart, b"c");
            taken(3);
            i8042::type_in(&parts.i8042, of("d"));
        });
    assert_eq!(ending, Ending::Exited(0));
    let keys: Vec<_> = read_calls(&parts.ram, 4).iter().map(Call::ax).collect();
    assert_eq!(keys, [0x1E61, 0x3062, 0x2E63, 0x2064]);
}

#[test]
fn there_are_three_ways_to_reset() {
    // mov al, 0xFE; out 0x64, al; jmp $. And mov al, 3; out 0x92, al; jmp $.
    for code in [[0xB0, 0xFE, 0xE6, 0x64, 0xEB, 0xFE], [0xB0, 0x03, 0xE6, 0x92, 0xEB, 0xFE]] {
        assert_eq!(run(&code, |_, _| ()).1, Ending::Reset);
    }
    // sti; hlt, again and again.
    let (parts, ending) = run(&[0xFB, 0xF4, 0xEB, 0xFC], |parts, _| {
        i8042::type_in(&parts.i8042, [held(Key::DELETE, false, true, true)]);
    });
    assert_eq!(ending, Ending::Reset);
    let mut mark = [0; 2];
    parts.ram.read_slice(&mut mark, GuestAddress(0x472)).unwrap();
    assert_eq!(mark, [0x34, 0x12], "a warm start");
}
