//! The one trait every virtio device implements and every transport drives (VIRTIO 1.2, section 2 and 3.1).
//!
//! ```text
//!             acknowledge_features          activate
//!   Inactive ───────────────────► Inactive ─────────► Active ──┐
//!      ▲                                                       │ deactivate (reset, ring stopped, VM end)
//!      └───────────────────────────────────────────────────────┘
//! ```
//!
//! * The transport calls every method under its own lock or from one thread: a device needs no interior locking.
//! * Between `activate` and the return of `deactivate`, and only then, the device's worker touches guest memory and rings.
//! * `deactivate` waits for the worker and gives the queues back, so a vhost-user front end can ask where each ring stopped.
//!
//! Used by `transport/mmio` and `transport/vhost_user`; built by `launch`. Devices never know which transport they sit on.

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::event_loop::{LoopError, LoopHandle, WorkerId};
use super::notifier::Notifier;

/// Guest memory as devices see it. Both engines give the same type; what backs it (private pages, memfd) is `memory`'s affair.
pub type DeviceMemory = Arc<GuestMemoryMmap<()>>;

/// VIRTIO_F_VERSION_1: every device offers it and a driver that does not take it is refused by the transport.
pub const FEATURE_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// VIRTIO_RING_F_EVENT_IDX: fewer interrupts and kicks.
pub const FEATURE_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_RING_F_INDIRECT_DESC: one ring slot per request.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Virtio device ids (VIRTIO 1.2, section 5).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
#[repr(u32)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon with free page reporting.
    Balloon = 5,
    /// Host-guest sockets.
    Vsock = 19,
    /// Shared directories (virtio-fs).
    Fs = 26,
}

/// How a device tells the driver that something happened. One per activated device: an irqfd plus ISR bits on mmio, one call
/// eventfd per ring on vhost-user.
pub trait Interrupt: Send + Sync {
    /// Buffers of ring `queue_index` were used. The worker has already asked `needs_notification`.
    fn signal_queue(&self, queue_index: u16);
    /// The configuration space changed.
    fn signal_config(&self);
}

/// One ring, ready to be worked on.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring's number in the device.
    pub index: u16,
    /// Addresses and positions; `is_valid` has been checked by the transport, event-idx is set as negotiated.
    pub queue: Queue,
    /// Signalled by the driver when buffers were made available.
    pub kick: Notifier,
}

/// Everything a worker needs; exists only while the device is active.
pub struct Activation {
    /// All of guest memory.
    pub memory: DeviceMemory,
    /// The accepted feature bits.
    pub features: u64,
    /// The rings the driver set up, in order of their index. A driver may leave out trailing optional ones.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// the driver set up fewer rings than the device needs
    #[error("device needs {needed} rings, the driver set up {given}")]
    MissingQueues {
        /// Rings the device cannot work without.
        needed: usize,
        /// Rings the driver made ready.
        given: usize,
    },
    /// the device's event loop is gone or refused the worker
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// a host resource for the worker could not be made
    #[error("device worker could not be set up")]
    Resource(#[from] std::io::Error),
}

/// A virtio device, independent of its transport.
pub trait VirtioDevice: Send {
    /// The device id the driver sees.
    fn device_type(&self) -> DeviceType;

    /// A short name for logs, counters and thread names (`blk-root`, `vsock`).
    fn name(&self) -> &str;

    /// Largest size of each ring, one entry per ring (powers of two, at most 1024).
    fn queue_sizes(&self) -> &[u16];

    /// How many of them the device cannot work without; a driver or a transport may keep the others.
    fn queues_needed(&self) -> usize {
        self.queue_sizes().len()
    }

    /// Feature bits on offer, [`FEATURE_VERSION_1`] among them.
    fn device_features(&self) -> u64;

    /// The bits the driver took; the transport has already masked them with the offer. Called while inactive.
    fn acknowledge_features(&mut self, features: u64);

    /// Reads the device-specific configuration space. Bytes past its end read as zero; never fails, never panics.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device-specific configuration space. Writes to read-only or absent fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts working on the rings. On error the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Its worker and the loop that it runs on, while it is active; none for a device that cannot be saved.
    fn worker(&self) -> Option<(&LoopHandle, WorkerId)> {
        None
    }

    /// Stops the worker and waits for it; afterwards nothing of this device touches guest memory. Returns the rings with their
    /// positions (empty when it was not active). The device can be activated again.
    fn deactivate(&mut self) -> Vec<Queue>;
}

/// Copies the part of a little configuration structure that `[offset, offset + data.len())` covers, zero-filling the rest.
/// The arithmetic every `read_config` needs, in one checked place.
pub fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(start) = usize::try_from(offset) else { return };
    let Some(source) = config.get(start..) else { return };
    let length = source.len().min(data.len());
    data[..length].copy_from_slice(&source[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_reads_are_clipped_and_zero_filled() {
        let config = [1u8, 2, 3, 4];
        let mut data = [9u8; 4];
        copy_config(&config, 2, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        copy_config(&config, 4, &mut data);
        assert_eq!(data, [0; 4]);
        copy_config(&config, u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
