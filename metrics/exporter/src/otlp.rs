//! Collections as OTLP messages (opentelemetry-proto 1.x, `metrics/v1/metrics.proto`). Pure. The SDK cannot carry the times at which
//! points were sampled, so the messages are made here; only the exporter's own metrics go through the SDK.
//!
//! One collection becomes as many requests as it takes to stay far below what collectors accept by default (4 MiB). The last reading
//! of a run is followed by points without a value (`NO_RECORDED_VALUE`): backends mark such a series stale at once.
//!
//! A thousand sandboxes make 30,000 points a second, so points are written as bytes at once: the attributes of a sandbox are encoded
//! once for all of its points, and no message of a point is ever built. The numbers of the fields are those of the official
//! definitions, by which the tests read what comes out.

use std::collections::BTreeMap;

use bytes::Bytes;
use msb_metrics::{Kind, Metric};
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1 as wire;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::point::{Collection, Host, Point, Reading, Value};

/// Name of the instrumentation scope, as dashboards of microsandbox know it.
pub(crate) const SCOPE: &str = "microsandbox-metrics-collector";
/// Bytes at which a request is full. A single sandbox with the most and longest labels stays below it by itself.
const REQUEST_BYTES: usize = 1 << 20;
/// Bytes of a point without its attributes: about.
const POINT_BYTES: usize = 48;
/// How long after the last point its series is marked stale, in nanoseconds.
const STALE_AFTER_NS: u64 = 1_000_000;
/// Bytes of a key and a 64-bit number.
const FIXED_BYTES: usize = 9;

/// How many readings from `first` on fit into one request, at least one.
fn readings_that_fit(readings: &[Reading]) -> usize {
    let mut bytes = 0;
    let fit = readings.iter().take_while(|reading| {
        bytes += reading.points_len() * (POINT_BYTES + reading.attribute_bytes());
        bytes <= REQUEST_BYTES
    });
    fit.count().max(1).min(readings.len())
}

/// The request that carries the readings of a collection from `first` on, encoded, and the place where the next one begins. The points of
/// the daemon go with the first request. None when nothing is left.
pub(crate) fn request(
    collection: &Collection,
    first: usize,
    resource: &BTreeMap<String, String>,
) -> Option<(Bytes, usize)> {
    let rest = collection.readings.get(first..).filter(|rest| first == 0 || !rest.is_empty())?;
    let next = first + readings_that_fit(rest);
    let mut points = Points::default();
    for reading in &collection.readings[first..next] {
        points.begin(reading);
        collection.points_of(reading, |point| points.push(&point));
    }
    if first == 0 {
        points.attributes.clear();
        collection.daemon_points(|point| points.push(&point));
    }
    let attributes = resource_attributes("microsandbox", &collection.host, resource);
    let attributes = attributes.iter().map(|(key, value)| key_value(key, value)).collect();
    let resource = Resource { attributes, ..Default::default() }.encode_to_vec();
    // A collection without readings is one request; the place behind it ends the loop.
    Some((points.request(&resource), next.max(1)))
}

/// The points of a request by metric, encoded: `repeated NumberDataPoint data_points = 1`.
#[derive(Default)]
struct Points {
    by_metric: BTreeMap<Metric, Vec<u8>>,
    /// `repeated KeyValue attributes = 7` of the sandbox whose points come now.
    attributes: Vec<u8>,
    /// Those of one point.
    extra: Vec<u8>,
}

impl Points {
    /// From now on the points of this reading come.
    fn begin(&mut self, reading: &Reading) {
        self.attributes.clear();
        for (key, value) in reading.attributes() {
            put_attribute(key, value, &mut self.attributes);
        }
    }

    fn push(&mut self, point: &Point<'_>) {
        self.extra.clear();
        for (key, value) in point.extra.iter().flatten() {
            put_attribute(key, value, &mut self.extra);
        }
        let out = self.by_metric.entry(point.metric).or_default();
        put_point(point, point.time_ns, Some(point.value), &self.attributes, &self.extra, out);
        if point.is_last {
            put_point(point, point.time_ns + STALE_AFTER_NS, None, &self.attributes, &self.extra, out);
        }
    }

    /// The whole: `ExportMetricsServiceRequest { resource_metrics = 1 { resource = 1, scope_metrics = 2 { scope = 1, metrics = 2 } } }`.
    fn request(&self, resource: &[u8]) -> Bytes {
        let scope = InstrumentationScope {
            name: SCOPE.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        let scope = scope.encode_to_vec();
        // Every length stands before what it is of, so they are counted first and nothing is copied twice.
        let heads: Vec<_> =
            self.by_metric.iter().map(|(metric, points)| (metric_head(*metric, points.len()), points)).collect();
        let metrics_len: usize = heads.iter().map(|(head, points)| nested_len(head.len() + points.len())).sum();
        let scope_metrics_len = nested_len(scope.len()) + metrics_len;
        let resource_metrics_len = nested_len(resource.len()) + nested_len(scope_metrics_len);
        let mut out = Vec::with_capacity(nested_len(resource_metrics_len));
        put_head(1, resource_metrics_len, &mut out);
        put_nested(1, resource, &mut out);
        put_head(2, scope_metrics_len, &mut out);
        put_nested(1, &scope, &mut out);
        for (head, points) in heads {
            put_head(2, head.len() + points.len(), &mut out);
            out.extend_from_slice(&head);
            out.extend_from_slice(points);
        }
        out.into()
    }
}

/// A `Metric` up to its points, which are the end of its `gauge = 5` or `sum = 7`.
fn metric_head(metric: Metric, points_len: usize) -> Vec<u8> {
    let definition = metric.definition();
    let mut head = wire::Metric {
        name: definition.name.into(),
        description: definition.meaning.into(),
        unit: definition.unit.as_str().into(),
        ..Default::default()
    }
    .encode_to_vec();
    match definition.kind {
        Kind::Gauge => put_head(5, points_len, &mut head),
        Kind::Counter => {
            let sum = wire::Sum {
                data_points: Vec::new(),
                aggregation_temporality: wire::AggregationTemporality::Cumulative as i32,
                is_monotonic: true,
            };
            let sum = sum.encode_to_vec();
            put_head(7, sum.len() + points_len, &mut head);
            head.extend_from_slice(&sum);
        }
    }
    head
}

/// One `NumberDataPoint`; without a value it says that none was recorded.
fn put_point(
    point: &Point<'_>,
    time_ns: u64,
    value: Option<Value>,
    attributes: &[u8],
    extra: &[u8],
    out: &mut Vec<u8>,
) {
    const FLAGS_BYTES: usize = 2;
    let start_len = if point.start_ns == 0 { 0 } else { FIXED_BYTES };
    let end_len = if value.is_some() { FIXED_BYTES } else { FLAGS_BYTES };
    put_head(1, start_len + FIXED_BYTES + end_len + attributes.len() + extra.len(), out);
    let mut fixed = |tag, bytes: [u8; 8]| {
        encode_key(tag, WireType::SixtyFourBit, out);
        out.extend_from_slice(&bytes);
    };
    if point.start_ns != 0 {
        fixed(2, point.start_ns.to_le_bytes());
    }
    fixed(3, time_ns.to_le_bytes());
    match value {
        // OTLP has no unsigned numbers; what does not fit is far beyond anything measured.
        Some(Value::Unsigned(value)) => fixed(6, i64::try_from(value).unwrap_or(i64::MAX).to_le_bytes()),
        Some(Value::Float(value)) => fixed(4, value.to_le_bytes()),
        None => {
            encode_key(8, WireType::Varint, out);
            encode_varint(wire::DataPointFlags::NoRecordedValueMask as u64, out);
        }
    }
    out.extend_from_slice(attributes);
    out.extend_from_slice(extra);
}

/// `KeyValue attributes = 7 { key = 1, value = 2 { string_value = 1 } }`.
fn put_attribute(key: &str, value: &str, out: &mut Vec<u8>) {
    let value_len = nested_len(value.len());
    put_head(7, nested_len(key.len()) + nested_len(value_len), out);
    put_nested(1, key.as_bytes(), out);
    put_head(2, value_len, out);
    put_nested(1, value.as_bytes(), out);
}

/// Bytes of a field below 16 that holds so many bytes.
fn nested_len(len: usize) -> usize {
    1 + encoded_len_varint(len as u64) + len
}

fn put_head(tag: u32, len: usize, out: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
}

fn put_nested(tag: u32, content: &[u8], out: &mut Vec<u8>) {
    put_head(tag, content.len(), out);
    out.extend_from_slice(content);
}

/// Who sends: this service on this host, and what the user says over that.
pub(crate) fn resource_attributes(
    service: &str,
    host: &Host,
    resource: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::from([
        ("service.name".to_owned(), service.to_owned()),
        ("service.instance.id".to_owned(), host.instance_id.clone()),
        ("host.id".to_owned(), host.host_id.clone()),
        ("host.name".to_owned(), host.host_name.clone()),
    ]);
    attributes.extend(resource.iter().map(|(key, value)| (key.clone(), value.clone())));
    attributes
}

fn key_value(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;

    use super::*;
    use crate::collect::tests::{fleet, snapshot};
    use crate::collect::{AttributeChoice, Memory, collect};

    /// As a backend reads it.
    fn request(
        collection: &Collection,
        first: usize,
        resource: &BTreeMap<String, String>,
    ) -> Option<(ExportMetricsServiceRequest, usize)> {
        let (bytes, next) = super::request(collection, first, resource)?;
        let read = ExportMetricsServiceRequest::decode(bytes.clone()).unwrap();
        // Nothing in it that the definitions do not know.
        assert_eq!(read.encoded_len(), bytes.len());
        Some((read, next))
    }

    fn sums<'a>(request: &'a ExportMetricsServiceRequest, name: &str) -> Vec<&'a wire::NumberDataPoint> {
        let metrics = &request.resource_metrics[0].scope_metrics[0].metrics;
        let mut found = Vec::new();
        for metric in metrics.iter().filter(|metric| metric.name == name) {
            match metric.data.as_ref().unwrap() {
                wire::metric::Data::Sum(sum) => found.extend(&sum.data_points),
                wire::metric::Data::Gauge(gauge) => found.extend(&gauge.data_points),
                _ => panic!("neither sum nor gauge"),
            }
        }
        found
    }

    #[test]
    fn a_request_has_the_resource_the_scope_and_each_metric_once() {
        let collection = collect(&snapshot(), &AttributeChoice::default(), &mut Memory::default());
        let extra = BTreeMap::from([("deployment.environment".to_owned(), "test".to_owned())]);
        let (request, next) = request(&collection, 0, &extra).unwrap();
        assert!(super::request(&collection, next, &extra).is_none());
        let resource = &request.resource_metrics[0];
        let keys: Vec<_> = resource.resource.as_ref().unwrap().attributes.iter().map(|a| a.key.as_str()).collect();
        assert_eq!(keys, ["deployment.environment", "host.id", "host.name", "service.instance.id", "service.name"]);
        let metrics = &resource.scope_metrics[0].metrics;
        let mut names: Vec<_> = metrics.iter().map(|m| m.name.as_str()).collect();
        names.dedup();
        assert_eq!(names.len(), metrics.len());
        let io = metrics.iter().find(|m| m.name == "microsandbox.disk.io").unwrap();
        let Some(wire::metric::Data::Sum(sum)) = &io.data else { panic!("a sum") };
        assert!(sum.is_monotonic && sum.data_points.len() == 2);
        assert_eq!(sum.data_points[0].start_time_unix_nano, 50_000_000_000);
        assert_eq!(sum.data_points[0].time_unix_nano, 100_500_000_000);
        assert_eq!(sum.data_points[0].flags, 0);
    }

    #[test]
    fn the_last_point_of_a_run_is_followed_by_one_without_a_value() {
        let mut ended = snapshot();
        ended.sandboxes[0].last = true;
        let collection = collect(&ended, &AttributeChoice::default(), &mut Memory::default());
        let (request, _) = request(&collection, 0, &BTreeMap::new()).unwrap();
        let points = sums(&request, "microsandbox.uptime");
        assert_eq!(points.len(), 2);
        assert_eq!((points[0].flags, points[0].value.is_some()), (0, true));
        assert_eq!((points[1].flags, points[1].value.is_some()), (1, false));
        assert!(points[1].time_unix_nano > points[0].time_unix_nano && points[1].attributes == points[0].attributes);
        assert_eq!(sums(&request, "microsandbox.sandboxes").len(), 1, "the daemon goes on");
    }

    #[test]
    fn a_large_fleet_goes_out_in_pieces_that_collectors_accept_and_nothing_is_left_out() {
        let collection = collect(&fleet(1_000, 7), &AttributeChoice::default(), &mut Memory::default());
        let (mut first, mut names, mut requests) = (0, std::collections::BTreeSet::new(), 0);
        while let Some((request, next)) = request(&collection, first, &BTreeMap::new()) {
            assert!(request.encoded_len() < 2 << 20, "{}", request.encoded_len());
            for point in sums(&request, "microsandbox.uptime") {
                let name = point.attributes.iter().find(|attribute| attribute.key == "sandbox.name").unwrap();
                assert!(names.insert(format!("{:?}", name.value)));
            }
            (first, requests) = (next, requests + 1);
        }
        assert_eq!(names.len(), 1_000);
        assert!((2..50).contains(&requests), "{requests}");
    }

    #[test]
    fn a_fleet_of_nobody_is_one_request() {
        let collection = collect(&fleet(0, 7), &AttributeChoice::default(), &mut Memory::default());
        let (request, next) = request(&collection, 0, &BTreeMap::new()).unwrap();
        assert_eq!(sums(&request, "microsandbox.sandboxes").len(), 1);
        assert!(super::request(&collection, next, &BTreeMap::new()).is_none());
    }
}
