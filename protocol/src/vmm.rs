//! The VMM border: what `msbd` and `msb-vmm` say to each other on a sandbox's control socket.
//!
//! Frames ([`crate::frame`]) with JSON bodies. The first connection is the socketpair that `msb-vmm` got as its standard
//! input; it begins with [`Request::Launch`], before which [`Request::MakeVm`] or [`Request::StandBy`] may come. A daemon that was restarted connects to
//! `<run>/control.sock` and begins with [`Request::Adopt`]. The newest connection gets the events. `msb-vmm` lives on when every connection is gone.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::guest::GuestConfig;
use crate::id::{BootId, SandboxId, SandboxName};
use crate::network::{PORTS_COUNT_MAX, VmNetwork};
use crate::spec::EngineChoice;
use crate::state::{EndCause, ProcessEnd};

mod sample;

pub use sample::{
    NETWORK_COUNTS_MAX, NetworkCount, NetworkCounts, NetworkName, NetworkNames, Sample, SampleDecoder, SampleEncoder,
    SampleFigures,
};

/// File name of the control socket in the run directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// File name of the vsock socket in the run directory: `CONNECT <port>\n`, then `OK <port>\n`, then bytes.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// File name of the record that `msb-vmm` leaves in the run directory when it ends ([`EndRecord`], JSON).
pub const END_FILE: &str = "end.json";
/// File name of the evidence of a failed boot in the log directory ([`BootError`], JSON).
pub const BOOT_ERROR_FILE: &str = "boot-error.json";
/// File name of the main workload's log in the log directory: lines of `LogRecord`; rotated ones end in `.1` (newest), `.2`…
pub const WORKLOAD_LOG_FILE: &str = "workload.jsonl";
/// File name of what `msb-vmm` itself says, in the log directory.
pub const VMM_LOG_FILE: &str = "vmm.log";
/// File name of the guest's console output in the log directory: raw bytes; rotated as the workload's log.
pub const CONSOLE_LOG_FILE: &str = "console.log";
/// File name of the network's decision log in the log directory: JSON lines; rotated as the workload's log.
pub const DECISION_LOG_FILE: &str = "network.jsonl";
/// Most descriptors of a launch: the listeners of published ports, and a log.
pub const LAUNCH_DESCRIPTORS_MAX: usize = PORTS_COUNT_MAX + 1;
/// virtio serial of the read-only root.
pub const LOWER_SERIAL: &str = "root";
/// Name of the share that is the read-only root where that is a directory of the host.
pub const LOWER_SHARE: &str = "root";
/// virtio serial of the writable disk.
pub const UPPER_SERIAL: &str = "upper";

/// msbd → msb-vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestFrame {
    /// Comes back in [`Message::Reply`].
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What the daemon asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Before a first `Launch`: a machine will be wanted soon, so begin what every machine needs. Not answered; the process ends when the connection
    /// does before the launch.
    MakeVm,
    /// In place of a first `Launch`: restore this machine, and renew it, but let nothing of its workload run. It is answered when the machine
    /// stands; it is halted soon after. The launch that comes then must take it over ([`VmSpec::takes_over`]); the process ends when the connection
    /// does before that.
    StandBy(Box<VmSpec>),
    /// First on the first connection: boot this. The listeners of its published ports come along, and behind them its log ([`VMM_LOG_FILE`]) if the
    /// process was told to [`Request::MakeVm`], which its output goes to from then on.
    Launch {
        /// What to boot.
        spec: Box<VmSpec>,
    },
    /// First on a later connection: tell me what you are and send me your events. Duplicates of the published ports' listeners come
    /// with the answer, in their order.
    Adopt {
        /// The daemon's generation of this border.
        generation: u32,
    },
    /// What you are now.
    Status,
    /// End now, without a flush, and record this cause.
    Kill {
        /// What to record.
        cause: EndCause,
    },
    /// Halt the vCPUs; answered once none runs. Engine kvm, once the agent is ready. Since generation 2.
    Pause,
    /// Let them go on. Since generation 2.
    Resume,
    /// Write the machine down: its workload is frozen, its vCPUs and devices stand, its memory goes into the first of two descriptors that
    /// come along, everything else into the second. Answered with everything standing still, so that its disks can be copied; it goes on with
    /// `Release`, or when this connection ends. Engine kvm, once the agent is ready. Since generation 3.
    Save {
        /// Whether the guest first writes to its disks what it holds back.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        flush: bool,
    },
    /// Let the machine that was written down go on. Since generation 3.
    Release,
    /// The daemon has begun a stop: record this cause when the guest says goodbye.
    ExpectEnd {
        /// What to record.
        cause: EndCause,
    },
    /// The end of the console's output.
    ConsoleTail {
        /// At most this many bytes.
        bytes_max: u32,
    },
    /// Counters of the devices and vCPUs.
    Sample,
    /// Which network rule would decide about a target; nothing is sent.
    ExplainNetwork {
        /// A URL, `NAME:PORT`, `ADDRESS:PORT`, `udp://…` or `icmp://…`.
        target: String,
    },
    /// From now on, a `Sample` event on this connection at each interval.
    Subscribe {
        /// Time between two samples in milliseconds; 0 ends them.
        sample_interval_ms: u64,
        /// Whether they may come in their compact form ([`SampleDecoder`] reads both). An older VM process does not
        /// know it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        compact: bool,
    },
}

/// msb-vmm → msbd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Message {
    /// Answer to the request of this id.
    Reply {
        /// The request's id.
        id: u64,
        /// The answer.
        #[serde(with = "reply_result")]
        result: Result<Reply, ApiError>,
    },
    /// Something happened.
    Event {
        /// What.
        event: Event,
    },
}

mod reply_result {
    use super::{ApiError, Deserialize, Reply, Serialize};
    use serde::{Deserializer, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Wire {
        Ok(Reply),
        Error(ApiError),
    }

    pub(super) fn serialize<S: Serializer>(result: &Result<Reply, ApiError>, serializer: S) -> Result<S::Ok, S::Error> {
        match result {
            Ok(reply) => Wire::Ok(reply.clone()).serialize(serializer),
            Err(error) => Wire::Error(error.clone()).serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Result<Reply, ApiError>, D::Error> {
        Ok(match Wire::deserialize(from)? {
            Wire::Ok(reply) => Ok(reply),
            Wire::Error(error) => Err(error),
        })
    }
}

/// What `msb-vmm` answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// To `Launch`, `Adopt` and `Status`.
    Status(Box<VmStatus>),
    /// To `ConsoleTail`.
    ConsoleTail {
        /// Lossy text, control characters but newline and tab removed.
        text: String,
    },
    /// To `Sample`.
    Sample(Box<Sample>),
    /// To `ExplainNetwork`.
    Explanation(Box<NetworkExplanation>),
}

/// What a VM process is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its generation of this border.
    pub generation: u32,
    /// Its version, for people.
    pub version: String,
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// This run.
    pub boot_id: BootId,
    /// Its process id on the host.
    pub pid: u32,
    /// The engine in use, never `auto`.
    pub engine: EngineChoice,
    /// Why this engine, when it was picked by `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_reason: Option<String>,
    /// Where it is.
    pub state: VmState,
    /// The guest generation of the agent, once it said hello.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_generation: Option<u32>,
    /// How the main workload ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_end: Option<ProcessEnd>,
    /// Whether the main workload was started.
    #[serde(default)]
    pub main_started: bool,
    /// Whether its vCPUs are halted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Phases so far.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// What confines this process and what the host could not give.
    #[serde(default)]
    pub jail: JailReport,
}

/// Where a VM process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Before the agent's hello.
    Booting,
    /// The agent sets the guest up.
    SettingUp,
    /// The agent is ready.
    Ready,
    /// The agent said goodbye.
    Ending,
}

/// What confines a VM process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JailReport {
    /// In force, one word or phrase each: `no_new_privs`, `seccomp`, `landlock abi 3`.
    pub in_force: Vec<String>,
    /// What the host could not give, each with its reason.
    pub missing: Vec<String>,
}

/// One phase of a boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Phase {
    /// Its name: `spawn`, `kernel_load`, `kernel`, `init`, `agent`, `ready`.
    pub name: String,
    /// Its duration in microseconds.
    pub duration_us: u64,
}

/// What happens in a VM process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent said hello.
    AgentHello {
        /// This run.
        boot_id: BootId,
        /// The agent's generation.
        generation: u32,
    },
    /// The guest is set up; streams to the agent can be opened.
    AgentReady {
        /// This run.
        boot_id: BootId,
        /// Every phase so far.
        phases: Vec<Phase>,
    },
    /// The main workload runs.
    MainStarted {
        /// This run.
        boot_id: BootId,
        /// Its process id in the guest.
        pid: u32,
    },
    /// The main workload ended.
    MainExited {
        /// This run.
        boot_id: BootId,
        /// How.
        end: ProcessEnd,
    },
    /// The host's disk is full, or has room again; writes of the guest wait meanwhile.
    HostDiskFull {
        /// This run.
        boot_id: BootId,
        /// Whether it is full now.
        full: bool,
    },
    /// The counters, to a connection that subscribed.
    Sampled {
        /// This run.
        boot_id: BootId,
        /// The counters.
        sample: Box<Sample>,
    },
    /// The VM ended; the process exits after this. Also in `end.json`.
    /// With it may come a descriptor (SCM_RIGHTS): what of the machine takes long to close, to be kept until the process is gone.
    Ended {
        /// The record.
        record: Box<EndRecord>,
    },
}

/// How a run ended, as `msb-vmm` leaves it behind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndRecord {
    /// The run.
    pub boot_id: BootId,
    /// Why.
    pub cause: EndCause,
    /// How the main workload ended, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_end: Option<ProcessEnd>,
    /// For people: what was seen.
    #[serde(default)]
    pub message: String,
    /// When, nanoseconds since 1970.
    pub at_ns: u64,
    /// The evidence, if the boot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_error: Option<BootError>,
    /// The counters at the end, if a machine ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<Box<Sample>>,
}

/// The evidence of a boot that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BootError {
    /// The run.
    pub boot_id: BootId,
    /// When, nanoseconds since 1970.
    pub at_ns: u64,
    /// Where it failed: `config`, `engine`, `kernel`, `agent`, `mount`, `setup`, `other`.
    pub stage: String,
    /// The error as users see it.
    pub error: ApiError,
    /// The end of the console's output, lossy and cleaned.
    pub console_tail: String,
}

/// What the policy of a network would say about a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkExplanation {
    /// Whether a connection would be allowed: `allow` or `deny`.
    pub action: String,
    /// Each decision on the way.
    pub steps: Vec<NetworkExplanationStep>,
}

/// One decision in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkExplanationStep {
    /// About what: `dns api.example.com`, `tcp 1.2.3.4:443 (public)`.
    pub about: String,
    /// `allow` or `deny`.
    pub action: String,
    /// What decided: `rule`, `profile_rule`, `default`, `encrypted_dns`.
    pub by: String,
    /// Place of the rule in its list, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Text of the rule, or `default`, or `encrypted-dns`.
    pub rule: String,
    /// The sentence for people.
    pub because: String,
}

/// What to boot. Made by an actor, turned into devices only by `msb-vmm`, which checks it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The daemon's generation of this border.
    pub generation: u32,
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// Its name, for logs and process titles.
    pub name: SandboxName,
    /// This run.
    pub boot_id: BootId,
    /// Which engine.
    pub engine: EngineChoice,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Kernel file: vmlinux or bzImage.
    pub kernel: PathBuf,
    /// Initramfs file, uncompressed cpio.
    pub initramfs: PathBuf,
    /// Words added to the kernel command line, for tests and debugging.
    #[serde(default)]
    pub cmdline_extra: Vec<String>,
    /// The read-only root: files of which the device is the concatenation, each with its length in bytes (multiples of 4096). None of
    /// them where a disk with the serial [`LOWER_SERIAL`] or a share with the name [`LOWER_SHARE`] takes the device's place.
    pub lower: Vec<DiskPart>,
    /// The writable disk, sparse.
    pub upper: PathBuf,
    /// Directory of sockets and `end.json`; exists, 0700.
    pub run_dir: PathBuf,
    /// Directory of logs; exists, 0700.
    pub log_dir: PathBuf,
    /// Size at which a log is rotated, in bytes.
    pub log_size_max_bytes: u64,
    /// Rotated logs kept.
    pub log_files_max: u32,
    /// What the agent gets.
    pub guest: GuestConfig,
    /// Time for the agent's hello and set-up, in milliseconds.
    pub boot_timeout_ms: u64,
    /// Time that writes wait for room on a full host disk before they fail, in milliseconds.
    pub disk_full_timeout_ms: u64,
    /// The QEMU program, if it is not the one in PATH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
    /// The network; none: loopback only. The listeners of its published ports come as descriptors with the launch, in their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<VmNetwork>,
    /// Directories and files of the host that the guest shares.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareSpec>,
    /// Go on with this machine in place of booting the kernel. Its disks, processors and memory are as they were; engine kvm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreSpec>,
    /// It must be possible to write the machine down: an engine that cannot is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspends: bool,
    /// Disks of volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
}

impl VmSpec {
    /// Whether a machine that stands by as `standing` can become this one: all is the same but whose it is, where its files are, its names, and
    /// the main workload, which has not begun.
    #[must_use]
    pub fn takes_over(&self, standing: &Self) -> bool {
        let named = Self {
            sandbox_id: standing.sandbox_id,
            name: standing.name.clone(),
            boot_id: standing.boot_id,
            upper: standing.upper.clone(),
            run_dir: standing.run_dir.clone(),
            log_dir: standing.log_dir.clone(),
            guest: GuestConfig {
                hostname: standing.guest.hostname.clone(),
                hosts: standing.guest.hosts.clone(),
                main: standing.guest.main.clone(),
                ..self.guest.clone()
            },
            boot_timeout_ms: standing.boot_timeout_ms,
            // Which one it is has been settled, and these ask for no other.
            engine: if self.engine == EngineChoice::Qemu { self.engine } else { standing.engine },
            suspends: standing.suspends,
            ..self.clone()
        };
        named == *standing
    }
}

/// A machine that was written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreSpec {
    /// Its memory.
    pub memory: PathBuf,
    /// Everything else.
    pub state: PathBuf,
    /// Where it is noted which pages of the memory are written first, by one machine for the next. A wish; made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<PathBuf>,
}

/// A shared directory or file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// Its name at the top of the guest's shared file system.
    pub name: String,
    /// Where it is on the host, an absolute path without links.
    pub path: PathBuf,
    /// Whether the guest may change nothing of it, whatever it mounts.
    pub read_only: bool,
    /// Whether the caller's files in it belong to the guest's root, whoever the guest's user is.
    #[serde(default)]
    pub is_root_owned: bool,
    /// What it may hold in bytes; none: whatever the host has room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
}

/// The disk of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its virtio serial, at most 20 bytes.
    pub serial: String,
    /// The raw image on the host.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// One file of the read-only root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// The file.
    pub path: PathBuf,
    /// Bytes of it that belong to the device.
    pub len_bytes: u64,
}

/// What `msb-vmm --probe` prints: which engine this host can run and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProbeReport {
    /// What `auto` picks; none if no engine works.
    pub engine: Option<EngineChoice>,
    /// One line: why.
    pub reason: String,
    /// Whether KVM can be used, and if not why not.
    pub kvm: ProbeOutcome,
    /// Whether QEMU can be used, and if not why not.
    pub qemu: ProbeOutcome,
    /// Guest instructions per second that the probe saw on KVM, in millions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm_million_instructions_per_second: Option<f64>,
}

/// One engine's part of a probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProbeOutcome {
    /// Whether it works.
    pub usable: bool,
    /// For people: the version, or why not and what to do.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;
    use crate::frame::{decode_json, encode_json};

    #[test]
    fn replies_and_errors_round_trip() {
        for result in [
            Ok(Reply::Done),
            Ok(Reply::ConsoleTail { text: "x".into() }),
            Err(ApiError::new(ErrorCode::DiskFull, "full")),
        ] {
            let message = Message::Reply { id: 7, result };
            let mut wire = Vec::new();
            encode_json(&message, &mut wire).unwrap();
            assert_eq!(decode_json::<Message>(&wire[4..]).unwrap(), message);
        }
    }
}
