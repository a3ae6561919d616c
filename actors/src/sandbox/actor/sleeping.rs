//! Sleep with memory (`on_idle: suspend`): the machine stands, is written into the sandbox's own folder, and its VM is ended as it stands. Its disk
//! stays where it is: nothing runs between the writing and the end, so that the two fit each other.
//!
//! ```text
//!  Suspend ─► files made ─► VM stands (Save) ─► durable, the disk too ─► Suspended ─► kill ─► VM gone ─► asleep, in the journal: it counts
//!     └ whatever comes before that ─► Release: the VM goes on, what was written counts for nothing
//! ```
//!
//! Which run's memory counts is the machine's to say ([`Machine::memory`](crate::sandbox::machine::Machine::memory)); whatever it no longer names
//! is removed here, after the change is durable. Nothing here waits in a handler.

use actix::prelude::*;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::BootId;
use tokio::sync::{mpsc, oneshot};

use super::saving::MEMORY_GENERATION;
use super::{News, SandboxActor, Step};
use crate::journal::{Change, EventDraft};
use crate::sandbox::directories::Directories;
use crate::sandbox::machine::{By, Event, Run, State};
use crate::vm::VmCommand;
use msb_protocol::spec::OnIdle;

/// One try to write the machine down.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Attempt {
    /// Tries are numbered: a run may have several.
    number: u64,
    /// The run, of a try.
    run: Option<BootId>,
    /// When it began, on the daemon's clock.
    since_ms: u64,
}

impl SandboxActor {
    /// The last activity, for idleness: while somebody reads its disk or its memory it is not idle.
    pub(super) fn last_activity_ms(&self) -> Option<u64> {
        if self.disk.is_held() { None } else { self.activity.last_ms() }
    }

    /// Writes the machine down; the answer is [`News::Suspended`].
    pub(super) fn suspend(&mut self, ctx: &mut Context<Self>) {
        let Some(run) = self.machine.run() else { return };
        self.suspension =
            Attempt { number: self.suspension.number + 1, run: Some(run.boot_id), since_ms: self.now_ms() };
        self.suspensions += 1;
        let refused = self.can_halt("suspend", MEMORY_GENERATION).err();
        let (attempt, directories) = (self.suspension, self.directories.clone());
        let commands = self.vm.as_ref().map(|vm| vm.commands.clone());
        self.later(ctx, async move {
            let outcome = match (refused, commands) {
                (Some(error), _) => Err(error),
                (None, None) => Err(ApiError::internal("a running sandbox without its VM process")),
                (None, Some(commands)) => {
                    let writing = tokio::task::spawn_blocking(move || {
                        let written = write(&directories, run, &commands);
                        if written.is_err()
                            && let Err(error) = directories.remove_memory(run.boot_id)
                        {
                            // On a full disk even the record of the failure needs its room.
                            tracing::warn!(%error, "what was written of a sandbox's memory stays for now");
                        }
                        written
                    });
                    writing.await.unwrap_or_else(|error| Err(ApiError::internal(format!("a suspension: {error}"))))
                }
            };
            News::Suspended(attempt, outcome)
        });
    }

    /// The machine is written down, or could not be.
    pub(super) fn suspended(&mut self, attempt: Attempt, outcome: Result<(), ApiError>, ctx: &mut Context<Self>) {
        let own = |run: Run| Some(run.boot_id) == attempt.run;
        self.suspensions = self.suspensions.saturating_sub(1);
        let is_wanted = attempt.number == self.suspension.number
            && matches!(self.machine.state(), State::Suspending { run, .. } if own(run));
        if !is_wanted {
            // It was told to go on; perhaps before it stood.
            if self.machine.run().is_some_and(own) && !matches!(self.machine.state(), State::Suspending { .. }) {
                self.command(VmCommand::Release);
                // It has not beaten while it stood.
                let now_ms = self.now_ms();
                if let Some(watch) = self.beats.as_mut() {
                    watch.forgive(now_ms);
                }
            }
            self.forgotten.extend(attempt.run.filter(|_| self.machine.memory() != attempt.run));
            return self.forget_memory();
        }
        match outcome {
            // Somebody came while it was being written down.
            Ok(()) if self.activity.last_ms().is_none_or(|last| last >= attempt.since_ms) => {
                self.tell(Event::Start { by: By::Supervisor, hold_main: false }, ctx);
            }
            Ok(()) => self.tell(Event::Suspended, ctx),
            Err(error) => {
                tracing::warn!(sandbox = %self.record.name, error = %error.message, "a sandbox cannot sleep with its memory and goes on");
                let draft = EventDraft {
                    sandbox: self.record.name.clone(),
                    sandbox_id: self.record.id,
                    boot_id: attempt.run,
                    event: "suspend_failed".into(),
                    state: msb_protocol::state::SandboxState::Running,
                    cause: None,
                    actor: "supervisor".into(),
                    message: error.message,
                };
                self.tell(Event::SuspendFailed, ctx);
                self.steps.push_back(Step::new(Some(Change::Event(draft)), Vec::new()));
                self.advance(ctx);
            }
        }
    }

    /// Whether a start from memory has just become one from the disk.
    pub(super) fn has_lost_memory(&self, before: Option<Run>) -> bool {
        let after = self.machine.run();
        before.is_some_and(|run| run.wakes.is_some())
            && matches!(self.machine.state(), State::Starting { .. })
            && after.is_some_and(|run| run.wakes.is_none())
    }

    /// Says in the record of the run that just ended what its end means for its memory.
    pub(super) fn tell_of_sleep(&mut self, is_lost: bool) {
        let failure = self.failure.as_ref().map(|error| error.message.clone());
        let evidence = self.record.boot_error.as_ref().map(|evidence| evidence.error.message.clone());
        let sleeps = matches!(self.machine.state(), State::Asleep { memory: Some(run) }
            if self.record.last_end.as_ref().is_some_and(|end| end.boot_id == run));
        let Some(end) = self.record.last_end.as_mut() else { return };
        if sleeps {
            "its memory is kept".clone_into(&mut end.message);
        } else if is_lost {
            let why = evidence.or(failure).unwrap_or_else(|| end.message.clone());
            end.message = format!("it boots from its disk, without the memory that it slept with: {why}");
        }
    }

    /// Removes memory that no longer counts, once that is durable.
    pub(super) fn forget_memory(&mut self) {
        let forgotten = std::mem::take(&mut self.forgotten);
        // With everything else of it.
        if forgotten.is_empty() || matches!(self.machine.state(), State::Removed) {
            return;
        }
        let (directories, name) = (self.directories.clone(), self.record.name.clone());
        tokio::task::spawn_blocking(move || {
            for run in forgotten {
                if let Err(error) = directories.remove_memory(run) {
                    tracing::warn!(sandbox = %name, %error, "memory that no longer counts stays until the next start of the service");
                }
            }
        });
    }

    /// Removes what an earlier incarnation left, before anything new is written.
    pub(super) fn sweep_memory(&self, ctx: &mut Context<Self>) {
        if self.record.spec.on_idle != OnIdle::Suspend || matches!(self.machine.state(), State::Removed) {
            return;
        }
        let (directories, kept) = (self.directories.clone(), self.machine.memory());
        let sweeping = tokio::task::spawn_blocking(move || directories.sweep_memory(kept));
        ctx.wait(sweeping.into_actor(self).map(|swept, this, _| {
            if let Ok(Err(error)) = swept {
                tracing::warn!(sandbox = %this.record.name, %error, "memory that does not count could not be removed");
            }
        }));
    }
}

/// Writes the machine down and makes it durable; it stands when this returns. Blocks.
fn write(directories: &Directories, run: Run, commands: &mpsc::Sender<VmCommand>) -> Result<(), ApiError> {
    let gone = || ApiError::new(ErrorCode::SandboxNotRunning, "the virtual machine ended meanwhile");
    let (memory, state) = directories.create_memory(run.boot_id)?;
    let (reply, answer) = oneshot::channel();
    commands
        .blocking_send(VmCommand::Save { memory: memory.into(), state: state.into(), flush: true, reply })
        .map_err(|_| gone())?;
    answer.blocking_recv().map_err(|_| gone())??;
    directories.sync_memory(run.boot_id)
}
