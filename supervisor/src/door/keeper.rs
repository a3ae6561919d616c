//! The front door as keeper of the users' services: what systemd is for the door itself, the door is for them.
//!
//! ```text
//!  started ─► watched ── ended by itself (told to, or stopped by its user) ──► let be; the next connection starts one
//!                │ ▲
//!                │ └── answers within the watchdog's time
//!                ├── killed, crashed ─────────────────────────────► started again, later each time
//!                └── does not answer ──► killed ──────────────────► the same
//! ```
//!
//! One thread for each service, which mostly sleeps. It never speaks for a user and never reads what a service says beyond one byte.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::front::Users;
use super::{Word, say};

/// Wait before the first start after a crash; doubled each time.
const BACK_OFF: Duration = Duration::from_millis(200);
/// Longest wait.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// A service that has lived for this long had a good start.
const STEADY: Duration = Duration::from_secs(60);
/// Time for a service to end when it is told to.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two looks at a service where nobody watches the door itself.
const IDLE: Duration = Duration::from_secs(3_600);

/// Watches a service from now on.
pub(super) fn keep(users: &Arc<Users>, uid: u32, mut child: Child) {
    let users = users.clone();
    std::thread::spawn(move || {
        let began = Instant::now();
        let status = watched(&users, uid, &mut child);
        if status.as_ref().is_ok_and(ExitStatus::success) {
            return;
        }
        let crashes = {
            let mut crashes = users.crashes.lock().unwrap_or_else(PoisonError::into_inner);
            let count = crashes.entry(uid).or_default();
            *count = if began.elapsed() >= STEADY { 0 } else { count.saturating_add(1) };
            *count
        };
        let pause = back_off(crashes);
        tracing::error!(
            uid,
            ?status,
            pause_ms = pause.as_millis(),
            "the service of a user has died and is started again"
        );
        std::thread::sleep(pause);
        // Somebody who connected meanwhile has started it already.
        if let Err(error) = users.door(uid, false) {
            tracing::error!(uid, %error, "the service of a user does not start again; the next connection tries once more");
        }
    });
}

fn back_off(crashes: u32) -> Duration {
    BACK_OFF.saturating_mul(2u32.saturating_pow(crashes.min(16))).min(BACK_OFF_MAX)
}

/// Waits for the end of a service, and kills it if it does not answer in time.
fn watched(users: &Users, uid: u32, child: &mut Child) -> io::Result<ExitStatus> {
    let Some(limit) = sd_notify::watchdog_enabled() else { return child.wait() };
    let process = pidfd(child.id())?;
    loop {
        if ended_within(&process, (limit / 3).min(IDLE))? {
            return child.wait();
        }
        if let Err(error) = alive(users, uid, limit) {
            // It may have ended in that moment.
            if !ended_within(&process, Duration::ZERO)? {
                tracing::error!(uid, %error, "the service of a user does not answer and is killed");
                pidfd_send_signal(&process, Signal::KILL)?;
            }
        }
    }
}

fn alive(users: &Users, uid: u32, limit: Duration) -> io::Result<()> {
    let mut door = users.connect(uid)?;
    door.set_write_timeout(Some(limit))?;
    door.set_read_timeout(Some(limit))?;
    say(&door, Word::Alive, None)?;
    door.read_exact(&mut [0])
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn ended_within(process: &OwnedFd, time: Duration) -> io::Result<bool> {
    let time = Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() };
    match rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&time)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Ends the service of this user that listens at the other end, which an earlier front door has started. One that hangs is killed.
pub(super) fn end_peer(uid: u32, door: &UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(door)?;
    if peer.uid.as_raw() != uid {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let process = match pidfd_open(peer.pid, PidfdFlags::empty()) {
        Ok(process) => process,
        // It has just ended by itself.
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // One that cannot be told is ending already, or is killed.
    let _ = say(door, Word::End, None);
    if !ended_within(&process, END_TIMEOUT)? {
        tracing::error!(uid, "the service of a user does not end when it is told to, and is killed");
        pidfd_send_signal(&process, Signal::KILL)?;
        ended_within(&process, END_TIMEOUT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_crash_is_waited_for_longer_and_no_longer_than_a_minute() {
        let waits: Vec<u128> = [0, 1, 2, 8, 9, 40].into_iter().map(|crashes| back_off(crashes).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 51_200, 60_000, 60_000]);
    }
}
