//! What is noted of a run that has ended and of a start that failed: in the record, for whoever waits, and on the disk. Called while an event is
//! fed, before anything of it is durable.

use msb_protocol::control::RunEnd;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::BootId;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::BootError;

use super::SandboxActor;

/// Characters of a message that comes from below.
const MESSAGE_LEN_MAX: usize = 2_048;

impl SandboxActor {
    pub(super) fn note_end(&mut self, boot_id: BootId, cause: EndCause) {
        let mut gone = self.gone.take();
        let last = gone.as_mut().and_then(|gone| gone.sample.take()).map(|sample| *sample);
        if let Some(meter) = self.meter.take() {
            meter.end(last);
        }
        let process: Option<ProcessEnd> = gone.as_ref().and_then(|gone| gone.main_end);
        let message = gone.as_ref().map(|gone| clean(&gone.message)).unwrap_or_default();
        if let Some(error) = gone.and_then(|gone| gone.boot_error) {
            let (directories, name, evidence) = (self.directories.clone(), self.record.name.clone(), error.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = directories.keep_boot_error(&name, &evidence) {
                    tracing::warn!(sandbox = %name, %error, "the evidence of a failed boot could not be kept");
                }
            });
            self.record.boot_error = Some(error);
        }
        self.record.last_end = Some(RunEnd { boot_id, cause, process, message, at: self.surroundings.clock.wall() });
        self.record.vmm = None;
        self.vm = None;
        self.beats = None;
        self.surroundings.heartbeats.clear(self.record.id, &self.directories.heartbeat);
    }

    pub(super) fn note_failed_start(&mut self) {
        self.starts_failed += 1;
        if let Some(error) = self.gone.as_ref().and_then(|gone| gone.boot_error.as_ref()) {
            self.failure = Some(boot_failure(error));
        } else if let Some(gone) = &self.gone {
            let error = ApiError::new(
                ErrorCode::BootFailed,
                format!("the virtual machine did not come up: {}", clean(&gone.message)),
            );
            self.failure.get_or_insert(error);
        } else {
            self.failure.get_or_insert_with(cancelled);
        }
    }
}

/// What whoever waits for a start hears when it is given up.
pub(super) fn cancelled() -> ApiError {
    ApiError::new(ErrorCode::Cancelled, "the start was cancelled by a stop")
}

/// A failed boot as its caller sees it: the error of the stage, with what the console said last.
fn boot_failure(evidence: &BootError) -> ApiError {
    let mut error = evidence.error.clone();
    error.details.push(format!("stage: {}", evidence.stage));
    if !evidence.console_tail.is_empty() && !error.details.iter().any(|detail| detail.contains(&evidence.console_tail))
    {
        let tail: Vec<&str> = evidence.console_tail.lines().rev().take(20).collect();
        error.details.push(tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
    error
}

/// Text from below, fit for a terminal.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').take(MESSAGE_LEN_MAX).collect()
}
