//! What the actor does for its sandbox beside running it: health checks, the pre-stop hook, labels. The rules are `sandbox::health`'s and
//! the machine's; the commands run beside the mailbox (`sandbox::probe`). Called by the actor's own glue; it decides nothing.

use std::collections::BTreeMap;

use actix::prelude::*;
use msb_protocol::control::LabelRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::health::{HealthReport, HealthStatus};
use msb_protocol::id::BootId;
use msb_protocol::labels::{self, LABEL_COUNT_MAX};
use tokio::sync::oneshot;

use super::{News, SandboxActor, Step};
use crate::faults;
use crate::journal::{Change, EventDraft};
use crate::sandbox::health::HealthWatch;
use crate::sandbox::machine::Event;
use crate::sandbox::probe::{self, Probed};

/// The checks of the present run.
pub(super) struct Care {
    boot_id: BootId,
    watch: HealthWatch,
    last: Option<(jiff::Timestamp, Probed)>,
    timer: Option<SpawnHandle>,
}

impl Care {
    /// What is shown of it.
    pub(super) fn report(&self) -> HealthReport {
        let (outcome, output) =
            self.last.as_ref().map(|(_, probed)| (probed.outcome.clone(), probed.output.clone())).unwrap_or_default();
        HealthReport {
            status: self.watch.status(),
            failing_streak: self.watch.failing_streak(),
            checked_at: self.last.as_ref().map(|(at, _)| *at),
            outcome,
            output,
        }
    }
}

impl SandboxActor {
    /// A run became ready: its checks begin.
    pub(super) fn begin_care(&mut self, boot_id: BootId, ctx: &mut Context<Self>) {
        self.end_care(ctx);
        let Some(check) = self.record.spec.health.clone() else { return };
        let watch = HealthWatch::new(check, self.now_ms());
        self.care = Some(Care { boot_id, watch, last: None, timer: None });
        self.arm_care(ctx);
    }

    /// The run is over or on its way down: nobody asks any more.
    pub(super) fn end_care(&mut self, ctx: &mut Context<Self>) {
        if let Some(timer) = self.care.take().and_then(|care| care.timer) {
            ctx.cancel_future(timer);
        }
    }

    fn arm_care(&mut self, ctx: &mut Context<Self>) {
        let Some(due_ms) = self.care.as_ref().and_then(|care| care.watch.due_ms()) else { return };
        let sleep = self.surroundings.clock.sleep_until(due_ms);
        let timer = ctx.spawn(sleep.into_actor(self).map(|(), this, ctx| this.examine(ctx)));
        if let Some(care) = self.care.as_mut() {
            care.timer = Some(timer);
        }
    }

    fn examine(&mut self, ctx: &mut Context<Self>) {
        let (Some(care), Some(check)) = (self.care.as_mut(), self.record.spec.health.clone()) else { return };
        care.timer = None;
        care.watch.begin();
        let boot_id = care.boot_id;
        let (launcher, run_dir) = (self.surroundings.launcher.clone(), self.directories.run.clone());
        self.later(ctx, async move {
            News::Examined(boot_id, probe::run(&*launcher, &run_dir, boot_id, check.command, check.timeout_ms).await)
        });
    }

    pub(super) fn examined(&mut self, boot_id: BootId, probed: Probed, ctx: &mut Context<Self>) {
        let (now_ms, at) = (self.now_ms(), self.surroundings.clock.wall());
        let Some(care) = self.care.as_mut().filter(|care| care.boot_id == boot_id) else { return };
        let changed = care.watch.finish(probed.success, now_ms);
        let message = changed.map(|status| format!("{}: {}", status.as_str(), probed.outcome));
        care.last = Some((at, probed));
        self.arm_care(ctx);
        let Some(message) = message else { return self.settle_or_later() };
        self.note("health", Some(boot_id), message, ctx);
        if changed == Some(HealthStatus::Unhealthy) {
            self.tell(Event::Unhealthy, ctx);
        }
    }

    /// Shows the news of a check unless a step is under way, whose end shows everything.
    fn settle_or_later(&mut self) {
        if !self.stepping && self.steps.is_empty() {
            self.publish();
        }
    }

    fn draft(&self, event: &str, boot_id: Option<BootId>, actor: &str, message: String) -> EventDraft {
        EventDraft {
            sandbox: self.record.name.clone(),
            sandbox_id: self.record.id,
            boot_id,
            event: event.into(),
            state: self.machine.shown(),
            cause: None,
            actor: actor.into(),
            message,
        }
    }

    /// Tells something in the events without a change of the record.
    fn note(&mut self, event: &str, boot_id: Option<BootId>, message: String, ctx: &mut Context<Self>) {
        let draft = self.draft(event, boot_id, "supervisor", message);
        self.steps.push_back(Step::new(Some(Change::Event(draft)), Vec::new()));
        self.advance(ctx);
    }

    /// Runs the pre-stop hook of the run that is on.
    pub(super) fn run_hook(&mut self, ctx: &mut Context<Self>) {
        let (Some(run), Some(hook)) = (self.machine.run(), self.record.spec.pre_stop.clone()) else {
            return self.tell(Event::HookDone, ctx);
        };
        let (launcher, run_dir, boot_id) =
            (self.surroundings.launcher.clone(), self.directories.run.clone(), run.boot_id);
        self.later(ctx, async move {
            News::Hooked(boot_id, probe::run(&*launcher, &run_dir, boot_id, hook.command, hook.timeout_ms).await)
        });
    }

    pub(super) fn hooked(&mut self, boot_id: BootId, probed: &Probed, ctx: &mut Context<Self>) {
        if self.machine.run().is_none_or(|run| run.boot_id != boot_id) {
            return;
        }
        // The stop goes on whatever the hook did; whoever wrote it wants to know.
        let last_line = probed.output.lines().rfind(|line| !line.is_empty()).unwrap_or_default();
        let message = if probed.success || last_line.is_empty() {
            probed.outcome.clone()
        } else {
            format!("{}: {last_line}", probed.outcome)
        };
        if !probed.success {
            tracing::warn!(sandbox = %self.record.name, outcome = probed.outcome, "the pre-stop hook failed");
        }
        self.tell(Event::HookDone, ctx);
        self.note("pre_stop", Some(boot_id), message, ctx);
    }
}

/// Change labels. The answer is a channel that says when the change is durable.
#[derive(Clone, Debug, Message)]
#[rtype(result = "Result<oneshot::Receiver<Result<(), ApiError>>, ApiError>")]
pub struct Relabel(pub LabelRequest);

impl Handler<Relabel> for SandboxActor {
    type Result = Result<oneshot::Receiver<Result<(), ApiError>>, ApiError>;

    fn handle(&mut self, Relabel(request): Relabel, ctx: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/relabel");
        self.handled += 1;
        // The record has none before the image's were found: they would be lost.
        if self.record.image_digest.is_empty() {
            return Err(ApiError::new(
                ErrorCode::SandboxBusy,
                format!("sandbox {} is being created", self.record.name),
            ));
        }
        let change = |map: &BTreeMap<String, String>| {
            let mut map = map.clone();
            map.retain(|key, _| !request.remove.contains(key));
            map.extend(request.set.clone());
            map
        };
        let (all, own) = (change(&self.record.labels), change(&self.record.spec.labels));
        if all.len() > LABEL_COUNT_MAX {
            let message = format!("too many labels: {} (max {LABEL_COUNT_MAX})", all.len());
            return Err(ApiError::new(ErrorCode::InvalidLabel, message));
        }
        labels::check_all(&request.set)?;
        (self.record.labels, self.record.spec.labels) = (all, own);
        let keys: Vec<&str> = request.set.keys().chain(&request.remove).map(String::as_str).collect();
        let message: String = keys.join(", ").chars().filter(|c| !c.is_control()).take(256).collect();
        let draft = self.draft("labels", self.machine.run().map(|run| run.boot_id), "user", message);
        let (waiting, durable) = oneshot::channel();
        let mut step = Step::new(Some(Change::Put(Box::new(self.record.clone()), Some(draft))), Vec::new());
        step.waiting = Some(waiting);
        self.steps.push_back(step);
        self.advance(ctx);
        Ok(durable)
    }
}
