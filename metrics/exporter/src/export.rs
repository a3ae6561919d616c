//! Sends what was collected: a task of its own, so that a slow backend never delays a collection, with the buffer between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::otlp;
use crate::point::Collection;
use crate::retry::{self, Outcome};
use crate::self_metrics::SelfMetrics;

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

/// Who takes requests: the real one is [`Sender`](crate::sender::Sender).
pub(crate) trait Backend {
    /// One attempt with an encoded request.
    fn send(&mut self, request: Bytes) -> impl Future<Output = Outcome>;
}

/// Sends what is in the queue.
pub(crate) struct Exporter<B> {
    /// Where it waits.
    pub queue: Queue,
    /// The backend.
    pub backend: B,
    /// Resource attributes of the user.
    pub resource: BTreeMap<String, String>,
    /// The exporter's own metrics.
    pub own: SelfMetrics,
    /// The collection of which a part was taken, and where the rest begins.
    pub partly: Option<(u64, usize)>,
}

impl<B: Backend> Exporter<B> {
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
                match self.backend.send(request).await {
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
    use opentelemetry_proto::tonic::metrics::v1::metric::Data;
    use prost::Message as _;

    use super::*;
    use crate::collect::tests::fleet;
    use crate::collect::{AttributeChoice, Memory, collect};

    /// A backend that is away for a time, on the turned clock.
    struct Away {
        until: Instant,
        /// When it was asked while it was away.
        refused: Rc<RefCell<Vec<Instant>>>,
        /// The seconds of the samples that it took.
        taken: Rc<RefCell<Vec<u64>>>,
    }

    impl Backend for Away {
        async fn send(&mut self, request: Bytes) -> Outcome {
            if Instant::now() < self.until {
                self.refused.borrow_mut().push(Instant::now());
                return Outcome::Later { pause: None, message: "connection refused".into() };
            }
            let request = ExportMetricsServiceRequest::decode(request).unwrap();
            let metrics = &request.resource_metrics[0].scope_metrics[0].metrics;
            let uptime = metrics.iter().find(|metric| metric.name == "microsandbox.uptime").unwrap();
            let Some(Data::Gauge(gauge)) = &uptime.data else { panic!("a gauge") };
            self.taken.borrow_mut().push(gauge.data_points[0].time_unix_nano / 1_000_000_000);
            Outcome::Taken { rejected: 0, message: String::new() }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_that_is_away_for_five_minutes_costs_the_oldest_collections_and_few_requests() {
        const AWAY_S: u64 = 300;
        const BUFFERED: usize = 60;
        let begin = Instant::now();
        let (refused, taken) = (Rc::default(), Rc::default());
        let backend =
            Away { until: begin + Duration::from_secs(AWAY_S), refused: Rc::clone(&refused), taken: Rc::clone(&taken) };
        let queue = Queue::new(BUFFERED);
        let own = SelfMetrics::silent();
        let counts = own.counts();
        let mut exporter = Exporter { queue: queue.clone(), backend, resource: BTreeMap::new(), own, partly: None };
        // A collection each second for ten minutes, as the collector makes them.
        let collecting = async {
            let mut memory = Memory::default();
            for second in 1..=600 {
                tokio::time::sleep_until(begin + Duration::from_secs(second)).await;
                let collection = collect(&fleet(1, second), &AttributeChoice::default(), &mut memory);
                queue.with(|buffer| buffer.push(Arc::new(collection.keep_new())));
                assert!(queue.with(|buffer| buffer.len()) <= BUFFERED);
            }
        };
        tokio::select! {
            () = collecting => {}
            () = exporter.run(Duration::from_secs(10)) => {}
        }
        let refused: Vec<u64> = refused.borrow().iter().map(|at| (*at - begin).as_secs()).collect();
        assert_eq!(refused, [10, 20, 40, 80, 140, 200, 260], "the pause doubles up to a minute");
        // The first try after it came back: 260 + 60 s. Sixty collections were kept by then, and after them nothing is missing.
        let taken = taken.borrow();
        let first = taken[0];
        assert!((260..=261).contains(&first), "{first}");
        assert_eq!(*taken, (first..first + taken.len() as u64).collect::<Vec<_>>(), "in order, none twice, own times");
        assert!(*taken.last().unwrap() >= 580, "{taken:?}");
        assert_eq!(counts.dropped(), first - 1, "what is lost is counted");
    }
}
