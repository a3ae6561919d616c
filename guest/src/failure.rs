//! What went wrong in the guest, in the words of the guest border. Made everywhere in this crate, sent by `agent` and `session`.

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::Failure;

/// An error with the code a user sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// The stable code.
    pub code: ErrorCode,
    /// What happened, for people; never holds a value of the environment.
    pub message: String,
    /// errno(3), or 0.
    pub errno: i32,
}

impl GuestError {
    /// An error that no system call caused.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errno: 0 }
    }

    /// An error that a system call caused: its words are added to the message.
    pub fn system(code: ErrorCode, what: &str, errno: i32) -> Self {
        Self { code, message: format!("{what}: {}", nix::errno::Errno::from_raw(errno).desc()), errno }
    }

    /// `exec_failed` for a system call of the set-up of a process.
    pub fn exec(what: &str, errno: rustix::io::Errno) -> Self {
        Self::system(ErrorCode::ExecFailed, what, errno.raw_os_error())
    }

    /// The exit code a shell would give for a command that fails this way.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self.code {
            ErrorCode::ExecNotFound => 127,
            ErrorCode::ExecNotExecutable => 126,
            _ => 125,
        }
    }

    /// The message of the border, with the boot step in which it happened (empty for a session).
    #[must_use]
    pub fn into_failure(self, stage: &str) -> Failure {
        Failure { code: self.code.as_str().into(), message: self.message, errno: self.errno, stage: stage.into() }
    }
}
