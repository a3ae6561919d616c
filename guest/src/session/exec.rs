//! An exec session from its opening to its end, in the connection's own thread. Called by `agent::connection`, and by `agent::renewal` to
//! rehearse one.

use std::time::Duration;

use msb_protocol::guest::{ExecConfig, GuestBody, Opened, Started};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::Guest;
use super::process::Process;
use super::pump::{Client, Pump};
use super::stream::FrameStream;
use crate::failure::GuestError;

/// The word with which this program ends at once.
pub const REHEARSAL_ARGUMENT: &str = "rehearsal";
/// Longest time for that.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(2);

/// Runs a command for the host. `Opened` and `Started` are sent together once it runs.
///
/// # Errors
/// The typed reason if it cannot be started, with the stream to say it on.
pub fn run(
    guest: &Guest,
    stream: FrameStream,
    exec: &ExecConfig,
    opened: Opened,
) -> Result<(), (FrameStream, GuestError)> {
    let number = guest.sessions.number();
    let process = match Process::start(guest, exec, &format!("exec-{number}"), false) {
        Ok(process) => process,
        Err(error) => return Err((stream, error)),
    };
    let timeout = (exec.timeout_ms > 0).then(|| Duration::from_millis(exec.timeout_ms));
    attend(guest, stream, (number, process), opened, timeout, exec.wait_output);
    Ok(())
}

/// A session from its process's start to its end.
fn attend(
    guest: &Guest,
    stream: FrameStream,
    (number, process): (u64, Process),
    opened: Opened,
    timeout: Option<Duration>,
    wait_output: bool,
) {
    guest.sessions.enter(number, process.pid);
    let mut client = Client::primary(stream);
    client.send(GuestBody::Opened(opened));
    client.send(GuestBody::Started(Started { pid: process.pid }));
    let mut pump = Pump::new(guest, number, process, timeout, wait_output);
    pump.admit(client);
    pump.run();
    pump.farewell();
    guest.sessions.leave();
}

/// Goes all the way of a session with nothing at its end: this program, which ends at once. In a guest that was just made of a saved one every
/// page costs a fault when it is first touched; one that stands by has the time for them, and whoever takes it has not.
///
/// # Errors
/// As [`run`].
pub fn rehearse(guest: &Guest) -> Result<(), GuestError> {
    let failed = |errno| GuestError::exec("cannot make a stream", errno);
    let flags = SocketFlags::CLOEXEC;
    let (stream, _host) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
    let stream = FrameStream::new(stream).map_err(failed)?;
    let number = guest.sessions.number();
    let process = Process::start_own(guest, REHEARSAL_ARGUMENT)?;
    attend(guest, stream, (number, process), Opened::default(), Some(REHEARSAL_LIMIT), false);
    Ok(())
}
