//! Why a command fails, and the exit code that tells it.
//!
//! | code | `run`, `exec` (and `ssh` as a client) | every other command |
//! |---|---|---|
//! | 0 | the workload's own | success |
//! | 1 | the workload's own | failure |
//! | 2 | the workload's own | wrong usage |
//! | 124 | killed at `--timeout` | – |
//! | 125 | msb's own error, wrong usage included | – |
//! | 126, 127 | not executable, not found | – |
//! | 128 + N | signal N killed it | – |
//! | 141 | stdout is a closed pipe (128 + SIGPIPE) | the same |

use msb_protocol::error::{ApiError, ErrorCode};

use crate::printer::Printer;

/// An exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(pub u8);

impl ExitStatus {
    /// All went well.
    pub const SUCCESS: Self = Self(0);
    /// A command failed.
    pub const FAILURE: Self = Self(1);
    /// The command line is wrong.
    pub const USAGE: Self = Self(2);
    /// msb itself failed where the other codes belong to the workload.
    pub const OURS: Self = Self(125);

    /// The code of a death by signal.
    #[must_use]
    pub fn of_signal(number: i32) -> Self {
        Self(u8::try_from(128 + (number & 0x7f)).unwrap_or(255))
    }
}

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// An error with a code, a message and a hint.
    Api(ApiError),
    /// Nobody reads our output any more.
    BrokenPipe,
    /// Our output cannot be written.
    Output(std::io::Error),
    /// Everything has been said; only the code is left.
    Silent(ExitStatus),
}

impl Failure {
    /// Says what there is to say and gives the exit code. `workload` is whether the codes below 125 belong to a workload.
    #[must_use]
    pub fn report(&self, printer: &Printer, workload: bool) -> ExitStatus {
        match self {
            Self::Api(error) => {
                printer.error(error);
                status_of(error.code, workload)
            }
            // As a program that SIGPIPE kills: silent, and told by the code only to whom asks for it.
            Self::BrokenPipe => ExitStatus::of_signal(13),
            Self::Output(error) => {
                printer.error(
                    &ApiError::internal(format!("cannot write to standard output: {error}"))
                        .with_hint("free space, or write elsewhere"),
                );
                status_of(ErrorCode::Internal, workload)
            }
            Self::Silent(status) => *status,
        }
    }
}

/// The exit code of an error.
#[must_use]
pub fn status_of(code: ErrorCode, workload: bool) -> ExitStatus {
    match code {
        _ if !workload => ExitStatus::FAILURE,
        ErrorCode::ExecTimeout => ExitStatus(124),
        ErrorCode::ExecNotExecutable => ExitStatus(126),
        ErrorCode::ExecNotFound => ExitStatus(127),
        _ => ExitStatus::OURS,
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<msb_sdk::Error> for Failure {
    fn from(error: msb_sdk::Error) -> Self {
        Self::Api(error.into())
    }
}

/// An `invalid_config` in one line.
#[must_use]
pub fn invalid(message: impl Into<String>) -> Failure {
    Failure::Api(ApiError::new(ErrorCode::InvalidConfig, message))
}

/// The error of a file of the user's.
#[must_use]
pub fn file(path: &std::path::Path, error: &std::io::Error) -> Failure {
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorCode::PathNotFound,
        std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        _ => ErrorCode::InvalidConfig,
    };
    Failure::Api(ApiError::new(code, format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_table() {
        for (code, workload, status) in [
            (ErrorCode::SandboxNotFound, false, 1),
            (ErrorCode::ExecNotFound, false, 1),
            (ErrorCode::SandboxNotFound, true, 125),
            (ErrorCode::ExecTimeout, true, 124),
            (ErrorCode::ExecNotExecutable, true, 126),
            (ErrorCode::ExecNotFound, true, 127),
        ] {
            assert_eq!(status_of(code, workload), ExitStatus(status), "{code} {workload}");
        }
        assert_eq!(ExitStatus::of_signal(13), ExitStatus(141));
    }
}
