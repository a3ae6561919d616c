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

mod boot;
mod control;
mod parts;
mod session;

use prost::{Message, Oneof};

pub use boot::{
    AgentHello, ClockSync, Failure, Goodbye, GoodbyeAck, GuestConfig, GuestMount, GuestMountSource, GuestNetwork,
    GuestPatch, GuestPatchKind, Log, MainConfig, Quiesce, Quiesced, Ready, Renew, Step, Thaw, Welcome,
};
pub use control::{Beat, Ping, Pong, Shutdown};
pub use parts::{Assembler, Part, encode_guest, encode_host};
pub use session::{
    Data, EnvVar, ExecConfig, Exited, Open, OpenAttach, OpenControl, OpenKind, OpenMain, OpenSftp, OpenTcp, Opened,
    Output, OutputLost, OutputStream, ResourceLimit, Signal, Started, StdinCredit, StdinEof, TerminalSize,
};

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
    #[prost(oneof = "HostBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20")]
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
    #[prost(message, tag = "14")]
    Renew(Renew),
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
