//! The journal: what every sandbox is and what happened, durable before it is answered.
//!
//! One thread owns the redb file and writes what arrives in batches, one fsync for all of them; callers wait for theirs. redb is
//! opened in `ConcurrencyMode::SingleWriter`, so readers of other processes can look without locking the daemon out; they never
//! create the file. Tables:
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema`, `sequence` | u64 |
//! | `sandboxes` | sandbox id | sealed [`SandboxRecord`] |
//! | `events` | sequence | sealed [`EventRecord`], a ring of [`EVENTS_MAX`] |
//! | `quarantine` | sandbox id | the damaged bytes, for repair by hand |
//! | `snapshots` | name | sealed [`SnapshotRecord`] |
//!
//! A damaged record is moved to `quarantine` with a message and the rest lives. A file of an older schema is copied aside before it
//! is migrated; one of a newer schema is refused. After an I/O error redb wants to be opened anew, which the thread does by itself.

mod record;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_protocol::control::EventRecord;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use tokio::sync::{broadcast, mpsc, oneshot};

pub use record::{EventDraft, SandboxRecord, SnapshotPhase, SnapshotRecord};
pub use writer::{MIGRATIONS, Migration};

use crate::clock::Clock;

/// Events kept.
pub const EVENTS_MAX: u64 = 10_000;
/// Changes that wait for the thread before callers have to.
const QUEUE_LEN: usize = 4_096;
/// Live events a slow listener may be behind before it has to read the journal again.
const LIVE_EVENTS_LEN: usize = 1_024;

/// Why the journal cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// redb refused.
    #[error("the journal {path} cannot be opened: {reason}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A later msb wrote it.
    #[error("the journal {path} has schema {found}, this msb knows schema {known}: a newer msb wrote it")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u64,
        /// The newest schema of this build.
        known: u64,
    },
}

impl From<JournalError> for ApiError {
    fn from(error: JournalError) -> Self {
        let code = match &error {
            JournalError::Io { source, .. }
                if source.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error()) =>
            {
                ErrorCode::DiskFull
            }
            _ => ErrorCode::HomeUnusable,
        };
        Self::new(code, error.to_string())
    }
}

/// One durable change: a record, an event, or both together.
#[derive(Debug)]
pub enum Change {
    /// The sandbox is this now.
    Put(Box<SandboxRecord>, Option<EventDraft>),
    /// The sandbox is no more.
    Remove(SandboxId, EventDraft),
    /// Only something to tell.
    Event(EventDraft),
    /// The snapshot is this now.
    PutSnapshot(Box<SnapshotRecord>, Option<EventDraft>),
    /// The snapshot is no more.
    RemoveSnapshot(SandboxName),
}

pub(crate) enum Command {
    Write(Change, oneshot::Sender<Result<(), ApiError>>),
    Load(SandboxId, oneshot::Sender<Option<SandboxRecord>>),
    Snapshots(oneshot::Sender<Vec<SnapshotRecord>>),
    EventsAfter { sequence: u64, limit: usize, reply: oneshot::Sender<Vec<EventRecord>> },
}

/// What was found when the journal was opened.
#[derive(Debug, Default)]
pub struct Found {
    /// Every readable record.
    pub records: Vec<SandboxRecord>,
    /// What was wrong, for people.
    pub problems: Vec<String>,
}

/// A handle; clones share the thread, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Journal {
    commands: mpsc::Sender<Command>,
    live: broadcast::Sender<Arc<EventRecord>>,
}

impl Journal {
    /// Opens or makes the journal and reads every record. Blocks; called once, before anything is served.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<(Self, Found), JournalError> {
        Self::open_with(path, clock, MIGRATIONS)
    }

    /// As [`Journal::open`], with a list of migrations of the caller's.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open_with(
        path: &Path,
        clock: Arc<dyn Clock>,
        migrations: &'static [Migration],
    ) -> Result<(Self, Found), JournalError> {
        let (live, _) = broadcast::channel(LIVE_EVENTS_LEN);
        let (mut writer, found) = writer::Writer::open(path, clock, migrations, live.clone())?;
        let (commands, mut queue) = mpsc::channel(QUEUE_LEN);
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(&mut queue))
            .map_err(|source| JournalError::Io { path: path.into(), source })?;
        Ok((Self { commands, live }, found))
    }

    /// Makes a change durable.
    ///
    /// # Errors
    /// `disk_full`, or `internal` for any other failure of the file. The change is then not there.
    pub async fn write(&self, change: Change) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        let ended = || ApiError::internal("the journal's thread has ended");
        self.commands.send(Command::Write(change, reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// One record.
    pub async fn load(&self, id: SandboxId) -> Option<SandboxRecord> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Load(id, reply)).await.ok()?;
        answer.await.ok().flatten()
    }

    /// Every record of a snapshot.
    pub async fn snapshots(&self) -> Vec<SnapshotRecord> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Snapshots(reply)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Events after a sequence number, oldest first, at most `limit`.
    pub async fn events_after(&self, sequence: u64, limit: usize) -> Vec<EventRecord> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::EventsAfter { sequence, limit, reply }).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Events from now on. A listener that falls behind sees `Lagged` and reads [`Journal::events_after`] again.
    #[must_use]
    pub fn live_events(&self) -> broadcast::Receiver<Arc<EventRecord>> {
        self.live.subscribe()
    }
}
