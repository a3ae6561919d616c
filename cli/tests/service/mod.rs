//! A service made of canned answers, for the tests of `msb`: the routes of `msb_protocol::control` with its own types, on a Unix
//! socket. It knows four sandboxes and one image, and runs "commands" that are instructions to itself. It boots nothing.

mod images;
mod metrics;
mod snapshots;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{delete, get, post};
use futures_util::StreamExt;
use msb_protocol::control::{
    ActorRow, ActorTree, ClientMessage, CreateRequest, EventRecord, HostInfo, ImageConfigDetail, ImageDetail,
    ImageLayerDetail, ImageList, ImageSummary, LoadEvent, LogRecord, LogSource, NetworkDetail, RunEnd, STDERR_TAG,
    STDOUT_TAG, SandboxDetail, SandboxList, SandboxSummary, ServerMessage, StopRequest, StoreReport, VersionInfo,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::images::{ImageHistoryStep, ImageRemoval};
use msb_protocol::labels::LabelTerm;
use msb_protocol::network::NetworkSpec;
use msb_protocol::spec::{EngineChoice, SandboxSpec, Workload};
use msb_protocol::state::{EndCause, ProcessEnd, SandboxState};
use msb_protocol::version::{CONTROL_API_VERSION, GUEST_GENERATION};
use msb_protocol::vmm::{JailReport, Phase, ProbeOutcome, ProbeReport};

const DIGEST: &str = "sha256:0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0";

/// The service; it ends with the test.
pub(crate) struct Service {
    dir: tempfile::TempDir,
    pub(crate) socket: PathBuf,
    _runtime: tokio::runtime::Runtime,
}

impl Service {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("msbd.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::bind(&socket).unwrap()
        };
        runtime.spawn(async move { axum::serve(listener, router()).await });
        Self { dir, socket, _runtime: runtime }
    }

    /// An empty directory for the test's own use.
    pub(crate) fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }
}

/// The words of the main workload that was created last.
type Words = Arc<Mutex<Vec<String>>>;

fn router() -> Router {
    let main = Words::default();
    let created = Arc::clone(&main);
    Router::new()
        .route("/v1/version", get(|| async { Json(version()) }))
        .route("/v1/host", get(|| async { Json(host()) }))
        .route("/v1/sandboxes", get(list).post(move |Json(request)| create(created, request)))
        .route("/v1/sandboxes/{name}", get(inspect).delete(remove))
        .route("/v1/sandboxes/{name}/start", post(move |path| act(path, SandboxState::Running)))
        .route("/v1/sandboxes/{name}/restart", post(move |path| act(path, SandboxState::Running)))
        .route("/v1/sandboxes/{name}/stop", post(stop))
        .route("/v1/sandboxes/{name}/pause", post(pause))
        .route("/v1/sandboxes/{name}/resume", post(move |path| act(path, SandboxState::Running)))
        .route("/v1/sandboxes/{name}/detach", post(move |path| act(path, SandboxState::Running)))
        .route("/v1/sandboxes/{name}/touch", post(move |path| act(path, SandboxState::Running)))
        .route("/v1/sandboxes/{name}/wait", get(wait))
        .route("/v1/sandboxes/{name}/exec", get(exec))
        .route("/v1/sandboxes/{name}/main", get(move |upgrade: WebSocketUpgrade| async move { upgrade.on_upgrade(move |socket| run_main(main, socket)) }))
        .route("/v1/sandboxes/{name}/logs", get(logs))
        .route("/v1/events", get(events))
        .route("/v1/metrics", get(metrics::snapshot))
        .route("/v1/metrics/stream", get(metrics::stream))
        .route("/v1/images", get(|| async { Json(ImageList { images: vec![image()] }) }))
        .route("/v1/images/load", post(load))
        .route("/v1/images/pull", post(images::pull))
        .route("/v1/registries", get(images::registries))
        .route("/v1/registries/login", post(images::login).delete(images::logout))
        .route("/v1/images/save", post(images::save))
        .route("/v1/images/tag", post(images::tag))
        .route("/v1/images/pin", post(images::pin))
        .route("/v1/images/prune", post(images::prune))
        .route("/v1/store/usage", get(images::usage))
        .route("/v1/image", delete(remove_image).get(inspect_image))
        .route(
            "/v1/store/check",
            get(|| async {
                Json(StoreReport {
                    images: 1,
                    blobs: 2,
                    bytes: 4096,
                    problems: vec!["blob sha256:12 is damaged".into()],
                })
            }),
        )
        .route("/v1/snapshots", get(snapshots::list).post(snapshots::create))
        .route("/v1/snapshots/{name}", get(snapshots::inspect).delete(snapshots::remove))
        .route("/v1/snapshots/{name}/verify", post(snapshots::verify))
        .route("/v1/snapshots/{name}/archive", get(snapshots::export))
        .route("/v1/snapshot-archives", post(snapshots::import))
        .route("/v1/debug/actors", get(|| async { Json(actors()) }))
}

fn time(text: &str) -> jiff::Timestamp {
    text.parse().unwrap()
}

fn boot() -> BootId {
    "018cc251-f400-7000-8000-00000000000b".parse().unwrap()
}

fn version() -> VersionInfo {
    VersionInfo {
        version: "0.1.0".into(),
        api_version: CONTROL_API_VERSION,
        guest_generation: GUEST_GENERATION,
        pid: 4242,
        started_at: time("2026-01-02T03:00:00Z"),
    }
}

fn host() -> HostInfo {
    HostInfo {
        service: version(),
        home: "/home/u/.msb".into(),
        runtime_dir: "/run/user/1000/msb".into(),
        share_dir: "/usr/share/msb".into(),
        kernel: "/usr/share/msb/vmlinux".into(),
        probe: ProbeReport {
            engine: Some(EngineChoice::Qemu),
            reason: "software emulation: slow, not a security boundary".into(),
            kvm: ProbeOutcome { usable: false, detail: "/dev/kvm does not exist".into() },
            qemu: ProbeOutcome { usable: true, detail: "7.2.15".into() },
            kvm_million_instructions_per_second: None,
        },
        sandboxes: [("running".to_owned(), 1)].into(),
        home_free_bytes: 40 << 30,
    }
}

fn end(process: ProcessEnd, cause: EndCause) -> RunEnd {
    RunEnd { boot_id: boot(), cause, process: Some(process), message: String::new(), at: time("2026-01-02T04:00:00Z") }
}

fn sandboxes() -> Vec<SandboxSummary> {
    let summary = |name: &str, number: u8, status, command: &[&str]| SandboxSummary {
        name: SandboxName::parse(name).unwrap(),
        id: format!("018cc251-f400-7000-8000-0000000000{number:02}").parse::<SandboxId>().unwrap(),
        status,
        image: "busybox".into(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        created_at: time(&format!("2026-01-02T03:04:{number:02}Z")),
        started_at: Some(time(&format!("2026-01-02T03:05:{number:02}Z"))),
        last_end: None,
        restarts: 0,
        ports: vec![],
        labels: [("team".to_owned(), "ml".to_owned())].into(),
        engine: Some(EngineChoice::Qemu),
        health: None,
    };
    let mut sandboxes = vec![
        summary("web", 4, SandboxState::Running, &["sh", "-c", "while :; do date; sleep 1; done"]),
        summary("box", 3, SandboxState::Running, &[]),
        summary("old", 2, SandboxState::Stopped, &["false"]),
        summary("sick", 1, SandboxState::Crashed, &["evil\u{1b}[2J"]),
    ];
    sandboxes[1].labels.clear();
    sandboxes[2].last_end = Some(end(ProcessEnd::exited(7), EndCause::Completed));
    sandboxes[3].last_end = Some(RunEnd {
        process: None,
        message: "kernel panic".into(),
        ..end(ProcessEnd::default(), EndCause::GuestPanic)
    });
    sandboxes[3].restarts = 5;
    sandboxes
}

fn detail(summary: SandboxSummary) -> SandboxDetail {
    let mut spec = SandboxSpec::new("busybox");
    spec.name = Some(summary.name.clone());
    spec.detached = true;
    spec.env = [("SECRET".to_owned(), "hunter2".to_owned())].into();
    spec.workload = if summary.command.is_empty() { Workload::None } else { Workload::Main };
    let security = spec.security.report();
    SandboxDetail {
        spec,
        image_digest: DIGEST.into(),
        boot_id: summary.status.is_live().then(boot),
        vmm_pid: summary.status.is_live().then_some(777),
        engine_reason: Some("software emulation: slow, not a security boundary".into()),
        boot_phases: vec![
            Phase { name: "kernel".into(), duration_us: 812_345 },
            Phase { name: "agent".into(), duration_us: 41_000 },
        ],
        jail: JailReport { in_force: vec!["no_new_privs".into()], missing: vec!["landlock: kernel too old".into()] },
        security,
        network: NetworkDetail {
            addresses: Some(NetworkSpec::default().addresses()),
            policy: NetworkSpec::default().policy_lines(),
        },
        root_allocated_bytes: 3 << 20,
        directory: format!("/home/u/.msb/sandboxes/{}", summary.name),
        heartbeat_file: format!("/home/u/.msb/sandboxes/{}/run/heartbeat.json", summary.name),
        next_try_at: None,
        memory_allocated_bytes: None,
        idle_for_ms: None,
        stops_in_ms: None,
        last_activity: None,
        boot_error: None,
        health_report: None,
        summary,
    }
}

fn refuse(code: ErrorCode, message: impl Into<String>) -> Response {
    let status = StatusCode::from_u16(code.entry().http_status).unwrap();
    (status, Json(ApiError::new(code, message))).into_response()
}

#[expect(clippy::result_large_err, reason = "an answer is an answer")]
fn find(name: &str) -> Result<SandboxSummary, Response> {
    let found = sandboxes().into_iter().find(|summary| summary.name.as_str() == name);
    found.ok_or_else(|| refuse(ErrorCode::SandboxNotFound, format!("no sandbox is called {name}")))
}

async fn list(Query(pairs): Query<Vec<(String, String)>>) -> Json<SandboxList> {
    let terms: Vec<_> =
        pairs.iter().filter(|(key, _)| key == "label").map(|(_, term)| LabelTerm::parse(term).unwrap()).collect();
    let mut sandboxes = sandboxes();
    sandboxes.retain(|summary| terms.iter().all(|term| term.matches(&summary.labels)));
    Json(SandboxList { sandboxes, next: None })
}

async fn create(main: Words, request: CreateRequest) -> Response {
    let spec = request.spec;
    if spec.image != "busybox" {
        return refuse(ErrorCode::ImageNotFound, format!("no image is called {}; there are: busybox", spec.image));
    }
    let name = spec.name.clone().unwrap_or_else(|| SandboxName::parse("msb-0badcafe").unwrap());
    if find(name.as_str()).is_ok() && request.replace_grace_ms.is_none() {
        return refuse(ErrorCode::SandboxAlreadyExists, format!("a sandbox called {name} exists"));
    }
    let mut summary = sandboxes().remove(1);
    summary.name = name;
    summary.command = spec.command.clone().unwrap_or_default();
    // The command of an attached run is told to `main` through the file that carries the name of the socket's directory.
    main.lock().unwrap().clone_from(&summary.command);
    Json(SandboxDetail { spec, ..detail(summary) }).into_response()
}

async fn inspect(Path(name): Path<String>) -> Response {
    find(&name).map_or_else(|refusal| refusal, |summary| Json(detail(summary)).into_response())
}

async fn act(Path(name): Path<String>, state: SandboxState) -> Response {
    match find(&name) {
        Ok(mut summary) => {
            summary.status = state;
            Json(detail(summary)).into_response()
        }
        Err(refusal) => refusal,
    }
}

async fn stop(path: Path<String>, Json(request): Json<StopRequest>) -> Response {
    if path.0 == "old" {
        return refuse(ErrorCode::SandboxNotRunning, "old is stopped");
    }
    assert!(!(request.force && request.grace_ms.is_some()));
    act(path, SandboxState::Stopped).await
}

async fn pause(path: Path<String>) -> Response {
    if path.0 == "old" {
        return refuse(ErrorCode::SandboxNotRunning, "sandbox old is stopped: there is nothing to pause");
    }
    act(path, SandboxState::Paused).await
}

async fn remove(Path(name): Path<String>, Query(pairs): Query<Vec<(String, String)>>) -> Response {
    let force = pairs.contains(&("force".into(), "true".into()));
    match find(&name) {
        Ok(summary) if summary.status.is_resting() || force => Json(serde_json::json!({})).into_response(),
        Ok(_) => refuse(ErrorCode::SandboxStillRunning, format!("{name} is running")),
        Err(refusal) => refusal,
    }
}

async fn wait(Path(name): Path<String>) -> Response {
    match find(&name) {
        Ok(mut summary) => {
            summary.status = SandboxState::Stopped;
            summary.last_end = Some(end(ProcessEnd::signalled(9), EndCause::Completed));
            Json(detail(summary)).into_response()
        }
        // The sandboxes that the tests create are removed when they end.
        Err(refusal) => refusal,
    }
}

async fn exec(Path(name): Path<String>, upgrade: WebSocketUpgrade) -> Response {
    match find(&name) {
        Ok(summary) if summary.status.is_live() => upgrade.on_upgrade(|mut socket| async move {
            let Some(ClientMessage::Exec { exec }) = receive(&mut socket).await else { return };
            perform(&mut socket, &exec.command, &serde_json::to_string(&exec).unwrap()).await;
        }),
        Ok(_) => refuse(ErrorCode::SandboxNotRunning, format!("{name} is stopped")),
        Err(refusal) => refusal,
    }
}

async fn run_main(main: Words, mut socket: WebSocket) {
    let Some(message) = receive(&mut socket).await else { return };
    let command = main.lock().unwrap().clone();
    perform(&mut socket, &command, &serde_json::to_string(&message).unwrap()).await;
}

async fn receive(socket: &mut WebSocket) -> Option<ClientMessage> {
    match socket.recv().await {
        Some(Ok(Message::Text(text))) => serde_json::from_str(text.as_str()).ok(),
        _ => None,
    }
}

/// What the words tell the service to do in place of a command.
async fn perform(socket: &mut WebSocket, command: &[String], request: &str) {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let end = match words.as_slice() {
        ["echo", rest @ ..] => {
            write(socket, STDOUT_TAG, format!("{}\n", rest.join(" ")).as_bytes()).await;
            ProcessEnd::exited(0)
        }
        ["both"] => {
            write(socket, STDOUT_TAG, b"to stdout\n").await;
            write(socket, STDERR_TAG, b"to stderr\n").await;
            ProcessEnd::exited(0)
        }
        ["request"] => {
            write(socket, STDOUT_TAG, request.as_bytes()).await;
            ProcessEnd::exited(0)
        }
        ["exit", code] => ProcessEnd::exited(code.parse().unwrap()),
        ["die", signal] => ProcessEnd::signalled(signal.parse().unwrap()),
        ["late"] => ProcessEnd { timed_out: true, ..ProcessEnd::signalled(9) },
        ["missing"] => return fail(socket, ErrorCode::ExecNotFound, "missing: not found").await,
        ["plain-file"] => return fail(socket, ErrorCode::ExecNotExecutable, "plain-file: permission denied").await,
        ["lose"] => return,
        ["yes"] => {
            while socket.send(Message::Binary([&[STDOUT_TAG][..], &b"y\n".repeat(4096)].concat().into())).await.is_ok()
            {
            }
            return;
        }
        ["signals"] => {
            write(socket, STDOUT_TAG, b"ready\n").await;
            let mut numbers = Vec::new();
            loop {
                match receive(socket).await {
                    Some(ClientMessage::Signal { number: 15 }) => {
                        numbers.push(15);
                        break;
                    }
                    Some(ClientMessage::Signal { number }) => numbers.push(number),
                    Some(_) => {}
                    None => return,
                }
                write(socket, STDOUT_TAG, b"ready\n").await;
            }
            write(socket, STDOUT_TAG, format!("{numbers:?}\n").as_bytes()).await;
            ProcessEnd::signalled(15)
        }
        ["sizes"] => {
            write(socket, STDOUT_TAG, b"ready\r\n").await;
            loop {
                match receive(socket).await {
                    Some(ClientMessage::Resize { size }) => {
                        write(socket, STDOUT_TAG, format!("{}x{}\r\n", size.rows, size.columns).as_bytes()).await;
                        break;
                    }
                    Some(_) => {}
                    None => return,
                }
            }
            ProcessEnd::exited(0)
        }
        ["cat"] | ["ready-cat"] => {
            if words == ["ready-cat"] {
                write(socket, STDOUT_TAG, b"ready\r\n").await;
            }
            loop {
                match socket.recv().await {
                    Some(Ok(Message::Binary(data))) => {
                        write(socket, STDOUT_TAG, &data).await;
                        say(socket, &ServerMessage::StdinCredit { bytes: u32::try_from(data.len()).unwrap() }).await;
                    }
                    Some(Ok(Message::Text(text))) if text.as_str().contains("stdin_eof") => break,
                    Some(Ok(_)) => {}
                    _ => return,
                }
            }
            ProcessEnd::exited(0)
        }
        _ => ProcessEnd::exited(0),
    };
    say(socket, &ServerMessage::Exited { end }).await;
    // Lets the client read before the connection goes.
    let _ = tokio::time::timeout(Duration::from_secs(5), socket.recv()).await;
}

async fn fail(socket: &mut WebSocket, code: ErrorCode, message: &str) {
    say(socket, &ServerMessage::Error { error: ApiError::new(code, message) }).await;
    let _ = tokio::time::timeout(Duration::from_secs(5), socket.recv()).await;
}

async fn say(socket: &mut WebSocket, message: &ServerMessage) {
    let _ = socket.send(Message::Text(serde_json::to_string(message).unwrap().into())).await;
}

async fn write(socket: &mut WebSocket, tag: u8, data: &[u8]) {
    let _ = socket.send(Message::Binary([&[tag], data].concat().into())).await;
}

fn lines<T: serde::Serialize>(values: &[T]) -> Response {
    let text: String = values.iter().map(|value| serde_json::to_string(value).unwrap() + "\n").collect();
    ([("content-type", "application/x-ndjson")], text).into_response()
}

async fn logs(Path(name): Path<String>, Query(pairs): Query<Vec<(String, String)>>) -> Response {
    if let Err(refusal) = find(&name) {
        return refusal;
    }
    let record = |source, data: &str| LogRecord {
        time: time("2026-01-02T03:04:05.678Z"),
        boot_id: boot(),
        source,
        data: data.into(),
    };
    let tail: usize =
        pairs.iter().find(|(key, _)| key == "tail").map_or(usize::MAX, |(_, value)| value.parse().unwrap());
    let records = [
        record(LogSource::Stdout, "first\n"),
        record(LogSource::Stderr, "oops\n"),
        record(LogSource::Stdout, "last\n"),
    ];
    lines(&records[records.len().saturating_sub(tail)..])
}

async fn events() -> Response {
    let event = EventRecord {
        sequence: 12,
        time: time("2026-01-02T03:04:05Z"),
        sandbox: SandboxName::parse("sick").unwrap(),
        sandbox_id: "018cc251-f400-7000-8000-000000000001".parse().unwrap(),
        boot_id: Some(boot()),
        event: "state".into(),
        state: SandboxState::Crashed,
        cause: Some(EndCause::GuestPanic),
        actor: "guest".into(),
        message: "kernel panic".into(),
    };
    lines(&[event])
}

fn image() -> ImageSummary {
    ImageSummary {
        digest: DIGEST.into(),
        references: vec!["busybox:latest".into()],
        platform: "linux/amd64".into(),
        compressed_bytes: 900_000,
        unpacked_bytes: 2 << 20,
        layers: 2,
        created_at: None,
        loaded_at: time("2026-01-02T03:00:00Z"),
        pinned: false,
    }
}

async fn load(Query(pairs): Query<Vec<(String, String)>>, body: Body) -> Response {
    // What is a file is named and not sent.
    let body = match pairs.iter().find(|(key, _)| key == "path") {
        Some((_, path)) => Body::from(std::fs::read(path).unwrap()),
        None => body,
    };
    let mut archive = body.into_data_stream();
    let mut bytes = 0u64;
    let mut first = None;
    while let Some(Ok(chunk)) = archive.next().await {
        first = first.or(chunk.first().copied());
        bytes += chunk.len() as u64;
    }
    let warning = LoadEvent::Warning { message: "dropped trusted.overlay.opaque of etc".into() };
    let last = if first == Some(b'!') {
        LoadEvent::Error {
            error: ApiError::new(ErrorCode::InvalidArchive, "the archive ends in the middle of a layer"),
        }
    } else {
        LoadEvent::Done { images: vec![image()] }
    };
    lines(&[LoadEvent::Progress { bytes }, LoadEvent::Layer { diff_id: DIGEST.into(), known: true }, warning, last])
}

async fn remove_image(Query(pairs): Query<Vec<(String, String)>>) -> Response {
    match pairs.iter().find(|(key, _)| key == "reference").map(|(_, name)| name.as_str()) {
        Some("busybox") => Json(ImageRemoval {
            untagged: vec!["busybox:latest".into()],
            deleted: Some(DIGEST.into()),
            bytes_reclaimed: 4096,
        })
        .into_response(),
        Some("used") => {
            let error = ApiError::new(ErrorCode::ImageInUse, "sandboxes use used")
                .with_details(["web".to_owned(), "box".to_owned()]);
            (StatusCode::CONFLICT, Json(error)).into_response()
        }
        other => refuse(ErrorCode::ImageNotFound, format!("no image is called {}", other.unwrap_or("?"))),
    }
}

async fn inspect_image(Query(pairs): Query<Vec<(String, String)>>) -> Response {
    if !pairs.contains(&("reference".into(), "busybox".into())) {
        return refuse(ErrorCode::ImageNotFound, "no such image");
    }
    let layer = |number: u8| ImageLayerDetail {
        diff_id: format!("sha256:{number:064}"),
        blob_digest: format!("sha256:{:064}", number + 1),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        compressed_bytes: 450_000,
        unpacked_bytes: 1 << 20,
        data_bytes: 1 << 20,
        shared_by: u32::from(number),
    };
    let config = ImageConfigDetail {
        digest: DIGEST.into(),
        env: vec!["PATH=/bin".into(), "A=1".into()],
        entrypoint: vec![],
        cmd: vec!["sh".into()],
        working_dir: "/".into(),
        user: "app".into(),
        labels: [("maker".to_owned(), "us".to_owned())].into(),
        stop_signal: None,
        exposed_ports: vec![],
        volumes: vec!["/data".into()],
    };
    Json(ImageDetail {
        summary: image(),
        complete: true,
        config,
        layer_details: vec![layer(1), layer(2)],
        used_by: vec![SandboxName::parse("web").unwrap()],
        used_by_snapshots: vec![SandboxName::parse("warm").unwrap()],
        history: vec![
            ImageHistoryStep {
                created_at: Some(time("2026-01-01T00:00:00Z")),
                created_by: "ADD busybox /".into(),
                diff_id: Some(format!("sha256:{:064}", 1)),
                bytes: 1 << 20,
                ..ImageHistoryStep::default()
            },
            ImageHistoryStep {
                created_by: "CMD [\"sh\"]".into(),
                comment: "by\nhand".into(),
                ..ImageHistoryStep::default()
            },
        ],
    })
    .into_response()
}

fn actors() -> ActorTree {
    let row = |name: &str, parent: &str, state: &str| ActorRow {
        name: name.into(),
        parent: parent.into(),
        handled: 9,
        mailbox: 0,
        restarts: 0,
        last_cause: None,
        state: state.into(),
    };
    ActorTree { actors: vec![row("supervisor", "", "4 sandboxes"), row("sandbox/web", "supervisor", "running")] }
}
