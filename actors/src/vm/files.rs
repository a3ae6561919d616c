//! A file session with the agent, from the host's side: any number of requests under way at once, each with its answer. Used by the
//! daemon's file routes and by SSH's SFTP; it runs beside the actors, never through them.
//!
//! ```text
//!  caller ── start ──► number, kept in `waiting` ──► stream to the agent
//!  caller ◄─ Answer ◄─ reader task, by number    ◄── stream from the agent
//! ```
//!
//! At most [`UNDER_WAY_MAX`] requests wait for their answers, so a caller that asks without end waits, and what the guest sends is
//! bounded by what was asked. Dropping the last copy ends the session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::files::{
    FileAttributes, FileChangeSeen, FileEntry, FileHandle, FileOpen, FileOperation, FileOutcome, FilePath, FileRead,
    FileRemove, FileRemoveKind, FileRequest, FileWatch, FileWrite, OpenFiles,
};
use msb_protocol::guest::{GuestBody, HostBody, OpenKind};
use msb_protocol::id::SandboxName;
use msb_protocol::version::{Operation, require};
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::session::{Session, SessionReader, SessionWriter};
use crate::daemon::Daemon;
use crate::sandbox::activity::{ActivityGuard, ActivityKind};

/// Most requests that wait for their answers.
pub const UNDER_WAY_MAX: usize = 64;
/// Batches of changes that wait for their reader before the guest does.
const CHANGES_LEN: usize = 16;

/// A file session. Copies share it.
#[derive(Clone)]
pub struct Files {
    inner: Arc<Inner>,
}

struct Inner {
    writer: AsyncMutex<Writer>,
    waiting: Arc<Mutex<Waiting>>,
    under_way: Arc<Semaphore>,
    reader: tokio::task::JoinHandle<()>,
    _activity: Option<ActivityGuard>,
}

struct Writer {
    stream: SessionWriter,
    next: u32,
}

#[derive(Default)]
struct Waiting {
    answers: HashMap<u32, Waiter>,
    changes: HashMap<u32, mpsc::Sender<Vec<FileChangeSeen>>>,
    lost: Option<ApiError>,
}

struct Waiter {
    answer: oneshot::Sender<FileOutcome>,
    _permit: OwnedSemaphorePermit,
}

/// The answer to a request that was sent.
pub struct Answer {
    outcome: oneshot::Receiver<FileOutcome>,
    waiting: Arc<Mutex<Waiting>>,
}

impl Answer {
    /// Waits for it.
    ///
    /// # Errors
    /// What the guest's system said, with its errno; `exec_lost` if the session broke.
    pub async fn wait(self) -> Result<FileOutcome, ApiError> {
        match self.outcome.await {
            Ok(FileOutcome::Failed(failure)) => Err(failure.into()),
            Ok(outcome) => Ok(outcome),
            Err(_) => Err(lock(&self.waiting).lost.clone().unwrap_or_else(gone)),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Files {
    /// Opens a session in a sandbox, which is woken if it sleeps. It counts as activity unless it only watches.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `user_not_found`, `unsupported_operation`.
    pub async fn open(daemon: &Daemon, sandbox: &SandboxName, open: OpenFiles, counts: bool) -> Result<Self, ApiError> {
        let (session, guard) = daemon.open(sandbox, OpenKind::Files(open), ActivityKind::Files).await?;
        require(Operation::File, session.opened.generation)?;
        Ok(Self::over(session, counts.then_some(guard)))
    }

    /// A session over an open stream.
    #[must_use]
    pub fn over(session: Session, activity: Option<ActivityGuard>) -> Self {
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let reader = tokio::spawn(read(session.reader, Arc::clone(&waiting)));
        Self {
            inner: Arc::new(Inner {
                writer: AsyncMutex::new(Writer { stream: session.writer, next: 0 }),
                waiting,
                under_way: Arc::new(Semaphore::new(UNDER_WAY_MAX)),
                reader,
                _activity: activity,
            }),
        }
    }

    /// Sends a request; the answer is waited for later, so that many can be under way.
    ///
    /// # Errors
    /// `exec_lost` if the session broke.
    pub async fn start(&self, operation: FileOperation) -> Result<Answer, ApiError> {
        self.send(operation, None).await
    }

    async fn send(
        &self,
        operation: FileOperation,
        changes: Option<mpsc::Sender<Vec<FileChangeSeen>>>,
    ) -> Result<Answer, ApiError> {
        let inner = &self.inner;
        let permit = Arc::clone(&inner.under_way).acquire_owned().await.map_err(|_| gone())?;
        // Sent by a task of its own: a caller that stops waiting must not leave half a frame behind.
        let (answer, outcome) = oneshot::channel();
        let shared = Arc::clone(inner);
        let sending = tokio::spawn(async move {
            let mut writer = shared.writer.lock().await;
            writer.next = writer.next.wrapping_add(1);
            let id = writer.next;
            {
                let mut waiting = lock(&shared.waiting);
                if let Some(error) = &waiting.lost {
                    return Err(error.clone());
                }
                waiting.answers.insert(id, Waiter { answer, _permit: permit });
                if let Some(changes) = changes {
                    waiting.changes.insert(id, changes);
                }
            }
            writer
                .stream
                .send(HostBody::File(FileRequest { id, operation: Some(operation) }))
                .await
                .map_err(ApiError::from)
        });
        sending.await.map_err(ApiError::internal)??;
        Ok(Answer { outcome, waiting: Arc::clone(&inner.waiting) })
    }

    /// Carries a request out.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn call(&self, operation: FileOperation) -> Result<FileOutcome, ApiError> {
        self.start(operation).await?.wait().await
    }

    /// Opens a file or (with [`FileOperation::OpenDirectory`]) a directory: its handle.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn handle(&self, operation: FileOperation) -> Result<u32, ApiError> {
        match self.call(operation).await? {
            FileOutcome::Handle(FileHandle { handle }) => Ok(handle),
            _ => Err(nonsense()),
        }
    }

    /// Carries out what answers with nothing.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn done(&self, operation: FileOperation) -> Result<(), ApiError> {
        self.call(operation).await.map(drop)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn open_file(&self, open: FileOpen) -> Result<u32, ApiError> {
        self.handle(FileOperation::Open(open)).await
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn close(&self, handle: u32) -> Result<(), ApiError> {
        self.done(FileOperation::Close(FileHandle { handle })).await
    }

    /// Reads at an offset; empty at the end.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn read(&self, handle: u32, offset: u64, len: u32) -> Result<Vec<u8>, ApiError> {
        match self.call(FileOperation::Read(FileRead { handle, offset, len })).await? {
            FileOutcome::Data(data) => Ok(data),
            _ => Err(nonsense()),
        }
    }

    /// Writes at an offset.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn write(&self, handle: u32, offset: u64, data: Vec<u8>) -> Result<(), ApiError> {
        self.done(FileOperation::Write(FileWrite { handle, offset, data })).await
    }

    /// What stat(2), lstat(2) or fstat(2) says.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn attributes(&self, operation: FileOperation) -> Result<FileAttributes, ApiError> {
        match self.call(operation).await? {
            FileOutcome::Attributes(attributes) => Ok(attributes),
            _ => Err(nonsense()),
        }
    }

    /// What stat(2) says, or lstat(2) with `no_follow`.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn stat(&self, path: &[u8], no_follow: bool) -> Result<FileAttributes, ApiError> {
        self.attributes(FileOperation::Stat(FilePath { path: path.to_vec(), no_follow })).await
    }

    /// The next entries of an open directory; none at the end.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn entries(&self, handle: u32) -> Result<Vec<FileEntry>, ApiError> {
        match self.call(FileOperation::ReadDirectory(FileHandle { handle })).await? {
            FileOutcome::Entries(entries) => Ok(entries.entries),
            _ => Err(nonsense()),
        }
    }

    /// Carries out what answers with a path: [`FileOperation::RealPath`], [`FileOperation::ReadLink`].
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn path(&self, operation: FileOperation) -> Result<Vec<u8>, ApiError> {
        match self.call(operation).await? {
            FileOutcome::Path(path) => Ok(path),
            _ => Err(nonsense()),
        }
    }

    /// Removes a name.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn remove(&self, path: &[u8], kind: FileRemoveKind) -> Result<(), ApiError> {
        self.done(FileOperation::Remove(FileRemove { path: path.to_vec(), kind: kind.into() })).await
    }

    /// Watches a path; the changes come until this session ends.
    ///
    /// # Errors
    /// As [`Answer::wait`].
    pub async fn watch(&self, watch: FileWatch) -> Result<mpsc::Receiver<Vec<FileChangeSeen>>, ApiError> {
        let (changes, receiver) = mpsc::channel(CHANGES_LEN);
        self.send(FileOperation::Watch(watch), Some(changes)).await?.wait().await?;
        Ok(receiver)
    }
}

async fn read(mut reader: SessionReader, waiting: Arc<Mutex<Waiting>>) {
    let error = loop {
        match reader.next().await {
            Ok(Some(GuestBody::File(reply))) => {
                let Some(outcome) = reply.outcome else { break nonsense() };
                if let FileOutcome::Changes(changes) = outcome {
                    let watcher = lock(&waiting).changes.get(&reply.id).cloned();
                    // A watcher that is gone misses nothing; one that is slow makes the guest wait, which tells an overflow.
                    if let Some(watcher) = watcher {
                        let _ = watcher.send(changes.changes).await;
                    }
                    continue;
                }
                match lock(&waiting).answers.remove(&reply.id) {
                    // A caller that stopped waiting does not hear it.
                    Some(waiter) => drop(waiter.answer.send(outcome)),
                    None => break nonsense(),
                }
            }
            // What a later agent says beyond that is not for this daemon.
            Ok(Some(_)) => {}
            Ok(None) => break gone(),
            Err(error) => break error.into(),
        }
    };
    let mut waiting = lock(&waiting);
    waiting.lost = Some(error);
    waiting.answers.clear();
    waiting.changes.clear();
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // The state is whole between any two statements.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> ApiError {
    ApiError::new(ErrorCode::ExecLost, "the sandbox ended the file session")
        .with_hint("see with `msb ls` whether the sandbox still runs, then try again")
}

fn nonsense() -> ApiError {
    ApiError::new(ErrorCode::ExecLost, "the sandbox's agent gave an answer that fits no request")
}
