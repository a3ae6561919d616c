//! The tools that `msb mcp` gives to agents: the Model Context Protocol over lines of JSON, each tool one or a few calls of the SDK.
//!
//! ```text
//!  MCP client ─ stdin ─► rmcp ─► a tool of `sandboxes`, `commands`, `files` or `host` ─► msb_sdk ─► the service
//!             ◄ stdout ─          (each call a task of its own; cancelling the call drops its work)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`sandboxes`] | create, list, inspect, stop, remove |
//! | [`commands`] | run, exec, shell |
//! | [`files`] | read, write, list, mkdir, remove, stat |
//! | [`host`] | volumes, metrics, what is installed |
//! | [`output`] | how much of a command's output an agent gets |
//!
//! Whoever writes the calls is a model that reads what sandboxes print, so it is trusted less than the user who started this: it can
//! mount no directory of the host, choose no wider network than the public one, and everything it sends and gets is bounded. A sandbox
//! made here belongs to this process unless it is detached: it is stopped and removed when the client goes away, however that happens.

pub mod commands;
pub mod files;
pub mod host;
pub mod output;
pub mod sandboxes;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_sdk::{Client, Locator, Sandbox};
use rmcp::handler::server::router::tool::ToolRouter;
use rmcp::model::{CallToolResult, Implementation, ServerCapabilities, ServerConfig};
use rmcp::service::RequestContext;
use rmcp::{RoleServer, ServerHandler, tool_handler};
use serde::Serialize;
use serde_json::json;
use tokio::sync::{OnceCell, Semaphore};

use crate::printer::{Printer, plain};

/// Longest line that a client may send, in bytes: the largest file that can be written, in base64, with room for the rest.
pub const LINE_LEN_MAX: usize = 8 << 20;
/// Calls that are carried out at once; more wait.
const CALLS_MAX: usize = 32;

/// What a client is told about this server.
const INSTRUCTIONS: &str = "Sandboxes are virtual machines made from OCI images; nothing that runs in one can reach this host. Use \
    sandbox_run for a single command in a fresh sandbox. For several steps, call sandbox_create once, then sandbox_exec, sandbox_shell \
    and the sandbox_fs_ tools with the name it answers with, and sandbox_remove at the end. Long output is cut in its middle. An error \
    carries a code, and a hint that says what to do next.";

/// The server of one client.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
    tool_router: ToolRouter<Self>,
}

struct Inner {
    locator: Locator,
    /// Made by the first call, so that the tools can be listed where nothing is installed.
    client: OnceCell<Client>,
    printer: Printer,
    calls: Semaphore,
}

impl Server {
    /// A server that finds its service with this locator and tells its log to this printer.
    #[must_use]
    pub fn new(locator: Locator, printer: Printer) -> Self {
        let inner = Inner { locator, client: OnceCell::new(), printer, calls: Semaphore::new(CALLS_MAX) };
        let mut tool_router = Self::sandbox_tools();
        tool_router.merge(Self::command_tools());
        tool_router.merge(Self::file_tools());
        tool_router.merge(Self::host_tools());
        Self { inner: Arc::new(inner), tool_router }
    }

    async fn client(&self) -> Result<&Client, ApiError> {
        let connect = async || self.inner.locator.connect().await.map_err(ApiError::from);
        self.inner.client.get_or_try_init(connect).await
    }

    async fn sandbox(&self, name: &str) -> Result<Sandbox, ApiError> {
        Ok(Sandbox::get_from(self.client().await?, SandboxName::parse(name)?).await?)
    }

    /// Carries a call out and gives its answer the one form that all have: a JSON object, an error included. A call that its client
    /// cancels is dropped, and with it the command it runs.
    async fn answer<T: Serialize>(
        &self,
        tool: &str,
        context: &RequestContext<RoleServer>,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> CallToolResult {
        let began = Instant::now();
        let work = async {
            let _turn = self.inner.calls.acquire().await.map_err(ApiError::internal)?;
            serde_json::to_value(work.await?).map_err(ApiError::internal)
        };
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = context.ct.cancelled() => Err(ApiError::new(ErrorCode::Cancelled, "the client cancelled the call")),
        };
        let took_ms = began.elapsed().as_millis();
        match outcome {
            Ok(value) => {
                self.inner.printer.note(&format!("{tool}: ok after {took_ms} ms"));
                CallToolResult::structured(value)
            }
            Err(error) => {
                self.inner.printer.note(&format!(
                    "{tool}: {} after {took_ms} ms: {}",
                    error.code,
                    plain(&error.message)
                ));
                CallToolResult::structured_error(json!({ "error": error }))
            }
        }
    }
}

#[tool_handler(router = self.tool_router)]
impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("msb", env!("CARGO_PKG_VERSION")))
            .with_instructions(INSTRUCTIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Format;

    fn tools() -> Vec<rmcp::model::Tool> {
        Server::new(Locator::from_environment(), Printer::new(Format::Text, true)).tool_router.list_all()
    }

    #[test]
    fn every_tool_that_agents_know_is_there() {
        let mut names: Vec<String> = tools().iter().map(|tool| tool.name.to_string()).collect();
        names.sort();
        insta::assert_snapshot!(names.join(" "), @"check_installed sandbox_create sandbox_exec sandbox_fs_list sandbox_fs_mkdir sandbox_fs_read sandbox_fs_remove sandbox_fs_stat sandbox_fs_write sandbox_inspect sandbox_list sandbox_metrics sandbox_remove sandbox_run sandbox_shell sandbox_stop volume_create volume_list volume_remove");
    }

    #[test]
    fn every_tool_and_every_argument_says_what_it_is() {
        for tool in tools() {
            assert!(tool.description.as_ref().is_some_and(|text| text.len() > 20), "{}", tool.name);
            assert!(tool.annotations.is_some(), "{} says nothing about its effects", tool.name);
            let schema = serde_json::to_value(&*tool.input_schema).unwrap();
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                assert!(property["description"].is_string(), "{}.{name}: {property}", tool.name);
            }
        }
    }
}
