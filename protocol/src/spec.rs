//! What a sandbox is made of, as its creator asked for it. Stored in the journal, so fields are only ever added, each with
//! a default; a spec of an older version always loads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::health::{HealthCheck, PreStop};
use crate::id::SandboxName;
use crate::labels;
use crate::mount::{self, Mount, MountSource, Patch};
use crate::network::NetworkSpec;
use crate::security::SecurityProfile;

/// The version this build writes.
pub const SPEC_VERSION: u32 = 1;
/// Most virtual CPUs.
pub const CPUS_MAX: u32 = 32;
/// Least memory in MiB: the kernel, the agent and a small workload.
pub const MEMORY_MIB_MIN: u32 = 64;
/// Most memory in MiB.
pub const MEMORY_MIB_MAX: u32 = 64 << 10;
/// Memory in MiB when nobody says.
pub const MEMORY_MIB_DEFAULT: u32 = 512;
/// Size of the writable root in MiB when nobody says. It is sparse: an empty one takes a few MiB of the host.
pub const ROOT_SIZE_MIB_DEFAULT: u32 = 8 << 10;
/// Least size of the writable root in MiB.
pub const ROOT_SIZE_MIB_MIN: u32 = 256;
/// Most size of the writable root in MiB.
pub const ROOT_SIZE_MIB_MAX: u32 = 1 << 20;
/// Time between the stop signal and the kill in milliseconds when nobody says (docker has 10,000).
pub const STOP_GRACE_MS_DEFAULT: u64 = 8_000;
/// Longest single environment variable, `NAME=value`, in bytes: execve(2) takes no longer string (`MAX_ARG_STRLEN` less its zero byte).
pub const ENV_VAR_LEN_MAX: usize = (128 << 10) - 1;
/// Largest environment in bytes, all of it.
pub const ENV_LEN_MAX: usize = (3 << 20) / 2;
/// Most words of a command.
pub const ARGV_COUNT_MAX: usize = 4096;

/// Which engine runs the virtual machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineChoice {
    /// `kvm` where the host's KVM passes the probe, else `qemu`.
    #[default]
    Auto,
    /// msb's own VMM on hardware virtualisation.
    Kvm,
    /// QEMU's software emulation: slow, and not a security boundary.
    Qemu,
}

impl EngineChoice {
    /// The choice as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// What follows when the main workload ends by itself, as docker's `--restart`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "policy")]
pub enum RestartPolicy {
    /// A crash of the VM restarts a detached sandbox within its budget; a workload's own exit ends it.
    #[default]
    Default,
    /// Nothing is ever restarted.
    No,
    /// Restart when the workload fails, at most `max_retries` times in a row if given.
    OnFailure {
        /// Most restarts in a row.
        max_retries: Option<u32>,
    },
    /// Always, also after a reboot of the host, until somebody stops it (it comes back with the daemon even then).
    Always,
    /// Always, but not once somebody has stopped it.
    UnlessStopped,
}

/// What follows an idle timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnIdle {
    /// Sleep until somebody needs it.
    #[default]
    Stop,
    /// Start again at once, with a new boot id.
    Restart,
    /// Sleep with its memory on disk and go on from it when somebody needs it. Engine kvm.
    Suspend,
}

/// What the read-only part of a sandbox's root is: what `image` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RootKind {
    /// An image of the store, by its reference.
    #[default]
    Image,
    /// A directory of the host, by its absolute path without links. The sandbox changes nothing of it.
    Directory,
    /// A raw disk with an ext4 or EROFS file system, by its absolute path without links. The sandbox changes nothing of it.
    Disk,
}

impl RootKind {
    /// Whether it is the host's own and has neither digest nor configuration.
    #[must_use]
    pub fn is_local(self) -> bool {
        self != Self::Image
    }
}

/// Whether there is a main workload and what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// `msb create` without a command: boot and wait.
    #[default]
    None,
    /// The command of the spec, or the image's entrypoint and cmd. Its end is the sandbox's end.
    Main,
}

/// Resources of setrlimit(2), by their names without `RLIMIT_`.
pub const RLIMIT_NAMES: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// A resource limit of a process (setrlimit(2)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rlimit {
    /// Name without `RLIMIT_`, lower case: `nofile`.
    pub resource: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// What a sandbox is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxSpec {
    /// The version of this structure that wrote it.
    #[serde(default = "spec_version")]
    pub spec_version: u32,
    /// Its name; the daemon makes one when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SandboxName>,
    /// The image as the user wrote it, or the path of what its root is in place of one.
    pub image: String,
    /// What `image` names.
    #[serde(default, skip_serializing_if = "is_default")]
    pub root: RootKind,
    /// The snapshot whose disk it begins with, in place of an empty one; the image is then the snapshot's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub snapshot: Option<SandboxName>,
    /// Virtual CPUs, 1 to [`CPUS_MAX`].
    #[serde(default = "one")]
    pub cpus: u32,
    /// Memory of the guest in MiB.
    #[serde(default = "memory_mib_default")]
    pub memory_mib: u32,
    /// Size of the writable root in MiB.
    #[serde(default = "root_size_mib_default")]
    pub root_size_mib: u32,
    /// Environment over the image's own.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Labels over the image's own.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Working directory in place of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// `USER|UID[:GROUP|GID]` in place of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Hostname in place of the sandbox's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Entrypoint in place of the image's; an empty list removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Command in place of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Whether there is a main workload.
    #[serde(default)]
    pub workload: Workload,
    /// Whether the main workload's standard input is kept open for whoever attaches.
    #[serde(default)]
    pub stdin_open: bool,
    /// Whether the main workload has a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Resource limits of every process msb starts in it.
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// Signal that asks the main workload to stop, name or number, in place of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Time between that signal and the kill in milliseconds.
    #[serde(default = "stop_grace_ms_default")]
    pub stop_grace_ms: u64,
    /// Whether it outlives the process that created it.
    #[serde(default)]
    pub detached: bool,
    /// Whether it is removed when it ends (`--rm`, unnamed `run`).
    #[serde(default)]
    pub ephemeral: bool,
    /// Which engine.
    #[serde(default)]
    pub engine: EngineChoice,
    /// A kernel file in place of the installed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// What follows its end.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Time without activity after which it is stopped, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_ms: Option<u64>,
    /// What follows an idle stop.
    #[serde(default)]
    pub on_idle: OnIdle,
    /// Longest time one run may take, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_duration_ms: Option<u64>,
    /// Its network: what it may reach, published ports, name servers.
    #[serde(default)]
    pub network: NetworkSpec,
    /// What its workloads may do.
    #[serde(default)]
    pub security: SecurityProfile,
    /// What is mounted in it besides its root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Changes of its root before the first workload of each run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub patches: Vec<Patch>,
    /// What says whether its workload is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// What runs before its workload is asked to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<PreStop>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
fn spec_version() -> u32 {
    SPEC_VERSION
}
fn one() -> u32 {
    1
}
fn memory_mib_default() -> u32 {
    MEMORY_MIB_DEFAULT
}
fn root_size_mib_default() -> u32 {
    ROOT_SIZE_MIB_DEFAULT
}
fn stop_grace_ms_default() -> u64 {
    STOP_GRACE_MS_DEFAULT
}

impl SandboxSpec {
    /// A spec of an image with every default.
    #[must_use]
    pub fn new(image: impl Into<String>) -> Self {
        Self {
            spec_version: SPEC_VERSION,
            name: None,
            image: image.into(),
            root: RootKind::Image,
            snapshot: None,
            cpus: 1,
            memory_mib: MEMORY_MIB_DEFAULT,
            root_size_mib: ROOT_SIZE_MIB_DEFAULT,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            workdir: None,
            user: None,
            hostname: None,
            entrypoint: None,
            command: None,
            workload: Workload::None,
            stdin_open: false,
            tty: false,
            rlimits: Vec::new(),
            stop_signal: None,
            stop_grace_ms: STOP_GRACE_MS_DEFAULT,
            detached: false,
            ephemeral: false,
            engine: EngineChoice::Auto,
            kernel: None,
            restart: RestartPolicy::Default,
            idle_timeout_ms: None,
            on_idle: OnIdle::Stop,
            max_duration_ms: None,
            network: NetworkSpec::default(),
            security: SecurityProfile::Default,
            mounts: Vec::new(),
            patches: Vec::new(),
            health: None,
            pre_stop: None,
        }
    }

    /// What of it a snapshot keeps: what the workload sees and how large the machine is. Nothing of the host (mounts, ports, network
    /// policy, kernel) and nothing that made the old sandbox that one (name, hostname, labels, how it lives and ends).
    #[must_use]
    pub fn for_snapshot(&self) -> Self {
        Self {
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            root_size_mib: self.root_size_mib,
            env: self.env.clone(),
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            entrypoint: self.entrypoint.clone(),
            command: self.command.clone(),
            rlimits: self.rlimits.clone(),
            stop_signal: self.stop_signal.clone(),
            stop_grace_ms: self.stop_grace_ms,
            security: self.security,
            ..Self::new(&self.image)
        }
    }

    /// Checks everything that can be checked without the image and the host. The SDK calls it before any request and
    /// the daemon again, because a client is not trusted.
    ///
    /// # Errors
    /// `invalid_config` or `invalid_label`, naming the value.
    pub fn check(&self) -> Result<(), ApiError> {
        let refuse = |message: String| Err(ApiError::new(ErrorCode::InvalidConfig, message));
        if self.spec_version == 0 || self.spec_version > SPEC_VERSION {
            return refuse(format!("spec version {} is unknown (this msb writes {SPEC_VERSION})", self.spec_version));
        }
        if self.image.is_empty() || self.image.len() > 4096 {
            return refuse("image must be 1 to 4096 bytes".into());
        }
        if self.root.is_local() {
            if !self.image.starts_with('/') || self.image.contains('\0') {
                return refuse(format!("the root {:?} must be an absolute path", self.image));
            }
            if self.snapshot.is_some() {
                return refuse("a snapshot brings its own image; leave the root out".into());
            }
        }
        if self.cpus == 0 {
            return refuse("cpus must be greater than 0".into());
        }
        if self.cpus > CPUS_MAX {
            return refuse(format!("cpus must be at most {CPUS_MAX}"));
        }
        if self.memory_mib == 0 {
            return refuse("memory must be greater than 0".into());
        }
        if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&self.memory_mib) {
            return refuse(format!("memory must be {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} MiB"));
        }
        if !(ROOT_SIZE_MIB_MIN..=ROOT_SIZE_MIB_MAX).contains(&self.root_size_mib) {
            return refuse(format!("root size must be {ROOT_SIZE_MIB_MIN} to {ROOT_SIZE_MIB_MAX} MiB"));
        }
        self.health.as_ref().map_or(Ok(()), HealthCheck::check)?;
        self.pre_stop.as_ref().map_or(Ok(()), PreStop::check)?;
        check_env(&self.env)?;
        labels::check_all(&self.labels)?;
        for words in [&self.command, &self.entrypoint].into_iter().flatten() {
            check_argv(words)?;
        }
        if let Some(workdir) = &self.workdir
            && (!workdir.starts_with('/') || workdir.contains('\0') || workdir.len() > 4096)
        {
            return refuse(format!("workdir {workdir:?} must be an absolute path of at most 4096 bytes"));
        }
        if let Some(hostname) = &self.hostname {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
            if hostname.is_empty() || hostname.len() > 64 || !hostname.bytes().all(allowed) {
                return refuse(format!("hostname {hostname:?} must be 1 to 64 letters, digits, '-' or '.'"));
            }
        }
        if let Some(user) = &self.user
            && (user.is_empty() || user.len() > 256 || user.contains(['\0', '\n']))
        {
            return refuse(format!("user {user:?} must be USER|UID[:GROUP|GID]"));
        }
        mount::check_mounts(&self.mounts)?;
        mount::check_patches(&self.patches)?;
        if self.on_idle == OnIdle::Suspend {
            self.check_suspension()?;
        }
        if self.snapshot.is_some() && !self.patches.is_empty() {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                "patches and a snapshot exclude each other: patches say how a fresh root is to be, a snapshot's root has been lived in",
            )
            .with_hint("patch the sandbox before the snapshot is taken, or copy files into the new one"));
        }
        self.security.check_command(self.command.as_deref().unwrap_or_default())?;
        self.network.check()
    }

    /// Whether its memory can be kept while it sleeps.
    fn check_suspension(&self) -> Result<(), ApiError> {
        if self.engine == EngineChoice::Qemu {
            return Err(Self::no_suspension());
        }
        let refuse = |what: &str| {
            let message = format!("a sandbox with {what} cannot sleep with its memory (on_idle suspend)");
            Err(ApiError::new(ErrorCode::InvalidConfig, message)
                .with_hint("what is shared with the host or with others cannot be kept with it; on_idle stop can"))
        };
        // Memory of the guest is a part of it.
        if let Some(mount) = self.mounts.iter().find(|mount| !matches!(mount.source, MountSource::Tmpfs { .. })) {
            return refuse(&format!("a mount ({mount})"));
        }
        if self.root.is_local() {
            return refuse("a root of the host's");
        }
        Ok(())
    }

    /// Why a sandbox on engine qemu cannot sleep with its memory.
    #[must_use]
    pub fn no_suspension() -> ApiError {
        ApiError::new(
            ErrorCode::UnsupportedOperation,
            "engine qemu cannot keep a sandbox's memory while it sleeps (on_idle suspend)",
        )
        .with_hint("this needs engine kvm: `msb doctor` says what it lacks on this host")
    }
}

/// Checks an environment against what execve(2) can take.
///
/// # Errors
/// `invalid_config` naming the variable, never its value.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let refuse = |message: String| Err(ApiError::new(ErrorCode::InvalidConfig, message));
    let mut total = 0usize;
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return refuse(format!("environment variable name {name:?} is empty or has '=' or a zero byte"));
        }
        if value.contains('\0') {
            return refuse(format!("environment variable {name} has a zero byte in its value"));
        }
        let len = name.len() + 1 + value.len();
        if len > ENV_VAR_LEN_MAX {
            return refuse(format!(
                "environment variable {name} is too long: {len} bytes (max {ENV_VAR_LEN_MAX}, a limit of Linux)"
            ));
        }
        total += len + 1;
    }
    if total > ENV_LEN_MAX {
        return refuse(format!("the environment is too large: {total} bytes (max {ENV_LEN_MAX})"));
    }
    Ok(())
}

/// Checks the words of a command.
///
/// # Errors
/// `invalid_config`.
pub fn check_argv(words: &[String]) -> Result<(), ApiError> {
    let refuse = |message: &str| Err(ApiError::new(ErrorCode::InvalidConfig, message));
    if words.len() > ARGV_COUNT_MAX {
        return refuse("a command has at most 4096 words");
    }
    if words.iter().any(|word| word.contains('\0')) {
        return refuse("a word of the command has a zero byte");
    }
    if words.iter().any(|word| word.len() > ENV_VAR_LEN_MAX) {
        return refuse("a word of the command is longer than Linux takes (131071 bytes)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_cpus_and_zero_memory_have_their_own_messages() {
        let message = |edit: fn(&mut SandboxSpec)| {
            let mut spec = SandboxSpec::new("busybox");
            edit(&mut spec);
            spec.check().unwrap_err().message
        };
        assert_eq!(message(|s| s.cpus = 0), "cpus must be greater than 0");
        assert_eq!(message(|s| s.memory_mib = 0), "memory must be greater than 0");
        assert!(message(|s| s.cpus = CPUS_MAX + 1).contains("at most"));
        assert!(message(|s| s.memory_mib = MEMORY_MIB_MIN - 1).contains("64"));
        assert!(message(|s| s.memory_mib = MEMORY_MIB_MAX + 1).contains("65536"));
        assert!(message(|s| s.workdir = Some("relative".into())).contains("absolute"));
        assert!(message(|s| s.hostname = Some("a_b".into())).contains("hostname"));
        assert!(message(|s| s.command = Some(vec!["a\0b".into()])).contains("zero byte"));
    }

    #[test]
    fn the_environment_has_room_for_a_mebibyte_and_a_hundred_kibibyte_variable() {
        let mut spec = SandboxSpec::new("busybox");
        spec.env = (0..10).map(|i| (format!("V{i}"), "x".repeat(100 << 10))).collect();
        spec.env.insert("LONGEST".into(), "x".repeat(ENV_VAR_LEN_MAX - 8));
        spec.check().unwrap();
        spec.env.insert("LONGEST".into(), "x".repeat(ENV_VAR_LEN_MAX - 7));
        let error = spec.check().unwrap_err();
        assert!(error.message.contains("LONGEST") && !error.message.contains("xx"));
    }

    #[test]
    fn a_minimal_document_is_a_whole_spec_and_unknown_fields_are_refused() {
        let spec: SandboxSpec = serde_json::from_str(r#"{"image":"busybox"}"#).unwrap();
        assert_eq!(spec, SandboxSpec::new("busybox"));
        let back: SandboxSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(back, spec);
        assert!(serde_json::from_str::<SandboxSpec>(r#"{"image":"busybox","cpu":2}"#).is_err());
    }
}
