//! `msb net explain NAME TARGET`: which rule would decide about a target, without sending anything. Takes the policy and the pins
//! as they are; never resolves a name.

use std::net::IpAddr;
use std::time::Duration;

use msb_protocol::network::{Action, Direction, DomainName, Transport};
use serde::Serialize;

use super::class::AddressClass;
use super::pins::Pins;
use super::{Attempt, Decider, Decision, Policy};

/// What somebody asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where to.
    pub place: Place,
    /// The transport.
    pub transport: Transport,
    /// The destination port; 0 for ICMP.
    pub port: u16,
}

/// Where somebody wants to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An address.
    Address(IpAddr),
    /// A name.
    Name(DomainName),
}

/// Why a text is no question.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; write a URL, NAME:PORT, ADDRESS:PORT, udp://NAME:PORT or icmp://ADDRESS")]
pub struct QuestionError(&'static str);

impl std::str::FromStr for Question {
    type Err = QuestionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let (transport, default_port) = match scheme {
            "" | "tcp" => (Transport::Tcp, None),
            "https" | "wss" => (Transport::Tcp, Some(443)),
            "http" | "ws" => (Transport::Tcp, Some(80)),
            "ssh" | "sftp" => (Transport::Tcp, Some(22)),
            "udp" => (Transport::Udp, None),
            "icmp" | "ping" => (Transport::Icmpv4, Some(0)),
            _ => return Err(QuestionError("unknown scheme")),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let (host, port) = match authority.strip_prefix('[') {
            Some(inner) => {
                let (host, after) = inner.split_once(']').ok_or(QuestionError("'[' without ']'"))?;
                (host, after.strip_prefix(':'))
            }
            None if authority.parse::<IpAddr>().is_ok() => (authority, None),
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let place = match host.parse::<IpAddr>() {
            Ok(address) => Place::Address(address.to_canonical()),
            Err(_) => Place::Name(host.parse().map_err(|_| QuestionError("neither a name nor an address"))?),
        };
        let port = match port {
            None => default_port.ok_or(QuestionError("the port is missing"))?,
            Some(port) => port.parse().map_err(|_| QuestionError("the port is not a number from 1 to 65535"))?,
        };
        let transport = match (transport, &place) {
            (Transport::Icmpv4, Place::Address(IpAddr::V6(_))) => Transport::Icmpv6,
            (transport, _) => transport,
        };
        if port == 0 && matches!(transport, Transport::Tcp | Transport::Udp) {
            return Err(QuestionError("the port is not a number from 1 to 65535"));
        }
        Ok(Self { place, transport, port })
    }
}

/// One decision in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// About what: `dns api.example.com`, `tcp 1.2.3.4:443 (public)`.
    pub about: String,
    /// Whether it may be.
    pub action: Action,
    /// What decided.
    pub decider: Decider,
    /// The text of the rule, or `default`, or `encrypted-dns`.
    pub rule: String,
    /// The sentence for people.
    pub because: String,
}

/// The answer: every step, and whether all of it together works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Whether the connection would be made, as far as policy goes.
    pub action: Action,
    /// Each decision on the way.
    pub steps: Vec<Step>,
}

impl Policy {
    /// Explains what would happen to an outbound connection.
    #[must_use]
    pub fn explain(&self, now: Duration, question: &Question, pins: &Pins) -> Explanation {
        let attempt = |address| Attempt {
            direction: Direction::Egress,
            address,
            transport: question.transport,
            port: question.port,
        };
        let mut steps = Vec::new();
        match &question.place {
            Place::Address(address) => {
                let decision = self.decide(now, &attempt(*address), pins);
                steps.push(self.connection_step(question, *address, decision));
            }
            Place::Name(name) => {
                let decision = self.decide_name(name, Transport::Udp);
                let about = format!("dns {name}");
                steps.push(self.step(about, decision));
                if decision.is_allowed() {
                    let addresses = pins.addresses_of(now, name);
                    if addresses.is_empty() {
                        // What the name leads to is not known without asking; a public address is what rebinding protection leaves.
                        let decision = self.decide_as_name(&attempt(EXAMPLE_PUBLIC), name);
                        steps.push(self.step(
                            format!("{} {name}:{} at a public address", question.transport, question.port),
                            decision,
                        ));
                    }
                    for address in addresses {
                        let decision = self.decide(now, &attempt(address), pins);
                        steps.push(self.connection_step(question, address, decision));
                    }
                }
            }
        }
        let allowed = match &question.place {
            // Any address of the name that may be reached is enough, but the name must be answered first.
            Place::Name(_) => {
                steps[0].action == Action::Allow && steps[1..].iter().any(|step| step.action == Action::Allow)
            }
            Place::Address(_) => steps[0].action == Action::Allow,
        };
        Explanation { action: if allowed { Action::Allow } else { Action::Deny }, steps }
    }

    fn connection_step(&self, question: &Question, address: IpAddr, decision: Decision) -> Step {
        let classified = self.classify(address);
        let class = match classified.enclosing {
            Some(enclosing) if enclosing != AddressClass::Reserved => {
                format!("{} in {}", classified.class.as_str(), enclosing.as_str())
            }
            _ => classified.class.as_str().into(),
        };
        let place = match question.transport {
            Transport::Icmpv4 | Transport::Icmpv6 => address.to_string(),
            _ => std::net::SocketAddr::new(address, question.port).to_string(),
        };
        self.step(format!("{} {place} ({class})", question.transport), decision)
    }

    fn step(&self, about: String, decision: Decision) -> Step {
        let rule = self.decider_text(decision.decider);
        let because = match decision.decider {
            Decider::Rule { index } => format!("rule {} of the sandbox, {rule}", index + 1),
            Decider::ProfileRule { index } => format!("rule {} of its profile, {rule}", index + 1),
            Decider::Default => "no rule matches, so the default decides".into(),
            Decider::EncryptedDns => {
                "encrypted DNS would hide names from the rules; --dns-allow-encrypted lets it through".into()
            }
        };
        Step { about, action: decision.action, decider: decision.decider, rule, because }
    }
}

/// Any public address that is in no list of encrypted DNS.
const EXAMPLE_PUBLIC: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(93, 184, 215, 14));
