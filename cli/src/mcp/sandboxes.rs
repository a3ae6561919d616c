//! Tools about whole sandboxes: create, list, inspect, stop, remove.

use std::collections::BTreeMap;
use std::time::Duration;

use msb_protocol::control::{SandboxSummary, StopRequest};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::mount::{Mount, MountSource};
use msb_protocol::network::{NetworkProfile, PortError, PublishedPort};
use msb_protocol::spec::OnIdle;
use msb_sdk::{Sandbox, SandboxBuilder};
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::schemars::JsonSchema;
use rmcp::service::RequestContext;
use rmcp::{RoleServer, tool, tool_router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Server;

/// Most sandboxes that one list gives.
const LIST_LEN_MAX: usize = 200;

/// What a sandbox is made of, as the tools that make one ask for it.
#[derive(Debug, Default)]
pub(super) struct Machine {
    pub(super) image: String,
    pub(super) cpus: Option<u32>,
    pub(super) memory_mib: Option<u32>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) workdir: Option<String>,
    pub(super) user: Option<String>,
    pub(super) internet: Option<bool>,
    pub(super) ports: Vec<String>,
    pub(super) volumes: Vec<String>,
}

impl Machine {
    pub(super) fn builder(self, name: Option<String>) -> Result<SandboxBuilder, ApiError> {
        let mut builder = name.map_or_else(Sandbox::builder_unnamed, Sandbox::builder).image(self.image).envs(self.env);
        if let Some(cpus) = self.cpus {
            builder = builder.cpus(cpus);
        }
        if let Some(memory_mib) = self.memory_mib {
            builder = builder.memory_mib(memory_mib);
        }
        if let Some(path) = self.workdir {
            builder = builder.workdir(path);
        }
        if let Some(user) = self.user {
            builder = builder.user(user);
        }
        for volume in &self.volumes {
            builder = builder.mount(named(volume)?);
        }
        for text in &self.ports {
            builder = builder.port(port(text)?);
        }
        let profile = if self.internet == Some(false) { NetworkProfile::None } else { NetworkProfile::Public };
        Ok(builder.network_profile(profile))
    }
}

/// A mount of a named volume. Directories of the host are the user's to give, not a model's.
fn named(text: &str) -> Result<Mount, ApiError> {
    let mount = Mount::parse_volume(text)?;
    if matches!(mount.source, MountSource::Named { .. }) {
        return Ok(mount);
    }
    let error = ApiError::new(ErrorCode::PermissionDenied, format!("{text:?} is a path of the host"));
    Err(error.with_hint(
        "name a volume, and copy files with sandbox_fs_write; host paths are mounted with `msb create -v` only",
    ))
}

/// A published port, on the loopback address only.
fn port(text: &str) -> Result<PublishedPort, ApiError> {
    let port: PublishedPort =
        text.parse().map_err(|error: PortError| ApiError::new(ErrorCode::InvalidConfig, error.to_string()))?;
    if port.bind.is_loopback() {
        return Ok(port);
    }
    let error = ApiError::new(ErrorCode::PermissionDenied, format!("{text:?} would be reached from other hosts"));
    Err(error.with_hint("write it as HOST:GUEST; other addresses are published with `msb create -p` only"))
}

/// Arguments of `sandbox_create`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct CreateArguments {
    /// Its name; one is made up if not given
    #[serde(default)]
    name: Option<String>,
    /// OCI image, for example python:3.13 or docker.io/library/debian:stable; fetched if it is not in the store
    image: String,
    /// Virtual CPUs, 1 if not given
    #[serde(default)]
    cpus: Option<u32>,
    /// Memory in MiB, 512 if not given
    #[serde(default)]
    memory_mib: Option<u32>,
    /// Environment of everything that runs in it
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Labels to find it by
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Working directory in place of the image's
    #[serde(default)]
    workdir: Option<String>,
    /// User in place of the image's: name or uid, with :GROUP if wanted
    #[serde(default)]
    user: Option<String>,
    /// Whether it reaches public addresses of the Internet; true if not given. It never reaches this host or private networks
    #[serde(default)]
    internet: Option<bool>,
    /// Ports to publish on this host's loopback address, each as HOST:GUEST with 0 for any free host port
    #[serde(default)]
    ports: Vec<String>,
    /// Named volumes to mount, each as NAME:/PATH or NAME:/PATH:ro; a volume that does not exist is made
    #[serde(default)]
    volumes: Vec<String>,
    /// Seconds without any activity after which it is stopped
    #[serde(default)]
    idle_timeout_seconds: Option<u64>,
    /// true: it outlives this session, and its files outlive a stop, until somebody removes it. false or not given: it is removed with
    /// everything in it when it stops or when this session ends
    #[serde(default)]
    detached: bool,
}

/// Arguments of the tools that only need a sandbox.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct NameArguments {
    /// The sandbox's name
    pub(super) name: String,
}

/// Arguments of `sandbox_list`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct ListArguments {
    /// Only those whose labels fit all of these, each KEY=VALUE or KEY
    #[serde(default)]
    labels: Vec<String>,
}

/// Arguments of `sandbox_stop`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct StopArguments {
    /// The sandbox's name
    name: String,
    /// Kill it at once, without a flush of its disks
    #[serde(default)]
    force: bool,
}

/// Arguments of `sandbox_remove`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct RemoveArguments {
    /// The sandbox's name
    name: String,
    /// Stop it first if it runs; true if not given
    #[serde(default)]
    force: Option<bool>,
}

/// One sandbox in few words.
pub(super) fn shown(sandbox: &SandboxSummary) -> Value {
    json!({
        "name": sandbox.name, "status": sandbox.status, "image": sandbox.image, "created_at": sandbox.created_at,
        "labels": sandbox.labels, "ports": sandbox.ports, "health": sandbox.health,
    })
}

/// What a sandbox is made of, without what its maker put into it: an environment often holds secrets, and its names say enough.
fn without_values(mut detail: Value) -> Result<Value, ApiError> {
    let spec = detail.get_mut("spec").and_then(Value::as_object_mut).ok_or_else(|| ApiError::internal("no spec"))?;
    let env = spec.remove("env").and_then(|env| env.as_object().cloned()).unwrap_or_default();
    spec.insert("env_names".into(), env.keys().cloned().collect());
    spec.remove("patches");
    Ok(detail)
}

#[tool_router(router = sandbox_tools, vis = "pub(super)")]
impl Server {
    /// Creates and boots a sandbox, and answers with its name once commands can run in it.
    #[tool(annotations(read_only_hint = false, destructive_hint = false, open_world_hint = true))]
    async fn sandbox_create(
        &self,
        Parameters(arguments): Parameters<CreateArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_create", &context, async {
            let CreateArguments {
                name,
                image,
                cpus,
                memory_mib,
                env,
                labels,
                workdir,
                user,
                internet,
                ports,
                volumes,
                ..
            } = arguments;
            let machine = Machine { image, cpus, memory_mib, env, workdir, user, internet, ports, volumes };
            let mut builder = machine.builder(name)?.labels(labels);
            if let Some(seconds) = arguments.idle_timeout_seconds {
                builder = builder.idle_timeout(Duration::from_secs(seconds), OnIdle::Stop);
            }
            builder = builder.detached(arguments.detached).ephemeral(!arguments.detached);
            let sandbox = builder.create_on(self.client().await?).await?;
            Ok(shown(&sandbox.detail().summary))
        })
        .await
    }

    /// Lists sandboxes, newest first, with their states.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_list(
        &self,
        Parameters(arguments): Parameters<ListArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_list", &context, async {
            let found = self.client().await?.list(&arguments.labels).await?.sandboxes;
            let rows: Vec<Value> = found.iter().take(LIST_LEN_MAX).map(shown).collect();
            Ok(json!({ "sandboxes": rows, "left_out": found.len().saturating_sub(LIST_LEN_MAX) }))
        })
        .await
    }

    /// Tells about one sandbox: its state, what it is made of (of its environment the names), its network, how its last run ended.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_inspect(
        &self,
        Parameters(arguments): Parameters<NameArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_inspect", &context, async {
            let detail = self.client().await?.inspect(&SandboxName::parse(&arguments.name)?).await?;
            without_values(serde_json::to_value(detail).map_err(ApiError::internal)?)
        })
        .await
    }

    /// Stops a sandbox. A detached one keeps its files; one that is not detached is removed with them.
    #[tool(annotations(read_only_hint = false, destructive_hint = true, idempotent_hint = true))]
    async fn sandbox_stop(
        &self,
        Parameters(arguments): Parameters<StopArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_stop", &context, async {
            let name = SandboxName::parse(&arguments.name)?;
            let request = StopRequest { grace_ms: None, force: arguments.force };
            let detail = self.client().await?.stop(&name, &request).await?;
            let cause = detail.summary.last_end.as_ref().map(|end| end.cause);
            Ok(json!({ "name": name, "status": detail.summary.status, "cause": cause, "removed": detail.spec.ephemeral }))
        })
        .await
    }

    /// Removes a sandbox with all its files; one that runs is stopped first.
    #[tool(annotations(read_only_hint = false, destructive_hint = true))]
    async fn sandbox_remove(
        &self,
        Parameters(arguments): Parameters<RemoveArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_remove", &context, async {
            let name = SandboxName::parse(&arguments.name)?;
            self.client().await?.remove(&name, arguments.force.unwrap_or(true)).await?;
            Ok(json!({ "removed": name }))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_can_mount_volumes_and_no_path_of_the_host() {
        assert!(named("data:/data").is_ok() && named("data:/data:ro").is_ok());
        for path in ["/etc:/host", "./x:/x", "../x:/x:ro", "/:/host"] {
            assert_eq!(named(path).unwrap_err().code, ErrorCode::PermissionDenied, "{path}");
        }
    }

    #[test]
    fn a_model_sees_the_names_of_variables_and_no_value() {
        let detail =
            json!({ "spec": { "env": { "TOKEN": "hunter2" }, "patches": [{ "content": "hunter2" }], "cpus": 1 } });
        let shown = without_values(detail).unwrap();
        assert_eq!(shown, json!({ "spec": { "env_names": ["TOKEN"], "cpus": 1 } }));
    }

    #[test]
    fn ports_are_published_on_loopback_only() {
        assert!(port("8080:80").is_ok() && port("[::1]:0:80").is_ok());
        assert_eq!(port("0.0.0.0:8080:80").unwrap_err().code, ErrorCode::PermissionDenied);
        assert_eq!(port("80").unwrap_err().code, ErrorCode::InvalidConfig);
    }

    #[test]
    fn the_widest_network_is_the_public_one() {
        for (internet, profile) in
            [(None, NetworkProfile::Public), (Some(true), NetworkProfile::Public), (Some(false), NetworkProfile::None)]
        {
            let machine = Machine { image: "busybox".into(), internet, ..Machine::default() };
            let request = machine.builder(None).unwrap().build().unwrap();
            assert_eq!(request.spec.network.profile, profile);
        }
    }
}
