//! `msb wait`: blocks until sandboxes rest and prints their exit codes.

use msb_protocol::control::SandboxDetail;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Options of `wait`.
pub type WaitArgs = super::bulk::NamesArgs;

#[derive(Serialize)]
struct Waited {
    name: String,
    status: &'static str,
    exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
}

/// Carries it out.
///
/// # Errors
/// `invalid_name`; an error of one sandbox is told and counted.
pub async fn run(args: WaitArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| parse::name(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    let mut failed = false;
    let mut waited = Vec::new();
    for name in names {
        match client.wait(&name).await {
            Ok(detail) => {
                let code = exit_code(&detail);
                if !context.printer.is_json() {
                    context.printer.text(&code.to_string())?;
                }
                let cause = detail.summary.last_end.as_ref().map(|end| end.cause.as_str());
                waited.push(Waited {
                    name: name.to_string(),
                    status: detail.summary.status.as_str(),
                    exit_code: code,
                    cause,
                });
            }
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&waited)?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

/// The code of the last run: the workload's own as a shell shows it; without one 0, or 125 after a crash.
fn exit_code(detail: &SandboxDetail) -> u8 {
    match &detail.summary.last_end {
        None => 0,
        Some(end) => match end.process {
            Some(process) => process.exit_status(),
            None if end.cause.is_crash() => 125,
            None => 0,
        },
    }
}
