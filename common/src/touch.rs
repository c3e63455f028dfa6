//! Introduced by stage 02: a guest that reads and writes its memory on order.
//!
//! What a memslot is shows only when a guest touches it. How a guest runs is stage 03's subject, so its
//! vCPU stays in here, a black box: an address goes in, and what the guest found there comes out.

use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _};

use crate::deadline::{self, Deadline};
use crate::error::{Blame, Blamed};
use crate::layout::PROGRAM;
use crate::memory::Vm;
use crate::vcpu::{self, Exit, Vcpu};

/// The guest's code and page tables: RAM that it needs from address 0 on, in bytes.
pub const RAM_NEEDED: u64 = 0x1_5000;

/// Far above the microseconds that one order takes.
const LIMIT: Duration = Duration::from_secs(5);

/// The port by which the guest (`asm/long/touch.asm`) takes its orders and answers.
const PORT: u16 = 0x14;

/// Why the guest could not touch what it was to touch.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no room for it.
    #[error("the guest that touches memory needs 84 KiB of RAM: give a larger --memory")]
    Small,
    /// Its vCPU could not be made or run.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// No time limit could be set.
    #[error(transparent)]
    Deadline(#[from] deadline::Error),
    /// It did something else than it was told.
    #[error("the guest that touches memory ended with {0}")]
    Guest(String),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Small => Blame::Input,
            Self::Vcpu(_) | Self::Deadline(_) | Self::Guest(_) => Blame::Host,
        }
    }
}

/// What one access of the guest met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// Memory: the value that was read, or written. The host noticed nothing.
    Memory(u32),
    /// `KVM_EXIT_MMIO`: no slot is there, or it is read-only and was to be written. Nothing happened to
    /// any memory, and the access was handed to the host.
    Exit,
}

/// The guest. It keeps its VM alive.
#[derive(Debug)]
pub struct Touch {
    vcpu: Vcpu,
}

impl Touch {
    /// Puts the guest `program`, which is `asm::long::TOUCH`, into the VM's RAM and starts it. The VM gets a
    /// vCPU, so it can be done once for each.
    pub fn new(kvm: &Kvm, vm: &Arc<Vm>, program: &[u8]) -> Result<Self, Error> {
        let ram = vm.ram();
        if !ram.check_range(GuestAddress(0), RAM_NEEDED as usize) {
            return Err(Error::Small);
        }
        ram.write_slice(program, PROGRAM).map_err(|_| Error::Small)?;
        let vcpu = Vcpu::new(vm, 0)?;
        vcpu.set_supported_cpuid(kvm)?;
        vcpu.start_real_mode(PROGRAM)?;
        let mut touch = Self { vcpu };
        // Up to its first HLT it only sets itself up.
        touch.run(&[]).map(|_| touch)
    }

    /// The guest reads 32 bits at `addr`, a multiple of 4.
    pub fn read(&mut self, addr: GuestAddress) -> Result<Met, Error> {
        self.order(0, addr, 0)
    }

    /// The guest writes 32 bits at `addr`, a multiple of 4.
    pub fn write(&mut self, addr: GuestAddress, value: u32) -> Result<Met, Error> {
        self.order(1, addr, value)
    }

    fn order(&mut self, what: u32, addr: GuestAddress, value: u32) -> Result<Met, Error> {
        let (low, high) = (addr.0 as u32, (addr.0 >> 32) as u32);
        let (said, exits) = self.run(&[what, low, high, value])?;
        Ok(match (exits, said) {
            (0, said) => Met::Memory(said.unwrap_or(value)),
            _ => Met::Exit,
        })
    }

    // ANCHOR: run
    /// Runs it to its next HLT, with `words` as its input. Gives what it said and how often it met no
    /// memory.
    fn run(&mut self, words: &[u32]) -> Result<(Option<u32>, u32), Error> {
        let deadline = Deadline::new(Some(LIMIT))?;
        let (mut words, mut said, mut exits) = (words.iter(), None, 0);
        loop {
            match self.vcpu.run()? {
                Exit::IoIn { port: PORT, size: 4, data } if data.len() == 4 => {
                    let word = words.next().copied().unwrap_or(0);
                    data.copy_from_slice(&word.to_le_bytes());
                }
                Exit::IoOut { port: PORT, data: &[a, b, c, d], .. } => {
                    said = Some(u32::from_le_bytes([a, b, c, d]));
                }
                Exit::MmioRead { data, .. } => {
                    data.fill(0xFF);
                    exits += 1;
                }
                Exit::MmioWrite { .. } => exits += 1,
                Exit::Hlt => return Ok((said, exits)),
                Exit::Interrupted if !deadline.passed() => {}
                exit => return Err(Error::Guest(format!("{exit:?}"))),
            }
        }
    }
    // ANCHOR_END: run
}
