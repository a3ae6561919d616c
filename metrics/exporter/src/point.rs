//! From a snapshot of the daemon to metric points: pure, no clock, no I/O. Called by `collector` once for each collection.
//!
//! A point keeps the time at which the VM was sampled, however long it waits in the buffer before a backend takes it.

use std::collections::BTreeMap;

use msb_metrics::{
    ATTRIBUTE_DISK_DIRECTION, ATTRIBUTE_NETWORK_DIRECTION, ATTRIBUTE_PHASE, ATTRIBUTE_STATE, Kind, Metric,
};
use msb_protocol::control::{MetricsSnapshot, SandboxMetrics};

/// A value of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    /// Whole.
    Unsigned(u64),
    /// Fraction.
    Float(f64),
}

/// One value of one metric with its attributes and times.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Point {
    /// Which metric.
    pub metric: Metric,
    /// Its value.
    pub value: Value,
    /// Attributes, by key.
    pub attributes: BTreeMap<String, String>,
    /// When a sum began at zero, nanoseconds since 1970; 0 for gauges.
    pub start_ns: u64,
    /// When it was measured, nanoseconds since 1970.
    pub time_ns: u64,
}

/// All points of one moment, and who they are of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Collection {
    /// `host.id`.
    pub host_id: String,
    /// `host.name`.
    pub host_name: String,
    /// `service.instance.id`.
    pub instance_id: String,
    /// The points.
    pub points: Vec<Point>,
    /// Attributes that the cardinality cap left out.
    pub attributes_dropped: u64,
}

/// Which attributes points carry.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttributeChoice {
    /// No labels at all.
    pub no_labels: bool,
    /// Only these label keys, if any is named.
    pub include_keys: Vec<String>,
    /// Not these label keys.
    pub exclude_keys: Vec<String>,
    /// `sandbox.run_id`.
    pub run_id: bool,
    /// `sandbox.pid`.
    pub pid: bool,
    /// Most different values of one label key; further ones are left out. 0: no limit.
    pub values_per_key_max: usize,
}

/// Remembers what was sent, so that a cap on cardinality holds over time and a run that ended is sent once.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    values: BTreeMap<String, std::collections::BTreeSet<String>>,
    ended: BTreeMap<String, String>,
}

impl Memory {
    /// Whether a label's value may be sent under the cap.
    fn admits(&mut self, key: &str, value: &str, max: usize) -> bool {
        if max == 0 {
            return true;
        }
        let known = self.values.entry(key.to_owned()).or_default();
        known.contains(value) || (known.len() < max && known.insert(value.to_owned()))
    }

    /// Whether this sample is new: the last one of a run is sent once and then no more, never a frozen value.
    fn is_new(&mut self, sandbox: &SandboxMetrics) -> bool {
        let (id, run) = (sandbox.id.to_string(), sandbox.boot_id.to_string());
        if !sandbox.last {
            self.ended.remove(&id);
            return true;
        }
        self.ended.insert(id, run.clone()) != Some(run)
    }

    /// Forgets ended runs of sandboxes the daemon no longer reports, so that memory follows the fleet.
    fn forget_absent(&mut self, snapshot: &MetricsSnapshot) {
        let present: std::collections::BTreeSet<String> =
            snapshot.sandboxes.iter().map(|sandbox| sandbox.id.to_string()).collect();
        self.ended.retain(|id, _| present.contains(id));
    }
}

/// The points of a snapshot.
pub(crate) fn collect(snapshot: &MetricsSnapshot, choice: &AttributeChoice, memory: &mut Memory) -> Collection {
    let mut collection = Collection {
        host_id: snapshot.host_id.clone(),
        host_name: snapshot.host_name.clone(),
        instance_id: snapshot.instance_id.clone(),
        points: Vec::with_capacity(snapshot.sandboxes.len() * 24),
        attributes_dropped: 0,
    };
    memory.forget_absent(snapshot);
    for sandbox in &snapshot.sandboxes {
        if memory.is_new(sandbox) {
            let base = attributes(sandbox, choice, memory, &mut collection.attributes_dropped);
            sandbox_points(sandbox, &base, &mut collection.points);
        }
    }
    let taken_ns = nanoseconds(snapshot.taken_at.as_nanosecond());
    for (state, count) in &snapshot.states {
        collection.points.push(Point {
            metric: Metric::Sandboxes,
            value: Value::Unsigned(*count),
            attributes: BTreeMap::from([(ATTRIBUTE_STATE.to_owned(), state.clone())]),
            start_ns: 0,
            time_ns: taken_ns,
        });
    }
    collection
}

fn nanoseconds(value: i128) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

fn attributes(
    sandbox: &SandboxMetrics,
    choice: &AttributeChoice,
    memory: &mut Memory,
    dropped: &mut u64,
) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::new();
    if !choice.no_labels {
        for (key, value) in &sandbox.labels {
            let wanted = choice.include_keys.is_empty() || choice.include_keys.contains(key);
            if !wanted || choice.exclude_keys.contains(key) {
                continue;
            }
            if memory.admits(key, value, choice.values_per_key_max) {
                attributes.insert(key.clone(), value.clone());
            } else {
                *dropped += 1;
            }
        }
    }
    // Written last: a label can never take the place of an identity (the daemon refuses such keys already).
    attributes.insert("sandbox.name".into(), sandbox.name.to_string());
    attributes.insert("sandbox.id".into(), sandbox.id.to_string());
    if choice.run_id {
        attributes.insert("sandbox.run_id".into(), sandbox.boot_id.to_string());
    }
    if choice.pid && sandbox.vmm_pid != 0 {
        attributes.insert("sandbox.pid".into(), sandbox.vmm_pid.to_string());
    }
    attributes
}

#[allow(clippy::cast_precision_loss, reason = "durations in microseconds stay exact far beyond any uptime")]
fn seconds(microseconds: u64) -> Value {
    Value::Float(microseconds as f64 / 1e6)
}

fn sandbox_points(sandbox: &SandboxMetrics, base: &BTreeMap<String, String>, points: &mut Vec<Point>) {
    let start_ns = nanoseconds(sandbox.started_at.as_nanosecond());
    let sample = &sandbox.sample;
    let mut push = |metric: Metric, value: Value, extra: Option<(&str, &str)>| {
        let mut attributes = base.clone();
        if let Some((key, value)) = extra {
            attributes.insert(key.to_owned(), value.to_owned());
        }
        let start_ns = if metric.definition().kind == Kind::Counter { start_ns } else { 0 };
        points.push(Point { metric, value, attributes, start_ns, time_ns: sample.at_ns });
    };
    use Value::{Float, Unsigned};
    push(Metric::CpuUtilization, Float(sandbox.cpu_utilization), None);
    push(
        Metric::MemoryUsage,
        Unsigned(sandbox.guest.map_or(sample.memory_resident_bytes, |g| g.memory_used_bytes)),
        None,
    );
    push(Metric::MemoryLimit, Unsigned(sample.memory_limit_bytes), None);
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
    if let Some(guest) = &sandbox.guest {
        push(Metric::RootDiskUsage, Unsigned(guest.root_used_bytes), None);
        push(Metric::RootDiskFree, Unsigned(guest.root_free_bytes), None);
    }
    let receive = Some((ATTRIBUTE_NETWORK_DIRECTION, "receive"));
    let transmit = Some((ATTRIBUTE_NETWORK_DIRECTION, "transmit"));
    push(Metric::NetworkIo, Unsigned(sample.network_received_bytes), receive);
    push(Metric::NetworkIo, Unsigned(sample.network_sent_bytes), transmit);
    push(Metric::NetworkPackets, Unsigned(sample.network_received_packets), receive);
    push(Metric::NetworkPackets, Unsigned(sample.network_sent_packets), transmit);
    push(Metric::Restarts, Unsigned(u64::from(sandbox.restarts)), None);
    push(Metric::State, Unsigned(1), Some((ATTRIBUTE_STATE, sandbox.status.as_str())));
    for phase in &sandbox.boot_phases {
        push(Metric::BootDuration, seconds(phase.duration_us), Some((ATTRIBUTE_PHASE, &phase.name)));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use msb_protocol::id::{BootId, SandboxId, SandboxName};
    use msb_protocol::state::SandboxState;
    use msb_protocol::vmm::{Phase, Sample};

    use super::*;

    pub(crate) fn snapshot() -> MetricsSnapshot {
        let time = |seconds| jiff::Timestamp::from_second(seconds).unwrap();
        MetricsSnapshot {
            host_id: "host".into(),
            host_name: "h1".into(),
            instance_id: "instance".into(),
            taken_at: time(101),
            states: BTreeMap::from([("running".into(), 1)]),
            sandboxes: vec![SandboxMetrics {
                name: SandboxName::parse("web").unwrap(),
                id: SandboxId(uuid::Uuid::from_u128(1)),
                boot_id: BootId(uuid::Uuid::from_u128(2)),
                vmm_pid: 77,
                status: SandboxState::Running,
                labels: BTreeMap::from([("team".into(), "ml".into()), ("job".into(), "17".into())]),
                restarts: 3,
                started_at: time(50),
                last: false,
                sample: Sample {
                    at_ns: 100_500_000_000,
                    uptime_ms: 50_500,
                    cpu_time_us: 2_500_000,
                    disk_read_bytes: 10,
                    ..Sample::default()
                },
                cpu_utilization: 0.5,
                guest: None,
                boot_phases: vec![Phase { name: "kernel".into(), duration_us: 1_000 }],
            }],
        }
    }

    fn of(collection: &Collection, metric: Metric) -> Vec<&Point> {
        collection.points.iter().filter(|point| point.metric == metric).collect()
    }

    #[test]
    fn points_keep_the_time_of_their_sample_and_sums_their_start() {
        let collection = collect(&snapshot(), &AttributeChoice::default(), &mut Memory::default());
        let uptime = of(&collection, Metric::Uptime)[0];
        assert_eq!((uptime.value, uptime.time_ns, uptime.start_ns), (Value::Float(50.5), 100_500_000_000, 0));
        let read = of(&collection, Metric::DiskIo)[0];
        assert_eq!((read.value, read.start_ns), (Value::Unsigned(10), 50_000_000_000));
        assert_eq!(read.attributes["disk.io.direction"], "read");
        assert_eq!(read.attributes["team"], "ml");
        assert_eq!(read.attributes["sandbox.name"], "web");
        assert!(!read.attributes.contains_key("sandbox.pid") && !read.attributes.contains_key("sandbox.run_id"));
        assert_eq!(of(&collection, Metric::Sandboxes)[0].time_ns, 101_000_000_000);
    }

    #[test]
    fn labels_are_chosen_by_key() {
        let keys = |choice: AttributeChoice| {
            let collection = collect(&snapshot(), &choice, &mut Memory::default());
            let attributes = of(&collection, Metric::Uptime)[0].attributes.clone();
            ["team", "job", "sandbox.pid", "sandbox.run_id"].map(|key| attributes.contains_key(key))
        };
        assert_eq!(keys(AttributeChoice { no_labels: true, ..Default::default() }), [false; 4]);
        let exclude = AttributeChoice { exclude_keys: vec!["job".into()], ..Default::default() };
        assert_eq!(keys(exclude), [true, false, false, false]);
        let include =
            AttributeChoice { include_keys: vec!["job".into()], pid: true, run_id: true, ..Default::default() };
        assert_eq!(keys(include), [false, true, true, true]);
    }

    #[test]
    fn the_cap_admits_old_values_and_counts_new_ones() {
        let choice = AttributeChoice { values_per_key_max: 1, ..Default::default() };
        let mut memory = Memory::default();
        assert_eq!(collect(&snapshot(), &choice, &mut memory).attributes_dropped, 0);
        let mut other = snapshot();
        other.sandboxes[0].labels.insert("job".into(), "18".into());
        let collection = collect(&other, &choice, &mut memory);
        assert_eq!(collection.attributes_dropped, 1);
        assert!(!of(&collection, Metric::Uptime)[0].attributes.contains_key("job"));
        assert_eq!(collect(&snapshot(), &choice, &mut memory).attributes_dropped, 0);
    }

    #[test]
    fn the_last_sample_of_a_run_is_sent_once_and_a_new_run_is_sent_again() {
        let mut memory = Memory::default();
        let mut ended = snapshot();
        ended.sandboxes[0].last = true;
        let sent = |snapshot: &MetricsSnapshot, memory: &mut Memory| {
            !of(&collect(snapshot, &AttributeChoice::default(), memory), Metric::Uptime).is_empty()
        };
        assert!(sent(&snapshot(), &mut memory));
        assert!(sent(&ended, &mut memory));
        assert!(!sent(&ended, &mut memory));
        ended.sandboxes[0].boot_id = BootId(uuid::Uuid::from_u128(3));
        assert!(sent(&ended, &mut memory));
    }
}
