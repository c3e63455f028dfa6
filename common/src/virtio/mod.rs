//! Introduced by stage 08: virtio, devices made for virtual machines.
//!
//! What stages 04 to 07 emulate was made of metal, and costs an exit for each register. A virtio device has as few
//! registers as possible, and all data goes through *virtqueues*: rings in the guest's memory. The guest puts
//! buffers on a ring and writes to one register, which wakes a thread of the monitor by an eventfd; the device puts
//! them back when it has used them and pulses an interrupt line (VIRTIO 1.2, 2.7 "Split Virtqueues").
//!
//! ```text
//!   vCPU thread                          |  worker: a thread for each device
//!                                        |
//!   registers --> mmio (the transport)   |   worker --> a Device: rng, ...
//!     what the driver sets up            |     |          takes buffers and gives them back
//!                                        |     |
//!   QueueNotify --> ioeventfd ---------------->'--> irqfd --> the guest
//! ```
//!
//! [`mmio`] is the device's face on the bus, the same for all. [`worker`] runs a device's thread. What is
//! left for a device is its own: a type, feature bits, a few bytes of configuration, and what it does with buffers.
//! A new device is a file beside this one, and a line where the machine is put together.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::error::{Blame, Blamed};
use crate::memory::{Ram, Vm};
use crate::{bus, ioeventfd, irqfd, layout, run, snapshot};

pub mod balloon;
pub mod blk;
pub mod console;
pub mod mmio;
pub mod net;
pub mod rng;
#[cfg(test)]
mod tests;
pub mod vsock;
pub mod worker;

pub use worker::{Wake, Workers};

/// Why a machine cannot have its virtio devices.
#[derive(Debug, Error)]
pub enum Error {
    /// There are more of them than addresses.
    #[error(
        "{asked} virtio devices: a machine has room for {}; give fewer",
        layout::VIRTIO_MMIO_DEVICES
    )]
    TooMany {
        /// How many were asked for.
        asked: usize,
    },
    /// An interrupt line could not be connected.
    #[error(transparent)]
    Irqfd(#[from] irqfd::Error),
    /// A doorbell could not be connected.
    #[error(transparent)]
    Ioeventfd(#[from] ioeventfd::Error),
    /// The bus has something else there.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// Nobody could connect from the host.
    #[error("cannot listen at the Unix socket {}: {source}; name another one", .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The host gave no thread, or nothing to wait with.
    #[error("cannot start the thread of a virtio {name} device: {source}")]
    Worker {
        /// The device's name.
        name: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::TooMany { .. } | Self::Listen { .. } => Blame::Input,
            Self::Irqfd(error) => error.blame(),
            Self::Ioeventfd(error) => error.blame(),
            Self::Bus(error) => error.blame(),
            Self::Worker { .. } => Blame::Host,
        }
    }
}

/// What makes a virtio device one of its kind.
pub trait Device: Send {
    /// Its number in VIRTIO 1.2, 5 "Device Types".
    fn kind(&self) -> u32;

    /// What it is called among the exits and threads.
    fn name(&self) -> &'static str;

    /// The size of each of its queues at most: powers of two.
    fn queues(&self) -> &[u16];

    /// The feature bits that it offers, beside those of [`mmio`].
    fn features(&self) -> u64 {
        0
    }

    /// The driver reads the device's configuration. `data` comes filled with zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// The driver writes to the device's configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// It is given what its thread waits with, once, before the guest runs. A device that works with more than its
    /// queues, such as a network interface, has it watch that, too.
    fn plug(&mut self, wake: Wake) -> io::Result<()> {
        let _ = wake;
        Ok(())
    }

    /// The driver is ready and has chosen `features`.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// Something has happened: the driver has put buffers on a ring, or what the device watches has changed. Which
    /// of them, isn't said: the device does all that can be done now, and doesn't wait.
    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken>;

    /// The driver begins anew: what the device holds of its former life goes.
    fn reset(&mut self) {}

    /// Does what it has told the driver is done, if it has put that off: the machine has ended, and is to be saved.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What goes into a snapshot of it, beside its queues, which are in the guest's memory and with [`mmio`].
    fn keep(&self) -> Value {
        Value::Null
    }

    /// Takes that back. It has been activated, if it was then.
    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let _ = state;
        Ok(())
    }
}

/// Copies what of `config` stands at `offset` into `data`, for [`Device::read_config`].
pub fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let there = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    for (to, from) in data.iter_mut().zip(there.unwrap_or_default()) {
        *to = *from;
    }
}

/// The driver broke the rules: its rings or buffers make no sense. The device does nothing more until it is reset
/// (VIRTIO 1.2, 2.1.1: DEVICE_NEEDS_RESET).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the driver's {0}")]
pub struct Broken(pub &'static str);

/// Some buffers that the driver has put on a ring together: first what the device may read, then what it may write.
pub type Chain<'a> = DescriptorChain<&'a Ram>;

/// A device's queues while it is served.
pub struct Rings<'a> {
    ram: &'a Ram,
    queues: &'a mut [Queue],
    /// The queues on which something was given back, a bit each.
    used: u64,
    /// Whether the driver is to be told, however often it wants to be.
    interrupt: bool,
    stop: &'a AtomicBool,
}

impl<'a> Rings<'a> {
    /// The guest's memory, in which the buffers lie.
    pub fn ram(&self) -> &'a Ram {
        self.ram
    }

    /// The next chain of `queue`, if the driver has put one there: of no more descriptors than the queue may have.
    pub fn take(&mut self, queue: usize) -> Result<Option<Chain<'a>>, Broken> {
        let Some(queue) = self.queues.get_mut(queue).filter(|queue| queue.ready()) else {
            return Ok(None);
        };
        // A guest that fills the ring quicker than it is emptied must not keep the machine from ending.
        if self.stop.load(Ordering::Acquire) {
            return Ok(None);
        }
        let longest = usize::from(queue.max_size());
        let mut chains =
            queue.iter(self.ram).map_err(|_| Broken("available ring is longer than its queue"))?;
        let Some(chain) = chains.next() else { return Ok(None) };
        // Whoever reads or writes it keeps an entry for each descriptor, and an indirect table has room for 65535
        // (VIRTIO 1.2, 2.7.5.3.1: no chain is longer than the queue size).
        if chain.clone().nth(longest).is_some() {
            return Err(Broken("chain is longer than its queue"));
        }
        Ok(Some(chain))
    }

    /// Undoes the last [`take`](Self::take) from `queue`.
    pub fn put_back(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }

    /// Gives the chain that began with the descriptor `head` back to the driver, with `written` bytes in it.
    pub fn give(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        self.queues[queue]
            .add_used(self.ram, head, written)
            .map_err(|_| Broken("chain begins beyond its queue"))?;
        self.used |= 1 << queue;
        Ok(())
    }

    /// Gives several chains back, each with the number of bytes in it, of which the driver is to see all or
    /// none: the pieces of one network packet.
    pub fn give_all(&mut self, queue: usize, chains: &[(u16, u32)]) -> Result<(), Broken> {
        let Some((&(head, written), others)) = chains.split_last() else { return Ok(()) };
        let ring = &mut self.queues[queue];
        // What stands behind the ring's index the driver does not look at (VIRTIO 1.2, 2.7.8 "The Virtqueue Used
        // Ring"): the others go there first, and the last one brings the index behind all of them.
        for &(head, written) in others {
            if head >= ring.size() {
                return Err(Broken("chain begins beyond its queue"));
            }
            let entry = u64::from(ring.next_used() % ring.size());
            // struct virtq_used_elem: le32 id, le32 len.
            let element = (u64::from(head) | u64::from(written) << 32).to_le();
            self.ram
                .write_obj(element, GuestAddress(ring.used_ring() + 4 + 8 * entry))
                .map_err(|_| Broken("rings are not in its memory"))?;
            ring.set_next_used(ring.next_used().wrapping_add(1));
        }
        // The queue hasn't counted them, and can't tell whether the driver waits for one of them.
        self.interrupt |= !others.is_empty();
        self.give(queue, head, written)
    }
}

/// A machine's virtio devices, in the order in which the guest finds them.
#[derive(Default)]
pub struct Devices(Vec<Box<dyn Device>>);

impl Devices {
    /// Adds one.
    pub fn add(&mut self, device: impl Device + 'static) {
        self.0.push(Box::new(device));
    }

    /// How many there are with `more` that are still to come, if there is room for them.
    pub fn count(&self, more: usize) -> Result<usize, Error> {
        let asked = self.0.len() + more;
        if asked > layout::VIRTIO_MMIO_DEVICES { Err(Error::TooMany { asked }) } else { Ok(asked) }
    }
}

/// Puts `devices` into the machine, each at the place that [`layout::virtio_mmio`] gives to its number, and starts
/// their threads, which end when the result is dropped. Comes after the irqchip.
///
/// A thread that panics ends the machine through `stop`. Snapshots find the devices in `kept`.
pub fn plug(
    vm: &Vm,
    mmio: &mut bus::Bus,
    devices: Devices,
    stop: &run::Stop,
    kept: &mut snapshot::Devices,
) -> Result<Workers, Error> {
    devices.count(0)?;
    let mut workers = Workers::default();
    // ANCHOR: plug
    for (number, device) in devices.0.into_iter().enumerate() {
        let name = device.name();
        let (range, gsi) = layout::virtio_mmio(number);
        let line = irqfd::Irqfd::new(vm, gsi)?;
        let failed = |source| Error::Worker { name, source };
        let core = worker::Core::new(device, vm.ram(), Box::new(line)).map_err(failed)?;
        core.wake.connect(vm, range.start + mmio::QUEUE_NOTIFY)?;
        let registers = bus::shared(mmio::Mmio::new(core.clone()));
        mmio.insert(name, range, registers.clone())?;
        kept.add(format!("{name} ({number})"), registers);
        workers.start(core, stop, vm.trace().cloned()).map_err(failed)?;
    }
    // ANCHOR_END: plug
    Ok(workers)
}
