//! Stage 04: port I/O, a serial port, string I/O, a hypercall port, several vCPUs.

use super::criteria;

criteria![];
