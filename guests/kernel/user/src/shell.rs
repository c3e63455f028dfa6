//! The shell: reads a line, runs what it names, says how it ended.

use user::arithmetic::number;
use user::line::Line;

use crate::sys::{self, Ended};
use crate::{programs, split};

/// Its own commands; everything else is a program that runs in an address space of its own.
const BUILT_IN: [(&str, &str); 2] =
    [("help", "this list"), ("exit [CODE]", "turn the machine off (or Ctrl-D)")];

/// Reads and runs lines until `exit` or Ctrl-D; the exit code.
pub fn main() -> u8 {
    println!("Type help for what there is.");
    let mut line = Line::new();
    while let Some(command) = sys::read_line(&mut line, "> ") {
        let (name, arguments) = split(command);
        match name {
            "" => {}
            "help" => help(),
            "exit" => match arguments.only().map(|code| number(code.unwrap_or("0"), 0, 255)) {
                Ok(Ok(code)) => return code as u8,
                _ => println!("exit: the code is one whole number from 0 to 255"),
            },
            _ if programs::ALL.iter().any(|program| program.name == name) => run(command),
            _ => println!("{name}: no such command; help lists them"),
        }
    }
    0
}

fn run(command: &str) {
    match sys::run(command) {
        // Programs say themselves what went wrong.
        Ended::Exited | Ended::Interrupted => {}
        Ended::Killed => println!("(the kernel and this shell go on)"),
        Ended::NotStarted => println!("no memory left to start it"),
    }
}

fn help() {
    for (name, help) in BUILT_IN {
        println!("  {name:<22} {help}");
    }
    for program in programs::ALL {
        let width = 21_usize.saturating_sub(program.name.len());
        println!("  {} {:<width$} {}", program.name, program.arguments, program.help);
    }
    println!("Backspace and Ctrl-U edit the line; Ctrl-C cancels it, or stops a program.");
}
