//! From a snapshot of the daemon to readings: pure, no clock, no I/O. Called by `collector` once for each collection. Here labels are
//! chosen and capped, and here it is remembered what was told already.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use msb_metrics::{Family, Metric};
use msb_protocol::control::{MetricsSnapshot, SandboxMetrics};
use msb_protocol::id::{BootId, SandboxId};
use msb_protocol::vmm::{NetworkName, Sample};

use crate::point::{Collection, CountKey, Counters, Guest, Host, Identity, Reading, counts_at};

/// Label keys whose values are remembered for the cap on cardinality; labels of further keys are left out when there is a cap.
const KEYS_MAX: usize = 256;
/// Bytes of labels that one sandbox may bring to each of its points; further labels are left out.
const LABEL_BYTES_MAX: usize = 16 << 10;

/// Counters of the network of one sandbox, and bytes of a word that tells them apart.
const COUNTS_MAX: usize = 64;
const COUNT_WORD_BYTES_MAX: usize = 32;

/// A reading is old after so many of the intervals at which its sandbox was sampled.
const OLD_INTERVALS: u64 = 5;
/// And not before this time, in nanoseconds.
const OLD_MIN_NS: u64 = 10_000_000_000;

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

/// Remembers what was seen, so that a cap on cardinality holds over time, a sample is exported once and a run that ended is told once.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    host: Option<Arc<Host>>,
    /// Hashes of values by label key: bounded, whatever the values are.
    values: BTreeMap<String, BTreeSet<u64>>,
    sandboxes: BTreeMap<SandboxId, Known>,
}

#[derive(Debug)]
struct Known {
    identity: Arc<Identity>,
    /// What its identity was made of: for a sandbox that says the same again nothing is made anew.
    told: Told,
    boot_id: BootId,
    at_ns: u64,
    interval_ns: u64,
    last_told: bool,
}

/// What the identity of a sandbox was made of.
#[derive(Debug, Default)]
struct Told {
    /// Of its run, its labels, its process, its phases and its network's counters: itself it would be larger than the identity.
    hash: u64,
    /// For each of its network's counters the place of its value among the identity's.
    places: Box<[Option<usize>]>,
    /// Labels that were left out.
    dropped: u64,
}

fn hash(sandbox: &SandboxMetrics) -> u64 {
    let mut hasher = DefaultHasher::new();
    (sandbox.boot_id, sandbox.started_at, sandbox.restarts, sandbox.sample.memory_limit_bytes).hash(&mut hasher);
    (sandbox.vmm_pid, &sandbox.labels).hash(&mut hasher);
    for phase in &sandbox.boot_phases {
        (&phase.name, phase.duration_us).hash(&mut hasher);
    }
    sandbox.sample.network.names().wire().hash(&mut hasher);
    hasher.finish()
}

impl Memory {
    /// Whether a label's value may be sent under the cap.
    fn admits(&mut self, key: &str, value: &str, max: usize) -> bool {
        if max == 0 {
            return true;
        }
        if !self.values.contains_key(key) {
            if self.values.len() >= KEYS_MAX {
                return false;
            }
            self.values.insert(key.to_owned(), BTreeSet::new());
        }
        let mut hasher = DefaultHasher::new();
        value.hash(&mut hasher);
        let hash = hasher.finish();
        let Some(known) = self.values.get_mut(key) else { return false };
        known.contains(&hash) || (known.len() < max && known.insert(hash))
    }

    fn host(&mut self, snapshot: &MetricsSnapshot) -> Arc<Host> {
        let host = Host {
            host_id: snapshot.host_id.clone(),
            host_name: snapshot.host_name.clone(),
            instance_id: snapshot.instance_id.clone(),
        };
        match &self.host {
            Some(known) if **known == host => Arc::clone(known),
            _ => Arc::clone(self.host.insert(Arc::new(host))),
        }
    }

    /// Who a sandbox is, made anew only where that changed.
    fn identify(&mut self, sandbox: &SandboxMetrics, choice: &AttributeChoice, dropped: &mut u64) {
        let hash = hash(sandbox);
        if let Some(known) = self.sandboxes.get(&sandbox.id).filter(|known| known.told.hash == hash) {
            *dropped += known.told.dropped;
            return;
        }
        let mut left_out = 0;
        let attributes = attributes(sandbox, choice, self, &mut left_out);
        *dropped += left_out;
        let counts: Vec<_> = network_keys(&sandbox.sample);
        let keys: BTreeSet<_> = counts.iter().flatten().cloned().collect();
        let keys: Vec<_> = keys.into_iter().collect();
        let place = |key: &Option<CountKey>| keys.binary_search(key.as_ref()?).ok();
        let told = Told { hash, places: counts.iter().map(place).collect(), dropped: left_out };
        let started_ns = nanoseconds(sandbox.started_at.as_nanosecond());
        let restarts_since_ns = match self.sandboxes.get(&sandbox.id) {
            None => nanoseconds(sandbox.created_at.as_nanosecond()),
            // Somebody started it anew: the count began again with this run.
            Some(known) if sandbox.restarts < known.identity.restarts => started_ns,
            Some(known) => known.identity.restarts_since_ns,
        };
        let known = self.sandboxes.entry(sandbox.id).or_insert_with(|| Known {
            identity: Arc::default(),
            told: Told::default(),
            boot_id: sandbox.boot_id,
            at_ns: 0,
            interval_ns: 0,
            last_told: false,
        });
        known.told = told;
        let identity = Identity {
            started_ns,
            restarts_since_ns,
            restarts: sandbox.restarts,
            memory_limit_bytes: sandbox.sample.memory_limit_bytes,
            attributes,
            phases: sandbox.boot_phases.clone(),
            counts: keys,
        };
        if *known.identity != identity {
            known.identity = Arc::new(identity);
        }
    }

    /// The reading of one sandbox that was identified; none of a run whose last one was told.
    fn read(&mut self, sandbox: &SandboxMetrics, taken_ns: u64, counts: &mut Vec<u64>) -> Option<Reading> {
        let at_ns = sandbox.sample.at_ns;
        let known = self.sandboxes.get_mut(&sandbox.id)?;
        if known.boot_id != sandbox.boot_id {
            (known.boot_id, known.last_told, known.at_ns, known.interval_ns) = (sandbox.boot_id, false, 0, 0);
        }
        if sandbox.last && std::mem::replace(&mut known.last_told, true) {
            return None;
        }
        let is_new = known.at_ns != at_ns || sandbox.last;
        if known.at_ns != 0 && at_ns > known.at_ns {
            known.interval_ns = at_ns - known.at_ns;
        }
        known.at_ns = at_ns;
        let counts_at = counts_at(counts);
        let own = counts.len();
        counts.resize(own + known.identity.counts.len(), 0);
        for (place, count) in known.told.places.iter().zip(sandbox.sample.network.values()) {
            if let Some(value) = place.and_then(|place| counts[own..].get_mut(place)) {
                *value = *count;
            }
        }
        let old_after_ns = known.interval_ns.saturating_mul(OLD_INTERVALS).max(OLD_MIN_NS);
        Some(Reading {
            who: Arc::clone(&known.identity),
            status: sandbox.status,
            cpu_utilization: sandbox.cpu_utilization,
            sample: Counters::from(&sandbox.sample),
            counts_at,
            guest: sandbox.guest.map(Guest::from),
            is_last: sandbox.last,
            is_new,
            is_old: taken_ns.saturating_sub(at_ns) > old_after_ns,
        })
    }
}

/// The readings of a snapshot.
pub(crate) fn collect(snapshot: &MetricsSnapshot, choice: &AttributeChoice, memory: &mut Memory) -> Collection {
    let taken_ns = nanoseconds(snapshot.taken_at.as_nanosecond());
    let mut collection = Collection {
        host: memory.host(snapshot),
        taken_ns,
        states: snapshot.states.iter().map(|(state, count)| (state.clone(), *count)).collect(),
        ready_forks: snapshot.ready_forks.iter().map(|(template, count)| (template.clone(), *count)).collect(),
        readings: Vec::with_capacity(snapshot.sandboxes.len()),
        counts: Vec::with_capacity(
            snapshot.sandboxes.iter().map(|sandbox| sandbox.sample.network.values().len()).sum(),
        ),
        attributes_dropped: 0,
    };
    // Sandboxes the daemon no longer reports are forgotten, so that memory follows the fleet.
    let present: BTreeSet<_> = snapshot.sandboxes.iter().map(|sandbox| sandbox.id).collect();
    memory.sandboxes.retain(|id, _| present.contains(id));
    for sandbox in &snapshot.sandboxes {
        memory.identify(sandbox, choice, &mut collection.attributes_dropped);
        collection.readings.extend(memory.read(sandbox, taken_ns, &mut collection.counts));
    }
    collection
}

/// The network's counters by key, none where the table does not declare it: they come from a VM's process.
fn network_keys(sample: &Sample) -> Vec<Option<CountKey>> {
    let declared = |count: &NetworkName| {
        let definition = Metric::from_name(&count.metric)?.definition();
        let keys_fit = count.attributes.keys().eq(definition.attributes.iter().collect::<BTreeSet<_>>());
        let has_field = matches!(definition.metric, Metric::NetworkIo | Metric::NetworkPackets);
        let is_short = count.attributes.values().all(|value| value.len() <= COUNT_WORD_BYTES_MAX);
        (definition.family == Family::Sandbox && keys_fit && is_short && !has_field).then_some(definition.metric)
    };
    let key = |count: &NetworkName| {
        let attributes = count.attributes.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        Some((declared(count)?, attributes))
    };
    let counts = sample.network.iter().enumerate();
    counts.map(|(place, (name, _))| (place < COUNTS_MAX).then(|| key(name)).flatten()).collect()
}

fn nanoseconds(value: i128) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

fn attributes(
    sandbox: &SandboxMetrics,
    choice: &AttributeChoice,
    memory: &mut Memory,
    dropped: &mut u64,
) -> Vec<(String, String)> {
    let mut attributes = BTreeMap::new();
    let mut bytes = 0;
    if !choice.no_labels {
        for (key, value) in &sandbox.labels {
            let wanted = choice.include_keys.is_empty() || choice.include_keys.contains(key);
            if !wanted || choice.exclude_keys.contains(key) {
                continue;
            }
            bytes += key.len() + value.len();
            if bytes <= LABEL_BYTES_MAX && memory.admits(key, value, choice.values_per_key_max) {
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
    attributes.into_iter().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use msb_protocol::control::GuestMetrics;
    use msb_protocol::id::SandboxName;
    use msb_protocol::state::SandboxState;
    use msb_protocol::vmm::{NetworkCount, Phase};

    use super::*;
    use crate::point::Value;

    pub(crate) fn snapshot() -> MetricsSnapshot {
        let time = |seconds| jiff::Timestamp::from_second(seconds).unwrap();
        MetricsSnapshot {
            host_id: "host".into(),
            host_name: "h1".into(),
            instance_id: "instance".into(),
            taken_at: time(101),
            states: BTreeMap::from([("running".into(), 1)]),
            ready_forks: BTreeMap::from([("python".into(), 2)]),
            sandboxes: vec![SandboxMetrics {
                name: SandboxName::parse("web").unwrap(),
                id: SandboxId(uuid::Uuid::from_u128(1)),
                boot_id: BootId(uuid::Uuid::from_u128(2)),
                vmm_pid: 77,
                status: SandboxState::Running,
                labels: BTreeMap::from([("team".into(), "ml".into()), ("job".into(), "17".into())]),
                restarts: 3,
                created_at: time(20),
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

    /// A fleet of so many sandboxes at this second.
    pub(crate) fn fleet(count: u128, second: u64) -> MetricsSnapshot {
        let mut snapshot = snapshot();
        let template = snapshot.sandboxes.remove(0);
        snapshot.sandboxes = (0..count)
            .map(|number| {
                let mut one = template.clone();
                one.name = SandboxName::parse(&format!("sandbox-{number}")).unwrap();
                one.id = SandboxId(uuid::Uuid::from_u128(number));
                one.labels = BTreeMap::from([("team".into(), "ml".into()), ("job".into(), format!("job-{number}"))]);
                one.sample.at_ns = second * 1_000_000_000 + u64::try_from(number).unwrap();
                one.sample.disk_read_bytes = second;
                one.guest = Some(GuestMetrics::default());
                one.boot_phases = ["spawn", "kernel_load", "kernel", "init", "agent", "ready"]
                    .map(|name| Phase { name: name.into(), duration_us: 1_000 })
                    .to_vec();
                one
            })
            .collect();
        snapshot
    }

    #[derive(Debug)]
    struct Seen {
        value: Value,
        attributes: BTreeMap<String, String>,
        start_ns: u64,
        time_ns: u64,
    }

    fn of(collection: &Collection, metric: Metric) -> Vec<Seen> {
        let mut found = Vec::new();
        collection.points(|point| {
            if point.metric == metric {
                let attributes = point.all_attributes().map(|(key, value)| (key.into(), value.into())).collect();
                found.push(Seen { value: point.value, attributes, start_ns: point.start_ns, time_ns: point.time_ns });
            }
        });
        found
    }

    #[test]
    fn points_keep_the_time_of_their_sample_and_sums_their_start() {
        let collection = collect(&snapshot(), &AttributeChoice::default(), &mut Memory::default());
        let uptime = &of(&collection, Metric::Uptime)[0];
        assert_eq!((uptime.value, uptime.time_ns, uptime.start_ns), (Value::Float(50.5), 100_500_000_000, 0));
        let read = &of(&collection, Metric::DiskIo)[0];
        assert_eq!((read.value, read.start_ns), (Value::Unsigned(10), 50_000_000_000));
        assert_eq!(read.attributes["disk.io.direction"], "read");
        assert_eq!(read.attributes["team"], "ml");
        assert_eq!(read.attributes["sandbox.name"], "web");
        assert!(!read.attributes.contains_key("sandbox.pid") && !read.attributes.contains_key("sandbox.run_id"));
        assert_eq!(of(&collection, Metric::Sandboxes)[0].time_ns, 101_000_000_000);
    }

    #[test]
    fn counters_of_the_network_are_told_as_the_table_declares_them_and_nothing_else_is() {
        let count = |metric: &str, attributes: &[(&str, &str)], value| NetworkCount {
            metric: metric.into(),
            attributes: attributes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            value,
        };
        let (way, transport) = (("network.connection.direction", "outbound"), ("network.transport", "tcp"));
        let mut busy = snapshot();
        busy.sandboxes[0].sample.network = [
            count("microsandbox.network.denied", &[way, transport], 4),
            count("microsandbox.network.denied", &[way, transport], 5),
            count("microsandbox.network.denied", &[way], 6),
            count("microsandbox.network.denied", &[way, ("network.transport", &"x".repeat(33))], 7),
            count("microsandbox.network.io", &[("network.io.direction", "receive")], 8),
            count("microsandbox.sandboxes", &[("sandbox.state", "running")], 9),
            count("made.up", &[], 10),
            count("microsandbox.network.connections", &[transport], 2),
            count("microsandbox.network.decisions.suppressed", &[], 1),
        ]
        .into_iter()
        .collect();
        let collection = collect(&busy, &AttributeChoice::default(), &mut Memory::default());
        let denied = of(&collection, Metric::NetworkDenied);
        assert_eq!((denied.len(), denied[0].value, denied[0].start_ns), (1, Value::Unsigned(5), 50_000_000_000));
        for (key, value) in [way, transport, ("sandbox.name", "web")] {
            assert_eq!(denied[0].attributes[key], value);
        }
        let open = of(&collection, Metric::NetworkConnections);
        assert_eq!((open.len(), open[0].value, open[0].start_ns), (1, Value::Unsigned(2), 0));
        assert_eq!(of(&collection, Metric::NetworkIo).len(), 2);
        assert_eq!(of(&collection, Metric::DecisionLogSuppressed).len(), 1);
        assert_eq!(of(&collection, Metric::Sandboxes)[0].value, Value::Unsigned(1));
        assert_eq!(of(&collection, Metric::ReadyForks)[0].value, Value::Unsigned(2));
        let mut points = 0;
        collection.points_of(&collection.readings[0], |_| points += 1);
        assert!((points..points + 10).contains(&collection.readings[0].points_len()), "{points}");
    }

    #[test]
    fn restarts_are_counted_from_the_creation_and_again_from_a_start_by_hand() {
        let (choice, mut memory) = (AttributeChoice::default(), Memory::default());
        let mut seen = |restarts: u32, boot: u128| {
            let mut one = snapshot();
            one.sandboxes[0].restarts = restarts;
            one.sandboxes[0].boot_id = BootId(uuid::Uuid::from_u128(boot));
            let point = of(&collect(&one, &choice, &mut memory), Metric::Restarts).remove(0);
            (point.value, point.start_ns / 1_000_000_000)
        };
        assert_eq!(seen(3, 1), (Value::Unsigned(3), 20));
        assert_eq!(seen(4, 2), (Value::Unsigned(4), 20), "one more restart is no reset");
        assert_eq!(seen(0, 3), (Value::Unsigned(0), 50));
    }

    #[test]
    fn labels_are_chosen_by_key_and_changes_are_seen_at_once() {
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
        let (choice, mut memory) = (AttributeChoice::default(), Memory::default());
        collect(&snapshot(), &choice, &mut memory);
        let mut changed = snapshot();
        changed.sandboxes[0].labels = BTreeMap::from([("team".into(), "web".into())]);
        let seen = of(&collect(&changed, &choice, &mut memory), Metric::Uptime).remove(0).attributes;
        assert_eq!((seen["team"].as_str(), seen.contains_key("job")), ("web", false));
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
        // Keys without end and labels without end are left out too, and counted.
        for number in 0..2 * KEYS_MAX {
            other.sandboxes[0].labels = BTreeMap::from([(format!("key{number}"), String::new())]);
            collect(&other, &choice, &mut memory);
        }
        assert_eq!(memory.values.len(), KEYS_MAX);
        other.sandboxes[0].labels = (0..8).map(|at| (format!("big{at}"), "x".repeat(4096))).collect();
        assert!(collect(&other, &AttributeChoice::default(), &mut memory).attributes_dropped >= 4);
    }

    #[test]
    fn the_last_sample_of_a_run_is_sent_once_and_a_new_run_is_sent_again() {
        let mut memory = Memory::default();
        let mut ended = snapshot();
        ended.sandboxes[0].last = true;
        let sent = |snapshot: &MetricsSnapshot, memory: &mut Memory| {
            let collection = collect(snapshot, &AttributeChoice::default(), memory).keep_new();
            !of(&collection, Metric::Uptime).is_empty()
        };
        assert!(sent(&snapshot(), &mut memory));
        assert!(sent(&ended, &mut memory));
        assert!(!sent(&ended, &mut memory));
        ended.sandboxes[0].boot_id = BootId(uuid::Uuid::from_u128(3));
        assert!(sent(&ended, &mut memory));
    }

    #[test]
    fn a_sample_is_exported_once_and_shown_until_it_is_old() {
        let (choice, mut memory) = (AttributeChoice::default(), Memory::default());
        assert_eq!(collect(&snapshot(), &choice, &mut memory).keep_new().readings.len(), 1);
        let same = collect(&snapshot(), &choice, &mut memory);
        assert_eq!((same.clone().keep_new().readings.len(), same.keep_current().readings.len()), (0, 1));
        let mut silent = snapshot();
        silent.taken_at = jiff::Timestamp::from_second(120).unwrap();
        assert!(collect(&silent, &choice, &mut memory).keep_current().readings.is_empty());
    }
}
