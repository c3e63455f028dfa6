//! Events as lines of text.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::Write;
use std::time::Duration;

use super::{Access, Event, Filter, Sink, Space, What};
use crate::disasm::Instruction;
use crate::regs::{Change, Mode, Registers};

/// How many elements of a string instruction are shown.
const ELEMENTS: usize = 8;

/// How many lines a loop may have so that it is seen to be one: what a disk's sector takes, and more.
const LOOP: usize = 16;

/// What stands before and after the parts of a line, for somebody whose terminal has colours.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// Around time, vCPU and mode.
    pub when: [String; 2],
    /// Around the instruction.
    pub instruction: [String; 2],
    /// Around what happened.
    pub what: [String; 2],
}

/// Writes a line for each event: time in seconds, vCPU, mode and width of its code, CS:IP and the linear address,
/// the instruction, and what came of it.
///
/// A guest that waits for a device asks it again and again. When a vCPU has gone through the same few exits
/// twice, more of the same are counted and not shown.
///
/// What is more than the rate in one second is counted, too.
///
/// Most lines have room on a terminal of 80 columns.
#[derive(Debug)]
pub struct Lines<W> {
    out: W,
    marks: Marks,
    every: bool,
    /// How many lines a second there may be.
    rate: Option<u32>,
    /// The second that it is.
    second: u64,
    /// How many lines it has had.
    lines: u32,
    /// How many more there would have been.
    more: u64,
    loops: BTreeMap<u8, Loop>,
    /// Nobody takes what is written.
    closed: bool,
}

impl<W: Write> Lines<W> {
    /// Writes to `out`: at most [`Filter::rate`] lines a second, and what repeats itself only for [`Filter::every`].
    pub fn new(out: W, marks: Marks, filter: &Filter) -> Self {
        Self {
            out,
            marks,
            every: filter.every(),
            rate: filter.rate(),
            second: 0,
            lines: 0,
            more: 0,
            loops: BTreeMap::new(),
            closed: false,
        }
    }

    /// Says what the last second had no room for.
    fn tell_more(&mut self) {
        let more = std::mem::take(&mut self.more);
        if more > 0 {
            let (end, s) = (self.second + 1, if more == 1 { "" } else { "s" });
            self.write(format_args!(
                "{end:2}.000000 - ... {more} more event{s} in the last second"
            ));
        }
    }

    fn write(&mut self, line: fmt::Arguments<'_>) {
        // Whole lines: the guest's own output may go to the same terminal.
        let line = format!("{line}\n");
        self.closed |= self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush()).is_err();
    }

    fn tell_loop(&mut self, vcpu: u8, again: Option<Again>) {
        if let Some(Again { period, count, last }) = again {
            let lines = if period == 1 { "line" } else { &format!("{period} lines") };
            let (last, s) = (Seconds(last), if count == 1 { "" } else { "s" });
            self.write(format_args!(
                "{last} {vcpu} ... {count} more event{s} like the last {lines} of vCPU {vcpu}"
            ));
        }
    }
}

impl<W: Write + Send> Sink for Lines<W> {
    fn has_room(&mut self, at: Duration) -> bool {
        let Some(rate) = self.rate else { return !self.closed };
        // Two vCPUs' events may come the wrong way round.
        if at.as_secs() > self.second {
            self.tell_more();
            (self.second, self.lines) = (at.as_secs(), 0);
        }
        if self.lines < rate {
            return !self.closed;
        }
        self.more += 1;
        // What repeats itself is known by what came before, and this isn't looked at.
        let loops = std::mem::take(&mut self.loops);
        self.more += loops.values().filter_map(|turns| Some(turns.again?.count)).sum::<u64>();
        false
    }

    fn raised(&mut self, at: Duration, gsi: u32) {
        if self.has_room(at) {
            self.lines += 1;
            let [when, what] = [&self.marks.when, &self.marks.what];
            let line = format!(
                "{}{} -{} {}interrupt line {gsi} is raised{}",
                when[0],
                Seconds(at),
                when[1],
                what[0],
                what[1]
            );
            self.write(format_args!("{line}"));
        }
    }

    fn take(&mut self, event: &Event) {
        if self.closed {
            return;
        }
        if !self.every {
            let turns = self.loops.entry(event.vcpu).or_default();
            let (show, again) = turns.next(Site::of(event), event.at);
            self.tell_loop(event.vcpu, again);
            if !show {
                return;
            }
        }
        let Event { at, vcpu, registers, instruction, what } = event;
        let [when, instruction_marks, what_marks] =
            [&self.marks.when, &self.marks.instruction, &self.marks.what];
        let text = match (instruction, what) {
            (Some(Instruction { text, .. }), _) => text,
            (None, What::Start { runs: false }) => "",
            (None, _) => "?",
        };
        let told = Told { vcpu: *vcpu, what, registers }.to_string();
        // Nothing that cannot be seen stands at a line's end.
        let width = if told.is_empty() { 0 } else { 13 };
        let mut line = format!(
            "{}{} {vcpu} {:<6}{} {:<18} {}{text:<width$}{}",
            when[0],
            Seconds(*at),
            mode(registers),
            when[1],
            place(registers),
            instruction_marks[0],
            instruction_marks[1],
        );
        if !told.is_empty() {
            line += &format!(" {}{told}{}", what_marks[0], what_marks[1]);
        }
        self.lines += 1;
        self.write(format_args!("{line}"));
    }

    fn finish(&mut self) {
        self.tell_more();
        let loops = std::mem::take(&mut self.loops);
        for (vcpu, Loop { again, .. }) in loops {
            self.tell_loop(vcpu, again);
        }
    }
}

/// A time as seconds and microseconds.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:2}.{:06}", self.0.as_secs(), self.0.subsec_micros())
    }
}

/// Mode and width of the code: `real16`, `prot32`, `long64`.
fn mode(registers: &Registers) -> String {
    let mode = match registers.mode() {
        Mode::Real => "real",
        Mode::Protected => "prot",
        Mode::Compatibility => "comp",
        Mode::Long => "long",
    };
    format!("{mode}{}", registers.code_bits())
}

/// CS:IP and the linear address that they make; in 64-bit code, where the two are one, that.
fn place(registers: &Registers) -> String {
    match registers.mode() {
        Mode::Long => registers.address(),
        _ => format!("{} {:08X}", registers.address(), registers.linear_rip()),
    }
}

/// What happened, in words.
struct Told<'a> {
    vcpu: u8,
    what: &'a What,
    registers: &'a Registers,
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Start { runs: true } => {
                write!(f, "vCPU {} starts, CS base {:08X}", self.vcpu, self.registers.sregs.cs.base)
            }
            What::Start { runs: false } => {
                write!(f, "vCPU {} waits to be started (INIT, SIPI)", self.vcpu)
            }
            What::Step(changes) => {
                let changes: Vec<_> = changes.iter().map(Change::to_string).collect();
                f.write_str(&changes.join(", "))
            }
            What::Access(access) => write!(f, "{access}"),
            What::End("hlt") => f.write_str("halts, and nothing can wake it"),
            What::End(name) => write!(f, "the guest cannot go on: {name}"),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.device.unwrap_or("nobody"))?;
        match self.space {
            Space::Port => write!(f, ": {:02X}", self.addr)?,
            Space::Memory => write!(f, ": {:08X}", self.addr)?,
        }
        f.write_str(if self.write { " <-" } else { " ->" })?;
        let elements = self.data.chunks(self.size.max(1));
        let count = elements.len();
        if count > 1 {
            write!(f, " {count} x")?;
        }
        for element in elements.take(ELEMENTS) {
            f.write_str(" ")?;
            // Numbers are little-endian on this machine.
            element.iter().rev().try_for_each(|byte| write!(f, "{byte:02X}"))?;
        }
        if count > ELEMENTS {
            f.write_str(" ...")?;
        }
        let micros = self.took.as_nanos() as f64 / 1000.0;
        let decimals = if micros < 10.0 { 1 } else { 0 };
        write!(f, ", {micros:.decimals$} us")
    }
}

/// What makes two events alike: the same instruction wants the same thing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Site {
    Access {
        rip: u64,
        space: Space,
        addr: u64,
        write: bool,
        len: usize,
    },
    Step {
        rip: u64,
    },
    /// Not like any other.
    Once,
}

impl Site {
    fn of(event: &Event) -> Self {
        let rip = event.registers.linear_rip();
        match &event.what {
            What::Access(Access { space, addr, write, data, .. }) => {
                Self::Access { rip, space: *space, addr: *addr, write: *write, len: data.len() }
            }
            What::Step(_) => Self::Step { rip },
            What::Start { .. } | What::End(_) => Self::Once,
        }
    }
}

/// One vCPU's last events.
#[derive(Debug, Default)]
struct Loop {
    sites: VecDeque<Site>,
    again: Option<Again>,
}

/// Events that were not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Again {
    /// How many events the loop has.
    period: usize,
    count: u64,
    /// When the last one was.
    last: Duration,
}

impl Loop {
    /// Whether the event is to be shown, and what was left out before it.
    fn next(&mut self, site: Site, at: Duration) -> (bool, Option<Again>) {
        let like =
            |sites: &VecDeque<Site>, period| sites.iter().rev().nth(period - 1) == Some(&site);
        let mut left_out = None;
        if let Some(again) = &mut self.again {
            if like(&self.sites, again.period) {
                (again.count, again.last) = (again.count + 1, at);
                self.push(site);
                return (false, None);
            }
            left_out = self.again.take();
            self.sites.clear();
        }
        // Twice the same, and now it begins for the third time.
        let period = (1..=LOOP).find(|&period| {
            let back = || self.sites.iter().rev();
            like(&self.sites, period)
                && site != Site::Once
                && self.sites.len() >= 2 * period
                && back().zip(back().skip(period)).take(period).all(|(one, other)| one == other)
        });
        self.again = period.map(|period| Again { period, count: 1, last: at });
        self.push(site);
        (period.is_none(), left_out)
    }

    fn push(&mut self, site: Site) {
        if self.sites.len() == 2 * LOOP {
            self.sites.pop_front();
        }
        self.sites.push_back(site);
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;
    use crate::disasm;

    /// An event of a vCPU at F000:`rip`, which writes `value` to port 0x80.
    fn event(vcpu: u8, micros: u64, rip: u64, value: u8) -> Event {
        let mut sregs = kvm_sregs::default();
        (sregs.cs.selector, sregs.cs.base) = (0xF000, 0xF_0000);
        let registers = Registers { regs: kvm_regs { rip, ..Default::default() }, sregs };
        let (at, took) = (Duration::from_micros(micros), Duration::from_nanos(1250));
        let what = What::Access(Access {
            space: Space::Port,
            addr: 0x80,
            size: 1,
            write: true,
            data: vec![value],
            device: Some("POST code"),
            took,
        });
        let instruction = Some(disasm::decode(&[0xE6, 0x80], 16, rip));
        Event { at, vcpu, registers, instruction, what }
    }

    fn printed(words: &str, events: impl IntoIterator<Item = Event>) -> Vec<String> {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, Marks::default(), &words.parse().unwrap());
        for event in events {
            if lines.has_room(event.at) {
                lines.take(&event);
            }
        }
        lines.finish();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_tells_when_where_and_what() {
        let mut long = event(3, 12_000_007, 0xFFFF_8000_0000_1234, 0);
        long.registers.sregs.cr0 = 1;
        long.registers.sregs.efer = 1 << 10;
        long.registers.sregs.cs.l = 1;
        long.instruction = None;
        long.what = What::Access(Access {
            space: Space::Memory,
            addr: 0xFEB0_0050,
            size: 4,
            write: false,
            data: vec![0x78, 0x56, 0x34, 0x12],
            device: None,
            took: Duration::from_micros(20),
        });
        let mut start = event(0, 0, 0xFFF0, 0);
        start.registers.sregs.cs.base = 0xFFFF_0000;
        start.what = What::Start { runs: true };
        assert_eq!(
            printed("all", [start, event(0, 412, 0x1E, 1), long]),
            [
                " 0.000000 0 real16 F000:FFF0 FFFFFFF0 out 0x80,al   \
                 vCPU 0 starts, CS base FFFF0000",
                " 0.000412 0 real16 F000:001E 000F001E out 0x80,al   \
                 POST code: 80 <- 01, 1.2 us",
                "12.000007 3 long64 FFFF800000001234   ?             \
                 nobody: FEB00050 -> 12345678, 20 us",
            ]
        );
    }

    #[test]
    fn the_elements_of_a_string_are_counted_and_the_first_ones_shown() {
        let mut access = Access {
            space: Space::Port,
            addr: 0x1F0,
            size: 2,
            write: false,
            data: (0..20).collect(),
            device: Some("disk"),
            took: Duration::ZERO,
        };
        let text = "disk: 1F0 -> 10 x 0100 0302 0504 0706 0908 0B0A 0D0C 0F0E ..., 0.0 us";
        assert_eq!(access.to_string(), text);
        access.data.truncate(6);
        assert_eq!(access.to_string(), "disk: 1F0 -> 3 x 0100 0302 0504, 0.0 us");
    }

    #[test]
    fn a_loop_is_shown_twice_and_counted() {
        // Once, then 5 rounds of 3 with other values each, one more step of the sixth, and then something else.
        let round = |n: u64| (0..3).map(move |at| event(0, n * 10 + at, at, n as u8));
        let events = || {
            let rounds = (1..6).flat_map(round);
            let cut = round(6).take(1);
            [event(0, 1, 99, 0)].into_iter().chain(rounds).chain(cut).chain([event(0, 70, 98, 7)])
        };
        let lines = printed("all", events());
        assert_eq!(lines.len(), 1 + 2 * 3 + 1 + 1, "{lines:#?}");
        assert_eq!(lines[7], " 0.000060 0 ... 10 more events like the last 3 lines of vCPU 0");
        assert!(lines[8].contains("000F0062"), "{lines:#?}");
        assert_eq!(printed("every", events()).len(), 1 + 5 * 3 + 1 + 1);
    }

    #[test]
    fn each_vcpu_has_its_own_loop_and_the_end_tells_what_is_left() {
        let events = (0..10).map(|n| event((n % 2) as u8, n, n % 2, 0));
        let lines = printed("all", events);
        assert_eq!(lines.len(), 6, "{lines:#?}");
        assert_eq!(lines[4], " 0.000008 0 ... 3 more events like the last line of vCPU 0");
        assert_eq!(lines[5], " 0.000009 1 ... 3 more events like the last line of vCPU 1");
    }

    #[test]
    fn another_access_at_the_same_instruction_is_no_repetition() {
        let mut events: Vec<_> = (0..6).map(|n| event(0, n, 5, 0)).collect();
        for (port, event) in (0x80..).zip(&mut events) {
            let What::Access(access) = &mut event.what else { unreachable!() };
            access.addr = port;
        }
        assert_eq!(printed("all", events).len(), 6);
    }

    #[test]
    fn marks_stand_around_the_parts() {
        let around = |mark: &str| [format!("<{mark}>"), format!("</{mark}>")];
        let marks = Marks { when: around("w"), instruction: around("i"), what: around("x") };
        let mut out = Vec::new();
        Lines::new(&mut out, marks, &"all".parse().unwrap()).take(&event(0, 0, 0, 0));
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("<w> 0.000000 0 real16</w> F000:0000"), "{text}");
        assert!(text.contains(" <i>out 0x80,al") && text.ends_with(", 1.2 us</x>\n"), "{text}");
    }

    #[test]
    fn nothing_more_is_written_where_nobody_reads() {
        struct Full(u32);
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                self.0 += 1;
                Err(std::io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut lines = Lines::new(Full(0), Marks::default(), &"every".parse().unwrap());
        (0..9).for_each(|n| lines.take(&event(0, n, n, 0)));
        assert_eq!(lines.out.0, 1);
    }

    #[test]
    fn a_flood_is_counted_and_not_shown() {
        // 1000 events a second for two and a half seconds, no two alike.
        let flood = || (0..2500).map(|at| event(0, 1000 * at, 3 * at, 0));
        let lines = printed("rate:10", flood());
        assert_eq!(lines.len(), 3 * 10 + 3, "{lines:#?}");
        assert_eq!(lines[10], " 1.000000 - ... 990 more events in the last second");
        assert_eq!(lines[21], " 2.000000 - ... 990 more events in the last second");
        assert_eq!(lines[32], " 3.000000 - ... 490 more events in the last second");
        assert_eq!(printed("every", flood()).len(), 2500);
        // And one that runs in a loop, which has a line of its own until there is no room for it.
        let turn = |at: u64| event(0, 1000 * at, at % 2, 0);
        let jump = |at: u64| event(0, 1000 * at, 3 * at, 0);
        let events = (0..8).map(turn).chain((8..30).map(jump));
        let lines = printed("rate:6", events);
        assert_eq!(
            lines[4],
            " 0.000007 0 ... 4 more events like the last 2 lines of vCPU 0"
                .replace("0.000007", "0.007000")
        );
        assert_eq!(lines[7], " 1.000000 - ... 20 more events in the last second");
        assert_eq!(lines.len(), 8, "{lines:#?}");
    }

    #[test]
    fn a_raised_line_is_told() {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, Marks::default(), &"irq,rate:1".parse().unwrap());
        lines.raised(Duration::from_micros(1_000_003), 14);
        lines.raised(Duration::from_micros(1_000_004), 14);
        lines.finish();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            " 1.000003 - interrupt line 14 is raised\n \
             2.000000 - ... 1 more event in the last second\n"
        );
    }
}
