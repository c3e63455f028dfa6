//! Introduced by stage 08: randomness from the host (VIRTIO 1.2, 5.4 "Entropy Device").
//!
//! The smallest virtio device: one queue, no configuration. The driver puts empty buffers on the ring, and gets them
//! back full. A guest that has just booted has seen little that is random; this makes its keys good from the start.

use std::io::Write as _;

use super::{Broken, Device, Rings};

/// As many bytes as one chain gets: `getrandom` never stops halfway up to this length, and the driver asks again.
const MOST: usize = 256;

/// An entropy device.
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        4
    }

    fn name(&self) -> &'static str {
        "virtio rng"
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    // ANCHOR: serve
    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        while let Some(chain) = rings.take(0)? {
            let head = chain.head_index();
            let mut buffers =
                chain.writer(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            let mut random = [0; MOST];
            let len = buffers.available_bytes().min(MOST);
            // On an error, such as one of a sandbox, the driver gets nothing: an empty buffer, not a bad one.
            let len =
                rustix::rand::getrandom(&mut random[..len], rustix::rand::GetRandomFlags::empty())
                    .unwrap_or(0);
            buffers.write_all(&random[..len]).map_err(|_| Broken("buffers are too short"))?;
            rings.give(0, head, len as u32)?;
        }
        Ok(())
    }
    // ANCHOR_END: serve
}
