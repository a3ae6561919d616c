//! The latest sample of each sandbox, for whoever asks. Sandbox actors push; nobody pulls from a VM in a request's path.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::guest::Beat;
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::vmm::Sample;

use crate::clock::Clock;
use crate::faults;
use crate::inspect::{ActorReport, Inspect};
use crate::kept::{Kept, Life, Ticket};

/// Samples kept of each sandbox: two minutes of beats.
pub const RING_LEN: usize = 120;
/// Samples that wait before they are left out.
const MAILBOX_LEN: usize = 4_096;

/// One beat of one sandbox.
#[derive(Clone, Debug)]
pub struct BeatSample {
    /// The sandbox.
    pub id: SandboxId,
    /// Its name.
    pub name: SandboxName,
    /// The run.
    pub boot_id: BootId,
    /// When it arrived, on the daemon's clock.
    pub at_ms: u64,
    /// What the agent said.
    pub beat: Beat,
    /// What the VM process counted.
    pub sample: Sample,
}

/// A sample on its way.
#[derive(Debug, Message)]
#[rtype(result = "()")]
struct Sampled(BeatSample, Ticket);

/// The newest sample of one sandbox and what it says beside the one before it.
#[derive(Clone, Debug)]
pub struct Newest {
    /// The sample.
    pub sample: BeatSample,
    /// vCPU seconds per second between the last two samples; 0 after the first.
    pub cpu_utilization: f64,
}

/// The sandbox is gone.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Forget(pub SandboxId);

/// The newest sample of each sandbox.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Vec<Newest>")]
pub struct Latest;

/// The way to the actor that never waits: a sample it has no room for is left out.
#[derive(Clone, Debug)]
pub struct MetricsHandle(pub Kept<MetricsActor>);

impl MetricsHandle {
    /// Starts the actor. What it held is lost when it dies, and comes back with the next beats.
    #[must_use]
    pub fn start(clock: Arc<dyn Clock>) -> Self {
        Self(Kept::keep("metrics", clock, |life| MetricsActor { rings: BTreeMap::new(), handled: 0, _life: life }))
    }

    /// Hands a sample over.
    pub fn sample(&self, sample: BeatSample) {
        if self.0.try_send(Sampled(sample, self.0.ticket())).is_err() {
            tracing::trace!("a sample was left out");
        }
    }

    /// Says that a sandbox is gone.
    pub fn forget(&self, id: SandboxId) {
        // Its ring is bounded and small; one left behind under a flood is only that.
        if self.0.try_send(Forget(id)).is_err() {
            tracing::debug!(%id, "samples of a removed sandbox stay");
        }
    }
}

/// Holds the samples.
#[derive(Debug)]
pub struct MetricsActor {
    rings: BTreeMap<SandboxId, VecDeque<BeatSample>>,
    handled: u64,
    _life: Life,
}

impl Actor for MetricsActor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
    }
}

impl Handler<Sampled> for MetricsActor {
    type Result = ();
    fn handle(&mut self, Sampled(sample, _ticket): Sampled, _: &mut Self::Context) {
        faults::here("metrics/sample");
        self.handled += 1;
        let ring = self.rings.entry(sample.id).or_default();
        // Nothing of an earlier boot counts for this one.
        if ring.back().is_some_and(|last| last.boot_id != sample.boot_id) {
            ring.clear();
        }
        if ring.len() == RING_LEN {
            ring.pop_front();
        }
        ring.push_back(sample);
    }
}

impl Handler<Forget> for MetricsActor {
    type Result = ();
    fn handle(&mut self, Forget(id): Forget, _: &mut Self::Context) {
        faults::here("metrics/forget");
        self.handled += 1;
        self.rings.remove(&id);
    }
}

impl Handler<Latest> for MetricsActor {
    type Result = MessageResult<Latest>;
    fn handle(&mut self, _: Latest, _: &mut Self::Context) -> Self::Result {
        faults::here("metrics/latest");
        self.handled += 1;
        MessageResult(
            self.rings
                .values()
                .filter_map(|ring| {
                    let sample = ring.back()?.clone();
                    let before = ring.len().checked_sub(2).and_then(|place| ring.get(place));
                    let cpu_utilization = before.map_or(0.0, |before| utilization(&before.sample, &sample.sample));
                    Some(Newest { sample, cpu_utilization })
                })
                .collect(),
        )
    }
}

/// vCPU seconds per second between two samples of one run. Counters that went backwards say nothing.
#[allow(clippy::cast_precision_loss, reason = "differences of a few seconds in nanoseconds are far below 2^53")]
fn utilization(before: &Sample, after: &Sample) -> f64 {
    let elapsed_ns = after.at_ns.saturating_sub(before.at_ns);
    let ran_us = after.cpu_time_us.saturating_sub(before.cpu_time_us);
    if elapsed_ns == 0 { 0.0 } else { ran_us as f64 * 1e3 / elapsed_ns as f64 }
}

impl Handler<Inspect> for MetricsActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("metrics/inspect");
        MessageResult(ActorReport {
            handled: self.handled,
            state: format!("samples of {} sandboxes", self.rings.len()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utilization_is_vcpu_seconds_per_second() {
        let sample = |at_s: u64, cpu_ms: u64| Sample {
            at_ns: at_s * 1_000_000_000,
            cpu_time_us: cpu_ms * 1_000,
            ..Sample::default()
        };
        assert!((utilization(&sample(10, 0), &sample(12, 3_000)) - 1.5).abs() < 1e-9);
        assert!(utilization(&sample(10, 5), &sample(10, 9)).abs() < 1e-9, "no time, no rate");
        assert!(utilization(&sample(10, 500), &sample(11, 0)).abs() < 1e-9, "a counter that went backwards");
    }
}
