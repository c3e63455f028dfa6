//! The debugging kit of stages 03 to 08: gdb, the traces, the watchdog. Each sits in the vCPUs, around `KVM_RUN`.

use std::path::Path;

use anyhow::{Result, ensure};
use clap::Args;
use common::autopsy::Watchdog;
use common::gdb::Gdb;
use common::memory::Vm;
use common::trace::{self as traces, Devices};
use common::vcpu::Vcpu;

use crate::{autopsy, gdb, trace};

/// The command line's part of the kit.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Flags {
    #[command(flatten)]
    trace: trace::Flags,

    #[command(flatten)]
    gdb: gdb::Flags,

    #[command(flatten)]
    autopsy: autopsy::Flags,
}

impl Flags {
    /// Whether a debugger is wanted.
    pub fn wants_gdb(&self) -> bool {
        self.gdb.is_wanted()
    }

    /// Whether lines are to be printed while the guest runs.
    pub fn wants_trace(&self) -> bool {
        self.trace.is_wanted()
    }

    /// Whether everything is to be counted.
    pub fn wants_stats(&self) -> bool {
        self.trace.stats
    }

    /// Whether files are to be written, which several machines would write over.
    pub fn writes_files(&self) -> bool {
        self.trace.writes_files()
    }

    /// The same, but with `words` for a trace if nothing is said of one.
    pub fn or_trace(self, words: &str) -> Result<Self> {
        Ok(Self { trace: self.trace.or_trace(words)?, ..self })
    }

    /// Begins to look on at a machine that has neither devices nor vCPUs yet, or nobody knows of them: it will have vCPUs
    /// 0 to `vcpus` - 1. `symbols` is a file that gdb may want, and `kill` is how gdb ends the machine. What was not asked
    /// for costs nothing.
    pub fn start(
        &self,
        vm: &Vm,
        vcpus: usize,
        symbols: Option<&Path>,
        kill: impl Fn() + Send + 'static,
    ) -> Result<Kit> {
        ensure!(
            !(self.gdb.is_wanted() && self.trace.steps()),
            "--gdb and --trace=step both have the guest go step by step: leave one of them out"
        );
        let trace = self.trace.start(vm)?;
        let gdb = self.gdb.start(vcpus, symbols, kill)?;
        Ok(Kit { trace, gdb, watchdog: self.autopsy.watchdog() })
    }
}

/// Who looks on at a machine.
#[derive(Debug)]
pub struct Kit {
    trace: trace::Watch,
    /// The debugger, if there is one.
    pub gdb: Gdb,
    watchdog: Option<Watchdog>,
}

impl Kit {
    /// Has all look on at a vCPU that is about to take its first instruction. `devices` are its machine's.
    pub fn follow(&self, vcpu: &mut Vcpu, devices: &Devices) -> Result<(), traces::Error> {
        self.gdb.follow(vcpu);
        if let Some(watchdog) = &self.watchdog {
            watchdog.follow(vcpu, devices);
        }
        self.trace.follow(vcpu, devices)
    }

    /// The same for all of a machine's vCPUs.
    pub fn follow_all(&self, vcpus: &mut [Vcpu], devices: &Devices) -> Result<(), traces::Error> {
        vcpus.iter_mut().try_for_each(|vcpu| self.follow(vcpu, devices))
    }

    /// Writes, prints and draws what is to be seen at the end. What a vCPU did last is in it if it has left.
    pub fn finish(self) -> Result<()> {
        self.trace.finish()
    }
}
