//! What the shell runs.

use core::arch::asm;

use kernel_abi::boot::E820_RAM;
use kernel_abi::syscall::{Syscall, TICKS_PER_SECOND};
use user::arithmetic::{factorial, fibonacci, gcd, is_prime, number};
use user::calculator::evaluate;
use user::line::Line;

use crate::{Arguments, Program, Refused, crash, sys};

type Result<'a> = core::result::Result<(), Refused<'a>>;

/// All programs, in the order in which `help` lists them.
pub const ALL: &[Program] = &[
    Program { name: "about", arguments: "", help: "what this is", main: about },
    Program {
        name: "calc",
        arguments: "[EXPRESSION]",
        help: "whole numbers with + - * / % ^ ( ); without one, asks",
        main: calc,
    },
    Program { name: "counter", arguments: "[N]", help: "counts to N by the timer", main: counter },
    Program {
        name: "crash",
        arguments: "[HOW]",
        help: "misbehaves; alone, lists how",
        main: crash,
    },
    Program {
        name: "echo",
        arguments: "[TEXT]",
        help: "prints TEXT; without it, each line until Ctrl-D",
        main: echo,
    },
    Program { name: "fact", arguments: "[N]", help: "N factorial, up to 128 bits", main: fact },
    Program { name: "fib", arguments: "[N]", help: "the first N Fibonacci numbers", main: fib },
    Program { name: "gcd", arguments: "A B ...", help: "greatest common divisor", main: divisor },
    Program { name: "mem", arguments: "", help: "the memory map and what is free", main: mem },
    Program { name: "primes", arguments: "[MAX]", help: "the primes up to MAX", main: primes },
    Program { name: "ring", arguments: "", help: "proves that this is ring 3", main: ring },
    Program { name: "spin", arguments: "", help: "loops forever: Ctrl-C stops it", main: spin },
    Program { name: "table", arguments: "[N]", help: "multiplication table up to N", main: table },
    Program { name: "uptime", arguments: "", help: "how long the kernel has run", main: uptime },
];

fn about<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    nothing(arguments)?;
    println!("mini-kvm's own kernel: Rust without its standard library, 64-bit long mode.");
    println!("The shell and all programs run in ring 3, each in an address space of its own.");
    println!("This one calls the kernel by the syscall instruction; see `ring` for int 0x80.");
    Ok(())
}

fn calc<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    if !arguments.text.is_empty() {
        return calculate(arguments.text, 0);
    }
    println!("One expression a line; Ctrl-D ends.");
    let mut line = Line::new();
    while let Some(text) = sys::read_line(&mut line, "calc> ") {
        if !text.trim().is_empty() {
            // An error has been shown, and the next line may be better.
            let _ = calculate(text, "calc> ".len());
        }
    }
    Ok(())
}

/// Prints the value of an expression or, below it, where it is wrong.
fn calculate(text: &str, indent: usize) -> Result<'_> {
    match evaluate(text) {
        Ok(value) => println!("{value}"),
        Err(error) => {
            if indent == 0 {
                println!("{text}");
            }
            println!("{:>width$} {}", "^", error.kind, width = indent + error.position + 1);
            return Err(Refused::Said);
        }
    }
    Ok(())
}

fn counter<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let limit = arguments.number(5, 1, 1_000_000)?;
    for count in 1..=limit {
        sys::sleep(TICKS_PER_SECOND / 10);
        println!("{count}");
    }
    Ok(())
}

fn crash<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let how = arguments.only()?;
    let Some(way) = how.and_then(|how| crash::WAYS.iter().find(|way| way.name == how)) else {
        for way in crash::WAYS {
            println!("  crash {:<8} {}", way.name, way.help);
        }
        return if how.is_some() { Err(Refused::Usage) } else { Ok(()) };
    };
    (way.act)();
    println!("crash {}: nothing happened; the kernel should have stopped this", way.name);
    Err(Refused::Said)
}

fn echo<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    if !arguments.text.is_empty() {
        println!("{}", arguments.text);
        return Ok(());
    }
    let mut line = Line::new();
    while let Some(text) = sys::read_line(&mut line, "") {
        println!("{text}");
    }
    Ok(())
}

fn fact<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let n = arguments.number(20, 0, u64::MAX)?;
    match factorial(n) {
        Some(value) => println!("{n}! = {value}"),
        None => {
            println!("{n}! does not fit in 128 bits; the largest that does is 34!");
            return Err(Refused::Said);
        }
    }
    Ok(())
}

fn fib<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let count = arguments.number(10, 1, 187)?;
    for (index, value) in (0..count).zip(fibonacci()) {
        println!("{index:>3} {value}");
    }
    Ok(())
}

fn divisor<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let mut result = None;
    let mut count = 0;
    for word in arguments.words() {
        let value = number(word, 0, u64::MAX)?;
        result = Some(result.map_or(value, |so_far| gcd(so_far, value)));
        count += 1;
    }
    match result {
        Some(result) if count >= 2 => println!("{result}"),
        _ => return Err(Refused::Usage),
    }
    Ok(())
}

fn mem<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    nothing(arguments)?;
    for entry in sys::memory_map() {
        let kind = if entry.kind == E820_RAM { "RAM" } else { "reserved" };
        let end = entry.base.saturating_add(entry.length);
        println!("{:#012x} to {end:#012x} {:>9} KiB {kind}", entry.base, entry.length / 1024);
    }
    let (free, total) = sys::frames();
    println!("{} of {} KiB free, in frames of 4 KiB", free * 4, total * 4);
    Ok(())
}

fn primes<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let max = arguments.number(100, 2, 1_000_000)?;
    let mut count = 0;
    for prime in (2..=max).filter(|&n| is_prime(n)) {
        let end = if count % 10 == 9 { "\n" } else { "" };
        print!("{prime:>7}{end}");
        count += 1;
    }
    let end = if count % 10 == 0 { "" } else { "\n" };
    println!("{end}{count} primes up to {max}");
    Ok(())
}

fn ring<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    nothing(arguments)?;
    let selector: u16;
    // SAFETY: any ring may read CS.
    unsafe { asm!("mov {:x}, cs", out(reg) selector, options(nomem, nostack)) }
    println!("CS is {selector:#x}: its low two bits say ring {}", selector & 3);
    let (by_syscall, by_interrupt) = (sys::ticks(), sys::call_by_interrupt(Syscall::Ticks));
    println!("ticks by syscall: {by_syscall}, by int 0x80: {by_interrupt}");
    Ok(())
}

fn spin<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    nothing(arguments)?;
    println!("spinning; Ctrl-C stops me");
    loop {
        core::hint::spin_loop();
    }
}

fn table<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    let max = arguments.number(9, 1, 20)?;
    for row in 1..=max {
        for column in 1..=max {
            print!("{:>4}", row * column);
        }
        println!();
    }
    Ok(())
}

fn uptime<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    nothing(arguments)?;
    let ticks = sys::ticks();
    let (seconds, rest) = (ticks / TICKS_PER_SECOND, ticks % TICKS_PER_SECOND);
    println!("up {seconds}.{rest:02} s, {ticks} timer ticks");
    Ok(())
}

/// For programs that take no arguments.
fn nothing<'a>(arguments: &Arguments<'a>) -> Result<'a> {
    arguments.only().and_then(|only| if only.is_some() { Err(Refused::Usage) } else { Ok(()) })
}
