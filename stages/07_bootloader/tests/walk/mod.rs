//! The stage's README walks from the reset vector to the kernel: `--trace` shows the same walk, address by address.

use common::layout::ROM;
use testkit::Ran;

use crate::program;

const README: &str = include_str!("../../README.md");

/// The command whose output the README has; what follows are the program's arguments.
const COMMAND: &str = "$ cargo run --bin 07_bootloader -- --trace=step:2,POST ";

/// A line of a trace, without what differs from run to run: when it was, and how long it took.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    mode: String,
    linear: u64,
    /// The whole of it, from the vCPU's number on.
    text: String,
    /// The POST code that it writes, if it does.
    code: Option<u8>,
}

/// The lines of traces in `text`.
fn lines(text: &str) -> Vec<Line> {
    let line = |line: &str| {
        let (time, text) = line.trim_start().split_once(' ')?;
        time.parse::<f64>().ok()?;
        let text = text.rsplit_once(", ").filter(|(_, took)| took.ends_with(" us"));
        let text = text.map_or(line.trim_start().split_once(' ')?.1, |(text, _)| text).trim_end();
        let mut words = text.split_whitespace().skip(1);
        let mode = words.next()?.to_owned();
        // In 64-bit code there is one address, else it is the second.
        let place = if mode == "long64" { words.next()? } else { words.nth(1)? };
        let linear = u64::from_str_radix(place, 16).ok()?;
        let code = text.split_once("POST code: 80 <- ");
        let code = code.and_then(|(_, code)| u8::from_str_radix(code, 16).ok());
        Some(Line { mode, linear, text: text.to_owned(), code })
    };
    text.lines().filter_map(line).collect()
}

/// Runs the README's command.
fn walk() -> Ran {
    let (_, rest) = README.split_once(COMMAND).expect("the command is in the README");
    let args = rest.lines().next().unwrap().trim_end_matches(" >/dev/null");
    let ran = program().args(["--trace=step:2,POST"]).args(args.split(' ')).run();
    ran.ended(0);
    ran
}

#[test]
fn the_readme_shows_the_trace_of_the_walk() {
    let ran = walk();
    let (_, pasted) = README.split_once(COMMAND).unwrap();
    let (pasted, _) = pasted.split_once("```").unwrap();
    let text = |lines: Vec<Line>| lines.into_iter().map(|line| line.text).collect::<Vec<_>>();
    let (told, pasted) = (text(lines(&ran.err())), text(lines(pasted)));
    assert_eq!(told, pasted, "the walk has changed; this is to be pasted:\n{}", ran.err());
}

/// The rows of the README's tables which end in POST codes: the address where such a part begins, and its codes.
/// A row without an address goes on where the one before it began.
fn rows() -> Vec<(u64, Vec<u8>)> {
    let mut begins = 0;
    let mut rows = Vec::new();
    for row in README.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        if let Some(address) = cells[0].strip_prefix("0x").and_then(hex) {
            begins = address;
        }
        let codes = cells.last().unwrap().split(", ");
        let codes: Option<Vec<_>> =
            codes.map(|code| if code.len() == 2 { hex(code) } else { None }).collect();
        if let Some(codes) = codes {
            rows.push((begins, codes.into_iter().map(|code| code as u8).collect()));
        }
    }
    rows
}

#[test]
fn the_readmes_tables_name_each_post_code_where_the_trace_shows_it() {
    let ran = walk();
    let traced = lines(&ran.err());
    // The first instruction of all, and the one that it leads to.
    assert_eq!(traced[0].linear, 0xFFFF_FFF0, "{ran}");
    let (_, second) = (&traced[1], &traced[2]);
    assert!(README.contains(&format!("| 0x{:X} |", second.linear)), "{second:?}");

    let shown: Vec<_> = traced.iter().filter_map(|line| Some((line.code?, line.linear))).collect();
    let mut told = shown.iter();
    for (begins, codes) in rows() {
        for expected in codes {
            let Some(&(code, linear)) = told.next() else { panic!("no {expected:02X}: {ran}") };
            assert_eq!(code, expected, "{ran}");
            let part = begins..begins + 0x1_0000;
            assert!(part.contains(&linear), "{code:02X} at {linear:#x}, not in {part:#x?}");
        }
    }
    assert_eq!(told.next(), None, "the README does not have it");
    assert!(shown.len() > 10, "{shown:x?}");
}

#[test]
fn each_post_code_is_written_by_the_instruction_that_the_trace_names() {
    let ran = walk();
    let disk = crate::built_in_disk();
    for line in lines(&ran.err()) {
        let Some(code) = line.code else { continue };
        // mov al, code; out 0x80, al
        let instructions = [0xB0, code, 0xE6, 0x80];
        if let Some(offset) = line.linear.checked_sub(ROM.0) {
            // It stands behind the first of the two.
            let at = offset as usize - 2;
            assert_eq!(asm::bios::BIOS[at..at + 4], instructions, "{line:?}");
        } else {
            let found = disk.windows(4).any(|bytes| bytes == instructions);
            assert!(found, "{line:?} is not on the disk");
        }
        assert!(line.text.contains(" out 0x80,al "), "{line:?}");
    }
}

#[test]
fn the_walk_ends_with_the_kernels_first_line() {
    let line = "mini-kvm kernel";
    let ran = program().args(["--trace=serial,every", "--exit-when", line]).run();
    ran.ended(0);
    // All before was 16-bit code, of the BIOS.
    let lines = lines(&ran.err());
    let kernel: Vec<_> = lines.iter().skip_while(|line| line.mode != "long64").collect();
    let sent: Vec<u8> = kernel
        .iter()
        .filter_map(|line| line.text.split_once(" rep outsb "))
        .filter_map(|(_, sent)| sent.split_once(": 3F8 <- "))
        .map(|(_, byte)| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    assert!(sent.starts_with(line.as_bytes()), "{ran}");
    for line in kernel {
        let place = guests::boot::KERNEL_START..guests::boot::KERNEL_LIMIT;
        assert!(line.mode == "long64" && place.contains(&line.linear), "{line:?}");
    }
}
