//! One connection: who may come in, and which channels are opened. What is not opened here is refused: passwords,
//! keyboard-interactive, X11 and agents by the library's defaults, `-R` and stream-local forwarding with their own replies.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use russh::keys::PublicKey;
use russh::keys::ssh_key::HashAlg;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};

use crate::intake::{Intake, Overrun};
use crate::keys::AuthorizedKeys;
use crate::rejections::Rejections;
use crate::target::Target;
use crate::{forward, session};

/// Why a connection ends early.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The protocol or the stream.
    #[error(transparent)]
    Protocol(#[from] russh::Error),
    /// It sends what nobody takes.
    #[error(transparent)]
    Overrun(#[from] Overrun),
    /// There are too many already.
    #[error("there are {0} connections already")]
    TooMany(usize),
    /// It did not begin to speak in time.
    #[error("nothing was said in time")]
    Silent,
}

/// The state of one connection.
pub(crate) struct Connection<T> {
    pub(crate) target: Arc<T>,
    pub(crate) keys: AuthorizedKeys,
    pub(crate) intake: Arc<Intake>,
    pub(crate) rejections: Arc<Mutex<Rejections>>,
    /// Set once somebody has logged in.
    pub(crate) logged_in: Arc<AtomicBool>,
    pub(crate) peer: String,
    pub(crate) user: String,
}

impl<T: Target> Connection<T> {
    /// Holds a refusal back as long as it deserves, and logs it if that is worth a line.
    async fn reject(&self, user: &str, key: &PublicKey) -> Auth {
        let verdict = self.rejections.lock().unwrap_or_else(PoisonError::into_inner).count(Instant::now());
        if let Some(unlogged) = verdict.log {
            let (user, fingerprint): (String, _) = (user.chars().take(64).collect(), key.fingerprint(HashAlg::Sha256));
            tracing::warn!(peer = self.peer, user, %fingerprint, unlogged, "an ssh key is not authorized");
        }
        tokio::time::sleep(verdict.delay).await;
        Auth::reject()
    }
}

impl<T: Target> Handler for Connection<T> {
    type Error = ConnectionError;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(if self.keys.holds(offer.public_key) { Auth::Accept } else { self.reject(user, offer.public_key).await })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        if !self.keys.holds(key.public_key) {
            return Ok(self.reject(user, key.public_key).await);
        }
        let fingerprint = key.public_key.fingerprint(HashAlg::Sha256);
        tracing::info!(peer = self.peer, user, %fingerprint, "logged in by ssh");
        self.user = user.into();
        self.logged_in.store(true, Ordering::Release);
        self.target.logged_in();
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match self.intake.open() {
            Some(slot) => {
                reply.accept().await;
                let (target, user, handle) = (Arc::clone(&self.target), self.user.clone(), session.handle());
                tokio::spawn(async move { session::run(channel, handle, &*target, &slot, user).await });
            }
            None => reply.reject(ChannelOpenFailure::ResourceShortage).await,
        }
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        match (self.intake.open(), u16::try_from(port)) {
            (None, _) => reply.reject(ChannelOpenFailure::ResourceShortage).await,
            (Some(slot), Ok(port)) if !host.is_empty() && host.len() <= 255 && port != 0 => {
                let (target, host) = (Arc::clone(&self.target), host.to_owned());
                // Beside the connection: the target may take its time, other channels go on.
                tokio::spawn(async move { forward::run(channel, reply, &*target, &slot, &host, port).await });
            }
            (Some(_), _) => {
                let host: String = host.chars().take(64).collect();
                let reason = format!("{host:?} port {port} is no address");
                reply.reject(ChannelOpenFailure::Other { code: 2, reason }).await;
            }
        }
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<Msg>,
        _socket_path: &str,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let reason = "forwarding of Unix sockets is not offered".to_owned();
        reply.reject(ChannelOpenFailure::Other { code: 1, reason }).await;
        Ok(())
    }

    // The next three are answered here and not by the channel's task: the library remembers only whether the newest request wants an
    // answer, and OpenSSH sends the command right behind them, so a late "no" to a variable would be taken for one to the command.

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _pixel_width: u32,
        _pixel_height: u32,
        _modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        Ok(session.channel_success(channel)?)
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let accepted = session::accepts_env(name, value);
        if accepted {
            session.channel_success(channel)?
        } else {
            session.channel_failure(channel)?
        };
        Ok(())
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single_connection: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        Ok(session.channel_failure(channel)?)
    }

    async fn data(&mut self, _: ChannelId, _: &[u8], _: &mut Session) -> Result<(), Self::Error> {
        Ok(self.intake.pace().await?)
    }
}
