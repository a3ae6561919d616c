//! `msb attach`: join the main workload of a sandbox that runs already. Leaving does not end it.

use clap::Args;
use msb_sdk::AttachOptions;

use crate::attached::{self, Joining, Parting};
use crate::context::Context;
use crate::detach_keys::{self, DetachKeys};
use crate::failure::{ExitStatus, Failure};
use crate::signals::Signals;
use crate::{parse, terminal};

/// Options of `attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only watch: stdin is not forwarded
    #[arg(long)]
    pub no_stdin: bool,
    /// Keys that leave the workload, which goes on
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT, value_parser = DetachKeys::parse)]
    pub detach_keys: DetachKeys,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `sandbox_not_running`.
pub async fn run(args: AttachArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let client = context.client().await?;
    let spec = client.inspect(&name).await?.spec;
    let stdin = spec.stdin_open && !args.no_stdin;
    let tty = spec.tty && stdin && terminal::stdin_is_terminal();
    let mut signals = Signals::take();
    let options = AttachOptions { stdin, terminal: if spec.tty { terminal::size() } else { None }, timeout_ms: None };
    let session = client.attach(&name, options).await?;
    match attached::join(session, &Joining { tty, detach_keys: args.detach_keys }, &mut signals, &context.printer)
        .await?
    {
        Parting::Ended(end) => Ok(ExitStatus(end.exit_status())),
        Parting::Detached => {
            context.printer.note(&format!("detached from {name}; it goes on"));
            Ok(ExitStatus::SUCCESS)
        }
        Parting::Insisted(number) => Ok(ExitStatus::of_signal(number)),
    }
}
