//! The meter of one run of a sandbox: what a sample becomes on its way to the metrics actor. Made by the sandbox's
//! actor with the run, which tells it what the guest says of itself and when the run is over; used by whoever reads
//! the VM's samples, beside the actor.
//!
//! ```text
//!  SandboxActor ── note_guest, end ──► Meter ◄── measure ── reader of samples ── batches ──► MetricsActor
//! ```
//!
//! It never waits. What it is told of a run that is over counts nowhere: neither as a sample nor as activity.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use msb_protocol::control::GuestMetrics;
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::vmm::Sample;

use super::{Measured, MetricsHandle};
use crate::clock::Clock;
use crate::sandbox::activity::{Activity, ActivityKind};

/// What is measured: one run of one sandbox.
#[derive(Debug)]
pub struct Subject {
    /// The sandbox.
    pub id: SandboxId,
    /// Its name.
    pub name: SandboxName,
    /// The run.
    pub boot_id: BootId,
    is_over: AtomicBool,
}

impl Subject {
    /// A run that begins.
    #[must_use]
    pub fn new(id: SandboxId, name: SandboxName, boot_id: BootId) -> Arc<Self> {
        Arc::new(Self { id, name, boot_id, is_over: AtomicBool::new(false) })
    }

    /// Whether its last sample was told.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

/// The meter.
#[derive(Debug)]
pub struct Meter {
    subject: Arc<Subject>,
    metrics: MetricsHandle,
    clock: Arc<dyn Clock>,
    activity: Arc<Activity>,
    /// What the agent said last. Only the actor writes it.
    guest: Mutex<Option<GuestMetrics>>,
    /// Connections through published ports that were opened, as of the last sample.
    visits: AtomicU64,
}

impl Meter {
    /// The meter of a run that begins, or that is taken over.
    #[must_use]
    pub fn new(
        subject: Arc<Subject>,
        metrics: MetricsHandle,
        clock: Arc<dyn Clock>,
        activity: Arc<Activity>,
    ) -> Arc<Self> {
        Arc::new(Self { subject, metrics, clock, activity, guest: Mutex::default(), visits: AtomicU64::new(0) })
    }

    /// The run.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        self.subject.boot_id
    }

    /// Whether the run is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.subject.is_over()
    }

    /// What the agent says now.
    pub fn note_guest(&self, guest: GuestMetrics) {
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest);
    }

    /// What a sample says of the sandbox, to be handed to the metrics actor; nothing once the run is over. Notes
    /// whether somebody visits it.
    #[must_use]
    pub fn measure(&self, sample: Sample) -> Option<Arc<Measured>> {
        if self.subject.is_over() {
            return None;
        }
        let opened = sample.network_inbound_opened;
        let before = self.visits.swap(opened, Ordering::Relaxed);
        if sample.network_inbound_open > 0 || (opened > 0 && opened != before) {
            self.activity.touch(ActivityKind::Connection);
        }
        let guest = *self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        let subject = Arc::clone(&self.subject);
        Some(Arc::new(Measured { subject, at_ms: self.clock.now_ms(), sample, guest }))
    }

    /// Hands a sample over by itself.
    pub fn sample(&self, sample: Sample) {
        if let Some(measured) = self.measure(sample) {
            self.metrics.take(vec![measured]);
        }
    }

    /// The run is over; `last` is what its VM process counted at the end.
    pub fn end(&self, last: Option<Sample>) {
        let last = last.and_then(|sample| self.measure(sample));
        self.subject.is_over.store(true, Ordering::Release);
        if let Some(last) = last {
            self.metrics.take_last(last);
        }
    }
}
