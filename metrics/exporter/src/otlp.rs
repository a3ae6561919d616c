//! Collections as OTLP messages (opentelemetry-proto 1.x, `metrics/v1/metrics.proto`). Pure. The SDK cannot carry the times at which
//! points were sampled, so the messages are made here; only the exporter's own metrics go through the SDK.
//!
//! One collection becomes as many requests as it takes to stay far below what collectors accept by default (4 MiB). The last reading
//! of a run is followed by points without a value (`NO_RECORDED_VALUE`): backends mark such a series stale at once.

use std::collections::BTreeMap;

use msb_metrics::{Kind, Metric};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1 as wire;
use opentelemetry_proto::tonic::resource::v1::Resource;

use crate::point::{Collection, Host, Point, Reading, Value};

/// Name of the instrumentation scope, as dashboards of microsandbox know it.
pub(crate) const SCOPE: &str = "microsandbox-metrics-collector";
/// Bytes at which a request is full. A single sandbox with the most and longest labels stays below it by itself.
const REQUEST_BYTES: usize = 1 << 20;
/// Bytes of a point without its attributes: about.
const POINT_BYTES: usize = 48;
/// How long after the last point its series is marked stale, in nanoseconds.
const STALE_AFTER_NS: u64 = 1_000_000;

/// How many readings from `first` on fit into one request, at least one.
fn readings_that_fit(readings: &[Reading]) -> usize {
    let mut bytes = 0;
    let fit = readings.iter().take_while(|reading| {
        bytes += reading.points_len() * (POINT_BYTES + reading.attribute_bytes());
        bytes <= REQUEST_BYTES
    });
    fit.count().max(1).min(readings.len())
}

/// The request that carries the readings of a collection from `first` on, and the place where the next one begins. The points of the
/// daemon go with the first request. None when nothing is left.
pub(crate) fn request(
    collection: &Collection,
    first: usize,
    resource: &BTreeMap<String, String>,
) -> Option<(ExportMetricsServiceRequest, usize)> {
    let rest = collection.readings.get(first..).filter(|rest| first == 0 || !rest.is_empty())?;
    let next = first + readings_that_fit(rest);
    let mut by_metric: BTreeMap<Metric, Vec<wire::NumberDataPoint>> = BTreeMap::new();
    let mut push = |point: Point<'_>| {
        let points = by_metric.entry(point.metric).or_default();
        points.push(data_point(&point));
        if point.is_last {
            points.push(stale(&point));
        }
    };
    for reading in &collection.readings[first..next] {
        reading.points(&mut push);
    }
    if first == 0 {
        collection.daemon_points(push);
    }
    let scope_metrics = wire::ScopeMetrics {
        scope: Some(InstrumentationScope {
            name: SCOPE.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        metrics: by_metric.into_iter().map(|(metric, points)| metric_of(metric, points)).collect(),
        ..Default::default()
    };
    let attributes = resource_attributes("microsandbox", &collection.host, resource);
    let attributes = attributes.iter().map(|(key, value)| key_value(key, value)).collect();
    let request = ExportMetricsServiceRequest {
        resource_metrics: vec![wire::ResourceMetrics {
            resource: Some(Resource { attributes, ..Default::default() }),
            scope_metrics: vec![scope_metrics],
            ..Default::default()
        }],
    };
    // A collection without readings is one request; the place behind it ends the loop.
    Some((request, next.max(1)))
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

fn metric_of(metric: Metric, data_points: Vec<wire::NumberDataPoint>) -> wire::Metric {
    let definition = metric.definition();
    let data = match definition.kind {
        Kind::Gauge => wire::metric::Data::Gauge(wire::Gauge { data_points }),
        Kind::Counter => wire::metric::Data::Sum(wire::Sum {
            data_points,
            aggregation_temporality: wire::AggregationTemporality::Cumulative as i32,
            is_monotonic: true,
        }),
    };
    wire::Metric {
        name: definition.name.into(),
        description: definition.meaning.into(),
        unit: definition.unit.as_str().into(),
        data: Some(data),
        ..Default::default()
    }
}

fn data_point(point: &Point<'_>) -> wire::NumberDataPoint {
    wire::NumberDataPoint {
        attributes: point.all_attributes().map(|(key, value)| key_value(key, value)).collect(),
        start_time_unix_nano: point.start_ns,
        time_unix_nano: point.time_ns,
        value: Some(match point.value {
            // OTLP has no unsigned numbers; what does not fit is far beyond anything measured.
            Value::Unsigned(value) => wire::number_data_point::Value::AsInt(i64::try_from(value).unwrap_or(i64::MAX)),
            Value::Float(value) => wire::number_data_point::Value::AsDouble(value),
        }),
        ..Default::default()
    }
}

fn stale(point: &Point<'_>) -> wire::NumberDataPoint {
    wire::NumberDataPoint {
        value: None,
        flags: wire::DataPointFlags::NoRecordedValueMask as u32,
        time_unix_nano: point.time_ns + STALE_AFTER_NS,
        ..data_point(point)
    }
}

fn key_value(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::collect::tests::{fleet, snapshot};
    use crate::collect::{AttributeChoice, Memory, collect};

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
