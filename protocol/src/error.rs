//! The one table of errors that a user can meet: code, meaning, hint, whether a retry can help.
//!
//! Every program answers with [`ApiError`]; `docs/errors.md` and the SDKs' error types are generated from [`TABLE`].
//! A message never holds a secret: it names the thing, not its value.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! error_table {
    ($($variant:ident $code:literal $status:literal $retryable:literal $meaning:literal $hint:literal)*) => {
        /// The stable code of an error. Codes are added, never renamed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $(#[doc = $meaning] #[serde(rename = $code)] $variant,)*
        }

        /// Every error, in the order of the documentation.
        pub const TABLE: &[ErrorEntry] = &[
            $(ErrorEntry { code: ErrorCode::$variant, name: $code, http_status: $status, retryable: $retryable, meaning: $meaning, hint: $hint },)*
        ];
    };
}

/// One row of [`TABLE`].
#[derive(Clone, Copy, Debug)]
pub struct ErrorEntry {
    /// The code as an enum.
    pub code: ErrorCode,
    /// The code as text, snake_case.
    pub name: &'static str,
    /// The HTTP status of the control API (RFC 9110, section 15).
    pub http_status: u16,
    /// Whether the same request can succeed later without anything being changed by the caller.
    pub retryable: bool,
    /// What it means, one sentence without a final dot.
    pub meaning: &'static str,
    /// What to do, used when the place that raised the error had nothing better to say.
    pub hint: &'static str,
}

error_table! {
    InvalidConfig "invalid_config" 400 false "a value of the request or the configuration is not allowed" "correct the named value"
    InvalidName "invalid_name" 400 false "a name breaks the rule for names" "use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
    InvalidReference "invalid_reference" 400 false "an image reference cannot be parsed" "write it as [registry/]name[:tag] or name@sha256:digest"
    InvalidLabel "invalid_label" 400 false "a label breaks the rules for labels" "see docs/errors.md: keys 1 to 128 bytes, values up to 4096, 64 labels, no reserved prefix"
    InvalidSelector "invalid_selector" 400 false "a selector cannot be understood, or is empty where that would mean everything" "write it as in team in (ml,web),!debug,gpu"
    SelectionUnexpected "selection_unexpected" 409 false "a selection is not as large as --expect says" "look at it with --dry-run"
    InvalidRequest "invalid_request" 400 false "the request cannot be understood" "compare it with /openapi.json of this service"
    ConfigFile "config_file" 400 false "a configuration file has an unknown key or a wrong value" "correct the named line; `msb config show --origin` lists what is in force"
    NotImplemented "not_implemented" 501 false "this part of msb is not built yet" "`msb --help` lists what is there"
    UnsupportedOperation "unsupported_operation" 409 false "the other side is too old, or its engine cannot do this" "restart the sandbox so that it runs the installed version"
    SandboxNotFound "sandbox_not_found" 404 false "no sandbox has this name" "`msb ls` shows the ones that exist"
    SandboxAlreadyExists "sandbox_already_exists" 409 false "a sandbox of this name exists" "choose another name, remove it with `msb rm`, or use --replace"
    SandboxNotRunning "sandbox_not_running" 409 false "the sandbox is not running" "start it with `msb start`"
    SandboxPaused "sandbox_paused" 409 false "the sandbox is paused: nothing in it can answer" "let it go on with `msb resume`"
    SandboxStillRunning "sandbox_still_running" 409 false "the sandbox is running" "stop it with `msb stop`, or use --force"
    SandboxBusy "sandbox_busy" 409 true "another operation on the sandbox is under way" "try again in a moment"
    BootFailed "boot_failed" 500 true "the virtual machine did not come up" "`msb logs NAME` begins with what was seen"
    AgentTimeout "agent_timeout" 504 true "the guest's agent did not answer in time" "the kernel may lack CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES or vsock; see `msb logs NAME`"
    EngineUnavailable "engine_unavailable" 503 false "no engine can run a virtual machine here" "`msb doctor` says what is missing and how to install it"
    InvalidKernel "invalid_kernel" 400 false "the kernel file is not a kernel that this engine can boot" "give an x86_64 vmlinux (ELF) or bzImage with the options of docs/kernel.md"
    ImageNotFound "image_not_found" 404 false "no such image is in the store" "`msb image ls` shows the ones that are; load one with `msb image load -i FILE`"
    ImageInUse "image_in_use" 409 false "a sandbox or a snapshot uses the image" "remove the named sandboxes and snapshots first, or untag it with --force"
    InvalidArchive "invalid_archive" 400 false "the archive is damaged, hostile or of an unknown kind" "make it again with `docker save` or `skopeo copy`, and compare its checksum"
    DigestMismatch "digest_mismatch" 400 true "content does not have the digest that was promised for it" "fetch or make the image again"
    LimitExceeded "limit_exceeded" 413 false "an input is larger than the documented limit" "see the limits in docs/images.md"
    StoreCorrupt "store_corrupt" 500 false "the image store fails its own check" "`msb doctor --store` names the damaged part; load the image again"
    RegistryFailed "registry_failed" 502 true "the registry refused or broke off" "check the name, the credentials and the network"
    RegistryDenied "registry_denied" 401 false "the registry wants credentials, or other ones" "log in with `msb registry login REGISTRY`; a registry also answers so for an image that does not exist"
    DiskFull "disk_full" 507 true "a file system is full" "free space on the named file system, for example with `msb image prune`"
    PermissionDenied "permission_denied" 403 false "the operating system or msb's rules refuse this to you" "check owner and mode of the named path"
    HomeUnusable "home_unusable" 500 false "the home directory of msb cannot be used" "set MSB_HOME to a directory that is yours and writable"
    DaemonRunning "daemon_running" 409 false "another msbd serves this home directory" "use that one, or stop it first"
    DaemonUnavailable "daemon_unavailable" 503 true "no msbd answers and none could be started" "see the end of msbd.log in MSB_HOME, or run `msbd` in a terminal"
    PeerRefused "peer_refused" 403 false "the peer on the socket is another user" "use your own service, or join the group of the host service"
    ExecNotFound "exec_not_found" 404 false "the command does not exist in the sandbox" "check the path and PATH inside the sandbox"
    ExecNotExecutable "exec_not_executable" 400 false "the command exists but cannot be executed" "check its mode, its format and the interpreter it names"
    ExecFailed "exec_failed" 500 false "the command could not be started" "check working directory, user and limits"
    ExecLost "exec_lost" 502 true "the connection to a running command was lost; the sandbox itself goes on" "run it again"
    ExecTimeout "exec_timeout" 504 false "the command ran longer than its --timeout and was killed" "give it more time"
    CommandFailed "command_failed" 500 false "the command ran and ended with a failure" "see what it wrote to its standard error"
    UserNotFound "user_not_found" 400 false "the user or group does not exist in the image" "name one from the image's /etc/passwd or /etc/group, or use numbers"
    ConnectFailed "connect_failed" 502 true "a connection from inside the sandbox could not be made" "check name and port, and that something listens there"
    ConnectDenied "connect_denied" 403 false "the sandbox's network policy does not allow this connection" "allow it in the sandbox's network policy"
    VolumeNotFound "volume_not_found" 404 false "no volume has this name" "`msb volume ls` shows the ones that exist"
    VolumeAlreadyExists "volume_already_exists" 409 false "a volume of this name exists" "choose another name, or remove it with `msb volume rm`"
    VolumeInUse "volume_in_use" 409 false "a sandbox uses the volume" "remove the named sandboxes first; a disk has one writer at a time"
    SnapshotNotFound "snapshot_not_found" 404 false "no snapshot has this name" "`msb snapshot ls` shows the ones that exist"
    SnapshotAlreadyExists "snapshot_already_exists" 409 false "a snapshot of this name exists" "choose another name, or remove it with `msb snapshot rm`"
    SnapshotInUse "snapshot_in_use" 409 false "another snapshot was taken on top of this one" "remove the named snapshots first"
    SnapshotDamaged "snapshot_damaged" 500 false "the files of a snapshot are not what was written" "import it again, or remove it with `msb snapshot rm`; `msb snapshot verify` says what is wrong"
    PathNotFound "path_not_found" 404 false "a path does not exist" "check the path"
    PathExists "path_exists" 409 false "a path exists already, or a directory is not empty" "choose another path, or remove what is there"
    FileFailed "file_failed" 400 false "a file operation in the sandbox failed" "see errno: what the sandbox's system answered"
    PortInUse "port_in_use" 409 true "a port to publish is taken" "choose another host port, or 0 for any"
    CreatorUnwatchable "creator_unwatchable" 400 false "the creating process cannot be watched from here" "create the sandbox detached"
    RuntimeNotFound "runtime_not_found" 503 false "msb is not installed where the client looks" "install msb, or set MSB_PATH"
    Cancelled "cancelled" 499 true "the operation was cancelled" "start it again"
    Internal "internal" 500 false "msb itself failed" "please report it with `msb doctor --bundle`"
}

impl ErrorCode {
    /// The row of this code.
    #[must_use]
    pub fn entry(self) -> &'static ErrorEntry {
        // The macro writes one row per variant in the same order, and a test holds that.
        &TABLE[self as usize]
    }

    /// The code as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.entry().name
    }

    /// The code of a text, if this version knows it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.name == name).map(|row| row.code)
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as every program of msb reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error, utoipa::ToSchema)]
#[error("{message}")]
pub struct ApiError {
    /// The stable code.
    pub code: ErrorCode,
    /// What happened, for people.
    pub message: String,
    /// What to do about it.
    pub hint: String,
    /// Whether the same request can succeed later.
    pub retryable: bool,
    /// What belongs to the error beyond its text: names of sandboxes in use, the console's tail.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// errno(3) of the system call in the sandbox that failed, for a file operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

impl ApiError {
    /// An error with the table's own hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let row = code.entry();
        Self {
            code,
            message: message.into(),
            hint: row.hint.into(),
            retryable: row.retryable,
            details: Vec::new(),
            errno: None,
        }
    }

    /// Replaces the hint by a better one.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Adds what belongs to the error beyond its text.
    #[must_use]
    pub fn with_details(mut self, details: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(details);
        self
    }

    /// Adds the number the system gave.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.errno = Some(errno);
        self
    }

    /// `not_implemented` for a named part.
    pub fn not_implemented(part: &str) -> Self {
        Self::new(ErrorCode::NotImplemented, format!("{part} is not built yet"))
    }

    /// `internal`, for what only a defect of msb can cause.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Internal, message.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_finds_its_own_row_and_round_trips_through_json() {
        for row in TABLE {
            assert_eq!(row.code.entry().name, row.name);
            assert_eq!(ErrorCode::from_name(row.name), Some(row.code));
            let json = serde_json::to_string(&row.code).unwrap();
            assert_eq!(json, format!("\"{}\"", row.name));
            assert_eq!(serde_json::from_str::<ErrorCode>(&json).unwrap(), row.code);
        }
    }

    #[test]
    fn every_row_says_what_it_means_and_what_to_do() {
        for row in TABLE {
            assert!(row.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", row.name);
            assert!((400..600).contains(&row.http_status), "{}", row.name);
            for text in [row.meaning, row.hint] {
                assert!(!text.is_empty() && !text.ends_with('.'), "{}: {text:?}", row.name);
            }
        }
    }
}
