//! The control stream: beats, questions whether the agent is there, and the end of the machine. Part of the guest border ([`super`]).

use prost::Message;

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
