//! One sandbox's SSH forwarder: its host key and its server. Owned by the sandbox's actor, made when the first client comes; a
//! connection's bytes run beside the actor. It ends with the sandbox; a new incarnation of the actor makes a new one with the same
//! key, and connections of the old one go on.
//!
//! ```text
//!  API ── OpenSsh ──► SandboxActor ──► SshForwarder ──► msb_ssh::Server ──► target.rs ──► streams to the agent
//! ```

mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_protocol::control::AuthorizedKey;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_ssh::{AuthorizedKeys, ConnectionError, HostKey, KeyError, Server, ServerOptions};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::daemon::Daemon;
use target::SandboxTarget;

/// File of the host key below the sandbox's directory.
const HOST_KEY: &str = "ssh/host_ed25519";

/// A sandbox's front door.
#[derive(Debug)]
pub struct SshForwarder {
    server: Server<SandboxTarget>,
    host_key: HostKey,
    authorized_keys: PathBuf,
}

impl SshForwarder {
    /// Reads or makes the host key. Blocking.
    ///
    /// # Errors
    /// `disk_full`, `permission_denied` or `home_unusable`, naming the file.
    pub fn open(
        root: &Path,
        authorized_keys: PathBuf,
        daemon: Daemon,
        name: SandboxName,
        id: SandboxId,
    ) -> Result<Self, ApiError> {
        let path = root.join(HOST_KEY);
        if let Some(directory) = path.parent() {
            super::directories::make_private(directory)
                .map_err(|error| super::directories::file_error(directory, &error))?;
        }
        let host_key = HostKey::load_or_create(&path).map_err(|error| key_error(&error))?;
        let target = Arc::new(SandboxTarget::new(daemon, name, id));
        let server = Server::new(&host_key, target, &ServerOptions::default());
        Ok(Self { server, host_key, authorized_keys })
    }

    /// The public half of the host key, and its fingerprint.
    #[must_use]
    pub fn host_key(&self) -> (String, String) {
        (self.host_key.public_line(), self.host_key.fingerprint())
    }

    /// The keys that may log in now, and `guest`, a key for one connection that was handed over by somebody who may do more.
    ///
    /// # Errors
    /// `invalid_config` naming the line, `permission_denied` if others can write the file.
    pub async fn keys(&self, guest: Option<&str>) -> Result<AuthorizedKeys, ApiError> {
        if let Some(text) = guest {
            return AuthorizedKeys::parse(text).map_err(|error| key_error(&error));
        }
        load_keys(self.authorized_keys.clone()).await
    }

    /// Serves one connection to its end.
    pub async fn serve<S>(&self, stream: S, keys: AuthorizedKeys, peer: &str)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.server.serve(stream, keys, peer).await {
            Ok(()) => {}
            Err(error @ (ConnectionError::TooMany(_) | ConnectionError::Overrun(_))) => {
                tracing::warn!(peer, %error, "an ssh connection was ended");
            }
            // Clients hang up in many ways; none of them is news.
            Err(error) => tracing::debug!(peer, %error, "an ssh connection ended"),
        }
    }

    /// Ends every connection.
    pub fn close(&self) {
        self.server.close();
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.server.connections()
    }
}

/// The keys of a home.
///
/// # Errors
/// As [`SshForwarder::keys`].
pub async fn load_keys(path: PathBuf) -> Result<AuthorizedKeys, ApiError> {
    let loading = tokio::task::spawn_blocking(move || AuthorizedKeys::load(&path));
    loading.await.map_err(ApiError::internal)?.map_err(|error| key_error(&error))
}

/// Adds keys to those of a home; gives back the new ones and how many there are now.
///
/// # Errors
/// `invalid_config` naming the line; nothing is added then.
pub async fn authorize(path: PathBuf, text: String) -> Result<(Vec<AuthorizedKey>, usize), ApiError> {
    // One writer at a time; a file that is read meanwhile is the old or the new one.
    static WRITER: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let adding = tokio::task::spawn_blocking(move || {
        let more = AuthorizedKeys::parse(&text)?;
        let _writer = WRITER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let added = AuthorizedKeys::add(&path, &more)?;
        Ok((more.is_empty(), summaries(&added), AuthorizedKeys::load(&path)?.len()))
    });
    let (none, added, count) =
        adding.await.map_err(ApiError::internal)?.map_err(|error: KeyError| key_error(&error))?;
    if none {
        return Err(ApiError::new(ErrorCode::InvalidConfig, "there is no key in what was given"));
    }
    Ok((added, count))
}

/// Keys as the API shows them.
#[must_use]
pub fn summaries(keys: &AuthorizedKeys) -> Vec<AuthorizedKey> {
    let shown = |key: msb_ssh::keys::KeySummary| AuthorizedKey {
        algorithm: key.algorithm,
        fingerprint: key.fingerprint,
        comment: key.comment,
    };
    keys.summaries().into_iter().map(shown).collect()
}

fn key_error(error: &KeyError) -> ApiError {
    match error {
        KeyError::File { path, source } => super::directories::file_error(path, source),
        KeyError::Open { .. } => ApiError::new(ErrorCode::PermissionDenied, error.to_string()),
        KeyError::Random(_) => ApiError::internal(error),
        KeyError::Malformed { .. } | KeyError::Line { .. } | KeyError::TooMany => {
            ApiError::new(ErrorCode::InvalidConfig, error.to_string())
                .with_hint("a key is one line, as in a .pub file of ssh-keygen: ed25519 or ecdsa, without options")
        }
    }
}
