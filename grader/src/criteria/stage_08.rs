//! Stage 08: unmodified Linux, its devices, saving and restoring it.

use super::criteria;

criteria![];
