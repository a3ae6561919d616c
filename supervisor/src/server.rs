//! The control socket: inherited from systemd or bound here, 0600, served until somebody ends the daemon.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;

use axum::Router;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::SOCKET_PATH_LEN_MAX;
use tokio::net::UnixListener;

use crate::home::private_directory;
use crate::peer::Peer;

/// The listening socket: systemd's if it passed one, else one of our own. The home's lock is held, so nobody else serves this path.
///
/// # Errors
/// `home_unusable` or `daemon_running`.
pub fn listen(socket: &Path) -> Result<StdUnixListener, ApiError> {
    let refuse = |why: String| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {why}", socket.display()));
    let mut passed = listenfd::ListenFd::from_env();
    if let Some(listener) = passed.take_unix_listener(0).map_err(|error| refuse(error.to_string()))? {
        return Ok(listener);
    }
    if socket.as_os_str().len() > SOCKET_PATH_LEN_MAX {
        return Err(refuse(format!("is longer than a socket's path can be ({SOCKET_PATH_LEN_MAX} bytes)")));
    }
    if let Some(directory) = socket.parent() {
        private_directory(directory)?;
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

/// Serves until the future is dropped.
///
/// # Errors
/// The socket cannot be used.
pub async fn serve(listener: StdUnixListener, router: Router) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
}
