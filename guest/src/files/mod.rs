//! File sessions: the agent reads and changes files for the host, as one user of the guest and inside the workload's root. Called by
//! `agent::connection`, in a thread of its own for each session; on a test machine by tests.
//!
//! ```text
//!  person.rs      the thread becomes the user, with the workload's root as its root      session.rs   requests in, answers out
//!  operations.rs  one request, one answer                                                archive.rs   a tree as a tar stream
//!  watch.rs       what changes below a path
//! ```
//!
//! The kernel itself resolves every path, with the thread's own root and identity: there is no check here that a link could get around.
//! It never opens a magic link of /proc, which could lead to the agent's own descriptors.

mod archive;
mod operations;
mod person;
mod session;
mod watch;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;
use msb_protocol::files::{OpenArchive, OpenFiles};
use msb_protocol::guest::{GuestBody, Opened};

use crate::failure::GuestError;
use crate::session::stream::FrameStream;
use crate::session::{Guest, process};
pub use archive::serve as serve_archive;
pub(crate) use person::Person;
use person::Place;

/// The file sessions that live, so that the end of the sandbox can close them before it flushes.
#[derive(Debug, Default)]
pub struct FileSessions {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    closed: bool,
    sockets: HashMap<u64, OwnedFd>,
}

impl FileSessions {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins; none when the end has come.
    pub(crate) fn enter(&self, stream: &FrameStream) -> Option<u64> {
        let socket = rustix::io::fcntl_dupfd_cloexec(stream.socket(), 3).ok()?;
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.next += 1;
        let number = state.next;
        state.sockets.insert(number, socket);
        Some(number)
    }

    pub(crate) fn leave(&self, number: u64) {
        self.lock().sockets.remove(&number);
        self.left.notify_all();
    }

    /// Ends every session and lets no other begin. Whether all were gone within the time.
    pub fn close_all(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        state.closed = true;
        for socket in state.sockets.values() {
            // Already disconnected is as good.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
        while !state.sockets.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.left.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// Serves one session to its end.
///
/// # Errors
/// The typed reason if it cannot begin, with the stream to say it on.
pub fn run(
    guest: &Guest,
    sessions: &FileSessions,
    stream: FrameStream,
    open: &OpenFiles,
    opened: Opened,
) -> Result<(), (FrameStream, GuestError)> {
    as_person(guest, sessions, stream, &open.user, open.at_home, |stream, place| {
        stream.send(GuestBody::Opened(opened));
        session::serve(stream, place);
    })
}

/// Packs or unpacks one tree.
///
/// # Errors
/// The typed reason if it cannot begin, with the stream to say it on.
pub fn run_archive(
    guest: &Guest,
    sessions: &FileSessions,
    stream: FrameStream,
    open: &OpenArchive,
    opened: Opened,
) -> Result<(), (FrameStream, GuestError)> {
    let Some(action) = &open.action else {
        let message = "this agent does not know what the archive is for";
        return Err((stream, GuestError::new(ErrorCode::UnsupportedOperation, message)));
    };
    as_person(guest, sessions, stream, &open.user, false, |stream, _| {
        stream.send(GuestBody::Opened(opened));
        archive::serve(stream, action);
    })
}

/// Does a session's work in a thread of its own, which gives up the agent's identity for good.
fn as_person(
    guest: &Guest,
    sessions: &FileSessions,
    mut stream: FrameStream,
    user: &str,
    at_home: bool,
    work: impl FnOnce(&mut FrameStream, Place) + Send,
) -> Result<(), (FrameStream, GuestError)> {
    let person = match Person::look_up(guest, user) {
        Ok(person) => person,
        Err(error) => return Err((stream, error)),
    };
    let Some(number) = sessions.enter(&stream) else {
        return Err((stream, GuestError::new(ErrorCode::SandboxNotRunning, "the sandbox is being stopped")));
    };
    // A scope gives the stream back if the thread cannot become the user.
    let outcome = std::thread::scope(|scope| {
        let work = || person.become_it(guest, at_home).map(|place| work(&mut stream, place));
        match std::thread::Builder::new().stack_size(crate::agent::STACK_LEN).spawn_scoped(scope, work) {
            // A panic would have ended the whole agent.
            Ok(thread) => thread.join().unwrap_or(Ok(())),
            Err(error) => Err(process::from_io("cannot start a thread", &error)),
        }
    });
    sessions.leave(number);
    outcome.map_err(|error| (stream, error))
}
