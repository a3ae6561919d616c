//! `msb logs`: what a sandbox wrote, also after it stopped.

use std::io::IsTerminal;

use anstyle::AnsiColor;
use clap::Args;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use msb_protocol::control::{LogQuery, LogRecord, LogSource};
use msb_protocol::id::BootId;

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
    /// Only lines that contain this text
    #[arg(long, value_name = "TEXT")]
    pub grep: Option<String>,
    /// Give the lines of each run of the sandbox a colour of its own, on a terminal
    #[arg(long)]
    pub color_sessions: bool,
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
        grep: args.grep,
    };
    let name = parse::name(&args.name)?;
    let mut records = context.client().await?.logs(&name, &query).await?;
    let mut lines = Lines { timestamps: args.timestamps, zone, unfinished: None };
    let mut colours = args.color_sessions.then(RunColours::default);
    while let Some(record) = records.next().await? {
        if args.json || context.printer.is_json() {
            context.printer.json_line(&record)?;
            continue;
        }
        let mut text = lines.render(&record);
        let to_terminal = match record.source {
            LogSource::Stdout => std::io::stdout().is_terminal(),
            LogSource::Stderr | LogSource::System => std::io::stderr().is_terminal(),
        };
        if let Some(colours) = colours.as_mut().filter(|_| to_terminal) {
            text = colours.paint(record.boot_id, &text);
        }
        match record.source {
            LogSource::Stdout => context.printer.bytes(text.as_bytes())?,
            LogSource::Stderr | LogSource::System => context.printer.error_bytes(text.as_bytes())?,
        }
    }
    Ok(ExitStatus::SUCCESS)
}

/// A colour for each run, in turn.
#[derive(Default)]
struct RunColours {
    last: Option<BootId>,
    runs: usize,
}

impl RunColours {
    const COLOURS: [AnsiColor; 6] =
        [AnsiColor::Cyan, AnsiColor::Yellow, AnsiColor::Green, AnsiColor::Magenta, AnsiColor::Blue, AnsiColor::Red];

    fn paint(&mut self, run: BootId, text: &str) -> String {
        if self.last != Some(run) {
            self.runs += usize::from(self.last.is_some());
            self.last = Some(run);
        }
        let style = Self::COLOURS[self.runs % Self::COLOURS.len()].on_default();
        // The line's end stays outside, so that a terminal that stops here is left as it was.
        let (line, end) = text.strip_suffix('\n').map_or((text, ""), |line| (line, "\n"));
        format!("{style}{line}{style:#}{end}")
    }
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
    use super::*;

    #[test]
    fn each_run_has_its_colour() {
        let mut colours = RunColours::default();
        let runs = [1, 1, 2].map(|number| BootId(uuid::Uuid::from_u128(number)));
        let painted = runs.map(|run| colours.paint(run, "x\n"));
        assert_eq!(painted[0], "\u{1b}[36mx\u{1b}[0m\n");
        assert_eq!(painted[0], painted[1]);
        assert_ne!(painted[1], painted[2]);
    }

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
