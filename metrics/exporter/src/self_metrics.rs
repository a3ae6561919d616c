//! The exporter's own metrics, live, through the OpenTelemetry SDK and its OTLP exporter. Counted by `export`, sent by the
//! SDK's own reader on its own thread, to the same backend.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use msb_metrics::Metric;
use opentelemetry::KeyValue;
use opentelemetry::metrics::MeterProvider as _;
use opentelemetry_otlp::{
    Compression, MetricExporter, WithExportConfig as _, WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};

use crate::endpoint::Protocol;
use crate::otlp::{SCOPE, resource_attributes};
use crate::point::Host;
use crate::sender::{SenderOptions, grpc_tls};

/// What is counted, from the beginning of the process on.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    success: AtomicU64,
    failure: AtomicU64,
    dropped: AtomicU64,
    rejected: AtomicU64,
    attributes_dropped: AtomicU64,
    /// Milliseconds since 1970; 0 before the first.
    last_success_ms: AtomicU64,
}

#[cfg(test)]
impl Counts {
    /// Collections that were dropped.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// One of the counts.
type Of = fn(&Counts) -> &AtomicU64;

/// The exporter's own metrics. They are sent once it is known of which host they are, so that two hosts never collide.
#[derive(Debug)]
pub(crate) struct SelfMetrics {
    options: SenderOptions,
    resource: BTreeMap<String, String>,
    interval: Duration,
    counts: Arc<Counts>,
    provider: Option<SdkMeterProvider>,
    begun: bool,
}

impl SelfMetrics {
    /// Counts from now on.
    pub(crate) fn new(options: SenderOptions, resource: BTreeMap<String, String>, interval: Duration) -> Self {
        Self { options, resource, interval, counts: Arc::default(), provider: None, begun: false }
    }

    /// Begins to send, as the exporter of this host. Only the first call does anything. Must be called inside the tokio runtime that
    /// the gRPC channel will use.
    pub(crate) fn begin(&mut self, host: &Host) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        match self.provider(host) {
            Ok(provider) => self.provider = Some(provider),
            Err(error) => tracing::warn!("the exporter's own metrics are not sent: {error:#}"),
        }
    }

    fn provider(&self, host: &Host) -> anyhow::Result<SdkMeterProvider> {
        let exporter = match self.options.endpoint.protocol {
            Protocol::Grpc => grpc_exporter(&self.options)?,
            Protocol::Http => http_exporter(&self.options)?,
        };
        let reader = PeriodicReader::builder(exporter).with_interval(self.interval).build();
        let mut attributes = resource_attributes("msb-metrics", host, &self.resource);
        // A name the user gives to the sandboxes' metrics is not this program's.
        attributes.insert("service.name".into(), "msb-metrics".into());
        attributes.insert("service.version".into(), env!("CARGO_PKG_VERSION").into());
        let attributes = attributes.into_iter().map(|(key, value)| KeyValue::new(key, value));
        let resource = Resource::builder_empty().with_attributes(attributes).build();
        let provider = SdkMeterProvider::builder().with_reader(reader).with_resource(resource).build();
        let meter = provider.meter(SCOPE);
        let counters: [(Metric, Of); 5] = [
            (Metric::ExportsSuccess, |counts| &counts.success),
            (Metric::ExportsFailure, |counts| &counts.failure),
            (Metric::CollectionsDropped, |counts| &counts.dropped),
            (Metric::PointsRejected, |counts| &counts.rejected),
            (Metric::AttributesDropped, |counts| &counts.attributes_dropped),
        ];
        for (metric, of) in counters {
            let (definition, counts) = (metric.definition(), Arc::clone(&self.counts));
            // The provider holds the callback; the instrument itself need not be kept.
            let _ = meter
                .u64_observable_counter(definition.name)
                .with_unit(definition.unit.as_str())
                .with_description(definition.meaning)
                .with_callback(move |observer| observer.observe(of(&counts).load(Ordering::Relaxed), &[]))
                .build();
        }
        let (definition, counts) = (Metric::LastSuccess.definition(), Arc::clone(&self.counts));
        let _ = meter
            .f64_observable_gauge(definition.name)
            .with_unit(definition.unit.as_str())
            .with_description(definition.meaning)
            .with_callback(move |observer| {
                let last_ms = counts.last_success_ms.load(Ordering::Relaxed);
                if last_ms > 0 {
                    observer.observe(Duration::from_millis(last_ms).as_secs_f64(), &[]);
                }
            })
            .build();
        Ok(provider)
    }

    /// Counts and sends nothing.
    #[cfg(test)]
    pub(crate) fn silent() -> Self {
        let endpoint = crate::endpoint::Endpoint { url: "http://127.0.0.1:1".into(), protocol: Protocol::Http };
        let options = SenderOptions {
            endpoint,
            headers: BTreeMap::new(),
            gzip: false,
            ca_cert: None,
            client_cert: None,
            timeout: Duration::from_secs(1),
        };
        Self { begun: true, ..Self::new(options, BTreeMap::new(), Duration::from_secs(10)) }
    }

    /// What is counted.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// A batch was taken, less so many points.
    pub(crate) fn taken(&self, rejected: u64) {
        self.counts.success.fetch_add(1, Ordering::Relaxed);
        self.counts.rejected.fetch_add(rejected, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        self.counts.last_success_ms.store(now_ms, Ordering::Relaxed);
    }

    /// A batch was refused or not answered.
    pub(crate) fn failed(&self) {
        self.counts.failure.fetch_add(1, Ordering::Relaxed);
    }

    /// The buffer was full.
    pub(crate) fn collections_dropped(&self, count: u64) {
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// The cap on cardinality left attributes out.
    pub(crate) fn attributes_dropped(&self, count: u64) {
        self.counts.attributes_dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// Sends what is left. Blocks: the SDK waits for its own thread.
    pub(crate) fn shutdown(&self) {
        let Some(provider) = &self.provider else { return };
        if let Err(error) = provider.shutdown_with_timeout(Duration::from_secs(2)) {
            tracing::debug!(%error, "the exporter's own metrics were not sent at the end");
        }
    }
}

fn grpc_exporter(options: &SenderOptions) -> anyhow::Result<MetricExporter> {
    let mut metadata = tonic::metadata::MetadataMap::new();
    for (key, value) in &options.headers {
        let key = tonic::metadata::AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes())?;
        metadata.insert(key, value.parse()?);
    }
    let mut builder = MetricExporter::builder()
        .with_tonic()
        .with_endpoint(&options.endpoint.url)
        .with_timeout(options.timeout)
        .with_metadata(metadata);
    if options.is_tls() {
        builder = builder.with_tls_config(grpc_tls(&options.read_pems()?));
    }
    if options.gzip {
        builder = builder.with_compression(Compression::Gzip);
    }
    builder.build().context("cannot set up the exporter of own metrics")
}

fn http_exporter(options: &SenderOptions) -> anyhow::Result<MetricExporter> {
    let pems = options.read_pems()?;
    let timeout = options.timeout;
    // The SDK exports from a plain thread, which needs the blocking client; that one must be made outside the runtime.
    let client = std::thread::spawn(move || {
        let mut builder = reqwest::blocking::Client::builder().timeout(timeout);
        if let Some(pem) = pems.ca {
            builder = builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(&pem)?);
        }
        if let Some((mut certificate, key)) = pems.client {
            certificate.extend(key);
            builder = builder.identity(reqwest::Identity::from_pem(&certificate)?);
        }
        builder.build()
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the HTTP client could not be made"))?
    .context("cannot set up the HTTP client")?;
    let mut builder = MetricExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(&options.endpoint.url)
        .with_timeout(options.timeout)
        .with_headers(options.headers.clone().into_iter().collect());
    if options.gzip {
        builder = builder.with_compression(Compression::Gzip);
    }
    builder.build().context("cannot set up the exporter of own metrics")
}
