//! Stage 05: memory-mapped I/O, interrupts from a device, fewer exits, tracing.

use super::criteria;

criteria![];
