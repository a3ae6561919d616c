//! Operations on several sandboxes: who is meant, and one after another so that one failure does not keep the rest from happening.

use clap::Args;
use msb_protocol::control::SandboxDetail;
use msb_protocol::id::SandboxName;
use msb_protocol::labels::LabelTerm;
use msb_sdk::{Client, Error};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;

/// One or more names.
#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Names of sandboxes
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Names, labels or both: the union of what they mean.
#[derive(Debug, Args)]
pub struct SelectionArgs {
    /// Names of sandboxes
    #[arg(value_name = "NAME", required_unless_present = "label")]
    pub names: Vec<String>,
    /// Also those with this label; several must all fit
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
}

/// A sandbox after an operation.
#[derive(Debug, Serialize)]
struct Done {
    name: SandboxName,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
}

impl SelectionArgs {
    /// The sandboxes that are meant: names in their order, then those the labels match, each once.
    ///
    /// # Errors
    /// `invalid_name`, `invalid_label`, `invalid_config` for an empty selection.
    pub async fn resolve(&self, client: &Client, context: &Context) -> Result<Vec<SandboxName>, Failure> {
        // Everything is checked before anything is done.
        let mut names = Vec::new();
        for text in &self.names {
            let name = parse::name(text)?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        for term in &self.label {
            LabelTerm::parse(term)?;
        }
        if !self.label.is_empty() {
            let matched = client.list(&self.label).await?.sandboxes;
            if matched.is_empty() {
                context.printer.warning(&format!("no sandbox has the label {}", self.label.join(" and ")));
            }
            for summary in matched {
                if !names.contains(&summary.name) {
                    names.push(summary.name);
                }
            }
        } else if names.is_empty() {
            return Err(invalid("name a sandbox, or choose some with --label"));
        }
        Ok(names)
    }
}

/// Does something to each sandbox and prints its name (in JSON: its name and state). A failure is told at once and makes the exit
/// code 1; the others still have their turn.
///
/// # Errors
/// Only those of writing.
pub async fn each<F>(
    names: Vec<SandboxName>,
    context: &Context,
    what: &str,
    mut operation: F,
) -> Result<ExitStatus, Failure>
where
    F: AsyncFnMut(&SandboxName) -> Result<Option<SandboxDetail>, Error>,
{
    let mut done = Vec::new();
    let mut failed = false;
    for name in names {
        let progress = context.printer.spinner(&format!("{what} {name}"));
        let result = operation(&name).await;
        drop(progress);
        match result {
            Ok(detail) => {
                if !context.printer.is_json() {
                    context.printer.text(name.as_str())?;
                }
                done.push(Done { name, status: detail.map(|detail| detail.summary.status.as_str()) });
            }
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&done)?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}
