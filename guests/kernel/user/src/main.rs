//! The user programs: a shell and what it runs. All are in one executable; the first word of the
//! command line says which one it is to be.

#![no_std]
#![no_main]

#[macro_use]
mod sys;
mod crash;
mod programs;
mod shell;

// Only to be linked.
use mem as _;
use user::arithmetic::BadNumber;

/// One program.
struct Program {
    name: &'static str,
    arguments: &'static str,
    help: &'static str,
    main: for<'a> fn(&Arguments<'a>) -> Result<(), Refused<'a>>,
}

/// What follows a program's name.
struct Arguments<'a> {
    /// All of it.
    text: &'a str,
}

impl<'a> Arguments<'a> {
    fn words(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.text.split_whitespace()
    }

    /// The only argument, if there is one.
    fn only(&self) -> Result<Option<&'a str>, Refused<'a>> {
        let mut words = self.words();
        let first = words.next();
        if words.next().is_some() { Err(Refused::Usage) } else { Ok(first) }
    }

    /// The only argument as a number, or `default` without one.
    fn number(&self, default: u64, min: u64, max: u64) -> Result<u64, Refused<'a>> {
        match self.only()? {
            Some(word) => Ok(user::arithmetic::number(word, min, max)?),
            None => Ok(default),
        }
    }
}

/// Why a program does nothing.
enum Refused<'a> {
    /// The arguments are not those it takes.
    Usage,
    /// One of them is not the number it wants.
    Number(BadNumber<'a>),
    /// It has said why itself.
    Said,
}

impl<'a> From<BadNumber<'a>> for Refused<'a> {
    fn from(error: BadNumber<'a>) -> Self {
        Self::Number(error)
    }
}

/// The name and the arguments of a command line.
fn split(command: &str) -> (&str, Arguments<'_>) {
    let command = command.trim();
    let (name, text) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    (name, Arguments { text: text.trim() })
}

/// Becomes the program that the command line names; its exit code.
fn main(command: &str) -> u8 {
    let (name, arguments) = split(command);
    if name == "shell" {
        return shell::main();
    }
    let Some(program) = programs::ALL.iter().find(|program| program.name == name) else {
        println!("{name}: no such program");
        return 127;
    };
    match (program.main)(&arguments) {
        Ok(()) => return 0,
        Err(Refused::Number(error)) => println!("{name}: {error}"),
        Err(Refused::Usage) => {}
        Err(Refused::Said) => return 1,
    }
    println!("usage: {name} {}", program.arguments);
    2
}
