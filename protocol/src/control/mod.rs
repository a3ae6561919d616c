//! The control API, version 1: routes and bodies between `msbd` and its clients (`msb`, the SDKs).
//!
//! HTTP/1.1 on a Unix socket, JSON bodies. An error is an [`ApiError`] with the status of its row in the table.
//!
//! | route | body | answer |
//! |---|---|---|
//! | `GET /v1/version` | | [`VersionInfo`] |
//! | `GET /v1/host` | | [`HostInfo`] |
//! | `POST /v1/shutdown` | [`ShutdownRequest`] | `{}`; the daemon ends, sandboxes go on unless they are to stop too |
//! | `POST /v1/sandboxes` | [`CreateRequest`] | [`SandboxDetail`] |
//! | `GET /v1/sandboxes?label=…&selector=…&limit=&after=` | [`ListQuery`] | [`SandboxList`] |
//! | `GET /v1/sandboxes/{name}` | | [`SandboxDetail`] |
//! | `DELETE /v1/sandboxes/{name}?force=` | | `{}` |
//! | `POST /v1/sandboxes/{name}/start` | [`StartRequest`] | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/stop` | [`StopRequest`] | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/restart` | [`StopRequest`] | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/pause` | | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/fork` | [`ForkRequest`](crate::snapshot::ForkRequest) | [`SandboxDetail`]s |
//! | `POST /v1/sandboxes/{name}/resume` | | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/detach` | | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/labels` | [`LabelRequest`] | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/touch` | | [`SandboxDetail`] |
//! | `POST /v1/sandboxes/{name}/ping` | | [`PingReport`] |
//! | `GET /v1/sandboxes/{name}/wait` | | [`SandboxDetail`], once it rests |
//! | `GET /v1/sandboxes/{name}/exec` | WebSocket | [`ClientMessage`], [`ServerMessage`] |
//! | `GET /v1/sandboxes/{name}/main` | WebSocket | the same; starts the main workload |
//! | `GET /v1/sandboxes/{name}/attach` | WebSocket | the same; watches the main workload |
//! | `GET /v1/sandboxes/{name}/logs?…` | [`LogQuery`] | lines of [`LogRecord`] (`application/x-ndjson`) |
//! | `POST /v1/sandboxes/{name}/files` | [`crate::file_api::FileCallRequest`] | [`crate::file_api::FileAnswer`] |
//! | `GET /v1/sandboxes/{name}/files/content?path=…` | | the bytes |
//! | `PUT /v1/sandboxes/{name}/files/content?path=…` | the bytes | [`crate::file_api::FileAnswer`] |
//! | `GET /v1/sandboxes/{name}/files/watch?path=…` | | lines of [`crate::file_api::WatchRecord`] |
//! | `GET /v1/sandboxes/{name}/archive` | WebSocket | [`ClientMessage`], [`ServerMessage`]: a tree as a tar stream |
//! | `GET /v1/sandboxes/{name}/ssh?…` | [`SshQuery`], `Upgrade: ssh` | bare bytes of an SSH connection |
//! | `GET /v1/sandboxes/{name}/ssh/host` | | [`SshHost`] |
//! | `GET /v1/ssh/authorized-keys` | | [`AuthorizedKeys`] |
//! | `POST /v1/ssh/authorized-keys` | [`AuthorizeRequest`] | [`Authorized`] |
//! | `GET /v1/sandboxes/{name}/network/log?follow=&tail=` | [`NetworkLogQuery`] | lines of [`NetworkDecision`] |
//! | `GET /v1/sandboxes/{name}/network/explain?target=` | [`NetworkExplainQuery`] | [`NetworkExplanation`](crate::vmm::NetworkExplanation) |
//! | `GET /v1/events?follow=&since=` | [`EventQuery`] | lines of [`EventRecord`] |
//! | `GET /v1/metrics?name=&label=&selector=` | | [`MetricsSnapshot`]: one request for the whole fleet; compact ([`crate::fleet`]) for whom `Accept`s that |
//! | `GET /v1/metrics/stream?name=&label=&selector=&interval_ms=` | | lines of [`MetricsSnapshot`] |
//! | `GET /v1/sandboxes/{name}/metrics` | [`HistoryQuery`] | [`MetricsHistory`] |
//! | `GET /v1/images` | | [`ImageList`] |
//! | `GET /v1/image?reference=` | | [`ImageDetail`] |
//! | `DELETE /v1/image?reference=&force=` | | [`ImageRemoval`](crate::images::ImageRemoval) |
//! | `POST /v1/images/load?tag=&platform=` | an archive | lines of [`LoadEvent`], the last `done` or `error` |
//! | `POST /v1/images/pull` | [`PullRequest`](crate::images::PullRequest) | lines of [`PullEvent`](crate::images::PullEvent), the last `done` or `error` |
//! | `POST /v1/images/save` | [`SaveRequest`](crate::images::SaveRequest) | an archive; one that breaks off is not whole |
//! | `POST /v1/images/tag` | [`TagRequest`](crate::images::TagRequest) | [`ImageSummary`] |
//! | `POST /v1/images/pin` | [`PinRequest`](crate::images::PinRequest) | [`ImageSummary`] |
//! | `POST /v1/images/prune` | [`PruneRequest`](crate::images::PruneRequest) | [`PruneReport`](crate::images::PruneReport) |
//! | `GET /v1/registries` | | [`RegistryList`](crate::images::RegistryList) |
//! | `POST /v1/registries/login` | [`LoginRequest`](crate::images::LoginRequest) | [`LoginReport`](crate::images::LoginReport) |
//! | `DELETE /v1/registries/login?registry=` | | `{}` |
//! | `GET /v1/store/usage` | | [`DiskUsage`](crate::images::DiskUsage) |
//! | `GET /v1/store/check` | | [`StoreReport`] |
//! | `GET /v1/volumes` | | [`crate::volume::VolumeList`] |
//! | `POST /v1/volumes` | [`crate::volume::CreateVolume`] | [`crate::volume::VolumeDetail`] |
//! | `GET /v1/volumes/{name}` | | [`crate::volume::VolumeDetail`] |
//! | `DELETE /v1/volumes/{name}` | | `{}` |
//! | `GET /v1/snapshots` | | [`crate::snapshot::SnapshotList`] |
//! | `POST /v1/snapshots` | [`crate::snapshot::CreateSnapshot`] | [`crate::snapshot::SnapshotDetail`] |
//! | `GET /v1/snapshots/{name}` | | [`crate::snapshot::SnapshotDetail`] |
//! | `DELETE /v1/snapshots/{name}` | | `{}` |
//! | `POST /v1/snapshots/{name}/verify` | | [`crate::snapshot::SnapshotCheck`] |
//! | `GET /v1/snapshots/{name}/archive` | | a `.tar.zst`; one that breaks off is not whole |
//! | `POST /v1/snapshot-archives?name=` | a `.tar.zst` | [`crate::snapshot::SnapshotDetail`] |
//! | `GET /v1/debug/actors` | | [`ActorTree`] |
//! | `GET /openapi.json` | | OpenAPI 3.1 |
//!
//! On a WebSocket, text messages are JSON ([`ClientMessage`], [`ServerMessage`]); a binary message of the client is stdin, one of
//! the server is a byte ([`STDOUT_TAG`], [`STDERR_TAG`]) and then output. The client sends stdin only within its credit
//! ([`crate::guest::STDIN_WINDOW`] at first, then what `stdin_credit` adds), so that signals are never stuck behind it.
//!
//! A client on the same host may take the stream itself, so that its bytes pass through nobody's hands: the same routes with
//! `Upgrade:` [`STREAM_UPGRADE`] in place of a WebSocket's. It sends one frame ([`crate::frame`]) with its first [`ClientMessage`] and gets
//! one with a [`StreamAnswer`]; with `opened` come the descriptor of the stream to the agent (SCM_RIGHTS) and a second frame with what
//! was read of that stream already. On the stream it speaks [`crate::guest`]. The connection stays open meanwhile: its end, by either
//! side, is the end of the session.

mod image;
mod log;
mod metrics;
mod network;
mod sandbox;
mod service;
mod session;
mod ssh;

pub use image::{ImageConfigDetail, ImageDetail, ImageLayerDetail, ImageList, ImageSummary, LoadEvent};
pub use log::{EventQuery, EventRecord, LogQuery, LogRecord, LogSource};
pub use metrics::{
    GuestMetrics, HistoryPoint, HistoryQuery, MetricsHistory, MetricsQuery, MetricsSnapshot, SandboxMetrics,
};
pub use network::{NetworkDecision, NetworkDetail, NetworkExplainQuery, NetworkLogQuery};
pub use sandbox::{
    CreateRequest, LabelRequest, ListQuery, PAGE_LEN_MAX, PingReport, RunEnd, SandboxDetail, SandboxList,
    SandboxSummary, StartRequest, StopRequest,
};
pub use service::{ActorRow, ActorTree, HostInfo, ShutdownRequest, StoreReport, VersionInfo};
pub use session::{
    ClientMessage, ExecRequest, STDERR_TAG, STDOUT_TAG, STREAM_UPGRADE, ServerMessage, StreamAnswer, TerminalSize,
};
pub use ssh::{AuthorizeRequest, Authorized, AuthorizedKey, AuthorizedKeys, SSH_UPGRADE, SshHost, SshQuery};
