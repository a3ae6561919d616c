//! Readings and the points they make: pure, no clock, no I/O. Made by `collect`; taken by whoever sends or shows them.
//!
//! A reading keeps the time at which its VM was sampled, however long it waits in the buffer before a backend takes it. It is small,
//! because a thousand sandboxes times sixty collections wait while a backend is away: who it is of is shared between collections, and
//! points are made only when they are sent.

use std::collections::BTreeSet;
use std::sync::Arc;

use msb_metrics::{
    ATTRIBUTE_DISK_DIRECTION, ATTRIBUTE_NETWORK_DIRECTION, ATTRIBUTE_PHASE, ATTRIBUTE_STATE, ATTRIBUTE_TEMPLATE, Kind,
    Metric,
};
use msb_protocol::control::GuestMetrics;
use msb_protocol::state::SandboxState;
use msb_protocol::vmm::{Phase, Sample};

/// A value of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    /// Whole.
    Unsigned(u64),
    /// Fraction.
    Float(f64),
}

/// Attributes that one point has beside those of its sandbox: two at most.
pub(crate) type Extra<'a> = [Option<(&'a str, &'a str)>; 2];

/// One value of one metric with its attributes and times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point<'a> {
    /// Which metric.
    pub metric: Metric,
    /// Its value.
    pub value: Value,
    /// Attributes of everything that the same sandbox says, by key.
    pub attributes: &'a [(String, String)],
    /// Those that only this point has.
    pub extra: Extra<'a>,
    /// When a sum began at zero, nanoseconds since 1970; 0 for gauges.
    pub start_ns: u64,
    /// When it was measured, nanoseconds since 1970.
    pub time_ns: u64,
    /// Nothing will follow it: its run has ended.
    pub is_last: bool,
}

impl<'a> Point<'a> {
    /// All its attributes.
    pub(crate) fn all_attributes(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.attributes
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .chain(self.extra.into_iter().flatten())
    }
}

/// Who the points are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// `host.id`.
    pub host_id: String,
    /// `host.name`.
    pub host_name: String,
    /// `service.instance.id`.
    pub instance_id: String,
}

/// What all points of one run of a sandbox share.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub started_ns: u64,
    pub restarts_since_ns: u64,
    pub restarts: u32,
    pub memory_limit_bytes: u64,
    pub attributes: Vec<(String, String)>,
    pub phases: Vec<Phase>,
    pub counts: Vec<CountKey>,
}

/// Which counter of the network: its metric and its attributes.
pub(crate) type CountKey = (Metric, Vec<(String, String)>);

/// What points are made of in a [`Sample`]. A sample itself is half as large again.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    pub at_ns: u64,
    pub uptime_ms: u64,
    pub cpu_time_us: u64,
    pub memory_resident_bytes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    pub disk_read_operations: u64,
    pub disk_write_operations: u64,
    pub root_allocated_bytes: u64,
    pub network_received_bytes: u64,
    pub network_sent_bytes: u64,
    pub network_received_packets: u64,
    pub network_sent_packets: u64,
}

impl From<&Sample> for Counters {
    fn from(sample: &Sample) -> Self {
        Self {
            at_ns: sample.at_ns,
            uptime_ms: sample.uptime_ms,
            cpu_time_us: sample.cpu_time_us,
            memory_resident_bytes: sample.memory_resident_bytes,
            disk_read_bytes: sample.disk_read_bytes,
            disk_written_bytes: sample.disk_written_bytes,
            disk_read_operations: sample.disk_read_operations,
            disk_write_operations: sample.disk_write_operations,
            root_allocated_bytes: sample.root_allocated_bytes,
            network_received_bytes: sample.network_received_bytes,
            network_sent_bytes: sample.network_sent_bytes,
            network_received_packets: sample.network_received_packets,
            network_sent_packets: sample.network_sent_packets,
        }
    }
}

/// What points are made of in what the guest says.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub memory_used_bytes: u64,
    pub root_used_bytes: u64,
    pub root_free_bytes: u64,
}

impl From<GuestMetrics> for Guest {
    fn from(guest: GuestMetrics) -> Self {
        Self {
            memory_used_bytes: guest.memory_used_bytes,
            root_used_bytes: guest.root_used_bytes,
            root_free_bytes: guest.root_free_bytes,
        }
    }
}

/// What was read of one sandbox at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    pub who: Arc<Identity>,
    pub status: SandboxState,
    pub cpu_utilization: f64,
    pub sample: Counters,
    /// Where in [`Collection::counts`] its own begin: one for each of [`Identity::counts`].
    pub counts_at: u32,
    pub guest: Option<Guest>,
    /// The last one of its run.
    pub is_last: bool,
    /// Not seen before this collection.
    pub is_new: bool,
    /// Its VM process has said nothing for so long that the value is none of this time.
    pub is_old: bool,
}

/// Everything of one moment.
#[derive(Clone, Debug)]
pub(crate) struct Collection {
    /// Who it is of.
    pub host: Arc<Host>,
    /// When, nanoseconds since 1970.
    pub taken_ns: u64,
    /// Sandboxes by state.
    pub states: Vec<(String, u64)>,
    /// Ready forks by template.
    pub ready_forks: Vec<(String, u64)>,
    /// The readings.
    pub readings: Vec<Reading>,
    /// Counters of the network, those of one reading after those of another: a box for each would cost more than what is in it.
    pub counts: Vec<u64>,
    /// Attributes that the cap on cardinality left out.
    pub attributes_dropped: u64,
}

impl Collection {
    /// Without what an earlier collection had already: each sample is exported once.
    pub(crate) fn keep_new(mut self) -> Self {
        self.readings.retain(|reading| reading.is_new);
        self
    }

    /// Without values that are none of this time: for those who only show what is now.
    pub(crate) fn keep_current(mut self) -> Self {
        self.readings.retain(|reading| !reading.is_old && (reading.is_new || !reading.is_last));
        self
    }

    /// Takes over the last readings of runs that ended, so that nobody who looks seldom misses them.
    pub(crate) fn add_ended(&mut self, before: &Self) {
        let known: BTreeSet<_> = self.readings.iter().map(|reading| reading.who.attributes.as_slice()).collect();
        let ended = before.readings.iter().filter(|reading| reading.is_last);
        // A new run of the same sandbox says more than the end of the one before, and no series may be there twice.
        let missing: Vec<_> = ended.filter(|reading| !known.contains(reading.who.attributes.as_slice())).collect();
        for reading in missing {
            let counts_at = counts_at(&self.counts);
            self.counts.extend_from_slice(before.counts_of(reading));
            self.readings.push(Reading { counts_at, ..reading.clone() });
        }
    }

    /// The counters of the network of one of its readings.
    fn counts_of(&self, reading: &Reading) -> &[u64] {
        let at = usize::try_from(reading.counts_at).unwrap_or(usize::MAX);
        self.counts.get(at..).and_then(|counts| counts.get(..reading.who.counts.len())).unwrap_or_default()
    }

    /// The points about the daemon itself.
    pub(crate) fn daemon_points<'a>(&'a self, mut each: impl FnMut(Point<'a>)) {
        let gauges = [
            (Metric::Sandboxes, ATTRIBUTE_STATE, &self.states),
            (Metric::ReadyForks, ATTRIBUTE_TEMPLATE, &self.ready_forks),
        ];
        for (metric, attribute, counts) in gauges {
            for (of, count) in counts {
                each(Point {
                    metric,
                    value: Value::Unsigned(*count),
                    attributes: &[],
                    extra: [Some((attribute, of)), None],
                    start_ns: 0,
                    time_ns: self.taken_ns,
                    is_last: false,
                });
            }
        }
    }

    /// All points.
    pub(crate) fn points<'a>(&'a self, mut each: impl FnMut(Point<'a>)) {
        for reading in &self.readings {
            self.points_of(reading, &mut each);
        }
        self.daemon_points(each);
    }

    /// The points of one of its readings.
    pub(crate) fn points_of<'a>(&'a self, reading: &'a Reading, each: impl FnMut(Point<'a>)) {
        reading.points(self.counts_of(reading), each);
    }
}

/// Where the counters of the next reading will be.
pub(crate) fn counts_at(counts: &[u64]) -> u32 {
    u32::try_from(counts.len()).unwrap_or(u32::MAX)
}

/// Points of a reading beside those of its phases and its network's counters, rounded up.
const FIXED_POINTS: usize = 24;
#[allow(clippy::cast_precision_loss, reason = "durations in microseconds stay exact far beyond any uptime")]
fn seconds(microseconds: u64) -> Value {
    Value::Float(microseconds as f64 / 1e6)
}

impl Reading {
    /// How many points it makes, and a few more.
    pub(crate) fn points_len(&self) -> usize {
        FIXED_POINTS + self.who.phases.len() + self.who.counts.len()
    }

    /// What all of its points carry.
    pub(crate) fn attributes(&self) -> &[(String, String)] {
        &self.who.attributes
    }

    /// Bytes that the attributes of one of its points take.
    pub(crate) fn attribute_bytes(&self) -> usize {
        self.who.attributes.iter().map(|(key, value)| key.len() + value.len() + 8).sum()
    }

    fn points<'a>(&'a self, counts: &[u64], mut each: impl FnMut(Point<'a>)) {
        use Value::{Float, Unsigned};
        let sample = &self.sample;
        let mut push_with = |metric: Metric, value: Value, extra: Extra<'a>| {
            let start_ns = match (metric, metric.definition().kind) {
                (Metric::Restarts, _) => self.who.restarts_since_ns,
                (_, Kind::Counter) => self.who.started_ns,
                (_, Kind::Gauge) => 0,
            };
            let (attributes, time_ns, is_last) = (self.who.attributes.as_slice(), sample.at_ns, self.is_last);
            each(Point { metric, value, attributes, extra, start_ns, time_ns, is_last });
        };
        for ((metric, attributes), value) in self.who.counts.iter().zip(counts) {
            let mut attributes = attributes.iter().map(|(key, value)| (key.as_str(), value.as_str()));
            push_with(*metric, Unsigned(*value), [attributes.next(), attributes.next()]);
        }
        let mut push =
            |metric: Metric, value: Value, extra: Option<(&'a str, &'a str)>| push_with(metric, value, [extra, None]);
        push(Metric::CpuUtilization, Float(self.cpu_utilization), None);
        push(Metric::MemoryLimit, Unsigned(self.who.memory_limit_bytes), None);
        push(Metric::DiskBytesRead, Unsigned(sample.disk_read_bytes), None);
        push(Metric::DiskBytesWritten, Unsigned(sample.disk_written_bytes), None);
        push(Metric::NetworkBytesReceived, Unsigned(sample.network_received_bytes), None);
        push(Metric::NetworkBytesSent, Unsigned(sample.network_sent_bytes), None);
        push(Metric::Uptime, seconds(sample.uptime_ms.saturating_mul(1000)), None);
        push(Metric::CpuTime, seconds(sample.cpu_time_us), None);
        push(Metric::MemoryResident, Unsigned(sample.memory_resident_bytes), None);
        let read = Some((ATTRIBUTE_DISK_DIRECTION, "read"));
        let write = Some((ATTRIBUTE_DISK_DIRECTION, "write"));
        push(Metric::DiskIo, Unsigned(sample.disk_read_bytes), read);
        push(Metric::DiskIo, Unsigned(sample.disk_written_bytes), write);
        push(Metric::DiskOperations, Unsigned(sample.disk_read_operations), read);
        push(Metric::DiskOperations, Unsigned(sample.disk_write_operations), write);
        push(Metric::RootDiskAllocated, Unsigned(sample.root_allocated_bytes), None);
        // Nothing before its first beat: what the host holds is another thing, and would look like a leap.
        if let Some(guest) = &self.guest {
            push(Metric::MemoryUsage, Unsigned(guest.memory_used_bytes), None);
            push(Metric::RootDiskUsage, Unsigned(guest.root_used_bytes), None);
            push(Metric::RootDiskFree, Unsigned(guest.root_free_bytes), None);
        }
        let receive = Some((ATTRIBUTE_NETWORK_DIRECTION, "receive"));
        let transmit = Some((ATTRIBUTE_NETWORK_DIRECTION, "transmit"));
        push(Metric::NetworkIo, Unsigned(sample.network_received_bytes), receive);
        push(Metric::NetworkIo, Unsigned(sample.network_sent_bytes), transmit);
        push(Metric::NetworkPackets, Unsigned(sample.network_received_packets), receive);
        push(Metric::NetworkPackets, Unsigned(sample.network_sent_packets), transmit);
        push(Metric::Restarts, Unsigned(u64::from(self.who.restarts)), None);
        push(Metric::State, Unsigned(1), Some((ATTRIBUTE_STATE, self.status.as_str())));
        for phase in &self.who.phases {
            push(Metric::BootDuration, seconds(phase.duration_us), Some((ATTRIBUTE_PHASE, &phase.name)));
        }
    }
}
