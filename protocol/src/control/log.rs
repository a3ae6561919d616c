//! What has happened: lines that a workload wrote, and events. Part of the control API ([`super`]).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, SandboxId, SandboxName};
use crate::state::{EndCause, SandboxState};

/// Which log lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct LogQuery {
    /// Go on with new lines until the sandbox rests.
    pub follow: bool,
    /// Only the last lines before now.
    pub tail: Option<u64>,
    /// Only lines from this time on (RFC 3339).
    #[schema(value_type = Option<String>, format = DateTime)]
    #[param(value_type = Option<String>)]
    pub since: Option<Timestamp>,
    /// Only lines before this time (RFC 3339).
    #[schema(value_type = Option<String>, format = DateTime)]
    #[param(value_type = Option<String>)]
    pub until: Option<Timestamp>,
    /// `stdout`, `stderr`, `output` (both), `system` (agent, vmm, console) or `all`; several with commas. `output` if absent.
    pub source: Option<String>,
    /// Only lines that contain this text.
    pub grep: Option<String>,
}

/// A line of a sandbox's log; also the form in the log file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogRecord {
    /// When it was seen.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The run.
    pub boot_id: BootId,
    /// Where it came from.
    pub source: LogSource,
    /// What was written, lossy UTF-8; a line keeps its newline, a piece of an unfinished line has none.
    pub data: String,
}

/// Where a log line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The main workload's standard output.
    Stdout,
    /// The main workload's standard error.
    Stderr,
    /// msb itself: agent, VM process, a failed boot.
    System,
}

/// Which events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct EventQuery {
    /// Go on with new events.
    pub follow: bool,
    /// Only events after this sequence number.
    pub since: Option<u64>,
}

/// Something that happened to a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EventRecord {
    /// Counts up without gaps in one home.
    pub sequence: u64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The sandbox.
    pub sandbox: SandboxName,
    /// Its identity.
    pub sandbox_id: SandboxId,
    /// The run, if one was on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// What: `created`, `state`, `removed`, `health`, `pre_stop`, `labels`, `host_disk_full`, …
    pub event: String,
    /// The state after it.
    pub state: SandboxState,
    /// Why, if the event ends a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<EndCause>,
    /// Who: `user`, `creator`, `idle`, `supervisor`, `guest`.
    pub actor: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_records_are_one_json_line_with_an_rfc_3339_time() {
        let record = LogRecord {
            time: Timestamp::UNIX_EPOCH,
            boot_id: BootId(uuid::Uuid::nil()),
            source: LogSource::Stderr,
            data: "a\nb".into(),
        };
        let line = serde_json::to_string(&record).unwrap();
        assert!(line.contains("\"1970-01-01T00:00:00Z\"") && !line.contains('\n'));
        assert_eq!(serde_json::from_str::<LogRecord>(&line).unwrap(), record);
    }
}
