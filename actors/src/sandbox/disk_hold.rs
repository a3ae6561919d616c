//! Who reads the writable disk of a sandbox at rest. While somebody does, it neither starts nor goes away.
//!
//! Held beside the actor, as activity is: a copy goes on while the actor is rebuilt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The readers of one sandbox's disk.
#[derive(Debug, Default)]
pub struct DiskHolds {
    count: AtomicU32,
}

impl DiskHolds {
    /// Holds the disk until the guard is dropped. Only the sandbox's actor calls it, so that no start comes between its look and this.
    #[must_use]
    pub(super) fn hold(self: &Arc<Self>) -> DiskHold {
        self.count.fetch_add(1, Ordering::AcqRel);
        DiskHold { holds: Arc::clone(self) }
    }

    /// Whether somebody reads it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }
}

/// One reader.
#[derive(Debug)]
pub struct DiskHold {
    holds: Arc<DiskHolds>,
}

impl Drop for DiskHold {
    fn drop(&mut self) {
        self.holds.count.fetch_sub(1, Ordering::AcqRel);
    }
}
