//! Introduced by stage 07: the CMOS, a PC's 128 bytes of battery-backed memory behind two ports.
//!
//! The PC AT's firmware kept its settings and the clock there. It is also how firmware learns from the machine
//! how much memory there is: the registers are the ones that Bochs and QEMU fill, too. The clock (Motorola
//! MC146818 data sheet) shows the host's time in UTC until the guest sets it. What is written lasts as long as
//! the machine.
//!
//! The clock has an alarm, and can interrupt at each second: [`ring`] (stage 08). Its periodic interrupt, of up to 8192 a
//! second, is left out: who wants that has better timers.

use std::io;
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[cfg(feature = "stage08")]
use serde::{Deserialize, Serialize, de::Error as _};
#[cfg(feature = "stage08")]
use serde_json::Value;

use crate::bus::{Device, Interrupt, Shared};
use crate::layout::{MMIO_HOLE, MMIO_HOLE_END};
use crate::run::thread_named;
#[cfg(feature = "stage08")]
use crate::snapshot::{self, Keep};

/// First port: the register's number is written here; the next one is its value.
pub const PORT: u16 = 0x70;

/// How many ports it has.
pub const PORTS: u16 = 2;

/// The clock's interrupt line.
pub const IRQ: u32 = 8;

/// The register with the century, which the PC AT added to the clock.
pub const CENTURY: u8 = 0x32;

/// The register with the drives that a BIOS is to try first, in bits 0 to 3, and then, in bits 4 to 7. Bochs and QEMU
/// have it there, too.
const BOOT: usize = 0x3D;

/// The register of our own BIOS's setting: in bit 0, whether the screen's text goes to the serial port, too.
const CONSOLE: usize = 0x50;

const MIB: u64 = 1 << 20;

/// Bit 7 of the register's number is not part of it: it masks NMIs.
const NUMBER: u8 = 0x7F;

/// The clock's registers that count, by number; what is between them is the alarm's.
const COUNTERS: [u8; 8] = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY];
/// The alarm's second, minute and hour.
const ALARM: [u8; 3] = [0x01, 0x03, 0x05];
/// An alarm's register with both of these bits set is any second, minute or hour.
const ANY: u8 = 0xC0;
const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const STATUS_C: u8 = 0x0C;
const STATUS_D: u8 = 0x0D;

/// In status A, and read-only: an update is in progress. Here it never is.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status A after reset: a crystal of 32.768 kHz.
const CRYSTAL: u8 = 0x26;
/// In status B: the counters stand, so that all of them can be set.
const SET: u8 = 1 << 7;
/// In status B: the counters are binary. Else they are in BCD.
const BINARY: u8 = 1 << 2;
/// In status B: hours go to 23. Else they go from 1 to 12, with [`PM`].
const HOURS_24: u8 = 1 << 1;
/// In the hours from 1 to 12: after noon.
const PM: u8 = 1 << 7;
/// In status B: interrupt when the alarm's time comes. In status C: it has come since status C was read.
const ALARM_INTERRUPT: u8 = 1 << 5;
/// In status B: interrupt when the counters have been updated, once a second. In status C: they were.
const UPDATE_INTERRUPT: u8 = 1 << 4;
/// In status C: the line is up.
const INTERRUPTS: u8 = 1 << 7;
/// In status D: the battery is good.
const BATTERY: u8 = 1 << 7;

/// The clock: how it differs from the host's, and how the guest wants to see it.
struct Clock {
    /// By how many seconds it is ahead of the host's.
    ahead: i64,
    /// The counters while they stand.
    held: Option<[u8; 8]>,
    status_b: u8,
    alarm: [u8; 3],
    /// When the guest last read status C, in seconds after 1970.
    seen: i64,
}

/// What the clock has to tell of the time since status C was read.
struct Events {
    /// Status C.
    flags: u8,
    /// When the line goes up, or did, in seconds after 1970; unless it isn't to.
    interrupt: Option<i64>,
}

impl Clock {
    /// The counters, `now` seconds after 1970 by the host's clock.
    fn counters(&self, now: i64) -> [u8; 8] {
        if let Some(held) = self.held {
            return held;
        }
        let time = now.saturating_add(self.ahead);
        let (days, seconds) = (time.div_euclid(86400), time.rem_euclid(86400));
        let (year, month, day) = date(days);
        let hour = seconds / 3600;
        let (hour, pm) = match self.status_b & HOURS_24 {
            0 => ((hour + 11) % 12 + 1, if hour < 12 { 0 } else { PM }),
            _ => (hour, 0),
        };
        // 1970 began on a Thursday, a week on Sunday.
        let weekday = (days + 4).rem_euclid(7) + 1;
        let (century, year) = (year.div_euclid(100), year.rem_euclid(100));
        let values = [seconds % 60, seconds / 60 % 60, hour, weekday, day, month, year, century];
        let mut counters = values.map(|value| match self.status_b & BINARY {
            0 => (value / 10 % 10 * 16 + value % 10) as u8,
            _ => value as u8,
        });
        counters[2] |= pm;
        counters
    }

    /// The time in seconds that `counters` say, unless they make no sense. The day of the week follows from the date
    /// and is not looked at.
    fn time(&self, mut counters: [u8; 8]) -> Option<i64> {
        let pm = counters[2] & PM != 0;
        if self.status_b & HOURS_24 == 0 {
            counters[2] &= !PM;
        }
        let values = counters.map(|counter| match (self.status_b & BINARY, counter) {
            (0, digits) if digits & 0xF > 9 => i64::MAX,
            (0, digits) => i64::from(digits >> 4) * 10 + i64::from(digits & 0xF),
            (_, value) => i64::from(value),
        });
        let [second, minute, hour, _, day, month, year, century] = values;
        let (first, last) = if self.status_b & HOURS_24 == 0 { (1, 12) } else { (0, 23) };
        let ranges = [(second, 0, 59), (minute, 0, 59), (hour, first, last)];
        let dates = [(day, 1, 31), (month, 1, 12), (year, 0, 99), (century, 0, 99)];
        let sense = |&(value, first, last): &(i64, i64, i64)| (first..=last).contains(&value);
        if !ranges.iter().chain(&dates).all(sense) {
            return None;
        }
        let hour = match first {
            0 => hour,
            _ => hour % 12 + if pm { 12 } else { 0 },
        };
        let days = days(century * 100 + year, month, day);
        Some(days * 86400 + hour * 3600 + minute * 60 + second)
    }

    /// Goes on from `counters`; on from where it is, if they make no sense.
    fn go_on(&mut self, counters: [u8; 8], now: i64) {
        if let Some(time) = self.time(counters) {
            self.ahead = time - now;
        }
    }

    /// Sets counter number `at` of [`COUNTERS`].
    fn set_counter(&mut self, at: usize, value: u8, now: i64) {
        let mut counters = self.counters(now);
        counters[at] = value;
        match self.held {
            Some(_) => self.held = Some(counters),
            None => self.go_on(counters, now),
        }
    }

    /// Sets status B: counters that have stood go on, as that says how they are to be read.
    fn set_status_b(&mut self, value: u8, now: i64) {
        let counters = self.counters(now);
        self.status_b = value;
        if value & SET != 0 {
            self.held = Some(counters);
        } else if let Some(held) = self.held.take() {
            self.go_on(held, now);
        }
    }
}

impl Clock {
    /// The alarm's second, minute or hour, or any.
    fn alarm_value(&self, at: usize) -> Option<i64> {
        let register = self.alarm[at];
        if register & ANY == ANY {
            return None;
        }
        // As a counter of the same kind would be read, with others that make sense.
        let mut counters = self.counters(0);
        counters[at] = register;
        let time = self.time(counters).map(|time| time.rem_euclid(86400));
        // What makes no sense never comes.
        Some(time.map_or(-1, |time| [time % 60, time / 60 % 60, time / 3600][at]))
    }

    /// When the alarm's time comes next after `after`, in seconds after 1970.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let [second, minute, hour] = [0, 1, 2].map(|at| self.alarm_value(at));
        let is = |wanted: Option<i64>, value| wanted.is_none_or(|wanted| wanted == value);
        let fits = |time: &i64| {
            let of_day = (time + self.ahead).rem_euclid(86400);
            is(second, of_day % 60) && is(minute, of_day / 60 % 60) && is(hour, of_day / 3600)
        };
        (after + 1..=after + 86400).find(fits)
    }

    /// What has happened up to `now`, and when it interrupts.
    fn events(&self, now: i64) -> Events {
        if self.held.is_some() {
            return Events { flags: 0, interrupt: None };
        }
        let times = [
            (UPDATE_INTERRUPT, Some(self.seen + 1)),
            (ALARM_INTERRUPT, self.next_alarm(self.seen)),
        ];
        let wanted = times.iter().filter(|(flag, _)| self.status_b & flag != 0);
        let interrupt = wanted.filter_map(|&(_, time)| time).min();
        let come = times.iter().filter(|(_, time)| time.is_some_and(|time| time <= now));
        let flags = come.fold(0, |flags, (flag, _)| flags | flag);
        let line = if interrupt.is_some_and(|time| time <= now) { INTERRUPTS } else { 0 };
        Events { flags: flags | line, interrupt }
    }
}

/// Years are counted from March here, so that the leap day is their last; the calendar repeats itself every 400
/// years, which have 146097 days. The first of March of the year 0 was this long before 1970.
const MARCH_0: i64 = 719_468;

/// Year, month and day, `days` after the first of January 1970.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + MARCH_0;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // five months have 153 days
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

/// The other way round. A day that the month doesn't have is one of the next month.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (153 * month + 2) / 5 + day - 1 - MARCH_0
}

/// Which drives a BIOS tries first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootFirst {
    /// Floppies, then hard disks.
    Floppies,
    /// Hard disks, then floppies.
    Disks,
}

/// The CMOS. A guest may write all of it but the clock's status registers C and D.
pub struct Cmos {
    registers: [u8; 128],
    selected: u8,
    clock: Clock,
    /// What [`ring`] waits for may have changed.
    changed: Arc<Condvar>,
}

impl Cmos {
    /// The CMOS of a machine with `memory` bytes of RAM.
    pub fn new(memory: u64) -> Self {
        let mut registers = [0; 128];
        let below_hole = memory.min(MMIO_HOLE.0);
        let above_hole = memory.saturating_sub(MMIO_HOLE.0).min(u64::MAX - MMIO_HOLE_END.0);
        let mut put =
            |at: usize, bytes: &[u8]| registers[at..at + bytes.len()].copy_from_slice(bytes);
        put(STATUS_A.into(), &[CRYSTAL]);
        put(STATUS_D.into(), &[BATTERY]);
        // Below 640 KiB, in KiB.
        let base = (memory >> 10).min(640) as u16;
        put(0x15, &base.to_le_bytes());
        // Above 1 MiB in KiB, as much as 16 bits count; twice, as on the AT.
        let extended = (below_hole.saturating_sub(MIB) >> 10).min(0xFFFF) as u16;
        put(0x17, &extended.to_le_bytes());
        put(0x30, &extended.to_le_bytes());
        // From 16 MiB to the hole, in units of 64 KiB.
        let high = (below_hole.saturating_sub(16 * MIB) >> 16) as u16;
        put(0x34, &high.to_le_bytes());
        // From 4 GiB on, in units of 64 KiB: 24 bits.
        let above = (above_hole >> 16).min(0xFF_FFFF) as u32;
        put(0x5B, &above.to_le_bytes()[..3]);
        let clock = Clock { ahead: 0, held: None, status_b: HOURS_24, alarm: [0; 3], seen: now() };
        Self { registers, selected: 0, clock, changed: Arc::default() }
    }

    /// The same with the drives that are to be tried first when it boots. Floppies, if this is not called.
    pub fn with_boot_order(mut self, first: BootFirst) -> Self {
        let (first, second) = match first {
            BootFirst::Floppies => (1, 2),
            BootFirst::Disks => (2, 1),
        };
        self.registers[BOOT] = second << 4 | first;
        self
    }

    /// The same with a setting for the BIOS in `asm/bios`: what programs print on the screen by its calls goes to
    /// the serial port, too.
    pub fn with_serial_console(mut self, on: bool) -> Self {
        self.registers[CONSOLE] = on.into();
        self
    }

    /// Register `number`, `now` seconds after 1970.
    fn get(&self, number: u8, now: i64) -> u8 {
        match counter(number) {
            Some(at) => self.clock.counters(now)[at],
            None if number == STATUS_B => self.clock.status_b,
            None if number == STATUS_C => self.clock.events(now).flags,
            None => match alarm(number) {
                Some(at) => self.clock.alarm[at],
                None => self.registers[usize::from(number)],
            },
        }
    }

    fn set(&mut self, number: u8, value: u8, now: i64) {
        match (counter(number), number) {
            (Some(at), _) => self.clock.set_counter(at, value, now),
            (_, STATUS_B) => self.clock.set_status_b(value, now),
            (_, STATUS_C | STATUS_D) => {}
            (_, STATUS_A) => self.registers[usize::from(number)] = value & !UPDATE_IN_PROGRESS,
            _ => match alarm(number) {
                Some(at) => self.clock.alarm[at] = value,
                None => self.registers[usize::from(number)] = value,
            },
        }
    }
}

/// CMOS and clock as they stand in a snapshot. The clock goes on meanwhile, as a battery's does.
#[cfg(feature = "stage08")]
#[derive(Serialize, Deserialize)]
struct Kept {
    registers: Vec<u8>,
    selected: u8,
    ahead: i64,
    held: Option<[u8; 8]>,
    status_b: u8,
    alarm: [u8; 3],
}

#[cfg(feature = "stage08")]
impl Keep for Cmos {
    fn keep(&self) -> Value {
        let Clock { ahead, held, status_b, alarm, .. } = self.clock;
        let (registers, selected) = (self.registers.to_vec(), self.selected);
        let kept = Kept { registers, selected, ahead, held, status_b, alarm };
        serde_json::to_value(kept).expect("numbers")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let Kept { registers, selected, ahead, held, status_b, alarm } = snapshot::read(state)?;
        let expected = "128 registers";
        self.registers = registers
            .try_into()
            .map_err(|other: Vec<u8>| serde_json::Error::invalid_length(other.len(), &expected))?;
        self.selected = selected % 128;
        self.clock = Clock { ahead, held, status_b, alarm, seen: now() };
        self.changed.notify_all();
        Ok(())
    }
}

/// Has the clock of `cmos` interrupt by `line`, from a thread of its own. Without this it never does, and status C is
/// there to be read.
pub fn ring(cmos: Shared<Cmos>, line: impl Interrupt + 'static) -> io::Result<()> {
    let run = move || {
        let mut cmos = cmos.lock().unwrap_or_else(PoisonError::into_inner);
        // For which reading of status C the line has been raised: it stays up until then.
        let mut raised = None;
        loop {
            let now = now();
            let wait = match cmos.clock.events(now).interrupt {
                Some(time) if raised == Some((cmos.clock.seen, time)) => MOST,
                Some(time) if time <= now => {
                    raised = Some((cmos.clock.seen, time));
                    // An eventfd takes 2^64 pulses before it fails.
                    let _ = line.trigger();
                    MOST
                }
                Some(time) => until(time).min(MOST),
                None => MOST,
            };
            let changed = Arc::clone(&cmos.changed);
            let woken = changed.wait_timeout(cmos, wait);
            cmos = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    };
    thread_named("clock").spawn(run).map(drop)
}

/// How long the clock sleeps at most: the host's clock may have been set meanwhile, or it may have slept itself.
const MOST: Duration = Duration::from_secs(60);

/// How long it is until `time`, in seconds after 1970.
fn until(time: i64) -> Duration {
    let time = UNIX_EPOCH + Duration::from_secs(time.max(0) as u64);
    time.duration_since(SystemTime::now()).unwrap_or_default()
}

/// Where register `number` stands in [`COUNTERS`], if it is one of them.
fn counter(number: u8) -> Option<usize> {
    COUNTERS.iter().position(|counter| *counter == number)
}

/// Where register `number` stands in [`ALARM`], if it is one of them.
fn alarm(number: u8) -> Option<usize> {
    ALARM.iter().position(|alarm| *alarm == number)
}

/// The host's time in seconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() as i64
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == 1 {
            let now = now();
            data[0] = self.get(self.selected, now);
            if self.selected == STATUS_C {
                self.clock.seen = now;
                self.changed.notify_all();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            0 => self.selected = data[0] & NUMBER,
            _ => {
                self.set(self.selected, data[0], now());
                self.changed.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &mut Cmos, register: u8) -> u64 {
        cmos.write(0, &[register]);
        let mut data = [0xFF];
        cmos.read(1, &mut data);
        data[0].into()
    }

    fn word(cmos: &mut Cmos, register: u8) -> u64 {
        read(cmos, register) | read(cmos, register + 1) << 8
    }

    /// The clock's registers at `now`, as they are for a person: 2024-02-29 23:59:58, a Thursday (5).
    fn told(cmos: &Cmos, now: i64) -> [u8; 8] {
        [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00, 0x06].map(|number| cmos.get(number, now))
    }

    /// Thursday, 2024-02-29 23:59:58, from `date -u -d`.
    const LEAP: i64 = 1_709_251_198;

    #[test]
    fn the_clock_knows_its_calendar() {
        // From `date -u -d @SECONDS`.
        for (time, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (1_735_603_200, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
            (-2_203_891_200, (1900, 3, 1)),
        ] {
            assert_eq!(date(time / 86400), expected);
            let (year, month, day) = expected;
            assert_eq!(days(year, month, day), time / 86400);
        }
        for day in -800_000..2_300_000 {
            let (year, month, of_month) = date(day);
            assert_eq!(days(year, month, of_month), day);
        }
        let cmos = Cmos::new(MIB);
        assert_eq!(told(&cmos, LEAP), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58, 5]);
        assert_eq!(told(&cmos, LEAP + 2), [0x20, 0x24, 0x03, 0x01, 0, 0, 0, 6]);
    }

    #[test]
    fn the_clock_counts_as_status_b_says() {
        let mut cmos = Cmos::new(MIB);
        cmos.set(STATUS_B, HOURS_24 | BINARY, LEAP);
        assert_eq!(told(&cmos, LEAP), [20, 24, 2, 29, 23, 59, 58, 5]);
        for (mode, hours) in [(0, [0x12, 0x01, 0x92, 0x91]), (BINARY, [12, 1, 0x8C, 0x8B])] {
            cmos.set(STATUS_B, mode, LEAP);
            for (hour, counter) in [0, 1, 12, 23].into_iter().zip(hours) {
                let time = 86400 * 365 + hour * 3600;
                assert_eq!(cmos.get(0x04, time), counter, "{hour} in mode {mode}");
                // And the other way round.
                cmos.set(0x04, counter, time);
                assert_eq!(cmos.clock.ahead, 0, "{hour} in mode {mode}");
            }
        }
    }

    #[test]
    fn the_clock_goes_on_from_where_it_is_set() {
        let mut cmos = Cmos::new(MIB);
        // It stands while it is set, at a date that is none in between (the 31st of February).
        cmos.set(STATUS_B, SET | HOURS_24, LEAP);
        for (number, value) in
            [(0x07, 0x31), (0x08, 0x12), (0x09, 0x99), (0x32, 0x19), (0x00, 0x59), (0x06, 0x07)]
        {
            cmos.set(number, value, LEAP + 1);
        }
        assert_eq!(told(&cmos, LEAP + 9), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 0x07]);
        cmos.set(STATUS_B, HOURS_24, LEAP + 10);
        // The last second of the century was a Friday's.
        assert_eq!(told(&cmos, LEAP + 10), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6]);
        assert_eq!(told(&cmos, LEAP + 11), [0x20, 0x00, 0x01, 0x01, 0, 0, 0, 7]);
        // One counter alone, while it goes.
        cmos.set(0x04, 0x15, LEAP + 11);
        assert_eq!(told(&cmos, LEAP + 12), [0x20, 0x00, 0x01, 0x01, 0x15, 0, 1, 7]);
    }

    #[test]
    fn a_time_that_is_none_is_not_set() {
        let mut cmos = Cmos::new(MIB);
        for (number, value) in
            [(0x00, 0x60), (0x02, 0x0A), (0x04, 0x24), (0x04, 0x81), (0x07, 0), (0x08, 0x13)]
        {
            cmos.set(number, value, LEAP);
            assert_eq!(cmos.clock.ahead, 0, "{number:#x} = {value:#x}");
        }
        cmos.set(STATUS_B, 0, LEAP);
        for hour in [0, 0x13, 0x80, 0x93] {
            cmos.set(0x04, hour, LEAP);
            assert_eq!(cmos.clock.ahead, 0, "hour {hour:#x} of 12");
        }
    }

    /// A clock at `LEAP`, in mode `status_b`, which has just been asked for its events.
    fn alarm_at(status_b: u8, alarm: [u8; 3]) -> Cmos {
        let mut cmos = Cmos::new(MIB);
        cmos.clock.seen = LEAP;
        cmos.set(STATUS_B, status_b, LEAP);
        for (number, value) in ALARM.into_iter().zip(alarm) {
            cmos.set(number, value, LEAP);
            assert_eq!(cmos.get(number, LEAP), value);
        }
        cmos
    }

    #[test]
    fn the_alarm_s_time_comes_when_its_registers_say() {
        // Two seconds before midnight.
        for (mode, alarm, after) in [
            (HOURS_24, [0x59, 0x59, 0x23], Some(1)),
            (HOURS_24, [0x58, 0x59, 0x23], Some(86400)),
            (HOURS_24, [0x00, 0x30, 0x06], Some(2 + 6 * 3600 + 30 * 60)),
            (HOURS_24 | BINARY, [0, 30, 6], Some(2 + 6 * 3600 + 30 * 60)),
            (0, [0x00, 0x00, 0x81], Some(2 + 13 * 3600)),
            (BINARY, [0, 0, 0x8C], Some(2 + 12 * 3600)),
            (HOURS_24, [0x05, 0xFF, 0xFF], Some(7)),
            (HOURS_24, [0xFF, 0xC0, 0xFF], Some(1)),
            (HOURS_24, [0x60, 0xFF, 0xFF], None),
            (HOURS_24, [0xFF, 0xFF, 0x24], None),
        ] {
            let next = alarm_at(mode, alarm).clock.next_alarm(LEAP);
            assert_eq!(next.map(|time| time - LEAP), after, "{alarm:x?} in mode {mode:#x}");
        }
        // By the time that the guest has set.
        let mut cmos = alarm_at(HOURS_24, [0x05, 0x00, 0x00]);
        cmos.clock.ahead = 2;
        assert_eq!(cmos.clock.next_alarm(LEAP), Some(LEAP + 5));
    }

    #[test]
    fn status_c_has_what_came_since_it_was_read() {
        let mut cmos = alarm_at(HOURS_24, [0x01, 0x00, 0x00]);
        let flags = |cmos: &Cmos, now| cmos.get(STATUS_C, now);
        assert_eq!(flags(&cmos, LEAP), 0);
        assert_eq!(flags(&cmos, LEAP + 1), UPDATE_INTERRUPT);
        assert_eq!(flags(&cmos, LEAP + 3), UPDATE_INTERRUPT | ALARM_INTERRUPT);
        assert_eq!(cmos.clock.events(LEAP + 3).interrupt, None, "none is wanted");
        cmos.set(STATUS_B, HOURS_24 | ALARM_INTERRUPT, LEAP);
        assert_eq!(cmos.clock.events(LEAP).interrupt, Some(LEAP + 3));
        assert_eq!(flags(&cmos, LEAP + 2), UPDATE_INTERRUPT);
        assert_eq!(flags(&cmos, LEAP + 3), INTERRUPTS | UPDATE_INTERRUPT | ALARM_INTERRUPT);
        cmos.set(STATUS_B, HOURS_24 | UPDATE_INTERRUPT, LEAP);
        assert_eq!(cmos.clock.events(LEAP).interrupt, Some(LEAP + 1));
        cmos.set(STATUS_B, SET | HOURS_24 | UPDATE_INTERRUPT, LEAP);
        assert_eq!(cmos.clock.events(LEAP + 9).interrupt, None, "it stands");
        // Reading it is what ends the interrupt.
        assert_ne!(read(&mut cmos, STATUS_C), 0xFF);
        assert!(cmos.clock.seen > LEAP);
    }

    #[test]
    fn the_line_is_raised_each_second_while_status_c_is_read() {
        let (sender, raised) = std::sync::mpsc::channel();
        struct Line(std::sync::mpsc::Sender<()>);
        impl Interrupt for Line {
            fn trigger(&self) -> io::Result<()> {
                self.0.send(()).map_err(io::Error::other)
            }
        }
        let cmos = crate::bus::shared(Cmos::new(MIB));
        ring(Arc::clone(&cmos), Line(sender)).unwrap();
        let write = |register, value| {
            let mut cmos = cmos.lock().unwrap();
            cmos.write(0, &[register]);
            cmos.write(1, &[value]);
        };
        write(STATUS_B, HOURS_24 | UPDATE_INTERRUPT);
        let patience = Duration::from_secs(60);
        for _ in 0..2 {
            raised.recv_timeout(patience).unwrap();
            assert!(raised.try_recv().is_err(), "twice without having been looked at");
            let flags = read(&mut cmos.lock().unwrap(), STATUS_C) as u8;
            assert_eq!(flags & (INTERRUPTS | UPDATE_INTERRUPT), INTERRUPTS | UPDATE_INTERRUPT);
        }
        write(STATUS_B, HOURS_24);
        while raised.recv_timeout(Duration::from_millis(1200)).is_ok() {}
        read(&mut cmos.lock().unwrap(), STATUS_C);
        assert!(raised.recv_timeout(Duration::from_millis(1200)).is_err(), "it is off");
    }

    #[test]
    fn all_but_two_registers_keep_what_is_written() {
        let mut cmos = Cmos::new(64 * MIB);
        let kept = |number: &u8| counter(*number).is_none() && !(0x0A..=0x0D).contains(number);
        for number in (0..128).filter(kept) {
            cmos.write(0, &[number]);
            cmos.write(1, &[number ^ 0xA5]);
        }
        for number in (0..128).filter(kept) {
            assert_eq!(read(&mut cmos, number), u64::from(number ^ 0xA5));
        }
        for (number, value) in [(0x0A, 0x7F), (0x0C, 0), (0x0D, 0x80)] {
            cmos.write(0, &[number]);
            cmos.write(1, &[0xFF]);
            // A second may be over meanwhile.
            let read = read(&mut cmos, number) & !u64::from(UPDATE_INTERRUPT);
            assert_eq!(read, value & !u64::from(UPDATE_INTERRUPT), "{number:#x}");
        }
    }

    #[test]
    fn memory_stands_in_its_registers() {
        let mut cmos = Cmos::new(64 * MIB);
        assert_eq!(word(&mut cmos, 0x15), 640);
        assert_eq!(word(&mut cmos, 0x30), 63 * 1024);
        assert_eq!(word(&mut cmos, 0x34), 48 * 16);
        assert_eq!(word(&mut cmos, 0x34 | 0x80), 48 * 16, "bit 7 masks NMIs");
        assert_eq!(word(&mut cmos, 0x5B), 0);

        let mut cmos = Cmos::new(8 << 30);
        assert_eq!(word(&mut cmos, 0x30), 0xFFFF);
        assert_eq!(word(&mut cmos, 0x34) << 16, MMIO_HOLE.0 - 16 * MIB);
        let above = word(&mut cmos, 0x5B) | read(&mut cmos, 0x5D) << 16;
        assert_eq!(above << 16, (8 << 30) - MMIO_HOLE.0);
        let mut cmos = Cmos::new(8 * MIB);
        assert_eq!((word(&mut cmos, 0x30), word(&mut cmos, 0x34)), (7 * 1024, 0));
    }
}
