//! Which process it is: pid, start time and the host's boot id together are used once only; a pidfd holds on to it.
//!
//! Called for creators of attached sandboxes and for VM processes that a restarted daemon finds again. A pid alone is never trusted.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process that existed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its process id.
    pub pid: u32,
    /// Its start time in clock ticks since the host's boot (proc_pid_stat(5), field 22).
    pub start_ticks: u64,
    /// The host's boot id (`/proc/sys/kernel/random/boot_id`).
    pub host_boot_id: String,
}

impl ProcessIdentity {
    /// The identity of a live process.
    ///
    /// # Errors
    /// `NotFound` if there is no such process in this pid namespace.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = start_ticks(&stat).ok_or_else(|| io::Error::other("/proc/PID/stat has an unknown form"))?;
        Ok(Self { pid, start_ticks, host_boot_id: host_boot_id().to_owned() })
    }

    /// A pidfd of this very process, or `None` if it is gone.
    #[must_use]
    pub fn open(&self) -> Option<OwnedFd> {
        if self.host_boot_id != host_boot_id() {
            return None;
        }
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
        // The pid may have been given away before the pidfd was opened; afterwards it cannot be without the pidfd being readable.
        let again = Self::of(self.pid).ok()?;
        (again == *self && !has_ended(&fd)).then_some(fd)
    }
}

/// The host's boot id; empty where /proc does not tell.
pub fn host_boot_id() -> &'static str {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    BOOT_ID.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    })
}

/// Field 22 of a stat line. The command in parentheses may hold anything, so fields are counted from its last parenthesis.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// Whether the process of a pidfd has ended.
#[must_use]
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&none)), Ok(ready) if ready > 0)
}

/// Ends when the process of a pidfd has ended.
pub async fn ended(pidfd: OwnedFd) {
    #[expect(
        deprecated,
        reason = "an OwnedFd always names the same open file, and its replacement is unsafe to call, which this crate forbids"
    )]
    let watched = AsyncFd::with_interest(pidfd, Interest::READABLE);
    if let Ok(watched) = watched {
        // An error here means that the runtime ends; the process is then no longer anybody's business.
        let _ = watched.readable().await;
    }
}

/// Kills the process of a pidfd.
pub fn kill(pidfd: &OwnedFd) {
    if let Err(error) = rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        tracing::debug!(%error, "a process to kill was gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(start_ticks(stat), Some(4711));
        assert_eq!(start_ticks("7 (x"), None);
        assert_eq!(start_ticks("7 (x) S 1"), None);
    }

    #[tokio::test]
    async fn a_process_is_held_until_it_ends_and_another_start_time_is_another_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert!(ProcessIdentity { start_ticks: identity.start_ticks + 1, ..identity.clone() }.open().is_none());
        assert!(ProcessIdentity { host_boot_id: "another".into(), ..identity.clone() }.open().is_none());
        let pidfd = identity.open().expect("alive");
        assert!(!has_ended(&pidfd));
        kill(&pidfd);
        tokio::time::timeout(std::time::Duration::from_secs(5), ended(pidfd)).await.expect("its end is seen");
        child.wait().unwrap();
        assert!(identity.open().is_none());
    }
}
