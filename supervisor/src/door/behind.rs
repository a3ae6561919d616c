//! The user's side of the door: connections that the front door hands over join those of the service's own socket.

use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;

use msb_protocol::error::ApiError;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::{DOOR_SOCKET, Word, hear};
use crate::server;

/// Connections that wait for the service.
const QUEUE_LEN: usize = 64;

/// What came through the door.
#[derive(Debug)]
pub enum Arrival {
    /// A client.
    Connection(UnixStream),
    /// The service is to end.
    End,
    /// The front door reads one byte from this if the service's supervisor answers.
    Alive(StdUnixStream),
    /// Sandboxes are to stop first; the front door reads one byte from this when they have.
    StopSandboxes(StdUnixStream),
}

/// Opens the door in the service's directory of sockets. Must be called inside the runtime.
///
/// # Errors
/// `home_unusable`.
pub fn open(runtime_dir: &Path) -> Result<mpsc::Receiver<Arrival>, ApiError> {
    let listening = server::bind(&runtime_dir.join(DOOR_SOCKET))?;
    let (arrivals, queue) = mpsc::channel(QUEUE_LEN);
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("door".into())
        .spawn(move || keep(&listening, &arrivals, &runtime))
        .map_err(|error| ApiError::internal(format!("no thread for the door: {error}")))?;
    Ok(queue)
}

fn keep(listener: &StdUnixListener, arrivals: &mpsc::Sender<Arrival>, runtime: &tokio::runtime::Handle) {
    for door in listener.incoming() {
        let Ok(door) = door else { continue };
        // The socket is in a directory of the user's; the user's own processes need no door, and could hand over what is not theirs.
        let root = rustix::net::sockopt::socket_peercred(&door).is_ok_and(|peer| peer.uid.is_root());
        if !root {
            tracing::warn!("somebody who is not root knocked at the door");
            continue;
        }
        loop {
            let arrival = match hear(&door) {
                Ok(Some((Word::Connection, Some(connection)))) => {
                    let stream = StdUnixStream::from(connection);
                    let _inside = runtime.enter();
                    match stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream)) {
                        Ok(stream) => Arrival::Connection(stream),
                        Err(error) => {
                            tracing::warn!(%error, "a connection came through the door broken");
                            continue;
                        }
                    }
                }
                Ok(Some((Word::Connection, None))) => continue,
                Ok(Some((Word::End, _))) => Arrival::End,
                Ok(Some((Word::Alive, _))) => match door.try_clone() {
                    Ok(answer) => Arrival::Alive(answer),
                    Err(_) => break,
                },
                Ok(Some((Word::StopSandboxes, _))) => match door.try_clone() {
                    Ok(answer) => Arrival::StopSandboxes(answer),
                    Err(_) => break,
                },
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "the front door cannot be understood");
                    break;
                }
            };
            if arrivals.blocking_send(arrival).is_err() {
                return;
            }
        }
    }
}
