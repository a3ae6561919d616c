//! Sends what was collected: a task of its own, so that a slow backend never delays a collection, with the buffer between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::otlp;
use crate::point::Collection;
use crate::retry::{self, Outcome};
use crate::self_metrics::SelfMetrics;
use crate::sender::Sender;

/// The buffer between collecting and sending. The lock is held only to move one entry.
#[derive(Clone, Debug)]
pub(crate) struct Queue(Arc<Mutex<Buffer<Arc<Collection>>>>);

impl Queue {
    /// An empty queue of at most `max` collections.
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Mutex::new(Buffer::new(max))))
    }

    /// Works on the buffer.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Buffer<Arc<Collection>>) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends what is in the queue.
pub(crate) struct Exporter {
    /// Where it waits.
    pub queue: Queue,
    /// The backend.
    pub sender: Sender,
    /// Resource attributes of the user.
    pub resource: BTreeMap<String, String>,
    /// The exporter's own metrics.
    pub own: SelfMetrics,
    /// The collection of which a part was taken, and where the rest begins.
    pub partly: Option<(u64, usize)>,
}

impl Exporter {
    /// Sends at an interval until the process ends.
    pub(crate) async fn run(&mut self, flush_interval: Duration) {
        let (mut failures, mut next) = (0u32, Instant::now() + flush_interval);
        loop {
            tokio::time::sleep_until(next).await;
            match self.flush().await {
                Ok(()) => {
                    failures = 0;
                    next = (next + flush_interval).max(Instant::now());
                }
                Err(asked) => {
                    let pause = retry::pause(flush_interval, failures, asked);
                    failures = failures.saturating_add(1);
                    tracing::info!(
                        pause_ms = pause.as_millis(),
                        waiting = self.queue.with(|buffer| buffer.len()),
                        "trying again later"
                    );
                    next = Instant::now() + pause;
                }
            }
        }
    }

    /// Sends everything that waits, oldest first, each collection with its own times. On a failure that may pass, what was not taken
    /// stays and the pause the backend asked for is given.
    pub(crate) async fn flush(&mut self) -> Result<(), Option<Duration>> {
        loop {
            let dropped = self.queue.with(Buffer::take_dropped);
            if dropped > 0 {
                tracing::warn!(dropped, "the buffer was full, the oldest collections are lost");
                self.own.collections_dropped(dropped);
            }
            let Some((id, collection)) = self.queue.with(|buffer| buffer.front()) else { return Ok(()) };
            self.own.begin(&collection.host);
            let mut first = self.partly.take().filter(|(partly, _)| *partly == id).map_or(0, |(_, first)| first);
            while let Some((request, next)) = otlp::request(&collection, first, &self.resource) {
                // Where a send that is cut short or fails goes on.
                self.partly = Some((id, first));
                match self.sender.send(request).await {
                    Outcome::Taken { rejected, message } => {
                        self.own.taken(rejected);
                        if rejected > 0 || !message.is_empty() {
                            tracing::warn!(rejected, message, "the backend took only a part");
                        }
                    }
                    Outcome::Refused { message } => {
                        self.own.failed();
                        tracing::error!(
                            message,
                            sandboxes = next.min(collection.readings.len()) - first,
                            "the backend refused a batch, it is lost"
                        );
                    }
                    Outcome::Later { pause, message } => {
                        self.own.failed();
                        tracing::warn!(message, "the backend did not take a batch");
                        return Err(pause);
                    }
                }
                first = next;
            }
            self.partly = None;
            self.own.attributes_dropped(collection.attributes_dropped);
            self.queue.with(|buffer| buffer.done(id));
        }
    }
}
