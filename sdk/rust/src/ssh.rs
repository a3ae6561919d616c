//! SSH to a sandbox as bytes: a connection through the service to the sandbox's own SSH server, how a client recognises it, and who
//! may log in. What speaks SSH on the bytes is the caller's business.

use std::io::Cursor;
use std::pin::Pin;
use std::task::{Context, Poll};

use msb_protocol::control::{AuthorizeRequest, Authorized, AuthorizedKeys, SSH_UPGRADE, SshHost, SshQuery};
use msb_protocol::id::SandboxName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Chain, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::client::{Client, sandbox, with_query};
use crate::connection;
use crate::error::Error;

/// The bytes of one SSH connection.
pub struct SshStream {
    read: Chain<Cursor<Vec<u8>>, OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl SshStream {
    fn new(stream: UnixStream, early: Vec<u8>) -> Self {
        let (read, write) = stream.into_split();
        Self { read: Cursor::new(early).chain(read), write }
    }
}

impl AsyncRead for SshStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for SshStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}

impl Client {
    /// A connection to the sandbox's SSH server. `peer` is who it is in the service's log. With `key`, only that key may log in on it;
    /// without, the authorized ones.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_config` for a key that is none.
    pub async fn ssh(&self, name: &SandboxName, about: &SshQuery) -> Result<SshStream, Error> {
        let mut pairs = Vec::new();
        pairs.extend(about.peer.clone().map(|peer| ("peer", peer)));
        pairs.extend(about.key.clone().map(|key| ("key", key)));
        let path = with_query(&sandbox(name, "/ssh"), &pairs);
        let (stream, early) = connection::upgrade_bytes(self.fresh().await?, &path, SSH_UPGRADE).await?;
        Ok(SshStream::new(stream, early))
    }

    /// How an SSH client finds the sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, or why its host key cannot be used.
    pub async fn ssh_host(&self, name: &SandboxName) -> Result<SshHost, Error> {
        self.get(&sandbox(name, "/ssh/host")).await
    }

    /// The keys that may log in to every sandbox.
    ///
    /// # Errors
    /// `invalid_config` naming the line, `permission_denied`.
    pub async fn authorized_keys(&self) -> Result<AuthorizedKeys, Error> {
        self.get("/v1/ssh/authorized-keys").await
    }

    /// Lets keys log in to every sandbox: public keys, one a line.
    ///
    /// # Errors
    /// `invalid_config` naming the line; nothing is added then.
    pub async fn authorize(&self, keys: &str) -> Result<Authorized, Error> {
        self.post("/v1/ssh/authorized-keys", &AuthorizeRequest { keys: keys.to_owned() }).await
    }
}
