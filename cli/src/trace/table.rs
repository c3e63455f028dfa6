//! What `--stats` prints.

use std::fmt::Write;
use std::time::Duration;

use common::trace::{Row, Stats};

/// Reasons, devices and addresses, each with the most frequent first, then all together.
pub fn table(stats: &Stats, ran: Duration) -> String {
    let all = stats.all();
    let rate = (all.count as f64 / ran.as_secs_f64().max(0.001)).round();
    let mut text = format!(
        "{:35}{:>9} {:>7} {:>8} {:>8} {:>8}\n",
        "exits", "count", "share", "median", "99 %", "total"
    );
    for row in stats.table() {
        line(&mut text, &row);
    }
    let what = format!("all, in {}: {rate} a second", time_of(ran));
    line(&mut text, &Row { what, ..all });
    text
}

fn line(text: &mut String, row: &Row) {
    let Row { level, what, count, share, median, late, sum } = row;
    let what = format!("{:1$}{what}", "", 2 * usize::from(*level));
    let [median, late, sum] = [median, late, sum].map(|time| time_of(*time));
    let _ = writeln!(
        text,
        "{what:35}{count:>9} {:>6.1}% {median:>8} {late:>8} {sum:>8}",
        100.0 * share
    );
}

/// A time with three digits: `1.23 us`.
pub fn time_of(time: Duration) -> String {
    let nanos = time.as_nanos() as f64;
    let units = [("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)];
    let (unit, factor) =
        units.into_iter().find(|(_, factor)| nanos < 999.5 * factor).unwrap_or(("s", 1e9));
    let value = nanos / factor;
    let decimals = match value {
        _ if unit == "ns" => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        let text = |nanos| time_of(Duration::from_nanos(nanos));
        let times = [0, 999, 1000, 9_994, 9_996, 99_940, 123_456, 999_600, 12_345_678];
        assert_eq!(
            times.map(text),
            [
                "0 ns", "999 ns", "1.00 us", "9.99 us", "10.0 us", "99.9 us", "123 us", "1.00 ms",
                "12.3 ms"
            ]
        );
        assert_eq!(text(61_000_000_000), "61.0 s");
        assert_eq!(text(7_200_000_000_000), "7200 s");
    }

    #[test]
    fn nothing_is_a_table_too() {
        assert_eq!(
            table(&Stats::default(), Duration::ZERO),
            "exits                                  count   share   median     99 %    total\n\
             all, in 0 ns: 0 a second                   0    0.0%     0 ns     0 ns     0 ns\n"
        );
    }
}
