//! The agent link: who the agent is, what the machine is to become, how that went; and what a snapshot asks of it. Part of the guest border ([`super`]).

use prost::{Message, Oneof};

use super::{EnvVar, ExecConfig, ResourceLimit};

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
///
/// One that holds does all of this but the last: the machine stands by. A second one on the link, which does not hold, renews it again for
/// whoever takes it, and is answered with `Ready`.
#[derive(Clone, PartialEq, Message)]
pub struct Renew {
    /// As at a boot. Of the configuration only host name, hosts and name servers are taken over, and a main workload that is yet to come.
    #[prost(message, optional, boxed, tag = "1")]
    pub welcome: Option<Box<Welcome>>,
    /// The workload stays frozen.
    #[prost(bool, tag = "2")]
    pub holds: bool,
}

/// agent → vmm: a line of the agent's own log.
#[derive(Clone, PartialEq, Message)]
pub struct Log {
    /// One line without its end.
    #[prost(string, tag = "1")]
    pub line: String,
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

#[cfg(test)]
mod tests {
    use super::*;

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
