//! SSH: one connection, the host's key, who may log in. Part of the control API ([`super`]).

use serde::{Deserialize, Serialize};

use crate::id::SandboxName;

/// The protocol of `Upgrade` on the route of SSH connections.
pub const SSH_UPGRADE: &str = "ssh";

/// About one SSH connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct SshQuery {
    /// Who it is, for the log: the address it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The only key that may log in on this connection, in the form of `authorized_keys`; without it, the authorized ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// How an SSH client finds a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SshHost {
    /// The sandbox.
    pub sandbox: SandboxName,
    /// The user its processes run as, and the usual name to log in with.
    pub user: String,
    /// Its host key as in `known_hosts`, without a host.
    pub host_key: String,
    /// `SHA256:…` of the same key.
    pub fingerprint: String,
}

/// A key that may log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuthorizedKey {
    /// Its algorithm.
    pub algorithm: String,
    /// `SHA256:…`
    pub fingerprint: String,
    /// Its comment.
    pub comment: String,
}

/// All keys that may log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuthorizedKeys {
    /// In the order of the file.
    pub keys: Vec<AuthorizedKey>,
}

/// Keys to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorizeRequest {
    /// Public keys, one a line, without options.
    pub keys: String,
}

/// What became of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Authorized {
    /// Those that were not known before.
    pub added: Vec<AuthorizedKey>,
    /// How many may log in now.
    pub known: u64,
}
