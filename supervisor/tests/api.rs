//! The control API over a real Unix socket, with fake VMs behind it.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use msb_actors::clock::SystemClock;
use msb_actors::simulation::{FakeLauncher, daemon};
use msb_protocol::control::{MetricsSnapshot, STDERR_TAG, STDOUT_TAG, SandboxMetrics};
use msb_protocol::error::ErrorCode;
use msb_protocol::fleet::{self, FLEET_MEDIA_TYPE};
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::Sample;
use msb_supervisor::api::{self, ApiState};
use msb_supervisor::host::HostProbe;
use msb_supervisor::server;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_tungstenite::tungstenite::Message;

struct World {
    directory: tempfile::TempDir,
    launcher: Arc<FakeLauncher>,
}

fn serve<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    let system = actix::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    });
    system.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock::default());
        let launcher = FakeLauncher::new(clock.clone());
        let daemon = daemon(directory.path(), clock, launcher.clone());
        let listener = server::listen(&directory.path().join("msbd.sock")).unwrap().listener;
        let state = ApiState::new(daemon, HostProbe::new("/nonexistent/msb-vmm".into(), None), directory.path().into());
        let serving = tokio::spawn(server::serve(listener, None, api::router(state)));
        tokio::time::timeout(Duration::from_secs(60), test(World { directory, launcher }))
            .await
            .expect("the test hangs");
        serving.abort();
    });
}

async fn raw(socket: &Path, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: msbd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // A service that refuses early closes before it has read everything.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    (status, if chunked { unchunk(body) } else { body.to_owned() })
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((len, rest)) = body.split_once("\r\n") {
        let len = usize::from_str_radix(len, 16).unwrap();
        if len == 0 {
            break;
        }
        whole.push_str(&rest[..len]);
        body = &rest[len + 2..];
    }
    whole
}

impl World {
    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("msbd.sock")
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let (status, text) = raw(&self.socket(), method, path, &bytes).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn create(&self, name: &str, more: Value) -> (u16, Value) {
        let mut spec = json!({"image": "busybox", "name": name, "detached": true});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.call("POST", "/v1/sandboxes", json!({"spec": spec})).await
    }

    async fn stream(&self, path: &str) -> tokio_tungstenite::WebSocketStream<UnixStream> {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        tokio_tungstenite::client_async(format!("ws://msbd{path}"), stream).await.unwrap().0
    }
}

fn text(value: Value) -> Message {
    Message::Text(value.to_string().into())
}

/// Reads a stream to its end: standard output, standard error, and every other message.
async fn drain(stream: &mut tokio_tungstenite::WebSocketStream<UnixStream>) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
    let (mut out, mut err, mut messages) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(Ok(message)) = stream.next().await {
        match message {
            Message::Binary(data) if data[0] == STDOUT_TAG => out.extend_from_slice(&data[1..]),
            Message::Binary(data) if data[0] == STDERR_TAG => err.extend_from_slice(&data[1..]),
            Message::Text(text) => messages.push(serde_json::from_str(&text).unwrap()),
            _ => {}
        }
    }
    (out, err, messages)
}

#[test]
fn the_life_of_a_sandbox_over_http() {
    serve(|world| async move {
        let (status, detail) = world.create("box", json!({"labels": {"team": "ml"}})).await;
        assert_eq!(
            (status, &detail["status"], &detail["network"]["addresses"]["guest_ipv4"]),
            (200, &json!("running"), &json!("172.16.0.2")),
            "{detail}"
        );
        let (status, error) = world.create("box", json!({})).await;
        assert_eq!((status, &error["code"]), (409, &json!("sandbox_already_exists")));
        let (_, list) = world.call("GET", "/v1/sandboxes?label=team%3Dml&label=team", Value::Null).await;
        assert_eq!(list["sandboxes"].as_array().unwrap().len(), 1);
        let (_, list) = world.call("GET", "/v1/sandboxes?label=team%3Dweb", Value::Null).await;
        assert!(list["sandboxes"].as_array().unwrap().is_empty());
        let (status, error) = world.call("DELETE", "/v1/sandboxes/box", Value::Null).await;
        assert_eq!((status, &error["code"]), (409, &json!("sandbox_still_running")));
        let (_, stopped) = world.call("POST", "/v1/sandboxes/box/stop", Value::Null).await;
        assert_eq!((&stopped["status"], &stopped["last_end"]["cause"]), (&json!("stopped"), &json!("stop_requested")));
        let (_, started) = world.call("POST", "/v1/sandboxes/box/start", json!({})).await;
        assert_eq!(started["status"], "running");
        let (_, restarted) = world.call("POST", "/v1/sandboxes/box/restart", json!({"grace_ms": 1})).await;
        assert_ne!(restarted["boot_id"], started["boot_id"]);
        assert_eq!(world.call("DELETE", "/v1/sandboxes/box?force=true", Value::Null).await.0, 200);
        let (status, error) = world.call("GET", "/v1/sandboxes/box", Value::Null).await;
        assert_eq!((status, &error["code"]), (404, &json!("sandbox_not_found")));
        assert_eq!(world.launcher.alive(), 0);
        let (_, events) = world.call("GET", "/v1/events", Value::Null).await;
        let events: Vec<Value> =
            events.as_str().unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&events[0]["event"], &events.last().unwrap()["event"]), (&json!("created"), &json!("removed")));
        assert!(
            events.windows(2).all(|pair| pair[1]["sequence"].as_u64() == pair[0]["sequence"].as_u64().map(|n| n + 1))
        );
    });
}

#[test]
fn what_cannot_be_understood_is_refused_with_a_code() {
    serve(|world| async move {
        for (method, path, body, status, code) in [
            ("POST", "/v1/sandboxes", json!({"spec": {"image": "busybox", "cpu": 1}}), 400, ErrorCode::InvalidRequest),
            (
                "POST",
                "/v1/sandboxes",
                json!({"spec": {"image": "busybox", "cpus": 0, "detached": true}}),
                400,
                ErrorCode::InvalidConfig,
            ),
            (
                "POST",
                "/v1/sandboxes",
                json!({"spec": {"image": "nginx", "detached": true}}),
                404,
                ErrorCode::ImageNotFound,
            ),
            (
                "POST",
                "/v1/sandboxes",
                json!({"spec": {"image": "busybox", "detached": true, "labels": {"service.x": ""}}}),
                400,
                ErrorCode::InvalidLabel,
            ),
            ("GET", "/v1/sandboxes/..%2Fx", Value::Null, 400, ErrorCode::InvalidName),
            ("GET", "/v1/sandboxes?lable=x", Value::Null, 400, ErrorCode::InvalidRequest),
            ("GET", "/v1/sandboxes/nobody/logs?source=x", Value::Null, 400, ErrorCode::InvalidRequest),
            ("GET", "/v1/nothing", Value::Null, 400, ErrorCode::InvalidRequest),
            ("GET", "/v1/host", Value::Null, 503, ErrorCode::EngineUnavailable),
            ("GET", "/v1/image?reference=nginx", Value::Null, 404, ErrorCode::ImageNotFound),
            ("POST", "/v1/sandboxes/nobody/stop", json!({}), 404, ErrorCode::SandboxNotFound),
        ] {
            let (got, answer) = world.call(method, path, body).await;
            assert_eq!((got, &answer["code"]), (status, &json!(code.as_str())), "{method} {path}: {answer}");
            assert!(!answer["hint"].as_str().unwrap().is_empty());
        }
        assert!(world.call("GET", "/v1/sandboxes", Value::Null).await.1["sandboxes"].as_array().unwrap().is_empty());
    });
}

#[test]
fn commands_stream_in_and_out_and_tell_their_ends() {
    serve(|world| async move {
        world.create("box", json!({})).await;
        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["exit", "7"]}}))).await.unwrap();
        let (out, err, messages) = drain(&mut stream).await;
        assert_eq!((out.as_slice(), err.as_slice()), (&b""[..], &b"going\n"[..]));
        assert_eq!(messages[0], json!({"type": "started", "pid": 7}));
        assert_eq!(messages.last().unwrap()["end"]["code"], 7);

        // A megabyte through stdin and back, within the credit.
        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["cat"], "stdin": true}}))).await.unwrap();
        let (mut credit, mut left, mut back) = (256u64 << 10, 1u64 << 20, 0u64);
        while back < 1 << 20 {
            let piece = left.min(credit).min(100_000);
            if piece > 0 {
                stream.send(Message::Binary(vec![b'x'; usize::try_from(piece).unwrap()].into())).await.unwrap();
                (left, credit) = (left - piece, credit - piece);
                continue;
            }
            match stream.next().await.unwrap().unwrap() {
                Message::Binary(data) => back += data.len() as u64 - 1,
                Message::Text(text) => {
                    credit += serde_json::from_str::<Value>(&text).unwrap()["bytes"].as_u64().unwrap_or(0)
                }
                _ => {}
            }
        }
        stream.send(text(json!({"type": "stdin_eof"}))).await.unwrap();
        let (_, _, messages) = drain(&mut stream).await;
        assert_eq!(messages.last().unwrap()["end"]["code"], 0);

        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["sleep"]}}))).await.unwrap();
        stream.send(text(json!({"type": "signal", "number": 9}))).await.unwrap();
        assert_eq!(drain(&mut stream).await.2.last().unwrap()["end"]["signal"], 9);

        for (first, code) in [
            (json!({"type": "exec", "exec": {"command": ["missing"]}}), "exec_not_found"),
            (json!({"type": "exec", "exec": {"command": []}}), "invalid_request"),
            (json!({"type": "exec", "exec": {"command": ["a"], "env": {"A": "b\u{0}"}}}), "invalid_config"),
            (json!({"type": "stdin_eof"}), "invalid_request"),
            (json!({"type": "new"}), "invalid_request"),
        ] {
            let mut stream = world.stream("/v1/sandboxes/box/exec").await;
            stream.send(text(first)).await.unwrap();
            assert_eq!(drain(&mut stream).await.2.last().unwrap()["error"]["code"], code);
        }
    });
}

#[test]
fn a_client_that_ignores_its_credit_is_cut_off_and_one_that_is_lost_ends_its_command() {
    serve(|world| async move {
        world.create("box", json!({"idle_timeout_ms": 600_000})).await;
        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["sleep"], "stdin": true}}))).await.unwrap();
        for _ in 0..5 {
            // The service may have closed already.
            let _ = stream.send(Message::Binary(vec![0; 64 << 10].into())).await;
        }
        assert_eq!(drain(&mut stream).await.2.last().unwrap()["error"]["code"], "invalid_request");

        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["yes"]}}))).await.unwrap();
        let _ = stream.next().await;
        // A client that does not read makes the guest wait: nothing of it piles up here.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let active = world.call("GET", "/v1/sandboxes/box", Value::Null).await.1;
        assert_eq!((&active["idle_for_ms"], &active["last_activity"]), (&json!(0), &json!("exec")));
        drop(stream);
        for _ in 0..500 {
            if world.call("GET", "/v1/sandboxes/box", Value::Null).await.1["idle_for_ms"].as_u64() > Some(0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the session of a lost client is still active");
    });
}

#[test]
fn a_vm_that_dies_under_a_command_is_told_as_exec_lost() {
    serve(|world| async move {
        world.create("box", json!({"restart": {"policy": "no"}})).await;
        let mut stream = world.stream("/v1/sandboxes/box/exec").await;
        stream.send(text(json!({"type": "exec", "exec": {"command": ["sleep"]}}))).await.unwrap();
        let _ = stream.next().await;
        world.launcher.crash("box", EndCause::VmmCrash);
        let (_, waited) = world.call("GET", "/v1/sandboxes/box/wait", Value::Null).await;
        assert_eq!((&waited["status"], &waited["last_end"]["cause"]), (&json!("crashed"), &json!("vmm_crash")));
        let mut again = world.stream("/v1/sandboxes/box/exec").await;
        again.send(text(json!({"type": "exec", "exec": {"command": ["echo"]}}))).await.unwrap();
        assert_eq!(drain(&mut again).await.2.last().unwrap()["error"]["code"], "sandbox_not_running");
    });
}

#[test]
fn a_held_workload_starts_with_its_stream_and_its_end_is_the_sandboxs() {
    serve(|world| async move {
        let spec = json!({"image": "busybox", "name": "run", "detached": true, "workload": "main", "command": ["echo", "main"]});
        let (status, _) = world.call("POST", "/v1/sandboxes", json!({"spec": spec, "hold_main": true})).await;
        assert_eq!(status, 200);
        assert!(!world.launcher.spec_of("run").unwrap().guest.main.unwrap().autostart);
        let mut stream = world.stream("/v1/sandboxes/run/main").await;
        stream
            .send(text(json!({"type": "attach", "stdin": false, "terminal": null, "timeout_ms": null})))
            .await
            .unwrap();
        let (out, _, messages) = drain(&mut stream).await;
        assert_eq!((out.as_slice(), &messages.last().unwrap()["end"]["code"]), (&b"main\n"[..], &json!(0)));
        let (_, waited) = world.call("GET", "/v1/sandboxes/run/wait", Value::Null).await;
        assert_eq!((&waited["status"], &waited["last_end"]["process"]["code"]), (&json!("stopped"), &json!(0)));
    });
}

#[test]
fn logs_are_followed_to_the_end_of_the_run_and_events_to_the_clients_end() {
    serve(|world| async move {
        world.create("box", json!({"workload": "main", "command": ["serve"]})).await;
        let log = world.directory.path().join("sandboxes/box/logs/workload.jsonl");
        let boot_id = world.launcher.boots()[0];
        let line = |data: &str| {
            json!({"time": "2026-01-01T00:00:00Z", "boot_id": boot_id.to_string(), "source": "stdout", "data": data})
                .to_string()
                + "\n"
        };
        std::fs::write(&log, line("one\n")).unwrap();
        let following = {
            let socket = world.socket();
            tokio::spawn(async move { raw(&socket, "GET", "/v1/sandboxes/box/logs?follow=true", b"").await })
        };
        tokio::time::sleep(Duration::from_millis(200)).await;
        std::fs::write(&log, line("one\n") + &line("two\n")).unwrap();
        world.launcher.exit_main("box", ProcessEnd::exited(0));
        let (status, text) = following.await.unwrap();
        let data: Vec<Value> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["data"].clone()).collect();
        assert_eq!((status, data), (200, vec![json!("one\n"), json!("two\n")]));

        let mut stream = UnixStream::connect(world.socket()).await.unwrap();
        stream.write_all(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: msbd\r\n\r\n").await.unwrap();
        world.call("DELETE", "/v1/sandboxes/box", Value::Null).await;
        let mut seen = String::new();
        let mut buffer = vec![0; 4096];
        while !seen.contains("\"removed\"") {
            let read = stream.read(&mut buffer).await.unwrap();
            assert_ne!(read, 0, "the stream of events ended");
            seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
    });
}

#[test]
fn archives_are_streamed_in_and_their_progress_out() {
    serve(|world| async move {
        let (status, text) = raw(&world.socket(), "POST", "/v1/images/load?tag=x", &vec![7; 3 << 20]).await;
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((status, &lines.last().unwrap()["type"]), (200, &json!("done")));
        let (_, text) = raw(&world.socket(), "POST", "/v1/images/load", b"").await;
        assert_eq!(
            serde_json::from_str::<Value>(text.lines().last().unwrap()).unwrap()["error"]["code"],
            "invalid_archive"
        );
        world.create("box", json!({})).await;
        let (status, error) = world.call("DELETE", "/v1/image?reference=busybox", Value::Null).await;
        assert_eq!((status, &error["code"]), (409, &json!("image_in_use")));
        let (_, detail) = world.call("GET", "/v1/image?reference=busybox", Value::Null).await;
        assert_eq!(detail["used_by"], json!(["box"]));
    });
}

#[test]
fn images_are_pulled_saved_named_and_pruned() {
    serve(|world| async move {
        let pull = json!({"reference": "busybox", "credentials": {"username": "me", "password": "secret"}});
        let (status, text) = raw(&world.socket(), "POST", "/v1/images/pull", pull.to_string().as_bytes()).await;
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((status, &lines[0]["type"], &lines[1]["type"]), (200, &json!("resolved"), &json!("layer_done")));
        assert_eq!(
            lines.last().unwrap()["image"]["digest"],
            "sha256:b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0"
        );
        assert!(!text.contains("secret"));
        let (_, gone) = world.call("POST", "/v1/images/pull", json!({"reference": "nothing"})).await;
        assert_eq!(gone["error"]["code"], "image_not_found", "{gone}");
        let (status, archive) = world.call("POST", "/v1/images/save", json!({"references": ["busybox", "app"]})).await;
        assert_eq!((status, archive), (200, json!("busybox,app")));
        let (status, error) = world.call("POST", "/v1/images/save", json!({"references": ["nothing"]})).await;
        assert_eq!((status, &error["code"]), (404, &json!("image_not_found")));
        assert_eq!(world.call("POST", "/v1/images/save", json!({"references": []})).await.0, 400);
        let (status, error) = world.create("x", json!({"image": "nothing"})).await;
        assert_eq!((status, &error["code"]), (404, &json!("image_not_found")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("fetching it failed"), "{error}");
        world.create("web", json!({})).await;
        let (_, report) = world.call("POST", "/v1/images/prune", json!({"dry_run": true})).await;
        assert_eq!((&report["dry_run"], &report["manifests_removed"]), (&json!(true), &json!(1)), "one is in use");
        let (_, usage) = world.call("GET", "/v1/store/usage", Value::Null).await;
        let kinds: Vec<_> = usage["rows"].as_array().unwrap().iter().map(|row| row["kind"].clone()).collect();
        assert_eq!(kinds, ["images", "sandboxes", "logs", "snapshots", "ready forks"]);
        let login =
            |password: &str| json!({"registry": "r.test", "credentials": {"username": "me", "password": password}});
        assert_eq!(world.call("POST", "/v1/registries/login", login("wrong")).await.0, 401);
        assert_eq!(world.call("POST", "/v1/registries/login", login("right")).await.0, 200);
        assert_eq!(world.call("DELETE", "/v1/registries/login?registry=r.test", Value::Null).await.0, 200);
    });
}

#[test]
fn the_service_describes_itself() {
    serve(|world| async move {
        let (_, version) = world.call("GET", "/v1/version", Value::Null).await;
        assert_eq!(
            (version["api_version"].as_u64(), version["pid"].as_u64()),
            (Some(1), Some(u64::from(std::process::id())))
        );
        let (_, document) = world.call("GET", "/openapi.json", Value::Null).await;
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        let (_, tree) = world.call("GET", "/v1/debug/actors", Value::Null).await;
        let names: Vec<&str> =
            tree["actors"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["supervisor", "images", "snapshots", "pool", "metrics"]);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(world.socket()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(server::listen(&world.socket()).unwrap_err().code, ErrorCode::DaemonRunning);
    });
}

#[test]
fn metrics_are_told_in_json_and_in_the_compact_form_to_whom_asks_for_it() {
    serve(|world| async move {
        world.create("web", json!({"labels": {"team": "ml"}})).await;
        for _ in 0..500 {
            let (_, snapshot) = world.call("GET", "/v1/metrics", Value::Null).await;
            if snapshot["sandboxes"].as_array().is_some_and(|rows| !rows.is_empty()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let asked = async |accept: &str| {
            let mut stream = UnixStream::connect(world.socket()).await.unwrap();
            let head = format!(
                "GET /v1/metrics?label=team%3Dml HTTP/1.1\r\nHost: msbd\r\nConnection: close\r\nAccept: {accept}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end + 4..].to_vec())
        };
        let (head, body) = asked(&format!("application/json, {FLEET_MEDIA_TYPE}")).await;
        assert!(head.contains(&format!("content-type: {FLEET_MEDIA_TYPE}")), "{head}");
        let compact = fleet::decode(body.into()).unwrap();
        let (head, body) = asked("*/*").await;
        assert!(head.contains("content-type: application/json"), "{head}");
        let plain: MetricsSnapshot = serde_json::from_slice(&body).unwrap();
        // Asked a moment later: a second may have passed.
        let row = |snapshot: &MetricsSnapshot| {
            let row = snapshot.sandboxes[0].clone();
            let sample = Sample { started_at_ns: row.sample.started_at_ns, ..Sample::default() };
            (snapshot.host_id.clone(), snapshot.states.clone(), SandboxMetrics { sample, cpu_utilization: 0.0, ..row })
        };
        assert_eq!(row(&compact), row(&plain));
        assert_eq!((compact.sandboxes[0].labels["team"].as_str(), compact.sandboxes[0].last), ("ml", false));
    });
}

#[test]
fn an_attached_sandbox_belongs_to_the_process_on_the_connection() {
    serve(|world| async move {
        // This very process is the creator, so its sandbox goes on.
        let (status, detail) = world.create("mine", json!({"detached": false})).await;
        assert_eq!((status, &detail["status"]), (200, &json!("running")), "{detail}");
        let (_, detached) = world.call("POST", "/v1/sandboxes/mine/detach", Value::Null).await;
        assert_eq!(detached["spec"]["detached"], true);
    });
}
