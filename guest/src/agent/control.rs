//! The control stream: a beat each second, answers to pings, the order to shut down. The newest one wins, an older one is closed.
//! It keeps beating while the disks are flushed. Called by `connection`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::guest::{BEAT_INTERVAL_MS, Beat, GuestBody, HostBody, Opened, Pong};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Agent;
use super::clock::uptime_us;
use super::ending::Reason;
use crate::root::{self, memory_field};
use crate::session::stream::{FrameStream, StreamError};

/// The control streams of this boot.
#[derive(Debug)]
pub struct Controls {
    newest: AtomicU64,
    sequence: AtomicU64,
    /// A descriptor of the newest stream's socket, to close it when a newer one comes.
    socket: Mutex<Option<OwnedFd>>,
    wake: OwnedFd,
}

impl Controls {
    /// None yet.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { newest: AtomicU64::new(0), sequence: AtomicU64::new(0), socket: Mutex::new(None), wake })
    }

    /// Makes the newest stream look around.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn take_over(&self, stream: &FrameStream) -> u64 {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(older) = socket.take() {
            let _ = rustix::net::shutdown(&older, rustix::net::Shutdown::Both);
        }
        *socket = rustix::io::fcntl_dupfd_cloexec(stream.socket(), 3).ok();
        self.newest.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn leave(&self, number: u64) {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if self.newest.load(Ordering::Acquire) == number {
            *socket = None;
        }
    }
}

/// Serves a control stream to its end.
pub(crate) fn serve(agent: &Agent, mut stream: FrameStream, opened: Opened) {
    let number = agent.controls.take_over(&stream);
    let mut told_end = opened.main_exited.is_some();
    stream.send(GuestBody::Opened(opened));
    let mut next_beat = Instant::now();
    while agent.controls.newest.load(Ordering::Acquire) == number {
        let now = Instant::now();
        if now >= next_beat {
            // A host that does not read gets no beats piled up.
            if stream.has_room() {
                stream.send(GuestBody::Beat(beat(agent)));
            }
            next_beat = now + Duration::from_millis(BEAT_INTERVAL_MS);
            if let Some(workload) = &agent.guest.workload {
                workload.sweep();
            }
        }
        if let (false, Some(end)) = (told_end, agent.main.end()) {
            stream.send(GuestBody::MainExited(end));
            told_end = true;
        }
        // Heard before the wait: what came together with the opening is announced by no event.
        if hear(agent, &mut stream).and_then(|()| stream.flush()).is_err() {
            break;
        }
        wait(agent, &stream, next_beat);
    }
    agent.controls.leave(number);
}

fn wait(agent: &Agent, stream: &FrameStream, until: Instant) {
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    let timeout =
        Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(1), tv_nsec: i64::from(left.subsec_nanos()) };
    let write = if stream.backlog() > 0 { PollFlags::OUT } else { PollFlags::empty() };
    let mut fds = [
        PollFd::from_borrowed_fd(stream.socket(), PollFlags::IN | write),
        PollFd::from_borrowed_fd(agent.controls.wake.as_fd(), PollFlags::IN),
    ];
    // Interrupted or not: the loop looks at everything again.
    let _ = poll(&mut fds, Some(&timeout));
    let _ = rustix::io::read(&agent.controls.wake, &mut [0u8; 8]);
}

fn hear(agent: &Agent, stream: &mut FrameStream) -> Result<(), StreamError> {
    stream.receive()?;
    while let Some(message) = stream.next_message()? {
        match message {
            HostBody::Ping(ping) if stream.has_room() => stream.send(GuestBody::Pong(Pong { token: ping.token })),
            HostBody::Shutdown(order) => agent.end.request(Reason::Ordered(order)),
            // What a newer host may say beyond this asks nothing of this agent.
            _ => {}
        }
    }
    Ok(())
}

/// What a beat says.
fn beat(agent: &Agent) -> Beat {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_total_bytes = memory_field(&memory, "MemTotal").unwrap_or(0);
    let available = memory_field(&memory, "MemAvailable").unwrap_or(0);
    let (root_used_bytes, root_free_bytes) = root_usage(agent);
    Beat {
        sequence: agent.controls.sequence.fetch_add(1, Ordering::AcqRel) + 1,
        uptime_ms: uptime_us() / 1000,
        sessions: u32::try_from(agent.guest.sessions.alive()).unwrap_or(u32::MAX),
        memory_used_bytes: memory_total_bytes.saturating_sub(available),
        memory_total_bytes,
        root_used_bytes,
        root_free_bytes,
        load_hundredths: load_hundredths(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default()),
        processes: agent.guest.workload.as_ref().map_or(0, crate::cgroup::WorkloadGroup::processes),
    }
}

/// Bytes used and free on the writable disk (of the root, where there is none: on a test machine).
fn root_usage(agent: &Agent) -> (u64, u64) {
    let statistics = rustix::fs::statvfs(root::UPPER).or_else(|_| rustix::fs::fstatvfs(agent.guest.root.directory()));
    statistics.map_or((0, 0), |disk| {
        let used = disk.f_blocks.saturating_sub(disk.f_bfree);
        (used.saturating_mul(disk.f_frsize), disk.f_bavail.saturating_mul(disk.f_frsize))
    })
}

/// The one-minute load of /proc/loadavg in hundredths.
fn load_hundredths(text: &str) -> u32 {
    let Some((whole, hundredths)) = text.split_whitespace().next().and_then(|load| load.split_once('.')) else {
        return 0;
    };
    let (whole, hundredths) = (whole.parse::<u32>().unwrap_or(0), hundredths.parse::<u32>().unwrap_or(0));
    whole.saturating_mul(100).saturating_add(hundredths.min(99))
}

#[cfg(test)]
mod tests {
    use super::load_hundredths;

    #[test]
    fn load_is_read_in_hundredths() {
        assert_eq!(load_hundredths("1.05 0.70 0.51 2/345 6789\n"), 105);
        assert_eq!((load_hundredths(""), load_hundredths("x.y"), load_hundredths("5")), (0, 0, 0));
    }
}
