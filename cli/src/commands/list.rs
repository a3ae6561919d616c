//! `msb ls`: every sandbox, resting ones too.

use clap::Args;
use msb_protocol::control::SandboxSummary;

use super::bulk::FilterArgs;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::table::Table;
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
    if context.printer.is_json() {
        context.printer.json(&rows)?;
    } else if context.printer.is_quiet() {
        context.printer.text(&names(&rows))?;
    } else {
        let zone = context.zone();
        let mut table = Table::new(&["NAME", "IMAGE", "STATUS", "CREATED"]);
        for row in &rows {
            table.row(vec![
                row.name.to_string(),
                row.image.clone(),
                row.status.as_str().into(),
                time::local(row.created_at, &zone),
            ]);
        }
        context.printer.table(&table)?;
    }
    Ok(ExitStatus::SUCCESS)
}

/// Names, one a line.
#[must_use]
pub fn names(rows: &[SandboxSummary]) -> String {
    rows.iter().map(|row| format!("{}\n", row.name)).collect()
}
