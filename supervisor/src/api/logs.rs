//! A sandbox's log: the files that its VM process writes and rotates, read back in order and followed.
//!
//! Each line of `workload.jsonl` is a [`LogRecord`]. A boot that failed comes first, as system lines made from its evidence. Reading is
//! blocking work on the pool ([`log_files`]); what waits for a slow client is bounded by a channel.

use std::path::Path;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path as RoutePath, Query, State};
use axum::response::Response;
use jiff::Timestamp;
use msb_protocol::control::{LogQuery, LogRecord, LogSource};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::vmm::BootError;
use tokio::sync::{mpsc, watch};

use super::ApiState;
use super::failure::{Failure, query};
use super::images::json_lines;
use super::log_files::{self, QUEUE_LEN, Which};
use super::sandboxes::name;

/// The newest file's name.
const LOG_FILE: &str = msb_protocol::vmm::WORKLOAD_LOG_FILE;
/// Which lines, parsed.
#[derive(Clone, Debug)]
struct Filter {
    sources: Vec<LogSource>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    grep: Option<String>,
}

impl Filter {
    fn of(which: &LogQuery) -> Result<Self, ApiError> {
        let mut sources = Vec::new();
        for word in which.source.as_deref().unwrap_or("output").split(',') {
            sources.extend_from_slice(match word {
                "stdout" => &[LogSource::Stdout][..],
                "stderr" => &[LogSource::Stderr],
                "output" => &[LogSource::Stdout, LogSource::Stderr],
                "system" => &[LogSource::System],
                "all" => &[LogSource::Stdout, LogSource::Stderr, LogSource::System],
                _ => {
                    return Err(ApiError::new(ErrorCode::InvalidRequest, format!("{word:?} is no log source"))
                        .with_hint("use stdout, stderr, output, system or all"));
                }
            });
        }
        Ok(Self { sources, since: which.since, until: which.until, grep: which.grep.clone() })
    }

    fn takes(&self, record: &LogRecord) -> bool {
        self.sources.contains(&record.source)
            && self.since.is_none_or(|since| record.time >= since)
            && self.until.is_none_or(|until| record.time < until)
            && self.grep.as_ref().is_none_or(|text| record.data.contains(text.as_str()))
    }
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/logs", params(("name" = String, Path), LogQuery), responses((status = 200, body = LogRecord, content_type = "application/x-ndjson", description = "lines"), (status = "4XX", body = ApiError)))]
pub(crate) async fn logs(
    State(state): State<ApiState>,
    RoutePath(sandbox): RoutePath<String>,
    which: Result<Query<LogQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let which = query(which)?;
    let filter = Filter::of(&which)?;
    let sandbox = state.daemon.find(&name(&sandbox)?).await?;
    let directory = state.daemon.surroundings().directories(&sandbox.name, sandbox.id).logs;
    let boot_error = sandbox.view.borrow().detail.boot_error.clone();
    let (lines, waiting) = mpsc::channel(QUEUE_LEN);
    let rests = log_files::rests(sandbox.view, which.follow.then(|| lines.clone()));
    tokio::task::spawn_blocking(move || read(&directory, &filter, &which, boot_error.as_ref(), &lines, &rests));
    Ok(json_lines(waiting))
}

/// Reads everything there is, then follows. Ends when the client is gone: every send fails then.
fn read(
    directory: &Path,
    filter: &Filter,
    which: &LogQuery,
    boot_error: Option<&BootError>,
    lines: &mpsc::Sender<LogRecord>,
    rests: &watch::Receiver<bool>,
) {
    if let Some(error) = boot_error {
        for record in boot_error_records(error) {
            if lines.blocking_send(record).is_err() {
                return;
            }
        }
    }
    let which = Which { tail: which.tail, follow: which.follow };
    log_files::read(directory, LOG_FILE, which, |record| filter.takes(record), lines, rests);
}

/// The evidence of a failed boot as log lines.
fn boot_error_records(error: &BootError) -> Vec<LogRecord> {
    let time = i64::try_from(error.at_ns / 1_000_000)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .unwrap_or_default();
    let head = format!("boot failed in stage {}: {}", error.stage, error.error.message);
    std::iter::once(head.as_str())
        .chain(error.console_tail.lines())
        .map(|line| LogRecord { time, boot_id: error.boot_id, source: LogSource::System, data: format!("{line}\n") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::log_files::LogFile;
    use msb_protocol::id::BootId;
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;

    fn record(number: i64, source: LogSource) -> LogRecord {
        let time = Timestamp::from_second(number).unwrap();
        LogRecord { time, boot_id: BootId(uuid::Uuid::nil()), source, data: format!("{number}\n") }
    }

    fn write(path: &Path, numbers: std::ops::Range<i64>) {
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        for number in numbers {
            let source = if number % 2 == 0 { LogSource::Stdout } else { LogSource::Stderr };
            writeln!(file, "{}", serde_json::to_string(&record(number, source)).unwrap()).unwrap();
        }
    }

    fn read_all(directory: &Path, which: LogQuery) -> Vec<String> {
        let (lines, mut waiting) = mpsc::channel(10_000);
        let (_rest, rests) = watch::channel(true);
        read(directory, &Filter::of(&which).unwrap(), &which, None, &lines, &rests);
        drop(lines);
        std::iter::from_fn(|| waiting.blocking_recv()).map(|record| record.data.trim().to_owned()).collect()
    }

    #[test]
    fn rotated_files_come_first_and_filters_hold() {
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join("workload.jsonl.2"), 0..2);
        write(&directory.path().join("workload.jsonl.1"), 2..4);
        write(&directory.path().join(LOG_FILE), 4..6);
        let all = LogQuery::default();
        assert_eq!(read_all(directory.path(), all.clone()), ["0", "1", "2", "3", "4", "5"]);
        assert_eq!(read_all(directory.path(), LogQuery { tail: Some(2), ..all.clone() }), ["4", "5"]);
        assert_eq!(
            read_all(directory.path(), LogQuery { source: Some("stderr".into()), ..all.clone() }),
            ["1", "3", "5"]
        );
        assert_eq!(
            read_all(directory.path(), LogQuery { grep: Some("3".into()), tail: Some(1), ..all.clone() }),
            ["3"],
            "the tail counts what fits"
        );
        let at = |second| Some(Timestamp::from_second(second).unwrap());
        assert_eq!(read_all(directory.path(), LogQuery { since: at(2), until: at(5), ..all.clone() }), ["2", "3", "4"]);
        assert!(Filter::of(&LogQuery { source: Some("nonsense".into()), ..all }).is_err());
    }

    #[test]
    fn unfinished_lines_wait_and_damaged_ones_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(LOG_FILE);
        let line = serde_json::to_string(&record(1, LogSource::Stdout)).unwrap();
        std::fs::write(&path, format!("not json\n\u{0}\n{line}\n{}", &line[..20])).unwrap();
        let mut file = LogFile::<LogRecord>::open(&path).unwrap();
        assert_eq!(file.next_record(), Some(record(1, LogSource::Stdout)));
        assert_eq!(file.next_record(), None);
        writeln!(File::options().append(true).open(&path).unwrap(), "{}", &line[20..]).unwrap();
        assert_eq!(file.next_record(), Some(record(1, LogSource::Stdout)));
    }

    #[test]
    fn following_survives_a_rotation_and_ends_when_the_sandbox_rests() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(LOG_FILE);
        write(&path, 0..2);
        let (lines, mut waiting) = mpsc::channel(100);
        let (rest, rests) = watch::channel(false);
        let which = LogQuery { follow: true, ..LogQuery::default() };
        let reader = {
            let directory = directory.path().to_owned();
            std::thread::spawn(move || read(&directory, &Filter::of(&which).unwrap(), &which, None, &lines, &rests))
        };
        let mut next = || waiting.blocking_recv().unwrap().data;
        assert_eq!([next(), next()], ["0\n", "1\n"]);
        write(&path, 2..3);
        std::fs::rename(&path, directory.path().join("workload.jsonl.1")).unwrap();
        write(&path, 3..4);
        assert_eq!([next(), next()], ["2\n", "3\n"]);
        write(&path, 4..5);
        rest.send_replace(true);
        assert_eq!(next(), "4\n");
        reader.join().unwrap();
        assert_eq!(waiting.blocking_recv(), None);
    }

    #[test]
    fn a_failed_boot_comes_first() {
        let error = BootError {
            boot_id: BootId(uuid::Uuid::nil()),
            at_ns: 0,
            stage: "mount".into(),
            error: ApiError::new(ErrorCode::BootFailed, "no root"),
            console_tail: "line 1\nline 2".into(),
        };
        let lines: Vec<String> = boot_error_records(&error).into_iter().map(|record| record.data).collect();
        assert_eq!(lines, ["boot failed in stage mount: no root\n", "line 1\n", "line 2\n"]);
    }
}
