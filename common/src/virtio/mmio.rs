//! Introduced by stage 08: the virtio transport over MMIO: the registers by which a driver finds a device, agrees
//! with it on features, and shows it its queues (VIRTIO 1.2, 4.2 "Virtio Over MMIO").
//!
//! A driver goes through these steps, each with a bit in Status (VIRTIO 1.2, 3.1 "Device Initialization"): it has
//! noticed the device (ACKNOWLEDGE), knows how to drive it (DRIVER), has chosen features (FEATURES_OK), has set up its
//! queues (DRIVER_OK). Status 0 is a reset. Out of their order the registers do nothing: above all, a queue does not
//! move once the device works with it.

use std::io;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT as _};

use super::worker::{Core, State};
use crate::bus;
use crate::snapshot::{self, Keep};

// The registers' offsets (VIRTIO 1.2, 4.2.2 "MMIO Device Register Layout").
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00C;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Whatever is written here rings the device's bell; KVM does that itself, without an exit.
pub const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0A0;
const QUEUE_DEVICE_HIGH: u64 = 0x0A4;
const SHM_LEN_LOW: u64 = 0x0B0;
const SHM_BASE_HIGH: u64 = 0x0BC;
const CONFIG_GENERATION: u64 = 0x0FC;
const CONFIG: u64 = 0x100;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface, which has 1.
const MODERN: u32 = 2;
/// "MKVM". Any number will do.
const VENDOR: u32 = 0x4D56_4B4D;

/// What all devices offer: descriptors in tables of their own, and bells and interrupts only when they matter.
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A device's registers.
pub struct Mmio {
    core: Arc<Core>,
    device_features_sel: u32,
    driver_features_sel: u32,
    /// What the driver has chosen.
    driver_features: u64,
    queue_sel: u32,
}

impl Mmio {
    /// The registers of the device in `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        }
    }

    /// The driver is done. The device works from now on, if all of each ring lies in memory, not only its first byte.
    fn activate(&self, state: &mut State) {
        let ram = self.core.ram();
        if state.queues.iter().any(|queue| queue.ready() && !queue.is_valid(ram)) {
            state.status |= NEEDS_RESET;
            return;
        }
        state.status |= DRIVER_OK;
        state.device.activate(self.driver_features);
        self.core.wake.now();
    }

    fn read_register(&self, offset: u64) -> u32 {
        let offered = |state: &State| FEATURES | state.device.features();
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => MODERN,
            DEVICE_ID => self.core.lock().device.kind(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(offered(&self.core.lock()), self.device_features_sel),
            QUEUE_NUM_MAX => self.queue(|queue| queue.max_size().into()),
            QUEUE_READY => self.queue(|queue| queue.ready().into()),
            INTERRUPT_STATUS => self.core.wake.interrupts(),
            STATUS => self.core.lock().status,
            // A region of -1 bytes is none.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.core.wake.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES if self.core.lock().status & FEATURES_OK == 0 => {
                let shift = match self.driver_features_sel {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let other = self.driver_features & !(u64::from(u32::MAX) << shift);
                self.driver_features = other | u64::from(value) << shift;
            }
            QUEUE_SEL => self.queue_sel = value,
            QUEUE_NOTIFY => self.core.wake.now(),
            INTERRUPT_ACK => self.core.wake.acknowledge(value),
            STATUS => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    /// What the selected queue says; 0 if there is none.
    fn queue(&self, ask: impl FnOnce(&Queue) -> u32) -> u32 {
        self.core.lock().queues.get(self.queue_sel as usize).map_or(0, ask)
    }

    /// Sets the selected queue up. It can be while features are chosen and the device does not work yet.
    fn write_queue(&self, offset: u64, value: u32) {
        let mut state = self.core.lock();
        if state.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET) != FEATURES_OK {
            return;
        }
        let Some(queue) = state.queues.get_mut(self.queue_sel as usize) else { return };
        if offset == QUEUE_READY {
            queue.set_ready(value & 1 == 1);
        }
        if queue.ready() {
            return;
        }
        match offset {
            // What isn't a power of two, or too large, or misaligned, changes nothing: `virtio_queue` sees to that.
            QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        let mut state = self.core.lock();
        if value == 0 {
            state.device.reset();
            state.queues.iter_mut().for_each(Queue::reset);
            state.status = 0;
            self.core.wake.acknowledge(u32::MAX);
            self.driver_features = 0;
            return;
        }
        // A driver adds bits; it takes none away.
        let new = value & !state.status & !NEEDS_RESET;
        if state.status & NEEDS_RESET != 0 {
            return;
        }
        state.status |= new & !(FEATURES_OK | DRIVER_OK);
        if new & FEATURES_OK != 0 {
            let offered = FEATURES | state.device.features();
            let chosen = self.driver_features;
            // The driver reads Status to see whether the device takes its choice.
            if chosen & !offered == 0 && chosen & 1 << VIRTIO_F_VERSION_1 != 0 {
                state.status |= FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && state.status & FEATURES_OK != 0 {
            let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            state.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            self.activate(&mut state);
        }
    }
}

/// The lower or the upper 32 bits of 64, or none.
fn half(bits: u64, which: u32) -> u32 {
    match which {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

impl bus::Device for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.lock().device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            // Registers have 32 bits and are only read as a whole.
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.lock().device.write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

/// A device as it stands in a snapshot.
#[derive(Serialize, Deserialize)]
struct Kept {
    kind: u32,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupts: u32,
    generation: u32,
    queues: Vec<KeptQueue>,
    device: Value,
}

#[derive(Serialize, Deserialize)]
struct KeptQueue(#[serde(with = "QueueFields")] QueueState);

/// [`QueueState`], for serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "QueueState")]
struct QueueFields {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Keep for Mmio {
    fn settle(&mut self) -> io::Result<()> {
        self.core.lock().device.settle()
    }

    fn keep(&self) -> Value {
        let state = self.core.lock();
        let kept = Kept {
            kind: state.device.kind(),
            status: state.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupts: self.core.wake.interrupts(),
            generation: self.core.wake.generation(),
            queues: state.queues.iter().map(|queue| KeptQueue(queue.state())).collect(),
            device: state.device.keep(),
        };
        serde_json::to_value(kept).expect("numbers, and what a device gave as a value")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let kept: Kept = snapshot::read(state)?;
        let core = Arc::clone(&self.core);
        let mut state = core.lock();
        if kept.kind != state.device.kind() || kept.queues.len() != state.queues.len() {
            return Err(serde_json::Error::custom("it is of another kind of device"));
        }
        // What the driver chose has to be what this device, whose back end may be another one, offers.
        let missing = kept.driver_features & !(FEATURES | state.device.features());
        if missing != 0 {
            return Err(serde_json::Error::custom(format!("it had features {missing:#x}")));
        }
        for (queue, KeptQueue(kept)) in state.queues.iter_mut().zip(kept.queues) {
            let max_size = queue.max_size();
            *queue = Queue::try_from(kept)
                .ok()
                .filter(|queue| queue.max_size() == max_size)
                .ok_or_else(|| serde_json::Error::custom("a queue that there can't be"))?;
        }
        self.device_features_sel = kept.device_features_sel;
        self.driver_features_sel = kept.driver_features_sel;
        self.driver_features = kept.driver_features;
        self.queue_sel = kept.queue_sel;
        core.wake.restore(kept.interrupts, kept.generation);
        state.status = kept.status & !DRIVER_OK;
        if kept.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK {
            self.activate(&mut state);
        }
        state.device.restore(&kept.device)
    }
}
