//! One vCPU's part of a trace: it looks at the clock and the registers around each `KVM_RUN`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_DEBUG, KVM_EXIT_HLT, KVM_EXIT_INTR};

use super::{Access, Devices, Event, Trace, What, file, origin, stats};
use crate::disasm::{self, Instruction};
use crate::last_exits::LastExit;
use crate::regs::Registers;
use crate::step;
use crate::vcpu::{self, Exit, Vcpu, Watcher};

/// The trace of one vCPU.
#[derive(Debug)]
pub(super) struct Follower {
    trace: Arc<Trace>,
    devices: Devices,
    /// How many instructions are still to be shown.
    steps: u32,
    /// The vCPU before the instruction that is being stepped over.
    before: Option<(Registers, Option<Instruction>)>,
    /// An event has shown that instruction already.
    told: bool,
    habit: origin::Habit,
    /// When `KVM_RUN` was called.
    entered: Instant,
    /// The exit that is being dealt with.
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    entered: Instant,
    /// When `KVM_RUN` came back.
    left: Instant,
    exit: LastExit,
    /// It is a single step that we have asked for.
    stepped: bool,
}

impl Follower {
    pub(super) fn new(trace: Arc<Trace>, devices: Devices, steps: u32) -> Self {
        Self {
            trace,
            devices,
            steps,
            before: None,
            told: false,
            habit: origin::Habit::default(),
            entered: Instant::now(),
            pending: None,
        }
    }

    /// Tells of the exit that has been dealt with, with the vCPU outside `KVM_RUN` since then.
    fn tell(&mut self, vcpu: &Vcpu, pending: Pending, data: &[u8]) -> Result<(), vcpu::Error> {
        let took = pending.left.elapsed();
        let Pending { entered, left, exit, stepped } = pending;
        let LastExit { reason, request, .. } = exit;
        let device = request.as_ref().and_then(|request| self.devices.find(request));
        let at = self.trace.since(left);
        let id = vcpu.id();
        if let Some(stats) = &self.trace.stats {
            let kind = match request {
                Some(request) => stats::Kind::Request { request, device },
                None if stepped => stats::Kind::Step,
                None => stats::Kind::Other(reason),
            };
            super::lock(stats).count(kind, took);
        }
        if let Some(file) = &self.trace.file {
            let entered = self.trace.since(entered);
            file.record(file::Record::Guest { vcpu: id, from: entered, to: at });
            if reason != KVM_EXIT_INTR && !stepped {
                file.record(file::Record::exit(id, at, took, &exit, device, data));
            }
        }
        if stepped {
            return self.tell_step(vcpu, at);
        }
        let Some((filter, sink)) = &self.trace.lines else { return Ok(()) };
        match request {
            Some(request) => {
                let mut sink = super::lock(sink);
                if !filter.wants(request.space, device) || !sink.has_room(at) {
                    return Ok(());
                }
                let access = Access {
                    space: request.space,
                    addr: request.addr,
                    size: request.size.into(),
                    write: request.write,
                    data: data.to_vec(),
                    device,
                    took,
                };
                let registers = Registers::of(vcpu)?;
                let (registers, instruction) = self.habit.origin(vcpu, registers, &access);
                let what = What::Access(access);
                sink.take(&Event { at, vcpu: id, registers, instruction, what });
                self.told = true;
            }
            // The signal is no doing of the guest's, and the step was asked for by somebody else.
            None if matches!(reason, KVM_EXIT_INTR | KVM_EXIT_DEBUG) => {}
            None => {
                let mut registers = Registers::of(vcpu)?;
                if reason == KVM_EXIT_HLT {
                    registers = before_hlt(vcpu, registers);
                }
                let instruction = disasm::next(vcpu, &registers);
                let what = What::End(stats::name(reason));
                super::lock(sink).take(&Event { at, vcpu: id, registers, instruction, what });
            }
        }
        Ok(())
    }

    /// Tells what an instruction has changed, unless it has made an exit that told of it.
    fn tell_step(&mut self, vcpu: &Vcpu, at: Duration) -> Result<(), vcpu::Error> {
        let registers = Registers::of(vcpu)?;
        let Some((before, instruction)) = self.before.take() else { return Ok(()) };
        // A string instruction is stepped through element by element, and is still one instruction.
        let repeats = instruction.as_ref().is_some_and(|it| it.text.starts_with("rep"));
        if !repeats || before.linear_rip() != registers.linear_rip() {
            self.steps -= 1;
            if self.steps == 0 {
                vcpu.set_single_step(false)?;
            }
        }
        if std::mem::take(&mut self.told) {
            return Ok(());
        }
        let what = What::Step(step::changes(&before, instruction.as_ref(), &registers));
        self.trace.take(&Event { at, vcpu: vcpu.id(), registers: before, instruction, what });
        Ok(())
    }
}

/// The registers at a HLT, behind which KVM has moved on.
fn before_hlt(vcpu: &Vcpu, behind: Registers) -> Registers {
    let mut at = behind;
    at.regs.rip = behind.regs.rip.wrapping_sub(1);
    match disasm::next(vcpu, &at) {
        Some(instruction) if instruction.text == "hlt" => at,
        _ => behind,
    }
}

impl Watcher for Follower {
    fn before_run(
        &mut self,
        vcpu: &mut Vcpu,
        data: &[u8],
    ) -> Result<Option<Exit<'static>>, vcpu::Error> {
        self.leave(vcpu, data)?;
        if self.steps > 0 {
            if self.before.is_none() {
                let registers = Registers::of(vcpu)?;
                self.before = Some((registers, disasm::next(vcpu, &registers)));
            }
            vcpu.set_single_step(true)?;
        }
        self.entered = Instant::now();
        Ok(None)
    }

    fn after_run(&mut self, exit: &LastExit) -> bool {
        let stepped = self.steps > 0 && exit.reason == KVM_EXIT_DEBUG;
        let (entered, left) = (self.entered, Instant::now());
        self.pending = Some(Pending { entered, left, exit: *exit, stepped });
        stepped
    }

    fn leave(&mut self, vcpu: &mut Vcpu, data: &[u8]) -> Result<(), vcpu::Error> {
        self.pending.take().map_or(Ok(()), |pending| self.tell(vcpu, pending, data))
    }
}
