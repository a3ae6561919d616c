//! The policy of a sandbox's network: a pure engine that says for each new connection and each name whether it may be, and which
//! rule said so. Called by the stack at each SYN and each new flow, by DNS at each query, by `msb net explain` for none of them.
//! It never does I/O and never reads a clock.
//!
//! ```text
//!   attempt ──► encrypted DNS? ──► the sandbox's rules ──► the profile's rules ──► default of the direction
//!                  │ refused          │ first match           │ first match            │
//!                  └──────────────────┴───────── Decision ────┴────────────────────────┘
//! ```
//!
//! * A group in a deny rule also matches addresses whose range belongs to it; in an allow rule it matches its own only ([`class`]).
//! * A name rule matches a connection by the pins ([`pins`]): addresses that this sandbox got for the name through our DNS. It never
//!   matches metadata, loopback, link-local, multicast or host addresses, whatever a name led to.

pub mod class;
mod encrypted;
pub mod explain;
pub mod pins;

use std::net::IpAddr;
use std::time::Duration;

use msb_protocol::network::{
    Action, AddressGroup, Direction, DomainName, NetworkProfile, NetworkSpec, Rule, Target, Transport,
};
use serde::Serialize;

use self::class::{AddressClass, Classified, classify};
use self::encrypted::EncryptedDns;
use self::pins::Pins;

/// A connection or flow that somebody wants to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// Which way.
    pub direction: Direction,
    /// The other end: the destination when the guest connects, the peer when it is connected to.
    pub address: IpAddr,
    /// The transport.
    pub transport: Transport,
    /// The destination port; 0 for ICMP.
    pub port: u16,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case", tag = "by")]
pub enum Decider {
    /// A rule of the sandbox, counted from 0.
    Rule {
        /// Its place in the list.
        index: usize,
    },
    /// A rule of the profile, counted from 0.
    ProfileRule {
        /// Its place in the profile.
        index: usize,
    },
    /// Nothing else did.
    Default,
    /// Encrypted DNS is not allowed.
    EncryptedDns,
}

/// A decision and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Decision {
    /// Whether it may be.
    pub action: Action,
    /// What said so.
    pub decider: Decider,
}

impl Decision {
    /// Whether it may be.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.action == Action::Allow
    }
}

/// The policy of one sandbox.
#[derive(Clone, Debug)]
pub struct Policy {
    rules: Vec<Rule>,
    /// How many of `rules` are the sandbox's own; the profile's follow.
    own_count: usize,
    default_egress: Action,
    default_ingress: Action,
    /// What is known of encrypted DNS; none: let through.
    encrypted: Option<EncryptedDns>,
    host: Vec<IpAddr>,
}

impl Policy {
    /// The policy of a specification; `host` holds the gateway's addresses and those of the host's interfaces.
    #[must_use]
    pub fn new(spec: &NetworkSpec, host: Vec<IpAddr>) -> Self {
        let profile = spec.profile.policy();
        let allow_encrypted = spec.dns.allow_encrypted.unwrap_or(spec.profile == NetworkProfile::All);
        Self {
            own_count: spec.rules.len(),
            rules: spec.rules.iter().cloned().chain(profile.rules).collect(),
            default_egress: spec.default_egress.unwrap_or(profile.default_egress),
            default_ingress: spec.default_ingress.unwrap_or(profile.default_ingress),
            encrypted: (!allow_encrypted).then(EncryptedDns::new),
            host,
        }
    }

    /// What an address is, as this policy sees it.
    #[must_use]
    pub fn classify(&self, address: IpAddr) -> Classified {
        classify(address, &self.host)
    }

    /// Decides on a connection.
    #[must_use]
    pub fn decide(&self, now: Duration, attempt: &Attempt, pins: &Pins) -> Decision {
        self.decide_with(attempt, |matches| pins.names_of(now, attempt.address).any(matches))
    }

    /// Decides on a connection whose address would be pinned to `name`.
    fn decide_as_name(&self, attempt: &Attempt, name: &DomainName) -> Decision {
        self.decide_with(attempt, |matches| matches(name))
    }

    fn decide_with(&self, attempt: &Attempt, any_name: impl Fn(&dyn Fn(&DomainName) -> bool) -> bool) -> Decision {
        let classified = self.classify(attempt.address);
        if attempt.direction == Direction::Egress
            && let Some(encrypted) = &self.encrypted
            && encrypted.is_endpoint(classified.address, attempt.transport, attempt.port)
        {
            return Decision { action: Action::Deny, decider: Decider::EncryptedDns };
        }
        let found = self.rules.iter().position(|rule| {
            rule.direction == attempt.direction
                && service_matches(rule, attempt.transport, attempt.port)
                && match &rule.target {
                    Target::Domain(name) => may_be_named(&classified) && any_name(&|pinned| pinned == name),
                    Target::Suffix(suffix) => may_be_named(&classified) && any_name(&|pinned| pinned.is_within(suffix)),
                    target => address_matches(rule.action, target, &classified),
                }
        });
        self.decision(found, attempt.direction)
    }

    /// Decides on a DNS query. Name rules match by the name, whatever their protocol and ports; `any` and `host` must match port 53;
    /// other groups and prefixes are about addresses and never match a name.
    #[must_use]
    pub fn decide_name(&self, name: &DomainName, transport: Transport) -> Decision {
        if self.encrypted.as_ref().is_some_and(|encrypted| encrypted.is_resolver(name)) {
            return Decision { action: Action::Deny, decider: Decider::EncryptedDns };
        }
        let found = self.rules.iter().position(|rule| {
            rule.direction == Direction::Egress
                && match &rule.target {
                    Target::Domain(own) => name == own,
                    Target::Suffix(suffix) => name.is_within(suffix),
                    Target::Any | Target::Group(AddressGroup::Host) => service_matches(rule, transport, 53),
                    Target::Group(_) | Target::Cidr(_) => false,
                }
        });
        self.decision(found, Direction::Egress)
    }

    fn decision(&self, found: Option<usize>, direction: Direction) -> Decision {
        match found {
            Some(index) => Decision {
                action: self.rules[index].action,
                decider: if index < self.own_count {
                    Decider::Rule { index }
                } else {
                    Decider::ProfileRule { index: index - self.own_count }
                },
            },
            None => Decision {
                action: match direction {
                    Direction::Egress => self.default_egress,
                    Direction::Ingress => self.default_ingress,
                },
                decider: Decider::Default,
            },
        }
    }

    /// The text of what decided: the rule, or why there is none.
    #[must_use]
    pub fn decider_text(&self, decider: Decider) -> String {
        let rule = |index: usize| self.rules.get(index).map_or_else(String::new, ToString::to_string);
        match decider {
            Decider::Rule { index } => rule(index),
            Decider::ProfileRule { index } => rule(index + self.own_count),
            Decider::Default => "default".into(),
            Decider::EncryptedDns => "encrypted-dns".into(),
        }
    }

    /// Rules in the order they are tried, with the defaults for outbound and inbound connections, for `inspect`.
    #[must_use]
    pub fn parts(&self) -> (&[Rule], Action, Action) {
        (&self.rules, self.default_egress, self.default_ingress)
    }
}

fn service_matches(rule: &Rule, transport: Transport, port: u16) -> bool {
    rule.transport.is_none_or(|wanted| wanted == transport) && rule.ports.is_none_or(|ports| ports.contains(port))
}

/// Whether a name may stand for such an address at all.
fn may_be_named(classified: &Classified) -> bool {
    matches!(classified.class, AddressClass::Public | AddressClass::Private)
}

fn address_matches(action: Action, target: &Target, classified: &Classified) -> bool {
    // Deny sees through a translation and through the range; allow takes an address for what it is.
    let wide = action == Action::Deny;
    match target {
        Target::Any => true,
        Target::Group(group) => {
            let is = |class: AddressClass| class.group() == Some(*group);
            is(classified.class) || (wide && classified.enclosing.is_some_and(is))
        }
        Target::Cidr(cidr) => {
            cidr.contains(classified.address)
                || (wide && classified.embedded.is_some_and(|v4| cidr.contains(IpAddr::V4(v4))))
        }
        Target::Domain(_) | Target::Suffix(_) => false,
    }
}

#[cfg(test)]
mod tests;
