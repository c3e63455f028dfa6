//! Stage 07: a BIOS from the reset vector on, a disk, boot sectors.

use super::criteria;

criteria![];
