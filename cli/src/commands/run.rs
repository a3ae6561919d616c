//! `msb run`: create a sandbox for one command. Attached, its output is ours and its exit code is ours.

use std::time::Duration;

use clap::Args;
use msb_protocol::control::StopRequest;
use msb_protocol::error::ErrorCode;
use msb_protocol::spec::Workload;
use msb_sdk::{AttachOptions, Client};

use super::create::{create, spec};
use crate::attached::{self, Joining, Parting};
use crate::context::{Context, host_variable};
use crate::creation::CreationArgs;
use crate::detach_keys::{self, DetachKeys};
use crate::failure::{ExitStatus, Failure, invalid};
use crate::signals::Signals;
use crate::{parse, terminal};

/// Time after the workload's end for the virtual machine to flush and go, in which `run` still waits for it.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of `run`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb run [OPTIONS] IMAGE [COMMAND]...\n       msb run [OPTIONS] --snapshot NAME [COMMAND]...",
    after_help = "Without --name and -d the sandbox is removed when the command ends. The exit code is the command's own; 128+N if signal N \
                  killed it, 124 at --timeout, 125 if msb failed, 126 not executable, 127 not found."
)]
pub struct RunArgs {
    /// Run in the background and print the sandbox's name
    #[arg(short, long)]
    pub detach: bool,
    /// Remove the sandbox when it ends, even if it has a name or is in the background
    #[arg(long)]
    pub rm: bool,
    /// Forward stdin to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Kill the command after this time (exit code 124)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, conflicts_with = "detach")]
    pub timeout: Option<u64>,
    /// Keys that leave the terminal and let the sandbox go on
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT, value_parser = DetachKeys::parse, requires = "tty")]
    pub detach_keys: DetachKeys,
    /// What it is made of.
    #[command(flatten)]
    pub creation: CreationArgs,
    /// The image (or the path of a directory or raw disk), and what to run of it; without a command the image's own
    #[arg(required_unless_present = "snapshot", num_args = 1.., trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    pub image_and_command: Vec<String>,
}

/// Carries it out.
///
/// # Errors
/// Those of the options, the service and the workload's start.
pub async fn run(args: RunArgs, context: &Context) -> Result<ExitStatus, Failure> {
    if args.tty && args.interactive && !args.detach && !terminal::stdin_is_terminal() {
        return Err(invalid("-t with -i needs a terminal on stdin"));
    }
    let (mut spec, command) = spec(&args.creation, args.image_and_command, context).await?;
    if !command.is_empty() {
        spec.command = Some(command);
    }
    spec.workload = Workload::Main;
    spec.detached = args.detach;
    spec.ephemeral = args.rm || (spec.name.is_none() && !args.detach);
    spec.stdin_open = args.interactive;
    spec.tty = args.tty;
    if args.tty
        && let Some(kind) = host_variable("TERM")
    {
        spec.env.entry("TERM".into()).or_insert(kind);
    }
    if args.detach {
        let detail = create(spec, false, &args.creation, context).await?;
        if context.printer.is_json() {
            context.printer.json(&detail)?
        } else {
            context.printer.text(detail.summary.name.as_str())?
        }
        return Ok(ExitStatus::SUCCESS);
    }
    let mut signals = Signals::take();
    // Until there is a workload a signal ends msb, and with its creator gone the daemon takes back what was begun.
    let detail = tokio::select! {
        detail = create(spec, true, &args.creation, context) => detail?,
        number = signals.ending() => return Err(Failure::Silent(ExitStatus::of_signal(number))),
    };
    let name = &detail.summary.name;
    let client = context.client().await?;
    let options = AttachOptions {
        stdin: args.interactive,
        terminal: if args.tty { terminal::size() } else { None },
        timeout_ms: args.timeout,
    };
    let session = tokio::select! {
        session = client.start_main(name, options) => session,
        number = signals.ending() => return Err(Failure::Silent(ExitStatus::of_signal(number))),
    };
    let joining = Joining { tty: args.tty && args.interactive, detach_keys: args.detach_keys };
    let parting = match session {
        Ok(session) => attached::join(session, &joining, &mut signals, &context.printer).await,
        Err(error) => Err(error.into()),
    };
    match parting {
        Ok(Parting::Ended(end)) => {
            rest(&client, name, &mut signals, context).await;
            Ok(ExitStatus(end.exit_status()))
        }
        Ok(Parting::Detached) => {
            client.detach(name).await?;
            context.printer.note(&format!("detached from {name}; it goes on"));
            Ok(ExitStatus::SUCCESS)
        }
        Ok(Parting::Insisted(number)) => {
            context.printer.note(&format!("killing {name}"));
            let _ = tokio::time::timeout(END_TIMEOUT, client.stop(name, &StopRequest { grace_ms: None, force: true }))
                .await;
            Ok(ExitStatus::of_signal(number))
        }
        Err(mut failure) => {
            if let Failure::Api(error) = &mut failure
                && error.code == ErrorCode::ExecNotFound
                && error.message.starts_with("'-")
            {
                error.hint = "options of msb come before the image: what follows it is the command".into();
            }
            // The workload that could not be started is over, and so is its sandbox.
            if matches!(&failure, Failure::Api(error) if matches!(error.code, ErrorCode::ExecNotFound | ErrorCode::ExecNotExecutable | ErrorCode::ExecFailed | ErrorCode::UserNotFound))
            {
                rest(&client, name, &mut signals, context).await;
            }
            Err(failure)
        }
    }
}

/// Waits until the sandbox rests or is removed, so that the next `msb ls` agrees with what the caller saw end, and what was
/// written is on disk.
async fn rest(client: &Client, name: &msb_protocol::id::SandboxName, signals: &mut Signals, context: &Context) {
    tokio::select! {
        result = tokio::time::timeout(END_TIMEOUT, client.wait(name)) => match result {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.is_not_found() => {}
            Ok(Err(error)) => context.printer.warning(&format!("{name}: {error}")),
            Err(_) => context.printer.warning(&format!("{name} has not come to rest within {} s", END_TIMEOUT.as_secs())),
        },
        _ = signals.ending() => {}
    }
}
