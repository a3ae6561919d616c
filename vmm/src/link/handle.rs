//! What other threads say on the agent link: they write whole messages beside its own thread, and wait for the one answer they need.
//!
//! Called by the control thread, when a machine is to be written down, or one that stands by is taken. It never reads.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::{GuestConfig, HostBody, Quiesce, Renew, Thaw, encode_host};
use msb_protocol::version::UnsupportedOperation;

use super::thread::new_welcome;
use crate::logs::workload::WorkloadLog;
use crate::run::Run;

/// How long an agent may take to freeze its workload; it gives up earlier itself.
const QUIESCE_LIMIT: Duration = Duration::from_secs(8);
/// The guest generation that brought `Quiesce`.
const NEEDS_GENERATION: u32 = 3;

/// The writing half of the link.
pub struct LinkHandle {
    writer: Mutex<UnixStream>,
    /// The answer to the last `Quiesce`.
    quiesced: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
    /// The workload's log of whoever takes a guest that stands by.
    log: Mutex<Option<WorkloadLog>>,
}

impl LinkHandle {
    /// Of a stream whose other half its own thread reads.
    pub(super) fn new(writer: UnixStream) -> Self {
        Self { writer: Mutex::new(writer), quiesced: Mutex::new(None), changed: Condvar::new(), log: Mutex::new(None) }
    }

    /// Writes one message.
    pub(super) fn send(&self, message: HostBody) -> io::Result<()> {
        let mut wire = Vec::new();
        encode_host(message, &mut wire).map_err(io::Error::other)?;
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(&wire)
    }

    /// The agent has answered.
    pub(super) fn note_quiesced(&self, outcome: Result<(), String>) {
        *self.quiesced.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.changed.notify_all();
    }

    /// Makes the agent freeze the workload, after a flush of the guest's disks if that is asked for; answered once nothing of it runs.
    pub(crate) fn quiesce(&self, generation: u32, flush: bool) -> Result<(), ApiError> {
        if generation < NEEDS_GENERATION {
            let operation = "memory_snapshot";
            return Err(UnsupportedOperation { operation, needs: NEEDS_GENERATION, peer: generation }.into());
        }
        let busy =
            |why: &str| ApiError::new(ErrorCode::SandboxBusy, format!("the workload could not be frozen: {why}"));
        let mut quiesced = self.quiesced.lock().unwrap_or_else(PoisonError::into_inner);
        *quiesced = None;
        self.send(HostBody::Quiesce(Quiesce { flush })).map_err(|error| busy(&error.to_string()))?;
        let until = Instant::now() + QUIESCE_LIMIT;
        loop {
            if let Some(outcome) = quiesced.take() {
                return outcome.map_err(|error| busy(&error));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(busy("the agent does not answer"));
            }
            quiesced = self.changed.wait_timeout(quiesced, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells a guest that stands by whose it is now; its own thread hears when it is ready.
    pub(crate) fn renew(&self, run: &Run, config: GuestConfig, log: Option<WorkloadLog>) -> io::Result<()> {
        *self.log.lock().unwrap_or_else(PoisonError::into_inner) = log;
        let welcome = new_welcome(run, Some(config))?;
        self.send(HostBody::Renew(Renew { welcome: Some(Box::new(welcome)), holds: false }))
    }

    /// The log that came with it.
    pub(super) fn take_log(&self) -> Option<WorkloadLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Lets the workload go on. An agent that froze nothing takes it for what it is.
    pub(crate) fn thaw(&self) {
        if let Err(error) = self.send(HostBody::Thaw(Thaw {})) {
            // Without a link the guest is at its end anyway.
            tracing::warn!(%error, "the agent cannot be told that the workload may go on");
        }
    }
}
