//! The control API as any client sees it: plain HTTP on the socket, described by its own document.

use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use msb_tests::Home;
use serde_json::Value;

/// The daemon's socket: the one that answers in the home's runtime folder.
fn socket(folder: &Path) -> Option<PathBuf> {
    std::fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        let kind = entry.file_type().ok()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() {
            return socket(&entry.path());
        }
        (kind.is_socket() && name.starts_with("msbd") || name == "api.sock").then(|| entry.path())
    })
}

/// One request; the status and the body.
fn get(home: &Home, path: &str) -> (u16, String) {
    let socket = socket(&home.runtime()).expect("the daemon's socket");
    let mut stream = UnixStream::connect(&socket).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: msb\r\nConnection: close\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let status =
        answer.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no status: {answer:?}"));
    (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

#[test]
fn the_api_describes_itself_and_answers_errors_with_codes() {
    let home = Home::new("api");
    home.succeeds(&["ls"]);
    let (status, body) = get(&home, "/openapi.json");
    assert_eq!(status, 200, "{body}");
    let document: Value = serde_json::from_str(body.trim()).expect("JSON");
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{}", document["openapi"]);
    for path in ["/v1/version", "/v1/sandboxes", "/v1/images", "/v1/events"] {
        assert!(document["paths"].get(path).is_some(), "{path} is not described");
    }
    let (status, body) = get(&home, "/v1/sandboxes/nobody");
    assert_eq!(status, 404, "{body}");
    let error: Value = serde_json::from_str(body.trim()).expect("JSON");
    let error = error.get("error").unwrap_or(&error);
    assert_eq!(error["code"], "sandbox_not_found", "{error}");
    for path in ["/v1/nothing", "/v1/sandboxes/..%2f..%2fetc", "/v1/events?since=x", "/v1/sandboxes/a/logs?tail=-1"] {
        let (status, body) = get(&home, path);
        assert!((400..500).contains(&status), "{path}: {status} {body}");
    }
    home.finish();
}
