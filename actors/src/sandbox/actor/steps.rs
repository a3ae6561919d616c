//! The steps of a sandbox: a change is durable before what follows of it happens and before anybody sees it.
//!
//! ```text
//!  feed ─► queue ─► oldest step ─► journal ─► effects ─► next step ─► … ─► none left: settle (ports, view, timer)
//!                                    └─ refused: tried again; a start is given up
//! ```
//!
//! Called by the actor when its machine has made a step. It never decides what the effects are.

use actix::prelude::*;
use msb_protocol::error::ApiError;
use tokio::sync::oneshot;

use super::SandboxActor;
use crate::journal::Change;
use crate::sandbox::machine::{Effect, Event, State};

/// Wait before a change that the journal refused is offered again, in milliseconds.
const JOURNAL_RETRY_MS: u64 = 1_000;

/// What follows of one event.
pub(super) struct Step {
    pub(super) change: Option<Change>,
    pub(super) effects: Vec<Effect>,
    /// Who waits for the change to be durable.
    pub(super) waiting: Option<oneshot::Sender<Result<(), ApiError>>>,
}

impl Step {
    pub(super) fn new(change: Option<Change>, effects: Vec<Effect>) -> Self {
        Self { change, effects, waiting: None }
    }
}

impl SandboxActor {
    /// Does the oldest step: first the journal, then the effects, then the next step.
    pub(super) fn advance(&mut self, ctx: &mut Context<Self>) {
        if self.stepping {
            return;
        }
        let Some(step) = self.steps.pop_front() else { return self.settle(ctx) };
        match step.change {
            None => {
                self.perform(step.effects, ctx);
                self.advance(ctx);
            }
            Some(change) => {
                self.stepping = true;
                let journal = self.surroundings.journal.clone();
                let durable =
                    async move { journal.write(change).await }.into_actor(self).map(move |outcome, this, ctx| {
                        this.stepping = false;
                        this.go_on(outcome.clone(), step.effects, ctx);
                        // Only now: whoever asked finds what followed at once, in the view and on the host.
                        if let Some(waiting) = step.waiting {
                            // Whoever has gone meanwhile wanted to know no more.
                            let _ = waiting.send(outcome);
                        }
                    });
                ctx.wait(durable);
            }
        }
    }

    /// A running VM cannot wait for the disk: the sandbox goes on, and the record is offered again until it is taken.
    fn journal_refused(&mut self, error: &ApiError, ctx: &mut Context<Self>) {
        tracing::error!(sandbox = %self.record.name, error = %error.message, "a change could not be made durable and will be tried again");
        let at = self.now_ms().saturating_add(JOURNAL_RETRY_MS);
        let pause = self.surroundings.clock.sleep_until(at);
        ctx.spawn(pause.into_actor(self).map(|(), this, ctx| {
            if matches!(this.machine.state(), State::Removed) {
                return;
            }
            let change = Change::Put(Box::new(this.record.clone()), None);
            this.steps.push_back(Step::new(Some(change), Vec::new()));
            this.advance(ctx);
        }));
    }

    /// A step is in the journal, or was refused by it: its effects, then the next one.
    fn go_on(&mut self, written: Result<(), ApiError>, effects: Vec<Effect>, ctx: &mut Context<Self>) {
        match written {
            // Nothing may be made that the journal does not know of.
            Err(error) if effects.contains(&Effect::LeaseImage) => {
                self.failure = Some(error);
                self.tell(Event::PhaseFailed, ctx);
                return;
            }
            Err(error) => self.journal_refused(&error, ctx),
            Ok(()) => {}
        }
        self.perform(effects, ctx);
        self.advance(ctx);
    }

    /// All steps are done: show what is, and wait for what comes.
    fn settle(&mut self, ctx: &mut Context<Self>) {
        self.mind_ports(ctx);
        self.forget_memory();
        self.publish();
        self.arm(ctx);
    }
}
