//! What gdb asks for, done: the stub's two sides, a socket and the [`Machine`].

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Session;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason as Stop};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::AsFd;

use super::breakpoints::{Access, Refused, Trap, Watched};
use super::machine::{Machine, Pace, Why};
use super::probe::Works;
use super::registers::{Bytes, Set, State, X86};
use super::{Setup, monitor};
use crate::memory::Ram;
use crate::page_walk::Paging;
use crate::regs::Registers;
use crate::vcpu::Vcpu;

/// Bytes of the longest packet: a piece of memory in hexadecimal digits, as a rule.
const PACKET: usize = 0x4000;

/// Where gdb comes in.
pub(super) enum Listener {
    Tcp(TcpListener),
    /// With its path, which goes when nobody listens any more.
    Unix(UnixListener, PathBuf),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody else has removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What a connection is to us.
trait Socket: Read + Write + AsFd + Send {}
impl<T: Read + Write + AsFd + Send> Socket for T {}

impl Listener {
    /// The next gdb; nothing if the machine has ended.
    fn accept(&self, machine: &Machine) -> io::Result<Option<Wire>> {
        let fd = match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        };
        loop {
            if machine.ended().is_some() {
                return Ok(None);
            }
            if !wait(fd, Some(machine))? {
                continue;
            }
            let socket: Box<dyn Socket> = match self {
                Self::Tcp(listener) => {
                    let (socket, _) = listener.accept()?;
                    // Packets are small, and each waits for an answer.
                    socket.set_nodelay(true)?;
                    Box::new(socket)
                }
                Self::Unix(listener, _) => Box::new(listener.accept()?.0),
            };
            return Ok(Some(Wire { socket, input: Vec::new(), output: Vec::new() }));
        }
    }
}

/// Waits until there is something to read; with a machine, or until its bell rings. Returns whether there is.
fn wait(fd: impl AsFd, machine: Option<&Machine>) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(&fd, PollFlags::IN)];
    fds.extend(machine.map(|machine| PollFd::new(machine.bell(), PollFlags::IN)));
    match poll(&mut fds, None) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let ready = !fds[0].revents().is_empty();
    if let Some(machine) = machine {
        machine.heard();
    }
    Ok(ready)
}

/// A connection with gdb.
struct Wire {
    socket: Box<dyn Socket>,
    /// What has come and not been taken, the last byte first.
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Wire {
    /// The next byte; nothing if the machine's bell rang before.
    fn next(&mut self, machine: Option<&Machine>) -> io::Result<Option<u8>> {
        if let Some(byte) = self.input.pop() {
            return Ok(Some(byte));
        }
        if !wait(self.socket.as_fd(), machine)? {
            return Ok(None);
        }
        let mut buffer = [0; 4096];
        let len = self.socket.read(&mut buffer)?;
        if len == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.input.extend(buffer[..len].iter().rev());
        Ok(self.input.pop())
    }

    /// Has gdb show a line, while it waits for the guest to stop (GDB manual, E.3 "Stop Reply Packets", `O`).
    fn show(&mut self, line: &str) -> io::Result<()> {
        let mut packet = String::from("O");
        line.bytes().chain(*b"\n").for_each(|byte| packet += &format!("{byte:02x}"));
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.output.extend(format!("${packet}#{sum:02x}").into_bytes());
        self.flush()
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.output)?;
        self.output.clear();
        self.socket.flush()
    }
}

/// Serves one gdb after the other until the machine has ended.
pub(super) fn serve(listener: &Listener, machine: &Arc<Machine>, setup: &Setup) {
    let say = |line: &str| (setup.say)(line);
    loop {
        let wire = match listener.accept(machine) {
            Ok(Some(wire)) => wire,
            Ok(None) => break,
            Err(error) => {
                say(&format!("no gdb can come any more: {error}"));
                machine.detach();
                break;
            }
        };
        machine.stop_all();
        let mut stub = Stub::new(Arc::clone(machine));
        let ended = stub.session(wire);
        match ended {
            Ok(DisconnectReason::Disconnect) => {
                stub.clear();
                machine.detach();
                say("gdb has detached: the guest goes on; `target remote` comes back to it");
            }
            Ok(DisconnectReason::Kill) => {
                say("gdb has killed the machine");
                machine.told();
                (setup.kill)();
                break;
            }
            Ok(_) => break,
            Err(_) if machine.ended().is_some() => break,
            Err(why) => {
                machine.stop_all();
                stub.clear();
                say(&format!(
                    "gdb is gone ({why}): the guest stands still until `target remote` comes back to it"
                ));
            }
        }
    }
    machine.told();
}

/// One gdb's view of the machine.
struct Stub {
    machine: Arc<Machine>,
    /// The vCPU that gdb has asked for last.
    current: u8,
    /// What gdb takes it for.
    set: Cell<Set>,
    /// What gdb wants the vCPUs to do next.
    paces: BTreeMap<u8, Pace>,
    /// What is wanted of those that gdb doesn't name.
    others: Pace,
    /// What this KVM can stop a guest by, once that has been tried.
    works: Option<Works>,
    /// Hardware breakpoints that are something else.
    borrowed: BTreeSet<u64>,
}

type Result<T, E = TargetError<Infallible>> = std::result::Result<T, E>;

/// gdb counts threads from 1.
fn tid(id: u8) -> Tid {
    Tid::MIN.saturating_add(id.into())
}

fn id(tid: Tid) -> u8 {
    u8::try_from(tid.get() - 1).unwrap_or(u8::MAX)
}

impl From<Refused> for TargetError<Infallible> {
    fn from(_: Refused) -> Self {
        Self::NonFatal
    }
}

impl Stub {
    fn new(machine: Arc<Machine>) -> Self {
        let current = machine.ids().first().copied().unwrap_or(0);
        Self {
            machine,
            current,
            set: Cell::default(),
            paces: BTreeMap::new(),
            others: Pace::Continue,
            works: None,
            borrowed: BTreeSet::new(),
        }
    }

    /// Talks with gdb until it leaves or the machine has ended. Errors are told as text.
    fn session(&mut self, wire: Wire) -> Result<DisconnectReason, String> {
        let gdb = GdbStub::builder(wire).packet_buffer_size(PACKET).build();
        let gdb = gdb.map_err(|error| error.to_string())?;
        let mut session = gdb.run_state_machine(self).map_err(|error| error.to_string())?;
        loop {
            let next = match session {
                Session::Idle(mut idle) => match idle.borrow_conn().next(None) {
                    Ok(Some(byte)) => idle.incoming_data(self, byte),
                    Ok(None) => Ok(idle.into()),
                    Err(error) => return Err(error.to_string()),
                },
                Session::Running(mut running) => {
                    if let Some((id, why)) = self.machine.next_stop() {
                        let reason = self.stopped(id, why);
                        if let Some(hint) = self.hint() {
                            running.borrow_conn().show(&hint).map_err(|error| error.to_string())?;
                        }
                        running.report_stop(self, reason)
                    } else if let Some(crashed) = self.machine.ended() {
                        running.report_stop(
                            self,
                            match crashed {
                                true => Stop::Terminated(Signal::SIGABRT),
                                false => Stop::Exited(0),
                            },
                        )
                    } else {
                        match running.borrow_conn().next(Some(&self.machine)) {
                            Ok(Some(byte)) => running.incoming_data(self, byte),
                            Ok(None) => Ok(running.into()),
                            Err(error) => return Err(error.to_string()),
                        }
                    }
                }
                Session::CtrlCInterrupt(interrupted) => {
                    self.machine.stop_all();
                    let signal = Signal::SIGINT;
                    let reason = Stop::SignalWithThread { tid: tid(self.current), signal };
                    interrupted.interrupt_handled(self, Some(reason))
                }
                Session::Disconnected(mut end) => {
                    let reason = end.get_reason();
                    if reason == DisconnectReason::Kill {
                        // gdb wants to hear of it (`vKill`); what it doesn't wait for (`k`), it doesn't read.
                        let wire = end.borrow_conn();
                        wire.output.extend(b"$OK#9a");
                        wire.flush().map_err(|error| error.to_string())?;
                    }
                    return Ok(reason);
                }
            };
            session = next.map_err(|error| error.to_string())?;
        }
    }

    /// What gdb is told of a vCPU that has stopped by itself.
    fn stopped(&mut self, id: u8, why: Why) -> Stop<u64> {
        self.current = id;
        let tid = tid(id);
        let signal = |signal| Stop::SignalWithThread { tid, signal };
        match why {
            Why::Stepped => signal(Signal::SIGTRAP),
            Why::Breakpoint => {
                let at = self.registers(id).map(|registers| registers.linear_rip());
                match at.is_some_and(|at| self.borrowed.contains(&at)) {
                    true => Stop::HwBreak(tid),
                    false => Stop::SwBreak(tid),
                }
            }
            Why::HardwareBreakpoint => Stop::HwBreak(tid),
            Why::Watchpoint(Watched { addr, access, .. }) => {
                let kind = match access {
                    Access::Write => WatchKind::Write,
                    Access::Read => WatchKind::Read,
                    Access::Any => WatchKind::ReadWrite,
                };
                Stop::Watch { tid, kind, addr }
            }
            Why::Dead => signal(Signal::SIGSEGV),
        }
    }

    /// What to tell a person whose gdb takes the vCPU for something else than it is by now.
    fn hint(&self) -> Option<String> {
        let registers = self.registers(self.current)?;
        let (is, taken) = (Set::of(&registers).bits(), self.set.get().bits());
        (is != taken).then(|| {
            format!(
                "vCPU {} is in {is}-bit code, and gdb shows it as {taken}-bit: `unset tdesc filename` has gdb look again",
                self.current
            )
        })
    }

    fn registers(&self, id: u8) -> Option<Registers> {
        self.machine.ask(id, |vcpu| Registers::of(vcpu).ok())?
    }

    /// A vCPU's way to memory.
    fn memory(&self, id: u8) -> Result<(Ram, Paging)> {
        let found = self.machine.ask(id, |vcpu| {
            let paging = Paging::of(&vcpu.sregs().ok()?);
            Some((vcpu.vm().ram(), paging))
        });
        found.flatten().ok_or(TargetError::NonFatal)
    }

    fn works(&mut self) -> Works {
        *self.works.get_or_insert_with(Works::here)
    }

    /// Takes all breakpoints out of the guest.
    fn clear(&mut self) {
        if let Ok((ram, _)) = self.memory(self.current) {
            self.machine.breakpoints(|all| all.clear(&ram));
        }
    }
}

impl Target for Stub {
    type Arch = X86;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl TargetDescriptionXmlOverride for Stub {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::NonFatal);
        }
        if offset == 0
            && let Some(registers) = self.registers(self.current)
        {
            self.set.set(Set::of(&registers));
        }
        let xml = self.set.get().xml();
        let rest = usize::try_from(offset).ok().and_then(|at| xml.as_bytes().get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(length).min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

impl MultiThreadBase for Stub {
    fn read_registers(&mut self, bytes: &mut Bytes, tid: Tid) -> TargetResult<(), Self> {
        self.current = id(tid);
        let state = self.machine.ask(self.current, state).flatten().ok_or(TargetError::NonFatal)?;
        *bytes = state.to_gdb(self.set.get());
        Ok(())
    }

    fn write_registers(&mut self, bytes: &Bytes, tid: Tid) -> TargetResult<(), Self> {
        let bytes = bytes.clone();
        let done = self.machine.ask(id(tid), move |vcpu| {
            let before = state(vcpu)?;
            let after = before.with(&bytes).ok()?;
            // Setting registers has side effects in KVM: an exception that waits is lost.
            if after.registers.regs != before.registers.regs {
                vcpu.set_regs(&after.registers.regs).ok()?;
            }
            if after.registers.sregs != before.registers.sregs {
                vcpu.set_sregs(&after.registers.sregs).ok()?;
            }
            if after.fpu != before.fpu {
                vcpu.fd().set_fpu(&after.fpu).ok()?;
            }
            Some(())
        });
        done.flatten().ok_or(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.current = id(tid);
        let (ram, paging) = self.memory(self.current)?;
        match self.machine.breakpoints(|all| all.read(&ram, &paging, start, data)) {
            0 => Err(TargetError::NonFatal),
            read => Ok(read),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let (ram, paging) = self.memory(id(tid))?;
        let written = self.machine.breakpoints(|all| all.write(&ram, &paging, start, data));
        if written == data.len() { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        self.machine.ids().into_iter().map(tid).for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

fn state(vcpu: &Vcpu) -> Option<State> {
    Some(State { registers: Registers::of(vcpu).ok()?, fpu: vcpu.fd().get_fpu().ok()? })
}

impl ThreadExtraInfo for Stub {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Infallible> {
        let number = id(tid);
        let does = self.machine.ask(number, |vcpu| {
            let mode = Registers::of(vcpu).ok()?.mode();
            // Without an irqchip there are no such states.
            let waits = vcpu.fd().get_mp_state().map_or("", |state| match state.mp_state {
                KVM_MP_STATE_HALTED => ", halted",
                KVM_MP_STATE_UNINITIALIZED => ", waits for INIT",
                KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => ", waits for SIPI",
                _ => "",
            });
            Some(format!("{mode}{waits}"))
        });
        let does = does.flatten().unwrap_or_else(|| "busy in a device".into());
        let text = format!("vCPU {number}: {does}");
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Stub {
    fn resume(&mut self) -> Result<(), Infallible> {
        let pace = |id| self.paces.get(&id).copied().unwrap_or(self.others);
        self.machine.resume(pace);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.paces.clear();
        self.others = Pace::Continue;
        Ok(())
    }

    // A guest has no signals: what gdb wants to deliver is what it was told itself.
    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.paces.insert(id(tid), Pace::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Stub {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.paces.insert(id(tid), Pace::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Stub {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.others = Pace::Stay;
        Ok(())
    }
}

impl Breakpoints for Stub {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Stub {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.works().int3 {
            self.insert(addr, Trap::Int3, false)?;
        } else if self.insert(addr, Trap::Out, false).is_err() {
            // It must be there at least.
            let (ram, paging) = self.memory(self.current)?;
            paging.walk(&ram, addr).page.map_err(|_| Refused)?;
            self.machine.breakpoints(|all| all.step_to(addr));
        }
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove(addr)
    }
}

impl HwBreakpoint for Stub {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let works = self.works();
        if works.execute {
            self.machine.breakpoints(|all| all.insert_hardware(addr))?;
            return Ok(true);
        }
        let trap = if works.int3 { Trap::Int3 } else { Trap::Out };
        if self.insert(addr, trap, true).is_err() {
            self.machine.breakpoints(|all| all.step_to(addr));
        }
        self.borrowed.insert(addr);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.borrowed.remove(&addr);
        self.remove(addr)
    }
}

impl Stub {
    /// Puts a software breakpoint into the guest.
    fn insert(&self, addr: u64, trap: Trap, early: bool) -> Result<()> {
        let (ram, paging) = self.memory(self.current)?;
        Ok(self.machine.breakpoints(|all| all.insert(&ram, &paging, addr, trap, early))?)
    }

    /// Takes a breakpoint away, whatever it is made of.
    fn remove(&self, addr: u64) -> Result<bool> {
        let (ram, _) = self.memory(self.current)?;
        self.machine.breakpoints(|all| {
            if !all.stop_stepping_to(addr) && all.remove(&ram, addr).is_err() {
                all.remove_hardware(addr)?;
            }
            Ok(true)
        })
    }
}

/// As gdb calls it.
fn watched(addr: u64, len: u64, kind: WatchKind) -> Watched {
    let access = match kind {
        WatchKind::Write => Access::Write,
        WatchKind::Read => Access::Read,
        WatchKind::ReadWrite => Access::Any,
    };
    Watched { addr, len, access }
}

impl HwWatchpoint for Stub {
    fn add_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let watched = watched(addr, len, kind);
        if self.works().write {
            self.machine.breakpoints(|all| all.watch(watched))?;
        } else {
            let (ram, paging) = self.memory(self.current)?;
            self.machine.breakpoints(|all| all.look_at(&ram, &paging, watched))?;
        }
        Ok(true)
    }

    fn remove_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        self.machine.breakpoints(|all| all.unwatch(watched(addr, len, kind)))?;
        Ok(true)
    }
}

impl MonitorCmd for Stub {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        let line = String::from_utf8_lossy(command).into_owned();
        let text = match line.trim() {
            "stops" => monitor::stops(self.works()),
            _ => {
                let answer =
                    self.machine.ask(self.current, move |vcpu| monitor::answer(&line, vcpu));
                answer.unwrap_or_else(|| format!("vCPU {} is busy in a device", self.current))
            }
        };
        out.write_raw(text.trim_end().as_bytes());
        out.write_raw(b"\n");
        Ok(())
    }
}
