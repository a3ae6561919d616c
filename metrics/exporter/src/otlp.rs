//! Points as OTLP messages (opentelemetry-proto 1.x, `metrics/v1/metrics.proto`). Pure. The SDK cannot carry the times at which
//! points were sampled, so the messages are made here; only the exporter's own metrics go through the SDK.

use std::collections::BTreeMap;

use msb_metrics::{Kind, Metric};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1 as wire;
use opentelemetry_proto::tonic::resource::v1::Resource;

use crate::point::{Collection, Point, Value};

/// Name of the instrumentation scope, as dashboards of microsandbox know it.
pub(crate) const SCOPE: &str = "microsandbox-metrics-collector";

/// The request that carries one collection.
pub(crate) fn request(collection: &Collection, resource: &BTreeMap<String, String>) -> ExportMetricsServiceRequest {
    let mut attributes = BTreeMap::from([
        ("service.name".to_owned(), "microsandbox".to_owned()),
        ("service.instance.id".to_owned(), collection.instance_id.clone()),
        ("host.id".to_owned(), collection.host_id.clone()),
        ("host.name".to_owned(), collection.host_name.clone()),
    ]);
    attributes.extend(resource.iter().map(|(key, value)| (key.clone(), value.clone())));
    let mut by_metric: BTreeMap<Metric, Vec<wire::NumberDataPoint>> = BTreeMap::new();
    for point in &collection.points {
        by_metric.entry(point.metric).or_default().push(data_point(point));
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
    ExportMetricsServiceRequest {
        resource_metrics: vec![wire::ResourceMetrics {
            resource: Some(Resource { attributes: key_values(&attributes), ..Default::default() }),
            scope_metrics: vec![scope_metrics],
            ..Default::default()
        }],
    }
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

fn data_point(point: &Point) -> wire::NumberDataPoint {
    wire::NumberDataPoint {
        attributes: key_values(&point.attributes),
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

fn key_values(pairs: &BTreeMap<String, String>) -> Vec<KeyValue> {
    pairs
        .iter()
        .map(|(key, value)| KeyValue {
            key: key.clone(),
            value: Some(AnyValue { value: Some(any_value::Value::StringValue(value.clone())) }),
            ..Default::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::point::{AttributeChoice, Memory, collect, tests::snapshot};

    #[test]
    fn a_request_has_the_resource_the_scope_and_each_metric_once() {
        let collection = collect(&snapshot(), &AttributeChoice::default(), &mut Memory::default());
        let extra = BTreeMap::from([("deployment.environment".to_owned(), "test".to_owned())]);
        let request = request(&collection, &extra);
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
    }
}
