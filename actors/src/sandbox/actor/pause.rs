//! Halting a running VM and letting it go on: the VM process does it, the machine is told once it is done. Called by `Daemon::pause` and
//! `Daemon::resume`. It never waits in a handler, and never leaves a VM halted that the machine does not hold to be.

use actix::prelude::*;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::spec::EngineChoice;
use msb_protocol::version::UnsupportedOperation;
use tokio::sync::oneshot;

use super::SandboxActor;
use crate::faults;
use crate::sandbox::machine::{Event, State};
use crate::vm::VmCommand;

/// The generation of the VMM border that brought pauses.
const NEEDS_GENERATION: u32 = 2;

/// Halt the VM of a sandbox, or let it go on. The answer comes when that is so and durable.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), ApiError>")]
pub enum Halt {
    /// Halt it.
    Pause,
    /// Let it go on.
    Resume,
}

impl Halt {
    fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

impl SandboxActor {
    /// Whether the VM can be halted at all.
    pub(super) fn can_halt(&self, operation: &'static str, needs: u32) -> Result<(), ApiError> {
        if self.record.engine == Some(EngineChoice::Qemu) {
            return Err(ApiError::new(
                ErrorCode::UnsupportedOperation,
                format!("sandbox {} runs on engine qemu, which cannot {operation}", self.record.name),
            )
            .with_hint("this needs engine kvm: `msb doctor` says what it lacks on this host"));
        }
        if self.vmm_generation < needs {
            return Err(UnsupportedOperation { operation, needs, peer: self.vmm_generation }.into());
        }
        Ok(())
    }

    fn wants(&self, halt: Halt) -> Result<bool, ApiError> {
        let name = &self.record.name;
        match (halt, self.machine.state()) {
            (Halt::Pause, State::Paused { .. }) | (Halt::Resume, State::Running { .. }) => Ok(false),
            (Halt::Pause, State::Running { .. }) => self.can_halt(halt.word(), NEEDS_GENERATION).map(|()| true),
            (Halt::Resume, State::Paused { .. }) => Ok(true),
            (halt, _) => {
                let (state, word) = (self.machine.shown().as_str(), halt.word());
                let message = format!("sandbox {name} is {state}: there is nothing to {word}");
                Err(ApiError::new(ErrorCode::SandboxNotRunning, message))
            }
        }
    }

    /// The halted VM goes on; nobody waits for it.
    pub(super) fn resume_vm(&mut self) {
        let (reply, _) = oneshot::channel();
        self.command(VmCommand::Resume(reply));
    }
}

impl Handler<Halt> for SandboxActor {
    type Result = ResponseActFuture<Self, Result<(), ApiError>>;

    fn handle(&mut self, halt: Halt, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/pause");
        self.handled += 1;
        match self.wants(halt) {
            Ok(true) => {}
            Ok(false) => return Box::pin(actix::fut::ready(Ok(()))),
            Err(error) => return Box::pin(actix::fut::ready(Err(error))),
        }
        let run = self.machine.run();
        let (reply, answer) = oneshot::channel();
        self.command(match halt {
            Halt::Pause => VmCommand::Pause(reply),
            Halt::Resume => VmCommand::Resume(reply),
        });
        let told = answer.into_actor(self).map(move |answer, this, ctx| {
            answer.unwrap_or_else(|_| {
                Err(ApiError::new(ErrorCode::SandboxNotRunning, "the virtual machine ended meanwhile"))
            })?;
            let event = match halt {
                Halt::Pause => Event::Paused,
                Halt::Resume => Event::Resumed,
            };
            let (waiting, durable) = oneshot::channel();
            let outcome = if this.machine.run() == run { this.feed_and(event, Some(waiting), ctx) } else { Ok(()) };
            outcome.map(|()| durable).map_err(|denial| {
                // A stop came first: the guest must be able to obey it.
                this.resume_vm();
                let message = format!("sandbox {} cannot {}: {denial}", this.record.name, halt.word());
                ApiError::new(ErrorCode::SandboxBusy, message)
            })
        });
        Box::pin(told.then(|durable, this, _| {
            async move {
                match durable?.await {
                    Ok(written) => written,
                    // Nothing changed, so nothing was to be written.
                    Err(_) => Ok(()),
                }
            }
            .into_actor(this)
        }))
    }
}
