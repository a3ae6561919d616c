//! Exec, main, attach and archive: a WebSocket on one side, a stream to the agent on the other, bytes straight between them.
//!
//! ```text
//!  client ── text: signal, resize, stdin_eof; binary: stdin ──► up ──► agent     up waits while the guest does not take it
//!  client ◄─ text: started, stdin_credit, exited; binary ────── down ◄─ agent    down waits while the client does not take it
//! ```
//!
//! A client that takes the stream to the agent itself is served by [`super::handover`].
//!
//! Losing the client ends the exec (the agent's stream is dropped); losing the agent's stream is told as `exec_lost`. Neither ever
//! touches the main workload or the sandbox's actor.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{FromRequest, Path, Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use msb_actors::sandbox::activity::ActivityKind;
use msb_actors::vm::session::{Session, SessionReader, SessionWriter};
use msb_protocol::control::{ClientMessage, ExecRequest, STDERR_TAG, STDOUT_TAG, ServerMessage, TerminalSize};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::file_api::{ArchiveAction, ArchiveRequest};
use msb_protocol::files::{self, ArchivePack, ArchiveUnpack, OpenArchive};
use msb_protocol::frame::DATA_LEN_MAX;
use msb_protocol::guest::{
    self, Data, EnvVar, ExecConfig, GuestBody, HostBody, OpenAttach, OpenKind, OpenMain, OutputStream, STDIN_WINDOW,
    StdinEof,
};
use msb_protocol::id::SandboxName;
use msb_protocol::spec::{check_argv, check_env};
use tokio::sync::watch;

use super::ApiState;
use super::failure::Failure;
use super::handover;
use super::sandboxes::name;

/// Time for a client to say what it wants.
pub(super) const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for a client to take the end of its stream.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest message of a client: stdin, or an exec with the largest environment.
const MESSAGE_LEN_MAX: usize = 4 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Exec,
    Main,
    Attach,
    Archive,
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/exec", params(("name" = String, Path)), responses((status = 101, description = "a WebSocket: ClientMessage and ServerMessage"), (status = "4XX", body = ApiError)))]
pub(crate) async fn exec(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    upgraded(state, &sandbox, request, Kind::Exec).await
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/main", params(("name" = String, Path)), responses((status = 101, description = "a WebSocket: ClientMessage and ServerMessage"), (status = "4XX", body = ApiError)))]
pub(crate) async fn main(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    upgraded(state, &sandbox, request, Kind::Main).await
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/attach", params(("name" = String, Path)), responses((status = 101, description = "a WebSocket: ClientMessage and ServerMessage"), (status = "4XX", body = ApiError)))]
pub(crate) async fn attach(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    upgraded(state, &sandbox, request, Kind::Attach).await
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/archive", params(("name" = String, Path)), responses((status = 101, description = "a WebSocket: ClientMessage and ServerMessage"), (status = "4XX", body = ApiError)))]
pub(crate) async fn archive(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    upgraded(state, &sandbox, request, Kind::Archive).await
}

async fn upgraded(state: ApiState, sandbox: &str, request: Request, kind: Kind) -> Result<Response, Failure> {
    let sandbox = name(sandbox)?;
    if handover::is_asked_for(&request) {
        return handover::upgraded(state, sandbox, request, kind);
    }
    let upgrade = match WebSocketUpgrade::from_request(request, &state).await {
        Ok(upgrade) => upgrade,
        Err(refused) => return Ok(refused.into_response()),
    };
    let upgrade = upgrade.max_message_size(MESSAGE_LEN_MAX).max_frame_size(MESSAGE_LEN_MAX);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (mut client, from_client) = socket.split();
        if let Err(error) = run(&state, &sandbox, kind, &mut client, from_client).await {
            // A client that is gone does not read why.
            let _ = tell(&mut client, &ServerMessage::Error { error }).await;
        }
        let close = Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, client.send(close)).await;
    }))
}

type Client = SplitSink<WebSocket, Message>;

async fn run(
    state: &ApiState,
    sandbox: &SandboxName,
    kind: Kind,
    client: &mut Client,
    mut from_client: SplitStream<WebSocket>,
) -> Result<(), ApiError> {
    let first = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, next_text(&mut from_client)).await;
    let first = first.map_err(|_| silent())??;
    let (open, activity) = opening(kind, first)?;
    let (session, _activity) = state.daemon.open(sandbox, open, activity).await?;
    bridge(session, client, from_client).await
}

/// Nothing came for [`FIRST_MESSAGE_TIMEOUT`].
pub(super) fn silent() -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, "the client did not say what it wants")
}

/// What a client's first message asks the agent for.
pub(super) fn opening(kind: Kind, first: ClientMessage) -> Result<(OpenKind, ActivityKind), ApiError> {
    Ok(match (kind, first) {
        (Kind::Exec, ClientMessage::Exec { exec }) => (OpenKind::Exec(exec_config(exec)?), ActivityKind::Exec),
        (Kind::Archive, ClientMessage::Archive { archive }) => {
            (OpenKind::Archive(open_archive(archive)), ActivityKind::Files)
        }
        (Kind::Main, ClientMessage::Attach { terminal, timeout_ms, stdin: _ }) => {
            let main = OpenMain { terminal: terminal.map(size), timeout_ms: timeout_ms.unwrap_or_default() };
            (OpenKind::Main(main), ActivityKind::Attach)
        }
        (Kind::Attach, ClientMessage::Attach { stdin, terminal, timeout_ms: None }) => {
            (OpenKind::Attach(OpenAttach { stdin, terminal: terminal.map(size) }), ActivityKind::Attach)
        }
        (Kind::Attach, ClientMessage::Attach { .. }) => {
            return Err(ApiError::new(ErrorCode::InvalidRequest, "only the main stream takes a timeout"));
        }
        _ => return Err(ApiError::new(ErrorCode::InvalidRequest, "the first message does not fit this route")),
    })
}

async fn bridge(session: Session, client: &mut Client, from_client: SplitStream<WebSocket>) -> Result<(), ApiError> {
    let Session { mut reader, mut writer, .. } = session;
    // What the guest allows, as the client was told; checked, so that a client's signal is never stuck behind its own stdin.
    let credit = watch::Sender::new(u64::from(STDIN_WINDOW));
    let end = {
        let up = upwards(from_client, &mut writer, &credit);
        let down = downwards(&mut reader, client, &credit);
        tokio::select! {
            end = down => end?,
            // The client is gone, or broke the rules.
            outcome = up => return outcome,
        }
    };
    tell(client, &ServerMessage::Exited { end }).await
}

async fn upwards(
    mut from_client: SplitStream<WebSocket>,
    writer: &mut SessionWriter,
    credit: &watch::Sender<u64>,
) -> Result<(), ApiError> {
    let mut sent = 0u64;
    loop {
        let bodies = match from_client.next().await {
            None | Some(Err(_) | Ok(Message::Close(_))) => return Ok(()),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Binary(data))) => {
                sent += data.len() as u64;
                if sent > *credit.borrow() {
                    return Err(ApiError::new(ErrorCode::InvalidRequest, "more stdin than the sandbox has allowed"));
                }
                data.chunks(DATA_LEN_MAX).map(|piece| HostBody::Stdin(Data { data: piece.to_vec() })).collect()
            }
            Some(Ok(Message::Text(text))) => vec![match parse(&text)? {
                ClientMessage::Signal { number } => HostBody::Signal(guest::Signal { number }),
                ClientMessage::Resize { size: new } => HostBody::Resize(size(new)),
                ClientMessage::StdinEof => HostBody::StdinEof(StdinEof {}),
                ClientMessage::Exec { .. } | ClientMessage::Attach { .. } | ClientMessage::Archive { .. } => {
                    return Err(ApiError::new(ErrorCode::InvalidRequest, "the stream has begun already"));
                }
            }],
        };
        for body in bodies {
            // A guest that closed its side tells why on the other one.
            if writer.send(body).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

async fn downwards(
    reader: &mut SessionReader,
    client: &mut Client,
    credit: &watch::Sender<u64>,
) -> Result<msb_protocol::state::ProcessEnd, ApiError> {
    loop {
        let message = match reader.next().await? {
            None => {
                return Err(ApiError::new(
                    ErrorCode::ExecLost,
                    "the sandbox closed the stream before the command ended",
                ));
            }
            Some(GuestBody::Exited(end)) => return Ok(end.into()),
            Some(GuestBody::Output(output)) => {
                let tag = if output.stream == i32::from(OutputStream::Stderr) { STDERR_TAG } else { STDOUT_TAG };
                let mut tagged = Vec::with_capacity(output.data.len() + 1);
                tagged.push(tag);
                tagged.extend_from_slice(&output.data);
                client.send(Message::Binary(Bytes::from(tagged))).await.map_err(|_| gone())?;
                continue;
            }
            Some(GuestBody::Started(begun)) => ServerMessage::Started { pid: begun.pid },
            Some(GuestBody::StdinCredit(more)) => {
                credit.send_modify(|credit| *credit = credit.saturating_add(u64::from(more.bytes)));
                ServerMessage::StdinCredit { bytes: more.bytes }
            }
            Some(GuestBody::OutputLost(lost)) => ServerMessage::OutputLost { bytes: lost.bytes },
            Some(GuestBody::Refused(failure)) => return Err(failure.into()),
            // What a later agent says beyond that is not for this daemon.
            Some(_) => continue,
        };
        tell(client, &message).await?;
    }
}

async fn tell(client: &mut Client, message: &ServerMessage) -> Result<(), ApiError> {
    let text = serde_json::to_string(message).map_err(ApiError::internal)?;
    client.send(Message::Text(text.into())).await.map_err(|_| gone())
}

fn gone() -> ApiError {
    ApiError::new(ErrorCode::ExecLost, "the client is gone")
}

async fn next_text(from_client: &mut SplitStream<WebSocket>) -> Result<ClientMessage, ApiError> {
    loop {
        match from_client.next().await {
            Some(Ok(Message::Text(text))) => return parse(&text),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Binary(_))) => {
                return Err(ApiError::new(ErrorCode::InvalidRequest, "stdin came before the request"));
            }
            None | Some(Err(_) | Ok(Message::Close(_))) => return Err(gone()),
        }
    }
}

fn parse(text: &str) -> Result<ClientMessage, ApiError> {
    serde_json::from_str(text)
        .map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("the message cannot be understood: {error}")))
}

fn size(size: TerminalSize) -> guest::TerminalSize {
    guest::TerminalSize { rows: size.rows.into(), columns: size.columns.into() }
}

fn open_archive(request: ArchiveRequest) -> OpenArchive {
    let action = match request.action {
        ArchiveAction::Pack { path, name, follow } => {
            files::ArchiveAction::Pack(ArchivePack { path: path.into_bytes(), name: name.into_bytes(), follow })
        }
        ArchiveAction::Unpack { directory, name, keep_owner } => files::ArchiveAction::Unpack(ArchiveUnpack {
            directory: directory.into_bytes(),
            name: name.map(String::into_bytes),
            keep_owner,
        }),
    };
    OpenArchive { user: request.user.unwrap_or_default(), action: Some(action) }
}

fn exec_config(request: ExecRequest) -> Result<ExecConfig, ApiError> {
    if request.command.is_empty() {
        return Err(ApiError::new(ErrorCode::InvalidRequest, "the command has no words"));
    }
    check_argv(&request.command)?;
    check_env(&request.env)?;
    if let Some(workdir) = &request.workdir
        && (!workdir.starts_with('/') || workdir.contains('\0'))
    {
        return Err(ApiError::new(ErrorCode::InvalidConfig, format!("workdir {workdir:?} must be an absolute path")));
    }
    Ok(ExecConfig {
        argv: request.command,
        env: request.env.into_iter().map(|(name, value)| EnvVar { name, value }).collect(),
        workdir: request.workdir.unwrap_or_default(),
        user: request.user.unwrap_or_default(),
        rlimits: msb_actors::sandbox::plan::resource_limits(&request.rlimits)?,
        stdin: request.stdin,
        terminal: request.terminal.map(size),
        timeout_ms: request.timeout_ms.unwrap_or_default(),
        wait_output: request.wait_output,
        ..ExecConfig::default()
    })
}
