//! Introduced by stage 03: a guest that died, run once more under watch.
//!
//! A triple fault may take the registers with it: on AMD the processor leaves its state undefined, and KVM puts the
//! vCPU back to where it was after reset (AMD APM vol. 2, 15.14.3 "Shutdown Intercept"). What the guest did is not lost: it is
//! what its machine's beginning and the answers of its devices make of it. So the machine is made again, runs at full
//! speed with the answers of the [`Journal`] up to the last exit that it survived, and from there on step by step.
//!
//! That is sound only as far as the second run is the first one: each exit is compared with that of the first run,
//! and the second run has to end in the same way. A guest with interrupts, with a second processor or with a device that writes into its
//! memory may take another way; then the registers at its death stay unknown, and that is said.

use std::collections::VecDeque;
use std::error::Error;
use std::time::{Duration, Instant};

use iced_x86::Mnemonic;
use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_EXIT_SHUTDOWN, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug, kvm_regs,
};
use thiserror::Error;

use super::delivery::{Chain, Handler};
use super::fault::{Next, Scene};
use crate::deadline::{self, Deadline};
use crate::journal::Journal;
use crate::memory::Ram;
use crate::regs::Registers;
use crate::vcpu::{self, Exit, Vcpu};

/// How long a guest is watched.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many instructions of the last stretch are kept.
const TRAIL: usize = 8;

/// How deep exceptions within handlers of exceptions are followed.
const NESTED: usize = 64;

/// Why the second run does not tell how the first one ended.
#[derive(Debug, Error)]
pub enum Unknown {
    /// There is nobody who could make the machine again.
    #[error("a machine with several processors, and one that was restored, are not run again")]
    NotRepeatable,
    /// The guest made more exits than are kept.
    #[error("it made too many exits before to be run again")]
    TooManyExits,
    /// The machine cannot be made again.
    #[error("its machine cannot be made again: {0}")]
    Make(Box<dyn Error + Send + Sync>),
    /// A vCPU ioctl failed.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// No deadline could be set.
    #[error(transparent)]
    Deadline(#[from] deadline::Error),
    /// It went another way.
    #[error(
        "run again, it went another way at exit {0}: interrupts or the time of day decide what it does"
    )]
    Diverged(usize),
    /// It ran on.
    #[error(
        "run again, it did not die within {PATIENCE:?} and {0} single steps behind its last exit"
    )]
    TooLong(u64),
}

/// The end of the second run.
#[derive(Debug)]
pub struct Replay {
    /// The registers before the instruction that was not finished.
    pub registers: Registers,
    /// The memory then.
    pub ram: Ram,
    /// Where the last instructions stood, the latest last; not the one that was not finished.
    pub trail: Vec<Registers>,
    /// Exceptions that reached handlers which had not returned, the first one first.
    pub handled: Vec<Chain>,
    /// How many more there were of those.
    pub more_handled: usize,
    /// How many instructions it was from the last exit to the end.
    pub steps: u64,
}

/// Makes the machine again that a vCPU ran in, with the vCPU where it began.
pub type Again<'a> = dyn FnMut() -> Result<Vcpu, Box<dyn Error + Send + Sync>> + 'a;

/// Runs a guest again that ended in a triple fault.
pub fn replay(journal: &Journal, again: &mut Again) -> Result<Replay, Unknown> {
    let exits: Vec<_> = journal.exits().ok_or(Unknown::TooManyExits)?.collect();
    let mut vcpu = again().map_err(Unknown::Make)?;
    let deadline = Deadline::new(Some(PATIENCE))?;

    // At full speed, up to the last exit but the triple fault.
    let mut answers = journal.answers();
    let survived = exits.iter().take_while(|(reason, _)| *reason != KVM_EXIT_SHUTDOWN).count();
    for (number, (reason, request)) in exits[..survived].iter().enumerate() {
        loop {
            match vcpu.run()? {
                Exit::Interrupted if deadline.passed() => return Err(Unknown::TooLong(0)),
                Exit::Interrupted => continue,
                Exit::IoIn { data, .. } | Exit::MmioRead { data, .. } => {
                    let (answer, rest) = answers
                        .split_at_checked(data.len())
                        .ok_or(Unknown::Diverged(number + 1))?;
                    data.copy_from_slice(answer);
                    answers = rest;
                }
                _ => {}
            }
            break;
        }
        let same = vcpu.last_exits().iter().next_back();
        if same.is_none_or(|exit| (exit.reason, exit.request) != (*reason, *request)) {
            return Err(Unknown::Diverged(number + 1));
        }
    }
    finish(&mut vcpu)?;
    watch(vcpu, &deadline, survived)
}

/// From the last exit on, an instruction at a time.
fn watch(mut vcpu: Vcpu, deadline: &Deadline, exits: usize) -> Result<Replay, Unknown> {
    let ram = vcpu.vm().ram();
    let debug = vcpu.vm().fd().check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
    let block_irq = if debug > 0 { debug as u32 & KVM_GUESTDBG_BLOCKIRQ } else { 0 };
    let began = Instant::now();
    let (mut trail, mut handled) = (VecDeque::with_capacity(TRAIL + 1), Vec::new());
    let (mut more_handled, mut steps) = (0, 0);
    loop {
        let registers = Registers::of(&vcpu)?;
        let scene = Scene::new(&ram, &registers);
        // Stepping loses the guest where it takes an exception: the handler runs with RFLAGS.TF clear. So such a step is
        // foreseen, and a trap set where the handler begins.
        let chain = match scene.next() {
            Next::Raises(exception) => Some(Chain::of(&scene, exception)),
            _ => None,
        };
        let handler = chain.as_ref().and_then(|chain| chain.handler);
        let returns = scene.decoded().is_some_and(|it| {
            matches!(it.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
        });
        let trap = handler.and_then(|handler| Trap::set(&scene, handler));
        let control = match trap {
            Some(_) => 0,
            None => KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | block_irq,
        };
        let debug = kvm_guest_debug { control, ..Default::default() };
        vcpu.fd().set_guest_debug(&debug).map_err(|source| vcpu::Error::Ioctl {
            ioctl: "KVM_SET_GUEST_DEBUG",
            vcpu: vcpu.id(),
            source,
        })?;
        let ended = loop {
            match vcpu.run()? {
                Exit::Debug(_) if trap.is_none() => break false,
                Exit::IoOut { port: 0x80, .. } if trap.is_some() => break false,
                Exit::Shutdown => break true,
                Exit::Interrupted if deadline.passed() || began.elapsed() > PATIENCE => {
                    return Err(Unknown::TooLong(steps));
                }
                Exit::Interrupted => {}
                _ => return Err(Unknown::Diverged(exits + 1)),
            }
        };
        if let Some(trap) = trap {
            trap.clear(&scene, (!ended).then_some(&mut vcpu))?;
        }
        if ended {
            let trail = trail.into();
            return Ok(Replay { registers, ram, trail, handled, more_handled, steps });
        }
        steps += 1;
        match (handler, chain) {
            (Some(_), Some(chain)) if handled.len() < NESTED => handled.push(chain),
            (Some(_), _) => more_handled += 1,
            _ if returns && more_handled > 0 => more_handled -= 1,
            _ if returns => {
                handled.pop();
            }
            _ => {}
        }
        trail.push_back(registers);
        if trail.len() > TRAIL {
            trail.pop_front();
        }
    }
}

/// OUT in the place of a handler's first instruction: an exit in every ring 0, with every KVM. (INT3 is none in the
/// lab: QEMU's emulated SVM does not intercept #BP when it is INT3 that raises it.)
struct Trap {
    handler: Handler,
    bytes: [u8; 2],
}

impl Trap {
    /// `out 0x80, al`; nothing in KVM answers that port.
    const OUT: [u8; 2] = [0xE6, 0x80];

    /// None where the handler is not in RAM.
    fn set(scene: &Scene, handler: Handler) -> Option<Self> {
        let mut bytes = [0; 2];
        let there = scene.paging.read(scene.ram, handler.linear, &mut bytes) == bytes.len();
        let set = there && scene.paging.write(scene.ram, handler.linear, &Self::OUT) == bytes.len();
        set.then_some(Self { handler, bytes })
    }

    /// Takes it out again; if the vCPU met it, has it stand there, and not behind it.
    fn clear(self, scene: &Scene, met: Option<&mut Vcpu>) -> Result<(), Unknown> {
        if let Some(vcpu) = met {
            finish(vcpu)?;
            let regs = kvm_regs { rip: self.handler.rip, ..vcpu.regs()? };
            vcpu.set_regs(&regs)?;
        }
        scene.paging.write(scene.ram, self.handler.linear, &self.bytes);
        Ok(())
    }
}

/// Has KVM finish the instruction behind the last exit, which it does when it is called again.
fn finish(vcpu: &mut Vcpu) -> Result<(), Unknown> {
    vcpu.set_immediate_exit(true);
    let finished = matches!(vcpu.run()?, Exit::Interrupted);
    vcpu.set_immediate_exit(false);
    if finished { Ok(()) } else { Err(Unknown::Diverged(vcpu.last_exits().count() as usize)) }
}
