//! Introduced by stage 03: gdb at a guest's side.
//!
//! gdb debugs what it cannot start itself through a *stub* that speaks its remote protocol (GDB manual, appendix E) on a
//! socket. Here the crate `gdbstub` speaks it, and what it is asked for is done with KVM: registers by
//! `KVM_GET_REGS` and its like, memory through the guest's own page tables, breakpoints and single steps by
//! `KVM_SET_GUEST_DEBUG` (KVM API 4.87), whose exit is `KVM_EXIT_DEBUG`. Each vCPU is a thread to gdb.
//!
//! A stage makes a [`Gdb`] and has it [follow](Gdb::follow) its vCPUs. It sits in each, around `KVM_RUN`, so that a run
//! loop knows nothing of it: while gdb has a vCPU stopped, [`Vcpu::run`] doesn't come back, and a step or a breakpoint looks
//! like a signal.

mod breakpoints;
mod machine;
mod monitor;
mod probe;
mod registers;
mod stub;

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;

use kvm_bindings::KVM_EXIT_DEBUG;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use self::machine::Machine;
use self::stub::Listener;
use crate::deadline;
use crate::error::{Blame, Blamed};
use crate::last_exits::LastExit;
use crate::vcpu::{self, Exit, Vcpu, Watcher};

/// Why gdb can't be waited for.
#[derive(Debug, Error)]
pub enum Error {
    /// The address can't be listened on.
    #[error("cannot listen on {address} for gdb: {source}; give another address to --gdb")]
    Listen {
        /// The address.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The host gave no descriptor or thread.
    #[error("cannot wait for gdb: {0}")]
    Host(#[from] io::Error),
    /// A vCPU could not be called back.
    #[error(transparent)]
    Signal(#[from] deadline::Error),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Listen { .. } => Blame::Input,
            Self::Host(_) | Self::Signal(_) => Blame::Host,
        }
    }
}

/// Where gdb comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of this host: `HOST:PORT`, with 127.0.0.1 where no host is named.
    Tcp(String),
    /// A Unix socket's path, behind `unix:`.
    Unix(PathBuf),
}

impl Address {
    /// What QEMU takes as well.
    pub const DEFAULT: &str = "127.0.0.1:1234";
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path is expected behind unix:"),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        match port.parse::<u16>() {
            Ok(port) => Ok(Self::Tcp(format!("{host}:{port}"))),
            Err(_) => Err("expected PORT, HOST:PORT or unix:PATH"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a machine needs to be debugged.
pub struct Setup {
    /// Where gdb comes in.
    pub address: Address,
    /// How many vCPUs there are, numbered from 0.
    pub vcpus: usize,
    /// A file with the guest's symbols, if there is one, for gdb's command line.
    pub symbols: Option<PathBuf>,
    /// Takes lines for the person.
    pub say: Box<dyn Fn(&str) + Send>,
    /// gdb's `kill`: ends the machine.
    pub kill: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, vcpus, symbols, .. } = self;
        f.debug_struct("Setup")
            .field("address", address)
            .field("vcpus", vcpus)
            .field("symbols", symbols)
            .finish_non_exhaustive()
    }
}

/// A machine's debugger, if it has one. Without one, nothing costs anything. Clones are for the same machine.
#[derive(Clone, Default)]
pub struct Gdb {
    machine: Option<Arc<Machine>>,
}

impl fmt::Debug for Gdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gdb").field("is_on", &self.is_on()).finish()
    }
}

impl Gdb {
    /// Listens for gdb, and says where. The machine's vCPUs wait for it before their first instruction.
    pub fn start(setup: Setup) -> Result<Self, Error> {
        deadline::handle_signal()?;
        let listen = |source| Error::Listen { address: setup.address.clone(), source };
        let (listener, place) = match &setup.address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(listen)?;
                // Port 0 is for the system to choose.
                let address = listener.local_addr().map_err(listen)?;
                let place = match address.ip().is_loopback() {
                    true => format!(":{}", address.port()),
                    false => address.to_string(),
                };
                (Listener::Tcp(listener), place)
            }
            Address::Unix(path) => {
                remove_stale(path);
                let listener = UnixListener::bind(path).map_err(listen)?;
                (Listener::Unix(listener, path.clone()), path.display().to_string())
            }
        };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(io::Error::from)?;
        let machine = Arc::new(Machine::new(setup.vcpus, bell));
        let symbols = setup.symbols.as_ref().map(|file| format!(" {}", file.display()));
        (setup.say)(&format!(
            "the guest waits for gdb: gdb{} -ex 'target remote {place}'",
            symbols.unwrap_or_default()
        ));
        let its_machine = Arc::clone(&machine);
        thread::Builder::new()
            .name("gdb".into())
            .spawn(move || stub::serve(&listener, &its_machine, &setup))?;
        Ok(Self { machine: Some(machine) })
    }

    /// Whether there is a debugger.
    pub fn is_on(&self) -> bool {
        self.machine.is_some()
    }

    /// Has gdb stop a vCPU from now on. One that cannot go on can still be looked at: [`Vcpu::leave`] returns when gdb
    /// has it continue.
    pub fn follow(&self, vcpu: &mut Vcpu) {
        if let Some(machine) = &self.machine {
            vcpu.add_watcher(Held { machine: Arc::clone(machine), trapped: false });
        }
    }

    /// Has all vCPUs that stand still come back from [`Vcpu::run`]: somebody ends the machine.
    pub fn release(&self) {
        if let Some(machine) = &self.machine {
            machine.end();
        }
    }
}

/// A vCPU's machine, which decides whether it may run.
struct Held {
    machine: Arc<Machine>,
    /// Its last exit may be a breakpoint made of OUT.
    trapped: bool,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}

impl Watcher for Held {
    fn before_run(
        &mut self,
        vcpu: &mut Vcpu,
        _: &[u8],
    ) -> Result<Option<Exit<'static>>, vcpu::Error> {
        // Who has stood still, looks first whether the machine has ended.
        let has_waited = self.machine.before_run(vcpu, std::mem::take(&mut self.trapped))?;
        Ok(has_waited.then_some(Exit::Interrupted))
    }

    fn after_run(&mut self, exit: &LastExit) -> bool {
        self.trapped = exit.request.as_ref().is_some_and(breakpoints::may_be_trap);
        self.trapped || exit.reason == KVM_EXIT_DEBUG
    }

    fn leave(&mut self, vcpu: &mut Vcpu, _: &[u8]) -> Result<(), vcpu::Error> {
        self.machine.leave(vcpu, std::mem::take(&mut self.trapped))
    }
}

/// Removes a socket that a process has left behind; nothing else.
fn remove_stale(path: &Path) {
    let is_socket = path.symlink_metadata().is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        // If it is still there, binding says so.
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ports_or_unix_sockets() {
        let parse = |text: &str| text.parse::<Address>().map(|address| address.to_string());
        assert_eq!(parse("1234"), Ok("127.0.0.1:1234".into()));
        assert_eq!(parse(":1234"), Ok("127.0.0.1:1234".into()));
        assert_eq!(parse("0.0.0.0:99"), Ok("0.0.0.0:99".into()));
        assert_eq!(parse("unix:/tmp/x"), Ok("unix:/tmp/x".into()));
        assert_eq!(parse(Address::DEFAULT), Ok(Address::DEFAULT.into()));
        for wrong in ["", ":", "x", "localhost:70000", "unix:"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        remove_stale(&path);
        assert!(path.exists());
        let socket = dir.path().join("socket");
        drop(UnixListener::bind(&socket).unwrap());
        remove_stale(&socket);
        assert!(!socket.exists());
    }
}
