//! The inactive half of a disk: features, configuration space, and starting and stopping its worker.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::Queue;

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR_BYTES, SERIAL_BYTES};
use super::storage::Storage;
use super::worker::BlockWorker;
use crate::devices::virtio::counter::Counter;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, VirtioDevice,
    copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};
use crate::memory::transfer::SLICES_MAX;

/// Entries of the ring.
const QUEUE_SIZE: u16 = 256;
/// Data pieces per request the driver may use: the slice list less header and status.
const SEGMENTS_MAX: u32 = SLICES_MAX as u32 - 2;
/// Discards smaller than a page of the host's file system free nothing.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
/// Size of `struct virtio_blk_config` up to the write-zeroes fields (VIRTIO 1.2, 5.2.4).
const CONFIG_BYTES: usize = 60;

/// What a disk counts; read by `Sample` requests while the worker writes.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Completed reads.
    pub read_operations: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Completed writes.
    pub write_operations: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Completed flushes.
    pub flushes: Counter,
    /// Bytes discarded or zeroed.
    pub discarded_bytes: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
}

/// Called with true when a write found the host's disk full, with false when writes go on or were failed.
pub type DiskFullObserver = Arc<dyn Fn(bool) + Send + Sync>;

/// How a disk is set up.
pub struct BlockOptions {
    /// The serial a guest finds it by; at most 20 bytes, longer ones are cut.
    pub serial: String,
    /// How long writes wait for room on a full host disk.
    pub full_timeout: Duration,
    /// Told about a full disk.
    pub on_disk_full: Option<DiskFullObserver>,
}

/// Set-up shared with the worker.
pub(super) struct Shared {
    pub(super) storage: Box<dyn Storage>,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) full_timeout: Duration,
    pub(super) on_disk_full: Option<DiskFullObserver>,
    pub(super) counters: Arc<BlockCounters>,
}

/// A disk.
pub struct Block {
    name: String,
    config: [u8; CONFIG_BYTES],
    features: u64,
    event_loop: LoopHandle,
    shared: Arc<Shared>,
    worker: Option<WorkerId>,
}

impl Block {
    /// A disk on `storage`, to be served on `event_loop`.
    pub fn new(storage: Box<dyn Storage>, options: BlockOptions, event_loop: LoopHandle) -> Self {
        let mut features = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC | 1 << VIRTIO_BLK_F_SEG_MAX;
        if storage.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        let mut serial = [0u8; SERIAL_BYTES];
        let length = options.serial.len().min(SERIAL_BYTES);
        serial[..length].copy_from_slice(&options.serial.as_bytes()[..length]);
        Self {
            name: format!("blk-{}", options.serial),
            config: config_space(storage.len_bytes(), storage.is_read_only()),
            features,
            event_loop,
            shared: Arc::new(Shared {
                storage,
                serial,
                full_timeout: options.full_timeout,
                on_disk_full: options.on_disk_full,
                counters: Arc::default(),
            }),
            worker: None,
        }
    }

    /// The disk's counters, which outlive activations.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.shared.counters)
    }
}

fn config_space(len_bytes: u64, read_only: bool) -> [u8; CONFIG_BYTES] {
    let mut config = [0u8; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &(len_bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(34, &1u16.to_le_bytes());
    if !read_only {
        let ranges = u32::try_from(RANGES_MAX).expect("small");
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &ranges.to_le_bytes());
        put(56, &[1]);
    }
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        self.features
    }

    fn acknowledge_features(&mut self, _features: u64) {
        // What the driver left out changes nothing here: it simply does not send those requests.
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        let mut queues = activation.queues.into_iter();
        let Some(queue) = queues.next() else {
            return Err(ActivateError::MissingQueues { needed: 1, given });
        };
        let worker = BlockWorker::new(Arc::clone(&self.shared), queue, activation.memory, activation.interrupt)?;
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
                tracing::error!(device = self.name, %error, "device worker could not be stopped");
                Vec::new()
            }
        }
    }
}
