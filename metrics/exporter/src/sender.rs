//! Sends requests to a backend over gRPC or HTTP. One connection, reused; one attempt each call: what follows is `retry`'s affair.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceResponse;
use prost::Message as _;
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::endpoint::{Endpoint, Protocol};
use crate::export::Backend;
use crate::retry::{self, Outcome};

/// The call of OTLP/gRPC.
const EXPORT: &str = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";
/// Largest answer that is read from a backend, in bytes.
const ANSWER_LEN_MAX: usize = 1 << 20;

/// How to reach the backend.
#[derive(Clone, Debug)]
pub(crate) struct SenderOptions {
    /// Where and how.
    pub endpoint: Endpoint,
    /// gRPC metadata or HTTP headers.
    pub headers: BTreeMap<String, String>,
    /// Compress.
    pub gzip: bool,
    /// A certificate authority (PEM) in place of the system's.
    pub ca_cert: Option<PathBuf>,
    /// Certificate and key (PEM) that we show the backend.
    pub client_cert: Option<(PathBuf, PathBuf)>,
    /// Longest time for one attempt.
    pub timeout: Duration,
}

/// A backend.
#[derive(Debug)]
pub(crate) enum Sender {
    /// OTLP/gRPC.
    Grpc {
        /// The client.
        client: Grpc<Channel>,
        /// Checked metadata.
        metadata: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
        /// Longest time for one attempt.
        timeout: Duration,
    },
    /// OTLP/HTTP.
    Http {
        /// The client.
        client: reqwest::Client,
        /// Where to.
        endpoint: Endpoint,
        /// Checked headers.
        headers: reqwest::header::HeaderMap,
        /// Compress.
        gzip: bool,
    },
}

/// Certificates and keys, read.
#[derive(Default)]
pub(crate) struct Pems {
    /// The authority's.
    pub ca: Option<Vec<u8>>,
    /// Ours: certificate and key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

impl SenderOptions {
    /// Reads what the options name.
    pub(crate) fn read_pems(&self) -> anyhow::Result<Pems> {
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        Ok(Pems {
            ca: self.ca_cert.as_ref().map(read).transpose()?,
            client: match &self.client_cert {
                Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
                None => None,
            },
        })
    }

    /// Whether the backend is spoken to over TLS.
    pub(crate) fn is_tls(&self) -> bool {
        self.endpoint.url.starts_with("https://")
    }
}

/// TLS of gRPC.
pub(crate) fn grpc_tls(pems: &Pems) -> ClientTlsConfig {
    let tls = match &pems.ca {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    match &pems.client {
        Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
        None => tls,
    }
}

impl Sender {
    /// Makes the client. Connects lazily: a backend that is down now may be up later.
    pub(crate) fn new(options: SenderOptions) -> anyhow::Result<Self> {
        let pems = options.read_pems()?;
        match options.endpoint.protocol {
            Protocol::Grpc => Self::grpc(options, &pems),
            Protocol::Http => Self::http(options, pems),
        }
    }

    fn grpc(options: SenderOptions, pems: &Pems) -> anyhow::Result<Self> {
        let mut endpoint = Channel::from_shared(options.endpoint.url.clone())?
            .timeout(options.timeout)
            .connect_timeout(options.timeout)
            .user_agent(concat!("msb-metrics/", env!("CARGO_PKG_VERSION")))?;
        if options.is_tls() {
            endpoint = endpoint.tls_config(grpc_tls(pems)).context("cannot set up TLS")?;
        }
        let mut client = Grpc::new(endpoint.connect_lazy());
        if options.gzip {
            client = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
        }
        let mut metadata = Vec::new();
        for (key, value) in &options.headers {
            let key = AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes())
                .with_context(|| format!("header {key:?} is not a valid gRPC metadata key"))?;
            // The value may be a secret: the error names the key only.
            let value = value.parse().map_err(|_| anyhow::anyhow!("the value of header {key} is not ASCII"))?;
            metadata.push((key, value));
        }
        Ok(Self::Grpc { client, metadata, timeout: options.timeout })
    }

    fn http(options: SenderOptions, pems: Pems) -> anyhow::Result<Self> {
        let mut headers = reqwest::header::HeaderMap::new();
        for (key, value) in &options.headers {
            let name = reqwest::header::HeaderName::from_bytes(key.as_bytes())
                .with_context(|| format!("header {key:?} is not a valid HTTP header name"))?;
            let mut value = reqwest::header::HeaderValue::from_str(value)
                .map_err(|_| anyhow::anyhow!("the value of header {key} is not a valid HTTP header value"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        let mut builder = reqwest::Client::builder()
            .timeout(options.timeout)
            .user_agent(concat!("msb-metrics/", env!("CARGO_PKG_VERSION")))
            // A redirected POST would lose its body or its credentials; the endpoint is used exactly as given.
            .redirect(reqwest::redirect::Policy::none());
        if let Some(pem) = pems.ca {
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).context("--ca-cert is not PEM")?;
            builder = builder.tls_certs_only(certificates);
        }
        if let Some((mut certificate, key)) = pems.client {
            certificate.extend(key);
            let identity = reqwest::Identity::from_pem(&certificate).context("--client-cert and --client-key")?;
            builder = builder.identity(identity);
        }
        let client = builder.build().context("cannot set up the HTTP client")?;
        Ok(Self::Http { client, endpoint: options.endpoint, headers, gzip: options.gzip })
    }
}

impl Backend for Sender {
    async fn send(&mut self, request: Bytes) -> Outcome {
        match self {
            Self::Grpc { client, metadata, timeout } => {
                let mut message = tonic::Request::new(request);
                message.set_timeout(*timeout);
                for (key, value) in metadata.iter() {
                    message.metadata_mut().insert(key.clone(), value.clone());
                }
                let answer = match client.ready().await {
                    Ok(()) => client.unary(message, PathAndQuery::from_static(EXPORT), Encoded).await,
                    Err(error) => Err(Status::unavailable(error.to_string())),
                };
                match answer {
                    Ok(answer) => taken(answer.into_inner()),
                    Err(status) => retry::of_grpc_status(status.code(), status.message(), status.details()),
                }
            }
            Self::Http { client, endpoint, headers, gzip } => {
                let mut body = request;
                let mut post = client.post(&endpoint.url).headers(headers.clone());
                post = post.header("content-type", "application/x-protobuf");
                if *gzip {
                    match compress(&body) {
                        Ok(compressed) => {
                            body = compressed.into();
                            post = post.header("content-encoding", "gzip");
                        }
                        Err(error) => return Outcome::Refused { message: format!("cannot compress: {error}") },
                    }
                }
                match post.body(body).send().await {
                    Ok(answer) if answer.status().is_success() => taken(read_answer(answer).await),
                    Ok(answer) => {
                        let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok());
                        let now = jiff::Timestamp::now();
                        retry::of_http_status(answer.status().as_u16(), retry_after, endpoint.path_is_bare(), now)
                    }
                    Err(error) => Outcome::Later { pause: None, message: error.without_url().to_string() },
                }
            }
        }
    }
}

/// Requests go out as they are, because they are encoded already; answers are read.
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = ExportMetricsServiceResponse;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Encoded {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, request: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(request);
        Ok(())
    }
}

impl Decoder for Encoded {
    type Item = ExportMetricsServiceResponse;
    type Error = Status;

    fn decode(&mut self, answer: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        let read = ExportMetricsServiceResponse::decode(answer);
        read.map(Some).map_err(|error| Status::internal(format!("its answer cannot be read: {error}")))
    }
}

/// The body of a success, which may tell of points that were rejected. An answer that cannot be read still was a success.
async fn read_answer(mut answer: reqwest::Response) -> ExportMetricsServiceResponse {
    let mut body = Vec::new();
    while let Ok(Some(piece)) = answer.chunk().await {
        body.extend_from_slice(&piece);
        if body.len() > ANSWER_LEN_MAX {
            return ExportMetricsServiceResponse::default();
        }
    }
    ExportMetricsServiceResponse::decode(body.as_slice()).unwrap_or_default()
}

fn taken(answer: ExportMetricsServiceResponse) -> Outcome {
    let partial = answer.partial_success.unwrap_or_default();
    Outcome::Taken {
        rejected: u64::try_from(partial.rejected_data_points).unwrap_or_default(),
        message: partial.error_message,
    }
}

fn compress(body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}
