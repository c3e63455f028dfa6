//! The lab: a `/dev/kvm` for machines that have none.
//!
//! QEMU emulates an AMD machine with SVM, a distribution's kernel loads `kvm-amd` in it, and a
//! program of the host runs there against a complete `/dev/kvm`, with the host's files at their own
//! paths and the host's terminal. Booting takes seconds, so it happens once: the booted machine is
//! saved, and each run resumes it. `lab/README.md` tells how the pieces fit.
//!
//! | module | what |
//! |---|---|
//! | `protocol` | what runner and agent say to each other |
//! | `modules` | the kernel modules that the lab loads, and their order |
//! | `initramfs` | a `newc` archive of files, folders and links |
//! | `parts` | the lab's agent and initramfs, made where they are missing |
//! | `qemu` | the emulated machine: its command line, its start, its saving |
//! | `state` | the saved machine in the cache folder |
//! | `session` | one program in one resumed lab |
//! | `terminal` | the host's terminal, raw while it is needed |

pub mod protocol;

#[cfg(feature = "host")]
pub mod initramfs;
#[cfg(feature = "host")]
pub mod modules;
#[cfg(feature = "host")]
pub mod parts;
#[cfg(feature = "host")]
pub mod qemu;
#[cfg(feature = "host")]
pub mod session;
#[cfg(feature = "host")]
pub mod state;
#[cfg(feature = "host")]
pub mod terminal;

#[cfg(feature = "host")]
pub use host::{is_ready, setup, shell};

/// The environment variable that the agent sets for everything which runs in the lab.
pub const INSIDE: &str = "MINI_KVM_IN_LAB";

/// The environment variable for KVM's parameter `min_timer_period_us` in the lab, in microseconds.
/// `lab/README.md` tells what it is good for, under "Limits".
pub const MIN_TIMER_PERIOD_US: &str = "MINI_KVM_LAB_MIN_TIMER_PERIOD_US";

/// Where the host's root is mounted in the lab, before it becomes the program's root.
pub const HOST_ROOT: &str = "/host";

/// The name of the share with the host's files (`mount_tag` of QEMU's `-virtfs`).
pub const SHARE: &str = "host";

#[cfg(feature = "host")]
mod host {
    use std::ffi::OsString;
    use std::process::ExitCode;

    use anyhow::Result;

    use crate::parts::Progress;
    use crate::session::{self, Program};
    use crate::state::State;

    /// Whether the lab can be resumed at once. Costs a few system calls.
    pub fn is_ready() -> bool {
        matches!(State::find(), Ok(Some(_)))
    }

    /// Makes the lab, once set-up has brought QEMU and the lab's kernel: builds the agent and the
    /// initramfs, starts the machine once and saves it. Does nothing if that has been done.
    ///
    /// # Errors
    /// What is missing, or why the machine doesn't come up.
    pub fn setup(progress: &mut dyn FnMut(&str)) -> Result<()> {
        State::ensure(progress).map(drop)
    }

    /// Runs a command in the lab, or the user's shell if none is given; its exit code is the
    /// command's.
    ///
    /// # Errors
    /// The lab isn't set up or breaks down.
    pub fn shell(command: &[OsString]) -> Result<ExitCode> {
        let mut command = command.to_vec();
        if command.is_empty() {
            command.push(std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into()));
        }
        let progress: Progress<'_> = &mut |what| eprintln!("mini-kvm: {what}");
        let state = State::ready(progress)?;
        session::run(state, &Program::new(command)?, progress).map(|end| ExitCode::from(end.code()))
    }
}
