//! One SSH server of one sandbox. The caller accepts connections, or gives a pipe, and hands each to [`Server::serve`].

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::connection::Connection;
use crate::keys::{AuthorizedKeys, HostKey};
use crate::target::Target;

/// Bytes a client may send on a channel before the process has read them.
const WINDOW_LEN: u32 = 256 << 10;
/// Messages of one channel that wait for its task. With full packets this is the window, so one slow process never fills memory.
const CHANNEL_BUFFER: usize = 16;
/// Most attempts to authenticate on one connection.
const ATTEMPTS_MAX: usize = 6;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Time until a refused authentication is answered, the same for every cause.
    pub rejection_delay: Duration,
    /// A connection without a sign of life for this long is closed; a client that answers keepalives lives.
    pub keepalive_interval: Duration,
    /// Most channels on one connection.
    pub channels_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            rejection_delay: Duration::from_secs(1),
            keepalive_interval: Duration::from_secs(60),
            channels_max: 1024,
        }
    }
}

/// A server; cheap to clone.
pub struct Server<T> {
    config: Arc<russh::server::Config>,
    target: Arc<T>,
    keys: Arc<AuthorizedKeys>,
    channels_max: usize,
}

impl<T> Clone for Server<T> {
    fn clone(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            target: Arc::clone(&self.target),
            keys: Arc::clone(&self.keys),
            channels_max: self.channels_max,
        }
    }
}

impl<T: Target> Server<T> {
    /// A server in front of a target.
    pub fn new(host_key: &HostKey, keys: AuthorizedKeys, target: Arc<T>, options: &ServerOptions) -> Self {
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
        Self { config: Arc::new(config), target, keys: Arc::new(keys), channels_max: options.channels_max }
    }

    /// Serves one connection to its end.
    ///
    /// # Errors
    /// What ended it, if that was not the client.
    pub async fn serve<S>(&self, stream: S, peer: &str) -> Result<(), russh::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let connection = Connection::new(Arc::clone(&self.target), Arc::clone(&self.keys), self.channels_max, peer);
        russh::server::run_stream(Arc::clone(&self.config), stream, connection).await?.await
    }
}
