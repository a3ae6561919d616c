//! What a snapshot of a running sandbox is taken from: its disk, held, and the way to its VM. Called by `Daemon::take_snapshot`; the work is
//! the snapshot's own, beside the mailbox. It never changes the machine's state.

use actix::prelude::*;
use msb_protocol::error::{ApiError, ErrorCode};
use tokio::sync::mpsc;

use super::SandboxActor;
use crate::faults;
use crate::sandbox::machine::State;
use crate::snapshots::Source;
use crate::vm::VmCommand;

/// A running sandbox for a snapshot of its memory: it is neither restarted nor removed while that is held.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(Source, mpsc::Sender<VmCommand>), ApiError>")]
pub struct HoldMachine;

impl Handler<HoldMachine> for SandboxActor {
    type Result = Result<(Source, mpsc::Sender<VmCommand>), ApiError>;

    fn handle(&mut self, _: HoldMachine, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/hold_machine");
        self.handled += 1;
        let (name, state) = (&self.record.name, self.machine.shown());
        let refuse = |code, message: String, hint: String| Err(ApiError::new(code, message).with_hint(hint));
        match self.machine.state() {
            State::Running { .. } if !self.stepping => {}
            State::Paused { .. } => {
                let message = format!("sandbox {name} is paused: its workload cannot be frozen");
                return refuse(ErrorCode::SandboxPaused, message, format!("let it go on first: msb resume {name}"));
            }
            _ => {
                let message = format!("sandbox {name} is {}: memory is taken of a running one", state.as_str());
                return refuse(ErrorCode::SandboxNotRunning, message, format!("start it first: msb start {name}"));
            }
        }
        self.can_halt("take a snapshot of memory", MEMORY_GENERATION)?;
        self.has_image()?;
        if !self.record.spec.mounts.is_empty() {
            let message =
                format!("sandbox {name} has mounts: what is shared with others cannot be kept with its memory");
            return refuse(ErrorCode::InvalidRequest, message, "run it without volumes and mounts".into());
        }
        if self.record.spec.kernel.is_some() {
            let message = format!("sandbox {name} has a kernel of its own, which sandboxes made of it would not have");
            return refuse(ErrorCode::InvalidRequest, message, "run it with the kernel that msb brings".into());
        }
        if self.disk.is_held() {
            return refuse(
                ErrorCode::SandboxBusy,
                format!("a snapshot of sandbox {name} is being taken"),
                "try again in a moment".into(),
            );
        }
        let Some(vm) = &self.vm else {
            return Err(ApiError::internal("a running sandbox without its VM process"));
        };
        Ok((self.source(), vm.commands.clone()))
    }
}

/// The generation of the VMM border that brought it.
pub(super) const MEMORY_GENERATION: u32 = 3;
