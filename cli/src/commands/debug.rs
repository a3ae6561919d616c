//! `msb debug`: a look inside the service, for those who mend it.

use clap::Subcommand;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::table::Table;

/// What to look at.
#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Show the tree of actors: messages, restarts, last cause
    Actors,
}

/// Carries it out.
///
/// # Errors
/// Those of the service.
pub async fn run(command: DebugCommand, context: &Context) -> Result<ExitStatus, Failure> {
    let DebugCommand::Actors = command;
    let tree = context.client().await?.actors().await?;
    if context.printer.is_json() {
        context.printer.json(&tree.actors)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(&["ACTOR", "PARENT", "STATE", "HANDLED", "WAITING", "RESTARTS", "LAST CAUSE"]);
    for row in &tree.actors {
        table.row(vec![
            row.name.clone(),
            row.parent.clone(),
            row.state.clone(),
            row.handled.to_string(),
            row.mailbox.to_string(),
            row.restarts.to_string(),
            row.last_cause.clone().unwrap_or_default(),
        ]);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}
