//! Stage 03: a vCPU, its registers, the run loop, the ways in which a VM ends.

use super::criteria;

criteria![];
