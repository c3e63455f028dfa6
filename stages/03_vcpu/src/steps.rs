//! `--step`: each instruction as a line, with what it changed.

use anyhow::Result;
use cli::println;
use common::step::Moment;
use common::vcpu::Vcpu;

use crate::RAM;

/// A guest that goes step by step, if it does.
pub struct Steps {
    /// Before the instruction that comes next.
    now: Option<Moment>,
    /// There is none: HLT was the last one.
    halted: bool,
}

impl Steps {
    /// Begins where the guest stands, if that is `wanted`.
    pub fn begin(vcpu: &Vcpu, wanted: bool) -> Result<Self> {
        let now = wanted.then(|| Moment::of(vcpu, RAM)).transpose()?;
        Ok(Self { now, halted: false })
    }

    /// Has KVM come back after the next instruction.
    pub fn ask(&self, vcpu: &Vcpu) -> Result<()> {
        Ok(self.now.as_ref().map_or(Ok(()), |_| vcpu.set_single_step(true))?)
    }

    /// Prints the instruction that is done. Returns whether it was HLT: a KVM that emulates the guest reports the step over
    /// it instead of the halt.
    pub fn done(&mut self, vcpu: &Vcpu) -> Result<bool> {
        let Some(before) = &self.now else { return Ok(false) };
        let after = Moment::of(vcpu, RAM)?;
        println!("{}", before.step_to(&after));
        self.halted = before.next.as_ref().is_some_and(|done| done.text == "hlt");
        self.now = Some(after);
        Ok(self.halted)
    }

    /// Prints the instruction at which the guest ended, which was `finished` or not.
    pub fn end(self, finished: bool) {
        match self.now {
            None => {}
            Some(_) if self.halted => println!(""),
            Some(now) if finished => println!("{now}\n"),
            Some(now) => println!("{now:45} ; was never finished\n"),
        }
    }
}
