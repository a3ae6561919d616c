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

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::health::{HealthReport, HealthStatus};
use crate::id::{BootId, SandboxId, SandboxName};
use crate::network::NetworkAddresses;
use crate::spec::{EngineChoice, Rlimit, SandboxSpec};
use crate::state::{EndCause, ProcessEnd, SandboxState};
use crate::vmm::{BootError, JailReport, Phase, ProbeReport, Sample};

/// First byte of a binary message that is standard output.
pub const STDOUT_TAG: u8 = 1;
/// First byte of a binary message that is standard error.
pub const STDERR_TAG: u8 = 2;

/// What a service is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VersionInfo {
    /// Version of the daemon.
    pub version: String,
    /// Version of the control API.
    pub api_version: u32,
    /// Newest generation of the guest border.
    pub guest_generation: u32,
    /// Process id of the daemon.
    pub pid: u32,
    /// When it started.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
}

/// What the host can do, as the daemon sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostInfo {
    /// The daemon.
    pub service: VersionInfo,
    /// MSB_HOME.
    pub home: String,
    /// Directory of sockets.
    pub runtime_dir: String,
    /// Directory of kernel, initramfs and templates.
    pub share_dir: String,
    /// Kernel in use.
    pub kernel: String,
    /// Engines.
    pub probe: ProbeReport,
    /// Sandboxes by state.
    pub sandboxes: BTreeMap<String, u64>,
    /// Free bytes of the home's file system.
    pub home_free_bytes: u64,
}

/// A sandbox to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// What it is made of.
    pub spec: SandboxSpec,
    /// Whether the main workload waits for `GET …/main` (so that no output is lost) instead of starting by itself.
    #[serde(default)]
    pub hold_main: bool,
    /// Remove an existing sandbox of this name first, giving it this many milliseconds to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_grace_ms: Option<u64>,
    /// When to fetch the image from its registry.
    #[serde(default)]
    pub pull: crate::images::PullPolicy,
}

/// The protocol of `Upgrade` by which a client takes a stream to the agent itself.
pub const STREAM_UPGRADE: &str = "msb-stream";

/// daemon → client on a connection upgraded to [`STREAM_UPGRADE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamAnswer {
    /// The stream comes with this frame, what was read of it in the next one.
    Opened,
    /// There is none; nothing follows.
    Refused {
        /// Why.
        error: ApiError,
    },
}

/// The protocol of `Upgrade` on the route of SSH connections.
pub const SSH_UPGRADE: &str = "ssh";

/// About one SSH connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct SshQuery {
    /// Who it is, for the log: the address it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The only key that may log in on this connection, in the form of `authorized_keys`; without it, the authorized ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// How an SSH client finds a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SshHost {
    /// The sandbox.
    pub sandbox: SandboxName,
    /// The user its processes run as, and the usual name to log in with.
    pub user: String,
    /// Its host key as in `known_hosts`, without a host.
    pub host_key: String,
    /// `SHA256:…` of the same key.
    pub fingerprint: String,
}

/// A key that may log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuthorizedKey {
    /// Its algorithm.
    pub algorithm: String,
    /// `SHA256:…`
    pub fingerprint: String,
    /// Its comment.
    pub comment: String,
}

/// All keys that may log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuthorizedKeys {
    /// In the order of the file.
    pub keys: Vec<AuthorizedKey>,
}

/// Keys to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorizeRequest {
    /// Public keys, one a line, without options.
    pub keys: String,
}

/// What became of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Authorized {
    /// Those that were not known before.
    pub added: Vec<AuthorizedKey>,
    /// How many may log in now.
    pub known: u64,
}

/// How the service ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// Stop every sandbox first, with a flush, as for a host that goes down: those with the restart policies `always` and
    /// `unless-stopped` come back when the service starts again.
    #[serde(default)]
    pub sandboxes: bool,
}

/// How to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// As in [`CreateRequest::hold_main`].
    #[serde(default)]
    pub hold_main: bool,
}

/// How to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Time between the stop signal and the kill in milliseconds; the sandbox's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// Kill at once, without a flush.
    #[serde(default)]
    pub force: bool,
}

/// Labels to change; those named in neither stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// Set these.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Remove these; one that is not there is no error.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// Sandboxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxList {
    /// Newest first.
    pub sandboxes: Vec<SandboxSummary>,
    /// Where a limit cut the list: the `after` of the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<SandboxId>,
}

/// Most sandboxes of one page.
pub const PAGE_LEN_MAX: usize = 1000;

/// Which sandboxes a list holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    /// Terms that all must fit: `KEY=VALUE` or `KEY`.
    pub labels: Vec<String>,
    /// Expressions that all must fit: `team in (ml,web),!debug`.
    pub selectors: Vec<String>,
    /// At most so many, 1 to [`PAGE_LEN_MAX`]; all of them if absent.
    pub limit: Option<usize>,
    /// Only those after the page that ended with this [`SandboxList::next`]. It stays good when sandboxes are made and removed meanwhile.
    pub after: Option<SandboxId>,
}

/// An agent's sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PingReport {
    /// The run that answered.
    pub boot_id: BootId,
    /// From the service to the agent and back, in microseconds.
    pub round_trip_us: u64,
}

/// One sandbox in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxSummary {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// Its state.
    pub status: SandboxState,
    /// The image as the user wrote it.
    pub image: String,
    /// The main workload's words; empty if it has none.
    pub command: Vec<String>,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When its present or last run became ready.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// How its last run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<RunEnd>,
    /// Restarts since somebody last started it.
    pub restarts: u32,
    /// Published ports as text, with the host ports that were bound; none while it rests and is not asleep.
    pub ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The engine of its present or last run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineChoice>,
    /// What its health checks say of the present run, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthStatus>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunEnd {
    /// The run.
    pub boot_id: BootId,
    /// Why the VM ended.
    pub cause: EndCause,
    /// How the main workload ended, if it had one and it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessEnd>,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

/// Everything about one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxDetail {
    /// What a list shows.
    #[serde(flatten)]
    pub summary: SandboxSummary,
    /// What it is made of.
    pub spec: SandboxSpec,
    /// Digest of the image's manifest; the path of a root that is no image.
    pub image_digest: String,
    /// The present run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// The VM process on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// Why this engine, when `auto` picked it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_reason: Option<String>,
    /// Durations of the last boot's phases.
    pub boot_phases: Vec<Phase>,
    /// What confines the VM process.
    pub jail: JailReport,
    /// What the security profile comes to.
    #[serde(default)]
    pub security: crate::security::SecurityReport,
    /// Its network.
    #[serde(default)]
    pub network: NetworkDetail,
    /// Bytes the host allocates for its writable disk.
    pub root_allocated_bytes: u64,
    /// Bytes the host allocates for the memory that it sleeps with (`on_idle: suspend`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_allocated_bytes: Option<u64>,
    /// Its directory.
    pub directory: String,
    /// Its heartbeat file.
    pub heartbeat_file: String,
    /// When state `restarting` tries again.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try_at: Option<Timestamp>,
    /// Time without activity in milliseconds, if it has an idle timeout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_for_ms: Option<u64>,
    /// Time until it stops for idleness in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stops_in_ms: Option<u64>,
    /// What counted as activity last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_activity: Option<String>,
    /// The evidence, if its last boot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_error: Option<BootError>,
    /// What its health checks say, with the last one's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_report: Option<HealthReport>,
}

/// A sandbox's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkDetail {
    /// Addresses of the guest and its gateway; none: there is no network but loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<NetworkAddresses>,
    /// The policy in the order it is tried, one line for each rule and default.
    #[serde(default)]
    pub policy: Vec<String>,
}

/// Which lines of the network's decision log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkLogQuery {
    /// Go on with new lines until the sandbox rests.
    pub follow: bool,
    /// Only the last lines before now.
    pub tail: Option<u64>,
}

/// One decision of a sandbox's network that was not "allow"; also the form in the log file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkDecision {
    /// When, nanoseconds since 1970.
    pub at_ns: u64,
    /// `deny`: policy; `refuse`: rebinding protection; `limit`: a table is full.
    pub verdict: String,
    /// `egress` or `ingress`.
    pub direction: String,
    /// `tcp`, `udp`, `icmpv4`, `icmpv6`.
    pub transport: String,
    /// The other end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What the address is: `public`, `private`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// The name that was asked for, or that the address was got by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The type of a DNS question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_type: Option<String>,
    /// What decided: `rule`, `profile_rule`, `default`, `encrypted_dns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// Place of the rule in its list, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Text of the rule.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rule: String,
    /// Lines that the rate limit left out before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub suppressed: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What to explain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct NetworkExplainQuery {
    /// A URL, `NAME:PORT`, `ADDRESS:PORT`, `udp://…` or `icmp://…`.
    pub target: String,
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Environment over the sandbox's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// `USER|UID[:GROUP|GID]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Resource limits.
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// Whether stdin is forwarded.
    #[serde(default)]
    pub stdin: bool,
    /// A terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which it is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// End when output ends, not when the process does.
    #[serde(default)]
    pub wait_output: bool,
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// client → daemon on a stream, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// First on `…/exec`.
    Exec {
        /// What to run.
        exec: ExecRequest,
    },
    /// First on `…/archive`.
    Archive {
        /// What to pack or unpack.
        archive: crate::file_api::ArchiveRequest,
    },
    /// First on `…/main` and `…/attach`.
    Attach {
        /// Whether stdin is forwarded.
        stdin: bool,
        /// The terminal's size, if the workload has one.
        terminal: Option<TerminalSize>,
        /// On `…/main`: time in milliseconds after which the workload is killed.
        timeout_ms: Option<u64>,
    },
    /// A signal for the process group.
    Signal {
        /// Its number.
        number: i32,
    },
    /// The terminal has this size now.
    Resize {
        /// The size.
        size: TerminalSize,
    },
    /// stdin ends here.
    StdinEof,
}

/// daemon → client on a stream, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// The process exists.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// This many more bytes of stdin may be sent.
    StdinCredit {
        /// Bytes.
        bytes: u32,
    },
    /// A watcher was too slow for this much output.
    OutputLost {
        /// Bytes.
        bytes: u64,
    },
    /// The process ended; nothing follows.
    Exited {
        /// How.
        end: ProcessEnd,
    },
    /// It failed; nothing follows.
    Error {
        /// Why.
        error: ApiError,
    },
}

/// Which log lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct LogQuery {
    /// Go on with new lines until the sandbox rests.
    pub follow: bool,
    /// Only the last lines before now.
    pub tail: Option<u64>,
    /// Only lines from this time on (RFC 3339).
    #[schema(value_type = Option<String>, format = DateTime)]
    #[param(value_type = Option<String>)]
    pub since: Option<Timestamp>,
    /// Only lines before this time (RFC 3339).
    #[schema(value_type = Option<String>, format = DateTime)]
    #[param(value_type = Option<String>)]
    pub until: Option<Timestamp>,
    /// `stdout`, `stderr`, `output` (both), `system` (agent, vmm, console) or `all`; several with commas. `output` if absent.
    pub source: Option<String>,
    /// Only lines that contain this text.
    pub grep: Option<String>,
}

/// A line of a sandbox's log; also the form in the log file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogRecord {
    /// When it was seen.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The run.
    pub boot_id: BootId,
    /// Where it came from.
    pub source: LogSource,
    /// What was written, lossy UTF-8; a line keeps its newline, a piece of an unfinished line has none.
    pub data: String,
}

/// Where a log line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The main workload's standard output.
    Stdout,
    /// The main workload's standard error.
    Stderr,
    /// msb itself: agent, VM process, a failed boot.
    System,
}

/// Which events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct EventQuery {
    /// Go on with new events.
    pub follow: bool,
    /// Only events after this sequence number.
    pub since: Option<u64>,
}

/// Something that happened to a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EventRecord {
    /// Counts up without gaps in one home.
    pub sequence: u64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The sandbox.
    pub sandbox: SandboxName,
    /// Its identity.
    pub sandbox_id: SandboxId,
    /// The run, if one was on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// What: `created`, `state`, `removed`, `health`, `pre_stop`, `labels`, `host_disk_full`, …
    pub event: String,
    /// The state after it.
    pub state: SandboxState,
    /// Why, if the event ends a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<EndCause>,
    /// Who: `user`, `creator`, `idle`, `supervisor`, `guest`.
    pub actor: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// The newest sample of every sandbox that runs, and the last one of each that ended since the request before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MetricsSnapshot {
    /// Stable identity of the host (machine-id(5), hashed for this application), so that two hosts never collide.
    pub host_id: String,
    /// The host's name.
    pub host_name: String,
    /// Identity of this service on this host; stays the same across its restarts.
    pub instance_id: String,
    /// When the snapshot was taken.
    #[schema(value_type = String, format = DateTime)]
    pub taken_at: Timestamp,
    /// Sandboxes by state.
    pub states: BTreeMap<String, u64>,
    /// Ready forks by template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ready_forks: BTreeMap<String, u64>,
    /// The samples, by name.
    pub sandboxes: Vec<SandboxMetrics>,
}

/// The newest sample of one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxMetrics {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// The run the sample is of.
    pub boot_id: BootId,
    /// The VM process on the host; 0 once it is gone.
    pub vmm_pid: u32,
    /// Its state.
    pub status: SandboxState,
    /// Labels as they are now.
    pub labels: BTreeMap<String, String>,
    /// Restarts since somebody last started it.
    pub restarts: u32,
    /// When the sandbox was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When this run's counters began at zero.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Whether this is the last sample of a run that ended.
    pub last: bool,
    /// Counters of the VM.
    #[schema(value_type = Object)]
    pub sample: Sample,
    /// vCPU seconds per second between the last two samples.
    pub cpu_utilization: f64,
    /// What the guest says of itself; absent before its first beat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMetrics>,
    /// Durations of the boot's phases.
    pub boot_phases: Vec<Phase>,
}

/// How to read metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricsQuery {
    /// Only these sandboxes, if any is named.
    pub names: Vec<String>,
    /// Only those whose labels fit every term.
    pub labels: Vec<String>,
    /// Only those that fit every expression.
    pub selectors: Vec<String>,
}

/// How to read the history of one sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    /// Only this long ago, in milliseconds; an hour is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ms: Option<u64>,
    /// At most so many points, evenly spread (600 if not given, 36,000 at most).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points_max: Option<u32>,
}

/// The last hour of one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MetricsHistory {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// Oldest first.
    pub points: Vec<HistoryPoint>,
}

/// One moment of a sandbox. Counters are cumulative since the boot of their run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HistoryPoint {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// The run.
    pub boot_id: BootId,
    /// vCPU seconds per second since the point before.
    pub cpu_utilization: f64,
    /// Time the vCPUs ran, in microseconds.
    pub cpu_time_us: u64,
    /// Memory of the guest that the host holds, in bytes.
    pub memory_resident_bytes: u64,
    /// Memory the guest was given, in bytes.
    pub memory_limit_bytes: u64,
    /// Bytes read from all disks.
    pub disk_read_bytes: u64,
    /// Bytes written to all disks.
    pub disk_written_bytes: u64,
    /// Requests to all disks.
    pub disk_operations: u64,
    /// Bytes the guest received.
    pub network_received_bytes: u64,
    /// Bytes the guest sent.
    pub network_sent_bytes: u64,
    /// Packets in both directions.
    pub network_packets: u64,
    /// Bytes the host allocates for the writable disk.
    pub root_allocated_bytes: u64,
    /// What the guest said of itself, absent before its first beat; `memory_total_bytes` is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMetrics>,
}

/// What a guest says of itself in its beat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestMetrics {
    /// Memory in use in bytes.
    pub memory_used_bytes: u64,
    /// Memory its kernel has in bytes.
    pub memory_total_bytes: u64,
    /// Bytes used on the writable root.
    pub root_used_bytes: u64,
    /// Bytes free on the writable root.
    pub root_free_bytes: u64,
    /// Processes of the workload.
    pub processes: u32,
}

/// Images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageList {
    /// Newest first.
    pub images: Vec<ImageSummary>,
}

/// One image in a list: one record for each manifest digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageSummary {
    /// Digest of the manifest.
    pub digest: String,
    /// Its names, short form.
    pub references: Vec<String>,
    /// `linux/amd64`.
    pub platform: String,
    /// Bytes of its layers as they came.
    pub compressed_bytes: u64,
    /// Bytes of its layers unpacked.
    pub unpacked_bytes: u64,
    /// Number of layers.
    pub layers: u32,
    /// When it was made, if its maker said so.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it came into the store.
    #[schema(value_type = String, format = DateTime)]
    pub loaded_at: Timestamp,
    /// Whether prune leaves it alone.
    #[serde(default)]
    pub pinned: bool,
}

/// Everything about one image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageDetail {
    /// What a list shows.
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// Whether all its parts are there, as far as their lengths tell.
    #[serde(default)]
    pub complete: bool,
    /// What it says about running it.
    pub config: ImageConfigDetail,
    /// Its layers, lowest first.
    pub layer_details: Vec<ImageLayerDetail>,
    /// Sandboxes that use it.
    pub used_by: Vec<SandboxName>,
    /// Snapshots that need it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub used_by_snapshots: Vec<SandboxName>,
    /// How it was built, oldest step first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<crate::images::ImageHistoryStep>,
}

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageConfigDetail {
    /// Digest of the configuration.
    pub digest: String,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Words.
    pub entrypoint: Vec<String>,
    /// Words.
    pub cmd: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// User.
    pub user: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Stop signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Exposed ports.
    pub exposed_ports: Vec<String>,
    /// Volumes.
    pub volumes: Vec<String>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageLayerDetail {
    /// Digest of the unpacked tar.
    pub diff_id: String,
    /// Digest of the blob.
    pub blob_digest: String,
    /// Media type of the blob.
    pub media_type: String,
    /// Bytes of the blob.
    pub compressed_bytes: u64,
    /// Bytes of the tar once unpacked.
    #[serde(default)]
    pub unpacked_bytes: u64,
    /// Bytes of the data file, as allocated.
    pub data_bytes: u64,
    /// Images of the store that have it, this one counted.
    pub shared_by: u32,
}

/// Progress of a load: one JSON line each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LoadEvent {
    /// Bytes of the archive read so far.
    Progress {
        /// Bytes.
        bytes: u64,
    },
    /// A layer is ready.
    Layer {
        /// Its unpacked digest.
        diff_id: String,
        /// Whether the store had it already.
        known: bool,
    },
    /// Something in the image was left out, and why.
    Warning {
        /// For people.
        message: String,
    },
    /// The end: the images.
    Done {
        /// In the order of the archive.
        images: Vec<ImageSummary>,
    },
    /// The end: it failed; the store is as it was.
    Error {
        /// Why.
        error: ApiError,
    },
}

/// What a check of the store found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StoreReport {
    /// Images checked.
    pub images: u64,
    /// Blobs checked.
    pub blobs: u64,
    /// Bytes of the images' blobs, each counted once.
    pub bytes: u64,
    /// What is wrong; empty if nothing.
    pub problems: Vec<String>,
}

/// The actors of a daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActorTree {
    /// One row for each actor, parents before children.
    pub actors: Vec<ActorRow>,
}

/// One actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActorRow {
    /// Its name: `supervisor`, `sandbox/web`, `metrics`, `images`.
    pub name: String,
    /// Its parent's name; empty for the root.
    pub parent: String,
    /// Messages handled.
    pub handled: u64,
    /// Messages waiting.
    pub mailbox: u64,
    /// How often it was rebuilt.
    pub restarts: u32,
    /// Why it was last rebuilt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_cause: Option<String>,
    /// Its state, for people.
    pub state: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_stream_have_stable_text() {
        let message = ClientMessage::Exec { exec: ExecRequest { command: vec!["id".into()], ..Default::default() } };
        assert_eq!(
            serde_json::to_string(&message).unwrap(),
            r#"{"type":"exec","exec":{"command":["id"],"env":{},"rlimits":[],"stdin":false,"wait_output":false}}"#
        );
        let minimal: ClientMessage = serde_json::from_str(r#"{"type":"exec","exec":{"command":["id"]}}"#).unwrap();
        assert_eq!(minimal, message);
        let exited = ServerMessage::Exited { end: ProcessEnd::signalled(9) };
        assert_eq!(
            serde_json::to_string(&exited).unwrap(),
            r#"{"type":"exited","end":{"signal":9,"core_dumped":false,"oom_killed":false,"timed_out":false}}"#
        );
    }

    #[test]
    fn log_records_are_one_json_line_with_an_rfc_3339_time() {
        let record = LogRecord {
            time: Timestamp::UNIX_EPOCH,
            boot_id: BootId(uuid::Uuid::nil()),
            source: LogSource::Stderr,
            data: "a\nb".into(),
        };
        let line = serde_json::to_string(&record).unwrap();
        assert!(line.contains("\"1970-01-01T00:00:00Z\"") && !line.contains('\n'));
        assert_eq!(serde_json::from_str::<LogRecord>(&line).unwrap(), record);
    }
}
