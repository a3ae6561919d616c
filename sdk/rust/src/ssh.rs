//! SSH to a sandbox as bytes: a connection through the service to the sandbox's own SSH server, how a client recognises it, and who
//! may log in. What speaks SSH on the bytes is the caller's business. [`SshConfig`] is for those whose client is `ssh`.

use std::io::Cursor;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use msb_protocol::control::{AuthorizeRequest, Authorized, AuthorizedKeys, SSH_UPGRADE, SshHost, SshQuery};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::paths::Surroundings;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Chain, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::client::{Client, sandbox, with_query};
use crate::connection;
use crate::error::Error;
use crate::locate::Locator;

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

/// What `ssh` needs: a block for `ssh_config`, in which `msb` is the proxy and tells the host key, and the key by itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SshConfig {
    /// Name of the host in the block.
    pub alias: String,
    /// The block.
    pub config: String,
    /// The host key as a line of `known_hosts`.
    pub known_hosts: String,
    /// What it was made of.
    #[serde(flatten)]
    pub host: SshHost,
}

impl SshConfig {
    /// The block for a host, under this alias or `msb-NAME`; `program` is `msb`, which gets the home and socket of `surroundings`.
    ///
    /// # Errors
    /// `invalid_config` for an alias that is no name of a host.
    pub fn new(host: SshHost, alias: Option<&str>, program: &Path, surroundings: &Surroundings) -> Result<Self, Error> {
        let alias = alias.map_or_else(|| format!("msb-{}", host.sandbox), str::to_owned);
        if alias.is_empty() || !alias.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
            let message = format!("{alias:?} is no name of a host");
            return Err(Error::InvalidConfig(ApiError::new(ErrorCode::InvalidConfig, message)));
        }
        let environment: Vec<(&str, &Path)> =
            [("MSB_HOME", &surroundings.msb_home), ("MSB_HOST", &surroundings.msb_host)]
                .into_iter()
                .filter_map(|(name, value)| Some((name, value.as_deref()?)))
                .collect();
        let config = block(&alias, &host, program, &environment);
        Ok(Self { known_hosts: format!("{alias} {}", host.host_key), alias, config, host })
    }
}

impl Client {
    /// What makes `ssh ALIAS` reach a sandbox; without an alias `msb-NAME`.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_config` for an alias that is no name of a host.
    pub async fn ssh_config(&self, name: &SandboxName, alias: Option<&str>) -> Result<SshConfig, Error> {
        let host = self.ssh_host(name).await?;
        let locator = self.locator().cloned().unwrap_or_else(Locator::from_environment);
        SshConfig::new(host, alias, &locator.command_program(), &locator.surroundings)
    }

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

/// The block. `KnownHostsCommand` gives the host key, so that nothing has to be written anywhere and a sandbox that was made anew is
/// known at once.
fn block(alias: &str, host: &SshHost, program: &Path, environment: &[(&str, &Path)]) -> String {
    let mut words = Vec::new();
    if !environment.is_empty() {
        words.push("/usr/bin/env".to_owned());
        words.extend(environment.iter().map(|(name, value)| quoted(&format!("{name}={}", value.display()))));
    }
    words.push(quoted(&program.display().to_string()));
    let command = words.join(" ");
    format!(
        "# {alias} {host_key}\nHost {alias}\n    HostName {alias}\n    User {user}\n    ProxyCommand {command} ssh serve --stdio {sandbox}\n    \
         KnownHostsCommand {command} ssh config --known-hosts --alias {alias} {sandbox}\n    StrictHostKeyChecking yes\n    \
         UserKnownHostsFile none\n    HostKeyAlgorithms ssh-ed25519\n",
        host_key = host.host_key,
        user = host.user,
        sandbox = host.sandbox,
    )
}

/// A word for the shell that runs a ProxyCommand and for the splitting of a KnownHostsCommand; `%` begins their own sequences.
fn quoted(word: &str) -> String {
    let word = word.replace('%', "%%");
    if word.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-=:%+@".contains(&b)) {
        return word;
    }
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$").replace('`', "\\`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_what_ssh_reads() {
        let host = SshHost {
            sandbox: "box".parse().unwrap(),
            user: "app".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            fingerprint: "SHA256:x".into(),
        };
        let expected = "\
# msb-box ssh-ed25519 AAAA
Host msb-box
    HostName msb-box
    User app
    ProxyCommand /usr/bin/msb ssh serve --stdio box
    KnownHostsCommand /usr/bin/msb ssh config --known-hosts --alias msb-box box
    StrictHostKeyChecking yes
    UserKnownHostsFile none
    HostKeyAlgorithms ssh-ed25519
";
        assert_eq!(block("msb-box", &host, Path::new("/usr/bin/msb"), &[]), expected);
        let odd = block("b", &host, Path::new("/a b/msb"), &[("MSB_HOME", Path::new("/100%/$x"))]);
        assert!(odd.contains("ProxyCommand /usr/bin/env \"MSB_HOME=/100%%/\\$x\" \"/a b/msb\" ssh serve"), "{odd}");
    }
}
