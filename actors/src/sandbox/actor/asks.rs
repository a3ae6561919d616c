//! What the API asks of one sandbox, beside pauses and snapshots of memory: events for its machine, its disk, its SSH forwarder, an explanation of
//! its network. Answers say whether a request was taken; what follows is seen in the view.

use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::vmm::NetworkExplanation;
use tokio::sync::oneshot;

use super::SandboxActor;
use super::steps::Step;
use crate::daemon::Daemon;
use crate::faults;
use crate::journal::Change;
use crate::sandbox::machine::{Denial, Event, State, Then};
use crate::sandbox::ssh::SshForwarder;
use crate::snapshots::Source;
use crate::vm::VmCommand;

/// What the API asks of a sandbox. The answer says whether it was taken; what follows is seen in the [`View`](crate::sandbox::view::View).
#[derive(Clone, Debug, Message)]
#[rtype(result = "Result<(), ApiError>")]
pub enum Ask {
    /// Feed the machine.
    Event(Event),
    /// Let it outlive its creator.
    Detach,
}

impl Handler<Ask> for SandboxActor {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, ask: Ask, ctx: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/ask");
        self.handled += 1;
        match ask {
            Ask::Event(event) => {
                let then_start = matches!(event, Event::Stop { then: Then::Start, .. });
                if self.disk.is_held() && (then_start || matches!(event, Event::Start { .. } | Event::Remove { .. })) {
                    let message = format!("a snapshot of sandbox {} is being taken", self.record.name);
                    return Err(ApiError::new(ErrorCode::SandboxBusy, message));
                }
                self.feed(event, ctx).map_err(|denial| {
                    let code = match (denial, event) {
                        (Denial::Gone, _) => ErrorCode::SandboxNotFound,
                        (Denial::Paused, _) => ErrorCode::SandboxPaused,
                        (Denial::StillRunning(_), _) => ErrorCode::SandboxStillRunning,
                        (Denial::Busy(_), _) => ErrorCode::SandboxBusy,
                    };
                    let asked = match event {
                        Event::Start { .. } => "started",
                        Event::Remove { .. } => "removed",
                        _ if then_start => "restarted",
                        _ => "stopped",
                    };
                    ApiError::new(code, format!("sandbox {} cannot be {asked}: {denial}", self.record.name))
                })
            }
            Ask::Detach => {
                self.machine.detach();
                self.record.spec.detached = true;
                self.record.creator = None;
                self.record.machine = self.machine.stored();
                if let Some(watch) = self.creator_watch.take() {
                    ctx.cancel_future(watch);
                }
                let change = Change::Put(Box::new(self.record.clone()), None);
                self.steps.push_back(Step::new(Some(change), Vec::new()));
                self.advance(ctx);
                Ok(())
            }
        }
    }
}

/// The sandbox's SSH forwarder, made if there is none yet.
#[derive(Message)]
#[rtype(result = "Result<Arc<SshForwarder>, ApiError>")]
pub struct OpenSsh(pub Daemon);

impl Handler<OpenSsh> for SandboxActor {
    type Result = ResponseActFuture<Self, Result<Arc<SshForwarder>, ApiError>>;

    fn handle(&mut self, OpenSsh(daemon): OpenSsh, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/ssh");
        self.handled += 1;
        if let Some(forwarder) = &self.ssh {
            return Box::pin(actix::fut::ready(Ok(Arc::clone(forwarder))));
        }
        let (root, keys) = (self.directories.root.clone(), self.surroundings.home.authorized_keys());
        let (name, id) = (self.record.name.clone(), self.record.id);
        let opening = tokio::task::spawn_blocking(move || SshForwarder::open(&root, keys, daemon, name, id));
        Box::pin(opening.into_actor(self).map(|opened, this, _| {
            let opened = opened.map_err(ApiError::internal)??;
            // Two clients may have come at once; the first one's is everybody's.
            Ok(Arc::clone(this.ssh.get_or_insert_with(|| Arc::new(opened))))
        }))
    }
}

/// The sandbox's disk for a snapshot: it neither starts nor goes away while that is held.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<Source, ApiError>")]
pub struct HoldDisk;

impl Handler<HoldDisk> for SandboxActor {
    type Result = Result<Source, ApiError>;

    fn handle(&mut self, _: HoldDisk, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/hold_disk");
        self.handled += 1;
        let (name, state) = (&self.record.name, self.machine.shown());
        // Asleep and restarting ones start by themselves.
        if !matches!(self.machine.state(), State::Stopped | State::Crashed) || self.stepping {
            let message = format!("sandbox {name} is {}: a snapshot is taken of a stopped one", state.as_str());
            return Err(ApiError::new(ErrorCode::SandboxStillRunning, message)
                .with_hint(format!("stop it first: msb stop {name}")));
        }
        self.has_image()?;
        if self.record.image_digest.is_empty() || !self.directories.upper.exists() {
            let message = format!("sandbox {name} has no disk yet: it never started");
            return Err(ApiError::new(ErrorCode::InvalidRequest, message).with_hint("start it once, then stop it"));
        }
        Ok(self.source())
    }
}

/// Asks the running VM which network rule would decide about a target. The answer comes from the VM process, beside the mailbox.
#[derive(Debug, Message)]
#[rtype(result = "Option<oneshot::Receiver<Result<NetworkExplanation, ApiError>>>")]
pub struct Explain(pub String);

impl Handler<Explain> for SandboxActor {
    type Result = MessageResult<Explain>;
    fn handle(&mut self, Explain(target): Explain, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/explain");
        self.handled += 1;
        let running =
            matches!(self.machine.state(), State::Running { .. } | State::Paused { .. } | State::Draining { .. });
        MessageResult(running.then(|| {
            let (reply, answer) = oneshot::channel();
            self.command(VmCommand::ExplainNetwork(target, reply));
            answer
        }))
    }
}

impl SandboxActor {
    /// Whether its root is an image, which a snapshot can hold on to.
    pub(super) fn has_image(&self) -> Result<(), ApiError> {
        if !self.record.spec.root.is_local() {
            return Ok(());
        }
        let message = format!("sandbox {} has no image: its root is {}", self.record.name, self.record.spec.image);
        Err(ApiError::new(ErrorCode::InvalidRequest, message)
            .with_hint("a snapshot needs an image that it can hold on to; load the root as one"))
    }

    /// It as a snapshot takes it. While that lives nobody starts or removes it.
    pub(super) fn source(&self) -> Source {
        Source {
            sandbox: self.record.name.clone(),
            sandbox_id: self.record.id,
            state: self.machine.shown(),
            spec: self.record.spec.clone(),
            image_digest: self.record.image_digest.clone(),
            parent: self.record.snapshot.clone(),
            disk: self.directories.upper.clone(),
            hold: self.disk.hold(),
        }
    }
}
