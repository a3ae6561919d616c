//! `msb df`: what takes how much of the disk, and what could go.

use msb_protocol::quantity::show_bytes;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::table::Table;

/// Carries it out.
///
/// # Errors
/// Those of the service.
pub async fn run(context: &Context) -> Result<ExitStatus, Failure> {
    let usage = context.client().await?.disk_usage().await?;
    if context.printer.is_json() {
        context.printer.json(&usage)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(&["WHAT", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"]);
    for row in &usage.rows {
        table.row(vec![
            row.kind.clone(),
            row.count.to_string(),
            row.active.to_string(),
            show_bytes(row.bytes),
            show_bytes(row.reclaimable_bytes),
        ]);
    }
    let sum = |of: fn(&msb_protocol::images::DiskUsageRow) -> u64| usage.rows.iter().map(of).sum::<u64>();
    table.row(vec![
        "sum".into(),
        String::new(),
        String::new(),
        show_bytes(sum(|row| row.bytes)),
        show_bytes(sum(|row| row.reclaimable_bytes)),
    ]);
    context.printer.table(&table)?;
    context.printer.note(&format!("{} free", show_bytes(usage.free_bytes)));
    Ok(ExitStatus::SUCCESS)
}
