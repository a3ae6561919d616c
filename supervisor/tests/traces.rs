//! `msbd` as a program sends its traces to the collector that its environment names.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// Reads requests and answers each with success; gives their bytes.
fn collector() -> (u16, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, tell) = (stream.unwrap(), tell.clone());
            std::thread::spawn(move || {
                let (mut bytes, mut buffer) = (Vec::new(), [0u8; 4096]);
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    bytes.extend_from_slice(&buffer[..count]);
                    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
                    let text = String::from_utf8_lossy(&bytes).to_lowercase();
                    let length =
                        text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
                    if let (Some(head), Some(length)) = (head, length)
                        && bytes.len() >= head + length
                    {
                        let _ = tell.send(std::mem::take(&mut bytes));
                        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
                    }
                }
            });
        }
    });
    (port, told)
}

#[test]
fn requests_become_spans_at_the_collector() {
    let (port, told) = collector();
    let directory = tempfile::Builder::new().prefix("msb-t-").tempdir_in("/tmp").unwrap();
    let (home, runtime) = (directory.path().join("home"), directory.path().join("run"));
    std::fs::create_dir_all(&home).unwrap();
    std::fs::create_dir_all(&runtime).unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_msbd"))
        .env_clear()
        .env("MSB_HOME", &home)
        .env("HOME", &home)
        .env("XDG_RUNTIME_DIR", &runtime)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}"))
        .env("OTEL_BSP_SCHEDULE_DELAY", "100")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let surroundings = msb_protocol::paths::Surroundings {
        msb_home: Some(home.clone()),
        home: Some(home),
        xdg_runtime_dir: Some(runtime),
        ..Default::default()
    };
    let begin = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(surroundings.control_socket()) {
            Ok(stream) => break stream,
            Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    stream.write_all(b"GET /v1/sandboxes/nobody HTTP/1.1\r\nhost: msb\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let request = told.recv_timeout(PATIENCE);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let text = String::from_utf8_lossy(&request.unwrap()).into_owned();
    assert!(text.starts_with("POST /v1/traces HTTP/1.1"), "{text}");
    for part in ["GET /v1/sandboxes/{name}", "http.route", "nobody", "host.id", "msbd"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
}
