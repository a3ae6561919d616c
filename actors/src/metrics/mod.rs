//! The samples of every sandbox: the newest, and the last hour. Whoever reads the VMs' samples pushes what one look at
//! all of them brought (`crate::vm::samples`); nobody pulls from a VM in a request's path.
//!
//! | file | holds |
//! |---|---|
//! | `mod` | the actor and its messages |
//! | `meter` | what a sample becomes on its way here |
//! | `ring` | an hour of one sandbox in few bytes |
//! | `snapshot` | what the API answers |

pub mod meter;
pub mod ring;
pub mod snapshot;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::control::GuestMetrics;
use msb_protocol::id::{BootId, SandboxId};
use msb_protocol::vmm::Sample;

use self::meter::Subject;
use self::ring::{Entry, Ring};
use crate::clock::Clock;
use crate::faults;
use crate::host_identity::HostIdentity;
use crate::inspect::{ActorReport, Inspect};
use crate::kept::{Kept, Life, Ticket};

/// Time for which samples are kept, in milliseconds.
pub const HISTORY_MS: u64 = 3_600_000;
/// Bytes for the history of one sandbox.
const HISTORY_BYTES_MAX: usize = 256 << 10;
/// Bytes for the history of all of them; many sandboxes have less each.
const HISTORIES_BYTES_MAX: usize = 64 << 20;
/// Time for which the last sample of a removed sandbox is still told, in milliseconds.
const DEPARTED_MS: u64 = 120_000;
/// Removed sandboxes whose last sample is still told.
const DEPARTED_MAX: usize = 4_096;
/// Messages that wait before they are left out: more than there are runs that end at once.
const MAILBOX_LEN: usize = 4_096;
/// Of them, so many may be batches of samples: what is said of a run's end finds room beside them.
const BATCHES_WAITING_MAX: u64 = 2_048;

/// One sample of one sandbox.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Of what.
    pub subject: Arc<Subject>,
    /// When it arrived, on the daemon's clock.
    pub at_ms: u64,
    /// What the VM process counted.
    pub sample: Sample,
    /// What the agent said last; absent before its first beat.
    pub guest: Option<GuestMetrics>,
}

/// Samples on their way.
#[derive(Debug, Message)]
#[rtype(result = "()")]
struct Sampled {
    batch: Vec<Arc<Measured>>,
    /// The last ones of their runs. All others do not count when their run is over.
    are_last: bool,
    _ticket: Ticket,
}

/// The newest sample of one sandbox and what it says beside the one before it.
#[derive(Clone, Debug)]
pub struct Newest {
    /// The sample, shared with whoever tells it.
    pub measured: Arc<Measured>,
    /// vCPU seconds per second between the last two samples; 0 after the first.
    pub cpu_utilization: f64,
}

/// The sandbox is gone.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Forget {
    /// The sandbox.
    pub id: SandboxId,
    /// When, on the daemon's clock.
    pub at_ms: u64,
    /// What else is told with its last sample.
    pub last_words: LastWords,
}

/// What stays known of a removed sandbox while its last sample is told.
#[derive(Clone, Debug)]
pub struct LastWords {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its restarts.
    pub restarts: u32,
    /// When it was created.
    pub created_at: jiff::Timestamp,
}

/// A removed sandbox.
#[derive(Clone, Debug)]
pub struct Departed {
    /// Its last sample.
    pub newest: Newest,
    /// What else is told of it.
    pub last_words: LastWords,
    gone_at_ms: u64,
}

/// The newest sample of each sandbox, by identity, and the last ones of those removed not long before this time.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "(Vec<(SandboxId, Newest)>, Vec<Departed>)")]
pub struct Latest {
    /// Now, on the daemon's clock.
    pub now_ms: u64,
}

/// The samples of one sandbox from a time on, oldest first.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Vec<(BootId, Entry)>")]
pub struct History {
    /// The sandbox.
    pub id: SandboxId,
    /// From this time on, on the daemon's clock.
    pub since_ms: u64,
}

/// The way to the actor that never waits: a sample it has no room for is left out.
#[derive(Clone, Debug)]
pub struct MetricsHandle {
    actor: Kept<MetricsActor>,
    identity: Arc<HostIdentity>,
}

impl MetricsHandle {
    /// Starts the actor of the service of `home`. What it held is lost when it dies; the newest comes back with the next samples.
    #[must_use]
    pub fn start(home: &Path, clock: Arc<dyn Clock>) -> Self {
        let make = |life| MetricsActor { _life: Some(life), ..MetricsActor::default() };
        Self { actor: Kept::keep("metrics", clock, make), identity: Arc::new(HostIdentity::read(home)) }
    }

    /// The actor.
    #[must_use]
    pub fn actor(&self) -> &Kept<MetricsActor> {
        &self.actor
    }

    /// Who this host and this service are.
    #[must_use]
    pub fn identity(&self) -> &HostIdentity {
        &self.identity
    }

    /// Hands samples over.
    pub fn take(&self, batch: Vec<Arc<Measured>>) {
        if self.actor.waiting() < BATCHES_WAITING_MAX {
            self.send(batch, false);
        }
    }

    /// Hands the last sample of a run over.
    pub fn take_last(&self, measured: Arc<Measured>) {
        self.send(vec![measured], true);
    }

    fn send(&self, batch: Vec<Arc<Measured>>, are_last: bool) {
        if self.actor.try_send(Sampled { batch, are_last, _ticket: self.actor.ticket() }).is_err() {
            tracing::trace!("samples were left out");
        }
    }

    /// Says that a sandbox is gone.
    pub fn forget(&self, forget: Forget) {
        let id = forget.id;
        // Its ring is bounded and small; one left behind under a flood is only that.
        if self.actor.try_send(forget).is_err() {
            tracing::debug!(%id, "samples of a removed sandbox stay");
        }
    }
}

#[derive(Debug)]
struct Series {
    newest: Newest,
    ring: Ring,
}

/// Holds the samples.
#[derive(Debug, Default)]
pub struct MetricsActor {
    series: BTreeMap<SandboxId, Series>,
    departed: VecDeque<Departed>,
    handled: u64,
    _life: Option<Life>,
}

impl MetricsActor {
    fn take(&mut self, measured: Arc<Measured>) {
        let bytes_max = (HISTORIES_BYTES_MAX / (self.series.len() + 1)).min(HISTORY_BYTES_MAX);
        let (id, boot_id, entry) = (measured.subject.id, measured.subject.boot_id, snapshot::entry(&measured));
        match self.series.get_mut(&id) {
            Some(series) => {
                let before = &series.newest;
                // Nothing of an earlier boot counts for this one.
                let cpu_utilization = if before.measured.subject.boot_id != boot_id {
                    0.0
                } else if measured.sample.at_ns <= before.measured.sample.at_ns {
                    // Two samples of one moment: no time, no rate.
                    before.cpu_utilization
                } else {
                    utilization(&before.measured.sample, &measured.sample)
                };
                series.newest = Newest { measured, cpu_utilization };
                series.ring.push(boot_id, entry, HISTORY_MS, bytes_max);
            }
            None => {
                let mut series = Series { newest: Newest { measured, cpu_utilization: 0.0 }, ring: Ring::default() };
                series.ring.push(boot_id, entry, HISTORY_MS, bytes_max);
                self.series.insert(id, series);
            }
        }
    }

    fn forget(&mut self, Forget { id, at_ms, last_words }: Forget) {
        if let Some(series) = self.series.remove(&id) {
            if self.departed.len() == DEPARTED_MAX {
                self.departed.pop_front();
            }
            self.departed.push_back(Departed { newest: series.newest, last_words, gone_at_ms: at_ms });
        }
    }

    fn latest(&mut self, now_ms: u64) -> (Vec<(SandboxId, Newest)>, Vec<Departed>) {
        self.departed.retain(|departed| departed.gone_at_ms + DEPARTED_MS > now_ms);
        let newest = self.series.iter().map(|(id, series)| (*id, series.newest.clone()));
        (newest.collect(), self.departed.iter().cloned().collect())
    }
}

impl Actor for MetricsActor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
    }
}

impl Handler<Sampled> for MetricsActor {
    type Result = ();
    fn handle(&mut self, Sampled { batch, are_last, .. }: Sampled, _: &mut Self::Context) {
        faults::here("metrics/sample");
        self.handled += 1;
        // Looked at here, on the thread of the sandboxes' actors: nothing that was under way comes after a run's last
        // sample.
        batch.into_iter().filter(|measured| are_last || !measured.subject.is_over()).for_each(|one| self.take(one));
    }
}

impl Handler<Forget> for MetricsActor {
    type Result = ();
    fn handle(&mut self, forget: Forget, _: &mut Self::Context) {
        faults::here("metrics/forget");
        self.handled += 1;
        self.forget(forget);
    }
}

impl Handler<Latest> for MetricsActor {
    type Result = MessageResult<Latest>;
    fn handle(&mut self, Latest { now_ms }: Latest, _: &mut Self::Context) -> Self::Result {
        faults::here("metrics/latest");
        self.handled += 1;
        MessageResult(self.latest(now_ms))
    }
}

impl Handler<History> for MetricsActor {
    type Result = MessageResult<History>;
    fn handle(&mut self, History { id, since_ms }: History, _: &mut Self::Context) -> Self::Result {
        faults::here("metrics/history");
        self.handled += 1;
        MessageResult(self.series.get(&id).map(|series| series.ring.since(since_ms)).unwrap_or_default())
    }
}

/// vCPU seconds per second between two samples of one run. Counters that went backwards say nothing.
#[allow(clippy::cast_precision_loss, reason = "differences of a few seconds in nanoseconds are far below 2^53")]
pub(crate) fn utilization(before: &Sample, after: &Sample) -> f64 {
    let elapsed_ns = after.at_ns.saturating_sub(before.at_ns);
    let ran_us = after.cpu_time_us.saturating_sub(before.cpu_time_us);
    if elapsed_ns == 0 { 0.0 } else { ran_us as f64 * 1e3 / elapsed_ns as f64 }
}

impl Handler<Inspect> for MetricsActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("metrics/inspect");
        let bytes: usize = self.series.values().map(|series| series.ring.bytes()).sum();
        MessageResult(ActorReport {
            handled: self.handled,
            state: format!("samples of {} sandboxes, {} KiB of history", self.series.len(), bytes >> 10),
        })
    }
}

#[cfg(test)]
mod tests {
    use msb_protocol::id::SandboxName;

    use super::*;

    fn sample(at_s: u64, cpu_ms: u64) -> Sample {
        Sample { at_ns: at_s * 1_000_000_000, cpu_time_us: cpu_ms * 1_000, ..Sample::default() }
    }

    fn measured(sandbox: u128, run: u128, at_s: u64, cpu_ms: u64) -> Arc<Measured> {
        let id = SandboxId(uuid::Uuid::from_u128(sandbox));
        let name = SandboxName::parse(&format!("s{sandbox}")).unwrap();
        Arc::new(Measured {
            subject: Subject::new(id, name, BootId(uuid::Uuid::from_u128(run))),
            at_ms: at_s * 1_000,
            sample: sample(at_s, cpu_ms),
            guest: None,
        })
    }

    #[test]
    fn utilization_is_vcpu_seconds_per_second() {
        assert!((utilization(&sample(10, 0), &sample(12, 3_000)) - 1.5).abs() < 1e-9);
        assert!(utilization(&sample(10, 5), &sample(10, 9)).abs() < 1e-9, "no time, no rate");
        assert!(utilization(&sample(10, 500), &sample(11, 0)).abs() < 1e-9, "a counter that went backwards");
    }

    #[test]
    fn nothing_of_an_earlier_run_counts_for_the_newest() {
        let mut actor = MetricsActor::default();
        let newest = |actor: &mut MetricsActor| actor.latest(0).0[0].1.cpu_utilization;
        actor.take(measured(1, 1, 10, 0));
        actor.take(measured(1, 1, 11, 500));
        assert!((newest(&mut actor) - 0.5).abs() < 1e-9);
        actor.take(measured(1, 2, 12, 100));
        assert!(newest(&mut actor).abs() < 1e-9);
        assert_eq!(actor.series.values().next().unwrap().ring.since(0).len(), 3);
    }

    #[test]
    fn the_last_sample_of_a_removed_sandbox_is_told_for_a_while() {
        let mut actor = MetricsActor::default();
        actor.take(measured(1, 1, 10, 0));
        let last_words = LastWords { labels: BTreeMap::new(), restarts: 2, created_at: jiff::Timestamp::UNIX_EPOCH };
        actor.forget(Forget { id: SandboxId(uuid::Uuid::from_u128(1)), at_ms: 11_000, last_words });
        let (living, departed) = actor.latest(12_000);
        assert_eq!((living.len(), departed.len(), departed[0].last_words.restarts), (0, 1, 2));
        assert!(actor.latest(11_000 + DEPARTED_MS).1.is_empty());
    }

    #[test]
    fn many_histories_stay_within_their_bound_together() {
        let mut actor = MetricsActor::default();
        for at in 0..200u64 {
            for sandbox in 0..100u128 {
                actor.take(measured(sandbox, 1, at, at * 7));
            }
        }
        let bytes: usize = actor.series.values().map(|series| series.ring.bytes()).sum();
        assert!(bytes < 200 * 100 * 16, "{bytes}");
    }
}
