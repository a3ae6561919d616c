//! One connection: who may come in, and which channels are opened. Everything that is not overridden here is refused by the library's
//! defaults: passwords, keyboard-interactive, X11, agents, `-R`, stream-local forwarding.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use russh::keys::ssh_key::HashAlg;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelOpenFailure};

use crate::keys::AuthorizedKeys;
use crate::target::Target;
use crate::{forward, session};

/// The state of one connection.
pub(crate) struct Connection<T> {
    target: Arc<T>,
    keys: Arc<AuthorizedKeys>,
    channels: Arc<AtomicUsize>,
    channels_max: usize,
    peer: String,
    user: String,
}

/// Counts an open channel for as long as it lives.
pub(crate) struct ChannelSlot(Arc<AtomicUsize>);

impl Drop for ChannelSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<T: Target> Connection<T> {
    pub(crate) fn new(target: Arc<T>, keys: Arc<AuthorizedKeys>, channels_max: usize, peer: &str) -> Self {
        Self { target, keys, channels: Arc::default(), channels_max, peer: peer.into(), user: String::new() }
    }

    fn take_slot(&self) -> Option<ChannelSlot> {
        let taken = self.channels.fetch_add(1, Ordering::Relaxed);
        let slot = ChannelSlot(Arc::clone(&self.channels));
        (taken < self.channels_max).then_some(slot)
    }
}

impl<T: Target> Handler for Connection<T> {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(if self.keys.holds(offer.public_key) { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let fingerprint = key.public_key.fingerprint(HashAlg::Sha256);
        if self.keys.holds(key.public_key) {
            tracing::info!(peer = self.peer, user, %fingerprint, "logged in");
            self.user = user.into();
            Ok(Auth::Accept)
        } else {
            tracing::warn!(peer = self.peer, user, %fingerprint, "key is not authorized");
            Ok(Auth::reject())
        }
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match self.take_slot() {
            Some(slot) => {
                reply.accept().await;
                let (target, user, handle) = (Arc::clone(&self.target), self.user.clone(), session.handle());
                tokio::spawn(async move {
                    session::run(channel, handle, &*target, user).await;
                    drop(slot);
                });
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
        match (self.take_slot(), u16::try_from(port)) {
            (None, _) => reply.reject(ChannelOpenFailure::ResourceShortage).await,
            (Some(slot), Ok(port)) if !host.is_empty() && port != 0 => {
                let (target, host) = (Arc::clone(&self.target), host.to_owned());
                // Beside the connection: the target may take its time, other channels go on.
                tokio::spawn(async move {
                    forward::run(channel, reply, &*target, &host, port).await;
                    drop(slot);
                });
            }
            (Some(_), _) => {
                let reason = format!("{host:?} port {port} is no address");
                reply.reject(ChannelOpenFailure::Other { code: 2, reason }).await;
            }
        }
        Ok(())
    }
}
