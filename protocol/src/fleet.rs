//! The compact form of a [`MetricsSnapshot`]: protobuf, for a client that asks for it (`Accept:` [`FLEET_MEDIA_TYPE`])
//! each second, as `msb-metrics` does. The JSON of the control API says the same and is what everybody else gets.
//!
//! ```text
//!  Fleet: head │ row │ row │ …          a row: who it is (made when that changes) + figures (made each time)
//! ```
//!
//! Parts of a protobuf message can be made apart and put one behind the other. What is said of a sandbox beside its
//! figures changes with its state, so whoever answers makes that part once ([`Who::encode`]) and copies it. The names of
//! the network's counters are those of the row before, unless others go along. Written by `msbd`, read by the SDK.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;
use uuid::Uuid;

use crate::control::{GuestMetrics, MetricsSnapshot, SandboxMetrics};
use crate::frame::FrameError;
use crate::id::{BootId, SandboxId, SandboxName};
use crate::state::SandboxState;
use crate::vmm::{NetworkNames, Phase, Sample, SampleFigures};

/// The media type of the compact form.
pub const FLEET_MEDIA_TYPE: &str = "application/vnd.msb.metrics+protobuf";

/// Tag of [`Fleet::rows`].
const ROWS_TAG: u32 = 6;

#[derive(Clone, PartialEq, prost::Message)]
struct Fleet {
    #[prost(string, tag = "1")]
    host_id: String,
    #[prost(string, tag = "2")]
    host_name: String,
    #[prost(string, tag = "3")]
    instance_id: String,
    #[prost(message, optional, tag = "4")]
    taken_at: Option<Time>,
    #[prost(btree_map = "string, uint64", tag = "5")]
    states: BTreeMap<String, u64>,
    #[prost(message, repeated, tag = "6")]
    rows: Vec<Row>,
    #[prost(btree_map = "string, uint64", tag = "7")]
    ready_forks: BTreeMap<String, u64>,
}

/// As google.protobuf.Timestamp.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(sint32, tag = "2")]
    nanoseconds: i32,
}

impl From<Timestamp> for Time {
    fn from(at: Timestamp) -> Self {
        Self { seconds: at.as_second(), nanoseconds: at.subsec_nanosecond() }
    }
}

fn timestamp(time: Option<Time>) -> Result<Timestamp, FrameError> {
    let time = time.unwrap_or_default();
    Timestamp::new(time.seconds, time.nanoseconds).map_err(|_| FrameError::Malformed)
}

/// The state of this name, which is that of the JSON form.
fn state(name: &str) -> Result<SandboxState, FrameError> {
    let from: StrDeserializer<'_, serde::de::value::Error> = name.into_deserializer();
    SandboxState::deserialize(from).map_err(|_| FrameError::Malformed)
}

#[derive(Clone, PartialEq, prost::Message)]
struct Row {
    // Who.
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "bytes", tag = "2")]
    id: Bytes,
    #[prost(string, tag = "3")]
    status: String,
    #[prost(btree_map = "string, string", tag = "4")]
    labels: BTreeMap<String, String>,
    #[prost(uint32, tag = "5")]
    restarts: u32,
    #[prost(message, optional, tag = "6")]
    created_at: Option<Time>,
    #[prost(message, repeated, tag = "7")]
    boot_phases: Vec<PhaseWire>,
    // Figures.
    #[prost(bytes = "bytes", tag = "8")]
    boot_id: Bytes,
    #[prost(uint32, tag = "9")]
    vmm_pid: u32,
    #[prost(message, optional, tag = "10")]
    started_at: Option<Time>,
    #[prost(bool, tag = "11")]
    last: bool,
    #[prost(double, tag = "12")]
    cpu_utilization: f64,
    #[prost(message, optional, tag = "13")]
    guest: Option<GuestWire>,
    #[prost(message, optional, tag = "14")]
    sample: Option<SampleFigures>,
    /// Those of the row before, if absent.
    #[prost(bytes = "bytes", optional, tag = "15")]
    network_names: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PhaseWire {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    duration_us: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct GuestWire {
    #[prost(uint64, tag = "1")]
    memory_used_bytes: u64,
    #[prost(uint64, tag = "2")]
    memory_total_bytes: u64,
    #[prost(uint64, tag = "3")]
    root_used_bytes: u64,
    #[prost(uint64, tag = "4")]
    root_free_bytes: u64,
    #[prost(uint32, tag = "5")]
    processes: u32,
}

/// What is said of a sandbox beside its figures.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    /// [`SandboxMetrics::name`].
    pub name: &'a SandboxName,
    /// [`SandboxMetrics::id`].
    pub id: SandboxId,
    /// [`SandboxMetrics::status`].
    pub status: SandboxState,
    /// [`SandboxMetrics::labels`].
    pub labels: &'a BTreeMap<String, String>,
    /// [`SandboxMetrics::restarts`].
    pub restarts: u32,
    /// [`SandboxMetrics::created_at`].
    pub created_at: Timestamp,
    /// [`SandboxMetrics::boot_phases`].
    pub boot_phases: &'a [Phase],
}

impl Who<'_> {
    /// This part of a row.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let phase = |phase: &Phase| PhaseWire { name: phase.name.clone(), duration_us: phase.duration_us };
        Row {
            name: self.name.to_string(),
            id: Bytes::copy_from_slice(self.id.0.as_bytes()),
            status: self.status.as_str().to_owned(),
            labels: self.labels.clone(),
            restarts: self.restarts,
            created_at: Some(self.created_at.into()),
            boot_phases: self.boot_phases.iter().map(phase).collect(),
            ..Row::default()
        }
        .encode_to_vec()
    }
}

/// The figures of a sandbox.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// [`SandboxMetrics::boot_id`].
    pub boot_id: BootId,
    /// [`SandboxMetrics::vmm_pid`].
    pub vmm_pid: u32,
    /// [`SandboxMetrics::started_at`].
    pub started_at: Timestamp,
    /// [`SandboxMetrics::last`].
    pub last: bool,
    /// [`SandboxMetrics::cpu_utilization`].
    pub cpu_utilization: f64,
    /// [`SandboxMetrics::guest`].
    pub guest: Option<GuestMetrics>,
    /// [`SandboxMetrics::sample`].
    pub sample: &'a Sample,
}

/// Writes a snapshot row by row.
#[derive(Debug)]
pub struct FleetWriter {
    out: Vec<u8>,
    /// The names that went along last.
    names: Option<Bytes>,
}

impl FleetWriter {
    /// Begins with everything but the rows of `snapshot`.
    #[must_use]
    pub fn new(snapshot: &MetricsSnapshot, bytes: usize) -> Self {
        let mut out = Vec::with_capacity(bytes);
        let fleet = Fleet {
            host_id: snapshot.host_id.clone(),
            host_name: snapshot.host_name.clone(),
            instance_id: snapshot.instance_id.clone(),
            taken_at: Some(snapshot.taken_at.into()),
            states: snapshot.states.clone(),
            ready_forks: snapshot.ready_forks.clone(),
            rows: Vec::new(),
        };
        // A Vec grows as needed, so encoding into it cannot run out of room; the same holds below.
        let _ = fleet.encode(&mut out);
        Self { out, names: None }
    }

    /// Adds a row; `who` is [`Who::encode`].
    pub fn row(&mut self, who: &[u8], figures: &Figures<'_>) {
        let guest = figures.guest.map(|guest| GuestWire {
            memory_used_bytes: guest.memory_used_bytes,
            memory_total_bytes: guest.memory_total_bytes,
            root_used_bytes: guest.root_used_bytes,
            root_free_bytes: guest.root_free_bytes,
            processes: guest.processes,
        });
        let names = figures.sample.network.names().wire();
        let network_names = (self.names.as_ref() != Some(names)).then(|| names.clone());
        if network_names.is_some() {
            self.names.clone_from(&network_names);
        }
        let row = Row {
            boot_id: Bytes::copy_from_slice(figures.boot_id.0.as_bytes()),
            vmm_pid: figures.vmm_pid,
            started_at: Some(figures.started_at.into()),
            last: figures.last,
            cpu_utilization: figures.cpu_utilization,
            guest,
            sample: Some(figures.sample.into()),
            network_names,
            ..Row::default()
        };
        encode_key(ROWS_TAG, WireType::LengthDelimited, &mut self.out);
        encode_varint((who.len() + row.encoded_len()) as u64, &mut self.out);
        self.out.extend_from_slice(who);
        let _ = row.encode(&mut self.out);
    }

    /// The whole.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// Writes a whole snapshot.
#[must_use]
pub fn encode(snapshot: &MetricsSnapshot) -> Vec<u8> {
    let mut writer = FleetWriter::new(snapshot, 0);
    for row in &snapshot.sandboxes {
        let who = Who {
            name: &row.name,
            id: row.id,
            status: row.status,
            labels: &row.labels,
            restarts: row.restarts,
            created_at: row.created_at,
            boot_phases: &row.boot_phases,
        };
        let figures = Figures {
            boot_id: row.boot_id,
            vmm_pid: row.vmm_pid,
            started_at: row.started_at,
            last: row.last,
            cpu_utilization: row.cpu_utilization,
            guest: row.guest,
            sample: &row.sample,
        };
        writer.row(&who.encode(), &figures);
    }
    writer.finish()
}

/// Reads a snapshot; its rows are sorted by name.
///
/// # Errors
/// `Malformed`.
pub fn decode(wire: Bytes) -> Result<MetricsSnapshot, FrameError> {
    let fleet = Fleet::decode(wire).map_err(|_| FrameError::Malformed)?;
    let mut names = Arc::<NetworkNames>::default();
    let mut sandboxes = Vec::with_capacity(fleet.rows.len());
    for mut row in fleet.rows {
        if let Some(others) = row.network_names.take() {
            names = Arc::new(NetworkNames::from_wire(others)?);
        }
        sandboxes.push(row.named(Arc::clone(&names))?);
    }
    sandboxes.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(MetricsSnapshot {
        host_id: fleet.host_id,
        host_name: fleet.host_name,
        instance_id: fleet.instance_id,
        taken_at: timestamp(fleet.taken_at)?,
        states: fleet.states,
        ready_forks: fleet.ready_forks,
        sandboxes,
    })
}

impl Row {
    fn named(self, names: Arc<NetworkNames>) -> Result<SandboxMetrics, FrameError> {
        let identity = |bytes: &[u8]| Uuid::from_slice(bytes).map_err(|_| FrameError::Malformed);
        let phase = |phase: PhaseWire| Phase { name: phase.name, duration_us: phase.duration_us };
        Ok(SandboxMetrics {
            name: SandboxName::parse(&self.name).map_err(|_| FrameError::Malformed)?,
            id: SandboxId(identity(&self.id)?),
            boot_id: BootId(identity(&self.boot_id)?),
            vmm_pid: self.vmm_pid,
            status: state(&self.status)?,
            labels: self.labels,
            restarts: self.restarts,
            created_at: timestamp(self.created_at)?,
            started_at: timestamp(self.started_at)?,
            last: self.last,
            sample: self.sample.unwrap_or_default().named(names)?,
            cpu_utilization: self.cpu_utilization,
            guest: self.guest.map(|guest| GuestMetrics {
                memory_used_bytes: guest.memory_used_bytes,
                memory_total_bytes: guest.memory_total_bytes,
                root_used_bytes: guest.root_used_bytes,
                root_free_bytes: guest.root_free_bytes,
                processes: guest.processes,
            }),
            boot_phases: self.boot_phases.into_iter().map(phase).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::NetworkCount;

    fn sandbox(number: u64) -> SandboxMetrics {
        let count = NetworkCount { metric: "dns".into(), attributes: BTreeMap::new(), value: number };
        SandboxMetrics {
            name: SandboxName::parse(&format!("s{number}")).unwrap(),
            id: SandboxId(Uuid::from_u128(number.into())),
            boot_id: BootId(Uuid::from_u128(u128::MAX - u128::from(number))),
            vmm_pid: 7,
            status: SandboxState::Running,
            labels: BTreeMap::from([("team".into(), "ml".into())]),
            restarts: 3,
            created_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            // Before 1970 its part of a second is negative.
            started_at: "1969-12-31T23:59:58.25Z".parse().unwrap(),
            last: number == 2,
            sample: Sample {
                at_ns: u64::MAX,
                started_at_ns: 1,
                uptime_ms: 2,
                cpu_time_us: 3,
                memory_limit_bytes: 4,
                memory_resident_bytes: 5,
                disk_read_bytes: 6,
                disk_written_bytes: 7,
                disk_read_operations: 8,
                disk_write_operations: 9,
                root_allocated_bytes: 10,
                network_received_bytes: 11,
                network_sent_bytes: 12,
                network_received_packets: 13,
                network_sent_packets: 14,
                network_inbound_opened: 15,
                network_inbound_open: 16,
                network: [count].into_iter().collect(),
            },
            cpu_utilization: 0.25,
            guest: (number != 1).then_some(GuestMetrics {
                memory_used_bytes: 1,
                memory_total_bytes: 2,
                root_used_bytes: 3,
                root_free_bytes: 4,
                processes: 5,
            }),
            boot_phases: vec![Phase { name: "kernel".into(), duration_us: 9 }],
        }
    }

    fn snapshot() -> MetricsSnapshot {
        MetricsSnapshot {
            host_id: "host".into(),
            host_name: "h1".into(),
            instance_id: "instance".into(),
            taken_at: "2026-01-02T03:04:05Z".parse().unwrap(),
            states: BTreeMap::from([("running".into(), 3)]),
            ready_forks: BTreeMap::from([("python".into(), 2)]),
            sandboxes: (1..4).map(sandbox).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read_and_says_what_json_says() {
        let snapshot = snapshot();
        let read = decode(encode(&snapshot).into()).unwrap();
        assert_eq!(read, snapshot);
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&snapshot).unwrap());
        let empty = MetricsSnapshot { sandboxes: Vec::new(), ..snapshot };
        assert_eq!(decode(encode(&empty).into()).unwrap(), empty);
    }

    #[test]
    fn rows_come_by_name_in_whatever_order_they_were_written() {
        let mut snapshot = snapshot();
        snapshot.sandboxes.reverse();
        let names: Vec<_> =
            decode(encode(&snapshot).into()).unwrap().sandboxes.iter().map(|row| row.name.to_string()).collect();
        assert_eq!(names, ["s1", "s2", "s3"]);
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        let wire = encode(&snapshot());
        assert_eq!(decode(wire[..wire.len() - 1].to_vec().into()), Err(FrameError::Malformed));
        for wrong in [
            Row { name: "s".into(), status: "running".into(), ..Row::default() },
            Row { name: "../s".into(), id: vec![0; 16].into(), ..Row::default() },
        ] {
            let fleet = Fleet { rows: vec![wrong], ..Fleet::default() };
            assert_eq!(decode(fleet.encode_to_vec().into()), Err(FrameError::Malformed));
        }
    }
}
