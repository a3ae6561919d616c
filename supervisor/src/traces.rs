//! The daemon's own traces: a span for each request of the control API, sent over OTLP when the environment names a collector. Called by
//! `main` once and by the router for each request. Without a collector nothing is set up and a span costs nothing.
//!
//! What is honoured is what opentelemetry-otlp honours: `OTEL_EXPORTER_OTLP_[TRACES_]{ENDPOINT,PROTOCOL,HEADERS,COMPRESSION,TIMEOUT}`,
//! and the SDK: `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`. A span carries the route and the sandbox's name, never
//! a body: environments and commands hold secrets.

use std::time::Duration;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use msb_actors::host_identity::HostIdentity;
use opentelemetry::trace::{Span as _, SpanKind, Status, Tracer as _};
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;

/// Name of the instrumentation scope and of the service.
const NAME: &str = "msbd";
/// Longest wait for the last spans at the end.
const FAREWELL: Duration = Duration::from_secs(2);

/// The traces of this process; they end with it.
#[derive(Debug, Default)]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Begins them if a collector is named. Must be called inside the runtime. A collector that cannot be used is a warning: sandboxes
    /// do not depend on it.
    #[must_use]
    pub fn begin(identity: &HostIdentity, variable: impl Fn(&str) -> Option<String>) -> Self {
        if !is_wanted(variable) {
            return Self(None);
        }
        // One TLS provider for the process; the exporter is built without one of its own.
        if rustls::crypto::ring::default_provider().install_default().is_err() {
            tracing::debug!("a TLS provider was installed already");
        }
        let exporter = match SpanExporter::builder().build() {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::warn!(%error, "traces are not sent");
                return Self(None);
            }
        };
        let resource = Resource::builder()
            .with_attributes([
                KeyValue::new("service.name", NAME),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", identity.instance_id.clone()),
                KeyValue::new("host.id", identity.host_id.clone()),
                KeyValue::new("host.name", identity.host_name.clone()),
            ])
            .build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        global::set_tracer_provider(provider.clone());
        Self(Some(provider))
    }

    /// Sends what is left. Blocks: the SDK waits for its own thread.
    pub fn end(&self) {
        if let Some(provider) = &self.0
            && let Err(error) = provider.shutdown_with_timeout(FAREWELL)
        {
            tracing::debug!(%error, "the last spans were not sent");
        }
    }
}

/// Whether a collector is named and nothing switches traces off.
fn is_wanted(variable: impl Fn(&str) -> Option<String>) -> bool {
    let is_set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    let is = |name: &str, word: &str| variable(name).is_some_and(|value| value.eq_ignore_ascii_case(word));
    (is_set("OTEL_EXPORTER_OTLP_ENDPOINT") || is_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
        && !is("OTEL_SDK_DISABLED", "true")
        && !is("OTEL_TRACES_EXPORTER", "none")
}

/// A span around one request. A streamed answer's span ends when its first part is ready.
pub(crate) async fn span(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let mut attributes = vec![
        KeyValue::new("http.request.method", request.method().to_string()),
        KeyValue::new("http.route", route.clone()),
    ];
    if let Some(name) = sandbox(&route, request.uri().path()) {
        attributes.push(KeyValue::new("sandbox.name", name.to_owned()));
    }
    let tracer = global::tracer(NAME);
    let name = format!("{} {route}", request.method());
    let mut span = tracer.span_builder(name).with_kind(SpanKind::Server).with_attributes(attributes).start(&tracer);
    let response = next.run(request).await;
    let status = response.status();
    span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
    if status.is_server_error() {
        span.set_status(Status::error(""));
    }
    span.end();
    response
}

/// The sandbox that a path is about, if its route says so.
fn sandbox<'a>(route: &str, path: &'a str) -> Option<&'a str> {
    route.starts_with("/v1/sandboxes/{name}").then(|| path.split('/').nth(3)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_wanted_when_a_collector_is_named_and_nothing_says_no() {
        let with = |set: &[(&str, &str)]| {
            is_wanted(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        assert!(!with(&[]) && !with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]));
        assert!(with(&[endpoint]) && with(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4318/v1/traces")]));
        assert!(!with(&[endpoint, ("OTEL_SDK_DISABLED", "true")]));
        assert!(!with(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]));
    }

    #[test]
    fn a_sandbox_is_named_only_where_the_route_has_one() {
        assert_eq!(sandbox("/v1/sandboxes/{name}/exec", "/v1/sandboxes/web/exec"), Some("web"));
        assert_eq!(sandbox("/v1/sandboxes", "/v1/sandboxes"), None);
    }
}
