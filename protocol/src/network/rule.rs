//! The grammar of network rules: `<action>[:<direction>]@<target>[:<proto>[:<ports>]]`, several joined by commas.
//!
//! ```text
//!  allow@public                     deny:ingress@any:tcp:22        allow@10.1.0.0/16:tcp:5432
//!  allow@api.example.com:tcp:443    allow@*.example.com            deny@[2001:db8::]/32
//! ```
//!
//! The CLI and the SDK parse rules before any request, the daemon again, the `network` crate turns them into decisions.
//! A wrong rule is answered with what is wrong and the nearest right word. This module never decides anything.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::name::DomainName;
use crate::config::distance;

/// Most rules of a sandbox.
pub const RULES_COUNT_MAX: usize = 1024;

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Lets it through.
    Allow,
    /// Refuses it, quickly and visibly.
    Deny,
}

/// Which way a connection is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// By the guest.
    Egress,
    /// To the guest, through a published port.
    Ingress,
}

/// A group of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AddressGroup {
    /// Globally routed addresses.
    Public,
    /// Private networks, carrier NAT and unique local addresses.
    Private,
    /// The host's own loopback.
    Loopback,
    /// Link-local addresses.
    LinkLocal,
    /// Metadata services of clouds.
    Meta,
    /// Multicast.
    Multicast,
    /// The host that runs the sandbox.
    Host,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP.
    Icmpv4,
    /// ICMPv6.
    Icmpv6,
}

macro_rules! words {
    ($type:ident { $($variant:ident $word:literal),* $(,)? }) => {
        impl $type {
            /// Every word of this kind.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $word)),*];

            /// The word of the grammar.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }

            fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().find(|(_, known)| *known == word).map(|(value, _)| *value)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words!(Action { Allow "allow", Deny "deny" });
words!(Direction { Egress "egress", Ingress "ingress" });
words!(AddressGroup {
    Public "public", Private "private", Loopback "loopback", LinkLocal "link-local", Meta "meta", Multicast "multicast", Host "host",
});
words!(Transport { Tcp "tcp", Udp "udp", Icmpv4 "icmpv4", Icmpv6 "icmpv6" });

/// Addresses that share a prefix. Bits beyond the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix_len: u8,
}

impl Cidr {
    /// The addresses that share the first `prefix_len` bits with `address`; `None` if there are no so many bits.
    #[must_use]
    pub fn new(address: IpAddr, prefix_len: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) if prefix_len <= 32 => IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask_v4(prefix_len))),
            IpAddr::V6(v6) if prefix_len <= 128 => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask_v6(prefix_len))),
            _ => return None,
        };
        Some(Self { address, prefix_len })
    }

    /// The first address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether `address` is one of them. Families never mix; the caller canonicalises v4-mapped forms.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.prefix_len).is_some_and(|other| other.address == self.address)
    }
}

fn mask_v4(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0)
}

fn mask_v6(prefix_len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0)
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(v4) if self.prefix_len == 32 => write!(f, "{v4}"),
            IpAddr::V6(v6) if self.prefix_len == 128 => write!(f, "[{v6}]"),
            IpAddr::V4(v4) => write!(f, "{v4}/{}", self.prefix_len),
            IpAddr::V6(v6) => write!(f, "[{v6}]/{}", self.prefix_len),
        }
    }
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Everything.
    Any,
    /// A group of addresses.
    Group(AddressGroup),
    /// Addresses of a prefix; a single address is a full prefix.
    Cidr(Cidr),
    /// Exactly this name.
    Domain(DomainName),
    /// This name and every name below it.
    Suffix(DomainName),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Group(group) => write!(f, "{group}"),
            Self::Cidr(cidr) => write!(f, "{cidr}"),
            // A name of one label would read as a group.
            Self::Domain(name) if name.label_count() == 1 => write!(f, "domain={name}"),
            Self::Domain(name) => write!(f, "{name}"),
            Self::Suffix(name) => write!(f, "*.{name}"),
        }
    }
}

/// A range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port, not less than the first.
    pub last: u16,
}

impl PortRange {
    /// Whether `port` is in it.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// One rule. Its text is its one form in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// What it does.
    pub action: Action,
    /// Which way the connection is opened.
    pub direction: Direction,
    /// What it is about.
    pub target: Target,
    /// The protocol; none: every one.
    pub transport: Option<Transport>,
    /// The destination ports; none: every one. Only with tcp and udp.
    pub ports: Option<PortRange>,
}

impl Rule {
    /// A rule for everything outbound to `target`.
    #[must_use]
    pub fn egress(action: Action, target: Target) -> Self {
        Self { action, direction: Direction::Egress, target, transport: None, ports: None }
    }

    /// The same rule for one protocol and port.
    #[must_use]
    pub fn on(mut self, transport: Transport, port: u16) -> Self {
        self.transport = Some(transport);
        self.ports = Some(PortRange { first: port, last: port });
        self
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        if self.direction == Direction::Ingress {
            write!(f, ":{}", self.direction)?;
        }
        write!(f, "@{}", self.target)?;
        if let Some(transport) = self.transport {
            write!(f, ":{transport}")?;
        }
        if let Some(ports) = self.ports {
            write!(f, ":{ports}")?;
        }
        Ok(())
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// Why a text is not a rule, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network rule {rule:?}: {reason}")]
pub struct RuleError {
    /// The rule as it was written, cut at 200 characters.
    pub rule: String,
    /// What is wrong.
    pub reason: String,
    /// What to write instead.
    pub hint: String,
}

const GRAMMAR: &str = "write <allow|deny>[:<egress|ingress>]@<target>[:<tcp|udp|icmpv4|icmpv6>[:<port|first-last>]]";

struct Fault {
    reason: String,
    hint: String,
}

fn fault(reason: impl Into<String>, hint: impl Into<String>) -> Fault {
    Fault { reason: reason.into(), hint: hint.into() }
}

/// The hint for a word that is none of the known ones: the nearest, if it is near.
fn near_word(word: &str, known: impl Iterator<Item = &'static str> + Clone) -> String {
    let nearest = known.clone().map(|candidate| (distance(candidate, word), candidate)).min();
    match nearest {
        Some((far, candidate)) if far <= 2 && far < candidate.len() => format!("did you mean '{candidate}'?"),
        _ => format!("one of {}", known.collect::<Vec<_>>().join(", ")),
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text.trim()).map_err(|Fault { reason, hint }| RuleError {
            rule: text.chars().take(200).collect(),
            reason,
            hint,
        })
    }
}

/// Parses rules joined by commas; a list of nothing is no rule.
///
/// # Errors
/// The first rule that is none, or more than [`RULES_COUNT_MAX`].
pub fn parse_rules(text: &str) -> Result<Vec<Rule>, RuleError> {
    let mut rules: Vec<Rule> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        if rules.len() == RULES_COUNT_MAX {
            return Err(RuleError {
                rule: part.chars().take(200).collect(),
                reason: format!("more than {RULES_COUNT_MAX} rules"),
                hint: "use prefixes and suffixes in place of single addresses and names".into(),
            });
        }
        let is_number = part.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        rules.push(part.parse().map_err(|mut error: RuleError| {
            if is_number && !rules.is_empty() {
                error.hint = "a rule takes one port or one range; a comma begins the next rule".into();
            }
            error
        })?);
    }
    Ok(rules)
}

fn parse(text: &str) -> Result<Rule, Fault> {
    if text.len() > 512 {
        return Err(fault("it is longer than 512 bytes", GRAMMAR));
    }
    let Some((head, tail)) = text.split_once('@') else {
        return Err(fault("it has no '@' before its target", GRAMMAR));
    };
    let (action, direction) = match head.split_once(':') {
        Some((action, direction)) => (action, Some(direction)),
        None => (head, None),
    };
    let action = Action::from_word(action).ok_or_else(|| {
        fault(format!("unknown action '{action}'"), near_word(action, Action::ALL.iter().map(|(_, w)| *w)))
    })?;
    let direction = match direction {
        None => Direction::Egress,
        Some("out" | "outbound") => return Err(fault("unknown direction", "did you mean 'egress'?")),
        Some("in" | "inbound") => return Err(fault("unknown direction", "did you mean 'ingress'?")),
        Some(word) => Direction::from_word(word).ok_or_else(|| {
            fault(format!("unknown direction '{word}'"), near_word(word, Direction::ALL.iter().map(|(_, w)| *w)))
        })?,
    };
    let (target, rest) = split_target(tail)?;
    let target = parse_target(target)?;
    let (transport, ports) = parse_service(rest)?;
    if direction == Direction::Ingress {
        if matches!(transport, Some(Transport::Icmpv4 | Transport::Icmpv6)) {
            return Err(fault(
                "nothing but tcp and udp comes in",
                "published ports are tcp or udp; leave the protocol out or name one of them",
            ));
        }
        if matches!(target, Target::Domain(_) | Target::Suffix(_)) {
            return Err(fault("a peer that connects has no name", "name its address, its network or a group"));
        }
    }
    Ok(Rule { action, direction, target, transport, ports })
}

/// Cuts the target from what follows it. An IPv6 address is in brackets, its prefix length behind them or inside.
fn split_target(tail: &str) -> Result<(&str, &str), Fault> {
    if tail.starts_with('[') {
        let close = tail
            .find(']')
            .ok_or_else(|| fault("'[' without ']'", "write an IPv6 target as [address] or [address]/length"))?;
        let end = tail[close..].find(':').map_or(tail.len(), |at| close + at);
        return Ok((&tail[..end], tail[end..].trim_start_matches(':')));
    }
    let bare = tail.split_once('/').map_or(tail, |(address, _)| address);
    if bare.parse::<Ipv6Addr>().is_ok() {
        return Err(fault("an IPv6 address needs brackets", format!("write [{bare}]")));
    }
    Ok(match tail.split_once(':') {
        Some((target, rest)) => (target, rest),
        None => (tail, ""),
    })
}

fn parse_target(text: &str) -> Result<Target, Fault> {
    let name = |text: &str| {
        text.parse::<DomainName>().map_err(|error| fault(error.to_string(), "write a name like api.example.com"))
    };
    let suffix = |text: &str| {
        let name = name(text)?;
        if name.label_count() < 2 {
            return Err(fault(
                format!("the suffix '{name}' would match a whole top-level domain"),
                "name at least two parts, as in *.example.com",
            ));
        }
        Ok(Target::Suffix(name))
    };
    if text.is_empty() {
        return Err(fault("the target is empty", "write any, a group, an address, a prefix or a name"));
    }
    if text == "any" {
        return Ok(Target::Any);
    }
    if let Some(group) = AddressGroup::from_word(text) {
        return Ok(Target::Group(group));
    }
    if let Some(rest) = text.strip_prefix("domain=") {
        return name(rest).map(Target::Domain);
    }
    if let Some(rest) = text.strip_prefix("suffix=").or_else(|| text.strip_prefix("*.")) {
        return suffix(rest);
    }
    if text.contains('*') {
        return Err(fault("'*' stands only at the start, before a dot", "write *.example.com"));
    }
    if let Some(cidr) = parse_cidr(text)? {
        return Ok(Target::Cidr(cidr));
    }
    if text.contains('.') {
        let last = text.rsplit('.').next().unwrap_or_default();
        if !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()) {
            return Err(fault(format!("'{text}' is not an IPv4 address"), "write four numbers from 0 to 255"));
        }
        return name(text).map(Target::Domain);
    }
    let groups = AddressGroup::ALL.iter().map(|(_, word)| *word).chain(std::iter::once("any"));
    let hint = match text {
        "metadata" | "imds" => "did you mean 'meta'?".into(),
        "localhost" => "did you mean 'host' (the host's services) or 'loopback'?".into(),
        "internet" | "external" => "did you mean 'public'?".into(),
        "lan" | "internal" => "did you mean 'private'?".into(),
        "all" | "*" => "did you mean 'any'?".into(),
        _ => format!("{}; a name of one part is written domain={text}", near_word(text, groups)),
    };
    Err(fault(format!("unknown target '{text}'"), hint))
}

/// An address or a prefix; `None` if it looks like neither.
fn parse_cidr(text: &str) -> Result<Option<Cidr>, Fault> {
    let (inner, outer_len) = match text.strip_prefix('[') {
        None => (text, None),
        Some(rest) => {
            let (inner, after) = rest.split_once(']').unwrap_or((rest, ""));
            let outer_len = match after.strip_prefix('/') {
                Some(len) => Some(len),
                None if after.is_empty() => None,
                None => return Err(fault(format!("'{after}' after ']'"), "write [address]/length")),
            };
            (inner, outer_len)
        }
    };
    let (address, inner_len) = match inner.split_once('/') {
        Some((address, len)) => (address, Some(len)),
        None => (inner, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return if text.starts_with('[') {
            Err(fault(format!("'{inner}' is not an IPv6 address"), "write [address] or [address]/length"))
        } else {
            Ok(None)
        };
    };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let cidr = match outer_len.or(inner_len) {
        None => Cidr::new(address, bits),
        Some(len) => len.parse().ok().and_then(|len| Cidr::new(address, len)),
    };
    let cidr =
        cidr.ok_or_else(|| fault("the prefix length is out of range", format!("write a number from 0 to {bits}")))?;
    if cidr.prefix_len() != bits && cidr.address() != address {
        return Err(fault(format!("'{address}' has bits beyond its prefix"), format!("did you mean '{cidr}'?")));
    }
    Ok(Some(cidr))
}

fn parse_service(rest: &str) -> Result<(Option<Transport>, Option<PortRange>), Fault> {
    if rest.is_empty() {
        return Ok((None, None));
    }
    let (word, ports) = match rest.split_once(':') {
        Some((word, ports)) => (word, Some(ports)),
        None => (rest, None),
    };
    let transport = Transport::from_word(word).ok_or_else(|| {
        let hint = if !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit() || b == b'-') {
            format!("a port follows its protocol: write tcp:{word} or udp:{word}")
        } else if word == "icmp" {
            "did you mean 'icmpv4' or 'icmpv6'?".into()
        } else {
            near_word(word, Transport::ALL.iter().map(|(_, known)| *known))
        };
        fault(format!("unknown protocol '{word}'"), hint)
    })?;
    let Some(ports) = ports else { return Ok((Some(transport), None)) };
    if matches!(transport, Transport::Icmpv4 | Transport::Icmpv6) {
        return Err(fault(format!("{transport} has no ports"), format!("leave ':{ports}' out")));
    }
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok((Some(transport), Some(PortRange { first, last }))),
        (Some(first), Some(last)) => Err(fault("the range runs backwards", format!("did you mean '{last}-{first}'?"))),
        _ => Err(fault(
            format!("'{ports}' is not a port or a range of ports"),
            "write a number from 1 to 65535, or first-last",
        )),
    }
}

#[cfg(test)]
#[path = "rule_tests.rs"]
mod tests;
