//! `msb ls`: every sandbox, resting ones too.

use clap::Args;

use super::bulk::FilterArgs;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::time;

/// Options of `ls`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only those with a virtual machine
    #[arg(long, conflicts_with = "stopped")]
    pub running: bool,
    /// Only those without
    #[arg(long)]
    pub stopped: bool,
    /// Resting ones too, which are listed anyway
    #[arg(short, long, hide = true, conflicts_with_all = ["running", "stopped"])]
    pub all: bool,
    /// Only these.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Carries it out.
///
/// # Errors
/// `invalid_label` and those of the service.
pub async fn run(args: ListArgs, context: &Context) -> Result<ExitStatus, Failure> {
    args.filter.check()?;
    let mut rows = args.filter.list(&context.client().await?).await?;
    rows.retain(|row| if args.running { row.status.is_live() } else { !args.stopped || !row.status.is_live() });
    let zone = context.zone();
    let header = &["NAME", "IMAGE", "STATUS", "CREATED"];
    context.printer.list(
        &rows,
        |row| &row.name,
        header,
        |row| {
            vec![
                row.name.to_string(),
                row.image.clone(),
                row.status.as_str().into(),
                time::local(row.created_at, &zone),
            ]
        },
    )?;
    Ok(ExitStatus::SUCCESS)
}
