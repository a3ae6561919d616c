//! The exporter's own metrics, live, through the OpenTelemetry SDK and its OTLP exporter. Counted by `export`, sent by the
//! SDK's own reader on its own thread, to the same backend.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use msb_metrics::Metric;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Gauge, MeterProvider as _};
use opentelemetry_otlp::{
    Compression, MetricExporter, WithExportConfig as _, WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};

use crate::endpoint::Protocol;
use crate::otlp::SCOPE;
use crate::sender::SenderOptions;

/// The instruments.
#[derive(Debug)]
pub(crate) struct SelfMetrics {
    provider: SdkMeterProvider,
    success: Counter<u64>,
    failure: Counter<u64>,
    dropped: Counter<u64>,
    rejected: Counter<u64>,
    attributes_dropped: Counter<u64>,
    last_success: Gauge<f64>,
}

impl SelfMetrics {
    /// Sets up the instruments. Must be called inside the tokio runtime that the gRPC channel will use.
    pub(crate) fn new(options: &SenderOptions, interval: Duration) -> anyhow::Result<Self> {
        let exporter = match options.endpoint.protocol {
            Protocol::Grpc => grpc_exporter(options)?,
            Protocol::Http => http_exporter(options)?,
        };
        let reader = PeriodicReader::builder(exporter).with_interval(interval).build();
        let resource = Resource::builder()
            .with_attributes([
                KeyValue::new("service.name", "msb-metrics"),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            ])
            .build();
        let provider = SdkMeterProvider::builder().with_reader(reader).with_resource(resource).build();
        let meter = provider.meter(SCOPE);
        let counter = |metric: Metric| {
            let definition = metric.definition();
            meter
                .u64_counter(definition.name)
                .with_unit(definition.unit.as_str())
                .with_description(definition.meaning)
                .build()
        };
        let last = Metric::LastSuccess.definition();
        Ok(Self {
            success: counter(Metric::ExportsSuccess),
            failure: counter(Metric::ExportsFailure),
            dropped: counter(Metric::CollectionsDropped),
            rejected: counter(Metric::PointsRejected),
            attributes_dropped: counter(Metric::AttributesDropped),
            last_success: meter
                .f64_gauge(last.name)
                .with_unit(last.unit.as_str())
                .with_description(last.meaning)
                .build(),
            provider,
        })
    }

    /// A batch was taken, less so many points.
    pub(crate) fn taken(&self, rejected: u64) {
        self.success.add(1, &[]);
        self.rejected.add(rejected, &[]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_success.record(now.as_secs_f64(), &[]);
    }

    /// A batch was refused or not answered.
    pub(crate) fn failed(&self) {
        self.failure.add(1, &[]);
    }

    /// The buffer was full.
    pub(crate) fn collections_dropped(&self, count: u64) {
        self.dropped.add(count, &[]);
    }

    /// The cap on cardinality left attributes out.
    pub(crate) fn attributes_dropped(&self, count: u64) {
        self.attributes_dropped.add(count, &[]);
    }

    /// Sends what is left. Blocks: the SDK waits for its own thread.
    pub(crate) fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(Duration::from_secs(2)) {
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
    if options.endpoint.url.starts_with("https://") {
        let tls = match &options.ca_cert {
            Some(path) => {
                let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                tonic::transport::ClientTlsConfig::new().ca_certificate(tonic::transport::Certificate::from_pem(pem))
            }
            None => tonic::transport::ClientTlsConfig::new().with_native_roots(),
        };
        builder = builder.with_tls_config(tls);
    }
    if options.gzip {
        builder = builder.with_compression(Compression::Gzip);
    }
    builder.build().context("cannot set up the exporter of own metrics")
}

fn http_exporter(options: &SenderOptions) -> anyhow::Result<MetricExporter> {
    let ca = match &options.ca_cert {
        Some(path) => Some(std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?),
        None => None,
    };
    let timeout = options.timeout;
    // The SDK exports from a plain thread, which needs the blocking client; that one must be made outside the runtime.
    let client = std::thread::spawn(move || {
        let mut builder = reqwest::blocking::Client::builder().timeout(timeout);
        if let Some(pem) = ca {
            builder = builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(&pem)?);
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
