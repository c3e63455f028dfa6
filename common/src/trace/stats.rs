//! Exits counted: for what they were, and how long the monitor took for each.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
};

use crate::last_exits::{self, Request, Space};

/// How many addresses are counted apart; a guest can touch as many as there are. The others of a device are one row.
const ADDRESSES: usize = 512;

/// How many addresses of one device the table shows, and of one that has more only those with this share of all exits.
const SHOWN: usize = 8;
const SHARE: f64 = 0.01;

/// What an exit was, for its name in a table or in a trace.
pub(super) fn name(reason: u32) -> &'static str {
    match reason {
        KVM_EXIT_INTR => "signal",
        KVM_EXIT_SHUTDOWN => "shutdown",
        KVM_EXIT_HLT => "hlt",
        KVM_EXIT_FAIL_ENTRY => "failed entry",
        KVM_EXIT_INTERNAL_ERROR => "internal error",
        KVM_EXIT_SYSTEM_EVENT => "system event",
        reason => last_exits::name(reason),
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Request { request: Request, device: Option<&'static str> },
    Step,
    Other(u32),
}

/// Where an exit is counted: for what, whose, and at which address.
type Key = (&'static str, Option<&'static str>, Option<Place>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Address { space: Space, addr: u64, write: bool },
    Others,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Address { space: Space::Port, addr, write } => {
                write!(f, "{} {addr:X}", if write { "out" } else { "in" })
            }
            Self::Address { space: Space::Memory, addr, write } => {
                write!(f, "{} {addr:08X}", if write { "write" } else { "read" })
            }
            Self::Others => f.write_str("other addresses"),
        }
    }
}

/// How often, and how long.
#[derive(Clone, Debug)]
struct Times {
    count: u64,
    sum: Duration,
    /// In nanoseconds, each to two significant digits: within 1 %.
    histogram: Histogram<u32>,
}

impl Default for Times {
    fn default() -> Self {
        let histogram = Histogram::new(2).expect("between 0 and 5 digits");
        Self { count: 0, sum: Duration::ZERO, histogram }
    }
}

impl Times {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.sum += took;
        // It resizes itself, so that nothing is out of its range.
        let _ = self.histogram.record(took.as_nanos().try_into().unwrap_or(u64::MAX));
    }

    fn add_all(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        // It resizes itself, so that nothing is out of its range.
        let _ = self.histogram.add(&other.histogram);
    }

    fn quantile(&self, part: f64) -> Duration {
        Duration::from_nanos(self.histogram.value_at_quantile(part))
    }
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// 0 for a reason, 1 for a device, 2 for an address.
    pub level: u8,
    /// What the exits were for.
    pub what: String,
    /// How many there were.
    pub count: u64,
    /// Of all exits, 0 to 1.
    pub share: f64,
    /// How long the monitor took for one: the median, within 1 %.
    pub median: Duration,
    /// And the 99th percentile.
    pub late: Duration,
    /// And for all of them.
    pub sum: Duration,
}

/// What a machine exited for.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    rows: BTreeMap<Key, Times>,
    addresses: usize,
}

impl Stats {
    pub(super) fn count(&mut self, kind: Kind, took: Duration) {
        let mut key = match kind {
            Kind::Step => ("single step", None, None),
            Kind::Other(reason) => (name(reason), None, None),
            Kind::Request { request: Request { space, addr, write, .. }, device } => {
                let (reason, nobody) = match space {
                    Space::Port => ("port I/O", "port without a device"),
                    Space::Memory => ("memory-mapped I/O", "address without a device"),
                };
                let place = Place::Address { space, addr, write };
                (reason, Some(device.unwrap_or(nobody)), Some(place))
            }
        };
        if key.2.is_some() && !self.rows.contains_key(&key) {
            if self.addresses == ADDRESSES {
                key.2 = Some(Place::Others);
            } else {
                self.addresses += 1;
            }
        }
        self.rows.entry(key).or_default().add(took);
    }

    /// The sum of all exits.
    pub fn all(&self) -> Row {
        let mut all = Times::default();
        self.rows.values().for_each(|times| all.add_all(times));
        row(0, "all".to_owned(), &all, all.count)
    }

    /// A row for each reason, below it one for each device and below that one for the addresses with most exits: the
    /// most frequent first.
    pub fn table(&self) -> Vec<Row> {
        let all = self.rows.values().map(|times| times.count).sum();
        let mut rows = Vec::new();
        for (reason, times) in by(self.rows.iter().map(|((reason, ..), times)| (*reason, times))) {
            rows.push(row(0, reason.to_owned(), &times, all));
            let devices = self.rows.iter().filter(|((other, ..), _)| *other == reason);
            let devices = devices.map(|((_, device, place), times)| (*device, *place, times));
            let named = devices.clone().filter_map(|(device, _, times)| Some((device?, times)));
            for (device, times) in by(named) {
                rows.push(row(1, device.to_owned(), &times, all));
                let places = devices.clone().filter(|(other, ..)| *other == Some(device));
                let mut places = by(places.filter_map(|(_, place, times)| Some((place?, times))));
                let rare = |(_, times): &(_, Times)| (times.count as f64) < SHARE * all as f64;
                let shown = match places.len() > SHOWN {
                    true => places.iter().position(rare).unwrap_or(SHOWN).min(SHOWN),
                    false => places.len(),
                };
                let hidden = places.split_off(shown);
                for (place, times) in places {
                    rows.push(row(2, place.to_string(), &times, all));
                }
                if !hidden.is_empty() {
                    let mut rest = Times::default();
                    hidden.iter().for_each(|(_, times)| rest.add_all(times));
                    let more = if shown == 0 { "" } else { "more " };
                    rows.push(row(2, format!("{} {more}addresses", hidden.len()), &rest, all));
                }
            }
        }
        rows
    }
}

/// The times of each key together, the most frequent first.
fn by<'a, K: Ord + Copy>(rows: impl Iterator<Item = (K, &'a Times)>) -> Vec<(K, Times)> {
    let mut sums = BTreeMap::<K, Times>::new();
    rows.for_each(|(key, times)| sums.entry(key).or_default().add_all(times));
    let mut sums: Vec<_> = sums.into_iter().collect();
    // What is as frequent stays in the order of the keys.
    sums.sort_by_key(|(_, times)| Reverse(times.count));
    sums
}

fn row(level: u8, what: String, times: &Times, all: u64) -> Row {
    Row {
        level,
        what,
        count: times.count,
        share: times.count as f64 / all.max(1) as f64,
        median: times.quantile(0.5),
        late: times.quantile(0.99),
        sum: times.sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(port: u64) -> Kind {
        let request = Request { space: Space::Port, addr: port, size: 1, write: true, len: 1 };
        Kind::Request { request, device: (port < 0x1000).then_some("serial port") }
    }

    fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn exits_are_counted_by_reason_device_and_address() {
        let mut stats = Stats::default();
        (1..=100).for_each(|took| stats.count(out(0x3F8), micros(took)));
        (0..50).for_each(|_| stats.count(out(0x3F9), micros(7)));
        (0..30).for_each(|_| stats.count(out(0x2000), micros(1)));
        (0..20).for_each(|_| stats.count(Kind::Other(KVM_EXIT_HLT), micros(1)));
        let table = stats.table();
        let counts: Vec<_> =
            table.iter().map(|row| (row.level, row.what.as_str(), row.count)).collect();
        let expected = [
            (0, "port I/O", 180),
            (1, "serial port", 150),
            (2, "out 3F8", 100),
            (2, "out 3F9", 50),
            (1, "port without a device", 30),
            (2, "out 2000", 30),
            (0, "hlt", 20),
        ];
        assert_eq!(counts, expected);
        assert_eq!(stats.all().count, 200);
        assert_eq!(table[0].share, 0.9);
        // 1 to 100 us, each once.
        let near = |found: Duration, expected: u64| {
            let error = found.as_secs_f64() / micros(expected).as_secs_f64() - 1.0;
            assert!(error.abs() <= 0.01, "{found:?}, expected {expected} us");
        };
        near(table[2].median, 50);
        near(table[2].late, 99);
        near(table[3].late, 7);
        assert_eq!(table[2].sum, micros(5050));
    }

    #[test]
    fn a_guest_that_touches_every_port_fills_no_memory() {
        let mut stats = Stats::default();
        (0..=0xFFFF).for_each(|port| stats.count(out(port), micros(1)));
        assert!(stats.rows.len() <= ADDRESSES + 2);
        let table = stats.table();
        assert_eq!(table[0].count, 0x1_0000);
        assert!(table.len() <= 1 + 2 * (2 + SHOWN), "{table:?}");
        let sum: u64 = table.iter().filter(|row| row.level == 2).map(|row| row.count).sum();
        assert_eq!(sum, 0x1_0000);
    }

    #[test]
    fn an_endless_exit_is_counted_too() {
        let mut stats = Stats::default();
        stats.count(Kind::Step, Duration::MAX / 4);
        assert_eq!(stats.table()[0].count, 1);
    }
}
