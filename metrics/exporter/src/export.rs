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
pub(crate) struct Queue(Arc<Mutex<Buffer<Collection>>>);

impl Queue {
    /// An empty queue of at most `max` collections.
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Mutex::new(Buffer::new(max))))
    }

    /// Works on the buffer.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Buffer<Collection>) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends at an interval until the process ends.
pub(crate) async fn run(
    queue: &Queue,
    sender: &mut Sender,
    resource: &BTreeMap<String, String>,
    own: &SelfMetrics,
    flush_interval: Duration,
) {
    let (mut failures, mut next) = (0u32, Instant::now() + flush_interval);
    loop {
        tokio::time::sleep_until(next).await;
        match flush(queue, sender, resource, own).await {
            Ok(()) => {
                failures = 0;
                next = (next + flush_interval).max(Instant::now());
            }
            Err(asked) => {
                let pause = retry::pause(flush_interval, failures, asked);
                failures = failures.saturating_add(1);
                tracing::info!(
                    pause_ms = pause.as_millis(),
                    waiting = queue.with(|buffer| buffer.len()),
                    "trying again later"
                );
                next = Instant::now() + pause;
            }
        }
    }
}

/// Sends everything that waits, oldest first, each collection with its own times. On a failure that may pass, what was being
/// sent goes back and the pause the backend asked for is given.
pub(crate) async fn flush(
    queue: &Queue,
    sender: &mut Sender,
    resource: &BTreeMap<String, String>,
    own: &SelfMetrics,
) -> Result<(), Option<Duration>> {
    let dropped = queue.with(Buffer::take_dropped);
    if dropped > 0 {
        tracing::warn!(dropped, "the buffer was full, the oldest collections are lost");
        own.collections_dropped(dropped);
    }
    while let Some(collection) = queue.with(Buffer::pop) {
        own.attributes_dropped(collection.attributes_dropped);
        match sender.send(&otlp::request(&collection, resource)).await {
            Outcome::Taken { rejected, message } => {
                own.taken(rejected);
                if rejected > 0 || !message.is_empty() {
                    tracing::warn!(rejected, message, "the backend took only a part");
                }
            }
            Outcome::Refused { message } => {
                own.failed();
                tracing::error!(
                    message,
                    points = collection.points.len(),
                    "the backend refused a collection, it is lost"
                );
            }
            Outcome::Later { pause, message } => {
                own.failed();
                tracing::warn!(message, "the backend did not take a collection");
                // Counted when it is taken at last.
                queue.with(|buffer| buffer.put_back(Collection { attributes_dropped: 0, ..collection }));
                return Err(pause);
            }
        }
    }
    Ok(())
}
