//! Stage 05: memory-mapped I/O. Where no memslot is, an access exits, and a device answers.
//!
//! The machine has 640 KiB of RAM, a ROM, and between them three devices on a bus of memory
//! addresses. Read `machine` from top to bottom; what is around it chooses the guest and prints.

mod demos;

use std::collections::BTreeMap;
use std::io;
use std::process;
use std::time::{Duration, Instant};

use anyhow::Result;
use cli::screen::Viewer;
use cli::{CannotPrint, Ended, gdb};
use common::autopsy::Cause;
use common::bus::{Bus, shared};
use common::coalesced::Ring;
use common::deadline::Deadline;
use common::doorbell::{self, Doorbell};
use common::hypercall::{self, DebugExit, ExitCode};
use common::ioeventfd::Ioeventfd;
use common::irqfd::{Irqfd, create_irqchip};
use common::layout::{
    DOORBELL, DOORBELL_GSI, PROGRAM, ROM, ROM_SIZE, SCRATCH, TEXT_SCREEN, VGA_HOLE,
};
use common::memory::{SlotFlags, Vm};
use common::scratch::Scratch;
use common::serial::{self, Serial};
use common::teletype::Teletype;
use common::text_screen::{self, TextScreen};
use common::trace::Devices;
use common::vcpu::{Exit, Vcpu};
use demos::{Delivery, Guest};
use kvm_bindings::kvm_regs;
use kvm_ioctls::Kvm;
use vm_memory::Bytes;

/// Two pages, so that an access can cross from one to the other.
const SCRATCH_SIZE: u64 = 0x2000;

/// What stands in the ROM.
const ROM_TEXT: &[u8] =
    b"This text is in a ROM: a memslot that the guest may read but not write.\0";

fn main() -> process::ExitCode {
    cli::main(|args| demos::run(&args))
}

/// What a machine did until it ended.
struct Report {
    ended: Ended,
    /// From the first `KVM_RUN` to the last exit.
    time: Duration,
    /// How often `KVM_RUN` came back, by what it came back for.
    exits: BTreeMap<&'static str, u64>,
    /// How many of the guest's writes reached the scratch registers, in whichever way.
    arrived: u64,
    /// The vCPU of a guest that died, and how it did.
    dead: Option<(Vcpu, Cause)>,
}

/// A machine at its beginning, with the guest's program in it.
fn boot(kvm: &Kvm, guest: &Guest) -> Result<Vcpu> {
    // ANCHOR: machine
    // RAM from 0 up to where a PC has its video card; the ROM at the end of the first megabyte. In
    // between no memslot is: those addresses belong to devices.
    let vm = Vm::with_ram(kvm, VGA_HOLE.0)?;
    vm.add_slot(1, ROM, ROM_SIZE, SlotFlags { read_only: true, ..SlotFlags::default() })?;
    vm.ram().write_slice(ROM_TEXT, ROM)?;
    vm.ram().write_slice(&guest.program, PROGRAM)?;

    // The interrupt controllers come after the memory and before the vCPU.
    create_irqchip(&vm)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    // ANCHOR_END: machine
    vcpu.set_supported_cpuid(kvm)?;
    vcpu.start_real_mode(PROGRAM)?;
    vcpu.set_regs(&kvm_regs { rcx: guest.rcx, ..vcpu.regs()? })?;
    Ok(vcpu)
}

/// Runs `guest` in a machine of its own.
fn machine(guest: &Guest, delivery: Delivery, timeout: Option<Duration>) -> Result<Report> {
    let kvm = common::kvm::open()?;
    let mut vcpu = boot(&kvm, guest)?;
    let vm = vcpu.vm().clone();
    let kit = guest.debug.start(&vm, 1, None, gdb::exit)?;

    // ANCHOR: devices
    // The devices, each at its addresses.
    let screen = shared(TextScreen::new());
    let scratch = shared(Scratch::new(SCRATCH_SIZE as usize));
    let bell = shared(Doorbell::new(Irqfd::new(&vm, DOORBELL_GSI)?));
    let mut bus = Bus::new();
    bus.insert("scratch", SCRATCH.0..SCRATCH.0 + SCRATCH_SIZE, scratch.clone())?;
    bus.insert(
        "text screen",
        TEXT_SCREEN.0..TEXT_SCREEN.0 + text_screen::SIZE as u64,
        screen.clone(),
    )?;
    bus.insert("doorbell", DOORBELL.0..DOORBELL.0 + doorbell::SIZE, bell)?;
    // ANCHOR_END: devices

    // The ports of stage 04.
    let (exit, tty) = (ExitCode::default(), Teletype::new(io::stdout()));
    tty.end_of_input();
    let mut ports = Bus::new();
    ports.insert("debug exit", hypercall::DEBUG_EXIT, shared(DebugExit(exit.clone())))?;
    ports.insert("serial port", serial::PORTS, shared(Serial::new(tty.clone())))?;

    // ANCHOR: savers
    // Two ways to save exits, for writes to the scratch registers: KVM collects them in a ring, or it only
    // counts them.
    let ring = Ring::map(&vcpu)?;
    let mut counter = None;
    match delivery {
        Delivery::Exits => {}
        Delivery::Coalesced => ring.collect(&vcpu, SCRATCH.0..SCRATCH.0 + SCRATCH_SIZE)?,
        Delivery::Ioeventfd => counter = Some(Ioeventfd::new(&vm, SCRATCH.0)?),
    }
    // ANCHOR_END: savers

    kit.follow(&mut vcpu, &Devices::of(&ports, &bus))?;
    let viewer = Viewer::start(&screen, !guest.debug.wants_trace());
    let deadline = Deadline::new(timeout)?;
    let (mut exits, mut cause) = (BTreeMap::new(), None);
    let start = Instant::now();
    let ended = loop {
        // ANCHOR: exits
        let back = vcpu.run()?;
        // What KVM has collected was written before this.
        ring.drain(|addr, data| {
            bus.write(addr, data);
        })?;
        let reason = match back {
            Exit::MmioRead { addr, data } => bus.read(addr, data).unwrap_or("nobody"),
            Exit::MmioWrite { addr, data } => bus.write(addr, data).unwrap_or("nobody"),
            // ANCHOR_END: exits
            Exit::IoOut { port, size, data } => {
                ports.write_each(port.into(), size, data);
                match exit.get() {
                    Some(0) => break Ended::Well,
                    Some(_) => break Ended::GuestCrashed,
                    None => "a port",
                }
            }
            Exit::IoIn { port, size, data } => {
                ports.read_each(port.into(), size, data);
                "a port"
            }
            Exit::Interrupted if deadline.passed() => break Ended::TimedOut,
            // A signal: the guest has done nothing.
            Exit::Interrupted => continue,
            crash => {
                cli::eprintln!("error: the guest crashed: {crash}");
                cause = Cause::of(&crash);
                break Ended::GuestCrashed;
            }
        };
        *exits.entry(reason).or_default() += 1;
    };
    let time = start.elapsed();
    vcpu.leave()?;
    tty.flush().and_then(|()| viewer.finish()).map_err(CannotPrint)?;
    kit.finish()?;
    let counted = counter.map_or(Ok(0), |counter| counter.take())?;
    let arrived = scratch.lock().expect("no thread panicked").writes() + counted;
    Ok(Report { ended, time, exits, arrived, dead: cause.map(|cause| (vcpu, cause)) })
}
