//! The network of a sandbox: where it is, and what its policy decided or would decide. Part of the control API ([`super`]).

use serde::{Deserialize, Serialize};

use crate::network::NetworkAddresses;

/// A sandbox's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkDetail {
    /// Addresses of the guest and its gateway; none: there is no network but loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<NetworkAddresses>,
    /// The policy in the order it is tried, one line for each rule and default.
    #[serde(default)]
    pub policy: Vec<String>,
}

/// Which lines of the network's decision log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkLogQuery {
    /// Go on with new lines until the sandbox rests.
    pub follow: bool,
    /// Only the last lines before now.
    pub tail: Option<u64>,
}

/// One decision of a sandbox's network that was not "allow"; also the form in the log file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkDecision {
    /// When, nanoseconds since 1970.
    pub at_ns: u64,
    /// `deny`: policy; `refuse`: rebinding protection; `limit`: a table is full.
    pub verdict: String,
    /// `egress` or `ingress`.
    pub direction: String,
    /// `tcp`, `udp`, `icmpv4`, `icmpv6`.
    pub transport: String,
    /// The other end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What the address is: `public`, `private`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// The name that was asked for, or that the address was got by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The type of a DNS question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_type: Option<String>,
    /// What decided: `rule`, `profile_rule`, `default`, `encrypted_dns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// Place of the rule in its list, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Text of the rule.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rule: String,
    /// Lines that the rate limit left out before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub suppressed: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What to explain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct NetworkExplainQuery {
    /// A URL, `NAME:PORT`, `ADDRESS:PORT`, `udp://…` or `icmp://…`.
    pub target: String,
}
