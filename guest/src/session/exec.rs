//! An exec session from its opening to its end, in the connection's own thread. Called by `agent::connection`.

use std::time::Duration;

use msb_protocol::guest::{ExecConfig, GuestBody, Opened, Started};

use super::Guest;
use super::process::Process;
use super::pump::{Client, Pump};
use super::stream::FrameStream;
use crate::failure::GuestError;

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
    guest.sessions.enter(number, process.pid);
    let mut client = Client::primary(stream);
    client.send(GuestBody::Opened(opened));
    client.send(GuestBody::Started(Started { pid: process.pid }));
    let timeout = (exec.timeout_ms > 0).then(|| Duration::from_millis(exec.timeout_ms));
    let mut pump = Pump::new(guest, number, process, timeout, exec.wait_output);
    pump.admit(client);
    pump.run();
    pump.farewell();
    guest.sessions.leave();
    Ok(())
}
