//! Stage 06: from real mode to long mode, interrupts, ring 3, a Rust kernel.

use super::criteria;

criteria![];
