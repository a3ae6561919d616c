//! Interrupts towards QEMU: one call eventfd per ring, which QEMU may exchange at any time (it does to mask a ring).

use std::sync::{Mutex, PoisonError};

use crate::devices::virtio::device::Interrupt;
use crate::devices::virtio::notifier::Notifier;

/// The call eventfds of a device.
pub(super) struct CallLines(Mutex<Vec<Option<Notifier>>>);

impl CallLines {
    pub(super) fn new(rings: usize) -> Self {
        Self(Mutex::new((0..rings).map(|_| None).collect()))
    }

    /// Exchanges one; none means that QEMU polls the ring.
    pub(super) fn set(&self, ring: usize, line: Option<Notifier>) {
        if let Some(place) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(ring) {
            *place = line;
        }
    }
}

impl Interrupt for CallLines {
    fn signal_queue(&self, queue_index: u16) {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(line)) = lines.get(usize::from(queue_index)) {
            let _ = line.notify();
        }
    }

    fn signal_config(&self) {
        // QEMU keeps the configuration space and asks for it once; no device of ours changes it on this engine.
    }
}
