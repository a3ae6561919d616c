//! The inactive half of the entropy source: starting and stopping its worker.

use virtio_queue::Queue;

use super::worker::RngWorker;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_VERSION_1, VirtioDevice, copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};

/// Entries of the ring; the guest asks for a few bytes at a time.
const QUEUE_SIZE: u16 = 64;

/// The entropy source.
pub struct Rng {
    event_loop: LoopHandle,
    worker: Option<WorkerId>,
}

impl Rng {
    /// An entropy source to be served on `event_loop`.
    pub fn new(event_loop: LoopHandle) -> Self {
        Self { event_loop, worker: None }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX
    }

    fn acknowledge_features(&mut self, _features: u64) {
        // Event-idx is set on the queue by the transport.
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        let Some(queue) = activation.queues.into_iter().next() else {
            return Err(ActivateError::MissingQueues { needed: 1, given });
        };
        let worker = RngWorker::new(queue, activation.memory, activation.interrupt);
        self.worker = Some(self.event_loop.attach(Box::new(worker))?);
        Ok(())
    }

    fn worker(&self) -> Option<(&LoopHandle, WorkerId)> {
        Some((&self.event_loop, self.worker?))
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        match self.event_loop.detach(worker) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                tracing::error!(%error, "entropy worker could not be stopped");
                Vec::new()
            }
        }
    }
}
