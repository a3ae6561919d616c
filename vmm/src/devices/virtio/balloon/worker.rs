//! The active half of the balloon: takes reported ranges and gives them back to the host.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::Queue;

use crate::devices::virtio::device::{ActiveQueue, DeviceMemory, Interrupt};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::memory::reclaim;
use crate::transport::mmio::saved::SavedQueue;

/// Number of the ring that free pages are reported in.
const REPORTING_QUEUE: u16 = 2;

/// Serves the rings.
pub(super) struct BalloonWorker {
    memory: DeviceMemory,
    rings: Vec<Ring>,
    /// The driver took the feature; else its third ring says nothing.
    reporting: bool,
    /// A range that is no memory, or a host that refuses, is logged once.
    complained: bool,
}

impl BalloonWorker {
    pub(super) fn new(
        queues: Vec<ActiveQueue>,
        memory: DeviceMemory,
        interrupt: &Arc<dyn Interrupt>,
        reporting: bool,
    ) -> Self {
        let rings =
            queues.into_iter().map(|queue| Ring::new(queue, Arc::clone(&memory), Arc::clone(interrupt))).collect();
        Self { memory, rings, reporting, complained: false }
    }

    /// Serves one chain of each ring, then yields: giving back a large range takes milliseconds, and others share the thread.
    fn serve(&mut self, place: usize) {
        let ring = &mut self.rings[place];
        let Some(chain) = ring.pop() else {
            if ring.request_kicks() {
                let _ = ring.kick().notify();
            }
            ring.signal();
            return;
        };
        let head = chain.head_index();
        if self.reporting && ring.index() == REPORTING_QUEUE {
            self.give_back(chain);
        }
        let ring = &mut self.rings[place];
        ring.push_used(head, 0);
        ring.signal();
        let _ = ring.kick().notify();
    }

    /// Gives the ranges of one chain back; there are at most as many as the ring has entries.
    fn give_back(&mut self, chain: Chain) {
        for range in chain.writable() {
            let given = reclaim(&self.memory, range.addr(), range.len().into());
            if let Err(error) = given
                && !std::mem::replace(&mut self.complained, true)
            {
                tracing::warn!(%error, "reported free pages stay");
            }
        }
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, operations: &mut EventOps) {
        for (place, ring) in self.rings.iter().enumerate() {
            // A device has three rings.
            let events = Events::with_data(ring.kick(), place as u32, EventSet::IN);
            if let Err(error) = operations.add(events) {
                tracing::error!(%error, descriptor = ring.kick().as_raw_fd(), "balloon cannot watch its queue");
            }
        }
        for place in 0..self.rings.len() {
            self.serve(place);
        }
    }

    fn process(&mut self, events: Events, _operations: &mut EventOps) {
        let place = events.data() as usize;
        self.rings[place].kick().drain();
        self.serve(place);
    }
}

impl Worker for BalloonWorker {
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        Ok(self.rings.iter().map(|ring| ring.position(0)).collect())
    }

    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        self.rings.into_iter().map(Ring::into_queue).collect()
    }
}
