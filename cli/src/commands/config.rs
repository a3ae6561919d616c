//! `msb config show`: the settings in force, and with `--origin` where each came from. Asks no service.

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::table::Table;

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting and its value
    Show(ShowArgs),
}

/// Options of `config show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Show where each value came from
    #[arg(long)]
    pub origin: bool,
}

#[derive(Serialize)]
struct Row<'a> {
    key: &'static str,
    value: Option<&'a str>,
    origin: String,
    variable: &'static str,
    meaning: &'static str,
}

/// Carries it out.
///
/// # Errors
/// `config_file` naming file and line.
pub fn run(command: ConfigCommand, context: &Context) -> Result<ExitStatus, Failure> {
    let ConfigCommand::Show(args) = command;
    let config = context.config()?;
    if context.printer.is_json() {
        let rows: Vec<_> = config
            .iter()
            .map(|(setting, value, origin)| Row {
                key: setting.key,
                value: Some(value).filter(|value| !value.is_empty()),
                origin: origin.to_string(),
                variable: setting.variable,
                meaning: setting.meaning,
            })
            .collect();
        context.printer.json(&rows)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(if args.origin { &["KEY", "VALUE", "ORIGIN"] } else { &["KEY", "VALUE"] });
    for (setting, value, origin) in config.iter() {
        let value = if value.is_empty() { "-".to_owned() } else { value.to_owned() };
        let mut row = vec![setting.key.to_owned(), value];
        if args.origin {
            row.push(origin.to_string());
        }
        table.row(row);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}
