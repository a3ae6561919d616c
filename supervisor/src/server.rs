//! The control socket: inherited from systemd or bound here, 0600, served until somebody ends the daemon. Called by `main` and by the
//! front door; it never looks into a request.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::SOCKET_PATH_LEN_MAX;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::home::private_directory;
use crate::peer::Peer;

/// Wait before connections are taken again after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listening socket.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub listener: StdUnixListener,
    /// Whether systemd holds it: then its path stays when this process ends.
    pub inherited: bool,
}

/// The listening socket: systemd's if it passed one, else one of our own. The home's lock is held, so nobody else serves this path.
///
/// # Errors
/// `home_unusable` or `daemon_running`.
pub fn listen(socket: &Path) -> Result<Listening, ApiError> {
    if let Some(listener) = inherited()? {
        return Ok(Listening { listener, inherited: true });
    }
    if let Some(directory) = socket.parent() {
        private_directory(directory)?;
    }
    Ok(Listening { listener: bind(socket)?, inherited: false })
}

/// The socket that systemd passed, if it did.
///
/// # Errors
/// `home_unusable` for something else than a listening Unix socket.
pub fn inherited() -> Result<Option<StdUnixListener>, ApiError> {
    listenfd::ListenFd::from_env()
        .take_unix_listener(0)
        .map_err(|error| ApiError::new(ErrorCode::HomeUnusable, format!("the socket that was passed: {error}")))
}

/// A socket of our own, 0600, in a directory that is there.
///
/// # Errors
/// `home_unusable` or `daemon_running`.
pub fn bind(socket: &Path) -> Result<StdUnixListener, ApiError> {
    let refuse = |why: String| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {why}", socket.display()));
    if socket.as_os_str().len() > SOCKET_PATH_LEN_MAX {
        return Err(refuse(format!("is longer than a socket's path can be ({SOCKET_PATH_LEN_MAX} bytes)")));
    }
    match StdUnixStream::connect(socket) {
        Ok(_) => {
            return Err(ApiError::new(
                ErrorCode::DaemonRunning,
                format!("another msbd answers at {}", socket.display()),
            ));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        // A socket that nobody answers was left by a daemon that was killed.
        Err(_) => std::fs::remove_file(socket).map_err(|error| refuse(error.to_string()))?,
    }
    // Bound under another name and renamed, so that nobody ever connects before the mode is right.
    let temporary = socket.with_extension(format!("{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let listener = StdUnixListener::bind(&temporary).map_err(|error| refuse(error.to_string()))?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| refuse(error.to_string()))?;
    std::fs::rename(&temporary, socket).map_err(|error| refuse(error.to_string()))?;
    Ok(listener)
}

/// Where connections come from: the socket, and the door of a host with several users if the service stands behind one.
#[derive(Debug)]
pub struct Doors {
    listener: UnixListener,
    handed_over: Option<mpsc::Receiver<UnixStream>>,
}

impl Listener for Doors {
    type Io = UnixStream;
    type Addr = ();

    async fn accept(&mut self) -> (UnixStream, ()) {
        loop {
            let handed_over = async {
                match &mut self.handed_over {
                    Some(queue) => queue.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => return (stream, ()),
                    Err(error) => {
                        // Out of descriptors, most likely: they come back.
                        tracing::warn!(%error, "a connection could not be taken");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                stream = handed_over => match stream {
                    Some(stream) => return (stream, ()),
                    None => self.handed_over = None,
                },
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Serves until the future is dropped.
///
/// # Errors
/// The socket cannot be used.
pub async fn serve(
    listener: StdUnixListener,
    handed_over: Option<mpsc::Receiver<UnixStream>>,
    router: Router,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let doors = Doors { listener: UnixListener::from_std(listener)?, handed_over };
    axum::serve(doors, router.into_make_service_with_connect_info::<Peer>()).await
}
