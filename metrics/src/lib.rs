//! Every metric of msb, declared once: name, unit, kind, value type, attributes and meaning.
//!
//! `msb-vmm`, the daemon and the network count under these names, the exporter sends them, and the table of
//! `docs/observability.md` is [`markdown_table`]. The crate only describes: it holds no counters, reads no clock, depends on
//! nothing of the workspace, and never does I/O.
//!
//! Two families live side by side. The gauges of [`Family::Compatible`] have the names that existing dashboards of
//! microsandbox ask for; byte counts among them only grow, though their kind says gauge. The sums beside them carry a start
//! time, so that `rate()` works and a restart is a reset and not a dip.

#![forbid(unsafe_code)]

mod prometheus;

use serde::Serialize;

/// Attribute: direction of disk traffic, `read` or `write`.
pub const ATTRIBUTE_DISK_DIRECTION: &str = "disk.io.direction";
/// Attribute: direction of network traffic as the guest sees it, `receive` or `transmit`.
pub const ATTRIBUTE_NETWORK_DIRECTION: &str = "network.io.direction";
/// Attribute: who opened a connection, `outbound` (the guest) or `inbound` (through a published port).
pub const ATTRIBUTE_CONNECTION_DIRECTION: &str = "network.connection.direction";
/// Attribute: `tcp`, `udp` or `icmp`.
pub const ATTRIBUTE_TRANSPORT: &str = "network.transport";
/// Attribute: why, one of a closed list of words.
pub const ATTRIBUTE_REASON: &str = "reason";
/// Attribute: how a DNS query ended, one of a closed list of words.
pub const ATTRIBUTE_DNS_OUTCOME: &str = "dns.outcome";
/// Attribute: the state of a sandbox.
pub const ATTRIBUTE_STATE: &str = "sandbox.state";
/// Attribute: the name of a template.
pub const ATTRIBUTE_TEMPLATE: &str = "template.name";
/// Attribute: the phase of a boot.
pub const ATTRIBUTE_PHASE: &str = "boot.phase";

/// How values of a metric relate to each other in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The value now.
    Gauge,
    /// A monotonic sum since a start time, cumulative temporality.
    Counter,
}

/// The type of a metric's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueType {
    /// Whole numbers from 0.
    Unsigned,
    /// Fractions.
    Float,
}

/// The unit of a metric (UCUM, as OpenTelemetry writes it).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Unit {
    /// `1`: a ratio or a plain number.
    #[serde(rename = "1")]
    One,
    /// `By`.
    #[serde(rename = "By")]
    Bytes,
    /// `s`.
    #[serde(rename = "s")]
    Seconds,
    /// `{operation}`.
    #[serde(rename = "{operation}")]
    Operations,
    /// `{packet}`.
    #[serde(rename = "{packet}")]
    Packets,
    /// `{connection}`.
    #[serde(rename = "{connection}")]
    Connections,
    /// `{query}`.
    #[serde(rename = "{query}")]
    Queries,
    /// `{restart}`.
    #[serde(rename = "{restart}")]
    Restarts,
    /// `{sandbox}`.
    #[serde(rename = "{sandbox}")]
    Sandboxes,
    /// `{record}`.
    #[serde(rename = "{record}")]
    Records,
    /// `{fork}`.
    #[serde(rename = "{fork}")]
    Forks,
}

impl Unit {
    /// The unit as OpenTelemetry writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::One => "1",
            Self::Bytes => "By",
            Self::Seconds => "s",
            Self::Operations => "{operation}",
            Self::Packets => "{packet}",
            Self::Connections => "{connection}",
            Self::Queries => "{query}",
            Self::Restarts => "{restart}",
            Self::Sandboxes => "{sandbox}",
            Self::Records => "{record}",
            Self::Forks => "{fork}",
        }
    }
}

/// What a metric describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// One sandbox, under a name that dashboards of microsandbox know.
    Compatible,
    /// One sandbox.
    Sandbox,
    /// The daemon.
    Daemon,
    /// The exporter itself.
    Collector,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Definition {
    /// The metric as an enum.
    #[serde(skip)]
    pub metric: Metric,
    /// Its OpenTelemetry name.
    pub name: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// How its values relate in time.
    pub kind: Kind,
    /// The type of its values.
    pub value_type: ValueType,
    /// What it describes.
    pub family: Family,
    /// Attributes beside those that every point of the family has. Their values come from closed lists, never from a guest.
    pub attributes: &'static [&'static str],
    /// What it means, one sentence without a final dot.
    pub meaning: &'static str,
}

macro_rules! metrics {
    ($($variant:ident $name:literal $unit:ident $kind:ident $value:ident $family:ident [$($attribute:ident),*] $meaning:literal)*) => {
        /// A metric of msb.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Metric {
            $(#[doc = $meaning] $variant,)*
        }

        /// Every metric, in the order of the documentation and of [`Metric`].
        pub const TABLE: &[Definition] = &[
            $(Definition {
                metric: Metric::$variant,
                name: $name,
                unit: Unit::$unit,
                kind: Kind::$kind,
                value_type: ValueType::$value,
                family: Family::$family,
                attributes: &[$($attribute),*],
                meaning: $meaning,
            },)*
        ];
    };
}

metrics! {
    CpuUtilization "microsandbox.cpu.utilization" One Gauge Float Compatible [] "vCPU seconds used per second since the last sample; above 1 with more than one vCPU"
    MemoryUsage "microsandbox.memory.usage" Bytes Gauge Unsigned Compatible [] "memory of the guest in use as its kernel counts it"
    MemoryLimit "microsandbox.memory.limit" Bytes Gauge Unsigned Compatible [] "memory the sandbox was given"
    DiskBytesRead "microsandbox.disk.bytes_read" Bytes Gauge Unsigned Compatible [] "bytes read from all disks since the boot"
    DiskBytesWritten "microsandbox.disk.bytes_written" Bytes Gauge Unsigned Compatible [] "bytes written to all disks since the boot"
    NetworkBytesReceived "microsandbox.network.bytes_received" Bytes Gauge Unsigned Compatible [] "bytes of frames the guest received since the boot"
    NetworkBytesSent "microsandbox.network.bytes_sent" Bytes Gauge Unsigned Compatible [] "bytes of frames the guest sent since the boot"
    Uptime "microsandbox.uptime" Seconds Gauge Float Compatible [] "time since the virtual machine started"
    CpuTime "microsandbox.cpu.time" Seconds Counter Float Sandbox [] "time the vCPUs ran"
    MemoryResident "microsandbox.memory.resident" Bytes Gauge Unsigned Sandbox [] "memory of the guest that the host holds at present"
    DiskIo "microsandbox.disk.io" Bytes Counter Unsigned Sandbox [ATTRIBUTE_DISK_DIRECTION] "bytes moved by the disks"
    DiskOperations "microsandbox.disk.operations" Operations Counter Unsigned Sandbox [ATTRIBUTE_DISK_DIRECTION] "requests the disks completed"
    RootDiskUsage "microsandbox.root_disk.usage" Bytes Gauge Unsigned Sandbox [] "bytes in use on the writable root as the guest counts them"
    RootDiskFree "microsandbox.root_disk.free" Bytes Gauge Unsigned Sandbox [] "bytes free on the writable root as the guest counts them"
    RootDiskAllocated "microsandbox.root_disk.allocated" Bytes Gauge Unsigned Sandbox [] "bytes of the host's disk that the writable root takes"
    NetworkIo "microsandbox.network.io" Bytes Counter Unsigned Sandbox [ATTRIBUTE_NETWORK_DIRECTION] "bytes of frames through the network device"
    NetworkPackets "microsandbox.network.packets" Packets Counter Unsigned Sandbox [ATTRIBUTE_NETWORK_DIRECTION] "frames through the network device"
    NetworkDropped "microsandbox.network.dropped" Packets Counter Unsigned Sandbox [ATTRIBUTE_REASON] "frames of the guest that were dropped, by reason"
    NetworkConnections "microsandbox.network.connections" Connections Gauge Unsigned Sandbox [ATTRIBUTE_TRANSPORT] "connections and flows open now"
    NetworkConnectionsOpened "microsandbox.network.connections.opened" Connections Counter Unsigned Sandbox [ATTRIBUTE_CONNECTION_DIRECTION, ATTRIBUTE_TRANSPORT] "connections and flows that were opened"
    NetworkConnectionsFailed "microsandbox.network.connections.failed" Connections Counter Unsigned Sandbox [ATTRIBUTE_CONNECTION_DIRECTION, ATTRIBUTE_REASON] "connections that policy allowed and that did not come about, by reason"
    NetworkDenied "microsandbox.network.denied" Connections Counter Unsigned Sandbox [ATTRIBUTE_CONNECTION_DIRECTION, ATTRIBUTE_TRANSPORT] "connections and flows that policy denied"
    DnsQueries "microsandbox.dns.queries" Queries Counter Unsigned Sandbox [ATTRIBUTE_DNS_OUTCOME] "names the guest asked for, by how the query ended"
    DecisionLogSuppressed "microsandbox.network.decisions.suppressed" Records Counter Unsigned Sandbox [] "lines that the rate limit kept out of the decision log"
    Restarts "microsandbox.restarts" Restarts Counter Unsigned Sandbox [] "times the sandbox was started again without a request"
    State "microsandbox.state" One Gauge Unsigned Sandbox [ATTRIBUTE_STATE] "1 for the state the sandbox is in"
    BootDuration "microsandbox.boot.duration" Seconds Gauge Float Sandbox [ATTRIBUTE_PHASE] "duration of each phase of the last boot"
    Sandboxes "microsandbox.sandboxes" Sandboxes Gauge Unsigned Daemon [ATTRIBUTE_STATE] "sandboxes the daemon knows, by state"
    ReadyForks "microsandbox.template.ready_forks" Forks Gauge Unsigned Daemon [ATTRIBUTE_TEMPLATE] "ready forks that stand by, by the template or snapshot they are of"
    ExportsSuccess "microsandbox.collector.exports.success" One Counter Unsigned Collector [] "batches the backend took"
    ExportsFailure "microsandbox.collector.exports.failure" One Counter Unsigned Collector [] "batches the backend refused or did not answer"
    CollectionsDropped "microsandbox.collector.collections.dropped" One Counter Unsigned Collector [] "collections dropped because the buffer was full, oldest first"
    PointsRejected "microsandbox.collector.points.rejected" One Counter Unsigned Collector [] "points the backend rejected in a partial success"
    AttributesDropped "microsandbox.collector.attributes.dropped" One Counter Unsigned Collector [] "attributes left out by the cardinality cap"
    LastSuccess "microsandbox.collector.last_success_timestamp" Seconds Gauge Float Collector [] "time of the last success, in seconds since 1970"
}

impl Metric {
    /// Its row of [`TABLE`].
    #[must_use]
    pub fn definition(self) -> &'static Definition {
        // The table is made by the same macro in the same order.
        &TABLE[self as usize]
    }

    /// Its OpenTelemetry name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.definition().name
    }

    /// The metric of an OpenTelemetry name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.name == name).map(|row| row.metric)
    }

    /// Its name on a Prometheus scrape endpoint, by OpenTelemetry's rules of conversion.
    #[must_use]
    pub fn prometheus_name(self) -> String {
        prometheus::name(self.definition())
    }
}

/// The table of `docs/observability.md`.
#[must_use]
pub fn markdown_table() -> String {
    let mut text =
        String::from("| name | unit | kind | attributes | Prometheus | meaning |\n|---|---|---|---|---|---|\n");
    for row in TABLE {
        let kind = match row.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "sum",
        };
        let attributes = row.attributes.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        text += &format!(
            "| `{}` | `{}` | {kind} | {attributes} | `{}` | {} |\n",
            row.name,
            row.unit.as_str(),
            row.metric.prometheus_name(),
            row.meaning
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_metric_finds_its_own_row() {
        for row in TABLE {
            assert_eq!(row.metric.definition(), row);
            assert_eq!(Metric::from_name(row.name), Some(row.metric));
        }
        assert_eq!(Metric::from_name("microsandbox.nothing"), None);
    }

    #[test]
    fn names_are_unique_also_for_prometheus_and_each_row_says_what_it_means() {
        let names: BTreeSet<_> = TABLE.iter().map(|row| row.name).collect();
        let scraped: BTreeSet<_> = TABLE.iter().map(|row| row.metric.prometheus_name()).collect();
        assert_eq!((names.len(), scraped.len()), (TABLE.len(), TABLE.len()));
        for row in TABLE {
            let allowed = |b: u8| b.is_ascii_lowercase() || matches!(b, b'.' | b'_');
            assert!(row.name.starts_with("microsandbox.") && row.name.bytes().all(allowed), "{}", row.name);
            assert!(
                !row.meaning.is_empty() && !row.meaning.ends_with('.') && !row.meaning.contains('|'),
                "{}",
                row.name
            );
            assert!(row.kind == Kind::Gauge || row.family != Family::Compatible, "{}", row.name);
        }
    }

    /// The names, units and types that dashboards made for microsandbox 0.5.5 ask for.
    #[test]
    fn the_compatible_family_is_exactly_what_dashboards_know() {
        let family: Vec<_> = TABLE.iter().filter(|row| row.family == Family::Compatible).collect();
        let rows: Vec<_> = family.iter().map(|row| (row.name, row.unit.as_str(), row.value_type)).collect();
        use ValueType::{Float, Unsigned};
        assert_eq!(
            rows,
            [
                ("microsandbox.cpu.utilization", "1", Float),
                ("microsandbox.memory.usage", "By", Unsigned),
                ("microsandbox.memory.limit", "By", Unsigned),
                ("microsandbox.disk.bytes_read", "By", Unsigned),
                ("microsandbox.disk.bytes_written", "By", Unsigned),
                ("microsandbox.network.bytes_received", "By", Unsigned),
                ("microsandbox.network.bytes_sent", "By", Unsigned),
                ("microsandbox.uptime", "s", Float),
            ]
        );
    }

    #[test]
    fn the_documentation_has_a_line_for_each_metric() {
        let text = markdown_table();
        assert_eq!(text.lines().count(), TABLE.len() + 2);
        assert!(text.contains(
            "| `microsandbox.disk.io` | `By` | sum | `disk.io.direction` | `microsandbox_disk_io_bytes_total` |"
        ));
    }
}
