//! `--gdb` of stages 03 to 08: a debugger at the guest's side.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::Path;

use clap::Args;
use common::gdb::{Address, Error, Gdb, Setup};
#[cfg(feature = "stage06")]
use common::run::{Ending, Stop};

use crate::Ended;

/// What `--help` says of it.
pub(crate) const HELP: &str = "\
Debugger: with --gdb the guest waits before its first instruction until gdb is
there: gdb -ex 'target remote :1234', which works again and again. Each vCPU is a
thread. `monitor help` in gdb tells what there is beyond gdb's own commands.";

/// The command line's part of the debugger.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Debugging")]
#[group(skip)]
pub struct Flags {
    /// Wait for gdb at ADDR before the guest's first instruction: PORT, HOST:PORT or unix:PATH; without ADDR
    /// it is 127.0.0.1:1234
    #[arg(long, value_name = "ADDR", num_args = 0..=1, require_equals = true,
          default_missing_value = Address::DEFAULT)]
    gdb: Option<Address>,
}

impl Flags {
    /// Whether gdb is wanted.
    pub fn is_wanted(&self) -> bool {
        self.gdb.is_some()
    }

    /// The debugger that was asked for, for vCPUs 0 to `vcpus` - 1. `symbols` is a file that gdb may want, and `kill` is
    /// how gdb ends the machine. A file that is no ELF file has no symbols.
    pub fn start(
        &self,
        vcpus: usize,
        symbols: Option<&Path>,
        kill: impl Fn() + Send + 'static,
    ) -> Result<Gdb, Error> {
        let Some(address) = self.gdb.clone() else { return Ok(Gdb::default()) };
        let symbols = symbols.filter(|file| is_elf(file)).map(Into::into);
        Gdb::start(Setup { address, vcpus, symbols, say: Box::new(say), kill: Box::new(kill) })
    }
}

/// Ends the program as gdb's `kill` does where nothing has to be put in order.
pub fn exit() {
    std::process::exit(Ended::Well as i32);
}

/// Ends a machine as a person at its console does.
#[cfg(feature = "stage06")]
pub fn stopping(stop: &Stop) -> impl Fn() + Send + 'static {
    let stop = stop.clone();
    move || stop.now(Ending::Left)
}

fn is_elf(file: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(file).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"\x7FELF"
}

/// Prints a line on stderr, which may be a terminal in raw mode.
fn say(line: &str) {
    let return_carriage = if io::stderr().is_terminal() { "\r" } else { "" };
    crate::eprintln!("{line}{return_carriage}");
}
