//! The client against a service made of canned answers: the wire, credit, lost connections, errors. The routes and bodies are
//! those of `msb_protocol::control`; what a real daemon does with them is the business of the whole-system tests.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use msb_protocol::control::{
    ClientMessage, LoadEvent, STDERR_TAG, STDOUT_TAG, STREAM_UPGRADE, ServerMessage, StreamAnswer, VersionInfo,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame;
use msb_protocol::guest::{
    Assembler, Exited, GuestBody, HostBody, Output, OutputStream, STDIN_WINDOW, Started, encode_guest,
};
use msb_protocol::id::SandboxName;
use msb_protocol::state::ProcessEnd;
use msb_protocol::version::{CONTROL_API_VERSION, GUEST_GENERATION};
use msb_sdk::client::LoadOptions;
use msb_sdk::{Client, Error, Exec, Session, SessionEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

fn version(api_version: u32) -> VersionInfo {
    VersionInfo {
        version: "0.0.0".into(),
        api_version,
        guest_generation: GUEST_GENERATION,
        pid: 1,
        started_at: "2026-01-02T03:04:05Z".parse().unwrap(),
    }
}

struct Service {
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

fn serve(router: Router) -> Service {
    serve_version(router, CONTROL_API_VERSION)
}

fn serve_version(router: Router, api_version: u32) -> Service {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let router = router.route("/v1/version", get(move || async move { Json(version(api_version)) }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Service { _dir: dir, socket }
}

fn name() -> SandboxName {
    SandboxName::parse("box").unwrap()
}

async fn say(socket: &mut WebSocket, message: &ServerMessage) {
    socket.send(Message::Text(serde_json::to_string(message).unwrap().into())).await.unwrap();
}

async fn output(socket: &mut WebSocket, tag: u8, data: &[u8]) {
    let mut bytes = vec![tag];
    bytes.extend_from_slice(data);
    socket.send(Message::Binary(bytes.into())).await.unwrap();
}

async fn first(socket: &mut WebSocket) -> ClientMessage {
    let Some(Ok(Message::Text(text))) = socket.recv().await else { panic!("no first message") };
    serde_json::from_str(text.as_str()).unwrap()
}

fn exec_route<F, R>(handler: F) -> Router
where
    F: Fn(WebSocket) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    Router::new().route(
        "/v1/sandboxes/box/exec",
        get(move |upgrade: WebSocketUpgrade| async move { upgrade.on_upgrade(handler) }),
    )
}

/// What is told of a session to its end.
async fn all_of(mut session: Session) -> Vec<SessionEvent> {
    let mut events = Vec::new();
    while let Some(event) = session.next().await.unwrap() {
        events.push(event);
    }
    events
}

#[tokio::test]
async fn output_and_end_arrive_in_order() {
    let service = serve(exec_route(|mut socket| async move {
        let ClientMessage::Exec { exec } = first(&mut socket).await else { panic!() };
        assert_eq!(exec.command, ["echo", "hi"]);
        say(&mut socket, &ServerMessage::Started { pid: 7 }).await;
        output(&mut socket, STDOUT_TAG, b"out").await;
        output(&mut socket, STDERR_TAG, b"err").await;
        say(&mut socket, &ServerMessage::Exited { end: ProcessEnd::exited(3) }).await;
    }));
    let client = Client::at(&service.socket).await.unwrap();
    let session = client.exec(&name(), Exec::new(["echo", "hi"]).into_request()).await.unwrap();
    let events = all_of(session).await;
    assert_eq!(
        events,
        [
            SessionEvent::Started { pid: 7 },
            SessionEvent::Stdout("out".into()),
            SessionEvent::Stderr("err".into()),
            SessionEvent::Exited(ProcessEnd::exited(3)),
        ]
    );
}

#[tokio::test]
async fn stdin_stays_within_the_credit_and_signals_pass_it() {
    let service = serve(exec_route(|mut socket| async move {
        first(&mut socket).await;
        let mut received = 0usize;
        let mut signalled = false;
        // The whole first window arrives, then nothing but the signal, until credit is given.
        while received < STDIN_WINDOW as usize || !signalled {
            match socket.recv().await.unwrap().unwrap() {
                Message::Binary(data) => received += data.len(),
                Message::Text(text) => {
                    assert_eq!(
                        serde_json::from_str::<ClientMessage>(text.as_str()).unwrap(),
                        ClientMessage::Signal { number: 2 }
                    );
                    signalled = true;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(received, STDIN_WINDOW as usize);
        assert!(tokio::time::timeout(Duration::from_millis(50), socket.recv()).await.is_err());
        say(&mut socket, &ServerMessage::StdinCredit { bytes: 1000 }).await;
        let Some(Ok(Message::Binary(data))) = socket.recv().await else { panic!() };
        received += data.len();
        let Some(Ok(Message::Text(text))) = socket.recv().await else { panic!() };
        assert_eq!(serde_json::from_str::<ClientMessage>(text.as_str()).unwrap(), ClientMessage::StdinEof);
        output(&mut socket, STDOUT_TAG, received.to_string().as_bytes()).await;
        say(&mut socket, &ServerMessage::Exited { end: ProcessEnd::exited(0) }).await;
    }));
    let client = Client::at(&service.socket).await.unwrap();
    let mut session = client.exec(&name(), Exec::new(["cat"]).stdin_open().into_request()).await.unwrap();
    let mut stdin = session.take_stdin().unwrap();
    let control = session.control();
    let length = STDIN_WINDOW as usize + 1000;
    tokio::spawn(async move {
        stdin.write_all(&vec![b'x'; length]).await.unwrap();
        stdin.finish().await.unwrap();
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    control.signal(2).await.unwrap();
    assert_eq!(session.next().await.unwrap(), Some(SessionEvent::Stdout(length.to_string().into())));
    assert_eq!(session.next().await.unwrap(), Some(SessionEvent::Exited(ProcessEnd::exited(0))));
    assert_eq!(session.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_connection_that_ends_before_the_command_is_exec_lost() {
    let service = serve(exec_route(|mut socket| async move {
        first(&mut socket).await;
        say(&mut socket, &ServerMessage::Started { pid: 7 }).await;
    }));
    let client = Client::at(&service.socket).await.unwrap();
    let mut session = client.exec(&name(), Exec::new(["cat"]).stdin_open().into_request()).await.unwrap();
    let mut stdin = session.take_stdin().unwrap();
    let writer = tokio::spawn(async move { stdin.write_all(&vec![0; 1 << 20]).await });
    session.next().await.unwrap();
    assert_eq!(session.next().await.unwrap_err().code(), ErrorCode::ExecLost);
    // A writer that waited for credit is let go.
    let writer = tokio::time::timeout(Duration::from_secs(5), writer).await.unwrap().unwrap();
    assert_eq!(writer.unwrap_err().code(), ErrorCode::ExecLost);
}

#[tokio::test]
async fn errors_come_typed_before_and_after_the_upgrade() {
    let refused = ApiError::new(ErrorCode::SandboxNotRunning, "box is stopped");
    let answer = refused.clone();
    let router = exec_route(|mut socket| async move {
        first(&mut socket).await;
        say(&mut socket, &ServerMessage::Error { error: ApiError::new(ErrorCode::ExecNotFound, "no such command") })
            .await;
    })
    .route("/v1/sandboxes/other/exec", get(move || async move { (StatusCode::CONFLICT, Json(answer)) }));
    let service = serve(router);
    let client = Client::at(&service.socket).await.unwrap();
    let other = SandboxName::parse("other").unwrap();
    let error = client.exec(&other, Exec::new(["x"]).into_request()).await.err().unwrap();
    assert_eq!(error, Error::Api(refused));
    let mut session = client.exec(&name(), Exec::new(["x"]).into_request()).await.unwrap();
    assert_eq!(session.next().await.unwrap_err().code(), ErrorCode::ExecNotFound);
    assert_eq!(session.next().await.unwrap(), None);
}

#[tokio::test]
async fn output_beyond_the_callers_limit_is_refused() {
    let service = serve(exec_route(|mut socket| async move {
        first(&mut socket).await;
        output(&mut socket, STDOUT_TAG, &[b'x'; 100]).await;
        say(&mut socket, &ServerMessage::Exited { end: ProcessEnd::exited(0) }).await;
    }));
    let client = Client::at(&service.socket).await.unwrap();
    for (limit, fits) in [(100, true), (99, false)] {
        let session = client.exec(&name(), Exec::new(["x"]).into_request()).await.unwrap();
        let result = session.collect(None, limit).await;
        assert_eq!(result.is_ok(), fits);
        if let Err(error) = result {
            assert_eq!(error.code(), ErrorCode::LimitExceeded);
        }
    }
}

#[tokio::test]
async fn a_load_reports_while_the_archive_is_still_being_sent() {
    async fn load(body: Body) -> Response {
        let events = body.into_data_stream().scan(0u64, |sum, chunk| {
            *sum += chunk.map_or(0, |chunk| chunk.len() as u64);
            let line = serde_json::to_string(&LoadEvent::Progress { bytes: *sum }).unwrap() + "\n";
            std::future::ready(Some(Ok::<_, std::io::Error>(line)))
        });
        let done = serde_json::to_string(&LoadEvent::Done { images: vec![] }).unwrap() + "\n";
        let end = futures_util::stream::once(async move { Ok(done) });
        Body::from_stream(events.chain(end)).into_response()
    }
    let service = serve(Router::new().route("/v1/images/load", post(load)));
    let client = Client::at(&service.socket).await.unwrap();
    let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<bytes::Bytes>>(1);
    let archive = tokio_stream::wrappers::ReceiverStream::new(receiver);
    sender.send(Ok("first".into())).await.unwrap();
    let mut events =
        client.load_image(archive, &LoadOptions { tags: vec!["a:b".into()], ..LoadOptions::default() }).await.unwrap();
    assert_eq!(events.next().await.unwrap(), Some(LoadEvent::Progress { bytes: 5 }));
    sender.send(Ok("second".into())).await.unwrap();
    assert_eq!(events.next().await.unwrap(), Some(LoadEvent::Progress { bytes: 11 }));
    drop(sender);
    assert_eq!(events.next().await.unwrap(), Some(LoadEvent::Done { images: vec![] }));
    assert_eq!(events.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_service_of_another_version_is_refused_in_words() {
    let service = serve_version(Router::new(), CONTROL_API_VERSION + 1);
    let error = Client::at(&service.socket).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::UnsupportedOperation);
    assert!(error.hint().contains("restart msbd"), "{}", error.hint());
}

#[tokio::test]
async fn one_client_makes_many_calls_at_once() {
    let router = Router::new().route("/v1/images", get(|| async { Json(serde_json::json!({"images": []})) }));
    let service = serve(router);
    let client = Client::at(&service.socket).await.unwrap();
    let calls = (0..50).map(|_| client.images());
    for result in futures_util::future::join_all(calls).await {
        assert!(result.unwrap().images.is_empty());
    }
}

/// A service that hands the agent's stream over, with `Started` in what it has read already, and then plays the agent.
fn handing_over<F, R>(agent: F) -> Router
where
    F: Fn(std::os::unix::net::UnixStream, UnixStream) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let answer = move |request: axum::extract::Request| async move {
        assert_eq!(request.headers()["upgrade"], STREAM_UPGRADE);
        let upgrade = hyper::upgrade::on(request);
        tokio::spawn(async move {
            let parts = downcast::<TokioIo<UnixStream>>(upgrade.await.unwrap()).unwrap();
            let mut client = parts.io.into_inner();
            let mut decoder = frame::Decoder::new();
            decoder.push(&parts.read_buf);
            while !decoder.holds_body() {
                let len = client.read(decoder.room(4096)).await.unwrap();
                decoder.took(len);
            }
            let first: ClientMessage = frame::decode_json(decoder.next_body().unwrap().unwrap()).unwrap();
            assert!(matches!(first, ClientMessage::Exec { .. }));
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let (mut read, mut wire) = (Vec::new(), Vec::new());
            encode_guest(GuestBody::Started(Started { pid: 7 }), &mut read).unwrap();
            frame::encode_json(&StreamAnswer::Opened, &mut wire).unwrap();
            frame::encode(&read, &mut wire).unwrap();
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let descriptors = [std::os::fd::AsFd::as_fd(&theirs)];
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
            let flags = rustix::net::SendFlags::NOSIGNAL;
            let sent = rustix::net::sendmsg(&client, &[std::io::IoSlice::new(&wire)], &mut control, flags).unwrap();
            assert_eq!(sent, wire.len());
            drop(theirs);
            agent(ours, client).await;
        });
        let answer = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header("upgrade", STREAM_UPGRADE);
        answer.header("connection", "upgrade").body(Body::empty()).unwrap()
    };
    Router::new().route("/v1/sandboxes/box/exec", get(answer))
}

#[tokio::test]
async fn a_stream_that_is_handed_over_carries_output_stdin_and_the_end() {
    let service = serve(handing_over(|agent, client| async move {
        agent.set_nonblocking(true).unwrap();
        let mut agent = UnixStream::from_std(agent).unwrap();
        let (mut decoder, mut assembler) = (frame::Decoder::new(), Assembler::new());
        let mut stdin = Vec::new();
        loop {
            let Some(body) = decoder.next_body().unwrap() else {
                let len = agent.read(decoder.room(4096)).await.unwrap();
                decoder.took(len);
                continue;
            };
            match assembler.host(body).unwrap() {
                Some(HostBody::Stdin(data)) => stdin.extend(data.data),
                Some(HostBody::StdinEof(_)) => break,
                other => panic!("{other:?}"),
            }
        }
        let mut wire = Vec::new();
        for (stream, data) in [(OutputStream::Stdout, stdin), (OutputStream::Stderr, b"err".to_vec())] {
            let output = Output { stream: stream as i32, data };
            encode_guest(GuestBody::Output(output), &mut wire).unwrap();
        }
        encode_guest(GuestBody::Exited(Exited { code: 3, ..Exited::default() }), &mut wire).unwrap();
        // In pieces, as a stream may.
        for piece in wire.chunks(7) {
            agent.write_all(piece).await.unwrap();
        }
        drop(client);
    }));
    let client = Client::at(&service.socket).await.unwrap();
    let mut session = client.exec(&name(), Exec::new(["cat"]).stdin_open().into_request()).await.unwrap();
    let mut stdin = session.take_stdin().unwrap();
    stdin.write_all(b"in").await.unwrap();
    stdin.finish().await.unwrap();
    let events = all_of(session).await;
    assert_eq!(
        events,
        [
            SessionEvent::Started { pid: 7 },
            SessionEvent::Stdout("in".into()),
            SessionEvent::Stderr("err".into()),
            SessionEvent::Exited(ProcessEnd::exited(3)),
        ]
    );
}

#[tokio::test]
async fn a_handed_over_session_ends_with_its_service() {
    let service = serve(handing_over(|agent, client| async move {
        drop(client);
        std::future::pending::<()>().await;
        drop(agent);
    }));
    let client = Client::at(&service.socket).await.unwrap();
    let mut session = client.exec(&name(), Exec::new(["sleep", "9"]).into_request()).await.unwrap();
    assert_eq!(session.next().await.unwrap(), Some(SessionEvent::Started { pid: 7 }));
    let error = session.next().await.unwrap_err();
    assert!(error.to_string().contains("the service closed it"), "{error}");
    assert_eq!(session.next().await.unwrap(), None);
}
