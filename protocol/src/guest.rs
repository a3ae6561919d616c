//! The guest border: what the host and `msb-agent` say to each other over vsock. Both sides treat the other as hostile.
//!
//! ```text
//!  guest port 1024  ◄── CONNECT ── msbd and its callers: one stream per control link, exec, attach
//!  host  port 1025  ◄── connect ── agent, once per boot, before any workload exists: the agent link, ended by msb-vmm
//!
//!  agent link                              control stream                session stream (exec, main, attach); files: crate::files
//!   agent → AgentHello                      host  → Open{control}         host  → Open{exec|main|attach}
//!   vmm   → Welcome, parts of GuestConfig   guest → Opened                guest → Opened | Refused
//!   agent → Ready | BootFailed              guest → Beat (each second)    guest → Started
//!   agent → MainStarted, MainOutput…        host  → Shutdown, Ping        host  → Stdin (within credit), StdinEof,
//!   vmm   → ClockSync                       guest → Pong, MainExited              Signal, Resize
//!   agent → MainExited, Goodbye                                           guest → Stdout, Stderr, StdinCredit
//!   vmm   → GoodbyeAck                                                    guest → Exited (last)
//!   vmm   → Quiesce, Thaw; agent → Quiesced
//!
//!  archive stream:  host → Open{archive},  guest → Opened | Refused,  then the bytes of a tar archive as Output (pack) or Stdin within
//!  credit and StdinEof (unpack), warnings as lines of Output{stderr};  guest → Exited when it is whole, else Refused with the reason (last)
//!
//!  tcp and sftp stream:  host → Open{tcp|sftp},  guest → Opened | Refused,  then bare bytes both ways; closing one half is its end
//! ```
//!
//! Every message is a frame ([`crate::frame`]) with a protobuf body. One that does not fit a frame is sent as [`Part`]s
//! ([`encode_host`], [`encode_guest`], [`Assembler`]). Field numbers are never used again; the golden bytes in
//! `protocol/tests/` hold generation by generation what is on the wire.

use prost::{Message, Oneof};

use crate::frame::{self, FrameError};

/// The agent's listening vsock port.
pub const AGENT_PORT: u32 = 1024;
/// The host's vsock port of the agent link: the only one a guest can reach.
pub const LINK_PORT: u32 = 1025;
/// The guest's vsock CID.
pub const GUEST_CID: u32 = 3;
/// The host's vsock CID; the agent accepts no other peer.
pub const HOST_CID: u32 = 2;
/// Bytes of stdin a host may send before the first [`StdinCredit`].
pub const STDIN_WINDOW: u32 = 256 << 10;
/// Largest message that parts may carry, in bytes: the largest environment with room around it.
pub const MESSAGE_LEN_MAX: usize = 4 << 20;
/// Time between two beats in milliseconds.
pub const BEAT_INTERVAL_MS: u64 = 1_000;

/// Anything the host sends.
#[derive(Clone, PartialEq, Message)]
pub struct HostMessage {
    /// What it is.
    #[prost(oneof = "HostBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20")]
    pub body: Option<HostBody>,
}

/// The messages of the host.
#[derive(Clone, PartialEq, Oneof)]
#[allow(
    clippy::large_enum_variant,
    reason = "messages live only between a decoder and its match, never in a collection"
)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum HostBody {
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    #[prost(message, tag = "2")]
    ClockSync(ClockSync),
    #[prost(message, tag = "3")]
    GoodbyeAck(GoodbyeAck),
    #[prost(message, tag = "4")]
    Open(Open),
    #[prost(message, tag = "5")]
    Stdin(Data),
    #[prost(message, tag = "6")]
    StdinEof(StdinEof),
    #[prost(message, tag = "7")]
    Signal(Signal),
    #[prost(message, tag = "8")]
    Resize(TerminalSize),
    #[prost(message, tag = "9")]
    Shutdown(Shutdown),
    #[prost(message, tag = "10")]
    Ping(Ping),
    #[prost(message, tag = "11")]
    Part(Part),
    #[prost(message, tag = "12")]
    Quiesce(Quiesce),
    #[prost(message, tag = "13")]
    Thaw(Thaw),
    #[prost(message, tag = "20")]
    File(crate::files::FileRequest),
}

/// Anything the guest sends.
#[derive(Clone, PartialEq, Message)]
pub struct GuestMessage {
    /// What it is.
    #[prost(oneof = "GuestBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 30")]
    pub body: Option<GuestBody>,
}

/// The messages of the guest.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum GuestBody {
    #[prost(message, tag = "1")]
    AgentHello(AgentHello),
    #[prost(message, tag = "2")]
    Ready(Ready),
    #[prost(message, tag = "3")]
    BootFailed(Failure),
    #[prost(message, tag = "4")]
    MainStarted(Started),
    #[prost(message, tag = "5")]
    MainOutput(Output),
    #[prost(message, tag = "6")]
    MainExited(Exited),
    #[prost(message, tag = "7")]
    Goodbye(Goodbye),
    #[prost(message, tag = "8")]
    Opened(Opened),
    #[prost(message, tag = "9")]
    Refused(Failure),
    #[prost(message, tag = "10")]
    Beat(Beat),
    #[prost(message, tag = "11")]
    Pong(Pong),
    #[prost(message, tag = "12")]
    Started(Started),
    #[prost(message, tag = "13")]
    Output(Output),
    #[prost(message, tag = "14")]
    StdinCredit(StdinCredit),
    #[prost(message, tag = "15")]
    Exited(Exited),
    #[prost(message, tag = "16")]
    OutputLost(OutputLost),
    #[prost(message, tag = "17")]
    Part(Part),
    #[prost(message, tag = "18")]
    Log(Log),
    #[prost(message, tag = "19")]
    Quiesced(Quiesced),
    #[prost(message, tag = "30")]
    File(crate::files::FileReply),
}

/// One piece of a message that is longer than a frame. The pieces, put together, are an encoded message of the same side.
#[derive(Clone, PartialEq, Message)]
pub struct Part {
    /// The piece.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
    /// Whether the message is complete with it.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// agent → vmm, first on the agent link.
#[derive(Clone, PartialEq, Message)]
pub struct AgentHello {
    /// The newest guest border the agent speaks.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// The agent's version, for people.
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// Time from the kernel's start to init, in microseconds.
    #[prost(uint64, tag = "3")]
    pub init_uptime_us: u64,
    /// Time from the kernel's start to this message, in microseconds.
    #[prost(uint64, tag = "4")]
    pub hello_uptime_us: u64,
}

/// vmm → agent, the answer to [`AgentHello`]: what the guest needs before its first process.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The newest guest border the host speaks.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// This run's identity, 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub boot_id: Vec<u8>,
    /// The host's wall clock in nanoseconds since 1970, read just before sending.
    #[prost(uint64, tag = "3")]
    pub realtime_ns: u64,
    /// Seed for the entropy pool, credited in full (random(4), `RNDADDENTROPY`).
    #[prost(bytes = "vec", tag = "4")]
    pub entropy: Vec<u8>,
    /// How to set the guest up.
    #[prost(message, optional, tag = "5")]
    pub config: Option<GuestConfig>,
}

/// How the guest is set up: made by the daemon, carried by `msb-vmm`, applied by the agent before `Ready`.
#[derive(Clone, PartialEq, Message, serde::Serialize, serde::Deserialize)]
pub struct GuestConfig {
    /// Hostname.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// Whole text of /etc/hosts.
    #[prost(string, tag = "2")]
    pub hosts: String,
    /// Whole text of /etc/resolv.conf.
    #[prost(string, tag = "3")]
    pub resolv_conf: String,
    /// virtio serial of the read-only device: EROFS, or ext4 where it is a disk of the user's.
    #[prost(string, tag = "4")]
    pub lower_serial: String,
    /// virtio serial of the writable ext4 device.
    #[prost(string, tag = "5")]
    pub upper_serial: String,
    /// Name of the share that is the read-only part of the root, in place of the device of `lower_serial`; empty: none.
    #[prost(string, tag = "34")]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub lower_share: String,
    /// Paths that are directories of the ext4 disk bound over the root: the image's volumes and what cannot live on an overlay.
    #[prost(string, repeated, tag = "6")]
    pub volume_paths: Vec<String>,
    /// Environment of every process msb starts: the image's, then the sandbox's.
    #[prost(message, repeated, tag = "7")]
    pub env: Vec<EnvVar>,
    /// User of a process for which nobody names one; empty: root by nobody's choice (HOME then comes from uid 0's entry).
    #[prost(string, tag = "8")]
    pub user: String,
    /// Working directory of a process for which nobody names one.
    #[prost(string, tag = "9")]
    pub workdir: String,
    /// Limits of every process msb starts.
    #[prost(message, repeated, tag = "10")]
    pub rlimits: Vec<ResourceLimit>,
    /// The main workload, if there is one.
    #[prost(message, optional, tag = "11")]
    pub main: Option<MainConfig>,
    /// Memory in bytes that the workload's cgroup leaves for the agent.
    #[prost(uint64, tag = "12")]
    pub memory_reserve_bytes: u64,
    /// The security profile's name ([`crate::security`]); empty: `default`.
    #[prost(string, tag = "31")]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub security: String,
    /// What is mounted over the root, in any order.
    #[prost(message, repeated, tag = "32")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<GuestMount>,
    /// Changes of the root, in their order, before anything of `mounts` is mounted.
    #[prost(message, repeated, tag = "33")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub patches: Vec<GuestPatch>,
    /// The network interface, if there is one.
    #[prost(message, optional, tag = "20")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<GuestNetwork>,
}

/// How the guest's one network interface is set up: statically, without asking anybody.
#[derive(Clone, PartialEq, Message, serde::Serialize, serde::Deserialize)]
pub struct GuestNetwork {
    /// IPv4 address, 4 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub ipv4: Vec<u8>,
    /// Length of its prefix in bits.
    #[prost(uint32, tag = "2")]
    pub ipv4_prefix_len: u32,
    /// IPv4 default gateway, 4 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub gateway_ipv4: Vec<u8>,
    /// IPv6 address, 16 bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub ipv6: Vec<u8>,
    /// Length of its prefix in bits.
    #[prost(uint32, tag = "5")]
    pub ipv6_prefix_len: u32,
    /// IPv6 default gateway, 16 bytes.
    #[prost(bytes = "vec", tag = "6")]
    pub gateway_ipv6: Vec<u8>,
    /// Largest IP packet in bytes.
    #[prost(uint32, tag = "7")]
    pub mtu_bytes: u32,
}

/// One mount over the root.
#[derive(Clone, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct GuestMount {
    /// Where, an absolute path.
    #[prost(string, tag = "1")]
    pub target: String,
    /// How: `ro` or `rw`, `noexec`, `nosuid`, `nodev`, separated by commas.
    #[prost(string, tag = "2")]
    pub options: String,
    /// What.
    #[prost(oneof = "GuestMountSource", tags = "3, 4, 5")]
    pub source: Option<GuestMountSource>,
}

/// What is mounted.
#[derive(Clone, PartialEq, Eq, Oneof, serde::Serialize, serde::Deserialize)]
pub enum GuestMountSource {
    /// Memory: its size in bytes, 0 for the kernel's default.
    #[prost(uint64, tag = "3")]
    Tmpfs(u64),
    /// A directory or file of the shared file system, by its name at the top of it.
    #[prost(string, tag = "4")]
    Share(String),
    /// The ext4 of a disk, by its virtio serial.
    #[prost(string, tag = "5")]
    Disk(String),
}

/// One change of the root.
#[derive(Clone, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct GuestPatch {
    /// What it changes, an absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Permission bits of what is made.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// What becomes of it.
    #[prost(oneof = "GuestPatchKind", tags = "3, 4, 5, 6")]
    pub kind: Option<GuestPatchKind>,
}

/// What becomes of a path.
#[derive(Clone, PartialEq, Eq, Oneof, serde::Serialize, serde::Deserialize)]
pub enum GuestPatchKind {
    /// A file with these bytes.
    #[prost(bytes = "vec", tag = "3")]
    File(#[serde(with = "crate::mount::hex_bytes")] Vec<u8>),
    /// A symbolic link to this.
    #[prost(string, tag = "4")]
    Link(String),
    /// A directory, its parents too.
    #[prost(bool, tag = "5")]
    Directory(bool),
    /// Nothing: it is removed.
    #[prost(bool, tag = "6")]
    Removed(bool),
}

/// The main workload.
#[derive(Clone, PartialEq, Message, serde::Serialize, serde::Deserialize)]
pub struct MainConfig {
    /// What to run.
    #[prost(message, optional, tag = "1")]
    pub exec: Option<ExecConfig>,
    /// Whether the agent starts it after `Ready`; else the first [`OpenMain`] does.
    #[prost(bool, tag = "2")]
    pub autostart: bool,
    /// Signal number that asks it to stop.
    #[prost(int32, tag = "3")]
    pub stop_signal: i32,
}

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

/// agent → vmm: the guest is set up.
#[derive(Clone, PartialEq, Message)]
pub struct Ready {
    /// Time from the kernel's start to this message, in microseconds.
    #[prost(uint64, tag = "1")]
    pub ready_uptime_us: u64,
    /// How long each step took, in the order taken.
    #[prost(message, repeated, tag = "2")]
    pub steps: Vec<Step>,
}

/// One step of the guest's set-up.
#[derive(Clone, PartialEq, Message)]
pub struct Step {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its duration in microseconds.
    #[prost(uint64, tag = "2")]
    pub duration_us: u64,
}

/// Something failed in the guest.
#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    /// An [`crate::error::ErrorCode`] as text; the host treats an unknown one as `exec_failed`.
    #[prost(string, tag = "1")]
    pub code: String,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
    /// errno(3), or 0.
    #[prost(int32, tag = "3")]
    pub errno: i32,
    /// The step in which it failed, for a boot.
    #[prost(string, tag = "4")]
    pub stage: String,
}

/// vmm → agent: the host's wall clock, sent each minute and after the host slept.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ClockSync {
    /// Nanoseconds since 1970.
    #[prost(uint64, tag = "1")]
    pub realtime_ns: u64,
}

/// agent → vmm: everything is flushed, the reset that follows is a clean end.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Goodbye {}

/// vmm → agent: the goodbye is recorded.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct GoodbyeAck {}

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

/// vmm → agent on the link: the machine is about to be saved. The workload is frozen until [`Thaw`], or until [`Renew`] in a machine
/// made of what was saved; without the link too.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Quiesce {
    /// Whether everything held back goes to the disks first.
    #[prost(bool, tag = "1")]
    pub flush: bool,
}

/// agent → vmm, the answer: nothing of the workload runs, or why it still does.
#[derive(Clone, PartialEq, Message)]
pub struct Quiesced {
    /// Empty, or why not.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// vmm → agent on the link: the saving is over, the workload goes on.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Thaw {}

/// vmm → agent, a stream in a machine that was made of a saved one: it becomes the agent link in place of the lost one. The agent
/// renews what must not be there twice (boot id, clock, entropy, host name), answers `Opened` and `Ready`, and then lets the workload go on.
#[derive(Clone, PartialEq, Message)]
pub struct Renew {
    /// As at a boot. Of the configuration only host name, hosts and name servers are taken over.
    #[prost(message, optional, boxed, tag = "1")]
    pub welcome: Option<Box<Welcome>>,
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
}

/// guest → host on the control stream, each second.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Beat {
    /// Counts from 1 in each boot.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// Time since the kernel's start in milliseconds.
    #[prost(uint64, tag = "2")]
    pub uptime_ms: u64,
    /// Sessions whose process lives, the main workload not counted.
    #[prost(uint32, tag = "3")]
    pub sessions: u32,
    /// Memory in use in bytes (total less available).
    #[prost(uint64, tag = "4")]
    pub memory_used_bytes: u64,
    /// Memory the guest's kernel has in bytes.
    #[prost(uint64, tag = "5")]
    pub memory_total_bytes: u64,
    /// Bytes used on the writable root.
    #[prost(uint64, tag = "6")]
    pub root_used_bytes: u64,
    /// Bytes free on the writable root.
    #[prost(uint64, tag = "7")]
    pub root_free_bytes: u64,
    /// Load average of one minute, in hundredths.
    #[prost(uint32, tag = "8")]
    pub load_hundredths: u32,
    /// Processes in the workload's cgroup.
    #[prost(uint32, tag = "9")]
    pub processes: u32,
}

/// host → guest.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Ping {
    /// Comes back in [`Pong`].
    #[prost(uint64, tag = "1")]
    pub token: u64,
}

/// guest → host.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Pong {
    /// From [`Ping`].
    #[prost(uint64, tag = "1")]
    pub token: u64,
}

/// host → guest on the control stream: end everything, flush, say goodbye, turn off.
#[derive(Clone, PartialEq, Message)]
pub struct Shutdown {
    /// Time between the stop signal and the kill in milliseconds.
    #[prost(uint64, tag = "1")]
    pub grace_ms: u64,
    /// Signal in place of [`MainConfig::stop_signal`]; 0: that one.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// Command to run before, inside the guest; empty: none.
    #[prost(string, repeated, tag = "3")]
    pub pre_stop: Vec<String>,
    /// Time budget of `pre_stop` in milliseconds.
    #[prost(uint64, tag = "4")]
    pub pre_stop_budget_ms: u64,
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

/// agent → vmm: a line of the agent's own log.
#[derive(Clone, PartialEq, Message)]
pub struct Log {
    /// One line without its end.
    #[prost(string, tag = "1")]
    pub line: String,
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

impl From<Failure> for crate::error::ApiError {
    fn from(failure: Failure) -> Self {
        use crate::error::ErrorCode;
        let code = ErrorCode::from_name(&failure.code).unwrap_or(ErrorCode::ExecFailed);
        // The guest is hostile: its text is cut and stripped of what could drive a terminal.
        let message: String = failure.message.chars().filter(|c| !c.is_control()).take(2048).collect();
        Self::new(code, message)
    }
}

impl From<HostBody> for HostMessage {
    fn from(body: HostBody) -> Self {
        Self { body: Some(body) }
    }
}

impl From<GuestBody> for GuestMessage {
    fn from(body: GuestBody) -> Self {
        Self { body: Some(body) }
    }
}

/// Appends the frames of one message of the host: one, or parts if it does not fit.
///
/// # Errors
/// [`FrameError::TooLong`] above [`MESSAGE_LEN_MAX`].
pub fn encode_host(body: HostBody, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_parts(&HostMessage::from(body), out, |part| HostMessage::from(HostBody::Part(part)))
}

/// Appends the frames of one message of the guest: one, or parts if it does not fit.
///
/// # Errors
/// [`FrameError::TooLong`] above [`MESSAGE_LEN_MAX`].
pub fn encode_guest(body: GuestBody, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_parts(&GuestMessage::from(body), out, |part| GuestMessage::from(GuestBody::Part(part)))
}

fn encode_parts<M: Message>(message: &M, out: &mut Vec<u8>, wrap: impl Fn(Part) -> M) -> Result<(), FrameError> {
    let len = message.encoded_len();
    if len <= frame::FRAME_LEN_MAX {
        return frame::encode_message(message, out);
    }
    if len > MESSAGE_LEN_MAX {
        return Err(FrameError::TooLong { len });
    }
    let whole = message.encode_to_vec();
    let mut pieces = whole.chunks(frame::FRAME_LEN_MAX / 2).peekable();
    while let Some(piece) = pieces.next() {
        let part = Part { data: piece.to_vec(), last: pieces.peek().is_none() };
        frame::encode_message(&wrap(part), out)?;
    }
    Ok(())
}

/// Puts parts together again. One for each direction of each stream.
#[derive(Debug, Default)]
pub struct Assembler {
    waiting: Vec<u8>,
}

impl Assembler {
    /// An assembler with nothing waiting.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the next body begins a message: one between the parts of another cannot be understood.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes one frame's body from the host; gives the message when it is whole.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] for what is no message or holds none, [`FrameError::TooLong`] for parts beyond the limit.
    pub fn host(&mut self, body: &[u8]) -> Result<Option<HostBody>, FrameError> {
        match frame::decode_message::<HostMessage>(body)?.body {
            Some(HostBody::Part(part)) => match self.take(part)? {
                Some(whole) => match frame::decode_message::<HostMessage>(&whole)?.body {
                    Some(HostBody::Part(_)) | None => Err(FrameError::Malformed),
                    body => Ok(body),
                },
                None => Ok(None),
            },
            body => self.whole(body),
        }
    }

    /// Takes one frame's body from the guest; gives the message when it is whole.
    ///
    /// # Errors
    /// As [`Assembler::host`].
    pub fn guest(&mut self, body: &[u8]) -> Result<Option<GuestBody>, FrameError> {
        match frame::decode_message::<GuestMessage>(body)?.body {
            Some(GuestBody::Part(part)) => match self.take(part)? {
                Some(whole) => match frame::decode_message::<GuestMessage>(&whole)?.body {
                    Some(GuestBody::Part(_)) | None => Err(FrameError::Malformed),
                    body => Ok(body),
                },
                None => Ok(None),
            },
            body => self.whole(body),
        }
    }

    fn take(&mut self, part: Part) -> Result<Option<Vec<u8>>, FrameError> {
        let len = self.waiting.len() + part.data.len();
        if len > MESSAGE_LEN_MAX {
            self.waiting = Vec::new();
            return Err(FrameError::TooLong { len });
        }
        self.waiting.extend_from_slice(&part.data);
        Ok(part.last.then(|| std::mem::take(&mut self.waiting)))
    }

    fn whole<B>(&self, body: Option<B>) -> Result<Option<B>, FrameError> {
        // A message between the parts of another, or one this build does not know, cannot be understood.
        if self.waiting.is_empty() && body.is_some() { Ok(body) } else { Err(FrameError::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Decoder;

    fn config_of(len: usize) -> HostBody {
        let env = vec![EnvVar { name: "BIG".into(), value: "x".repeat(len) }];
        HostBody::Welcome(Welcome { config: Some(GuestConfig { env, ..Default::default() }), ..Default::default() })
    }

    fn through_the_wire(body: HostBody) -> (usize, HostBody) {
        let mut wire = Vec::new();
        encode_host(body, &mut wire).unwrap();
        let (mut decoder, mut assembler, mut frames) = (Decoder::new(), Assembler::new(), 0);
        decoder.push(&wire);
        loop {
            let body = decoder.next_body().unwrap().expect("a whole message");
            frames += 1;
            if let Some(message) = assembler.host(body).unwrap() {
                decoder.finish().unwrap();
                return (frames, message);
            }
        }
    }

    #[test]
    fn small_messages_are_one_frame_and_large_ones_are_parts() {
        let small = config_of(10);
        assert_eq!(through_the_wire(small.clone()), (1, small));
        let large = config_of((3 << 20) / 2);
        let (frames, message) = through_the_wire(large.clone());
        assert!(frames > 1);
        assert_eq!(message, large);
    }

    #[test]
    fn parts_beyond_the_limit_are_refused_by_both_ends() {
        let mut wire = Vec::new();
        assert!(matches!(encode_host(config_of(MESSAGE_LEN_MAX), &mut wire), Err(FrameError::TooLong { .. })));
        let mut assembler = Assembler::new();
        let part = HostMessage::from(HostBody::Part(Part { data: vec![0; 512 << 10], last: false })).encode_to_vec();
        let outcome = (0..9).map(|_| assembler.host(&part)).find(Result::is_err);
        assert!(matches!(outcome, Some(Err(FrameError::TooLong { .. }))));
    }

    #[test]
    fn a_message_between_parts_and_an_empty_message_are_malformed() {
        let mut assembler = Assembler::new();
        assert_eq!(assembler.host(&[]), Err(FrameError::Malformed));
        let part = HostMessage::from(HostBody::Part(Part { data: vec![1], last: false })).encode_to_vec();
        assert_eq!(assembler.host(&part), Ok(None));
        let ping = HostMessage::from(HostBody::Ping(Ping { token: 1 })).encode_to_vec();
        assert_eq!(assembler.host(&ping), Err(FrameError::Malformed));
    }

    #[test]
    fn a_guest_failure_cannot_drive_a_terminal() {
        let failure =
            Failure { code: "exec_not_found".into(), message: "\u{1b}[2Jgone\n".into(), ..Default::default() };
        let error = crate::error::ApiError::from(failure);
        assert_eq!(error.code, crate::error::ErrorCode::ExecNotFound);
        assert_eq!(error.message, "[2Jgone");
        let unknown = Failure { code: "from_the_future".into(), ..Default::default() };
        assert_eq!(crate::error::ApiError::from(unknown).code, crate::error::ErrorCode::ExecFailed);
    }
}
