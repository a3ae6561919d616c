//! One typed call for each route of the control API. [`crate::Sandbox`] and [`crate::Image`] are built on it; `msb` uses it directly.
//!
//! A client keeps one idle connection for the next call and opens more when calls overlap. When its service has gone it looks for the
//! next one, or starts it, as it did at first. It never repeats a request that may have been carried out, except one that only reads.

use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, header};
use msb_protocol::control::{
    ActorTree, ClientMessage, CreateRequest, EventQuery, EventRecord, ExecRequest, HistoryQuery, HostInfo, ImageDetail,
    ImageList, ImageSummary, LabelRequest, ListQuery, LoadEvent, LogQuery, LogRecord, MetricsHistory, MetricsQuery,
    MetricsSnapshot, NetworkDecision, NetworkLogQuery, PingReport, SandboxDetail, SandboxList, ShutdownRequest,
    StartRequest, StopRequest, StoreReport, TerminalSize, VersionInfo,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::file_api::{ArchiveRequest, FileAnswer, FileCallRequest, WatchRecord};
use msb_protocol::fleet::{self, FLEET_MEDIA_TYPE};
use msb_protocol::id::SandboxName;
use msb_protocol::images::{
    DiskUsage, ImageRemoval, LoginReport, LoginRequest, PinRequest, PruneReport, PruneRequest, PullEvent, PullRequest,
    RegistryList, SaveRequest, TagRequest,
};
use msb_protocol::snapshot::{
    CreateSnapshot, ForkRequest, ImportSnapshot, SnapshotCheck, SnapshotDetail, SnapshotList,
};
use msb_protocol::version::CONTROL_API_VERSION;
use msb_protocol::vmm::NetworkExplanation;
use msb_protocol::volume::{CreateVolume, VolumeDetail, VolumeList};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::io::ReaderStream;

use crate::archive;
use crate::connection::{self, Connection, RequestBody};
use crate::error::Error;
use crate::image::ARCHIVE_CHUNK_LEN;
use crate::locate::Locator;
use crate::session::Session;

/// Time for a service that accepts a connection to say its version: systemd may hold its socket and just be starting it.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest line of a streamed answer, in bytes.
const LINE_LEN_MAX: usize = 8 << 20;

/// A connection to a service.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    /// What finds the next service; none if the user named the socket.
    locator: Option<Arc<Locator>>,
}

struct Inner {
    socket: PathBuf,
    /// Whose process must listen on the socket; none if the user named the socket.
    owner: Option<u32>,
    idle: Mutex<Option<Connection>>,
    version: VersionInfo,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("socket", &self.inner.socket).finish_non_exhaustive()
    }
}

/// What to attach to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachOptions {
    /// Whether stdin is forwarded.
    pub stdin: bool,
    /// The terminal's size, if the workload has one.
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which the workload is killed; only where the call starts it.
    pub timeout_ms: Option<u64>,
}

impl Client {
    /// Finds the service of this environment, or starts one ([`Locator`]).
    ///
    /// # Errors
    /// `daemon_unavailable`, `runtime_not_found`, `permission_denied`.
    pub async fn connect() -> Result<Self, Error> {
        Locator::from_environment().connect().await
    }

    /// Connects to the service on this socket.
    ///
    /// # Errors
    /// `daemon_unavailable`, `permission_denied`.
    pub async fn at(socket: impl Into<PathBuf>) -> Result<Self, Error> {
        let socket = socket.into();
        match Self::open(&socket, None).await {
            Ok(client) => Ok(client),
            Err(OpenError::Io(error)) => Err(open_failed(&socket, &error)),
            Err(OpenError::Lost(error) | OpenError::Answer(error)) => Err(error),
        }
    }

    pub(crate) async fn open(socket: &Path, owner: Option<u32>) -> Result<Self, OpenError> {
        Self::open_within(socket, owner, VERSION_TIMEOUT).await
    }

    /// As [`Client::open`], for a service that may take this long to say its version.
    pub(crate) async fn open_within(socket: &Path, owner: Option<u32>, patience: Duration) -> Result<Self, OpenError> {
        let stream = connection::connect(socket, owner).await.map_err(OpenError::Io)?;
        let mut idle = connection::handshake(stream).await.map_err(OpenError::Lost)?;
        let request = request(Method::GET, "/v1/version", connection::empty()).map_err(OpenError::Answer)?;
        let answer = async {
            let response = connection::send(&mut idle, request).await?;
            connection::collect(response).await
        };
        let body = match tokio::time::timeout(patience, answer).await {
            Ok(Err(error)) if error.is_lost() => return Err(OpenError::Lost(error)),
            Ok(body) => body.map_err(OpenError::Answer)?,
            Err(_) => {
                return Err(OpenError::Answer(Error::unavailable("msbd accepts connections but does not answer")));
            }
        };
        let version: VersionInfo = parse(&body).map_err(OpenError::Answer)?;
        if version.api_version != CONTROL_API_VERSION {
            let message = format!(
                "msbd {} speaks version {} of the control API, this client speaks {CONTROL_API_VERSION}",
                version.version, version.api_version
            );
            let error = ApiError::new(ErrorCode::UnsupportedOperation, message)
                .with_hint("restart msbd, so that it runs the installed version");
            return Err(OpenError::Answer(Error::Client(error)));
        }
        let inner = Inner { socket: socket.to_owned(), owner, idle: Mutex::new(Some(idle)), version };
        Ok(Self { inner: Arc::new(inner), locator: None })
    }

    /// Who found the service; none if the user named the socket.
    pub(crate) fn locator(&self) -> Option<&Locator> {
        self.locator.as_deref()
    }

    /// The same client, which looks for another service when its own has gone.
    pub(crate) fn found_by(self, locator: &Locator) -> Self {
        Self { locator: Some(Arc::new(locator.clone())), ..self }
    }

    /// The socket in use.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.inner.socket
    }

    /// What the service said it is.
    #[must_use]
    pub fn version(&self) -> &VersionInfo {
        &self.inner.version
    }

    /// What the host can do.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn host(&self) -> Result<HostInfo, Error> {
        self.get("/v1/host").await
    }

    /// The newest sample of every sandbox, in one request.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn metrics(&self) -> Result<MetricsSnapshot, Error> {
        self.metrics_of(&MetricsQuery::default()).await
    }

    /// The newest sample of every sandbox that is asked for, in one request.
    ///
    /// # Errors
    /// `invalid_name`, `invalid_label`, `limit_exceeded`.
    pub async fn metrics_of(&self, query: &MetricsQuery) -> Result<MetricsSnapshot, Error> {
        let path = with_query("/v1/metrics", &metrics_pairs(query));
        let ask = async |client: &Self| {
            let mut request = request(Method::GET, &path, connection::empty())?;
            // A service that is older than this form answers in JSON.
            request.headers_mut().insert(header::ACCEPT, header::HeaderValue::from_static(FLEET_MEDIA_TYPE));
            let (kind, body) = client.call_typed(request).await?;
            if kind.is_some_and(|kind| kind == FLEET_MEDIA_TYPE) {
                fleet::decode(body).map_err(Error::protocol)
            } else {
                parse(&body)
            }
        };
        match ask(self).await {
            Err(error) if error.is_lost() => ask(&self.successor(error).await?).await,
            outcome => outcome,
        }
    }

    /// As [`Self::metrics_of`], at each interval (100 ms to an hour), the first at once. A reader that is slow misses some.
    ///
    /// # Errors
    /// As there, and `invalid_request` for the interval.
    pub async fn metrics_stream(
        &self,
        query: &MetricsQuery,
        interval: Duration,
    ) -> Result<JsonLines<MetricsSnapshot>, Error> {
        let mut pairs = metrics_pairs(query);
        pairs.push(("interval_ms", interval.as_millis().to_string()));
        self.lines(&with_query("/v1/metrics/stream", &pairs)).await
    }

    /// The last hour of one sandbox, or a part of it.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_request`.
    pub async fn metrics_history(&self, name: &SandboxName, query: &HistoryQuery) -> Result<MetricsHistory, Error> {
        let mut pairs = Vec::new();
        pairs.extend(query.last_ms.map(|ms| ("last_ms", ms.to_string())));
        pairs.extend(query.points_max.map(|points| ("points_max", points.to_string())));
        self.get(&with_query(&sandbox(name, "/metrics"), &pairs)).await
    }

    /// Ends the daemon; its sandboxes go on.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn shutdown(&self) -> Result<(), Error> {
        self.shut_down(ShutdownRequest::default()).await
    }

    /// Ends the daemon, and its sandboxes first if the request says so.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn shut_down(&self, request: ShutdownRequest) -> Result<(), Error> {
        self.post::<_, serde_json::Value>("/v1/shutdown", &request).await.map(drop)
    }

    /// Creates a sandbox.
    ///
    /// # Errors
    /// `sandbox_already_exists`, `image_not_found`, `boot_failed` and others of the service.
    pub async fn create(&self, request: &CreateRequest) -> Result<SandboxDetail, Error> {
        self.post("/v1/sandboxes", request).await
    }

    /// The sandboxes whose labels fit every term (`KEY=VALUE` or `KEY`).
    ///
    /// # Errors
    /// Those of the service.
    pub async fn list(&self, labels: &[String]) -> Result<SandboxList, Error> {
        self.select(labels, &[]).await
    }

    /// The sandboxes whose labels fit every term and every expression (`team in (ml,web),!debug`).
    ///
    /// # Errors
    /// `invalid_selector` and others of the service.
    pub async fn select(&self, labels: &[String], selectors: &[String]) -> Result<SandboxList, Error> {
        let query = ListQuery { labels: labels.to_vec(), selectors: selectors.to_vec(), ..ListQuery::default() };
        self.list_page(&query).await
    }

    /// The sandboxes that a query asks for; with a limit, a page of them.
    ///
    /// # Errors
    /// `invalid_label`, `invalid_selector`, `invalid_request` for the limit.
    pub async fn list_page(&self, query: &ListQuery) -> Result<SandboxList, Error> {
        let labels = query.labels.iter().map(|label| ("label", label.clone()));
        let selectors = query.selectors.iter().map(|selector| ("selector", selector.clone()));
        let mut pairs: Vec<_> = labels.chain(selectors).collect();
        pairs.extend(query.limit.map(|limit| ("limit", limit.to_string())));
        pairs.extend(query.after.map(|after| ("after", after.to_string())));
        self.get(&with_query("/v1/sandboxes", &pairs)).await
    }

    /// Asks a running sandbox's agent for a sign of life. It is no activity, and wakes nothing.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `agent_timeout`.
    pub async fn ping(&self, name: &SandboxName) -> Result<PingReport, Error> {
        self.post(&sandbox(name, "/ping"), &serde_json::json!({})).await
    }

    /// Everything about one sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn inspect(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.get(&sandbox(name, "")).await
    }

    /// Removes a sandbox; `force` kills it first.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`.
    pub async fn remove(&self, name: &SandboxName, force: bool) -> Result<(), Error> {
        self.delete(&with_query(&sandbox(name, ""), &flag("force", force))).await
    }

    /// Starts a resting sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `boot_failed`.
    pub async fn start(&self, name: &SandboxName, request: &StartRequest) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/start"), request).await
    }

    /// Stops a sandbox; answers once it rests.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn stop(&self, name: &SandboxName, request: &StopRequest) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/stop"), request).await
    }

    /// Stops a sandbox if it runs, and starts it.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub async fn restart(&self, name: &SandboxName, request: &StopRequest) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/restart"), request).await
    }

    /// Halts a running sandbox where it is; answers once nothing in it runs.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `unsupported_operation`.
    pub async fn pause(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/pause"), &serde_json::json!({})).await
    }

    /// Lets a halted sandbox go on.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn resume(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/resume"), &serde_json::json!({})).await
    }

    /// Lets a sandbox outlive its creator.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn detach(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/detach"), &serde_json::json!({})).await
    }

    /// Changes labels while the sandbox lives.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_label`.
    pub async fn label(&self, name: &SandboxName, request: &LabelRequest) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/labels"), request).await
    }

    /// Counts as activity, so that the idle time begins anew.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn touch(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.post(&sandbox(name, "/touch"), &serde_json::json!({})).await
    }

    /// Waits until a sandbox rests.
    ///
    /// # Errors
    /// `sandbox_not_found`, also when it is removed meanwhile.
    pub async fn wait(&self, name: &SandboxName) -> Result<SandboxDetail, Error> {
        self.get(&sandbox(name, "/wait")).await
    }

    /// Runs a command in a sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`; a command that cannot be started is the session's first answer.
    pub async fn exec(&self, name: &SandboxName, request: ExecRequest) -> Result<Session, Error> {
        let stdin = request.stdin;
        self.session(&sandbox(name, "/exec"), &ClientMessage::Exec { exec: request }, stdin).await
    }

    /// Starts the main workload of a sandbox made with `hold_main`, and watches it.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn start_main(&self, name: &SandboxName, options: AttachOptions) -> Result<Session, Error> {
        self.session(&sandbox(name, "/main"), &attach_message(options), options.stdin).await
    }

    /// Watches the main workload of a running sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn attach(&self, name: &SandboxName, options: AttachOptions) -> Result<Session, Error> {
        self.session(&sandbox(name, "/attach"), &attach_message(options), options.stdin).await
    }

    pub(crate) async fn archive_session(
        &self,
        name: &SandboxName,
        archive: ArchiveRequest,
        stdin: bool,
    ) -> Result<Session, Error> {
        self.session(&sandbox(name, "/archive"), &ClientMessage::Archive { archive }, stdin).await
    }

    /// Reads a sandbox's log.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn logs(&self, name: &SandboxName, query: &LogQuery) -> Result<JsonLines<LogRecord>, Error> {
        let mut pairs = flag("follow", query.follow);
        pairs.extend(query.tail.map(|tail| ("tail", tail.to_string())));
        pairs.extend(query.since.map(|since| ("since", since.to_string())));
        pairs.extend(query.until.map(|until| ("until", until.to_string())));
        pairs.extend(query.source.clone().map(|source| ("source", source)));
        pairs.extend(query.grep.clone().map(|grep| ("grep", grep)));
        self.lines(&with_query(&sandbox(name, "/logs"), &pairs)).await
    }

    /// One call on a sandbox's files.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, and what the sandbox's system answered, with its errno.
    pub async fn file_call(&self, name: &SandboxName, request: &FileCallRequest) -> Result<FileAnswer, Error> {
        self.post(&sandbox(name, "/files"), request).await
    }

    pub(crate) async fn file_content(
        &self,
        name: &SandboxName,
        pairs: &[(&str, String)],
    ) -> Result<(Incoming, Connection), Error> {
        let mut connection = self.fresh().await?;
        let path = with_query(&sandbox(name, "/files/content"), pairs);
        let response = connection::send(&mut connection, request(Method::GET, &path, connection::empty())?).await?;
        Ok((response.into_body(), connection))
    }

    pub(crate) async fn file_write<S>(
        &self,
        name: &SandboxName,
        pairs: &[(&str, String)],
        content: S,
    ) -> Result<FileAnswer, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let body = StreamBody::new(content.map_ok(Frame::data)).boxed_unsync();
        let mut connection = self.fresh().await?;
        let path = with_query(&sandbox(name, "/files/content"), pairs);
        let response = connection::send(&mut connection, request(Method::PUT, &path, body)?).await?;
        parse(&connection::collect(response).await?)
    }

    pub(crate) async fn file_watch(
        &self,
        name: &SandboxName,
        pairs: &[(&str, String)],
    ) -> Result<JsonLines<WatchRecord>, Error> {
        self.lines(&with_query(&sandbox(name, "/files/watch"), pairs)).await
    }

    /// Reads a sandbox's network decision log.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn network_log(
        &self,
        name: &SandboxName,
        query: &NetworkLogQuery,
    ) -> Result<JsonLines<NetworkDecision>, Error> {
        let mut pairs = flag("follow", query.follow);
        pairs.extend(query.tail.map(|tail| ("tail", tail.to_string())));
        self.lines(&with_query(&sandbox(name, "/network/log"), &pairs)).await
    }

    /// Asks which rule of a sandbox's network would decide about a target; nothing is sent.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_request`.
    pub async fn explain_network(&self, name: &SandboxName, target: &str) -> Result<NetworkExplanation, Error> {
        self.get(&with_query(&sandbox(name, "/network/explain"), &[("target", target.to_owned())])).await
    }

    /// Reads what happened.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn events(&self, query: &EventQuery) -> Result<JsonLines<EventRecord>, Error> {
        let mut pairs = flag("follow", query.follow);
        pairs.extend(query.since.map(|since| ("since", since.to_string())));
        self.lines(&with_query("/v1/events", &pairs)).await
    }

    /// The images of the store.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn images(&self) -> Result<ImageList, Error> {
        self.get("/v1/images").await
    }

    /// Everything about one image.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn image(&self, reference: &str) -> Result<ImageDetail, Error> {
        self.get(&with_query("/v1/image", &[("reference", reference.to_owned())])).await
    }

    /// Removes an image; `force` untags it even where sandboxes use it.
    ///
    /// # Errors
    /// `image_not_found`, `image_in_use` with the sandboxes as details.
    pub async fn remove_image(&self, reference: &str, force: bool) -> Result<ImageRemoval, Error> {
        let mut pairs = vec![("reference", reference.to_owned())];
        pairs.extend(flag("force", force));
        let request = request(Method::DELETE, &with_query("/v1/image", &pairs), connection::empty())?;
        parse(&self.call(request).await?)
    }

    /// Gives an image another name.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn tag_image(&self, request: &TagRequest) -> Result<ImageSummary, Error> {
        self.post("/v1/images/tag", request).await
    }

    /// Keeps prune from an image, or no more.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn pin_image(&self, request: &PinRequest) -> Result<ImageSummary, Error> {
        self.post("/v1/images/pin", request).await
    }

    /// Removes the images that the request allows and nothing needs.
    ///
    /// # Errors
    /// `invalid_label` for a filter that is none.
    pub async fn prune_images(&self, request: &PruneRequest) -> Result<PruneReport, Error> {
        self.post("/v1/images/prune", request).await
    }

    /// What uses how much of the disk.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn disk_usage(&self) -> Result<DiskUsage, Error> {
        self.get("/v1/store/usage").await
    }

    /// Fetches an image from its registry. The last event is `done` or `error`; dropping the lines cancels the pull, and what has come is
    /// kept for the next one.
    ///
    /// # Errors
    /// `invalid_request` and others of the service, here or as the last event.
    pub async fn pull_image(&self, request: &PullRequest) -> Result<JsonLines<PullEvent>, Error> {
        let mut connection = self.fresh().await?;
        let response = connection::send(&mut connection, json_request("/v1/images/pull", request)?).await?;
        Ok(JsonLines::new(response, Some(connection)))
    }

    /// Logs in to a registry; the service keeps the credential.
    ///
    /// # Errors
    /// `registry_denied`, `registry_failed`.
    pub async fn login(&self, request: &LoginRequest) -> Result<LoginReport, Error> {
        self.post("/v1/registries/login", request).await
    }

    /// Forgets the credential of a registry.
    ///
    /// # Errors
    /// `invalid_config` if there is none.
    pub async fn logout(&self, registry: &str) -> Result<(), Error> {
        self.delete(&with_query("/v1/registries/login", &[("registry", registry.to_owned())])).await
    }

    /// Registries that the service has credentials or settings for; never a secret.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn registries(&self) -> Result<RegistryList, Error> {
        self.get("/v1/registries").await
    }

    /// Saves images as one archive. An archive is whole only if [`Archive::next`] came to its end.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn save_images(&self, request: &SaveRequest) -> Result<Archive, Error> {
        let mut connection = self.fresh().await?;
        let response = connection::send(&mut connection, json_request("/v1/images/save", request)?).await?;
        Ok(Archive { body: response.into_body(), _connection: connection })
    }

    /// Every volume.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn volumes(&self) -> Result<VolumeList, Error> {
        self.get("/v1/volumes").await
    }

    /// One volume.
    ///
    /// # Errors
    /// `volume_not_found`.
    pub async fn volume(&self, name: &SandboxName) -> Result<VolumeDetail, Error> {
        self.get(&format!("/v1/volumes/{name}")).await
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// `volume_already_exists`, `invalid_config`.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<VolumeDetail, Error> {
        self.post("/v1/volumes", request).await
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// `volume_not_found`, `volume_in_use` naming the users.
    pub async fn remove_volume(&self, name: &SandboxName) -> Result<(), Error> {
        self.delete(&format!("/v1/volumes/{name}")).await
    }

    /// Every snapshot.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn snapshots(&self) -> Result<SnapshotList, Error> {
        self.get("/v1/snapshots").await
    }

    /// One snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`.
    pub async fn snapshot(&self, name: &SandboxName) -> Result<SnapshotDetail, Error> {
        self.get(&format!("/v1/snapshots/{name}")).await
    }

    /// Makes copies of a running sandbox, its memory included; answers once all of them are up.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `unsupported_operation`, and those of [`Client::create`].
    pub async fn fork(&self, name: &SandboxName, request: &ForkRequest) -> Result<Vec<SandboxDetail>, Error> {
        self.post(&sandbox(name, "/fork"), request).await
    }

    /// Takes a snapshot of a stopped sandbox, or of a running one with its memory; answers once it is durable.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `snapshot_already_exists`, `disk_full`.
    pub async fn create_snapshot(&self, request: &CreateSnapshot) -> Result<SnapshotDetail, Error> {
        self.post("/v1/snapshots", request).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_in_use` with the snapshots on top of it as details.
    pub async fn remove_snapshot(&self, name: &SandboxName) -> Result<(), Error> {
        self.delete(&format!("/v1/snapshots/{name}")).await
    }

    /// Compares every byte of a snapshot with what was written.
    ///
    /// # Errors
    /// `snapshot_not_found`; damage is in the answer.
    pub async fn verify_snapshot(&self, name: &SandboxName) -> Result<SnapshotCheck, Error> {
        self.post(&format!("/v1/snapshots/{name}/verify"), &serde_json::json!({})).await
    }

    /// Exports a snapshot as one `.tar.zst`. It is whole only if [`Archive::next`] came to its end.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_damaged`.
    pub async fn export_snapshot(&self, name: &SandboxName) -> Result<Archive, Error> {
        let mut connection = self.fresh().await?;
        let path = format!("/v1/snapshots/{name}/archive");
        let response = connection::send(&mut connection, request(Method::GET, &path, connection::empty())?).await?;
        Ok(Archive { body: response.into_body(), _connection: connection })
    }

    /// Takes an archive in; answers once every byte of it was compared.
    ///
    /// # Errors
    /// `invalid_archive`, `digest_mismatch`, `image_not_found`, `snapshot_already_exists`, `disk_full`.
    pub async fn import_snapshot<S>(&self, archive: S, how: &ImportSnapshot) -> Result<SnapshotDetail, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let pairs: Vec<_> = how.name.clone().map(|name| ("name", name)).into_iter().collect();
        let body = StreamBody::new(archive.map_ok(Frame::data)).boxed_unsync();
        let mut connection = self.fresh().await?;
        let mut request = request(Method::POST, &with_query("/v1/snapshot-archives", &pairs), body)?;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/zstd"));
        let response = connection::send(&mut connection, request).await?;
        parse(&connection::collect(response).await?)
    }

    /// Loads an archive (docker or OCI, also compressed) into the store. The last event is `done` or `error`.
    ///
    /// # Errors
    /// `invalid_archive` and others of the service, here or as the last event.
    pub async fn load_image<S>(&self, archive: S, how: &LoadOptions) -> Result<JsonLines<LoadEvent>, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        self.load([], how, StreamBody::new(archive.map_ok(Frame::data)).boxed_unsync()).await
    }

    /// As [`Self::load_image`], of an archive that is a file: the service reads it in its place, if it sees the same file, and passes over
    /// what the store has.
    ///
    /// # Errors
    /// As there.
    pub async fn load_file(&self, file: std::fs::File, how: &LoadOptions) -> Result<JsonLines<LoadEvent>, Error> {
        if let Some(place) = archive::place(&file) {
            match self.load(place, how, connection::empty()).await {
                // It sees another file there, or is of a version that only takes what is sent.
                Err(error) if matches!(error.code(), ErrorCode::PathNotFound | ErrorCode::InvalidRequest) => {}
                answer => return answer,
            }
        }
        self.load_image(ReaderStream::with_capacity(tokio::fs::File::from_std(file), ARCHIVE_CHUNK_LEN), how).await
    }

    async fn load(
        &self,
        place: impl IntoIterator<Item = (&'static str, String)>,
        how: &LoadOptions,
        body: RequestBody,
    ) -> Result<JsonLines<LoadEvent>, Error> {
        let mut pairs: Vec<_> = how.tags.iter().map(|tag| ("tag", tag.clone())).collect();
        pairs.extend(how.platform.clone().map(|platform| ("platform", platform)));
        pairs.extend(place);
        // An upload is not sent on an idle connection: the service may have closed it, and the archive can be read only once.
        let mut connection = self.fresh().await?;
        let mut request = request(Method::POST, &with_query("/v1/images/load", &pairs), body)?;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/x-tar"));
        let response = connection::send(&mut connection, request).await?;
        Ok(JsonLines::new(response, Some(connection)))
    }

    /// Checks the image store.
    ///
    /// # Errors
    /// Those of the service; damage is in the report.
    pub async fn check_store(&self) -> Result<StoreReport, Error> {
        self.get("/v1/store/check").await
    }

    /// The daemon's actors.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn actors(&self) -> Result<ActorTree, Error> {
        self.get("/v1/debug/actors").await
    }

    async fn session(&self, path: &str, first: &ClientMessage, stdin: bool) -> Result<Session, Error> {
        let socket = connection::upgrade(self.fresh().await?, path).await?;
        Session::open(socket, first, stdin).await
    }

    async fn lines<T: DeserializeOwned>(&self, path: &str) -> Result<JsonLines<T>, Error> {
        let ask = async |client: &Self| {
            let mut connection = client.fresh().await?;
            let response = connection::send(&mut connection, request(Method::GET, path, connection::empty())?).await?;
            Ok::<_, Error>(JsonLines::new(response, Some(connection)))
        };
        match ask(self).await {
            Err(error) if error.is_lost() => ask(&self.successor(error).await?).await,
            outcome => outcome,
        }
    }

    /// A client of the service that came after this one's, which was lost with this error; the error if nobody may be looked for.
    async fn successor(&self, error: Error) -> Result<Self, Error> {
        match &self.locator {
            Some(locator) => locator.connect().await,
            None => Err(error),
        }
    }

    /// Reads. A service that went away before it answered is no answer: the next one is asked, once.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let ask = async |client: &Self| parse(&client.call(request(Method::GET, path, connection::empty())?).await?);
        match ask(self).await {
            Err(error) if error.is_lost() => ask(&self.successor(error).await?).await,
            outcome => outcome,
        }
    }

    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, Error> {
        parse(&self.call(json_request(path, body)?).await?)
    }

    async fn delete(&self, path: &str) -> Result<(), Error> {
        self.call(request(Method::DELETE, path, connection::empty())?).await.map(drop)
    }

    /// Sends a request on the idle connection or a fresh one, and keeps the connection if it can carry another.
    async fn call(&self, request: Request<RequestBody>) -> Result<Bytes, Error> {
        Ok(self.call_typed(request).await?.1)
    }

    /// As [`Self::call`], with the answer's `Content-Type`.
    async fn call_typed(&self, request: Request<RequestBody>) -> Result<(Option<header::HeaderValue>, Bytes), Error> {
        let mut connection = self.reusable().await?;
        let mut response = connection::send(&mut connection, request).await?;
        let kind = response.headers_mut().remove(header::CONTENT_TYPE);
        let body = connection::collect(response).await?;
        *self.idle() = Some(connection);
        Ok((kind, body))
    }

    async fn reusable(&self) -> Result<Connection, Error> {
        let idle = self.idle().take();
        if let Some(mut connection) = idle {
            // Fails if the service closed it, or if the runtime that drove it is gone; nothing has been sent then.
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        self.fresh().await
    }

    pub(crate) async fn fresh(&self) -> Result<Connection, Error> {
        let failed = |error| open_failed(&self.inner.socket, error);
        match connection::connect(&self.inner.socket, self.inner.owner).await {
            Ok(stream) => connection::handshake(stream).await,
            // Nothing has been sent to anybody: whoever serves now is as good as the one of before.
            Err(error) if is_absence(&error) => {
                let next = self.successor(failed(&error)).await?;
                let idle = next.idle().take();
                idle.ok_or_else(|| failed(&error))
            }
            Err(error) => Err(failed(&error)),
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How an archive is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// `NAME` for the first image of the archive, or `OLD=NEW` for the one it calls OLD.
    pub tags: Vec<String>,
    /// The platform where the archive has several, as `linux/amd64`; the host's if absent.
    pub platform: Option<String>,
}

/// The bytes of an archive as they come.
pub struct Archive {
    body: Incoming,
    /// Held so that the connection lives as long as its answer.
    _connection: Connection,
}

impl Archive {
    /// The next piece; `None` at the end of a whole archive.
    ///
    /// # Errors
    /// `daemon_unavailable` if it broke off: what came before is not an archive.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(Error::unavailable(format!("the archive broke off: {error}"))),
                None => return Ok(None),
            }
        }
    }
}

/// Why [`Client::open`] failed: the locator looks further on the first two kinds.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// There was no connection.
    Io(std::io::Error),
    /// There was one that ended before the welcome: a service that dies still has its socket for a moment.
    Lost(Error),
    /// There was one, but what came over it was no welcome.
    Answer(Error),
}

/// Whether this failure to connect means that nobody is there. One that dies resets whom it had not greeted yet.
pub(crate) fn is_absence(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, ConnectionReset, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | NotADirectory)
}

/// The error of a socket that cannot be connected to.
pub(crate) fn open_failed(socket: &Path, error: &std::io::Error) -> Error {
    let message = format!("cannot connect to {}: {error}", socket.display());
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => Error::Client(ApiError::new(ErrorCode::PermissionDenied, message)),
        _ => Error::unavailable(message),
    }
}

/// The values of a streamed answer, one JSON document a line.
pub struct JsonLines<T> {
    body: Incoming,
    buffer: BytesMut,
    ready: VecDeque<Bytes>,
    /// Held so that the connection lives as long as its answer.
    _connection: Option<Connection>,
    kind: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> JsonLines<T> {
    fn new(response: Response<Incoming>, connection: Option<Connection>) -> Self {
        Self {
            body: response.into_body(),
            buffer: BytesMut::new(),
            ready: VecDeque::new(),
            _connection: connection,
            kind: PhantomData,
        }
    }

    /// The next value; `None` at the end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// `daemon_unavailable` if the connection is lost, `internal` for a line that is no such value.
    pub async fn next(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return parse(&line).map(Some);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    self.buffer.extend_from_slice(&data);
                    self.cut()?;
                }
                Some(Err(error)) => return Err(Error::unavailable(format!("the service's answer broke off: {error}"))),
                None if self.buffer.is_empty() => return Ok(None),
                None => self.ready.push_back(self.buffer.split().freeze()),
            }
        }
    }

    fn cut(&mut self) -> Result<(), Error> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            self.ready.push_back(self.buffer.split_to(end + 1).freeze());
        }
        if self.buffer.len() > LINE_LEN_MAX { Err(Error::protocol("a line without an end")) } else { Ok(()) }
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(Error::protocol)
}

fn request(method: Method, path: &str, body: RequestBody) -> Result<Request<RequestBody>, Error> {
    // The host is not looked at on a Unix socket, but HTTP/1.1 wants one (RFC 9112, section 3.2).
    Request::builder().method(method).uri(path).header(header::HOST, "msbd").body(body).map_err(Error::protocol)
}

fn json_request<B: Serialize>(path: &str, body: &B) -> Result<Request<RequestBody>, Error> {
    let body = serde_json::to_vec(body).map_err(Error::protocol)?;
    let mut request = request(Method::POST, path, connection::full(body))?;
    request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(request)
}

fn attach_message(options: AttachOptions) -> ClientMessage {
    ClientMessage::Attach { stdin: options.stdin, terminal: options.terminal, timeout_ms: options.timeout_ms }
}

pub(crate) fn sandbox(name: &SandboxName, rest: &str) -> String {
    // A name's characters are all unreserved in a path (RFC 3986, section 2.3).
    format!("/v1/sandboxes/{name}{rest}")
}

fn flag(name: &'static str, on: bool) -> Vec<(&'static str, String)> {
    if on { vec![(name, "true".to_owned())] } else { Vec::new() }
}

fn metrics_pairs(query: &MetricsQuery) -> Vec<(&'static str, String)> {
    let names = query.names.iter().map(|name| ("name", name.clone()));
    let labels = query.labels.iter().map(|label| ("label", label.clone()));
    let selectors = query.selectors.iter().map(|selector| ("selector", selector.clone()));
    names.chain(labels).chain(selectors).collect()
}

pub(crate) fn with_query(path: &str, pairs: &[(&str, String)]) -> String {
    let mut uri = path.to_owned();
    for (index, (key, value)) in pairs.iter().enumerate() {
        uri.push(if index == 0 { '?' } else { '&' });
        uri.push_str(key);
        uri.push('=');
        percent_encode(value, &mut uri);
    }
    uri
}

/// Percent-encodes everything but unreserved characters (RFC 3986, section 2.1).
fn percent_encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0').to_ascii_uppercase());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_encoded() {
        let pairs = [("label", "team=ml&x".to_owned()), ("label", "ä b+%".to_owned())];
        assert_eq!(with_query("/v1/sandboxes", &pairs), "/v1/sandboxes?label=team%3Dml%26x&label=%C3%A4%20b%2B%25");
        assert_eq!(with_query("/v1/x", &[]), "/v1/x");
    }

    proptest::proptest! {
        #[test]
        fn any_text_becomes_a_valid_uri(text in ".{0,200}") {
            let uri = with_query("/v1/image", &[("reference", text)]);
            proptest::prop_assert!(uri.parse::<hyper::Uri>().is_ok());
        }
    }
}
