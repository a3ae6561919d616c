//! Tools that run commands: in a sandbox of their own, in one that exists, as words or as a line of its shell.

use std::collections::BTreeMap;
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_sdk::{Exec, Sandbox};
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::schemars::JsonSchema;
use rmcp::service::RequestContext;
use rmcp::{RoleServer, tool, tool_router};
use serde::Deserialize;

use super::Server;
use super::output::{self, CommandOutput};
use super::sandboxes::Machine;

/// Time for a command when the caller does not say, in seconds.
const TIMEOUT_SECONDS_DEFAULT: u64 = 120;
/// Most time that a caller may ask for, in seconds.
const TIMEOUT_SECONDS_MAX: u64 = 3600;
/// Most stdin of a command, in bytes.
const STDIN_LEN_MAX: usize = 1 << 20;

/// Arguments of `sandbox_run`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct RunArguments {
    /// OCI image, for example python:3.13 or docker.io/library/debian:stable; fetched if it is not in the store
    image: String,
    /// The program and its arguments; no shell reads them. For a shell line: ["/bin/sh", "-c", "LINE"]
    command: Vec<String>,
    /// Virtual CPUs, 1 if not given
    #[serde(default)]
    cpus: Option<u32>,
    /// Memory in MiB, 512 if not given
    #[serde(default)]
    memory_mib: Option<u32>,
    /// Environment over the image's own
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Working directory in place of the image's
    #[serde(default)]
    workdir: Option<String>,
    /// User in place of the image's: name or uid, with :GROUP if wanted
    #[serde(default)]
    user: Option<String>,
    /// Whether it reaches public addresses of the Internet; true if not given. It never reaches this host or private networks
    #[serde(default)]
    internet: Option<bool>,
    /// Named volumes to mount, each as NAME:/PATH or NAME:/PATH:ro; a volume that does not exist is made
    #[serde(default)]
    volumes: Vec<String>,
    /// What the command reads from its standard input; nothing if not given
    #[serde(default)]
    stdin: Option<String>,
    /// Seconds after which the command is killed, 120 if not given, 3600 at most
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

/// Arguments of `sandbox_exec`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct ExecArguments {
    /// The sandbox's name
    name: String,
    /// The program and its arguments; no shell reads them, use sandbox_shell for a shell line
    command: Vec<String>,
    /// Environment over the sandbox's
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Working directory
    #[serde(default)]
    workdir: Option<String>,
    /// User: name or uid, with :GROUP if wanted
    #[serde(default)]
    user: Option<String>,
    /// What the command reads from its standard input; nothing if not given
    #[serde(default)]
    stdin: Option<String>,
    /// Seconds after which the command is killed, 120 if not given, 3600 at most
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

/// Arguments of `sandbox_shell`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct ShellArguments {
    /// The sandbox's name
    name: String,
    /// What /bin/sh of the sandbox reads: one line or a whole script
    script: String,
    /// Environment over the sandbox's
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Working directory
    #[serde(default)]
    workdir: Option<String>,
    /// User: name or uid, with :GROUP if wanted
    #[serde(default)]
    user: Option<String>,
    /// Seconds after which it is killed, 120 if not given, 3600 at most
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

/// The time a command gets.
fn timeout(seconds: Option<u64>) -> Result<Duration, ApiError> {
    let seconds = seconds.unwrap_or(TIMEOUT_SECONDS_DEFAULT);
    if (1..=TIMEOUT_SECONDS_MAX).contains(&seconds) {
        return Ok(Duration::from_secs(seconds));
    }
    let message = format!("timeout_seconds must be 1 to {TIMEOUT_SECONDS_MAX}, not {seconds}");
    Err(ApiError::new(ErrorCode::InvalidConfig, message))
}

async fn run_in(sandbox: &Sandbox, arguments: ExecArguments) -> Result<CommandOutput, ApiError> {
    let mut exec = Exec::new(arguments.command).timeout(timeout(arguments.timeout_seconds)?);
    for (name, value) in arguments.env {
        exec = exec.env(name, value);
    }
    if let Some(path) = arguments.workdir {
        exec = exec.workdir(path);
    }
    if let Some(user) = arguments.user {
        exec = exec.user(user);
    }
    if let Some(input) = &arguments.stdin {
        if input.len() > STDIN_LEN_MAX {
            let error = ApiError::new(ErrorCode::LimitExceeded, format!("stdin has more than {STDIN_LEN_MAX} bytes"));
            return Err(error.with_hint("write it to a file with sandbox_fs_write"));
        }
        exec = exec.stdin_open();
    }
    output::collect(sandbox.exec_stream(exec).await?, arguments.stdin).await
}

/// A sandbox that is removed when this is dropped, as by a cancelled call; should this process die first, the service does it.
struct Passing(Option<Sandbox>);

impl Passing {
    async fn remove(mut self) -> Result<(), ApiError> {
        match self.0.take() {
            Some(sandbox) => sandbox.client().remove(sandbox.name(), true).await.map_err(ApiError::from),
            None => Ok(()),
        }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        if let Some(sandbox) = self.0.take() {
            tokio::spawn(async move { sandbox.client().remove(sandbox.name(), true).await });
        }
    }
}

#[tool_router(router = command_tools, vis = "pub(super)")]
impl Server {
    /// Runs one command in a fresh sandbox, and removes the sandbox. Answers with exit code, signal, stdout and stderr; a command
    /// that fails is no error of the tool.
    #[tool(annotations(read_only_hint = false, destructive_hint = false, open_world_hint = true))]
    async fn sandbox_run(
        &self,
        Parameters(arguments): Parameters<RunArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_run", &context, async {
            let RunArguments {
                image,
                command,
                cpus,
                memory_mib,
                env,
                workdir,
                user,
                internet,
                volumes,
                stdin,
                timeout_seconds,
            } = arguments;
            // What can be refused is refused before anything is booted.
            timeout(timeout_seconds)?;
            if command.is_empty() {
                return Err(ApiError::new(ErrorCode::InvalidConfig, "a command is required"));
            }
            let ports = Vec::new();
            let machine = Machine { image, cpus, memory_mib, env, workdir, user, internet, ports, volumes };
            let builder = machine.builder(None)?.ephemeral(true);
            let sandbox = builder.create_on(self.client().await?).await?;
            let passing = Passing(Some(sandbox.clone()));
            let exec = ExecArguments {
                name: String::new(),
                command,
                env: BTreeMap::new(),
                workdir: None,
                user: None,
                stdin,
                timeout_seconds,
            };
            let output = run_in(&sandbox, exec).await;
            passing.remove().await?;
            output
        })
        .await
    }

    /// Runs a command in a sandbox. Answers with exit code, signal, stdout and stderr; a command that fails is no error of the tool.
    #[tool(annotations(read_only_hint = false, destructive_hint = true, open_world_hint = true))]
    async fn sandbox_exec(
        &self,
        Parameters(arguments): Parameters<ExecArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_exec", &context, async { run_in(&self.sandbox(&arguments.name).await?, arguments).await })
            .await
    }

    /// Runs a line or a script of the sandbox's own /bin/sh. Answers as sandbox_exec does.
    #[tool(annotations(read_only_hint = false, destructive_hint = true, open_world_hint = true))]
    async fn sandbox_shell(
        &self,
        Parameters(arguments): Parameters<ShellArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_shell", &context, async {
            let ShellArguments { name, script, env, workdir, user, timeout_seconds } = arguments;
            let sandbox = self.sandbox(&name).await?;
            let command = ["/bin/sh", "-c", &script].map(str::to_owned).to_vec();
            run_in(&sandbox, ExecArguments { name, command, env, workdir, user, stdin: None, timeout_seconds }).await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_an_end() {
        assert_eq!(timeout(None).unwrap(), Duration::from_secs(TIMEOUT_SECONDS_DEFAULT));
        assert_eq!(timeout(Some(3600)).unwrap(), Duration::from_secs(3600));
        for seconds in [0, 3601, u64::MAX] {
            assert_eq!(timeout(Some(seconds)).unwrap_err().code, ErrorCode::InvalidConfig);
        }
    }
}
