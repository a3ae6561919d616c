//! What `msb-metrics` meets in the tests: a daemon whose answers are numbered, and a backend that does as a script says.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::routing::get;
use axum::{Json, Router};
use msb_metrics::Metric;
use msb_protocol::control::{MetricsSnapshot, SandboxMetrics, VersionInfo};
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::state::SandboxState;
use msb_protocol::version::{CONTROL_API_VERSION, GUEST_GENERATION};
use msb_protocol::vmm::{NetworkCount, NetworkCounts, Sample};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsPartialSuccess, ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::metrics::v1::{metric::Data, number_data_point::Value};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, until it is dropped. Its n-th answer says that one sandbox had read n bytes from its disk, n seconds after 1,000,000.
pub(crate) struct Daemon {
    asked: Arc<AtomicU64>,
    socket: PathBuf,
    /// Its own, so that it ends with all its connections.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        std::fs::remove_file(&self.socket).unwrap();
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Daemon {
    /// Listens on `socket`; each answer has `count` sandboxes.
    pub(crate) fn start(socket: &Path, count: u128) -> Self {
        let asked = Arc::new(AtomicU64::new(0));
        let number = Arc::clone(&asked);
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let router = Router::new().route("/v1/version", get(|| async { Json(version()) })).route(
            "/v1/metrics",
            get(move || async move { Json(snapshot(number.fetch_add(1, Ordering::SeqCst) + 1, count)) }),
        );
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move { axum::serve(UnixListener::from_std(listener).unwrap(), router).await });
        Self { asked, socket: socket.to_owned(), runtime: Some(runtime) }
    }

    /// How often it was asked.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

fn version() -> VersionInfo {
    VersionInfo {
        version: "0.1.0".into(),
        api_version: CONTROL_API_VERSION,
        guest_generation: GUEST_GENERATION,
        pid: std::process::id(),
        started_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

/// What a sandbox with traffic has.
fn network(number: u64) -> NetworkCounts {
    let count = |metric: Metric, values: &[&str]| NetworkCount {
        metric: metric.name().into(),
        attributes: metric
            .definition()
            .attributes
            .iter()
            .zip(values)
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect(),
        value: number,
    };
    let counts = [
        count(Metric::NetworkConnections, &["tcp"]),
        count(Metric::NetworkConnections, &["udp"]),
        count(Metric::NetworkConnectionsOpened, &["outbound", "tcp"]),
        count(Metric::NetworkConnectionsOpened, &["outbound", "udp"]),
        count(Metric::NetworkDenied, &["outbound", "tcp"]),
        count(Metric::DnsQueries, &["answered"]),
        count(Metric::DecisionLogSuppressed, &[]),
    ];
    counts.into_iter().collect()
}

fn snapshot(number: u64, count: u128) -> MetricsSnapshot {
    let at = jiff::Timestamp::from_second(1_000_000 + i64::try_from(number).unwrap()).unwrap();
    let one = |place: u128| SandboxMetrics {
        name: SandboxName::parse(&format!("s{place}")).unwrap(),
        id: SandboxId(uuid::Uuid::from_u128(place)),
        boot_id: BootId(uuid::Uuid::from_u128(1)),
        vmm_pid: 7,
        status: SandboxState::Running,
        labels: BTreeMap::from([("team".into(), "ml".into())]),
        restarts: 0,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        started_at: jiff::Timestamp::UNIX_EPOCH,
        last: false,
        sample: Sample {
            at_ns: u64::try_from(at.as_nanosecond()).unwrap(),
            disk_read_bytes: number,
            network: network(number),
            ..Sample::default()
        },
        cpu_utilization: 0.5,
        guest: Some(msb_protocol::control::GuestMetrics::default()),
        boot_phases: ["spawn", "kernel_load", "kernel", "init", "agent", "ready"]
            .map(|name| msb_protocol::vmm::Phase { name: name.into(), duration_us: 1_000 })
            .to_vec(),
    };
    MetricsSnapshot {
        host_id: "host-1".into(),
        host_name: "lab".into(),
        instance_id: "instance-1".into(),
        taken_at: at,
        states: BTreeMap::from([("running".into(), u64::try_from(count).unwrap())]),
        ready_forks: BTreeMap::new(),
        sandboxes: (1..=count).map(one).collect(),
    }
}

/// What a backend does with one request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// Takes it.
    Take,
    /// Takes it after this time.
    TakeAfter(Duration),
    /// Takes it but for so many points.
    TakePart(i64),
    /// Refuses it with this status, and says when to come again.
    Status(u16, Option<u64>),
    /// Closes the connection in the middle of the body.
    Cut,
}

/// One number that a backend took.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Taken {
    /// The service that sent it.
    pub(crate) service: String,
    /// `host.id` of its resource.
    pub(crate) host_id: String,
    /// Name of the metric.
    pub(crate) metric: String,
    /// Its value.
    pub(crate) value: f64,
    /// Seconds since 1970.
    pub(crate) second: u64,
    /// The sandbox, if it is of one.
    pub(crate) sandbox: String,
    /// When it arrived.
    pub(crate) arrived: Instant,
}

/// A backend over HTTP.
#[derive(Clone, Default)]
pub(crate) struct Backend {
    script: Arc<Mutex<VecDeque<Answer>>>,
    always: Arc<Mutex<Option<Answer>>>,
    taken: Arc<Mutex<Vec<Taken>>>,
    heads: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Backend {
    /// A backend whose first answers are these; further ones take everything.
    pub(crate) fn with(script: &[Answer]) -> Self {
        Self { script: Arc::new(Mutex::new(script.iter().copied().collect())), ..Self::default() }
    }

    /// A backend whose every answer is this.
    pub(crate) fn always(answer: Answer) -> Self {
        Self { always: Arc::new(Mutex::new(Some(answer))), ..Self::default() }
    }

    /// Listens; gives the port.
    pub(crate) async fn listen(&self, port: u16) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let backend = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let backend = backend.clone();
                tokio::spawn(async move { backend.serve(stream).await });
            }
        });
        port
    }

    /// What it took.
    pub(crate) fn taken(&self) -> Vec<Taken> {
        self.taken.lock().unwrap().clone()
    }

    /// The values of one metric it took, in their order.
    pub(crate) fn values(&self, metric: &str) -> Vec<f64> {
        self.taken().into_iter().filter(|taken| taken.metric == metric).map(|taken| taken.value).collect()
    }

    /// The heads of the requests of sandboxes' metrics and when they came.
    pub(crate) fn heads(&self) -> Vec<(Instant, String)> {
        self.heads.lock().unwrap().clone()
    }

    async fn serve(&self, mut stream: TcpStream) -> Option<()> {
        loop {
            let mut bytes = Vec::new();
            let end = loop {
                if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                    break at + 4;
                }
                if stream.read_buf(&mut bytes).await.ok()? == 0 {
                    return None;
                }
            };
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let length: usize = field("content-length:")?.parse().ok()?;
            let mut body = bytes.split_off(end);
            while body.len() < length {
                if stream.read_buf(&mut body).await.ok()? == 0 {
                    return None;
                }
            }
            let body = if field("content-encoding:") == Some("gzip") {
                let mut plain = Vec::new();
                std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&body[..]), &mut plain).ok()?;
                plain
            } else {
                body
            };
            let request = ExportMetricsServiceRequest::decode(body.as_slice()).ok()?;
            let points = numbers(&request);
            // The exporter's own metrics come by themselves; the script is about those of sandboxes.
            let is_own = points.iter().all(|point| point.service == "msb-metrics");
            let answer = if is_own {
                Answer::Take
            } else {
                self.heads.lock().unwrap().push((Instant::now(), head.clone()));
                let always = *self.always.lock().unwrap();
                always.or_else(|| self.script.lock().unwrap().pop_front()).unwrap_or(Answer::Take)
            };
            let (status, retry_after, rejected) = match answer {
                Answer::Take => (200, None, 0),
                Answer::TakeAfter(pause) => {
                    tokio::time::sleep(pause).await;
                    (200, None, 0)
                }
                Answer::TakePart(rejected) => (200, None, rejected),
                Answer::Status(status, retry_after) => (status, retry_after, 0),
                Answer::Cut => {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-le").await.ok()?;
                    return None;
                }
            };
            if status == 200 {
                self.taken.lock().unwrap().extend(points);
            }
            let partial = (rejected > 0).then(|| ExportMetricsPartialSuccess {
                rejected_data_points: rejected,
                error_message: "too many".into(),
            });
            let body = ExportMetricsServiceResponse { partial_success: partial }.encode_to_vec();
            let retry = retry_after.map(|seconds| format!("retry-after: {seconds}\r\n")).unwrap_or_default();
            let head = format!("HTTP/1.1 {status} X\r\n{retry}content-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await.ok()?;
            stream.write_all(&body).await.ok()?;
        }
    }
}

fn numbers(request: &ExportMetricsServiceRequest) -> Vec<Taken> {
    let mut found = Vec::new();
    for resource in &request.resource_metrics {
        let attribute = |attributes: &[opentelemetry_proto::tonic::common::v1::KeyValue], key: &str| {
            use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
            attributes
                .iter()
                .find(|pair| pair.key == key)
                .and_then(|pair| match pair.value.as_ref()?.value.as_ref()? {
                    Any::StringValue(text) => Some(text.clone()),
                    _ => None,
                })
                .unwrap_or_default()
        };
        let of_resource = &resource.resource.as_ref().unwrap().attributes;
        for metric in resource.scope_metrics.iter().flat_map(|scope| &scope.metrics) {
            let points = match metric.data.as_ref().unwrap() {
                Data::Gauge(gauge) => &gauge.data_points,
                Data::Sum(sum) => &sum.data_points,
                _ => panic!("neither gauge nor sum"),
            };
            for point in points {
                let value = match point.value {
                    Some(Value::AsInt(value)) => value as f64,
                    Some(Value::AsDouble(value)) => value,
                    None => continue,
                };
                found.push(Taken {
                    service: attribute(of_resource, "service.name"),
                    host_id: attribute(of_resource, "host.id"),
                    metric: metric.name.clone(),
                    value,
                    second: point.time_unix_nano / 1_000_000_000,
                    sandbox: attribute(&point.attributes, "sandbox.name"),
                    arrived: Instant::now(),
                });
            }
        }
    }
    found
}

/// A running `msb-metrics`; it ends with this value.
pub(crate) struct Exporter {
    child: Child,
    log: PathBuf,
    /// Where standard output goes.
    pub(crate) output: PathBuf,
}

impl Exporter {
    /// Starts it on the daemon at `socket`, with logs and output in `directory`.
    pub(crate) fn start(directory: &Path, environment: &[(&str, &Path)], words: &[&str]) -> Self {
        let (log, output) = (directory.join("log"), directory.join("output"));
        let file = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_msb-metrics"));
        command.args(words).env_clear().envs(environment.iter().copied());
        let child = command.stdin(Stdio::null()).stdout(file(&output)).stderr(file(&log)).spawn().unwrap();
        Self { child, log, output }
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end and waits; gives its exit code.
    pub(crate) fn end(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is true.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
