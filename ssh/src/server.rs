//! One SSH server of one sandbox. The caller accepts connections, or gives a pipe, and hands each to [`Server::serve`].

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::connection::{Connection, ConnectionError};
use crate::intake::Intake;
use crate::keys::{AuthorizedKeys, HostKey};
use crate::leash::Leashed;
use crate::rejections::Rejections;
use crate::target::Target;

/// Bytes a client may send on a channel before they are acknowledged.
const WINDOW_LEN: u32 = 1 << 20;
/// Messages of one channel that wait for its task, which takes them at once.
const CHANNEL_BUFFER: usize = 64;
/// Most attempts to authenticate on one connection.
const ATTEMPTS_MAX: usize = 16;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Time until a refused authentication is answered, the same for every cause.
    pub rejection_delay: Duration,
    /// A connection without a sign of life for this long is closed; a client that answers keepalives lives.
    pub keepalive_interval: Duration,
    /// Time to log in.
    pub login_limit: Duration,
    /// Most channels on one connection.
    pub channels_max: usize,
    /// Most connections.
    pub connections_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            rejection_delay: Duration::from_millis(100),
            keepalive_interval: Duration::from_secs(60),
            login_limit: Duration::from_secs(60),
            channels_max: 1024,
            connections_max: 512,
        }
    }
}

/// A server; cheap to clone.
pub struct Server<T> {
    config: Arc<russh::server::Config>,
    target: Arc<T>,
    options: ServerOptions,
    rejections: Arc<Mutex<Rejections>>,
    connections: Arc<AtomicUsize>,
    /// Connections end when this becomes true, or when every copy of the server is dropped.
    closed: Arc<watch::Sender<bool>>,
}

impl<T> Clone for Server<T> {
    fn clone(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            target: Arc::clone(&self.target),
            options: self.options.clone(),
            rejections: Arc::clone(&self.rejections),
            connections: Arc::clone(&self.connections),
            closed: Arc::clone(&self.closed),
        }
    }
}

impl<T> std::fmt::Debug for Server<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("connections", &self.connections).finish_non_exhaustive()
    }
}

struct Connected(Arc<AtomicUsize>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T: Target> Server<T> {
    /// A server in front of a target.
    pub fn new(host_key: &HostKey, target: Arc<T>, options: &ServerOptions) -> Self {
        // Compression has been a way to exhaust a server's memory; nothing here needs it.
        let preferred =
            russh::Preferred { compression: Cow::Borrowed(&[russh::compression::NONE]), ..russh::Preferred::default() };
        let config = russh::server::Config {
            server_id: russh::SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-msb_", env!("CARGO_PKG_VERSION")))),
            methods: (&[russh::MethodKind::PublicKey][..]).into(),
            auth_rejection_time: options.rejection_delay,
            // The first attempt of every client is `none`, to learn the methods; it is no guess.
            auth_rejection_time_initial: Some(Duration::ZERO),
            keys: vec![host_key.private()],
            window_size: WINDOW_LEN,
            channel_buffer_size: CHANNEL_BUFFER,
            preferred,
            max_auth_attempts: ATTEMPTS_MAX,
            inactivity_timeout: None,
            keepalive_interval: Some(options.keepalive_interval),
            keepalive_max: 3,
            nodelay: true,
            ..Default::default()
        };
        Self {
            config: Arc::new(config),
            target,
            options: options.clone(),
            rejections: Arc::default(),
            connections: Arc::default(),
            closed: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Ends every connection, and those to come.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// Serves one connection to its end. `keys` are those that may log in on it, `peer` is who it is in the log.
    ///
    /// # Errors
    /// What ended it, if that was not the client.
    pub async fn serve<S>(&self, stream: S, keys: AuthorizedKeys, peer: &str) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let taken = self.connections.fetch_add(1, Ordering::AcqRel);
        let _connected = Connected(Arc::clone(&self.connections));
        if taken >= self.options.connections_max {
            return Err(ConnectionError::TooMany(taken));
        }
        let logged_in = Arc::new(AtomicBool::new(false));
        let connection = Connection {
            target: Arc::clone(&self.target),
            keys,
            intake: Intake::new(self.options.channels_max),
            rejections: Arc::clone(&self.rejections),
            logged_in: Arc::clone(&logged_in),
            peer: peer.into(),
            user: String::new(),
        };
        let (mut closed, limit) = (self.closed.subscribe(), self.options.login_limit);
        let end = async move {
            let late = async {
                tokio::time::sleep(limit).await;
                if logged_in.load(Ordering::Acquire) {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = late => {}
                // Closed, or nobody is left who could close it.
                _ = closed.wait_for(|closed| *closed) => {}
            }
        };
        let starting = russh::server::run_stream(Arc::clone(&self.config), Leashed::new(stream, end), connection);
        let running = tokio::time::timeout(limit, starting).await.map_err(|_| ConnectionError::Silent)??;
        running.await
    }
}
