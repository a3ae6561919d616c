//! The inactive half: features, the tag, and starting and stopping the worker.

use std::sync::Arc;

use virtio_queue::Queue;

use super::Share;
use super::server::Server;
use super::worker::FsWorker;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, VirtioDevice,
    copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};

/// What the guest mounts it by; QEMU says the same (`engine/qemu/arguments`).
const TAG: &[u8] = b"msb";
/// Length of the tag's field.
const TAG_BYTES: usize = 36;
/// Entries of both rings: the largest request has as many pieces as fit with its header.
const QUEUE_SIZE: u16 = 512;
/// Descriptors kept for files that the guest knows, and as many for open ones, where this process may have enough.
const FILES_MAX: usize = 64 << 10;
/// Descriptors that the rest of the process needs.
const FILES_RESERVED: u64 = 512;

/// The shared directories of a machine.
pub struct Fs {
    event_loop: LoopHandle,
    shares: Arc<Vec<Share>>,
    files_max: usize,
    /// The user of this process: whose files the guest's user owns.
    host: (u32, u32),
    worker: Option<WorkerId>,
}

impl Fs {
    /// These shares, to be served on `event_loop`. Raises this process's limit of descriptors as far as it may go.
    pub fn new(shares: Vec<Share>, event_loop: LoopHandle) -> Self {
        let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let raised = rustix::process::Rlimit { current: limits.maximum, maximum: limits.maximum };
        let allowed = match rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
            Ok(()) => limits.maximum.unwrap_or(u64::MAX),
            Err(_) => limits.current.unwrap_or(u64::MAX),
        };
        let half = usize::try_from(allowed.saturating_sub(FILES_RESERVED) / 2).unwrap_or(FILES_MAX);
        let host = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { event_loop, shares: Arc::new(shares), files_max: half.clamp(16, FILES_MAX), host, worker: None }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn name(&self) -> &str {
        "fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn acknowledge_features(&mut self, _features: u64) {
        // Event-idx is set on the queues by the transport.
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        config[..TAG.len()].copy_from_slice(TAG);
        config[TAG_BYTES..].copy_from_slice(&1u32.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        if given < 2 {
            return Err(ActivateError::MissingQueues { needed: 2, given });
        }
        let server = Server::new(Arc::clone(&self.shares), self.host, self.files_max);
        let worker = FsWorker::new(activation.queues, activation.memory, &activation.interrupt, server);
        self.worker = Some(self.event_loop.attach(Box::new(worker))?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        match self.event_loop.detach(worker) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                tracing::error!(%error, "shared file system could not be stopped");
                Vec::new()
            }
        }
    }
}
