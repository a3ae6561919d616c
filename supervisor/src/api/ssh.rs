//! Routes of SSH: a connection (the request is upgraded and carries SSH from then on), how to find a sandbox, who may log in.
//!
//! The socket's peer is this service's own user, who may run anything in a sandbox anyway; so it may name the one key that logs in on
//! a connection. Everybody else comes through somebody's listener and needs an authorized key.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use hyper_util::rt::TokioIo;
use msb_protocol::control::{AuthorizeRequest, Authorized, AuthorizedKeys, SSH_UPGRADE, SshHost, SshQuery};
use msb_protocol::error::{ApiError, ErrorCode};

use super::ApiState;
use super::failure::{Failure, body, query};
use super::sandboxes::name;

/// Longest name of a peer in the log, in characters.
const PEER_LEN_MAX: usize = 64;

#[utoipa::path(get, path = "/v1/sandboxes/{name}/ssh", params(("name" = String, Path), SshQuery), responses((status = 101, description = "the bytes of an SSH connection"), (status = "4XX", body = ApiError)))]
pub(crate) async fn connect(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    about: Result<Query<SshQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let (sandbox, about) = (name(&sandbox)?, query(about)?);
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if !asked.is_some_and(|asked| asked.eq_ignore_ascii_case(SSH_UPGRADE)) {
        let message = format!("this route wants 'Upgrade: {SSH_UPGRADE}'");
        return Err(Failure(ApiError::new(ErrorCode::InvalidRequest, message)));
    }
    let forwarder = state.daemon.ssh(&sandbox).await?;
    let keys = forwarder.keys(about.key.as_deref()).await?;
    let peer: String = match about.peer {
        Some(peer) => peer.chars().filter(|c| !c.is_control()).take(PEER_LEN_MAX).collect(),
        None => "local".into(),
    };
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => forwarder.serve(TokioIo::new(upgraded), keys, &peer).await,
            Err(error) => tracing::debug!(%error, "an ssh connection did not begin"),
        }
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, SSH_UPGRADE)
        .body(Body::empty())
        .map_err(|error| Failure(ApiError::internal(error)))
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/ssh/host", params(("name" = String, Path)), responses((status = 200, body = SshHost), (status = "4XX", body = ApiError)))]
pub(crate) async fn host(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Result<Json<SshHost>, Failure> {
    Ok(Json(state.daemon.ssh_host(&name(&sandbox)?).await?))
}

#[utoipa::path(get, path = "/v1/ssh/authorized-keys", responses((status = 200, body = AuthorizedKeys), (status = "4XX", body = ApiError)))]
pub(crate) async fn authorized_keys(State(state): State<ApiState>) -> Result<Json<AuthorizedKeys>, Failure> {
    Ok(Json(AuthorizedKeys { keys: state.daemon.authorized_keys().await? }))
}

#[utoipa::path(post, path = "/v1/ssh/authorized-keys", request_body = AuthorizeRequest, responses((status = 200, body = Authorized), (status = "4XX", body = ApiError)))]
pub(crate) async fn authorize(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<Authorized>, Failure> {
    let request: AuthorizeRequest = body(&bytes, None)?;
    Ok(Json(state.daemon.authorize(request.keys).await?))
}
