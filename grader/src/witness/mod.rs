//! The witness: it runs a program and writes down what that does with `/dev/kvm`.
//!
//! The program is traced (ptrace(2)) and stops at every ioctl of KVM, when it begins and when it ends. The witness
//! reads its argument and its result, and behind a `KVM_RUN`, why the guest left: from the `struct kvm_run` that the
//! program shares with KVM. From `KVM_SET_USER_MEMORY_REGION` it knows the memslots, so that it can read the guest's
//! memory; the registers it gets by having the program make one ioctl more. The program notices nothing, except that
//! it is slower.
//!
//! | file | what |
//! |---|---|
//! | `launch` | the program's first moments, and the filter that stops it at the right calls only |
//! | `ioctl` | the ioctls of KVM by name |
//! | `process` | a process's memory, and what its descriptors stand for |
//! | `guest` | a guest's memory and registers at an exit |
//! | `stop` | waiting for the stops of threads, and letting them go on |
//! | `record` | what was seen, and the questions about it |

pub mod guest;
pub mod ioctl;
pub mod launch;
mod process;
pub mod record;
mod stop;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::unistd::Pid;

use guest::{Guest, Slot};
use process::Process;
use record::{Call, Exit, On, Record, What, array};
use stop::{How, Stop, go_on};

/// What is done at every exit: it may look at the guest.
pub type AtExit<'c> = dyn FnMut(&Exit, &mut Guest<'_>) -> Result<()> + 'c;

/// What a program is to be told instead of what KVM said: a result, or an errno below zero.
pub type Pretend<'c> = dyn FnMut(&Call) -> Option<i64> + 'c;

/// What the argument of an ioctl is to hold instead of KVM's answer. That of `KVM_RUN` is the beginning of
/// `struct kvm_run`.
pub type Forge<'c> = dyn FnMut(&Call) -> Option<Vec<u8>> + 'c;

/// What a criterion wants of the witness besides the record.
#[derive(Default)]
pub struct Wishes<'c> {
    /// See [`AtExit`].
    pub at_exit: Option<Box<AtExit<'c>>>,
    /// See [`Pretend`].
    pub pretend: Option<Box<Pretend<'c>>>,
    /// See [`Forge`].
    pub forge: Option<Box<Forge<'c>>>,
    /// Leave `KVM_RUN` alone: for guests whose exits are too many to stop at, and for what is measured.
    pub no_exits: bool,
}

/// The largest argument and the largest answer that are kept.
const MOST_BYTES: usize = 64 << 10;

/// How much of `struct kvm_run` tells of an exit.
const RUN_BYTES: usize = 64;

/// A system call that a thread is in.
enum Pending {
    Ioctl { on: On, fd: u64, request: u64, arg: u64, given: Vec<u8> },
    Mmap { fd: u64 },
}

/// One program under watch.
pub struct Witness<'c> {
    root: Pid,
    wishes: Wishes<'c>,
    record: Record,
    processes: HashMap<Pid, Process>,
    /// The process of each thread.
    threads: HashMap<Pid, Pid>,
    pending: HashMap<Pid, Pending>,
    /// Threads that have greeted.
    born: HashSet<Pid>,
    /// The memslots of each VM.
    slots: Vec<BTreeMap<u32, Slot>>,
    /// The exit of each vCPU whose answer is still to come: its place, and where the answer will stand.
    unanswered: HashMap<(usize, u64), (usize, u64, usize)>,
    /// What is wrong with the criterion's own look at the guest.
    trouble: Option<anyhow::Error>,
}

/// The command that becomes, under watch, the program in its further arguments. `launcher` is the grader's binary.
pub fn command(launcher: &Path, no_exits: bool) -> Command {
    let mut command = Command::new(launcher);
    command.arg(if no_exits { launch::WITHOUT_EXITS } else { launch::WORD });
    command
}

impl<'c> Witness<'c> {
    /// Watches the process that [`command`] has just become, from the thread that started it.
    ///
    /// # Errors
    /// It did not get as far as to stop for us.
    pub fn new(pid: u32, wishes: Wishes<'c>) -> Result<Self> {
        let root = Pid::from_raw(pid as i32);
        match stop::wait(Some(root))? {
            Some((_, Stop::Signal(libc::SIGSTOP))) => {}
            other => anyhow::bail!("the program to be watched did not start: {other:?}"),
        }
        use ptrace::Options;
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACESECCOMP
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(root, options)?;
        go_on(root, How::On, 0)?;
        Ok(Self {
            root,
            wishes,
            record: Record::default(),
            processes: HashMap::from([(root, Process::new(root))]),
            threads: HashMap::from([(root, root)]),
            pending: HashMap::new(),
            born: HashSet::new(),
            slots: Vec::new(),
            unanswered: HashMap::new(),
            trouble: None,
        })
    }

    /// Watches it, and all that it starts, to the end. Gives what was seen and how the program itself ended.
    ///
    /// # Errors
    /// What the criterion's look at an exit failed with; the program has ended all the same.
    pub fn watch(mut self) -> Result<(Record, Option<ExitStatus>)> {
        let mut status = None;
        while let Some((pid, stop)) = stop::wait(None)? {
            match stop {
                Stop::Ended(how) => {
                    self.forget(pid);
                    if pid == self.root {
                        status = Some(how);
                    }
                }
                Stop::Begins => match self.begins(pid) {
                    Ok(true) => go_on(pid, How::ToCall, 0)?,
                    // An error means that somebody has killed the thread meanwhile.
                    _ => go_on(pid, How::On, 0)?,
                },
                Stop::Call => {
                    let signal = self.ends(pid).unwrap_or_default();
                    go_on(pid, How::On, signal)?;
                }
                Stop::Event(event) => {
                    if event == libc::PTRACE_EVENT_EXEC {
                        // A new memory, and no old descriptors.
                        self.processes.insert(pid, Process::new(pid));
                    } else if let Ok(child) = ptrace::getevent(pid) {
                        self.adopt(pid, Pid::from_raw(child as i32));
                    }
                    go_on(pid, How::On, 0)?;
                }
                // How a new thread greets, before or after the news of its birth.
                Stop::Signal(libc::SIGSTOP) if pid != self.root && self.born.insert(pid) => {
                    go_on(pid, How::On, 0)?;
                }
                Stop::Signal(signal) => go_on(pid, How::On, signal)?,
            }
        }
        match self.trouble {
            Some(error) => Err(error),
            None => Ok((self.record, status)),
        }
    }

    fn forget(&mut self, pid: Pid) {
        self.threads.remove(&pid);
        self.pending.remove(&pid);
        self.born.remove(&pid);
        self.processes.remove(&pid);
    }

    /// `parent` has begun `child`, which is a thread of the same process or another one.
    fn adopt(&mut self, parent: Pid, child: Pid) {
        let Some(&old) = self.threads.get(&parent) else { return };
        let process = process::of_thread(child).unwrap_or(child);
        self.threads.insert(child, process);
        let forked = self.processes.get(&old).map(|before| before.forked(process));
        if let Some(forked) = forked {
            self.processes.entry(process).or_insert(forked);
        }
    }

    /// A thread begins a system call. Whether its end is of interest.
    fn begins(&mut self, thread: Pid) -> Result<bool> {
        let regs = ptrace::getregs(thread)?;
        // The news of its birth may still be to come.
        let of_thread = || process::of_thread(thread).unwrap_or(thread);
        let process = *self.threads.entry(thread).or_insert_with(of_thread);
        let process = self.processes.entry(process).or_insert_with(|| Process::new(process));
        let newest = self.record.vms().checked_sub(1);
        if regs.orig_rax == libc::SYS_mmap as u64 {
            // `struct kvm_run` is the first page; who maps a later one wants the ring of gathered writes.
            let is_run = regs.r9 == 0 && matches!(process.on(regs.r8, newest), On::Vcpu(..));
            if is_run {
                self.pending.insert(thread, Pending::Mmap { fd: regs.r8 });
            }
            return Ok(is_run);
        }
        let (fd, request, arg) = (regs.rdi, regs.rsi & 0xFFFF_FFFF, regs.rdx);
        let on = process.on(fd, newest);
        let mut given = Vec::new();
        if request == ioctl::RUN {
            if let On::Vcpu(vm, vcpu) = on
                && let Some((exit, addr, len)) = self.unanswered.remove(&(vm, vcpu))
            {
                self.record.answered(exit, process.memory.read(addr, len)?);
            }
        } else if ioctl::reads(request) {
            given = argument(process, request, arg);
        }
        self.pending.insert(thread, Pending::Ioctl { on, fd, request, arg, given });
        Ok(true)
    }

    /// A thread's system call has ended. Gives a signal that came while we looked, or 0.
    fn ends(&mut self, thread: Pid) -> Result<i32> {
        let Some(pending) = self.pending.remove(&thread) else { return Ok(0) };
        let mut regs = ptrace::getregs(thread)?;
        let result = match regs.rax as i64 {
            error @ -4095..0 => Err(Errno::from_raw(-error as i32)),
            value => Ok(value),
        };
        let process = self.threads.get(&thread).and_then(|pid| self.processes.get_mut(pid));
        let Some(process) = process else { return Ok(0) };
        let (on, fd, request, arg, given) = match pending {
            Pending::Mmap { fd } => {
                if let (Some(On::Vcpu(vm, vcpu)), Ok(at)) = (process.fds.get(&fd), result) {
                    process.runs.insert((*vm, *vcpu), at as u64);
                }
                return Ok(0);
            }
            Pending::Ioctl { on, fd, request, arg, given } => (on, fd, request, arg, given),
        };
        if request == ioctl::RUN {
            return self.returned(thread, on, fd, result);
        }
        match (request, on, result) {
            (ioctl::CREATE_VM, On::System, Ok(new)) => {
                process.fds.insert(new as u64, On::Vm(self.record.new_vm()));
                self.slots.push(BTreeMap::new());
            }
            (ioctl::CREATE_VCPU, On::Vm(vm), Ok(new)) => {
                process.fds.insert(new as u64, On::Vcpu(vm, arg));
            }
            (ioctl::SET_USER_MEMORY_REGION, On::Vm(vm), Ok(_)) => {
                set_slot(&mut self.slots[vm], &given);
            }
            _ => {}
        }
        let mut answer = Vec::new();
        if request == ioctl::GET_DIRTY_LOG {
            let slot = u32::from_le_bytes(array(&given, 0));
            let slots = on.vm().and_then(|vm| self.slots.get(vm));
            if let (Some(slot), Ok(_)) = (slots.and_then(|slots| slots.get(&slot)), result) {
                // One bit a page, in words of 64 bits.
                let bytes = slot.size.div_ceil(4096 * 64) * 8;
                let bitmap = u64::from_le_bytes(array(&given, 8));
                let bytes = usize::try_from(bytes).unwrap_or(MOST_BYTES).min(MOST_BYTES);
                answer = process.memory.read(bitmap, bytes).unwrap_or_default();
            }
        } else if result.is_ok() && request >> 31 & 1 == 1 {
            answer = argument(process, request, arg);
        }
        let name =
            ioctl::known(request).map_or("an ioctl unknown to the grader", |known| known.name);
        let mut call = Call { at: 0, name, on, arg, given, answer, result };
        if let Some(forged) = self.wishes.forge.as_mut().and_then(|forge| forge(&call)) {
            process.memory.write(arg, &forged)?;
            call.answer = forged;
        }
        if let Some(pretend) = self.wishes.pretend.as_mut().and_then(|pretend| pretend(&call)) {
            regs.rax = pretend as u64;
            ptrace::setregs(thread, regs)?;
            call.result = match pretend {
                error @ ..0 => Err(Errno::from_raw(-error as i32)),
                value => Ok(value),
            };
        }
        self.record.call(call);
        Ok(0)
    }

    /// `KVM_RUN` has returned.
    fn returned(
        &mut self,
        thread: Pid,
        on: On,
        fd: u64,
        result: Result<i64, Errno>,
    ) -> Result<i32> {
        let On::Vcpu(vm, vcpu) = on else { return Ok(0) };
        let process = &self.processes[&self.threads[&thread]];
        let Some(&run) = process.runs.get(&(vm, vcpu)) else { return Ok(0) };
        if let Some(forge) = &mut self.wishes.forge
            && result.is_ok()
        {
            let answer = process.memory.read(run, RUN_BYTES)?;
            let name = "KVM_RUN";
            let call = Call { at: 0, name, on, arg: 0, given: Vec::new(), answer, result };
            if let Some(forged) = forge(&call) {
                process.memory.write(run, &forged)?;
            }
        }
        let (what, answer) = match result {
            Ok(_) => exit_reason(process, run)?,
            Err(Errno::EINTR) => (What::Interrupted, None),
            // Its first run in the guest waits for a start: KVM API 4.10.
            Err(errno) => (What::Failed(errno), None),
        };
        let place = self.record.exit((vm, vcpu), what);
        if let (Some(place), Some((addr, len))) = (place, answer) {
            self.unanswered.insert((vm, vcpu), (place, addr, len));
        }
        let Some(at_exit) = &mut self.wishes.at_exit else { return Ok(0) };
        let Some(exit) = place.and_then(|place| self.record.exits().get(place)) else {
            return Ok(0);
        };
        let mut guest =
            Guest { thread, memory: &process.memory, slots: &self.slots[vm], run, fd, signal: 0 };
        if let Err(error) = at_exit(exit, &mut guest)
            && self.trouble.is_none()
        {
            self.trouble = Some(error);
        }
        Ok(guest.signal)
    }
}

/// What a call's argument points to, with its tail.
fn argument(process: &Process, request: u64, arg: u64) -> Vec<u8> {
    let Some(ioctl) = ioctl::known(request) else { return Vec::new() };
    let mut size = ioctl::size(request);
    let read = |size| process.memory.read(arg, size).unwrap_or_default();
    if let Some(ioctl::Tail { header, element }) = ioctl.tail {
        let count = u32::from_le_bytes(array(&read(4), 0)) as usize;
        size = header.saturating_add(count.saturating_mul(element)).min(MOST_BYTES);
    }
    read(size)
}

/// What KVM's own list of slots does with this one.
fn set_slot(slots: &mut BTreeMap<u32, Slot>, given: &[u8]) {
    let number = u32::from_le_bytes(array(given, 0));
    let [start, size, host] = [8, 16, 24].map(|at| u64::from_le_bytes(array(given, at)));
    match size {
        0 => slots.remove(&number),
        _ => slots.insert(number, Slot { start, size, host }),
    };
}

/// Why the guest left, from `struct kvm_run`, and where the monitor will put its answer.
fn exit_reason(process: &Process, run: u64) -> Result<(What, Option<(u64, usize)>)> {
    let page = process.memory.read(run, RUN_BYTES)?;
    // The offsets are those of `struct kvm_run`; its union begins at 32.
    let byte = |at: usize| page[at];
    let u32_at = |at| u32::from_le_bytes(array(&page, at));
    let u64_at = |at| u64::from_le_bytes(array(&page, at));
    Ok(match u32_at(8) {
        2 => {
            let (direction, size) = (byte(32), byte(33));
            let port = u16::from_le_bytes(array(&page, 34));
            let len = usize::from(size).saturating_mul(u32_at(36) as usize).min(MOST_BYTES);
            let at = run + u64_at(40);
            let data = process.memory.read(at, len)?;
            match direction {
                0 => (What::In { port, size, data: Vec::new() }, Some((at, len))),
                _ => (What::Out { port, size, data }, None),
            }
        }
        4 => {
            let (exception, pc, dr6) = (u32_at(32), u64_at(40), u64_at(48));
            (What::Debug { exception, pc, dr6 }, None)
        }
        5 => (What::Hlt, None),
        6 => {
            let (addr, len) = (u64_at(32), (u32_at(48) as usize).min(8));
            match byte(52) {
                0 => (What::Read { addr, data: Vec::new() }, Some((run + 40, len))),
                _ => (What::Write { addr, data: page[40..40 + len].to_vec() }, None),
            }
        }
        7 => (What::IrqWindowOpen, None),
        8 => (What::Shutdown, None),
        9 => (What::FailEntry { reason: u64_at(32) }, None),
        10 => (What::Interrupted, None),
        17 => (What::InternalError { suberror: u32_at(32) }, None),
        24 => (What::SystemEvent { kind: u32_at(32) }, None),
        other => (What::Other(other), None),
    })
}
