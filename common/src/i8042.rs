//! Introduced by stage 07: the i8042, a PC's keyboard controller, and port 0x92 beside it.
//!
//! Between the keyboard and the processor stands a second, small processor with two registers: data at port
//! 0x60; at 0x64 a status when read, a command when written. It passes on what the keyboard sends, translated
//! to the scan codes of 1981 if the command byte asks for it, and raises IRQ 1. In 1984 it had two output pins
//! left, and so the keyboard controller of a PC is what opens address line 20 and what resets the processor.
//! The PS/2 put both into a register of their own, port 0x92. (IBM Personal System/2 Hardware Interface
//! Technical Reference, "Keyboard and Auxiliary Device Controller".)
//!
//! *A20.* A PC can hold that address line at 0, so that addresses wrap at 1 MiB as they did on the 8086. No
//! virtual machine does: KVM has no such gate. Both registers and the BIOS show the same bit, the one that was
//! written last, but memory above 1 MiB is reachable whatever it says.
//!
//! There is no mouse, and no second wire for one. After power-on the controller stands as firmware leaves it, with
//! translation and interrupts on, so a kernel that is entered without a firmware finds a keyboard, too.

use std::sync::{Arc, Condvar, PoisonError};
use std::thread;
use std::time::Duration;

#[cfg(feature = "stage08")]
use serde::{Deserialize, Serialize};
#[cfg(feature = "stage08")]
use serde_json::Value;

use crate::bus::{Device, Interrupt, Shared};
use crate::keyboard::{Keyboard, Stroke, Translation};
use crate::run::{Ending, Stop};
#[cfg(feature = "stage08")]
use crate::snapshot::{self, Keep};

/// First port: data at 0x60; status and command at 0x64.
pub const PORT: u16 = 0x60;

/// How many ports the device spans. The three in between are not its own, and the PIT has one of them.
pub const PORTS: u16 = 5;

/// The command register's offset.
pub const COMMAND: u64 = 4;

/// The data register's.
const DATA: u64 = 0;

/// The keyboard's interrupt line.
pub const IRQ: u32 = 1;

/// The command that resets the processor: a pulse on bit 0 of the output port.
pub const RESET: u8 = 0xFE;

/// The port of [`SystemControl`].
pub const SYSTEM_CONTROL_PORT: u16 = 0x92;

// Status.
/// There is something to read.
const STATUS_FULL: u8 = 1 << 0;
/// The self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// The last byte was written to the command port.
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard is not locked with the key at the machine's front.
const STATUS_UNLOCKED: u8 = 1 << 4;
/// Nobody answered at the other end of the wire.
const STATUS_TIMEOUT: u8 = 1 << 6;

// The command byte.
/// IRQ 1 when there is something to read.
const INTERRUPTS: u8 = 1 << 0;
const SYSTEM: u8 = 1 << 2;
/// The keyboard's clock line is held low: it cannot send.
const KEYBOARD_OFF: u8 = 1 << 4;
/// The same for the mouse.
const MOUSE_OFF: u8 = 1 << 5;
/// From scan code set 2 to set 1.
const TRANSLATE: u8 = 1 << 6;

// Commands.
const READ_COMMAND_BYTE: u8 = 0x20;
const WRITE_COMMAND_BYTE: u8 = 0x60;
const DISABLE_MOUSE: u8 = 0xA7;
const ENABLE_MOUSE: u8 = 0xA8;
const TEST_MOUSE_WIRE: u8 = 0xA9;
const SELF_TEST: u8 = 0xAA;
const TEST_KEYBOARD_WIRE: u8 = 0xAB;
const DISABLE_KEYBOARD: u8 = 0xAD;
const ENABLE_KEYBOARD: u8 = 0xAE;
const READ_INPUT_PORT: u8 = 0xC0;
const READ_OUTPUT_PORT: u8 = 0xD0;
const WRITE_OUTPUT_PORT: u8 = 0xD1;
const WRITE_KEYBOARD_OUTPUT: u8 = 0xD2;
const WRITE_MOUSE_OUTPUT: u8 = 0xD3;
const WRITE_MOUSE: u8 = 0xD4;
const DISABLE_A20: u8 = 0xDD;
const ENABLE_A20: u8 = 0xDF;
const PULSE: u8 = 0xF0;

// Answers.
const SELF_TEST_PASSED: u8 = 0x55;
const WIRE_GOOD: u8 = 0x00;
const CLOCK_STUCK_LOW: u8 = 0x01;
const NO_ANSWER: u8 = 0xFE;
/// The input port: the keyboard is not locked.
const NOT_LOCKED: u8 = 1 << 7;

// The output port.
/// The processor runs; at 0 it is reset.
const RUNNING: u8 = 1 << 0;
const A20: u8 = 1 << 1;
/// The pin that IRQ 1 is.
const FULL: u8 = 1 << 4;
/// The wires to the keyboard, which idle high.
const IDLE: u8 = 0b11 << 6;

/// How long a byte from the keyboard takes, about: 11 bits at 10 to 17 kHz. There are programs that read the data
/// port twice, once for themselves and once in the BIOS's handler that they call next.
const BYTE: Duration = Duration::from_millis(1);

/// How long the guest may leave a byte unread before its interrupt is raised again: one that sets up its interrupt
/// controllers meanwhile forgets that there was an edge.
const UNREAD: Duration = Duration::from_millis(100);

/// The controller with its keyboard. Keys are pressed by [`type_in`].
pub struct I8042 {
    keyboard: Keyboard,
    translation: Translation,
    command_byte: u8,
    /// The command whose parameter comes next at the data port.
    unfinished: Option<u8>,
    /// What the guest reads next: the controller's own answer, and behind it a byte from the keyboard.
    answer: Option<u8>,
    scanned: Option<u8>,
    /// What it read last, which it reads again when there is nothing new.
    last: u8,
    status: u8,
    a20: bool,
    /// The line of IRQ 1 is high.
    interrupting: bool,
    line: Box<dyn Interrupt>,
    stop: Stop,
    changed: Arc<Condvar>,
}

impl I8042 {
    /// A controller whose interrupt goes to `line`, which is IRQ 1, and whose reset line ends the machine through
    /// `stop`.
    pub fn new(line: impl Interrupt + 'static, stop: Stop) -> Self {
        Self {
            keyboard: Keyboard::new(),
            translation: Translation::default(),
            command_byte: INTERRUPTS | TRANSLATE | MOUSE_OFF,
            unfinished: None,
            answer: None,
            scanned: None,
            last: 0,
            status: STATUS_UNLOCKED,
            a20: true,
            interrupting: false,
            line: Box::new(line),
            stop,
            changed: Arc::default(),
        }
    }

    fn is_full(&self) -> bool {
        self.answer.is_some() || self.scanned.is_some()
    }

    fn reset_processor(&self) {
        self.stop.now(Ending::Reset);
    }

    fn command(&mut self, command: u8) {
        self.status |= STATUS_COMMAND;
        self.unfinished = None;
        match command {
            READ_COMMAND_BYTE => self.answer = Some(self.command_byte),
            DISABLE_MOUSE => self.command_byte |= MOUSE_OFF,
            ENABLE_MOUSE => self.command_byte &= !MOUSE_OFF,
            TEST_MOUSE_WIRE => self.answer = Some(CLOCK_STUCK_LOW),
            SELF_TEST => {
                self.command_byte |= SYSTEM;
                self.status |= STATUS_SYSTEM;
                self.answer = Some(SELF_TEST_PASSED);
            }
            TEST_KEYBOARD_WIRE => self.answer = Some(WIRE_GOOD),
            DISABLE_KEYBOARD => self.command_byte |= KEYBOARD_OFF,
            ENABLE_KEYBOARD => self.command_byte &= !KEYBOARD_OFF,
            READ_INPUT_PORT => self.answer = Some(NOT_LOCKED),
            READ_OUTPUT_PORT => {
                let a20 = if self.a20 { A20 } else { 0 };
                let full = if self.is_full() { FULL } else { 0 };
                self.answer = Some(IDLE | RUNNING | a20 | full);
            }
            WRITE_COMMAND_BYTE
            | WRITE_OUTPUT_PORT
            | WRITE_KEYBOARD_OUTPUT
            | WRITE_MOUSE_OUTPUT
            | WRITE_MOUSE => self.unfinished = Some(command),
            DISABLE_A20 => self.a20 = false,
            ENABLE_A20 => self.a20 = true,
            // Those of bits 0 to 3 that are 0 go low for a moment, and bit 0 is the processor's reset line.
            PULSE.. if command & RUNNING == 0 => self.reset_processor(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.status &= !STATUS_COMMAND;
        match self.unfinished.take() {
            Some(WRITE_COMMAND_BYTE) => {
                self.command_byte = byte;
                let system = if byte & SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
                self.status = self.status & !STATUS_SYSTEM | system;
            }
            Some(WRITE_OUTPUT_PORT) => {
                self.a20 = byte & A20 != 0;
                if byte & RUNNING == 0 {
                    self.reset_processor();
                }
            }
            Some(WRITE_KEYBOARD_OUTPUT) => self.scanned = Some(byte),
            // Both are for a mouse.
            Some(_) => {
                self.status |= STATUS_TIMEOUT;
                self.answer = Some(NO_ANSWER);
            }
            None => {
                self.command_byte &= !KEYBOARD_OFF;
                self.keyboard.command(byte);
            }
        }
    }

    /// What the keyboard has to say goes over the wire as soon as there is room, and the interrupt line follows.
    fn settle(&mut self) {
        while !self.is_full() && self.command_byte & KEYBOARD_OFF == 0 {
            let Some(byte) = self.keyboard.answer() else { break };
            self.receive(byte);
        }
        let high = self.is_full() && self.command_byte & (INTERRUPTS | KEYBOARD_OFF) == INTERRUPTS;
        if high && !self.interrupting {
            // A line that cannot take an edge has one on it already.
            let _ = self.line.trigger();
        }
        self.interrupting = high;
        if !self.is_full() {
            self.changed.notify_all();
        }
    }

    /// A byte has come over the wire.
    fn receive(&mut self, byte: u8) {
        self.scanned = match self.command_byte & TRANSLATE {
            0 => Some(byte),
            _ => self.translation.next(byte),
        };
    }

    /// Whether a key's code can be sent.
    fn has_room(&self) -> bool {
        !self.is_full() && self.command_byte & KEYBOARD_OFF == 0 && self.keyboard.scans()
    }

    /// Sends one byte of a key's codes: [`I8042::has_room`] for it. Whether the guest has something to read now.
    fn scan(&mut self, byte: u8) -> bool {
        if let Some(byte) = self.keyboard.scan(byte) {
            self.receive(byte);
            self.settle();
        }
        self.is_full()
    }
}

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            DATA => {
                if let Some(byte) = self.answer.take().or_else(|| self.scanned.take()) {
                    self.last = byte;
                    self.interrupting = false;
                    self.status &= !STATUS_TIMEOUT;
                }
                data[0] = self.last;
                self.settle();
            }
            // Bit 1 is 0: what is written is taken at once.
            COMMAND => {
                data[0] = self.status | if self.is_full() { STATUS_FULL } else { 0 };
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            DATA => self.data(data[0]),
            COMMAND => self.command(data[0]),
            _ => return,
        }
        self.settle();
    }
}

/// The controller as it stands in a snapshot. The keyboard in it is one that has just been plugged in.
#[cfg(feature = "stage08")]
#[derive(Serialize, Deserialize)]
struct Kept {
    command_byte: u8,
    status: u8,
    unfinished: Option<u8>,
    answer: Option<u8>,
    scanned: Option<u8>,
    last: u8,
    a20: bool,
}

#[cfg(feature = "stage08")]
impl Keep for I8042 {
    fn keep(&self) -> Value {
        let &Self { command_byte, status, unfinished, answer, scanned, last, a20, .. } = self;
        let kept = Kept { command_byte, status, unfinished, answer, scanned, last, a20 };
        serde_json::to_value(kept).expect("numbers")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let Kept { command_byte, status, unfinished, answer, scanned, last, a20 } =
            snapshot::read(state)?;
        self.command_byte = command_byte;
        self.status = status;
        self.unfinished = unfinished;
        (self.answer, self.scanned, self.last) = (answer, scanned, last);
        self.a20 = a20;
        self.settle();
        Ok(())
    }
}

/// Types on the keyboard, as fast as the guest reads it and no faster than a keyboard sends. Blocks meanwhile, also
/// while the guest has the keyboard switched off.
pub fn type_in(i8042: &Shared<I8042>, strokes: impl IntoIterator<Item = Stroke>) {
    for stroke in strokes {
        let lock = || i8042.lock().unwrap_or_else(PoisonError::into_inner);
        let resets = lock().keyboard.resets();
        for byte in stroke.codes() {
            let mut controller = lock();
            let changed = Arc::clone(&controller.changed);
            while !controller.has_room() {
                let waited = changed.wait_timeout(controller, UNREAD);
                let timeout;
                (controller, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                if timeout.timed_out() && controller.interrupting {
                    let _ = controller.line.trigger();
                }
            }
            // A keyboard that has been reset knows of no key that was down.
            if controller.keyboard.resets() != resets {
                break;
            }
            let sent = controller.scan(byte);
            drop(controller);
            if sent {
                thread::sleep(BYTE);
            }
        }
    }
}

/// Port 0x92, "system control port A" of the PS/2: the quick way to the controller's two other pins.
///
/// Bit 0 resets the processor when it becomes 1; bit 1 is A20's.
pub struct SystemControl(pub Shared<I8042>);

/// In [`SystemControl`]: reset.
const FAST_RESET: u8 = 1 << 0;
/// In [`SystemControl`]: A20.
const FAST_A20: u8 = 1 << 1;

impl Device for SystemControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let i8042 = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        data[0] = if i8042.a20 { FAST_A20 } else { 0 };
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut i8042 = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        i8042.a20 = data[0] & FAST_A20 != 0;
        if data[0] & FAST_RESET != 0 {
            i8042.reset_processor();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::{CountedLine, shared};
    use crate::keyboard::Key;
    use crate::run::{self, Stopped};

    struct Machine {
        i8042: Shared<I8042>,
        control: SystemControl,
        line: CountedLine,
        stopped: Stopped,
    }

    fn machine() -> Machine {
        let (stop, stopped) = run::stop();
        let line = CountedLine::default();
        let i8042 = shared(I8042::new(line.clone(), stop));
        Machine { control: SystemControl(i8042.clone()), i8042, line, stopped }
    }

    impl Machine {
        fn read(&self, offset: u64) -> u8 {
            let mut byte = [0xA5];
            self.i8042.lock().unwrap().read(offset, &mut byte);
            byte[0]
        }

        fn full(&self) -> bool {
            self.read(COMMAND) & STATUS_FULL != 0
        }

        fn data(&self, byte: u8) {
            self.i8042.lock().unwrap().write(DATA, &[byte]);
        }

        fn command(&self, byte: u8) {
            self.i8042.lock().unwrap().write(COMMAND, &[byte]);
        }

        /// A command's answer.
        fn ask(&self, command: u8) -> u8 {
            self.command(command);
            assert!(self.full(), "{command:#x}");
            self.read(DATA)
        }

        /// All that there is to read.
        fn drain(&self) -> Vec<u8> {
            std::iter::from_fn(|| self.full().then(|| self.read(DATA))).collect()
        }

        fn fast(&mut self) -> u8 {
            let mut byte = [0xFF];
            self.control.read(0, &mut byte);
            byte[0]
        }

        /// Types `strokes` while reading up to `count` bytes.
        fn typed(&self, strokes: Vec<Stroke>, count: usize) -> Vec<u8> {
            let i8042 = self.i8042.clone();
            let typist = thread::spawn(move || type_in(&i8042, strokes));
            let mut codes = vec![];
            while codes.len() < count {
                codes.extend(self.drain());
                assert!(codes.len() == count || !typist.is_finished() || self.full());
            }
            typist.join().unwrap();
            codes
        }
    }

    #[test]
    fn it_is_ready_and_has_nothing_to_say_at_first() {
        let machine = machine();
        assert_eq!(machine.read(COMMAND), STATUS_UNLOCKED);
        assert_eq!(machine.read(1), 0xA5, "the ports in between are not its own");
        assert_eq!(machine.ask(SELF_TEST), 0x55);
        assert_eq!(machine.read(COMMAND), STATUS_UNLOCKED | STATUS_SYSTEM | STATUS_COMMAND);
        assert_eq!(machine.ask(TEST_KEYBOARD_WIRE), 0);
        assert_eq!(machine.ask(READ_COMMAND_BYTE), 0x65);
        assert_eq!(machine.ask(READ_INPUT_PORT), 0x80);
        assert_eq!(machine.read(DATA), 0x80, "the last byte, again");
        machine.command(WRITE_COMMAND_BYTE);
        machine.data(0x21);
        assert_eq!(machine.read(COMMAND), STATUS_UNLOCKED);
        assert_eq!(machine.ask(READ_COMMAND_BYTE), 0x21);
    }

    #[test]
    fn keys_arrive_translated_and_interrupt_byte_by_byte() {
        let machine = machine();
        let strokes = vec![Stroke::of('A').unwrap(), Key::UP.into()];
        let codes = machine.typed(strokes, 8);
        assert_eq!(codes, [0x2A, 0x1E, 0x9E, 0xAA, 0xE0, 0x48, 0xE0, 0xC8]);
        assert_eq!(machine.line.count(), 8);
        // Without translation, and without interrupts.
        machine.command(WRITE_COMMAND_BYTE);
        machine.data(0);
        assert_eq!(machine.typed(vec![Key::UP.into()], 5), [0xE0, 0x75, 0xE0, 0xF0, 0x75]);
        assert_eq!(machine.line.count(), 8);
    }

    #[test]
    fn the_keyboard_answers_through_the_same_translation() {
        let machine = machine();
        let tell = |byte| {
            machine.data(byte);
            machine.drain()
        };
        assert_eq!(tell(0xFF), [0xFA, 0xAA]);
        assert_eq!(machine.line.count(), 2);
        assert_eq!(tell(0xF2), [0xFA, 0xAB, 0x41]);
        machine.command(WRITE_COMMAND_BYTE);
        machine.data(0);
        assert_eq!(tell(0xF2), [0xFA, 0xAB, 0x83]);
    }

    #[test]
    fn a_keyboard_that_is_off_keeps_silent() {
        let machine = machine();
        machine.command(DISABLE_KEYBOARD);
        let i8042 = machine.i8042.clone();
        let typist = thread::spawn(move || type_in(&i8042, Stroke::of('a')));
        thread::sleep(Duration::from_millis(20));
        assert!(!machine.full());
        // Answers of the controller itself come, without an interrupt.
        assert_eq!(machine.ask(READ_COMMAND_BYTE), 0x71);
        assert_eq!(machine.line.count(), 0);
        machine.command(ENABLE_KEYBOARD);
        let mut codes = vec![];
        while codes.len() < 2 {
            codes.extend(machine.drain());
        }
        typist.join().unwrap();
        assert_eq!(codes, [0x1E, 0x9E]);
        // What is written to the keyboard switches it on.
        machine.command(DISABLE_KEYBOARD);
        machine.data(0xEE);
        assert_eq!(machine.drain(), [0xEE]);
        assert_eq!(machine.ask(READ_COMMAND_BYTE), 0x61);
    }

    #[test]
    fn an_answer_does_not_cost_a_key() {
        let machine = machine();
        let i8042 = machine.i8042.clone();
        let typist = thread::spawn(move || type_in(&i8042, Stroke::of('a')));
        while !machine.full() {
            thread::yield_now();
        }
        assert_eq!(machine.ask(SELF_TEST), 0x55);
        let mut codes = vec![];
        while codes.len() < 2 {
            codes.extend(machine.drain());
        }
        typist.join().unwrap();
        assert_eq!(codes, [0x1E, 0x9E]);
    }

    #[test]
    fn a_byte_that_stays_unread_interrupts_again() {
        let machine = machine();
        let i8042 = machine.i8042.clone();
        let typist = thread::spawn(move || type_in(&i8042, Stroke::of('a')));
        while machine.line.count() < 3 {
            thread::yield_now();
        }
        assert_eq!(machine.read(DATA), 0x1E);
        while !typist.is_finished() {
            machine.drain();
        }
    }

    #[test]
    fn a_reset_of_the_keyboard_forgets_the_key_that_was_down() {
        let machine = machine();
        let i8042 = machine.i8042.clone();
        let typist = thread::spawn(move || type_in(&i8042, Stroke::of('A')));
        while !machine.full() {
            thread::yield_now();
        }
        machine.data(0xFF);
        assert_eq!(machine.drain(), [0x2A, 0xFA, 0xAA]);
        typist.join().unwrap();
        assert!(machine.drain().is_empty());
    }

    #[test]
    fn there_is_no_mouse() {
        let machine = machine();
        assert_eq!(machine.ask(TEST_MOUSE_WIRE), CLOCK_STUCK_LOW);
        for command in [WRITE_MOUSE, WRITE_MOUSE_OUTPUT] {
            machine.command(command);
            machine.data(0xF2);
            assert_eq!(machine.read(COMMAND) & (STATUS_TIMEOUT | STATUS_FULL), 0x41);
            assert_eq!(machine.drain(), [NO_ANSWER]);
            assert_eq!(machine.read(COMMAND) & STATUS_TIMEOUT, 0);
        }
        machine.command(ENABLE_MOUSE);
        assert_eq!(machine.ask(READ_COMMAND_BYTE) & MOUSE_OFF, 0);
        machine.command(DISABLE_MOUSE);
        assert_eq!(machine.ask(READ_COMMAND_BYTE) & MOUSE_OFF, MOUSE_OFF);
        machine.command(WRITE_KEYBOARD_OUTPUT);
        machine.data(0x42);
        assert_eq!(machine.drain(), [0x42]);
    }

    #[test]
    fn both_ways_show_the_same_a20() {
        let mut machine = machine();
        let a20 = |machine: &mut Machine| {
            let bit = machine.ask(READ_OUTPUT_PORT) & A20 != 0;
            assert_eq!(machine.fast(), if bit { 2 } else { 0 });
            bit
        };
        assert!(a20(&mut machine));
        machine.command(WRITE_OUTPUT_PORT);
        machine.data(0xDD);
        assert!(!a20(&mut machine));
        // What xv6's boot block writes.
        machine.command(WRITE_OUTPUT_PORT);
        machine.data(0xDF);
        assert!(a20(&mut machine));
        machine.command(DISABLE_A20);
        assert!(!a20(&mut machine));
        machine.command(ENABLE_A20);
        assert!(a20(&mut machine));
        machine.control.write(0, &[0]);
        assert!(!a20(&mut machine));
        machine.control.write(0, &[2]);
        assert!(a20(&mut machine));
        assert_eq!(machine.stopped.ending(), None);
    }

    #[test]
    fn four_ways_reset_and_others_do_not() {
        let quiet = machine();
        quiet.data(RESET);
        for command in [0xAA, 0xFF, 0xF1, 0x00] {
            quiet.command(command);
        }
        assert_eq!(quiet.stopped.ending(), None);
        let ways: [fn(&mut Machine); 4] = [
            |machine| machine.command(RESET),
            |machine| machine.command(0xF0),
            |machine| {
                machine.command(WRITE_OUTPUT_PORT);
                machine.data(0x02);
            },
            |machine| machine.control.write(0, &[3]),
        ];
        for way in ways {
            let mut machine = machine();
            way(&mut machine);
            assert_eq!(machine.stopped.ending(), Some(Ending::Reset));
        }
    }

    proptest! {
        /// Whatever a guest writes, reading brings it back to where nothing is left to read.
        #[test]
        fn any_writes_leave_it_readable(writes: Vec<(bool, u8)>) {
            let machine = machine();
            for (command, byte) in writes {
                if command { machine.command(byte) } else { machine.data(byte) }
                prop_assert_eq!(machine.read(COMMAND) & 0b1010_0010, 0);
            }
            prop_assert!(machine.drain().len() <= 5);
        }
    }
}
