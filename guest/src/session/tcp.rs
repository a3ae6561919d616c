//! One TCP connection from inside the guest: resolved, connected and relayed in the stream's own thread. Called by
//! `agent::connection`. What the guest's policy, resolver and loopback say is what its caller gets, at once and in words.
//!
//! ```text
//!  host ── bytes ──► buffer ──► connection      each half ends by itself: end of file becomes shutdown(SHUT_WR) on the other side
//!  host ◄── bytes ── buffer ◄── connection      a side that does not read stops the other: nothing is held but one buffer each way
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{GuestBody, OpenTcp, Opened};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

use super::Guest;
use super::stream::FrameStream;
use crate::agent::connection::flush_until;
use crate::failure::GuestError;
use crate::resolver;

/// Time to resolve and connect; less than what the host waits for an answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// Time for the first of several addresses, so that the others get their turn.
const ADDRESS_LIMIT: Duration = Duration::from_secs(5);
/// Time to hand out the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Bytes held in each direction.
const BUFFER_LEN: usize = 64 << 10;
/// How often a host that closed its sending half is looked at: that it went away altogether raises no event.
const PROBE_INTERVAL: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Connects and relays until both halves are closed.
///
/// # Errors
/// `connect_failed` with errno, `connect_denied`, `invalid_config`; with the stream to say it on.
pub fn run(
    guest: &Guest,
    stream: FrameStream,
    open: &OpenTcp,
    opened: Opened,
) -> Result<(), (FrameStream, GuestError)> {
    let connection = match connect(guest, open) {
        Ok(connection) => connection,
        Err(error) => return Err((stream, error)),
    };
    let mut stream = stream;
    stream.send(GuestBody::Opened(opened));
    if !flush_until(&mut stream, Instant::now() + ANSWER_LIMIT) {
        return Ok(());
    }
    let (host, early) = stream.into_parts();
    // Whatever breaks a relay closes both sides, and there is nobody else to tell.
    let _ = relay(&host, connection.as_fd(), early);
    Ok(())
}

fn connect(guest: &Guest, open: &OpenTcp) -> Result<OwnedFd, GuestError> {
    let port = u16::try_from(open.port).ok().filter(|port| *port != 0);
    let Some(port) = port.filter(|_| !open.host.is_empty() && open.host.len() <= 255) else {
        return Err(GuestError::new(ErrorCode::InvalidConfig, "a host and a port from 1 to 65535 are needed"));
    };
    let until = Instant::now() + CONNECT_LIMIT;
    let addresses = resolver::resolve(&guest.root, &open.host, until)?;
    let mut last = (None, io::Error::from(io::ErrorKind::TimedOut));
    for (at, address) in addresses.iter().enumerate() {
        let left = until.saturating_duration_since(Instant::now());
        let limit = if at + 1 == addresses.len() { left } else { left.min(ADDRESS_LIMIT) };
        if limit.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&SocketAddr::new(*address, port), limit) {
            Ok(connection) => {
                // Small packets of an interactive protocol must not wait; a system that refuses is only slower.
                let _ = connection.set_nodelay(true);
                return Ok(connection.into());
            }
            Err(error) => last = (Some(*address), error),
        }
    }
    Err(refusal(&open.host, last.0, port, &last.1))
}

fn refusal(host: &str, address: Option<IpAddr>, port: u16, error: &io::Error) -> GuestError {
    let place = match address {
        Some(address) if address.to_string() != host => format!("{host} ({address}) port {port}"),
        _ => format!("{host} port {port}"),
    };
    let errno = error.raw_os_error().unwrap_or(libc::ETIMEDOUT);
    let local = address.is_none_or(|address| address.is_loopback());
    let code = match errno {
        libc::EPERM | libc::EACCES => ErrorCode::ConnectDenied,
        _ => ErrorCode::ConnectFailed,
    };
    let mut failure = GuestError::system(code, &place, errno);
    if errno == libc::ECONNREFUSED && !local {
        failure.message.push_str(" (nobody listens there, or the sandbox's network policy denies it)");
    }
    failure
}

/// One direction of a relay.
struct Flow {
    buffer: Vec<u8>,
    start: usize,
    /// Nothing more will be read.
    ended: bool,
    /// The end was passed on.
    closed: bool,
}

impl Flow {
    fn new(early: Vec<u8>) -> Self {
        Self { buffer: early, start: 0, ended: false, closed: false }
    }

    fn waits(&self) -> bool {
        self.start < self.buffer.len()
    }

    /// Moves what can be moved without waiting.
    fn advance(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, scratch: &mut [u8]) -> Result<(), Errno> {
        loop {
            while self.waits() {
                match rustix::net::send(to, &self.buffer[self.start..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                    Ok(len) => self.start += len,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(()),
                    Err(errno) => return Err(errno),
                }
            }
            self.buffer.clear();
            self.start = 0;
            if self.ended {
                if !self.closed {
                    self.closed = true;
                    // One that is gone already needs no goodbye.
                    let _ = rustix::net::shutdown(to, Shutdown::Write);
                }
                return Ok(());
            }
            match rustix::io::read(from, &mut *scratch) {
                Ok(0) => self.ended = true,
                Ok(len) => self.buffer.extend_from_slice(&scratch[..len]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Relays until both directions have ended or one breaks.
fn relay(host: &OwnedFd, connection: BorrowedFd<'_>, early: Vec<u8>) -> Result<(), Errno> {
    let host = host.as_fd();
    for end in [host, connection] {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    let (mut inward, mut outward) = (Flow::new(early), Flow::new(Vec::new()));
    let mut scratch = vec![0; BUFFER_LEN];
    loop {
        inward.advance(host, connection, &mut scratch)?;
        outward.advance(connection, host, &mut scratch)?;
        if inward.closed && outward.closed {
            return Ok(());
        }
        let wanted = |reads: &Flow, writes: &Flow| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !reads.ended && !reads.waits());
            flags.set(PollFlags::OUT, writes.waits());
            flags
        };
        // A descriptor that is waited for in no direction would only repeat its hang-up.
        let mut fds: Vec<PollFd<'_>> = [(host, wanted(&inward, &outward)), (connection, wanted(&outward, &inward))]
            .into_iter()
            .filter(|(_, flags)| !flags.is_empty())
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        let timeout = inward.ended.then_some(&PROBE_INTERVAL);
        match poll(&mut fds, timeout) {
            // An empty message asks whether the host still listens.
            Ok(0) => rustix::net::send(host, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).map(drop)?,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_policy_forbids_is_told_from_what_is_not_there() {
        let refused =
            |address: [u8; 4], errno| refusal("there", Some(address.into()), 80, &io::Error::from_raw_os_error(errno));
        assert_eq!(refused([10, 1, 2, 3], libc::EPERM).code, ErrorCode::ConnectDenied);
        assert_eq!(refused([10, 1, 2, 3], libc::EACCES).code, ErrorCode::ConnectDenied);
        assert_eq!(refused([10, 1, 2, 3], libc::ENETUNREACH).code, ErrorCode::ConnectFailed);
        // A reset from elsewhere may be the policy's; one from the sandbox's own loopback cannot.
        let elsewhere = refused([10, 1, 2, 3], libc::ECONNREFUSED);
        assert_eq!(elsewhere.code, ErrorCode::ConnectFailed);
        assert!(elsewhere.message.contains("there (10.1.2.3) port 80") && elsewhere.message.contains("policy"));
        assert!(!refused([127, 0, 0, 1], libc::ECONNREFUSED).message.contains("policy"));
    }
}
