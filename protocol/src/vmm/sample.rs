//! The counters of a VM and how they come to the daemon: in JSON, or in a compact form for a connection that asked for
//! it ([`Request::Subscribe`](super::Request::Subscribe)). Both are frames of the VMM border; a JSON body begins with
//! `{`, which no compact one does.
//!
//! ```text
//!  compact: head (run, names of the network's counters) + figures │ figures │ figures │ …
//! ```
//!
//! The names go along with the first sample of a connection, and again when there are other ones: of a thousand VMs
//! that send each second, names would be the larger part. Called by `msb-vmm` and `msbd`; what is decoded here is the
//! VM process's and bounded.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Event, Message};
use crate::frame::{FrameError, decode_json, decode_message, encode_message};
use crate::id::BootId;

/// Counters of the network of one VM; further ones are left out.
pub const NETWORK_COUNTS_MAX: usize = 128;
/// Bytes of all their names on the wire.
const NAMES_LEN_MAX: usize = 16 << 10;

/// Counters of a VM, cumulative since its boot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When, nanoseconds since 1970.
    pub at_ns: u64,
    /// When the counters began at zero, nanoseconds since 1970: the same in every sample of a run. 0 if not told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub started_at_ns: u64,
    /// Time since the VM started in milliseconds.
    pub uptime_ms: u64,
    /// Time the vCPU threads ran, in microseconds.
    pub cpu_time_us: u64,
    /// Memory the guest was given, in bytes.
    pub memory_limit_bytes: u64,
    /// Memory of the guest that the host holds, in bytes.
    pub memory_resident_bytes: u64,
    /// Bytes read from all disks.
    pub disk_read_bytes: u64,
    /// Bytes written to all disks.
    pub disk_written_bytes: u64,
    /// Read requests.
    pub disk_read_operations: u64,
    /// Write requests.
    pub disk_write_operations: u64,
    /// Bytes the host allocates for the writable disk.
    pub root_allocated_bytes: u64,
    /// Bytes the guest received.
    pub network_received_bytes: u64,
    /// Bytes the guest sent.
    pub network_sent_bytes: u64,
    /// Packets the guest received.
    pub network_received_packets: u64,
    /// Packets the guest sent.
    pub network_sent_packets: u64,
    /// Connections and flows through published ports that were opened since the boot.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub network_inbound_opened: u64,
    /// Connections and flows through published ports that are open now.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub network_inbound_open: u64,
    /// The network's other counters, each under the name of its metric.
    #[serde(default, skip_serializing_if = "NetworkCounts::is_empty")]
    pub network: NetworkCounts,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One counter of the network, as JSON shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkCount {
    /// Name of the metric.
    pub metric: String,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
    /// Its value: since the boot, or now where the metric is a gauge.
    pub value: u64,
}

/// Which counter of the network.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct NetworkName {
    /// Name of the metric.
    #[prost(string, tag = "1")]
    pub metric: String,
    /// Its attributes.
    #[prost(btree_map = "string, string", tag = "2")]
    pub attributes: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NameList {
    #[prost(message, repeated, tag = "1")]
    names: Vec<NetworkName>,
}

/// The names of a VM's network counters, in their order: the same from one sample to the next, so samples share them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkNames {
    names: Vec<NetworkName>,
    wire: Bytes,
}

impl NetworkNames {
    /// Takes names; those beyond [`NETWORK_COUNTS_MAX`] are left out.
    #[must_use]
    pub fn new(names: impl IntoIterator<Item = NetworkName>) -> Self {
        let list = NameList { names: names.into_iter().take(NETWORK_COUNTS_MAX).collect() };
        let wire = list.encode_to_vec().into();
        Self { names: list.names, wire }
    }

    /// Reads them as they are on the wire.
    ///
    /// # Errors
    /// `Malformed` for anything else, and for too many.
    pub fn from_wire(wire: Bytes) -> Result<Self, FrameError> {
        let list: NameList = decode_message(&wire)?;
        let fits = wire.len() <= NAMES_LEN_MAX && list.names.len() <= NETWORK_COUNTS_MAX;
        if fits { Ok(Self { names: list.names, wire }) } else { Err(FrameError::Malformed) }
    }

    /// As they are on the wire.
    #[must_use]
    pub fn wire(&self) -> &Bytes {
        &self.wire
    }
}

/// The counters of a VM's network: names, which samples share, and a value for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkCounts {
    names: Arc<NetworkNames>,
    values: Arc<[u64]>,
}

impl NetworkCounts {
    /// Takes a value for each name; none if there are more or fewer.
    #[must_use]
    pub fn new(names: Arc<NetworkNames>, values: &[u64]) -> Option<Self> {
        (names.names.len() == values.len()).then(|| Self { names, values: values.into() })
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Their names.
    #[must_use]
    pub fn names(&self) -> &Arc<NetworkNames> {
        &self.names
    }

    /// Their values, in the order of the names.
    #[must_use]
    pub fn values(&self) -> &[u64] {
        &self.values
    }

    /// Each with its name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&NetworkName, u64)> {
        self.names.names.iter().zip(self.values.iter().copied())
    }
}

impl FromIterator<NetworkCount> for NetworkCounts {
    fn from_iter<I: IntoIterator<Item = NetworkCount>>(counts: I) -> Self {
        let pair = |NetworkCount { metric, attributes, value }| (NetworkName { metric, attributes }, value);
        let (names, values): (Vec<_>, Vec<_>) = counts.into_iter().take(NETWORK_COUNTS_MAX).map(pair).unzip();
        Self { names: Arc::new(NetworkNames::new(names)), values: values.into() }
    }
}

impl Serialize for NetworkCounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Count<'a> {
            metric: &'a str,
            attributes: &'a BTreeMap<String, String>,
            value: u64,
        }
        serializer.collect_seq(self.iter().map(|(name, value)| Count {
            metric: &name.metric,
            attributes: &name.attributes,
            value,
        }))
    }
}

impl<'de> Deserialize<'de> for NetworkCounts {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Vec::<NetworkCount>::deserialize(from)?.into_iter().collect())
    }
}

/// The figures of a sample without the names of its network's counters.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SampleFigures {
    /// [`Sample::at_ns`].
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
    /// [`Sample::started_at_ns`].
    #[prost(uint64, tag = "2")]
    pub started_at_ns: u64,
    /// [`Sample::uptime_ms`].
    #[prost(uint64, tag = "3")]
    pub uptime_ms: u64,
    /// [`Sample::cpu_time_us`].
    #[prost(uint64, tag = "4")]
    pub cpu_time_us: u64,
    /// [`Sample::memory_limit_bytes`].
    #[prost(uint64, tag = "5")]
    pub memory_limit_bytes: u64,
    /// [`Sample::memory_resident_bytes`].
    #[prost(uint64, tag = "6")]
    pub memory_resident_bytes: u64,
    /// [`Sample::disk_read_bytes`].
    #[prost(uint64, tag = "7")]
    pub disk_read_bytes: u64,
    /// [`Sample::disk_written_bytes`].
    #[prost(uint64, tag = "8")]
    pub disk_written_bytes: u64,
    /// [`Sample::disk_read_operations`].
    #[prost(uint64, tag = "9")]
    pub disk_read_operations: u64,
    /// [`Sample::disk_write_operations`].
    #[prost(uint64, tag = "10")]
    pub disk_write_operations: u64,
    /// [`Sample::root_allocated_bytes`].
    #[prost(uint64, tag = "11")]
    pub root_allocated_bytes: u64,
    /// [`Sample::network_received_bytes`].
    #[prost(uint64, tag = "12")]
    pub network_received_bytes: u64,
    /// [`Sample::network_sent_bytes`].
    #[prost(uint64, tag = "13")]
    pub network_sent_bytes: u64,
    /// [`Sample::network_received_packets`].
    #[prost(uint64, tag = "14")]
    pub network_received_packets: u64,
    /// [`Sample::network_sent_packets`].
    #[prost(uint64, tag = "15")]
    pub network_sent_packets: u64,
    /// [`Sample::network_inbound_opened`].
    #[prost(uint64, tag = "16")]
    pub network_inbound_opened: u64,
    /// [`Sample::network_inbound_open`].
    #[prost(uint64, tag = "17")]
    pub network_inbound_open: u64,
    /// A value for each of the names.
    #[prost(uint64, repeated, tag = "18")]
    pub network: Vec<u64>,
}

impl From<&Sample> for SampleFigures {
    fn from(sample: &Sample) -> Self {
        Self {
            at_ns: sample.at_ns,
            started_at_ns: sample.started_at_ns,
            uptime_ms: sample.uptime_ms,
            cpu_time_us: sample.cpu_time_us,
            memory_limit_bytes: sample.memory_limit_bytes,
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
            network_inbound_opened: sample.network_inbound_opened,
            network_inbound_open: sample.network_inbound_open,
            network: sample.network.values().to_vec(),
        }
    }
}

impl SampleFigures {
    /// The sample whose network's counters have these names.
    ///
    /// # Errors
    /// `Malformed` if there are more or fewer names than values.
    pub fn named(self, names: Arc<NetworkNames>) -> Result<Sample, FrameError> {
        let network = NetworkCounts::new(names, &self.network).ok_or(FrameError::Malformed)?;
        Ok(self.counting(network))
    }

    fn counting(self, network: NetworkCounts) -> Sample {
        Sample {
            network,
            at_ns: self.at_ns,
            started_at_ns: self.started_at_ns,
            uptime_ms: self.uptime_ms,
            cpu_time_us: self.cpu_time_us,
            memory_limit_bytes: self.memory_limit_bytes,
            memory_resident_bytes: self.memory_resident_bytes,
            disk_read_bytes: self.disk_read_bytes,
            disk_written_bytes: self.disk_written_bytes,
            disk_read_operations: self.disk_read_operations,
            disk_write_operations: self.disk_write_operations,
            root_allocated_bytes: self.root_allocated_bytes,
            network_received_bytes: self.network_received_bytes,
            network_sent_bytes: self.network_sent_bytes,
            network_received_packets: self.network_received_packets,
            network_sent_packets: self.network_sent_packets,
            network_inbound_opened: self.network_inbound_opened,
            network_inbound_open: self.network_inbound_open,
        }
    }
}

/// A compact sample on the wire.
#[derive(Clone, PartialEq, prost::Message)]
struct SampleFrame {
    #[prost(message, optional, tag = "1")]
    head: Option<SampleHead>,
    #[prost(message, optional, tag = "2")]
    figures: Option<SampleFigures>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SampleHead {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    boot_id: Vec<u8>,
    #[prost(bytes = "bytes", tag = "2")]
    network_names: Bytes,
}

/// Writes the compact samples of one connection.
#[derive(Debug, Default)]
pub struct SampleEncoder {
    told: Option<Arc<NetworkNames>>,
}

impl SampleEncoder {
    /// Appends a frame.
    ///
    /// # Errors
    /// `TooLong`.
    pub fn encode(&mut self, boot_id: BootId, sample: &Sample, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let names = sample.network.names();
        let head = (self.told.as_ref() != Some(names)).then(|| {
            self.told = Some(Arc::clone(names));
            SampleHead { boot_id: boot_id.0.as_bytes().to_vec(), network_names: names.wire().clone() }
        });
        encode_message(&SampleFrame { head, figures: Some(sample.into()) }, out)
    }
}

/// Reads the samples of one connection, of either form.
#[derive(Debug, Default)]
pub struct SampleDecoder {
    head: Option<(BootId, Arc<NetworkNames>)>,
    /// What was counted last.
    counts: NetworkCounts,
}

impl SampleDecoder {
    /// The sample in a frame's body and its run; none if something else is in it.
    ///
    /// # Errors
    /// `Malformed`.
    pub fn decode(&mut self, body: &[u8]) -> Result<Option<(BootId, Sample)>, FrameError> {
        if body.first() == Some(&b'{') {
            return Ok(match decode_json(body)? {
                Message::Event { event: Event::Sampled { boot_id, sample } } => Some((boot_id, *sample)),
                Message::Event { .. } | Message::Reply { .. } => None,
            });
        }
        let SampleFrame { head, figures } = decode_message(body)?;
        if let Some(SampleHead { boot_id, network_names }) = head {
            let boot_id = uuid::Uuid::from_slice(&boot_id).map_err(|_| FrameError::Malformed)?;
            self.head = Some((BootId(boot_id), Arc::new(NetworkNames::from_wire(network_names)?)));
        }
        let (Some((boot_id, names)), Some(figures)) = (&self.head, figures) else {
            return Err(FrameError::Malformed);
        };
        // Of most sandboxes nothing of it has changed: samples share the values then.
        if self.counts.values[..] != figures.network[..] || !Arc::ptr_eq(&self.counts.names, names) {
            self.counts = NetworkCounts::new(Arc::clone(names), &figures.network).ok_or(FrameError::Malformed)?;
        }
        Ok(Some((*boot_id, figures.counting(self.counts.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{Decoder, encode_json};

    fn count(metric: &str, value: u64) -> NetworkCount {
        NetworkCount { metric: metric.into(), attributes: BTreeMap::from([("a".into(), "b".into())]), value }
    }

    fn body(wire: &[u8]) -> Vec<u8> {
        let mut decoder = Decoder::new();
        decoder.push(wire);
        decoder.next_body().unwrap().unwrap().to_vec()
    }

    #[test]
    fn names_go_along_once_and_again_when_there_are_others() {
        let boot_id = BootId(uuid::Uuid::from_u128(7));
        let (mut encoder, mut decoder, mut lengths) = (SampleEncoder::default(), SampleDecoder::default(), Vec::new());
        for counts in [vec![count("x", 1)], vec![count("x", 2)], vec![count("x", 3), count("y", 4)], vec![]] {
            let sample = Sample { at_ns: 9, network: counts.into_iter().collect(), ..Sample::default() };
            let mut wire = Vec::new();
            encoder.encode(boot_id, &sample, &mut wire).unwrap();
            lengths.push(wire.len());
            assert_eq!(decoder.decode(&body(&wire)).unwrap(), Some((boot_id, sample)));
        }
        assert!(lengths[1] + 20 < lengths[0] && lengths[2] > lengths[0], "{lengths:?}");
        // One who came later has not heard the names.
        let mut wire = Vec::new();
        encoder.encode(boot_id, &Sample::default(), &mut wire).unwrap();
        assert_eq!(SampleDecoder::default().decode(&body(&wire)), Err(FrameError::Malformed));
    }

    #[test]
    fn both_forms_are_understood_on_one_connection() {
        let boot_id = BootId(uuid::Uuid::from_u128(7));
        let sample = Sample { at_ns: 9, network: [count("x", 1)].into_iter().collect(), ..Sample::default() };
        let mut decoder = SampleDecoder::default();
        let mut wire = Vec::new();
        let event = Event::Sampled { boot_id, sample: Box::new(sample.clone()) };
        encode_json(&Message::Event { event }, &mut wire).unwrap();
        assert_eq!(decoder.decode(&body(&wire)).unwrap(), Some((boot_id, sample.clone())));
        wire.clear();
        SampleEncoder::default().encode(boot_id, &sample, &mut wire).unwrap();
        assert_ne!(body(&wire)[0], b'{');
        assert_eq!(decoder.decode(&body(&wire)).unwrap(), Some((boot_id, sample)));
        wire.clear();
        encode_json(&Message::Reply { id: 1, result: Ok(crate::vmm::Reply::Done) }, &mut wire).unwrap();
        assert_eq!(decoder.decode(&body(&wire)).unwrap(), None);
    }

    #[test]
    fn more_names_than_anybody_has_are_refused_and_so_are_values_without_one() {
        let many = (0..=NETWORK_COUNTS_MAX).map(|at| NetworkName { metric: at.to_string(), ..NetworkName::default() });
        let list = NameList { names: many.collect() };
        assert_eq!(NetworkNames::from_wire(list.encode_to_vec().into()), Err(FrameError::Malformed));
        let long = NetworkName { metric: "x".repeat(NAMES_LEN_MAX), ..NetworkName::default() };
        let list = NameList { names: vec![long] };
        assert_eq!(NetworkNames::from_wire(list.encode_to_vec().into()), Err(FrameError::Malformed));
        let figures = SampleFigures { network: vec![1], ..SampleFigures::default() };
        assert_eq!(figures.named(Arc::default()), Err(FrameError::Malformed));
        assert_eq!((0..1_000).map(|at| count("x", at)).collect::<NetworkCounts>().values().len(), NETWORK_COUNTS_MAX);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_sample_or_an_error_never_a_panic(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4)) {
            let mut decoder = SampleDecoder::default();
            for body in bodies {
                let _ = decoder.decode(&body);
            }
        }
    }
}
