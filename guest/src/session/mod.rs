//! Sessions: processes that the host asked for, each with its streams, in a thread of its own. Called by `agent`; on a test machine
//! by tests, with the machine's own root and without cgroups.
//!
//! ```text
//!  process.rs   one process: start, streams, how it ended        ending.rs   when a session is over       (pure)
//!  pump.rs      moves bytes between process and clients          input.rs    stdin and its credit         (pure)
//!  stream.rs    frames on a non-blocking socket                  watcher.rs  what a slow watcher loses    (pure)
//!  exec.rs      one exec from opening to end                     workload.rs the main workload: one start, many clients
//!  tcp.rs       one connection from inside the guest             sftp.rs     one SFTP server as a user
//! ```

pub mod ending;
pub mod exec;
pub mod input;
pub mod process;
pub mod pump;
pub mod sftp;
pub mod stream;
pub mod tcp;
pub mod watcher;
pub mod workload;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::guest::{GuestConfig, MainConfig};

use crate::cgroup::WorkloadGroup;
use crate::failure::GuestError;
use crate::root::directory::RootDirectory;
use crate::security::Security;
use crate::sys;

/// What every session needs to know of the guest.
#[derive(Debug)]
pub struct Guest {
    /// How the guest is set up.
    pub config: GuestConfig,
    /// The main workload of a guest that was made of a saved one without any.
    pub late_main: OnceLock<MainConfig>,
    /// This run's identity.
    pub boot_id: Vec<u8>,
    /// The workload's root.
    pub root: RootDirectory,
    /// Whether a process changes its root to `root`; a test on the machine's own root does not.
    pub enter_root: bool,
    /// A descriptor of /dev/null: a workload may remove the path.
    pub null: OwnedFd,
    /// The directory of the workload's devpts; none: the machine's own.
    pub terminals: Option<OwnedFd>,
    /// The cgroup of all workloads; none on a test machine.
    pub workload: Option<WorkloadGroup>,
    /// What its processes may do.
    pub security: Security,
    /// The sessions that live.
    pub sessions: Sessions,
}

impl Guest {
    /// The main workload, if there is one.
    pub fn main(&self) -> Option<&MainConfig> {
        self.config.main.as_ref().or_else(|| self.late_main.get())
    }

    /// A new descriptor of the null device.
    ///
    /// # Errors
    /// `exec_failed` if there are no descriptors left.
    pub fn null_device(&self) -> Result<OwnedFd, GuestError> {
        rustix::io::fcntl_dupfd_cloexec(&self.null, 3)
            .map_err(|errno| GuestError::exec("cannot duplicate a descriptor", errno))
    }

    /// Kills everything that sessions started.
    pub fn kill_everything(&self) {
        let by_group = self.workload.as_ref().is_some_and(|workload| workload.kill().is_ok());
        if !by_group {
            self.sessions.signal(libc::SIGKILL);
        }
    }
}

/// The sessions that live, the main workload's process included. A process is waited for under this lock, so a signal that is sent
/// through it never meets a process id that has been given to somebody else.
#[derive(Debug, Default)]
pub struct Sessions {
    state: Mutex<SessionsState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct SessionsState {
    next: u64,
    /// Process ids of exec sessions whose process lives.
    processes: HashMap<u64, u32>,
    /// Sessions whose end has not been told yet.
    open: usize,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, SessionsState> {
        // The state is whole between any two statements, so a panic elsewhere cannot have broken it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a new session, never used again in this boot.
    pub fn number(&self) -> u64 {
        let mut state = self.lock();
        state.next += 1;
        state.next
    }

    /// An exec session's process lives.
    pub fn enter(&self, number: u64, pid: u32) {
        let mut state = self.lock();
        state.processes.insert(number, pid);
        state.open += 1;
    }

    /// Waits for a process under the lock; if it has ended, its id is forgotten.
    pub fn reap<T>(&self, number: u64, wait: impl FnOnce() -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        let end = wait()?;
        state.processes.remove(&number);
        Some(end)
    }

    /// The end of a session was told.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.open = state.open.saturating_sub(1);
        self.ended.notify_all();
    }

    /// Number of sessions whose process lives.
    pub fn alive(&self) -> usize {
        self.lock().processes.len()
    }

    /// Sends a signal to the process group of every session.
    pub fn signal(&self, number: i32) {
        for pid in self.lock().processes.values() {
            // One that has just ended is a zombie until it is waited for, so the id is still its own.
            let _ = sys::kill_group(*pid, number);
        }
    }

    /// Waits until every session's end was told, at most for a time. Whether it was.
    pub fn wait_empty(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        while state.open > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
