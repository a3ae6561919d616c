//! The client of `msb ssh`: one command or shell over a stream that is known to end at the sandbox's own server. It logs in with a key
//! that is made for this one connection and accepts exactly the host key it was told. Called by the CLI; it never touches a terminal.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use russh::client::{self, Handle, Msg};
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::signal;
use crate::target::Terminal;

/// Bytes a server may send before they are taken.
const WINDOW_LEN: u32 = 2 << 20;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The protocol or the stream.
    #[error("the SSH connection failed: {0}")]
    Protocol(#[from] russh::Error),
    /// The server is not who it should be.
    #[error("the server's host key is not the sandbox's")]
    HostKey,
    /// The server does not let the key in.
    #[error("the sandbox's SSH server refused the login")]
    Refused,
    /// No key could be made.
    #[error("no key could be made: {0}")]
    Key(String),
}

/// A key for one connection; it is never written anywhere.
pub struct OneTimeKey(PrivateKey);

impl OneTimeKey {
    /// Makes one.
    ///
    /// # Errors
    /// [`ClientError::Key`] without random numbers.
    pub fn generate() -> Result<Self, ClientError> {
        let seed = crate::keys::random_seed().map_err(|error| ClientError::Key(error.to_string()))?;
        let keypair = KeypairData::from(Ed25519Keypair::from_seed(&seed));
        PrivateKey::new(keypair, "").map(Self).map_err(|error| ClientError::Key(error.to_string()))
    }

    /// The public half as in `authorized_keys`.
    #[must_use]
    pub fn public_line(&self) -> String {
        self.0.public_key().to_openssh().unwrap_or_default().trim().to_owned()
    }
}

struct Expected {
    host_key: String,
}

impl client::Handler for Expected {
    type Error = ClientError;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        match offered {
            PublicKeyOrCertificate::PublicKey { key, .. } => {
                let mut key = key.clone();
                key.set_comment("");
                let line = key.to_openssh().unwrap_or_default();
                if line.trim() == self.host_key { Ok(true) } else { Err(ClientError::HostKey) }
            }
            PublicKeyOrCertificate::Certificate(_) => Err(ClientError::HostKey),
        }
    }
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// A command line; none: the login shell.
    pub line: Option<String>,
    /// A terminal.
    pub terminal: Option<Terminal>,
    /// Variables; the server takes those it accepts.
    pub env: Vec<(String, String)>,
}

/// What comes from the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Standard output, or all a terminal shows.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// It exited with this code.
    Exited(u32),
    /// This signal killed it.
    Signalled(i32),
}

/// A running command: what it says.
pub struct Ear {
    channel: ChannelReadHalf,
    _connection: Handle<Expected>,
}

/// A running command: what it is told.
pub struct Mouth {
    channel: ChannelWriteHalf<Msg>,
}

/// Logs in and starts the command.
///
/// # Errors
/// [`ClientError`].
pub async fn start<S>(
    stream: S,
    host_key: &str,
    key: OneTimeKey,
    user: &str,
    request: Request,
) -> Result<(Ear, Mouth), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let preferred =
        russh::Preferred { compression: Cow::Borrowed(&[russh::compression::NONE]), ..russh::Preferred::default() };
    let config = client::Config { window_size: WINDOW_LEN, preferred, nodelay: true, ..client::Config::default() };
    let expected = Expected { host_key: host_key.to_owned() };
    let mut connection = client::connect_stream(Arc::new(config), stream, expected).await?;
    let key = PrivateKeyWithHashAlg::new(Arc::new(key.0), None);
    if !connection.authenticate_publickey(user, key).await?.success() {
        return Err(ClientError::Refused);
    }
    let channel = connection.channel_open_session().await?;
    for (name, value) in &request.env {
        channel.set_env(false, name.as_str(), value.as_str()).await?;
    }
    if let Some(terminal) = &request.terminal {
        let (columns, rows) = (u32::from(terminal.columns), u32::from(terminal.rows));
        channel.request_pty(false, &terminal.term, columns, rows, 0, 0, &[]).await?;
    }
    match request.line {
        Some(line) => channel.exec(true, line).await?,
        None => channel.request_shell(true).await?,
    }
    let (read, write) = channel.split();
    Ok((Ear { channel: read, _connection: connection }, Mouth { channel: write }))
}

impl Ear {
    /// What it says next; `None` when the connection is over.
    pub async fn next(&mut self) -> Option<Heard> {
        loop {
            return Some(match self.channel.wait().await? {
                ChannelMsg::Data { data } => Heard::Stdout(data),
                ChannelMsg::ExtendedData { data, ext: 1 } => Heard::Stderr(data),
                ChannelMsg::ExitStatus { exit_status } => Heard::Exited(exit_status),
                ChannelMsg::ExitSignal { signal_name, .. } => {
                    Heard::Signalled(signal::number_of_death(&signal_name).unwrap_or(9))
                }
                ChannelMsg::Failure => return None,
                _ => continue,
            });
        }
    }
}

impl Mouth {
    /// Writes to standard input, waiting while it is not read.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn write(&self, data: Bytes) -> Result<(), ClientError> {
        Ok(self.channel.data_bytes(data).await?)
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn finish(&self) -> Result<(), ClientError> {
        Ok(self.channel.eof().await?)
    }

    /// Tells the terminal's size.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<(), ClientError> {
        Ok(self.channel.window_change(u32::from(columns), u32::from(rows), 0, 0).await?)
    }

    /// Sends a signal; one that the protocol has no name for is not sent.
    ///
    /// # Errors
    /// The connection is over.
    pub async fn signal(&self, number: i32) -> Result<(), ClientError> {
        match signal::name(number) {
            Sig::Custom(name) if name.ends_with("@msb") => Ok(()),
            name => Ok(self.channel.signal(name).await?),
        }
    }
}
