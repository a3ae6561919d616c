//! Starting a daemon on demand: many clients at once start one. The daemon is this test program itself, run again.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use axum::Router;
use axum::response::Json;
use axum::routing::get;
use msb_protocol::control::VersionInfo;
use msb_protocol::error::ErrorCode;
use msb_protocol::paths::{HomeLayout, Surroundings};
use msb_sdk::Locator;

/// Says to this program that it is to be the daemon, and where. `MSB_*` variables reach a daemon.
const SOCKET_VARIABLE: &str = "MSB_TEST_DAEMON_SOCKET";

/// A home and a runtime directory of the test's own.
fn surroundings(directory: &std::path::Path) -> Surroundings {
    Surroundings {
        msb_home: Some(directory.join("home")),
        xdg_runtime_dir: Some(directory.join("run")),
        uid: rustix::process::getuid().as_raw(),
        ..Default::default()
    }
}

/// What a daemon of these tests says of itself.
fn version_info() -> VersionInfo {
    VersionInfo {
        version: "0".into(),
        api_version: 1,
        guest_generation: 1,
        pid: std::process::id(),
        started_at: jiff::Timestamp::now(),
    }
}

#[test]
fn daemon_of_the_other_test() {
    let Some(socket) = std::env::var_os(SOCKET_VARIABLE) else { return };
    // Slow enough that every client finds nobody there.
    std::thread::sleep(Duration::from_millis(200));
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let socket = std::path::PathBuf::from(socket);
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let version = version_info();
        let router = Router::new().route("/v1/version", get(move || async move { Json(version) }));
        let _ = tokio::time::timeout(Duration::from_secs(10), async { axum::serve(listener, router).await }).await;
    });
}

/// A service that is killed in the middle of things: its first connection ends without a word, its second one after the welcome.
/// Whoever reads is answered all the same; what could have been carried out is not asked again.
#[tokio::test]
async fn a_service_that_goes_away_under_a_reader_is_looked_for_once_more() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let surroundings = surroundings(dir.path());
    let socket = surroundings.control_socket();
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let version = version_info();
    let requests = tokio::spawn(async move {
        let mut requests = Vec::new();
        // How many requests each connection answers before it ends.
        'connections: for answers in [0, 1, 2, 1] {
            let (mut stream, _) = listener.accept().await.unwrap();
            for number in 0..=answers {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { continue 'connections };
                    head.push(byte);
                }
                let line = String::from_utf8_lossy(&head).lines().next().unwrap().to_owned();
                if number == answers {
                    requests.push(format!("{line} lost"));
                    break;
                }
                let body = if line.contains("/v1/version") {
                    serde_json::to_string(&version).unwrap()
                } else {
                    r#"{"sandboxes":[]}"#.to_owned()
                };
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(head.as_bytes()).await.unwrap();
                requests.push(line);
            }
        }
        requests
    });
    let locator = Locator {
        surroundings,
        daemon: Some("/nonexistent/msbd".into()),
        runtime_path: None,
        executable_dir: None,
        search_path: Vec::new(),
        host_socket: "/nonexistent/msbd.sock".into(),
        start_timeout: Duration::from_secs(20),
    };
    let reader = locator.connect().await.unwrap();
    assert!(reader.list(&[]).await.unwrap().sandboxes.is_empty());
    drop(reader);
    let client = locator.connect().await.unwrap();
    assert_eq!(client.touch(&"web".parse().unwrap()).await.unwrap_err().code(), ErrorCode::DaemonUnavailable);
    assert_eq!(
        requests.await.unwrap(),
        [
            "GET /v1/version HTTP/1.1 lost",
            "GET /v1/version HTTP/1.1",
            "GET /v1/sandboxes HTTP/1.1 lost",
            "GET /v1/version HTTP/1.1",
            "GET /v1/sandboxes HTTP/1.1",
            "GET /v1/version HTTP/1.1",
            "POST /v1/sandboxes/web/touch HTTP/1.1 lost",
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_at_once_start_one_daemon_in_a_session_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let surroundings = surroundings(dir.path());
    let program = dir.path().join("msbd");
    let script = format!(
        "#!/bin/sh\necho started $$ >> {dir}/starts\nexport {SOCKET_VARIABLE}={socket}\nexec {exe} --exact daemon_of_the_other_test --nocapture\n",
        dir = dir.path().display(),
        socket = surroundings.control_socket().display(),
        exe = std::env::current_exe().unwrap().display(),
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let home = HomeLayout::new(surroundings.home_dir());
    let locator = Locator {
        surroundings,
        daemon: Some(program),
        runtime_path: None,
        executable_dir: None,
        search_path: Vec::new(),
        host_socket: "/nonexistent/msbd.sock".into(),
        start_timeout: Duration::from_secs(20),
    };
    let clients = (0..8).map(|_| {
        let locator = locator.clone();
        tokio::spawn(async move { locator.connect().await.unwrap().version().pid })
    });
    let mut pids = Vec::new();
    for client in clients {
        pids.push(client.await.unwrap());
    }
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    assert_eq!(std::fs::read_to_string(dir.path().join("starts")).unwrap().lines().count(), 1);
    let pid = rustix::process::Pid::from_raw(pids[0].cast_signed()).unwrap();
    assert_eq!(rustix::process::getsid(Some(pid)).unwrap(), pid, "it leads its own session");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&home.home), mode(&home.daemon_log())), (0o700, 0o600));
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
