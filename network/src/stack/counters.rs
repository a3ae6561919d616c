//! What the stack counts, under the names of `msb-metrics`. Read by `msb-vmm`'s sampler; never reset while the VM lives.

use std::collections::BTreeMap;

use msb_metrics::Metric;
use msb_protocol::network::{Direction, Transport};

use super::frame::DropReason;
use crate::dns::Outcome;

/// Why an allowed connection did not come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Failure {
    /// The other end refused it.
    Refused,
    /// No route, no neighbour.
    Unreachable,
    /// No answer in time.
    TimedOut,
    /// A table of the stack is full.
    Limit,
    /// The host has no descriptors, ports or permission left.
    HostLimit,
    /// It broke before it was made.
    Other,
}

impl Failure {
    /// The word of the metric's attribute.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Limit => "limit",
            Self::HostLimit => "host_limit",
            Self::Other => "other",
        }
    }
}

/// Counters of one stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames the guest sent.
    pub frames_sent: u64,
    /// Bytes of those frames.
    pub bytes_sent: u64,
    /// Frames the guest got.
    pub frames_received: u64,
    /// Bytes of those frames.
    pub bytes_received: u64,
    /// Frames that were dropped.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Connections and flows that were opened.
    pub opened: BTreeMap<(Way, Protocol), u64>,
    /// Connections that were allowed and did not come about.
    pub failed: BTreeMap<(Way, Failure), u64>,
    /// Connections and flows that policy denied.
    pub denied: BTreeMap<(Way, Protocol), u64>,
    /// DNS queries.
    pub names: BTreeMap<Outcome, u64>,
    /// Records that the decision log's rate limit left out.
    pub records_suppressed: u64,
    /// TCP connections open now.
    pub connections: u64,
    /// UDP and ICMP flows open now.
    pub flows: u64,
}

/// A direction that can be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// By the guest.
    Outbound,
    /// Through a published port.
    Inbound,
}

impl From<Direction> for Way {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Egress => Self::Outbound,
            Direction::Ingress => Self::Inbound,
        }
    }
}

impl Way {
    fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// A protocol as metrics tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP of either family.
    Icmp,
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
            Transport::Icmpv4 | Transport::Icmpv6 => Self::Icmp,
        }
    }
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

impl Counters {
    /// Counts a dropped frame.
    pub(super) fn drop_frame(&mut self, reason: DropReason) {
        *self.dropped.entry(reason).or_default() += 1;
    }

    /// Calls `take` with each metric, its attributes and its value.
    pub fn each(&self, mut take: impl FnMut(Metric, &[(&'static str, &'static str)], u64)) {
        use msb_metrics::{
            ATTRIBUTE_CONNECTION_DIRECTION as WAY, ATTRIBUTE_DNS_OUTCOME as OUTCOME,
            ATTRIBUTE_NETWORK_DIRECTION as DIRECTION, ATTRIBUTE_REASON as REASON, ATTRIBUTE_TRANSPORT as TRANSPORT,
        };
        take(Metric::NetworkIo, &[(DIRECTION, "transmit")], self.bytes_sent);
        take(Metric::NetworkIo, &[(DIRECTION, "receive")], self.bytes_received);
        take(Metric::NetworkPackets, &[(DIRECTION, "transmit")], self.frames_sent);
        take(Metric::NetworkPackets, &[(DIRECTION, "receive")], self.frames_received);
        take(Metric::NetworkConnections, &[(TRANSPORT, "tcp")], self.connections);
        take(Metric::NetworkConnections, &[(TRANSPORT, "udp")], self.flows);
        for (reason, count) in &self.dropped {
            take(Metric::NetworkDropped, &[(REASON, reason.as_str())], *count);
        }
        for ((way, transport), count) in &self.opened {
            take(Metric::NetworkConnectionsOpened, &[(WAY, way.as_str()), (TRANSPORT, transport.as_str())], *count);
        }
        for ((way, failure), count) in &self.failed {
            take(Metric::NetworkConnectionsFailed, &[(WAY, way.as_str()), (REASON, failure.as_str())], *count);
        }
        for ((way, transport), count) in &self.denied {
            take(Metric::NetworkDenied, &[(WAY, way.as_str()), (TRANSPORT, transport.as_str())], *count);
        }
        for (outcome, count) in &self.names {
            take(Metric::DnsQueries, &[(OUTCOME, outcome.as_str())], *count);
        }
        take(Metric::DecisionLogSuppressed, &[], self.records_suppressed);
    }
}
