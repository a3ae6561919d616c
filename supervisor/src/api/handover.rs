//! A stream to the agent that its client takes over: opened here as every other, then handed to the client as a descriptor.
//!
//! ```text
//!  client ── Upgrade: msb-stream ──► 101 ── frame: ClientMessage ──► open ──► frame: opened, with the descriptor; frame: early bytes
//!  client ◄═════════════════════ the agent's stream, through nobody ═════════════════════► agent
//!  client ── keeps the connection: its end is the end of the session's activity
//! ```
//!
//! Called by [`super::streams`], whose routes these are. What is said on the stream afterwards is between the client, who may run anything
//! in the sandbox anyway, and the agent, who trusts no host's bytes: this service does not see them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::Response;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use msb_actors::vm::descriptors;
use msb_protocol::control::{ClientMessage, STREAM_UPGRADE, StreamAnswer};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::{self, Decoder, SPEC_LEN_MAX};
use msb_protocol::id::SandboxName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::ApiState;
use super::failure::Failure;
use super::streams::{FIRST_MESSAGE_TIMEOUT, Kind, opening, silent};

/// Bytes of one read of a client's first message.
const READ_LEN: usize = 4 << 10;

/// Whether a request wants the stream itself.
pub(super) fn is_asked_for(request: &Request) -> bool {
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    asked.is_some_and(|asked| asked.eq_ignore_ascii_case(STREAM_UPGRADE))
}

/// Answers such a request and goes on beside it.
pub(super) fn upgraded(
    state: ApiState,
    sandbox: SandboxName,
    request: Request,
    kind: Kind,
) -> Result<Response, Failure> {
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let outcome = match upgrade.await {
            Ok(upgraded) => serve(&state, &sandbox, kind, upgraded).await,
            Err(error) => Err(std::io::Error::other(error)),
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a stream was not handed over");
        }
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, STREAM_UPGRADE)
        .body(Body::empty())
        .map_err(|error| Failure(ApiError::internal(error)))
}

async fn serve(state: &ApiState, sandbox: &SandboxName, kind: Kind, upgraded: Upgraded) -> std::io::Result<()> {
    let parts = downcast::<TokioIo<UnixStream>>(upgraded).map_err(|_| std::io::Error::other("it is no Unix socket"))?;
    let (mut client, early) = (parts.io.into_inner(), parts.read_buf);
    let opened = async {
        let first = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, first_message(&mut client, &early)).await;
        let (open, activity) = opening(kind, first.map_err(|_| silent())??)?;
        let (session, activity) = state.daemon.open(sandbox, open, activity).await?;
        Ok::<_, ApiError>((session.hand_over()?, activity))
    };
    match opened.await {
        Ok(((stream, read), _activity)) => {
            hand_over(&mut client, stream, &read).await?;
            // Nothing more is said here; the session lasts as long as its client keeps this.
            let _ = client.read(&mut [0]).await;
            Ok(())
        }
        Err(error) => {
            let mut answer = Vec::new();
            frame::encode_json(&StreamAnswer::Refused { error }, &mut answer).map_err(std::io::Error::other)?;
            client.write_all(&answer).await
        }
    }
}

async fn first_message(client: &mut UnixStream, early: &[u8]) -> Result<ClientMessage, ApiError> {
    let broken = |error: &dyn std::fmt::Display| {
        ApiError::new(ErrorCode::InvalidRequest, format!("the message cannot be understood: {error}"))
    };
    let mut decoder = Decoder::with_limit(SPEC_LEN_MAX);
    decoder.push(early);
    loop {
        if let Some(body) = decoder.next_body().map_err(|error| broken(&error))? {
            return serde_json::from_slice(body).map_err(|error| broken(&error));
        }
        let len = client.read(decoder.room(READ_LEN)).await.map_err(|error| broken(&error))?;
        if len == 0 {
            return Err(broken(&"the client is gone"));
        }
        decoder.took(len);
    }
}

/// Sends the descriptor with the answer, and what was read of the stream behind it.
async fn hand_over(client: &mut UnixStream, stream: OwnedFd, read: &[u8]) -> std::io::Result<()> {
    let mut answer = Vec::new();
    frame::encode_json(&StreamAnswer::Opened, &mut answer).map_err(std::io::Error::other)?;
    frame::encode(read, &mut answer).map_err(std::io::Error::other)?;
    descriptors::send(client, &answer, &[Arc::new(stream)]).await
}
