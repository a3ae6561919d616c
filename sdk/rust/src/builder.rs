//! Says what a sandbox is made of, step by step. [`SandboxBuilder::build`] checks everything that needs no service.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use msb_protocol::control::CreateRequest;
use msb_protocol::health::{HealthCheck, PreStop};
use msb_protocol::id::SandboxName;
use msb_protocol::images::PullPolicy;
use msb_protocol::mount::{Mount, Patch};
use msb_protocol::network::{NetworkProfile, NetworkSpec, PublishedPort, Rule};
use msb_protocol::security::SecurityProfile;
use msb_protocol::snapshot::SnapshotDetail;
use msb_protocol::spec::{EngineChoice, OnIdle, RestartPolicy, Rlimit, RootKind, SandboxSpec, Workload};

use crate::client::Client;
use crate::error::Error;
use crate::sandbox::Sandbox;

/// A sandbox that is being described.
#[derive(Clone, Debug)]
pub struct SandboxBuilder {
    name: Option<String>,
    spec: SandboxSpec,
    hold_main: bool,
    replace_grace_ms: Option<u64>,
    pull: PullPolicy,
}

impl SandboxBuilder {
    pub(crate) fn new(name: Option<String>) -> Self {
        Self { name, spec: SandboxSpec::new(""), hold_main: false, replace_grace_ms: None, pull: PullPolicy::default() }
    }

    pub(crate) fn of_snapshot(name: Option<String>, snapshot: &SnapshotDetail) -> Self {
        let spec = SandboxSpec { snapshot: Some(snapshot.summary.name.clone()), ..snapshot.spec.clone() };
        Self { spec, ..Self::new(name) }
    }

    /// The image. Required; a sandbox of a snapshot ([`crate::Snapshot::sandbox`]) has the snapshot's.
    #[must_use]
    pub fn image(mut self, reference: impl Into<String>) -> Self {
        self.spec.image = reference.into();
        self
    }

    /// A directory of this host as the root, in place of an image; the sandbox changes nothing of it. An absolute path without links.
    #[must_use]
    pub fn root_directory(self, path: impl Into<String>) -> Self {
        self.root(RootKind::Directory, path.into())
    }

    /// A raw disk of this host with an ext4 or EROFS file system as the root, in place of an image; the sandbox changes nothing of it.
    #[must_use]
    pub fn root_disk(self, path: impl Into<String>) -> Self {
        self.root(RootKind::Disk, path.into())
    }

    fn root(mut self, kind: RootKind, path: String) -> Self {
        (self.spec.root, self.spec.image) = (kind, path);
        self
    }

    /// Virtual CPUs; 1 if not said.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.spec.cpus = cpus;
        self
    }

    /// Memory of the guest in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.spec.memory_mib = memory_mib;
        self
    }

    /// Size of the writable root in MiB. It takes host space only as it fills.
    #[must_use]
    pub fn root_size_mib(mut self, root_size_mib: u32) -> Self {
        self.spec.root_size_mib = root_size_mib;
        self
    }

    /// Sets a variable over the image's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.spec.env.insert(name.into(), value.into());
        self
    }

    /// Sets several variables.
    #[must_use]
    pub fn envs<N: Into<String>, V: Into<String>>(mut self, variables: impl IntoIterator<Item = (N, V)>) -> Self {
        self.spec.env.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Sets a label over the image's.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.spec.labels.insert(key.into(), value.into());
        self
    }

    /// Sets several labels.
    #[must_use]
    pub fn labels(mut self, labels: BTreeMap<String, String>) -> Self {
        self.spec.labels.extend(labels);
        self
    }

    /// Working directory in place of the image's.
    #[must_use]
    pub fn workdir(mut self, path: impl Into<String>) -> Self {
        self.spec.workdir = Some(path.into());
        self
    }

    /// `USER|UID[:GROUP|GID]` in place of the image's.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.spec.user = Some(user.into());
        self
    }

    /// Hostname in place of the sandbox's name.
    #[must_use]
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.spec.hostname = Some(hostname.into());
        self
    }

    /// Entrypoint in place of the image's; nothing removes it.
    #[must_use]
    pub fn entrypoint<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.spec.entrypoint = Some(words.into_iter().map(Into::into).collect());
        self
    }

    /// Gives it a main workload: this command, after the entrypoint. Its end is the sandbox's end.
    #[must_use]
    pub fn command<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.spec.command = Some(words.into_iter().map(Into::into).collect());
        self.spec.workload = Workload::Main;
        self
    }

    /// Gives it the image's own command as main workload, or none (the default: it boots and waits for execs).
    #[must_use]
    pub fn workload(mut self, workload: Workload) -> Self {
        self.spec.workload = workload;
        self
    }

    /// Holds the main workload back until [`Sandbox::start_main`], so that none of its output is missed.
    #[must_use]
    pub fn hold_main(mut self, hold: bool) -> Self {
        self.hold_main = hold;
        self
    }

    /// Keeps the main workload's stdin open for whoever attaches.
    #[must_use]
    pub fn stdin_open(mut self, open: bool) -> Self {
        self.spec.stdin_open = open;
        self
    }

    /// Gives the main workload a terminal.
    #[must_use]
    pub fn tty(mut self, tty: bool) -> Self {
        self.spec.tty = tty;
        self
    }

    /// Sets a resource limit of every process msb starts in it.
    #[must_use]
    pub fn rlimit(mut self, resource: impl Into<String>, soft: u64, hard: u64) -> Self {
        self.spec.rlimits.push(Rlimit { resource: resource.into(), soft, hard });
        self
    }

    /// Signal that asks the main workload to stop, in place of the image's.
    #[must_use]
    pub fn stop_signal(mut self, signal: impl Into<String>) -> Self {
        self.spec.stop_signal = Some(signal.into());
        self
    }

    /// Time between that signal and the kill.
    #[must_use]
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.spec.stop_grace_ms = milliseconds(grace);
        self
    }

    /// Lets it outlive this process. Otherwise its stop begins when this process ends, however it ends.
    #[must_use]
    pub fn detached(mut self, detached: bool) -> Self {
        self.spec.detached = detached;
        self
    }

    /// Removes it when it ends.
    #[must_use]
    pub fn ephemeral(mut self, ephemeral: bool) -> Self {
        self.spec.ephemeral = ephemeral;
        self
    }

    /// The engine.
    #[must_use]
    pub fn engine(mut self, engine: EngineChoice) -> Self {
        self.spec.engine = engine;
        self
    }

    /// A kernel file in place of the installed one.
    #[must_use]
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.spec.kernel = Some(path.into().to_string_lossy().into_owned());
        self
    }

    /// What follows the main workload's end.
    #[must_use]
    pub fn restart_policy(mut self, policy: RestartPolicy) -> Self {
        self.spec.restart = policy;
        self
    }

    /// Stops it after this time without activity.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration, then: OnIdle) -> Self {
        self.spec.idle_timeout_ms = Some(milliseconds(timeout));
        self.spec.on_idle = then;
        self
    }

    /// Ends every run after this time.
    #[must_use]
    pub fn max_duration(mut self, duration: Duration) -> Self {
        self.spec.max_duration_ms = Some(milliseconds(duration));
        self
    }

    /// What its workloads may do.
    #[must_use]
    pub fn security(mut self, profile: SecurityProfile) -> Self {
        self.spec.security = profile;
        self
    }

    /// Its whole network, in place of what was said of it so far.
    #[must_use]
    pub fn network(mut self, network: NetworkSpec) -> Self {
        self.spec.network = network;
        self
    }

    /// Which addresses it reaches where no rule decides.
    #[must_use]
    pub fn network_profile(mut self, profile: NetworkProfile) -> Self {
        self.spec.network.profile = profile;
        self
    }

    /// Adds a rule to its network; the first that fits decides.
    #[must_use]
    pub fn network_rule(mut self, rule: Rule) -> Self {
        self.spec.network.rules.push(rule);
        self
    }

    /// Gives it no network but loopback.
    #[must_use]
    pub fn no_network(mut self) -> Self {
        self.spec.network.enabled = false;
        self
    }

    /// Publishes a port of it on this host: `"8080:80".parse()?`.
    #[must_use]
    pub fn port(mut self, port: PublishedPort) -> Self {
        self.spec.network.ports.push(port);
        self
    }

    /// Mounts something; [`Mount::parse_volume`] and its kin read the command line's forms.
    #[must_use]
    pub fn mount(mut self, mount: Mount) -> Self {
        self.spec.mounts.push(mount);
        self
    }

    /// Changes its root before the workload.
    #[must_use]
    pub fn patch(mut self, patch: Patch) -> Self {
        self.spec.patches.push(patch);
        self
    }

    /// Asks a command at intervals whether the workload is well.
    #[must_use]
    pub fn health(mut self, check: HealthCheck) -> Self {
        self.spec.health = Some(check);
        self
    }

    /// Runs a command in it before every stop; its workload is asked to end when that is over, or after this time.
    #[must_use]
    pub fn pre_stop<S: Into<String>>(mut self, command: impl IntoIterator<Item = S>, timeout: Duration) -> Self {
        let command = command.into_iter().map(Into::into).collect();
        self.spec.pre_stop = Some(PreStop { command, timeout_ms: milliseconds(timeout) });
        self
    }

    /// Removes an existing sandbox of this name first, giving it this time to stop.
    #[must_use]
    pub fn replace(mut self, grace: Duration) -> Self {
        self.replace_grace_ms = Some(milliseconds(grace));
        self
    }

    /// When to fetch the image from its registry; if the store does not have it, if not said.
    #[must_use]
    pub fn pull(mut self, policy: PullPolicy) -> Self {
        self.pull = policy;
        self
    }

    /// Checks the description and gives the request. Makes no connection.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the value.
    pub fn build(self) -> Result<CreateRequest, Error> {
        let mut spec = self.spec;
        if let Some(name) = self.name {
            spec.name = Some(SandboxName::parse(&name).map_err(Error::InvalidConfig)?);
        }
        spec.check().map_err(Error::InvalidConfig)?;
        Ok(CreateRequest { spec, hold_main: self.hold_main, replace_grace_ms: self.replace_grace_ms, pull: self.pull })
    }

    /// Creates and boots it on the service of this environment.
    ///
    /// # Errors
    /// Those of [`SandboxBuilder::build`], [`Client::connect`] and [`Client::create`].
    pub async fn create(self) -> Result<Sandbox, Error> {
        let request = self.build()?;
        let client = Client::connect().await?;
        Sandbox::create_from(client, &request).await
    }

    /// Creates and boots it on this service.
    ///
    /// # Errors
    /// Those of [`SandboxBuilder::build`] and [`Client::create`].
    pub async fn create_on(self, client: &Client) -> Result<Sandbox, Error> {
        let request = self.build()?;
        Sandbox::create_from(client.clone(), &request).await
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use msb_protocol::error::ErrorCode;

    use super::*;

    fn refused(edit: impl FnOnce(SandboxBuilder) -> SandboxBuilder) -> (ErrorCode, String) {
        let error = edit(Sandbox::builder("n").image("busybox")).build().unwrap_err();
        assert!(matches!(error, Error::InvalidConfig(_)), "{error:?}");
        (error.code(), error.to_string())
    }

    #[test]
    fn zero_cpus_and_zero_memory_are_refused_before_any_request() {
        assert_eq!(refused(|b| b.cpus(0)), (ErrorCode::InvalidConfig, "cpus must be greater than 0".into()));
        assert_eq!(refused(|b| b.memory_mib(0)), (ErrorCode::InvalidConfig, "memory must be greater than 0".into()));
    }

    #[test]
    fn names_labels_and_variables_are_checked_too() {
        let error = Sandbox::builder("../x").image("busybox").build().unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidName);
        assert_eq!(refused(|b| b.label("service.x", "1")).0, ErrorCode::InvalidLabel);
        assert_eq!(refused(|b| b.env("A=B", "1")).0, ErrorCode::InvalidConfig);
        assert_eq!(refused(|b| b.image("")).0, ErrorCode::InvalidConfig);
    }

    #[test]
    fn a_description_becomes_the_request() {
        let request = Sandbox::builder("n")
            .image("busybox")
            .cpus(2)
            .memory_mib(256)
            .env("A", "1")
            .label("team", "ml")
            .detached(true)
            .command(["sleep", "9"])
            .build()
            .unwrap();
        let spec = &request.spec;
        assert_eq!((spec.cpus, spec.memory_mib, spec.detached, spec.workload), (2, 256, true, Workload::Main));
        assert_eq!(spec.name.as_ref().unwrap().as_str(), "n");
        assert_eq!((spec.env["A"].as_str(), spec.labels["team"].as_str()), ("1", "ml"));
        assert!(Sandbox::builder("n").image("busybox").build().unwrap().spec.workload == Workload::None);
    }
}
