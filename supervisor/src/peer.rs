//! Who is at the other end of a connection: uid, pid, and a pidfd that holds on to that very process.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use msb_actors::daemon::Creator;
use msb_actors::identity::ProcessIdentity;
use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::UnixStream;

use crate::server::Doors;

/// The process that connected.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its process id as seen from here; 0 if it is in a pid namespace that we cannot see.
    pub pid: u32,
    pidfd: Option<Arc<OwnedFd>>,
}

impl Peer {
    /// Asks the kernel.
    #[must_use]
    pub fn of(stream: &UnixStream) -> Self {
        // A peer whose credentials cannot be read is nobody: no uid is this one.
        let (uid, pid) = stream.peer_cred().map_or((u32::MAX, 0), |peer| {
            (peer.uid(), peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
        });
        // SO_PEERPIDFD (Linux 6.5) names the process that connected even if it is gone and its pid was given away; without it the
        // start time is looked at twice.
        let pidfd = getsockopt(stream, sockopt::PeerPidfd)
            .ok()
            .or_else(|| (pid != 0).then(|| ProcessIdentity::of(pid).ok()?.open()).flatten());
        Self { uid, pid, pidfd: pidfd.map(Arc::new) }
    }

    /// The peer as the creator of an attached sandbox; `None` if it cannot be watched from here.
    #[must_use]
    pub fn creator(&self) -> Option<Creator> {
        if self.pid == 0 {
            return None;
        }
        let pidfd = self.pidfd.as_ref()?.try_clone().ok()?;
        // A creator that has died meanwhile has an identity that nobody has: the watch on its pidfd ends at once.
        let identity = ProcessIdentity::of(self.pid).unwrap_or(ProcessIdentity {
            pid: self.pid,
            start_ticks: 0,
            host_boot_id: String::new(),
        });
        Some(Creator { identity, pidfd })
    }
}

impl Connected<IncomingStream<'_, Doors>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Doors>) -> Self {
        Self::of(stream.io())
    }
}
