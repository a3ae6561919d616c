//! One typed call for each route of the control API. [`crate::Sandbox`] and [`crate::Image`] are built on it; `msb` uses it directly.
//!
//! A client keeps one idle connection for the next call and opens more when calls overlap. When its service has gone it looks for the
//! next one, or starts it, as it did at first. It never repeats a request that may have been carried out, except one that only reads.

mod answer;
mod images;
mod query;
mod sandboxes;
mod snapshots;
mod volumes;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, Request, header};
use msb_protocol::control::{
    ActorTree, ClientMessage, EventQuery, EventRecord, HostInfo, MetricsQuery, MetricsSnapshot, ShutdownRequest,
    VersionInfo,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::fleet::{self, FLEET_MEDIA_TYPE};
use msb_protocol::version::CONTROL_API_VERSION;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::answer::parse;
use self::query::flag;
use crate::connection::{self, Connection, RequestBody};
use crate::direct;
use crate::error::Error;
use crate::locate::Locator;
use crate::session::Session;

pub use self::answer::{Archive, JsonLines};
pub use self::images::LoadOptions;
pub(crate) use self::query::{sandbox, with_query};
pub use self::sandboxes::AttachOptions;

/// Time for a service that accepts a connection to say its version: systemd may hold its socket and just be starting it.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);

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
        // A service that is older than this form answers in JSON.
        let (kind, body) = self.read(&path, Some(FLEET_MEDIA_TYPE)).await?;
        if kind.is_some_and(|kind| kind == FLEET_MEDIA_TYPE) {
            fleet::decode(body).map_err(Error::protocol)
        } else {
            parse(&body)
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

    /// Reads what happened.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn events(&self, query: &EventQuery) -> Result<JsonLines<EventRecord>, Error> {
        let mut pairs = flag("follow", query.follow);
        pairs.extend(query.since.map(|since| ("since", since.to_string())));
        self.lines(&with_query("/v1/events", &pairs)).await
    }

    /// The daemon's actors.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn actors(&self) -> Result<ActorTree, Error> {
        self.get("/v1/debug/actors").await
    }

    async fn session(&self, path: &str, first: &ClientMessage, stdin: bool) -> Result<Session, Error> {
        if let Some((reader, writer)) = direct::open(self.fresh().await?, path, first).await? {
            return Ok(Session::direct(reader, writer, stdin));
        }
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

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        parse(&self.read(path, None).await?.1)
    }

    /// Reads, in the form that is accepted. A service that went away before it answered is no answer: the next one is asked, once.
    async fn read(
        &self,
        path: &str,
        accept: Option<&'static str>,
    ) -> Result<(Option<header::HeaderValue>, Bytes), Error> {
        let ask = async |client: &Self| {
            let mut request = request(Method::GET, path, connection::empty())?;
            if let Some(accept) = accept {
                request.headers_mut().insert(header::ACCEPT, header::HeaderValue::from_static(accept));
            }
            client.call_typed(request).await
        };
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

fn metrics_pairs(query: &MetricsQuery) -> Vec<(&'static str, String)> {
    let names = query.names.iter().map(|name| ("name", name.clone()));
    let labels = query.labels.iter().map(|label| ("label", label.clone()));
    let selectors = query.selectors.iter().map(|selector| ("selector", selector.clone()));
    names.chain(labels).chain(selectors).collect()
}
