//! A sandbox as a value: what [`crate::Client`] does by name, as methods.

use std::path::Path;
use std::time::Duration;

use msb_protocol::control::{
    CreateRequest, EventQuery, EventRecord, HistoryQuery, ListQuery, LogQuery, LogRecord, MetricsHistory, MetricsQuery,
    MetricsSnapshot, PingReport, SandboxDetail, SandboxList, SandboxMetrics, SandboxSummary, StartRequest, StopRequest,
};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::state::SandboxState;

use crate::builder::SandboxBuilder;
use crate::client::{AttachOptions, Client, JsonLines};
use crate::copy::{CopyOptions, CopyReport};
use crate::error::Error;
use crate::exec::{Exec, ExecOutput};
use crate::fs::Fs;
use crate::session::Session;
use crate::ssh::SshConfig;

/// A sandbox of a service. Cheap to clone; dropping it does nothing to the sandbox (an attached one ends with this process).
#[derive(Clone, Debug)]
pub struct Sandbox {
    client: Client,
    name: SandboxName,
    detail: SandboxDetail,
}

impl Sandbox {
    /// Describes a new sandbox of this name.
    #[must_use]
    pub fn builder(name: impl Into<String>) -> SandboxBuilder {
        SandboxBuilder::new(Some(name.into()))
    }

    /// Describes a new sandbox that the service names.
    #[must_use]
    pub fn builder_unnamed() -> SandboxBuilder {
        SandboxBuilder::new(None)
    }

    /// The sandbox of this name.
    ///
    /// # Errors
    /// `invalid_name`, `sandbox_not_found`, and those of [`Client::connect`].
    pub async fn get(name: &str) -> Result<Self, Error> {
        let name = parse(name)?;
        Self::get_from(&Client::connect().await?, name).await
    }

    /// The sandbox of this name on this service.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn get_from(client: &Client, name: SandboxName) -> Result<Self, Error> {
        let detail = client.inspect(&name).await?;
        Ok(Self::of(client.clone(), detail))
    }

    /// Every sandbox, newest first.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn list() -> Result<Vec<SandboxSummary>, Error> {
        Self::list_with::<&str>(&[]).await
    }

    /// The sandboxes whose labels fit every term: `KEY=VALUE` is exact, `KEY` asks whether it exists.
    ///
    /// # Errors
    /// `invalid_label`, and those of [`Client::connect`].
    pub async fn list_with<S: AsRef<str>>(labels: &[S]) -> Result<Vec<SandboxSummary>, Error> {
        let labels: Vec<String> = labels.iter().map(|label| label.as_ref().to_owned()).collect();
        Ok(Client::connect().await?.list(&labels).await?.sandboxes)
    }

    /// A page of the sandboxes that a query asks for; [`SandboxList::next`] is the next page's `after`.
    ///
    /// # Errors
    /// `invalid_label`, `invalid_selector`, and those of [`Client::connect`].
    pub async fn list_page(query: &ListQuery) -> Result<SandboxList, Error> {
        Client::connect().await?.list_page(query).await
    }

    /// Starts a resting sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `boot_failed`.
    pub async fn start(name: &str) -> Result<Self, Error> {
        let name = parse(name)?;
        let client = Client::connect().await?;
        let detail = client.start(&name, &StartRequest::default()).await?;
        Ok(Self::of(client, detail))
    }

    /// Removes a resting sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`.
    pub async fn remove(name: &str) -> Result<(), Error> {
        let name = parse(name)?;
        Client::connect().await?.remove(&name, false).await
    }

    pub(crate) async fn create_from(client: Client, request: &CreateRequest) -> Result<Self, Error> {
        let detail = client.create(request).await?;
        Ok(Self::of(client, detail))
    }

    fn of(client: Client, detail: SandboxDetail) -> Self {
        Self { client, name: detail.summary.name.clone(), detail }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &SandboxName {
        &self.name
    }

    /// What was known about it at the last call that answered with its state.
    #[must_use]
    pub fn detail(&self) -> &SandboxDetail {
        &self.detail
    }

    /// Its state at that call.
    #[must_use]
    pub fn state(&self) -> SandboxState {
        self.detail.summary.status
    }

    /// The service it lives on.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Asks anew.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn refresh(&mut self) -> Result<&SandboxDetail, Error> {
        self.detail = self.client.inspect(&self.name).await?;
        Ok(&self.detail)
    }

    /// Runs a command to its end and keeps its output.
    ///
    /// # Errors
    /// `exec_not_found`, `exec_not_executable`, `exec_failed`, `sandbox_not_running`, `exec_lost`, `limit_exceeded`. A command that
    /// fails is no error: see [`ExecOutput::end`].
    pub async fn exec(&self, exec: impl Into<Exec>) -> Result<ExecOutput, Error> {
        let mut exec = exec.into();
        let (input, output_len_max) = (exec.input.take(), exec.output_len_max);
        self.exec_stream(exec).await?.collect(input, output_len_max).await
    }

    /// Runs a line of the sandbox's own shell.
    ///
    /// # Errors
    /// As [`Sandbox::exec`].
    pub async fn shell(&self, script: &str) -> Result<ExecOutput, Error> {
        self.exec(["/bin/sh", "-c", script]).await
    }

    /// Runs a command as a stream of events.
    ///
    /// # Errors
    /// As [`Sandbox::exec`], some of them as the session's first answer.
    pub async fn exec_stream(&self, exec: impl Into<Exec>) -> Result<Session, Error> {
        let exec = exec.into();
        exec.check()?;
        self.client.exec(&self.name, exec.request).await
    }

    /// Starts the main workload of a sandbox made with `hold_main`, and watches it.
    ///
    /// # Errors
    /// `sandbox_not_running`.
    pub async fn start_main(&self, options: AttachOptions) -> Result<Session, Error> {
        self.client.start_main(&self.name, options).await
    }

    /// Watches the main workload.
    ///
    /// # Errors
    /// `sandbox_not_running`.
    pub async fn attach(&self, options: AttachOptions) -> Result<Session, Error> {
        self.client.attach(&self.name, options).await
    }

    /// Stops it: stop signal, its own grace time, flush.
    ///
    /// # Errors
    /// `sandbox_not_running`.
    pub async fn stop(&self) -> Result<SandboxDetail, Error> {
        self.stop_with(&StopRequest::default()).await
    }

    /// Stops it in a way of the caller's.
    ///
    /// # Errors
    /// `sandbox_not_running`.
    pub async fn stop_with(&self, request: &StopRequest) -> Result<SandboxDetail, Error> {
        self.client.stop(&self.name, request).await
    }

    /// Ends it at once, without a flush.
    ///
    /// # Errors
    /// `sandbox_not_running`.
    pub async fn kill(&self) -> Result<SandboxDetail, Error> {
        self.stop_with(&StopRequest { grace_ms: None, force: true }).await
    }

    /// Stops it if it runs, and starts it.
    ///
    /// # Errors
    /// `boot_failed`.
    pub async fn restart(&self) -> Result<SandboxDetail, Error> {
        self.client.restart(&self.name, &StopRequest::default()).await
    }

    /// Asks its agent for a sign of life. It is no activity, and wakes nothing.
    ///
    /// # Errors
    /// `sandbox_not_running`, `agent_timeout`.
    pub async fn ping(&self) -> Result<PingReport, Error> {
        self.client.ping(&self.name).await
    }

    /// What makes `ssh msb-NAME` work, or another alias.
    ///
    /// # Errors
    /// `invalid_config` for an alias that is no name of a host.
    pub async fn ssh_config(&self, alias: Option<&str>) -> Result<SshConfig, Error> {
        self.client.ssh_config(&self.name, alias).await
    }

    /// Waits until it rests.
    ///
    /// # Errors
    /// `sandbox_not_found` if it is removed, as ephemeral ones are.
    pub async fn wait_until_stopped(&self) -> Result<SandboxDetail, Error> {
        self.client.wait(&self.name).await
    }

    /// Lets it outlive this process.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn detach(&self) -> Result<SandboxDetail, Error> {
        self.client.detach(&self.name).await
    }

    /// Counts as activity.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn touch(&self) -> Result<SandboxDetail, Error> {
        self.client.touch(&self.name).await
    }

    /// Its files.
    #[must_use]
    pub fn fs(&self) -> Fs {
        Fs::new(self.client.clone(), self.name.clone())
    }

    /// Copies a file or directory of this machine into it; see [`Client::copy_into`].
    ///
    /// # Errors
    /// Those of [`Client::copy_into`].
    pub async fn copy_into(&self, from: &Path, to: &str, options: &CopyOptions) -> Result<CopyReport, Error> {
        self.client.copy_into(from, &self.name, to, options).await
    }

    /// Copies a file or directory of it to this machine; see [`Client::copy_out`].
    ///
    /// # Errors
    /// Those of [`Client::copy_out`].
    pub async fn copy_out(&self, from: &str, to: &Path, options: &CopyOptions) -> Result<CopyReport, Error> {
        self.client.copy_out(&self.name, from, to, options).await
    }

    /// Reads its log.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn logs(&self, query: &LogQuery) -> Result<JsonLines<LogRecord>, Error> {
        self.client.logs(&self.name, query).await
    }

    /// What happened to it, and with `follow` what happens.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn events(&self, query: &EventQuery) -> Result<SandboxEvents, Error> {
        Ok(SandboxEvents { events: self.client.events(query).await?, id: self.detail.summary.id })
    }

    /// Its newest sample; none before its first one.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn metrics(&self) -> Result<Option<SandboxMetrics>, Error> {
        Ok(self.client.metrics_of(&self.metrics_query()).await?.sandboxes.into_iter().next())
    }

    /// Its samples from now on, one at each interval (100 ms to an hour), the first at once.
    ///
    /// # Errors
    /// `invalid_request` for the interval.
    pub async fn metrics_stream(&self, interval: Duration) -> Result<MetricsStream, Error> {
        let snapshots = self.client.metrics_stream(&self.metrics_query(), interval).await?;
        Ok(MetricsStream { snapshots })
    }

    /// Its last hour, or a part of it.
    ///
    /// # Errors
    /// `invalid_request`.
    pub async fn metrics_history(&self, query: &HistoryQuery) -> Result<MetricsHistory, Error> {
        self.client.metrics_history(&self.name, query).await
    }

    fn metrics_query(&self) -> MetricsQuery {
        MetricsQuery { names: vec![self.name.to_string()], ..MetricsQuery::default() }
    }
}

/// The events of one sandbox; another one that had its name before is another one.
pub struct SandboxEvents {
    events: JsonLines<EventRecord>,
    id: SandboxId,
}

impl SandboxEvents {
    /// The next event. None at the end, or when the service ends.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<EventRecord>, Error> {
        while let Some(event) = self.events.next().await? {
            if event.sandbox_id == self.id {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}

/// The samples of one sandbox.
pub struct MetricsStream {
    snapshots: JsonLines<MetricsSnapshot>,
}

impl MetricsStream {
    /// The next sample. None when the service ends. A run that ended is seen by `last`.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<SandboxMetrics>, Error> {
        while let Some(snapshot) = self.snapshots.next().await? {
            // Before the first sample of a boot there is none.
            if let Some(sample) = snapshot.sandboxes.into_iter().next() {
                return Ok(Some(sample));
            }
        }
        Ok(None)
    }
}

fn parse(name: &str) -> Result<SandboxName, Error> {
    SandboxName::parse(name).map_err(Error::InvalidConfig)
}
