//! The active half of a disk: serves its ring on the device's event loop and holds requests while the host's disk is full.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::Queue;

use super::device::Shared;
use super::request::{Outcome, Request};
use crate::devices::virtio::device::{ActiveQueue, DeviceMemory, Interrupt};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::devices::virtio::timer::Timer;
use crate::transport::mmio::saved::SavedQueue;

/// How often held requests are tried again.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(1);

const KICK: u32 = 0;
const RETRY: u32 = 1;

/// A request that waits for room on the host. There are at most as many as the ring has entries.
struct Held {
    chain: Chain,
    since: Instant,
}

/// Serves one disk's ring.
pub(super) struct BlockWorker {
    shared: Arc<Shared>,
    memory: DeviceMemory,
    ring: Ring,
    held: VecDeque<Held>,
    retry: Timer,
}

impl BlockWorker {
    pub(super) fn new(
        shared: Arc<Shared>,
        queue: ActiveQueue,
        memory: DeviceMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let ring = Ring::new(queue, Arc::clone(&memory), interrupt);
        Ok(Self { shared, memory, ring, held: VecDeque::new(), retry: Timer::new()? })
    }

    /// Serves what is available, at most one ring's worth, then yields to others on the loop by kicking itself.
    fn serve(&mut self, now: Instant) {
        self.ring.suppress_kicks();
        let mut budget = self.ring.size();
        loop {
            while budget > 0 {
                let Some(chain) = self.ring.pop() else { break };
                budget -= 1;
                if let Some(chain) = self.attempt(chain) {
                    self.hold(Held { chain, since: now });
                }
            }
            if budget == 0 {
                let _ = self.ring.kick().notify();
                break;
            }
            if !self.ring.request_kicks() {
                break;
            }
            self.ring.suppress_kicks();
            // A ring that says "more" and yields nothing would spin here; each look costs budget too.
            budget -= 1;
        }
        self.ring.signal();
    }

    /// Carries one chain out; gives it back if the host's disk is full.
    fn attempt(&mut self, chain: Chain) -> Option<Chain> {
        let head = chain.head_index();
        let used = match Request::parse(chain.clone(), &self.memory) {
            Ok(request) => match request.execute(&*self.shared.storage, &self.shared.serial, &self.shared.counters) {
                Outcome::Used(length) => length,
                Outcome::HostFull => return Some(chain),
            },
            Err(_) => {
                self.shared.counters.errors.add(1);
                0
            }
        };
        self.ring.push_used(head, used);
        None
    }

    fn hold(&mut self, held: Held) {
        if self.held.is_empty() {
            tracing::warn!(disk = %String::from_utf8_lossy(&self.shared.serial), "host disk is full, writes wait");
            self.announce(true);
            self.retry.arm(RETRY_INTERVAL);
        }
        self.held.push_back(held);
    }

    /// Tries held requests again, in their order; stops at the first that still finds no room.
    pub(super) fn retry_held(&mut self, now: Instant) {
        while let Some(Held { chain, since }) = self.held.pop_front() {
            if now.duration_since(since) >= self.shared.full_timeout {
                let head = chain.head_index();
                let used = match Request::parse(chain, &self.memory).map(|request| request.fail(&self.shared.counters))
                {
                    Ok(Outcome::Used(length)) => length,
                    Ok(Outcome::HostFull) | Err(_) => 0,
                };
                self.ring.push_used(head, used);
            } else if let Some(chain) = self.attempt(chain) {
                self.held.push_front(Held { chain, since });
                self.retry.arm(RETRY_INTERVAL);
                break;
            }
        }
        if self.held.is_empty() {
            tracing::info!(disk = %String::from_utf8_lossy(&self.shared.serial), "no write waits for the host disk any more");
            self.announce(false);
        }
        self.ring.signal();
    }

    fn announce(&self, full: bool) {
        if let Some(observer) = &self.shared.on_disk_full {
            observer(full);
        }
    }
}

impl MutEventSubscriber for BlockWorker {
    fn init(&mut self, operations: &mut EventOps) {
        for events in [
            Events::with_data(self.ring.kick(), KICK, EventSet::IN),
            Events::with_data(&self.retry, RETRY, EventSet::IN),
        ] {
            if let Err(error) = operations.add(events) {
                tracing::error!(%error, "disk cannot watch its queue");
            }
        }
        // Requests may have been made available before the kick was watched.
        self.serve(Instant::now());
    }

    fn process(&mut self, events: Events, _operations: &mut EventOps) {
        match events.data() {
            KICK => {
                self.ring.kick().drain();
                self.serve(Instant::now());
            }
            RETRY if self.retry.drain() => self.retry_held(Instant::now()),
            _ => {}
        }
    }
}

impl Worker for BlockWorker {
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        // They were taken out of order, so the ring's position cannot say which they are.
        if !self.held.is_empty() {
            return Err("writes wait for room on the host's disk".into());
        }
        Ok(vec![self.ring.position(0)])
    }

    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        vec![self.ring.into_queue()]
    }
}
