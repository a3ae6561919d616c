//! `msb exec`: a command in a running sandbox. Its entrypoint plays no part.

use std::path::PathBuf;

use clap::Args;
use msb_protocol::control::ExecRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::spec::{self, Rlimit};
use msb_protocol::state::SandboxState;

use super::bulk::FilterArgs;
use crate::attached::{self, Joining, Parting};
use crate::context::{Context, host_variable};
use crate::detach_keys::{self, DetachKeys};
use crate::failure::{ExitStatus, Failure, invalid};
use crate::signals::Signals;
use crate::{env_file, parse, terminal};

/// Options of `exec`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb exec [OPTIONS] NAME COMMAND...\n       msb exec [OPTIONS] --label KEY[=VALUE] COMMAND...",
    after_help = "The exit code is the command's own; 128+N if signal N killed it, 124 at --timeout, 125 if msb failed, 126 not executable, 127 \
                  not found."
)]
pub struct ExecArgs {
    /// How it runs.
    #[command(flatten)]
    pub options: ExecOptions,
    /// In place of a name: run it in each of these that runs or sleeps, one after another.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// The sandbox, and what to run in it
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_names = ["NAME", "COMMAND"])]
    pub name_and_command: Vec<String>,
}

/// How a command runs; `shell` has them too.
#[derive(Debug, Args)]
pub struct ExecOptions {
    /// Forward stdin to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable; a bare KEY takes the host's value
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Set the variables of a file in docker's form
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User
    #[arg(short, long, value_name = "USER|UID[:GROUP|GID]")]
    pub user: Option<String>,
    /// Set a limit, as in nofile=1024:4096
    #[arg(long = "rlimit", visible_alias = "ulimit", value_name = "RES=SOFT[:HARD]", value_parser = parse::rlimit)]
    pub rlimits: Vec<Rlimit>,
    /// Kill the command and all it started after this time (exit code 124)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    pub timeout: Option<u64>,
    /// Keys that leave the terminal and end the command
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT, value_parser = DetachKeys::parse, requires = "tty")]
    pub detach_keys: DetachKeys,
}

impl ExecOptions {
    /// The request for a command.
    ///
    /// # Errors
    /// `invalid_config`, `path_not_found`, naming the value.
    pub fn request(&self, command: Vec<String>, host: &dyn Fn(&str) -> Option<String>) -> Result<ExecRequest, Failure> {
        let mut request = ExecRequest { command, ..ExecRequest::default() };
        for path in &self.env_file {
            request.env.extend(env_file::read(path, host)?);
        }
        for text in &self.env {
            let (name, value) = parse::env(text, host)?;
            request.env.insert(name, value);
        }
        if self.tty
            && let Some(kind) = host("TERM")
        {
            request.env.entry("TERM".into()).or_insert(kind);
        }
        spec::check_env(&request.env)?;
        spec::check_argv(&request.command)?;
        request.workdir.clone_from(&self.workdir);
        request.user.clone_from(&self.user);
        request.rlimits.clone_from(&self.rlimits);
        request.stdin = self.interactive;
        request.terminal = if self.tty {
            Some(terminal::size().unwrap_or(msb_protocol::control::TerminalSize { rows: 24, columns: 80 }))
        } else {
            None
        };
        request.timeout_ms = self.timeout;
        Ok(request)
    }
}

/// Carries it out.
///
/// # Errors
/// Those of the options, the service and the command's start.
pub async fn run(args: ExecArgs, context: &Context) -> Result<ExitStatus, Failure> {
    args.filter.check_narrow()?;
    if !args.filter.is_empty() {
        return everywhere(args, context).await;
    }
    let (name, command) = super::create::split(args.name_and_command);
    let name = parse::name(&name)?;
    if command.is_empty() {
        return Err(invalid("a command is required: msb exec NAME COMMAND..."));
    }
    execute(&name, command, &args.options, context).await
}

/// Runs a command in each sandbox that fits. The exit code is the first one that is not 0; the others still have their turn.
async fn everywhere(args: ExecArgs, context: &Context) -> Result<ExitStatus, Failure> {
    if args.options.interactive || args.options.tty {
        return Err(invalid("-i and -t need one sandbox, not a selection"));
    }
    let mut rows = args.filter.list(&context.client().await?).await?;
    rows.retain(|row| matches!(row.status, SandboxState::Running | SandboxState::Asleep));
    if rows.is_empty() {
        return Err(ApiError::new(ErrorCode::SandboxNotFound, "no running sandbox fits").into());
    }
    let mut first = ExitStatus::SUCCESS;
    for row in rows {
        context.printer.note(&format!("==> {}", row.name));
        let status = match execute(&row.name, args.name_and_command.clone(), &args.options, context).await {
            Ok(status) => status,
            Err(Failure::Api(error)) => {
                context.printer.error(&error);
                ExitStatus(125)
            }
            Err(other) => return Err(other),
        };
        if first == ExitStatus::SUCCESS {
            first = status;
        }
    }
    Ok(first)
}

/// Runs a command in a sandbox, joined to this process.
///
/// # Errors
/// See [`run`].
pub async fn execute(
    name: &SandboxName,
    command: Vec<String>,
    options: &ExecOptions,
    context: &Context,
) -> Result<ExitStatus, Failure> {
    if options.tty && options.interactive && !terminal::stdin_is_terminal() {
        return Err(invalid("-t with -i needs a terminal on stdin"));
    }
    let request = options.request(command, &host_variable)?;
    let mut signals = Signals::take();
    let session = tokio::select! {
        session = async { Ok::<_, Failure>(context.client().await?.exec(name, request).await?) } => session?,
        number = signals.ending() => return Err(Failure::Silent(ExitStatus::of_signal(number))),
    };
    let joining = Joining { tty: options.tty && options.interactive, detach_keys: options.detach_keys.clone() };
    match attached::join(session, &joining, &mut signals, &context.printer).await? {
        Parting::Ended(end) => Ok(ExitStatus(end.exit_status())),
        Parting::Detached => {
            context.printer.note("left the session; its command ends");
            Ok(ExitStatus::SUCCESS)
        }
        // Losing its stream ends an exec.
        Parting::Insisted(number) => Ok(ExitStatus::of_signal(number)),
    }
}
