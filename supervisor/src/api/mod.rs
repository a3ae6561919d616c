//! The routes of `msb_protocol::control`, and the OpenAPI document made from the same handlers.
//!
//! Every handler is one call of [`Daemon`]; what streams (exec, logs, events, loads) runs in tasks of its own with the client's own
//! back-pressure. A request's body is parsed here and never trusted further than its types.

mod archives;
mod events;
mod failure;
mod files;
mod handover;
mod host;
mod images;
mod log_files;
mod logs;
mod metrics;
mod network;
mod registries;
mod sandboxes;
mod snapshots;
mod ssh;
mod streams;
mod volumes;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use msb_actors::daemon::Daemon;
use msb_protocol::error::{ApiError, ErrorCode};
use tokio::sync::Notify;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::host::HostProbe;
use crate::peer::Peer;
use failure::Failure;

/// Largest JSON body in bytes: the largest environment twice over.
const BODY_LEN_MAX: usize = 4 << 20;

/// What every handler has.
#[derive(Clone)]
pub struct ApiState {
    pub(crate) daemon: Daemon,
    pub(crate) probe: Arc<HostProbe>,
    pub(crate) share_dir: PathBuf,
    pub(crate) started_at: Timestamp,
    shutdown: Arc<Notify>,
}

impl ApiState {
    /// The state of one service.
    #[must_use]
    pub fn new(daemon: Daemon, probe: HostProbe, share_dir: PathBuf) -> Self {
        Self {
            daemon,
            probe: Arc::new(probe),
            share_dir,
            started_at: Timestamp::now(),
            shutdown: Arc::new(Notify::new()),
        }
    }

    /// Ends when a client has asked for the daemon's end.
    pub async fn shutdown_requested(&self) {
        self.shutdown.notified().await;
    }

    pub(crate) fn request_shutdown(&self) {
        // Kept for whoever asks next, so it cannot be missed.
        self.shutdown.notify_one();
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "msb control API",
        description = "Sandboxes and images of one msb service, over its Unix socket.",
        license(name = "Apache-2.0")
    ),
    components(schemas(
        ApiError,
        msb_protocol::control::ClientMessage,
        msb_protocol::control::ServerMessage,
        msb_protocol::control::LogRecord,
        msb_protocol::control::NetworkDecision,
        msb_protocol::control::EventRecord,
        msb_protocol::control::LoadEvent,
        msb_protocol::images::PullEvent,
        msb_protocol::file_api::WatchRecord
    ))
)]
struct Document;

fn routes() -> (Router<ApiState>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(host::version))
        .routes(routes!(host::host))
        .routes(routes!(host::shutdown))
        .routes(routes!(host::debug_actors))
        .routes(routes!(metrics::snapshot))
        .routes(routes!(metrics::stream))
        .routes(routes!(metrics::history))
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::inspect, sandboxes::remove))
        .routes(routes!(sandboxes::start))
        .routes(routes!(sandboxes::stop))
        .routes(routes!(sandboxes::restart))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(snapshots::fork))
        .routes(routes!(sandboxes::resume))
        .routes(routes!(sandboxes::detach))
        .routes(routes!(sandboxes::label))
        .routes(routes!(sandboxes::touch))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(sandboxes::wait))
        .routes(routes!(streams::exec))
        .routes(routes!(streams::main))
        .routes(routes!(streams::attach))
        .routes(routes!(streams::archive))
        .routes(routes!(logs::logs))
        .routes(routes!(files::call))
        .routes(routes!(files::read))
        .routes(routes!(files::watch))
        .routes(routes!(ssh::connect))
        .routes(routes!(ssh::host))
        .routes(routes!(ssh::authorized_keys, ssh::authorize))
        .routes(routes!(network::log))
        .routes(routes!(network::explain))
        .routes(routes!(events::events))
        .routes(routes!(images::list))
        .routes(routes!(images::inspect, images::remove))
        .routes(routes!(images::tag))
        .routes(routes!(images::pin))
        .routes(routes!(images::prune))
        .routes(routes!(images::save))
        .routes(routes!(registries::pull))
        .routes(routes!(registries::list))
        .routes(routes!(registries::login, registries::logout))
        .routes(routes!(images::usage))
        .routes(routes!(images::check_store))
        .routes(routes!(volumes::list, volumes::create))
        .routes(routes!(volumes::inspect, volumes::remove))
        .routes(routes!(snapshots::list, snapshots::create))
        .routes(routes!(snapshots::inspect, snapshots::remove))
        .routes(routes!(snapshots::verify))
        .routes(routes!(snapshots::export))
        .split_for_parts()
}

/// Loads and the content of files have no limit on their body; everything else has.
fn load_route() -> (Router<ApiState>, utoipa::openapi::OpenApi) {
    OpenApiRouter::new()
        .routes(routes!(images::load))
        .routes(routes!(files::write))
        .routes(routes!(snapshots::import))
        .split_for_parts()
}

fn document() -> utoipa::openapi::OpenApi {
    let (_, mut document) = routes();
    document.merge(load_route().1);
    document
}

/// The OpenAPI 3.1 document, as `docs/openapi.json` holds it.
#[must_use]
pub fn openapi_json() -> String {
    document().to_pretty_json().unwrap_or_default()
}

/// Every route.
pub fn router(state: ApiState) -> Router {
    let (limited, _) = routes();
    let (unlimited, _) = load_route();
    let document: Arc<str> = openapi_json().into();
    limited
        .layer(DefaultBodyLimit::max(BODY_LEN_MAX))
        .merge(unlimited.layer(DefaultBodyLimit::disable()))
        .route(
            "/openapi.json",
            axum::routing::get(move || async move {
                ([(axum::http::header::CONTENT_TYPE, "application/json")], document.to_string())
            }),
        )
        .fallback(|request: Request| async move {
            Failure(ApiError::new(
                ErrorCode::InvalidRequest,
                format!("there is no {} {}", request.method(), request.uri().path()),
            ))
        })
        .layer(middleware::from_fn(only_our_user))
        .layer(middleware::from_fn(crate::traces::span))
        .with_state(state)
}

/// The socket's mode keeps others out; this does when the socket was passed in, or was opened to more than it should be.
async fn only_our_user(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    let own = rustix::process::geteuid().as_raw();
    if !peer_allowed(peer.uid, own) {
        let message = format!("this service belongs to user {own}, the caller is user {}", peer.uid);
        return Failure(ApiError::new(ErrorCode::PeerRefused, message)).into_response();
    }
    next.run(request).await
}

/// The service's own user, and root, who could become it.
fn peer_allowed(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_refused() {
        for (peer, own, allowed) in
            [(1000, 1000, true), (0, 1000, true), (1001, 1000, false), (u32::MAX, 1000, false), (1000, 0, false)]
        {
            assert_eq!(peer_allowed(peer, own), allowed, "{peer} {own}");
        }
    }

    #[test]
    fn the_document_in_the_repository_is_what_the_routes_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
        let made = openapi_json() + "\n";
        if std::env::var_os("MSB_UPDATE_DOCS").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(made == kept, "docs/openapi.json is old; write it anew with: msbd --print-openapi > docs/openapi.json");
    }

    #[test]
    fn every_route_of_the_protocols_table_is_there_and_no_other() {
        let table = include_str!("../../../protocol/src/control/mod.rs");
        let mut promised: Vec<String> = table
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `")?.split_once('`'))
            .map(|(route, _)| route.split(['?', '…']).next().unwrap_or_default().trim().to_owned())
            .filter(|route| route.contains("/v1/"))
            .collect();
        let document = serde_json::to_value(document()).unwrap();
        let mut served = Vec::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for method in methods
                .as_object()
                .unwrap()
                .keys()
                .filter(|key| ["get", "post", "delete", "put", "patch"].contains(&key.as_str()))
            {
                served.push(format!("{} {path}", method.to_uppercase()));
            }
        }
        promised.sort();
        served.sort();
        assert_eq!(served, promised);
    }
}
