//! The server against many clients at once and against one that wants too much. Everything is in memory: no socket, no other program.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use msb_protocol::error::ApiError;
use msb_protocol::state::ProcessEnd;
use msb_ssh::client::{self, ClientError, Heard, OneTimeKey, Request};
use msb_ssh::target::BoxFuture;
use msb_ssh::{AuthorizedKeys, Command, HostKey, Output, Process, Refusal, Server, ServerOptions, Stream, Target};
use tokio::sync::mpsc;

/// Says what it was asked to run, and ends with its length.
struct Parrot;

impl Target for Parrot {
    fn sftp<'a>(&'a self, _user: &'a str) -> BoxFuture<'a, Result<Box<dyn Stream>, ApiError>> {
        Box::pin(async { Ok(Box::new(tokio::io::empty()) as Box<dyn Stream>) })
    }

    fn start(&self, command: Command) -> BoxFuture<'_, Result<Process, ApiError>> {
        Box::pin(async move {
            let (input, _) = mpsc::channel(1);
            let (control, _) = mpsc::channel(1);
            let (said, output) = mpsc::channel(4);
            let line = command.line.unwrap_or_default();
            let code = i32::try_from(line.len()).unwrap();
            said.send(Output::Stdout(Bytes::from(line))).await.unwrap();
            let end = if code == 0 { ProcessEnd::signalled(64) } else { ProcessEnd::exited(code) };
            said.send(Output::Ended(end)).await.unwrap();
            Ok(Process { input, control, output })
        })
    }

    fn connect<'a>(&'a self, _host: &'a str, _port: u16) -> BoxFuture<'a, Result<Box<dyn Stream>, Refusal>> {
        Box::pin(async { Ok(Box::new(tokio::io::duplex(16).0) as Box<dyn Stream>) })
    }
}

struct Bench {
    host_key: HostKey,
    server: Server<Parrot>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(options: &ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host_key = HostKey::load_or_create(&dir.path().join("host_ed25519")).unwrap();
        let server = Server::new(&host_key, Arc::new(Parrot), options);
        Self { host_key, server, _dir: dir }
    }

    /// A connection on which one key may log in.
    fn connect(&self, authorized: &str) -> tokio::io::DuplexStream {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (server, keys) = (self.server.clone(), AuthorizedKeys::parse(authorized).unwrap());
        tokio::spawn(async move {
            let _ = server.serve(theirs, keys, "test").await;
        });
        ours
    }
}

async fn run(
    stream: tokio::io::DuplexStream,
    host_key: &str,
    key: OneTimeKey,
    line: &str,
) -> Result<Vec<Heard>, ClientError> {
    let request = Request { line: (!line.is_empty()).then(|| line.to_owned()), ..Request::default() };
    let (mut ear, _mouth) = client::start(stream, host_key, key, "user", request).await?;
    let mut heard = Vec::new();
    while let Some(word) = ear.next().await {
        heard.push(word);
    }
    Ok(heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_log_in_at_once_and_none_hears_another() {
    let bench = Bench::new(&ServerOptions::default());
    let host_key = bench.host_key.public_line();
    let clients: Vec<_> = (1..=200)
        .map(|number| {
            let key = OneTimeKey::generate().unwrap();
            let (stream, host_key) = (bench.connect(&key.public_line()), host_key.clone());
            tokio::spawn(async move { run(stream, &host_key, key, &"x".repeat(number)).await })
        })
        .collect();
    for (number, client) in (1u32..).zip(clients) {
        let heard = tokio::time::timeout(Duration::from_secs(300), client).await.unwrap().unwrap().unwrap();
        let said = Bytes::from("x".repeat(number as usize));
        assert_eq!(heard, [Heard::Stdout(said), Heard::Exited(number)]);
    }
    let key = OneTimeKey::generate().unwrap();
    let heard = run(bench.connect(&key.public_line()), &host_key, key, "").await.unwrap();
    assert!(heard.contains(&Heard::Signalled(64)), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_false_servers_and_one_too_many_are_refused() {
    let bench = Bench::new(&ServerOptions { connections_max: 1, ..ServerOptions::default() });
    let (host_key, key) = (bench.host_key.public_line(), OneTimeKey::generate().unwrap());
    let stranger = OneTimeKey::generate().unwrap();
    let refused = run(bench.connect(&key.public_line()), &host_key, stranger, "x").await;
    assert!(matches!(refused, Err(ClientError::Refused)), "{:?}", refused.err());
    let other = Bench::new(&ServerOptions::default());
    let line = key.public_line();
    let false_server = run(other.connect(&line), &host_key, key, "x").await;
    assert!(matches!(false_server, Err(ClientError::HostKey)), "{:?}", false_server.err());
    // The first connection is open and says nothing; the second is closed at once.
    while bench.server.connections() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _silent = bench.connect(&line);
    while bench.server.connections() == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let key = OneTimeKey::generate().unwrap();
    assert!(run(bench.connect(&line), &host_key, key, "x").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_log_in_and_whose_sandbox_goes_is_cut_off() {
    use tokio::io::AsyncReadExt as _;
    let quick = ServerOptions { login_limit: Duration::from_millis(300), ..ServerOptions::default() };
    let bench = Bench::new(&quick);
    let mut silent = bench.connect("");
    let mut said = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), silent.read_to_end(&mut said)).await.unwrap().unwrap();
    assert!(said.starts_with(b"SSH-2.0-msb_"));
    let bench = Bench::new(&ServerOptions::default());
    let key = OneTimeKey::generate().unwrap();
    let mut waiting = bench.connect(&key.public_line());
    bench.server.close();
    tokio::time::timeout(Duration::from_secs(60), waiting.read_to_end(&mut said)).await.unwrap().unwrap();
}
