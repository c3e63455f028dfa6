//! What our bus adds to an exit: `KVM_RUN` and the bus, against `KVM_RUN` and nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use common::bus::{Bus, Shared, shared};
use common::layout::{PROGRAM, SCRATCH, TEXT_SCREEN, VGA_HOLE};
use common::memory::Vm;
use common::scratch::Scratch;
use common::text_screen::{self, TextScreen};
use common::vcpu::{Exit, Vcpu};
use kvm_ioctls::VcpuFd;
use vm_memory::Bytes;

use crate::{Row, median, micros};

/// Exits that are timed in one go: few, so that a disturbance spoils few of them.
const BATCH: u64 = 50;

/// How many goes each loop gets, in turn with the other.
const ROUNDS: usize = 1001;

/// The port that `asm/real/many_outs.asm` writes to.
const PORT: u64 = 0x100;

/// Port I/O and memory-mapped I/O.
pub fn rows() -> Result<Vec<Row>> {
    Ok(vec![row("pio", asm::real::MANY_OUTS)?, row("mmio", asm::real::MANY_WRITES)?])
}

fn row(kind: &str, program: &[u8]) -> Result<Row> {
    let mut loops = Loops::new(program)?;
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let pair = (loops.bare()?, loops.ours()?);
        // The first round finds cold caches.
        if round > 0 {
            bare.push(pair.0);
            ours.push(pair.1);
        }
    }
    loops.check(BATCH * (ROUNDS as u64 + 1))?;
    let each = |times: &mut Vec<Duration>| micros(median(times)) / BATCH as f64;
    let (bare, ours) = (each(&mut bare), each(&mut ours));
    Ok(Row {
        name: format!("exit/{kind}"),
        what: format!(
            "one {} exit through our bus against a bare KVM_RUN loop",
            kind.to_uppercase()
        ),
        value: ours / bare,
        unit: "x",
        aim: Some(1.05),
        detail: format!("{ours:.2} us against {bare:.2} us"),
        runs: ROUNDS,
    })
}

/// Two vCPUs that run the same program, which does nothing but exit; a loop around each.
struct Loops {
    ours: Vcpu,
    bare: VcpuFd,
    ports: Bus,
    memory: Bus,
    device: Shared<Scratch>,
}

impl Loops {
    fn new(program: &[u8]) -> Result<Self> {
        let kvm = common::kvm::open()?;
        let vm = Vm::with_ram(&kvm, VGA_HOLE.0)?;
        vm.ram().write_slice(program, PROGRAM)?;
        let ours = Vcpu::new(&vm, 0)?;
        let cpuid = ours.set_supported_cpuid(&kvm)?;
        ours.start_real_mode(PROGRAM)?;
        let bare = vm.fd().create_vcpu(1)?;
        bare.set_cpuid2(&cpuid)?;
        bare.set_sregs(&ours.sregs()?)?;
        bare.set_regs(&ours.regs()?)?;

        // The device under test has a neighbour, as in stages 04 and 05.
        let (mut ports, mut memory) = (Bus::new(), Bus::new());
        let device = shared(Scratch::new(0x1000));
        ports.insert("scratch", PORT..PORT + 4, device.clone())?;
        ports.insert("neighbour", 0x3F8..0x400, shared(Scratch::new(8)))?;
        memory.insert("scratch", SCRATCH.0..SCRATCH.0 + 0x1000, device.clone())?;
        let range = TEXT_SCREEN.0..TEXT_SCREEN.0 + text_screen::SIZE as u64;
        memory.insert("neighbour", range, shared(TextScreen::new()))?;
        Ok(Self { ours, bare, ports, memory, device })
    }

    /// Nothing looks at why `KVM_RUN` came back.
    fn bare(&mut self) -> Result<Duration> {
        let began = Instant::now();
        for _ in 0..BATCH {
            self.bare.run()?;
        }
        Ok(began.elapsed())
    }

    /// The loop of stages 04 and 05.
    fn ours(&mut self) -> Result<Duration> {
        let began = Instant::now();
        for _ in 0..BATCH {
            match self.ours.run()? {
                Exit::IoOut { port, data, .. } => self.ports.write(port.into(), data),
                Exit::IoIn { port, data, .. } => self.ports.read(port.into(), data),
                Exit::MmioWrite { addr, data } => self.memory.write(addr, data),
                Exit::MmioRead { addr, data } => self.memory.read(addr, data),
                _ => None,
            };
        }
        Ok(began.elapsed())
    }

    /// Both loops have seen `exits` exits, each of them a write: the guests count down from 2^32 in ECX,
    /// and the device behind the bus has counted too.
    fn check(&self, exits: u64) -> Result<()> {
        let arrived = self.device.lock().expect("no thread panicked").writes();
        ensure!(arrived == exits, "{arrived} of {exits} writes reached the device");
        for rcx in [self.bare.get_regs()?.rcx, self.ours.regs()?.rcx] {
            // The last write has exited; its instruction ends with the next KVM_RUN.
            let done = 0_u32.wrapping_sub(rcx as u32);
            ensure!(u64::from(done) + 1 == exits, "{done} of {exits} writes were made");
        }
        Ok(())
    }
}
