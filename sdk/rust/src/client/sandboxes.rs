//! The calls about sandboxes: their life, their sessions, logs, files, network and metrics. Part of [`Client`].

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::Method;
use hyper::body::{Frame, Incoming};
use msb_protocol::control::{
    ClientMessage, CreateRequest, ExecRequest, HistoryQuery, LabelRequest, ListQuery, LogQuery, LogRecord,
    MetricsHistory, NetworkDecision, NetworkLogQuery, PingReport, SandboxDetail, SandboxList, StartRequest,
    StopRequest, TerminalSize,
};
use msb_protocol::file_api::{ArchiveRequest, FileAnswer, FileCallRequest, WatchRecord};
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::ForkRequest;
use msb_protocol::vmm::NetworkExplanation;

use super::answer::{JsonLines, parse};
use super::query::{flag, sandbox, with_query};
use super::{Client, request};
use crate::connection::{self, Connection};
use crate::error::Error;
use crate::session::Session;

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

    pub(crate) async fn archive_session(
        &self,
        name: &SandboxName,
        archive: ArchiveRequest,
        stdin: bool,
    ) -> Result<Session, Error> {
        self.session(&sandbox(name, "/archive"), &ClientMessage::Archive { archive }, stdin).await
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

    /// Makes copies of a running sandbox, its memory included; answers once all of them are up.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `unsupported_operation`, and those of [`Client::create`].
    pub async fn fork(&self, name: &SandboxName, request: &ForkRequest) -> Result<Vec<SandboxDetail>, Error> {
        self.post(&sandbox(name, "/fork"), request).await
    }
}

fn attach_message(options: AttachOptions) -> ClientMessage {
    ClientMessage::Attach { stdin: options.stdin, terminal: options.terminal, timeout_ms: options.timeout_ms }
}
