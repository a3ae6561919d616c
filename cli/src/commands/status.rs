//! `msb ps`: what runs, what it runs, how often it was restarted and how it last ended.

use clap::Args;
use msb_protocol::control::{RunEnd, SandboxSummary};

use super::bulk::FilterArgs;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Longest command in the table, in characters; `inspect` shows it whole.
const COMMAND_LEN_MAX: usize = 40;

/// Options of `ps`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only this sandbox
    #[arg(value_name = "NAME", conflicts_with_all = ["all", "label", "selector"])]
    pub name: Option<String>,
    /// Also those that rest
    #[arg(short, long)]
    pub all: bool,
    /// Only these, resting ones too.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_label` and those of the service.
pub async fn run(args: StatusArgs, context: &Context) -> Result<ExitStatus, Failure> {
    args.filter.check()?;
    let name = args.name.as_deref().map(parse::name).transpose()?;
    let client = context.client().await?;
    let rows: Vec<SandboxSummary> = match &name {
        Some(name) => vec![client.inspect(name).await?.summary],
        None => {
            let mut rows = args.filter.list(&client).await?;
            rows.retain(|row| args.all || !args.filter.is_empty() || !row.status.is_resting());
            rows
        }
    };
    let header = &["NAME", "IMAGE", "COMMAND", "STATUS", "RESTARTS", "LAST EXIT", "PORTS"];
    context.printer.list(
        &rows,
        |row| &row.name,
        header,
        |row| {
            vec![
                row.name.to_string(),
                row.image.clone(),
                command(&row.command),
                status(row),
                row.restarts.to_string(),
                row.last_end.as_ref().map(end).unwrap_or_default(),
                row.ports.join(", "),
            ]
        },
    )?;
    Ok(ExitStatus::SUCCESS)
}

/// The state, with its health if it has one, as docker shows it.
#[must_use]
pub fn status(row: &SandboxSummary) -> String {
    match row.health {
        Some(health) => format!("{} ({})", row.status.as_str(), health.as_str()),
        None => row.status.as_str().to_owned(),
    }
}

/// A command for a table: as typed into a shell, cut where it gets long.
#[must_use]
pub fn command(words: &[String]) -> String {
    let whole = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    if whole.chars().count() <= COMMAND_LEN_MAX {
        whole
    } else {
        whole.chars().take(COMMAND_LEN_MAX - 1).chain(['…']).collect()
    }
}

/// A word as a shell would want it.
#[must_use]
pub fn quoted(word: &str) -> String {
    let bare = |c: char| c.is_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(bare) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// How a run ended, in a few words.
#[must_use]
pub fn end(end: &RunEnd) -> String {
    let cause = end.cause.as_str();
    match end.process {
        Some(process) => {
            let how = match (process.code, process.signal) {
                (Some(code), _) => code.to_string(),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "unknown".into(),
            };
            let more = [
                (process.timed_out, " timed out"),
                (process.oom_killed, " out of memory"),
                (process.core_dumped, " core dumped"),
            ];
            let more: String = more.iter().filter(|(is, _)| *is).map(|(_, text)| *text).collect();
            if cause == "completed" { format!("{how}{more}") } else { format!("{how}{more} ({cause})") }
        }
        None => cause.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use msb_protocol::id::BootId;
    use msb_protocol::state::{EndCause, ProcessEnd};

    use super::*;

    #[test]
    fn commands_are_shown_as_typed() {
        let words = |list: &[&str]| command(&list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(words(&["sh", "-c", "echo it's"]), r"sh -c 'echo it'\''s'");
        assert_eq!(words(&["x", ""]), "x ''");
        assert_eq!(words(&[&"y".repeat(40)]).chars().count(), 40);
        assert_eq!(words(&[&"y".repeat(41)]), format!("{}…", "y".repeat(39)));
        assert_eq!(words(&[]), "");
    }

    #[test]
    fn ends_are_told_in_a_few_words() {
        let run = |cause, process| {
            end(&RunEnd {
                boot_id: BootId(uuid::Uuid::nil()),
                cause,
                process,
                message: String::new(),
                at: jiff::Timestamp::UNIX_EPOCH,
            })
        };
        assert_eq!(run(EndCause::Completed, Some(ProcessEnd::exited(3))), "3");
        assert_eq!(
            run(EndCause::Completed, Some(ProcessEnd { oom_killed: true, ..ProcessEnd::signalled(9) })),
            "signal 9 out of memory"
        );
        assert_eq!(run(EndCause::StopRequested, Some(ProcessEnd::signalled(15))), "signal 15 (stop_requested)");
        assert_eq!(run(EndCause::GuestPanic, None), "guest_panic");
    }
}
