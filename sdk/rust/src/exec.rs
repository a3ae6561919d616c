//! A command to run in a sandbox, and what came out of it.

use std::time::Duration;

use msb_protocol::control::{ExecRequest, TerminalSize};
use msb_protocol::spec::{self, Rlimit};
use msb_protocol::state::ProcessEnd;

use crate::error::Error;

/// Most output that [`crate::Sandbox::exec`] keeps, in bytes, unless the caller says otherwise. The guest decides how much it
/// writes, so there is always a limit; a stream has none.
pub const OUTPUT_LEN_MAX_DEFAULT: usize = 64 << 20;

/// A command to run.
#[derive(Clone, Debug)]
pub struct Exec {
    pub(crate) request: ExecRequest,
    pub(crate) input: Option<Vec<u8>>,
    pub(crate) output_len_max: usize,
}

impl Exec {
    /// A command and its arguments. It is found in the sandbox's own `PATH`; no shell is involved.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Self::from_request(ExecRequest {
            command: command.into_iter().map(Into::into).collect(),
            ..ExecRequest::default()
        })
    }

    /// A request as the control API has it.
    #[must_use]
    pub fn from_request(request: ExecRequest) -> Self {
        Self { request, input: None, output_len_max: OUTPUT_LEN_MAX_DEFAULT }
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.insert(name.into(), value.into());
        self
    }

    /// Sets its working directory.
    #[must_use]
    pub fn workdir(mut self, path: impl Into<String>) -> Self {
        self.request.workdir = Some(path.into());
        self
    }

    /// Sets its user: `USER|UID[:GROUP|GID]`.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = Some(user.into());
        self
    }

    /// Sets a resource limit: `nofile`, soft, hard.
    #[must_use]
    pub fn rlimit(mut self, resource: impl Into<String>, soft: u64, hard: u64) -> Self {
        self.request.rlimits.push(Rlimit { resource: resource.into(), soft, hard });
        self
    }

    /// Kills the whole process group after this time.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.request.timeout_ms = Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Forwards stdin: the caller writes to the session's [`crate::SessionStdin`].
    #[must_use]
    pub fn stdin_open(mut self) -> Self {
        self.request.stdin = true;
        self
    }

    /// Gives it these bytes as its whole stdin ([`crate::Sandbox::exec`] only).
    #[must_use]
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.request.stdin = true;
        self.input = Some(input.into());
        self
    }

    /// Gives it a terminal of this size.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.request.terminal = Some(TerminalSize { rows, columns });
        self
    }

    /// Most output that is kept, in bytes, of stdout and stderr together.
    #[must_use]
    pub fn output_len_max(mut self, bytes: usize) -> Self {
        self.output_len_max = bytes;
        self
    }

    /// The request as the control API has it.
    #[must_use]
    pub fn into_request(self) -> ExecRequest {
        self.request
    }

    /// What can be checked without the sandbox.
    pub(crate) fn check(&self) -> Result<(), Error> {
        use msb_protocol::error::{ApiError, ErrorCode};
        if self.request.command.is_empty() {
            return Err(Error::InvalidConfig(ApiError::new(ErrorCode::InvalidConfig, "a command is required")));
        }
        spec::check_argv(&self.request.command).map_err(Error::InvalidConfig)?;
        spec::check_env(&self.request.env).map_err(Error::InvalidConfig)
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for Exec {
    fn from(command: [S; N]) -> Self {
        Self::new(command)
    }
}

impl<S: Into<String>> From<Vec<S>> for Exec {
    fn from(command: Vec<S>) -> Self {
        Self::new(command)
    }
}

impl From<&[&str]> for Exec {
    fn from(command: &[&str]) -> Self {
        Self::new(command.iter().copied())
    }
}

/// What came out of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// How it ended.
    pub end: ProcessEnd,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl ExecOutput {
    /// Whether it ended with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.end.success()
    }

    /// Itself if it ended well.
    ///
    /// # Errors
    /// `exec_timeout` if it was killed at its timeout, `command_failed` for any other end but code 0.
    pub fn check(self) -> Result<Self, Error> {
        use msb_protocol::error::{ApiError, ErrorCode};
        if self.end.timed_out {
            let message = "the command ran longer than its timeout and was killed";
            return Err(Error::Client(ApiError::new(ErrorCode::ExecTimeout, message)));
        }
        if self.success() {
            return Ok(self);
        }
        let how = match (self.end.code, self.end.signal) {
            (Some(code), _) => format!(" with code {code}"),
            (None, Some(signal)) => format!(" with signal {signal}"),
            (None, None) => String::new(),
        };
        Err(Error::Client(ApiError::new(ErrorCode::CommandFailed, format!("the command ended{how}"))))
    }

    /// Its standard output as text; bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its standard error as text; bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
