//! The active half of the entropy source.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;

use crate::devices::virtio::device::{ActiveQueue, DeviceMemory, Interrupt};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::devices::virtio::slices::SliceList;
use crate::transport::mmio::saved::SavedQueue;

/// Bytes given per chain at most: a guest gets entropy, not a load generator.
const CHAIN_BYTES_MAX: usize = 4096;
/// Random bytes fetched per system call.
const PIECE_BYTES: usize = 256;
/// Pieces of memory per chain.
const PIECES_MAX: usize = 16;

/// Serves the ring.
pub(super) struct RngWorker {
    memory: DeviceMemory,
    ring: Ring,
}

impl RngWorker {
    pub(super) fn new(queue: ActiveQueue, memory: DeviceMemory, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { ring: Ring::new(queue, Arc::clone(&memory), interrupt), memory }
    }

    /// Serves at most one ring's worth, then yields.
    fn serve(&mut self) {
        for _ in 0..self.ring.size() {
            let Some(chain) = self.ring.pop() else {
                if self.ring.request_kicks() {
                    continue;
                }
                self.ring.signal();
                return;
            };
            let head = chain.head_index();
            let length = self.fill(chain);
            self.ring.push_used(head, length);
        }
        let _ = self.ring.kick().notify();
        self.ring.signal();
    }

    /// Fills a chain; 0 bytes for one that is malformed.
    fn fill(&self, chain: Chain) -> u32 {
        let mut buffers = SliceList::<PIECES_MAX>::new();
        for descriptor in chain.writable() {
            if buffers.push_descriptor(&self.memory, &descriptor).is_err() {
                return 0;
            }
        }
        buffers.truncate(CHAIN_BYTES_MAX);
        let mut written = 0;
        while !buffers.is_empty() {
            let mut piece = [0u8; PIECE_BYTES];
            let length = buffers.len().min(PIECE_BYTES);
            // The pool is ready long before any sandbox starts, so this neither waits nor fails.
            let Ok(given) = getrandom(&mut piece[..length], GetRandomFlags::empty()) else { break };
            buffers.write_front(&piece[..given]);
            written += given;
        }
        u32::try_from(written).expect("at most CHAIN_BYTES_MAX")
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, operations: &mut EventOps) {
        if let Err(error) = operations.add(Events::new(self.ring.kick(), EventSet::IN)) {
            tracing::error!(%error, "entropy source cannot watch its queue");
        }
        self.serve();
    }

    fn process(&mut self, _events: Events, _operations: &mut EventOps) {
        self.ring.kick().drain();
        self.serve();
    }
}

impl Worker for RngWorker {
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        Ok(vec![self.ring.position(0)])
    }

    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        vec![self.ring.into_queue()]
    }
}
