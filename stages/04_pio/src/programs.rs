//! What can be run: the programs of `asm/real/`, and files of the user's own.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use common::file;
use common::layout::PROGRAM;

use crate::WINDOW;

/// The most bytes that a program may have: from where it is loaded to the end of its 64 KiB.
const MOST: u64 = WINDOW - PROGRAM.0;

/// Name, code, and what it does.
const OURS: &[(&str, &[u8], &str)] = &[
    ("hello", asm::real::HELLO, "greets by the serial port, ends with HLT"),
    ("counter", asm::real::COUNTER, "counts from 1 to 20, ends by the debug-exit port"),
    ("multiplication", asm::real::MULTIPLICATION, "the multiplication table up to 9 times 9"),
    ("fibonacci", asm::real::FIBONACCI, "Fibonacci's numbers as far as 32 bits hold them"),
    ("primes", asm::real::PRIMES, "the primes below 1000, by a sieve"),
    ("matrix", asm::real::MATRIX, "multiplies two matrices of 3 times 3"),
    ("strings", asm::real::STRINGS, "rep outsb, outsw and outsd; reads 8, 16 and 32 bits"),
    ("echo", asm::real::ECHO, "sends back what the serial port receives, until Ctrl-D"),
    ("upper", asm::real::UPPER, "prints stdin in capital letters, by hypercalls"),
    ("reverse", asm::real::REVERSE, "takes eight keys with one rep insb, prints them reversed"),
];

/// A program in the host's memory.
#[derive(Clone)]
pub struct Program {
    /// Its name for a person.
    pub name: String,
    /// Its bytes.
    pub code: Cow<'static, [u8]>,
}

/// Our programs, one a line.
pub fn list(indent: &str) -> String {
    OURS.iter().map(|(name, _, what)| format!("{indent}{name:15} {what}\n")).collect()
}

/// The programs that were asked for.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Program>> {
    paths.iter().map(|path| find(path)).collect()
}

/// The program of that name, or else the file.
fn find(path: &Path) -> Result<Program> {
    let name = path.display().to_string();
    if let Some(&(_, code, _)) = OURS.iter().find(|(ours, ..)| *ours == name) {
        return Ok(Program { name, code: Cow::Borrowed(code) });
    }
    match file::read(path, MOST) {
        Ok(code) => Ok(Program { name, code: Cow::Owned(code) }),
        Err(file::Error::Open(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{name}: neither a program (04_pio --list names them) nor a file")
        }
        Err(error) => Err(error).context(name),
    }
}
