//! The interrupt of an MMIO device: two cause bits (VIRTIO 1.2, section 4.2.2, InterruptStatus) and an eventfd that KVM turns into an edge.
//!
//! Raised by workers on any thread, read and acknowledged by the guest through the transport. No lock: one atomic per register.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::devices::virtio::device::Interrupt;
use crate::devices::virtio::notifier::Notifier;

/// Buffers were used.
pub const CAUSE_QUEUE: u32 = 1;
/// The configuration changed.
pub const CAUSE_CONFIG: u32 = 2;

/// One device's interrupt.
#[derive(Debug)]
pub struct MmioInterrupt {
    causes: AtomicU32,
    config_generation: AtomicU32,
    line: Notifier,
}

impl MmioInterrupt {
    /// Raises by signalling `line`.
    pub fn new(line: Notifier) -> Self {
        Self { causes: AtomicU32::new(0), config_generation: AtomicU32::new(0), line }
    }

    /// Pending causes.
    pub fn status(&self) -> u32 {
        // Acquire: whoever sees the cause sees the used ring that came before it.
        self.causes.load(Ordering::Acquire)
    }

    /// The guest has seen `causes`.
    pub fn acknowledge(&self, causes: u32) {
        self.causes.fetch_and(!causes, Ordering::AcqRel);
    }

    /// How often the configuration has changed.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Forgets pending causes (reset).
    pub fn clear(&self) {
        self.causes.store(0, Ordering::Release);
    }

    /// Puts back what a saved machine had.
    pub(super) fn restore(&self, causes: u32, config_generation: u32) {
        self.causes.store(causes, Ordering::Release);
        self.config_generation.store(config_generation, Ordering::Release);
    }

    /// Announces a change of configuration or status.
    pub fn raise_config(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CAUSE_CONFIG);
    }

    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::AcqRel);
        // Always signalled, also when the cause was pending: the guest may be between reading and acknowledging it. Fails only on a
        // broken descriptor, and then there is no guest to tell.
        let _ = self.line.notify();
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self, _queue_index: u16) {
        self.raise(CAUSE_QUEUE);
    }

    fn signal_config(&self) {
        self.raise_config();
    }
}
