//! `msb events`: what happened to sandboxes, from the journal.

use clap::Args;
use msb_protocol::control::{EventQuery, EventRecord};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::plain;
use crate::time;

/// Options of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with new events
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this sequence number
    #[arg(long, value_name = "NUMBER")]
    pub since: Option<u64>,
}

/// Carries it out: one line each, in JSON one document a line.
///
/// # Errors
/// Those of the service.
pub async fn run(args: EventsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let zone = context.zone();
    let mut events = context.client().await?.events(&EventQuery { follow: args.follow, since: args.since }).await?;
    while let Some(event) = events.next().await? {
        if context.printer.is_json() {
            context.printer.json_line(&event)?
        } else {
            context.printer.text(&render(&event, &zone))?
        }
    }
    Ok(ExitStatus::SUCCESS)
}

fn render(event: &EventRecord, zone: &jiff::tz::TimeZone) -> String {
    let mut text = format!(
        "{} {} {} {} {}",
        time::local(event.time, zone),
        event.sequence,
        event.sandbox,
        event.event,
        event.state.as_str()
    );
    if let Some(cause) = event.cause {
        text.push_str(&format!(" cause={}", cause.as_str()));
    }
    text.push_str(&format!(" by={}", event.actor));
    if !event.message.is_empty() {
        text.push_str(&format!(" {}", event.message));
    }
    plain(&text.replace('\n', "\\n"))
}
