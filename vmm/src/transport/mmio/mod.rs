//! virtio over MMIO registers, version 2 (VIRTIO 1.2, section 4.2): one 4 KiB window and one interrupt line per device.
//!
//! ```text
//!  guest write/read ──► engine/kvm (vCPU thread, per-device lock) ──► MmioTransport ──► VirtioDevice
//!  guest notify ──► ioeventfd ──► worker          worker ──► MmioInterrupt ──► irqfd ──► guest
//!
//!  status:  0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK (active)
//!           ▲          every other bit only ever gets added          │
//!           └──────────────── write 0: reset ────────────────────────┘
//! ```
//!
//! Whatever a guest writes to whatever offset in whatever order ends in one of these states: registers that make no sense now are
//! ignored, reads of nothing are zero, a set-up the device refuses is DEVICE_NEEDS_RESET. It never touches guest memory itself.

pub mod interrupt;
pub mod registers;
pub mod saved;

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};

use crate::devices::virtio::device::{
    Activation, ActiveQueue, DeviceMemory, FEATURE_EVENT_IDX, FEATURE_VERSION_1, VirtioDevice,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};
use crate::devices::virtio::notifier::Notifier;

use interrupt::{CAUSE_CONFIG, CAUSE_QUEUE, MmioInterrupt};
use registers::{CONFIG_SPACE_OFFSET, MAGIC, Register, VENDOR, VERSION, status};

/// Every cause of an interrupt.
const CAUSES: u32 = CAUSE_QUEUE | CAUSE_CONFIG;

/// One device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: DeviceMemory,
    interrupt: Arc<MmioInterrupt>,
    queues: Vec<Queue>,
    kicks: Vec<Notifier>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    active: bool,
}

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device announces a ring size that no ring can have: our own mistake.
    #[error("ring size {0} is impossible")]
    QueueSize(u16),
    /// No descriptor left for an eventfd.
    #[error("eventfd could not be made")]
    Notifier(#[from] io::Error),
}

impl MmioTransport {
    /// Puts `device` behind registers; `line` is signalled to raise its interrupt.
    pub fn new(device: Box<dyn VirtioDevice>, memory: DeviceMemory, line: Notifier) -> Result<Self, TransportError> {
        let queues = fresh_queues(device.as_ref())?;
        let kicks = queues.iter().map(|_| Notifier::new()).collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(MmioInterrupt::new(line)),
            queues,
            kicks,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            active: false,
        })
    }

    /// The device's name, for messages.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// One eventfd per ring, for the engine to have signalled by writes to the notify register.
    pub fn kicks(&self) -> &[Notifier] {
        &self.kicks
    }

    /// The device's worker, while it is active.
    pub fn worker(&self) -> Option<(&LoopHandle, WorkerId)> {
        self.device.worker()
    }

    /// Whether the driver has the device running.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Answers a guest's read at `offset` of the window. Never fails; what is not there reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(CONFIG_SPACE_OFFSET) {
            self.device.read_config(config_offset, data);
            return;
        }
        // Registers are 32 bits wide and read as such (section 4.2.2.2); other widths see zeros.
        let (Ok(data), Some(register)) = (<&mut [u8; 4]>::try_from(data), Register::at(offset)) else { return };
        *data = self.read_register(register).to_le_bytes();
    }

    fn read_register(&self, register: Register) -> u32 {
        match register {
            Register::MagicValue => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => self.device.device_type() as u32,
            Register::VendorId => VENDOR,
            Register::DeviceFeatures => half(self.device.device_features(), self.device_features_select),
            Register::QueueNumMax => self.selected_queue().map_or(0, |queue| queue.max_size().into()),
            Register::QueueReady => self.selected_queue().map_or(0, |queue| queue.ready().into()),
            Register::InterruptStatus => self.interrupt.status(),
            Register::Status => self.status,
            Register::ConfigGeneration => self.interrupt.config_generation(),
            // No shared memory regions: length and base of all ones (section 4.2.2).
            Register::SharedMemoryLengthLow
            | Register::SharedMemoryLengthHigh
            | Register::SharedMemoryBaseLow
            | Register::SharedMemoryBaseHigh => u32::MAX,
            _ => 0,
        }
    }

    /// Takes a guest's write at `offset` of the window. Never fails; what makes no sense is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(CONFIG_SPACE_OFFSET) {
            // Configuration may be written once the device is known to the driver (section 2.1).
            if self.status & status::DRIVER != 0 {
                self.device.write_config(config_offset, data);
            }
            return;
        }
        let (Ok(data), Some(register)) = (<&[u8; 4]>::try_from(data), Register::at(offset)) else { return };
        self.write_register(register, u32::from_le_bytes(*data));
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSelect => self.device_features_select = value,
            Register::DriverFeaturesSelect => self.driver_features_select = value,
            Register::DriverFeatures if self.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER => {
                self.driver_features = with_half(self.driver_features, self.driver_features_select, value);
            }
            Register::QueueSelect => self.queue_select = value,
            Register::QueueNum => self.set_up_queue(|queue| queue.set_size(u16::try_from(value).unwrap_or(0))),
            Register::QueueReady => self.set_up_queue(|queue| queue.set_ready(value == 1)),
            Register::QueueNotify => self.notify(value),
            Register::InterruptAcknowledge => self.interrupt.acknowledge(value),
            Register::Status => self.write_status(value),
            Register::QueueDescriptorLow => {
                self.set_up_queue(|queue| queue.set_desc_table_address(Some(value), None));
            }
            Register::QueueDescriptorHigh => {
                self.set_up_queue(|queue| queue.set_desc_table_address(None, Some(value)));
            }
            Register::QueueDriverLow => self.set_up_queue(|queue| queue.set_avail_ring_address(Some(value), None)),
            Register::QueueDriverHigh => self.set_up_queue(|queue| queue.set_avail_ring_address(None, Some(value))),
            Register::QueueDeviceLow => self.set_up_queue(|queue| queue.set_used_ring_address(Some(value), None)),
            Register::QueueDeviceHigh => self.set_up_queue(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Rings may be changed between FEATURES_OK and DRIVER_OK only (section 3.1.1); afterwards they belong to the worker.
    fn set_up_queue(&mut self, change: impl FnOnce(&mut Queue)) {
        let setting_up = self.status & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        if let Some(queue) = self.queues.get_mut(index)
            && setting_up
        {
            change(queue);
        }
    }

    /// A notification that did not go by ioeventfd, because the guest wrote it in an odd way.
    fn notify(&self, index: u32) {
        if let Some(kick) = usize::try_from(index).ok().and_then(|index| self.kicks.get(index)) {
            // Only fails on a broken descriptor, and then the worker has said so.
            let _ = kick.notify();
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits are only ever added (section 2.1.1); a driver that takes one away, or writes one of ours, is ignored.
        let added = value & !self.status;
        if self.status & !value & status::DRIVER_BITS != 0 || added & !status::DRIVER_BITS != 0 {
            return;
        }
        let has_driver = (self.status | value) & status::DRIVER != 0;
        if added & status::FEATURES_OK != 0 {
            let features = self.driver_features & self.device.device_features();
            // A driver that took what was not on offer, or not VERSION_1, reads back its status without FEATURES_OK.
            if !has_driver || features != self.driver_features || features & FEATURE_VERSION_1 == 0 {
                self.status |= value & !(status::FEATURES_OK | status::DRIVER_OK);
                return;
            }
            self.device.acknowledge_features(features);
        }
        if added & status::DRIVER_OK != 0 {
            if self.status & status::FEATURES_OK == 0 {
                return;
            }
            self.activate();
        }
        self.status |= value;
    }

    fn activate(&mut self) {
        // A ring the driver left out ends the list only if no later one is ready: rings keep their numbers.
        let mut queues = Vec::with_capacity(self.queues.len());
        let mut refused = None;
        for (index, (queue, kick)) in self.queues.iter_mut().zip(&self.kicks).enumerate() {
            if !queue.ready() {
                continue;
            }
            if !queue.is_valid(self.memory.as_ref()) {
                refused = Some(format!("ring {index} lies outside guest memory"));
                break;
            }
            let Ok(kick) = kick.try_clone() else {
                refused = Some("no descriptor left".to_owned());
                break;
            };
            let Ok(empty) = Queue::new(queue.max_size()) else { continue };
            let mut queue = std::mem::replace(queue, empty);
            queue.set_event_idx(self.driver_features & FEATURE_EVENT_IDX != 0);
            // At most a handful of rings: a device's list is a constant.
            queues.push(ActiveQueue { index: index as u16, queue, kick });
        }
        let result = match refused {
            Some(reason) => Err(reason),
            None => {
                let activation = Activation {
                    memory: Arc::clone(&self.memory),
                    features: self.driver_features,
                    queues,
                    interrupt: Arc::<MmioInterrupt>::clone(&self.interrupt),
                };
                self.device.activate(activation).map_err(|error| error.to_string())
            }
        };
        match result {
            Ok(()) => self.active = true,
            Err(reason) => {
                // A driver can repeat this, but each time costs it a reset of its own device: bounded by its own speed, and at
                // `debug` so that no log grows by it.
                tracing::debug!(device = self.device.name(), %reason, "driver set-up refused");
                self.status |= status::DEVICE_NEEDS_RESET;
                self.interrupt.raise_config();
            }
        }
    }

    /// Back to the state after power-on; the worker has stopped when this returns.
    pub fn reset(&mut self) {
        if self.active {
            drop(self.device.deactivate());
            self.active = false;
        }
        for kick in &self.kicks {
            kick.drain();
        }
        // Sizes were accepted once, so this cannot fail; if it did, no ring is the safe answer.
        self.queues = fresh_queues(self.device.as_ref()).unwrap_or_default();
        self.interrupt.clear();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("MmioTransport")
            .field("device", &self.device.name())
            .field("status", &self.status)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Result<Vec<Queue>, TransportError> {
    let sizes = device.queue_sizes().iter();
    sizes.map(|&size| Queue::new(size).map_err(|_| TransportError::QueueSize(size))).collect()
}

/// The 32-bit half of `features` that `select` names; halves beyond the second are empty.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// `features` with the half that `select` names replaced.
fn with_half(features: u64, select: u32, value: u32) -> u64 {
    match select {
        0 => (features & !0xffff_ffff) | u64::from(value),
        1 => (features & 0xffff_ffff) | (u64::from(value) << 32),
        _ => features,
    }
}

#[cfg(test)]
mod tests;
