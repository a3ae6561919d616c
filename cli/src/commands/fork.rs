//! `msb fork`: copies of a running sandbox that go on where it is, each with a name, a disk and memory of its own.

use clap::Args;
use msb_protocol::snapshot::ForkRequest;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Options of `fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// The sandbox, running
    #[arg(value_name = "SANDBOX")]
    pub from: String,
    /// How many copies
    #[arg(short = 'c', long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub count: u32,
    /// Their name; several get -1, -2 and so on behind it
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
}

/// Carries it out: prints the names of the copies.
///
/// # Errors
/// Those of the service; no copy is left then.
pub async fn run(args: ForkArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let from = parse::name(&args.from)?;
    let name = args.name.as_deref().map(parse::name).transpose()?;
    let client = context.client().await?;
    let progress = context.printer.spinner(&format!("copying {from}"));
    let forks = client.fork(&from, &ForkRequest { count: args.count, name }).await?;
    drop(progress);
    if context.printer.is_json() {
        context.printer.json(&forks)?;
    } else {
        for fork in &forks {
            context.printer.text(fork.summary.name.as_str())?;
        }
    }
    Ok(ExitStatus::SUCCESS)
}
