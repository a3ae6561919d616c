//! What an SSH connection reaches: a trait, so that this crate knows nothing of sandboxes and its tests need none.

use std::pin::Pin;

use bytes::Bytes;
use msb_protocol::error::ApiError;
use msb_protocol::state::ProcessEnd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A connection inside the target. Shutting down its writing half is a half-close.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where processes are started and connections opened.
pub trait Target: Send + Sync + 'static {
    /// Somebody logged in. Must not wait.
    fn logged_in(&self) {}

    /// Starts an SFTP server as a user: a stream of its packets.
    fn sftp<'a>(&'a self, user: &'a str) -> BoxFuture<'a, Result<Box<dyn Stream>, ApiError>>;

    /// Starts a process.
    fn start(&self, command: Command) -> BoxFuture<'_, Result<Process, ApiError>>;

    /// Opens a TCP connection from inside: the target's policy, resolver and loopback apply.
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Stream>, Refusal>>;
}

/// Why a connection was not opened; becomes a reason of RFC 4254, section 5.1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Policy says no (`SSH_OPEN_ADMINISTRATIVELY_PROHIBITED`).
    #[error("denied by policy: {0}")]
    Prohibited(String),
    /// Nobody answers there (`SSH_OPEN_CONNECT_FAILED`).
    #[error("{0}")]
    Failed(String),
    /// Too many already (`SSH_OPEN_RESOURCE_SHORTAGE`).
    #[error("{0}")]
    Shortage(String),
}

/// A process to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Shell command line; none: the login shell.
    pub line: Option<String>,
    /// The name the client logged in with.
    pub user: String,
    /// Environment the client sent, of accepted names only.
    pub env: Vec<(String, String)>,
    /// A terminal, if the client asked for one.
    pub terminal: Option<Terminal>,
}

/// A terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Its kind, the process's TERM.
    pub term: String,
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// A running process. Dropping `input` closes its standard input and nothing else; dropping `output` ends it.
#[derive(Debug)]
pub struct Process {
    /// To its standard input. Bounded: a process that does not read makes the sender wait.
    pub input: mpsc::Sender<Input>,
    /// To the process itself, beside what waits for its standard input.
    pub control: mpsc::Sender<Control>,
    /// From it. Bounded: a client that does not read makes the process wait. The last is `Ended` or `Failed`.
    pub output: mpsc::Receiver<Output>,
}

/// To a process's standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Standard input.
    Data(Bytes),
    /// The end of standard input.
    Eof,
}

/// To a process, beside its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// A signal for the process group, by number.
    Signal(i32),
    /// The terminal's new size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// From a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or all a terminal shows.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// How it ended.
    Ended(ProcessEnd),
    /// The connection to it was lost.
    Failed(ApiError),
}
