//! Tools about everything else: named volumes, metrics, and what is installed here.

use msb_protocol::control::MetricsQuery;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::mount::{VolumeKind, volume_name};
use msb_protocol::volume::CreateVolume;
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::schemars::JsonSchema;
use rmcp::service::RequestContext;
use rmcp::{RoleServer, tool, tool_router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Server;

/// Arguments of tools that have none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct NoArguments {}

/// Arguments of `volume_create`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct VolumeArguments {
    /// Its name
    name: String,
    /// Size in MiB. With a size it is a disk that one sandbox at a time can mount, without one a directory that several share
    #[serde(default)]
    size_mib: Option<u32>,
}

/// Arguments of `volume_remove`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct VolumeName {
    /// The volume's name
    name: String,
}

/// Arguments of `sandbox_metrics`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct MetricsArguments {
    /// Only this sandbox; every one that runs if not given
    #[serde(default)]
    name: Option<String>,
}

#[tool_router(router = host_tools, vis = "pub(super)")]
impl Server {
    /// Makes a named volume, whose files outlive the sandboxes that mount it.
    #[tool(annotations(read_only_hint = false, destructive_hint = false))]
    async fn volume_create(
        &self,
        Parameters(arguments): Parameters<VolumeArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("volume_create", &context, async {
            let kind = if arguments.size_mib.is_some() { VolumeKind::Disk } else { VolumeKind::Dir };
            let request = CreateVolume { name: volume_name(&arguments.name)?, kind, size_mib: arguments.size_mib };
            Ok(self.client().await?.create_volume(&request).await?)
        })
        .await
    }

    /// Lists named volumes with their sizes and the sandboxes that mount them.
    #[tool(annotations(read_only_hint = true))]
    async fn volume_list(
        &self,
        Parameters(NoArguments {}): Parameters<NoArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("volume_list", &context, async { Ok(self.client().await?.volumes().await?) }).await
    }

    /// Removes a named volume with everything in it. One that a sandbox mounts is not removed.
    #[tool(annotations(read_only_hint = false, destructive_hint = true))]
    async fn volume_remove(
        &self,
        Parameters(arguments): Parameters<VolumeName>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("volume_remove", &context, async {
            let name = volume_name(&arguments.name)?;
            self.client().await?.remove_volume(&name).await?;
            Ok(json!({ "removed": name }))
        })
        .await
    }

    /// Tells what sandboxes use now: processor, memory, disk, network, processes.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_metrics(
        &self,
        Parameters(arguments): Parameters<MetricsArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_metrics", &context, async {
            let query = MetricsQuery { names: arguments.name.into_iter().collect(), ..MetricsQuery::default() };
            let snapshot = self.client().await?.metrics_of(&query).await?;
            let shown = |sandbox: &msb_protocol::control::SandboxMetrics| -> Value {
                json!({
                    "name": sandbox.name, "status": sandbox.status, "cpu_utilization": sandbox.cpu_utilization,
                    "guest": sandbox.guest, "sample": sandbox.sample, "started_at": sandbox.started_at,
                })
            };
            Ok(json!({ "taken_at": snapshot.taken_at, "sandboxes": snapshot.sandboxes.iter().map(shown).collect::<Vec<_>>() }))
        })
        .await
    }

    /// Tells whether msb is installed and works on this host, in which version and with which engine; and if not, what to do.
    #[tool(annotations(read_only_hint = true))]
    async fn check_installed(
        &self,
        Parameters(NoArguments {}): Parameters<NoArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("check_installed", &context, async {
            let client = match self.client().await {
                Ok(client) => client,
                Err(error) if error.code == ErrorCode::RuntimeNotFound => {
                    return Ok::<_, ApiError>(json!({ "installed": false, "error": error }));
                }
                Err(error) => return Err(error),
            };
            let host = client.host().await?;
            Ok(json!({
                "installed": true, "version": host.service.version, "api_version": host.service.api_version,
                "engines": host.probe, "sandboxes": host.sandboxes, "free_bytes": host.home_free_bytes,
            }))
        })
        .await
    }
}
