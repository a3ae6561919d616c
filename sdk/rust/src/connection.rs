//! HTTP/1.1 on a Unix socket: opening a connection, sending one request, upgrading one to a WebSocket. Used by [`crate::client`]
//! only. It never starts a daemon and knows no route.

use std::path::Path;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::error::{self, Error};

/// Largest answer that is read into memory, in bytes.
const ANSWER_LEN_MAX: usize = 64 << 20;

/// The body of a request.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// A stream of messages with the service.
pub(crate) type Socket = WebSocketStream<UnixStream>;

/// A connection that can carry one request at a time.
pub(crate) type Connection = SendRequest<RequestBody>;

/// No body.
pub(crate) fn empty() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body of these bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> RequestBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Connects. If `owner` is given, the process that listens must belong to that user or to root: the default socket lives in a
/// directory of a predictable name, where somebody else could be waiting for a request that holds secrets.
///
/// # Errors
/// Those of connect(2), and `PermissionDenied` for a stranger.
pub(crate) async fn connect(socket: &Path, owner: Option<u32>) -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(socket).await?;
    if let Some(owner) = owner {
        let peer = stream.peer_cred()?.uid();
        if peer != owner && peer != 0 {
            let message = format!("{} belongs to the user {peer}", socket.display());
            return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, message));
        }
    }
    Ok(stream)
}

/// Makes a connection ready for requests; its driver runs as a task and ends with it.
pub(crate) async fn handshake(stream: UnixStream) -> Result<Connection, Error> {
    let (sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    tokio::spawn(async move {
        // What ends the connection also fails the request on it, which reports it.
        let _ = driver.with_upgrades().await;
    });
    Ok(sender)
}

/// Sends a request and gives back the answer's head; an answer of failure becomes its error.
pub(crate) async fn send(
    connection: &mut Connection,
    request: Request<RequestBody>,
) -> Result<Response<Incoming>, Error> {
    let response = connection.send_request(request).await.map_err(lost)?;
    if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(response);
    }
    let status = response.status().as_u16();
    let body = collect(response).await.unwrap_or_default();
    Err(error::from_body(status, &body))
}

/// The whole body of an answer.
pub(crate) async fn collect(response: Response<Incoming>) -> Result<Bytes, Error> {
    match Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(Error::unavailable(format!("the service's answer broke off: {error}"))),
    }
}

/// Turns a fresh connection into a WebSocket on `path` (RFC 6455, section 4.1).
pub(crate) async fn upgrade(mut connection: Connection, path: &str) -> Result<Socket, Error> {
    let key = generate_key();
    let request = upgrade_request(path, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key)
        .body(empty())
        .map_err(Error::protocol)?;
    let response = send(&mut connection, request).await?;
    let accepted = response.headers().get(header::SEC_WEBSOCKET_ACCEPT).map(|value| value.as_bytes().to_vec());
    if response.status() != StatusCode::SWITCHING_PROTOCOLS
        || accepted != Some(derive_accept_key(key.as_bytes()).into_bytes())
    {
        return Err(Error::protocol("it is no WebSocket"));
    }
    let (stream, early) = below(response).await?;
    Ok(WebSocketStream::from_partially_read(stream, early, Role::Client, None).await)
}

/// Turns a fresh connection into one that carries another protocol's bytes (RFC 9110, section 7.8): the socket, and what of those
/// bytes was read already.
pub(crate) async fn upgrade_bytes(
    mut connection: Connection,
    path: &str,
    protocol: &str,
) -> Result<(UnixStream, Vec<u8>), Error> {
    let request = upgrade_request(path, protocol).body(empty()).map_err(Error::protocol)?;
    let response = send(&mut connection, request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(Error::protocol("the service does not switch the protocol"));
    }
    below(response).await
}

fn upgrade_request(path: &str, protocol: &str) -> hyper::http::request::Builder {
    Request::get(path)
        .header(header::HOST, "msbd")
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, protocol)
}

/// The socket below hyper's box; what hyper already read of it goes along.
async fn below(response: Response<Incoming>) -> Result<(UnixStream, Vec<u8>), Error> {
    let upgraded = hyper::upgrade::on(response).await.map_err(lost)?;
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| Error::protocol("the upgraded connection is of another kind"))?;
    Ok((parts.io.into_inner(), parts.read_buf.to_vec()))
}

/// The connection failed under a request.
fn lost(error: hyper::Error) -> Error {
    Error::unavailable(format!("the connection to msbd was lost: {error}"))
}
