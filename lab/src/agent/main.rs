//! The lab's first and only process of its own: `/init` of its initramfs.
//!
//! It loads the kernel modules, says that it is ready, and waits. At this point the machine is
//! saved; what follows happens after each resume: set the clock, mount the host's files, run one
//! program among them, and carry its input, output and end over the port (`lab::protocol`).
//!
//! It is linked statically and uses no `unsafe`: what a child has to do between `fork` and `exec`
//! is done by the agent itself, started a second time as `/init child …`.

mod boot;
mod child;
mod relay;

use std::process::ExitCode;

use rustix::system::{RebootCommand, reboot};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|word| word == child::ARGUMENT) {
        return child::run(arguments);
    }
    if std::process::id() != 1 {
        eprintln!("error: this is the lab's /init; `cargo xtask lab` starts it where it belongs");
        return ExitCode::from(2);
    }
    // Whatever goes wrong ends the machine, which the runner sees; the text is on its console.
    if let Err(error) = boot::boot().and_then(relay::serve) {
        eprintln!("lab: {error}");
    }
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}
