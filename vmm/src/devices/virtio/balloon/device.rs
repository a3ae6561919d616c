//! The inactive half of the balloon: features, the configuration space, starting and stopping its worker.

use virtio_queue::Queue;

use super::worker::BalloonWorker;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_VERSION_1, VirtioDevice, copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};

/// Entries of each ring. Linux reports up to 32 ranges in one chain and refuses a smaller ring.
const QUEUE_SIZE: u16 = 64;
/// VIRTIO_BALLOON_F_REPORTING (section 5.5.3).
const FEATURE_REPORTING: u64 = 1 << 5;
/// `num_pages` and `actual`: the host wants nothing.
const CONFIG: [u8; 8] = [0; 8];

/// The balloon.
pub struct Balloon {
    event_loop: LoopHandle,
    reporting: bool,
    worker: Option<WorkerId>,
}

impl Balloon {
    /// A balloon to be served on `event_loop`.
    pub fn new(event_loop: LoopHandle) -> Self {
        Self { event_loop, reporting: false, worker: None }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn name(&self) -> &str {
        "balloon"
    }

    /// Inflate, deflate, reporting: without the features of the rings between them, Linux gives the last one number 2.
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn queues_needed(&self) -> usize {
        2
    }

    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_REPORTING
    }

    fn acknowledge_features(&mut self, features: u64) {
        self.reporting = features & FEATURE_REPORTING != 0;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&CONFIG, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        if given < self.queues_needed() {
            return Err(ActivateError::MissingQueues { needed: self.queues_needed(), given });
        }
        let worker = BalloonWorker::new(activation.queues, activation.memory, &activation.interrupt, self.reporting);
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
                tracing::error!(%error, "balloon worker could not be stopped");
                Vec::new()
            }
        }
    }
}
