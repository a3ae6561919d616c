//! What counts as activity of a sandbox, and when it last did. Read by the actor's timer, written by sessions beside the actor.
//!
//! | what | counts |
//! |---|---|
//! | exec, attach, main streams | from open to close ([`ActivityGuard`]) |
//! | SSH sessions | as above: while their process lives |
//! | file sessions that do more than watch | from open to close |
//! | touch | once |
//! | connections forwarded by SSH | their opening, and each piece of their bytes |
//! | connections through published ports | each second while one is open or was opened, as the VM process counts them |
//! | everything else | never: it has no guard to hold |

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::sync::watch;

use crate::clock::Clock;

/// What an activity was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivityKind {
    /// A command in the sandbox.
    Exec,
    /// A client on the main workload's streams.
    Attach,
    /// Files are read or changed.
    Files,
    /// `msb touch`.
    Touch,
    /// A session of an SSH client.
    Ssh,
    /// Bytes of a connection that an SSH client forwards.
    Forward,
    /// A connection through a published port.
    Connection,
}

impl ActivityKind {
    /// The word of `last_activity`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Attach => "attach",
            Self::Files => "files",
            Self::Touch => "touch",
            Self::Ssh => "ssh",
            Self::Forward => "forward",
            Self::Connection => "connection",
        }
    }
}

/// The activity of one sandbox. It outlives its actor: a session goes on while the actor is rebuilt.
#[derive(Debug)]
pub struct Activity {
    clock: Arc<dyn Clock>,
    active: AtomicU32,
    last_ms: AtomicU64,
    last: watch::Sender<Option<ActivityKind>>,
}

impl Activity {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let now = clock.now_ms();
        Arc::new(Self {
            clock,
            active: AtomicU32::new(0),
            last_ms: AtomicU64::new(now),
            last: watch::Sender::new(None),
        })
    }

    /// Something happened at once.
    pub fn touch(&self, kind: ActivityKind) {
        self.last_ms.fetch_max(self.clock.now_ms(), Ordering::Relaxed);
        self.last.send_replace(Some(kind));
    }

    /// A run became ready: idleness counts from here, whatever happened in an earlier one.
    pub fn touch_start(&self) {
        self.last_ms.fetch_max(self.clock.now_ms(), Ordering::Relaxed);
    }

    /// Something goes on until the guard is dropped.
    #[must_use]
    pub fn begin(self: &Arc<Self>, kind: ActivityKind) -> ActivityGuard {
        self.active.fetch_add(1, Ordering::AcqRel);
        self.last.send_replace(Some(kind));
        ActivityGuard { activity: self.clone() }
    }

    /// The last activity on the daemon's clock; `None` while something goes on.
    #[must_use]
    pub fn last_ms(&self) -> Option<u64> {
        (self.active.load(Ordering::Acquire) == 0).then(|| self.last_ms.load(Ordering::Relaxed))
    }

    /// What counted last.
    #[must_use]
    pub fn last_kind(&self) -> Option<ActivityKind> {
        *self.last.borrow()
    }
}

/// Activity that goes on.
#[derive(Debug)]
pub struct ActivityGuard {
    activity: Arc<Activity>,
}

impl ActivityGuard {
    /// The activity it is part of.
    #[must_use]
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }
}

impl Drop for ActivityGuard {
    fn drop(&mut self) {
        self.activity.last_ms.fetch_max(self.activity.clock.now_ms(), Ordering::Relaxed);
        self.activity.active.fetch_sub(1, Ordering::AcqRel);
    }
}
