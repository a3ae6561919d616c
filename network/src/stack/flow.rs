//! Flows of datagrams: what the guest sends to one peer from one port (UDP) or with one identifier (ICMP echo), and what a peer sends
//! to a published UDP port. Each flow has its own connected socket on the host, so that nobody but the peer can answer, or shares the
//! published port's. A flow ends when nothing came or went for a while; a full table gives up the flow that was idle longest.

use std::net::SocketAddr;
use std::time::Duration;

use super::host::SocketId;

/// Time after which an idle UDP flow ends (RFC 4787, section 4.3, asks two minutes of a NAT that others share; here one guest has its
/// own table, and one minute is what published ports are documented to have).
pub const UDP_IDLE: Duration = Duration::from_secs(60);
/// Time after which an idle ICMP flow ends.
pub const PING_IDLE: Duration = Duration::from_secs(20);
/// Time between two looks for idle flows.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// ICMP flows at once.
pub const PINGS_COUNT_MAX: usize = 64;
/// Datagrams that one flow may give to the guest in one turn.
pub(super) const DATAGRAMS_PER_TURN: usize = 32;

/// Which flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FlowKey {
    pub(super) kind: FlowKind,
    /// The guest's port, or its ICMP identifier.
    pub(super) guest_port: u16,
    /// The other end as the guest sees it; port 0 for ICMP.
    pub(super) peer: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum FlowKind {
    Udp,
    Ping,
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) end: FlowEnd,
    pub(super) used: Duration,
    pub(super) readable: bool,
    pub(super) queued: bool,
}

/// The host's side of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowEnd {
    /// Its own socket.
    Own(SocketId),
    /// A peer of a published port.
    Published { listener: usize, peer: SocketAddr },
}

impl Flow {
    pub(super) fn idle_at(&self, key: &FlowKey) -> Duration {
        self.used + if key.kind == FlowKind::Udp { UDP_IDLE } else { PING_IDLE }
    }
}
