//! Sessions: the messages of a command, of the main workload and of a tree that is copied. Part of the control API ([`super`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::spec::Rlimit;
use crate::state::ProcessEnd;

/// First byte of a binary message that is standard output.
pub const STDOUT_TAG: u8 = 1;
/// First byte of a binary message that is standard error.
pub const STDERR_TAG: u8 = 2;

/// The protocol of `Upgrade` by which a client takes a stream to the agent itself.
pub const STREAM_UPGRADE: &str = "msb-stream";

/// daemon → client on a connection upgraded to [`STREAM_UPGRADE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamAnswer {
    /// The stream comes with this frame, what was read of it in the next one.
    Opened,
    /// There is none; nothing follows.
    Refused {
        /// Why.
        error: ApiError,
    },
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Environment over the sandbox's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// `USER|UID[:GROUP|GID]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Resource limits.
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// Whether stdin is forwarded.
    #[serde(default)]
    pub stdin: bool,
    /// A terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which it is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// End when output ends, not when the process does.
    #[serde(default)]
    pub wait_output: bool,
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// client → daemon on a stream, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// First on `…/exec`.
    Exec {
        /// What to run.
        exec: ExecRequest,
    },
    /// First on `…/archive`.
    Archive {
        /// What to pack or unpack.
        archive: crate::file_api::ArchiveRequest,
    },
    /// First on `…/main` and `…/attach`.
    Attach {
        /// Whether stdin is forwarded.
        stdin: bool,
        /// The terminal's size, if the workload has one.
        terminal: Option<TerminalSize>,
        /// On `…/main`: time in milliseconds after which the workload is killed.
        timeout_ms: Option<u64>,
    },
    /// A signal for the process group.
    Signal {
        /// Its number.
        number: i32,
    },
    /// The terminal has this size now.
    Resize {
        /// The size.
        size: TerminalSize,
    },
    /// stdin ends here.
    StdinEof,
}

/// daemon → client on a stream, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// The process exists.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// This many more bytes of stdin may be sent.
    StdinCredit {
        /// Bytes.
        bytes: u32,
    },
    /// A watcher was too slow for this much output.
    OutputLost {
        /// Bytes.
        bytes: u64,
    },
    /// The process ended; nothing follows.
    Exited {
        /// How.
        end: ProcessEnd,
    },
    /// It failed; nothing follows.
    Error {
        /// Why.
        error: ApiError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_stream_have_stable_text() {
        let message = ClientMessage::Exec { exec: ExecRequest { command: vec!["id".into()], ..Default::default() } };
        assert_eq!(
            serde_json::to_string(&message).unwrap(),
            r#"{"type":"exec","exec":{"command":["id"],"env":{},"rlimits":[],"stdin":false,"wait_output":false}}"#
        );
        let minimal: ClientMessage = serde_json::from_str(r#"{"type":"exec","exec":{"command":["id"]}}"#).unwrap();
        assert_eq!(minimal, message);
        let exited = ServerMessage::Exited { end: ProcessEnd::signalled(9) };
        assert_eq!(
            serde_json::to_string(&exited).unwrap(),
            r#"{"type":"exited","end":{"signal":9,"core_dumped":false,"oom_killed":false,"timed_out":false}}"#
        );
    }
}
