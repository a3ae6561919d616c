//! `msb ls`: every sandbox, resting ones too.

use clap::Args;
use msb_protocol::control::SandboxSummary;
use msb_protocol::labels::LabelTerm;

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
    /// Only those with this label; several must all fit
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
}

/// Carries it out.
///
/// # Errors
/// `invalid_label` and those of the service.
pub async fn run(args: ListArgs, context: &Context) -> Result<ExitStatus, Failure> {
    for term in &args.label {
        LabelTerm::parse(term)?;
    }
    let mut rows = context.client().await?.list(&args.label).await?.sandboxes;
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
