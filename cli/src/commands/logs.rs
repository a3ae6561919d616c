//! `msb logs`: what a sandbox wrote, also after it stopped.

use clap::Args;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use msb_protocol::control::{LogQuery, LogRecord, LogSource};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::{parse, time};

/// Options of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Go on with new lines until the sandbox rests
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub tail: Option<u64>,
    /// Only from this time on: 2026-01-02T03:04:05Z, 2026-01-02, or a duration ago such as 5m
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Only before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Begin lines with their time
    #[arg(short, long)]
    pub timestamps: bool,
    /// stdout, stderr, output (both), system (msb itself) or all; several with commas
    #[arg(long, value_name = "SOURCES", default_value = "output")]
    pub source: String,
    /// One line of JSON for each record, as with --format json
    #[arg(long)]
    pub json: bool,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_config`.
pub async fn run(args: LogsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let (zone, now) = (context.zone(), Timestamp::now());
    let point = |text: &Option<String>| text.as_deref().map(|text| time::point(text, now, &zone)).transpose();
    if let Some(bad) =
        args.source.split(',').find(|source| !["stdout", "stderr", "output", "system", "all"].contains(source))
    {
        return Err(invalid(format!("{bad:?} is no source: there are stdout, stderr, output, system and all")));
    }
    let query = LogQuery {
        follow: args.follow,
        tail: args.tail,
        since: point(&args.since)?,
        until: point(&args.until)?,
        source: Some(args.source),
    };
    let name = parse::name(&args.name)?;
    let mut records = context.client().await?.logs(&name, &query).await?;
    let mut lines = Lines { timestamps: args.timestamps, zone, unfinished: None };
    while let Some(record) = records.next().await? {
        if args.json || context.printer.is_json() {
            context.printer.json_line(&record)?;
            continue;
        }
        let text = lines.render(&record);
        match record.source {
            LogSource::Stdout => context.printer.bytes(text.as_bytes())?,
            LogSource::Stderr | LogSource::System => context.printer.error_bytes(text.as_bytes())?,
        }
    }
    Ok(ExitStatus::SUCCESS)
}

/// Puts times before lines, not before pieces of lines.
struct Lines {
    timestamps: bool,
    zone: TimeZone,
    /// The source whose last piece had no newline.
    unfinished: Option<LogSource>,
}

impl Lines {
    fn render(&mut self, record: &LogRecord) -> String {
        let begins = self.unfinished != Some(record.source);
        self.unfinished = (!record.data.ends_with('\n')).then_some(record.source);
        if self.timestamps && begins {
            format!("{} {}", time::precise(record.time, &self.zone), record.data)
        } else {
            record.data.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use msb_protocol::id::BootId;

    use super::*;

    #[test]
    fn a_line_in_pieces_has_one_time() {
        let record = |source, data: &str| LogRecord {
            time: Timestamp::UNIX_EPOCH,
            boot_id: BootId(uuid::Uuid::nil()),
            source,
            data: data.into(),
        };
        let mut lines = Lines { timestamps: true, zone: TimeZone::UTC, unfinished: None };
        assert_eq!(lines.render(&record(LogSource::Stdout, "half")), "1970-01-01T00:00:00.000+00:00 half");
        assert_eq!(lines.render(&record(LogSource::Stdout, " line\n")), " line\n");
        assert_eq!(lines.render(&record(LogSource::Stdout, "next\n")), "1970-01-01T00:00:00.000+00:00 next\n");
    }
}
