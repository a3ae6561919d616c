//! One stream from the host, from its first frame on: who may speak, what is asked, which thread does it. Called by the accept loop
//! in `boot`, and by tests with a socket pair.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{GuestBody, HostBody, Open, OpenKind, Opened};
use msb_protocol::version::{GUEST_GENERATION, GUEST_GENERATION_MIN, negotiate};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Agent, STACK_LEN, VERSION, control, renewal};
use crate::failure::GuestError;
use crate::session::stream::{FrameStream, StreamError};
use crate::session::workload::Caller;
use crate::session::{self, exec};

/// Most streams at once, half-open ones included.
pub const CONNECTIONS_MAX: usize = 4096;
/// How long a stream may take to say what it is for.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// How long a refusal may take to be read.
const REFUSAL_LIMIT: Duration = Duration::from_secs(2);

/// Serves a stream in a thread of its own; one too many is closed.
pub fn spawn(agent: &Arc<Agent>, socket: OwnedFd) {
    if agent.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
        agent.connections.fetch_sub(1, Ordering::AcqRel);
        agent.host.log("a stream was refused: too many are open");
        return;
    }
    let shared = Arc::clone(agent);
    let thread = std::thread::Builder::new().stack_size(STACK_LEN).spawn(move || {
        serve(&shared, socket);
        shared.connections.fetch_sub(1, Ordering::AcqRel);
    });
    if let Err(error) = thread {
        agent.connections.fetch_sub(1, Ordering::AcqRel);
        agent.host.log(&format!("a stream was refused: {error}"));
    }
}

/// Serves one stream to its end in the calling thread.
pub fn serve(agent: &Agent, socket: OwnedFd) {
    let Ok(mut stream) = FrameStream::new(socket) else { return };
    let open = match read_open(&mut stream) {
        Ok(open) => open,
        Err(error) => {
            agent.host.log(&format!("a stream ended before it was opened: {error}"));
            return;
        }
    };
    if let Err((stream, error)) = dispatch(agent, stream, open) {
        refuse(stream, error);
    }
}

type Refused = (FrameStream, GuestError);

fn dispatch(agent: &Agent, stream: FrameStream, open: Open) -> Result<(), Refused> {
    if let Err(error) = negotiate(GUEST_GENERATION, GUEST_GENERATION_MIN, open.generation) {
        return Err((stream, GuestError::new(ErrorCode::UnsupportedOperation, error.to_string())));
    }
    let renews = matches!(open.kind, Some(OpenKind::Renew(_)));
    if !renews && open.boot_id != agent.boot_id() {
        return Err((
            stream,
            GuestError::new(ErrorCode::SandboxNotRunning, "this stream was meant for another run of the sandbox"),
        ));
    }
    if agent.end.is_due() && !matches!(open.kind, Some(OpenKind::Control(_))) {
        return Err((stream, GuestError::new(ErrorCode::SandboxNotRunning, "the sandbox is being stopped")));
    }
    let opened = Opened { generation: GUEST_GENERATION, agent_version: VERSION.into(), ..Opened::default() };
    match open.kind {
        Some(OpenKind::Control(_)) => {
            control::serve(
                agent,
                stream,
                Opened { main_exited: agent.main.end(), main_pid: agent.main.pid(), ..opened },
            );
            Ok(())
        }
        Some(OpenKind::Exec(config)) => exec::run(&agent.guest, stream, &config, opened),
        Some(OpenKind::Main(main)) => {
            let caller = Caller { stream, terminal: main.terminal, timeout_ms: main.timeout_ms, opened };
            match agent.run_main(Some(caller)) {
                Ok(()) => Ok(()),
                Err(refusal) => refusal.stream.map_or(Ok(()), |stream| Err((stream, refusal.error))),
            }
        }
        Some(OpenKind::Files(open)) => crate::files::run(&agent.guest, &agent.files, stream, &open, opened),
        Some(OpenKind::Archive(open)) => crate::files::run_archive(&agent.guest, &agent.files, stream, &open, opened),
        Some(OpenKind::Attach(attach)) => agent.main.attach(stream, &attach, opened),
        Some(OpenKind::Renew(renew)) => renewal::renew(agent, stream, renew, open.boot_id),
        Some(OpenKind::Tcp(tcp)) => session::tcp::run(&agent.guest, stream, &tcp, opened),
        Some(OpenKind::Sftp(sftp)) => session::sftp::run(&agent.guest, stream, &sftp, opened),
        None => {
            let message = format!("this agent (generation {GUEST_GENERATION}) does not know what the stream is for");
            Err((stream, GuestError::new(ErrorCode::UnsupportedOperation, message)))
        }
    }
}

/// Reads the first message.
fn read_open(stream: &mut FrameStream) -> Result<Open, StreamError> {
    match next_message(stream, Instant::now() + OPEN_LIMIT)? {
        HostBody::Open(open) => Ok(open),
        _ => Err(StreamError::Protocol(msb_protocol::frame::FrameError::Malformed)),
    }
}

/// Waits for a message; used where there is nothing else to do.
///
/// # Errors
/// [`StreamError`]; a peer that is silent for too long has closed.
pub(crate) fn next_message(stream: &mut FrameStream, until: Instant) -> Result<HostBody, StreamError> {
    loop {
        if let Some(message) = stream.next_message()? {
            return Ok(message);
        }
        if !wait_for(stream, PollFlags::IN, until) {
            return Err(StreamError::Closed);
        }
        stream.receive()?;
    }
}

/// Writes what waits, at most until a time. Whether all was written.
pub(crate) fn flush_until(stream: &mut FrameStream, until: Instant) -> bool {
    while stream.flush().is_ok() {
        if stream.backlog() == 0 {
            return true;
        }
        if !wait_for(stream, PollFlags::OUT, until) {
            return false;
        }
    }
    false
}

fn wait_for(stream: &FrameStream, events: PollFlags, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return false;
    }
    let timeout =
        Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(left.subsec_nanos()) };
    let mut fds = [PollFd::from_borrowed_fd(stream.socket(), events)];
    // Interrupted or nothing yet: the caller looks again, and the time runs.
    !matches!(poll(&mut fds, Some(&timeout)), Ok(0))
}

fn refuse(mut stream: FrameStream, error: GuestError) {
    stream.send(GuestBody::Refused(error.into_failure("")));
    flush_until(&mut stream, Instant::now() + REFUSAL_LIMIT);
}
