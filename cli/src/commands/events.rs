//! `msb events`: what happened to sandboxes, from the journal.

use clap::Args;
use msb_protocol::control::{EventQuery, EventRecord};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::plain;
use crate::{parse, time};

/// Options of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with new events
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this sequence number, or from this time on (2026-01-02T03:04:05Z, 2026-01-02, or 5m ago as 5m)
    #[arg(long, value_name = "NUMBER|TIME")]
    pub since: Option<String>,
    /// Only events before this time; without --follow
    #[arg(long, value_name = "TIME", conflicts_with = "follow")]
    pub until: Option<String>,
    /// Only events of this sandbox
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

/// Carries it out: one line each, in JSON one document a line.
///
/// # Errors
/// Those of the service.
pub async fn run(args: EventsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let zone = context.zone();
    let now = jiff::Timestamp::now();
    let (after, from) = match &args.since {
        None => (None, None),
        // A bare number is a sequence number; durations have a unit.
        Some(text) => match text.parse::<u64>() {
            Ok(number) => (Some(number), None),
            Err(_) => (None, Some(time::point(text, now, &zone)?)),
        },
    };
    let until = args.until.as_ref().map(|text| time::point(text, now, &zone)).transpose()?;
    let name = args.name.as_deref().map(parse::name).transpose()?;
    let mut events = context.client().await?.events(&EventQuery { follow: args.follow, since: after }).await?;
    while let Some(event) = events.next().await? {
        if from.is_some_and(|from| event.time < from)
            || until.is_some_and(|until| event.time >= until)
            || name.as_ref().is_some_and(|name| event.sandbox != *name)
        {
            continue;
        }
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
