//! A watched process: its memory, and what its descriptors stand for.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};

use anyhow::{Context, Result};
use nix::unistd::Pid;

use super::record::On;

/// A process's memory, `/proc/PID/mem`, opened when it is first read.
#[derive(Debug)]
pub struct Memory {
    pid: Pid,
    file: OnceCell<File>,
}

impl Memory {
    pub(super) fn new(pid: Pid) -> Self {
        Self { pid, file: OnceCell::new() }
    }

    pub(super) fn file(&self) -> Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let path = format!("/proc/{}/mem", self.pid);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {path}"))?;
        Ok(self.file.get_or_init(|| file))
    }
}

/// A process: threads share it.
#[derive(Debug)]
pub(super) struct Process {
    pub pid: Pid,
    pub memory: Memory,
    /// What KVM's descriptors stand for. A number that is used again is overwritten.
    pub fds: HashMap<u64, On>,
    /// Where each vCPU's `struct kvm_run` is.
    pub runs: BTreeMap<(usize, u64), u64>,
}

impl Process {
    pub fn new(pid: Pid) -> Self {
        Self { pid, memory: Memory::new(pid), fds: HashMap::new(), runs: BTreeMap::new() }
    }

    /// What it is after `fork`.
    pub fn forked(&self, pid: Pid) -> Self {
        Self { fds: self.fds.clone(), runs: self.runs.clone(), ..Self::new(pid) }
    }

    /// What a descriptor stands for. One that no ioctl made is `/dev/kvm`, if it is that; `newest` is the VM
    /// that a duplicate is taken to belong to.
    pub fn on(&mut self, fd: u64, newest: Option<usize>) -> On {
        if let Some(known) = self.fds.get(&fd) {
            return *known;
        }
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).unwrap_or_default();
        let link = link.to_string_lossy();
        let on = match (&*link, newest) {
            ("/dev/kvm", _) => On::System,
            ("anon_inode:kvm-vm", Some(vm)) => On::Vm(vm),
            (link, Some(vm)) => match link.strip_prefix("anon_inode:kvm-vcpu:") {
                Some(id) => id.parse().map_or(On::Other, |id| On::Vcpu(vm, id)),
                None => On::Other,
            },
            _ => On::Other,
        };
        if on != On::Other {
            self.fds.insert(fd, on);
        }
        on
    }
}

/// The process that a thread belongs to.
pub(super) fn of_thread(thread: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    Some(Pid::from_raw(line.trim().parse().ok()?))
}
