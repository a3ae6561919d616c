//! Streams: what is opened, the commands that run on them, their bytes and their end. Part of the guest border ([`super`]).

use prost::{Message, Oneof};

use super::Renew;

/// One process to run.
#[derive(Clone, PartialEq, Message, serde::Serialize, serde::Deserialize)]
pub struct ExecConfig {
    /// The command and its arguments; the first is looked up in PATH if it has no slash.
    #[prost(string, repeated, tag = "1")]
    pub argv: Vec<String>,
    /// Environment over [`GuestConfig::env`].
    #[prost(message, repeated, tag = "2")]
    pub env: Vec<EnvVar>,
    /// Working directory; empty: [`GuestConfig::workdir`], then `/`.
    #[prost(string, tag = "3")]
    pub workdir: String,
    /// `USER|UID[:GROUP|GID]`; empty: [`GuestConfig::user`].
    #[prost(string, tag = "4")]
    pub user: String,
    /// Limits over [`GuestConfig::rlimits`].
    #[prost(message, repeated, tag = "5")]
    pub rlimits: Vec<ResourceLimit>,
    /// Whether stdin is a pipe (else /dev/null).
    #[prost(bool, tag = "6")]
    pub stdin: bool,
    /// A terminal in place of pipes.
    #[prost(message, optional, tag = "7")]
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which the whole process group is killed; 0: none.
    #[prost(uint64, tag = "8")]
    pub timeout_ms: u64,
    /// Wait for the end of output (every holder of the pipes) and not only of the process.
    #[prost(bool, tag = "9")]
    pub wait_output: bool,
    /// A login: `argv` is nothing or one command line, for the user's own shell (passwd(5)); without [`ExecConfig::workdir`] it
    /// begins in the user's home.
    #[prost(bool, tag = "20")]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub login: bool,
}

/// `NAME=value`.
#[derive(Clone, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct EnvVar {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// A resource limit (setrlimit(2)).
#[derive(Clone, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct ResourceLimit {
    /// Name without `RLIMIT_`, lower case.
    #[prost(string, tag = "1")]
    pub resource: String,
    /// Soft limit.
    #[prost(uint64, tag = "2")]
    pub soft: u64,
    /// Hard limit.
    #[prost(uint64, tag = "3")]
    pub hard: u64,
}

/// Size of a terminal, in characters.
#[derive(Clone, Copy, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct TerminalSize {
    /// Rows, 1 to 65535.
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    /// Columns, 1 to 65535.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
}

/// host → guest, first on every stream to [`AGENT_PORT`].
#[derive(Clone, PartialEq, Message)]
pub struct Open {
    /// The newest guest border the host speaks.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// The run this stream means, 16 bytes; another is refused.
    #[prost(bytes = "vec", tag = "2")]
    pub boot_id: Vec<u8>,
    /// What the stream is for.
    #[prost(oneof = "OpenKind", tags = "3, 4, 5, 6, 10, 11, 12, 20, 21")]
    pub kind: Option<OpenKind>,
}

/// What a stream is for.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum OpenKind {
    #[prost(message, tag = "3")]
    Control(OpenControl),
    #[prost(message, tag = "4")]
    Exec(ExecConfig),
    #[prost(message, tag = "5")]
    Main(OpenMain),
    #[prost(message, tag = "6")]
    Attach(OpenAttach),
    #[prost(message, tag = "10")]
    Files(crate::files::OpenFiles),
    #[prost(message, tag = "11")]
    Archive(crate::files::OpenArchive),
    #[prost(message, tag = "12")]
    Renew(Renew),
    #[prost(message, tag = "20")]
    Tcp(OpenTcp),
    #[prost(message, tag = "21")]
    Sftp(OpenSftp),
}

/// The control stream: beats, shutdown. The newest one wins; an older one is closed.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct OpenControl {}

/// Starts the main workload with this stream as its standard streams, without loss: a reader that stops stops the workload.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct OpenMain {
    /// The terminal's size if the workload has one.
    #[prost(message, optional, tag = "1")]
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which the workload is killed, in place of [`ExecConfig::timeout_ms`]; 0: that one.
    #[prost(uint64, tag = "2")]
    pub timeout_ms: u64,
}

/// Watches the main workload. A watcher that is too slow loses output ([`OutputLost`]), the workload never waits for it.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct OpenAttach {
    /// Whether its stdin goes to the workload.
    #[prost(bool, tag = "1")]
    pub stdin: bool,
    /// The terminal's size if it has one.
    #[prost(message, optional, tag = "2")]
    pub terminal: Option<TerminalSize>,
}

/// A TCP connection from inside the guest: its resolver, its policy, its loopback. After [`Opened`] the stream carries the
/// connection's bytes and no frames, each half closes by itself.
#[derive(Clone, PartialEq, Message)]
pub struct OpenTcp {
    /// A name or an address; what the guest takes it for is what counts.
    #[prost(string, tag = "1")]
    pub host: String,
    /// Port, 1 to 65535.
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

/// An SFTP server (version 3) that runs in the guest as a user. After [`Opened`] the stream carries SFTP packets and no frames.
#[derive(Clone, PartialEq, Message)]
pub struct OpenSftp {
    /// As [`ExecConfig::user`].
    #[prost(string, tag = "1")]
    pub user: String,
}

/// guest → host: the stream is open.
#[derive(Clone, PartialEq, Message)]
pub struct Opened {
    /// The newest guest border the agent speaks.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// The agent's version, for people.
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// On a control stream: how the main workload ended, if it has.
    #[prost(message, optional, tag = "3")]
    pub main_exited: Option<Exited>,
    /// On a control stream: the main workload's process id, 0 if it has not started.
    #[prost(uint32, tag = "4")]
    pub main_pid: u32,
    /// To a `Renew` that holds: the workload stays frozen. An agent that knows nothing of it does not say so.
    #[prost(bool, tag = "5")]
    pub holds: bool,
}

/// guest → host: the process exists.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Started {
    /// Its process id in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Which standard stream output belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OutputStream {
    /// Standard output; also everything a terminal shows.
    Stdout = 0,
    /// Standard error.
    Stderr = 1,
}

/// guest → host: output of a process.
#[derive(Clone, PartialEq, Message)]
pub struct Output {
    /// Which stream.
    #[prost(enumeration = "OutputStream", tag = "1")]
    pub stream: i32,
    /// At most [`frame::DATA_LEN_MAX`] bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// guest → host on an attach stream: output this watcher was too slow for.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct OutputLost {
    /// How much, in bytes.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// host → guest: bytes for stdin, within the credit.
#[derive(Clone, PartialEq, Message)]
pub struct Data {
    /// At most [`frame::DATA_LEN_MAX`] bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
}

/// host → guest: stdin ends here.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct StdinEof {}

/// guest → host: the process has read this much more of stdin.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct StdinCredit {
    /// Bytes that may be sent beyond those allowed before.
    #[prost(uint32, tag = "1")]
    pub bytes: u32,
}

/// host → guest: a signal for the session's process group.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Signal {
    /// Its number (signal(7), x86-64).
    #[prost(int32, tag = "1")]
    pub number: i32,
}

/// guest → host, last on a session stream: how the process ended. Exactly one of `code` and `signal` means something.
#[derive(Clone, Copy, PartialEq, Message, serde::Serialize, serde::Deserialize)]
pub struct Exited {
    /// Exit code if `signal` is 0.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// The signal that killed it, or 0.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// Whether it left a core dump.
    #[prost(bool, tag = "3")]
    pub core_dumped: bool,
    /// Whether the kernel killed it, or one of its session, for want of memory.
    #[prost(bool, tag = "4")]
    pub oom_killed: bool,
    /// Whether its timeout killed it.
    #[prost(bool, tag = "5")]
    pub timed_out: bool,
}

impl From<Exited> for crate::state::ProcessEnd {
    fn from(end: Exited) -> Self {
        Self {
            code: (end.signal == 0).then_some(end.code),
            signal: (end.signal != 0).then_some(end.signal),
            core_dumped: end.core_dumped,
            oom_killed: end.oom_killed,
            timed_out: end.timed_out,
        }
    }
}
