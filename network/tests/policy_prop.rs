//! The policy engine against a naive reference that is written the other way round: it expands an address into every group and
//! prefix fact first and then walks the rules, sharing no code with the engine but the rule types and the address tables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use msb_network::policy::class::{AddressClass, classify};
use msb_network::policy::pins::Pins;
use msb_network::policy::{Attempt, Decider, Policy};
use msb_protocol::network::{
    Action, AddressGroup, Cidr, Direction, DomainName, NetworkProfile, NetworkSpec, PortRange, ProfilePolicy, Rule,
    Target, Transport,
};
use proptest::prelude::*;

const NAMES: &[&str] = &["a.example", "b.a.example", "b.example", "x.test", "deep.b.a.example"];
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 1));

fn names() -> impl Strategy<Value = DomainName> {
    prop::sample::select(NAMES).prop_map(|name| name.parse().unwrap())
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    let interesting = prop::sample::select(vec![
        "1.2.3.4",
        "1.2.3.5",
        "10.0.0.1",
        "127.0.0.1",
        "0.0.0.0",
        "169.254.169.254",
        "169.254.1.1",
        "100.100.100.200",
        "172.16.0.1",
        "168.63.129.16",
        "224.0.0.1",
        "::1",
        "::",
        "fd00:ec2::254",
        "fd00::1",
        "64:ff9b::a00:1",
        "64:ff9b::102:304",
        "::ffff:10.0.0.1",
        "::ffff:1.2.3.4",
        "2606:4700::1",
        "2002:102:304::",
        "ff02::1",
        "fe80::1",
        "192.0.2.1",
    ]);
    prop_oneof![
        4 => interesting.prop_map(|text| text.parse().unwrap()),
        1 => any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        1 => any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
    ]
}

fn transports() -> impl Strategy<Value = Transport> {
    prop::sample::select(vec![Transport::Tcp, Transport::Udp, Transport::Icmpv4, Transport::Icmpv6])
}

fn targets() -> impl Strategy<Value = Target> {
    prop_oneof![
        Just(Target::Any),
        prop::sample::select(AddressGroup::ALL).prop_map(|(group, _)| Target::Group(group)),
        (addresses(), 0u8..=128).prop_filter_map("prefix", |(address, len)| Cidr::new(address, len).map(Target::Cidr)),
        names().prop_map(Target::Domain),
        names().prop_map(Target::Suffix),
    ]
}

fn rules() -> impl Strategy<Value = Rule> {
    let ports = prop::option::of(prop::sample::select(vec![(80, 80), (443, 443), (1, 1024), (53, 53)]));
    let direction = prop::sample::select(vec![Direction::Egress, Direction::Egress, Direction::Ingress]);
    (any::<bool>(), direction, targets(), prop::option::of(transports()), ports).prop_map(
        |(allow, direction, target, transport, ports)| Rule {
            action: if allow { Action::Allow } else { Action::Deny },
            direction,
            target,
            transport,
            ports: ports.map(|(first, last)| PortRange { first, last }),
        },
    )
}

fn profiles() -> impl Strategy<Value = NetworkProfile> {
    use NetworkProfile::{All, Host, None, Private, Public};
    prop::sample::select(vec![Public, Private, Host, All, None])
}

/// Whether the first `len` bits agree, bit by bit.
fn same_prefix(a: IpAddr, b: IpAddr, len: u8) -> bool {
    let bits = |address: IpAddr| -> Vec<bool> {
        let octets = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        octets.iter().flat_map(|octet| (0..8).rev().map(move |n| octet >> n & 1 == 1)).collect()
    };
    a.is_ipv4() == b.is_ipv4() && bits(a).iter().zip(bits(b).iter()).take(usize::from(len)).all(|(x, y)| x == y)
}

fn reference(
    rules: &[Rule],
    defaults: (Action, Action),
    attempt: &Attempt,
    pinned: &[DomainName],
) -> (Action, Option<usize>) {
    let facts = classify(attempt.address, &[HOST]);
    for (index, rule) in rules.iter().enumerate() {
        if rule.direction != attempt.direction {
            continue;
        }
        if let Some(transport) = rule.transport
            && transport != attempt.transport
        {
            continue;
        }
        if let Some(ports) = rule.ports
            && (attempt.port < ports.first || attempt.port > ports.last)
        {
            continue;
        }
        let nameable = facts.class == AddressClass::Public || facts.class == AddressClass::Private;
        let hit = match &rule.target {
            Target::Any => true,
            Target::Group(group) => {
                let mut groups = vec![facts.class.as_str()];
                if rule.action == Action::Deny {
                    groups.extend(facts.enclosing.map(AddressClass::as_str));
                }
                groups.contains(&group.as_str())
            }
            Target::Cidr(cidr) => {
                let mut forms = vec![facts.address];
                if rule.action == Action::Deny {
                    forms.extend(facts.embedded.map(IpAddr::V4));
                }
                forms.into_iter().any(|form| same_prefix(form, cidr.address(), cidr.prefix_len()))
            }
            Target::Domain(name) => nameable && pinned.contains(name),
            Target::Suffix(suffix) => {
                nameable && pinned.iter().any(|name| name == suffix || name.as_str().ends_with(&format!(".{suffix}")))
            }
        };
        if hit {
            return (rule.action, Some(index));
        }
    }
    (if attempt.direction == Direction::Egress { defaults.0 } else { defaults.1 }, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_and_the_reference_agree(
        profile in profiles(),
        own in prop::collection::vec(rules(), 0..8),
        address in addresses(),
        transport in transports(),
        port in prop::sample::select(vec![53u16, 80, 443, 1024, 1025]),
        ingress in any::<bool>(),
        pins in prop::collection::vec((names(), addresses()), 0..4),
        pin_address in any::<bool>(),
    ) {
        let mut table = Pins::default();
        let mut pinned = Vec::new();
        for (name, mut to) in pins {
            if pin_address {
                to = address;
            }
            table.insert(Duration::ZERO, &name, to, Duration::from_secs(60));
            if to.to_canonical() == address.to_canonical() {
                pinned.push(name);
            }
        }
        let mut spec = NetworkSpec { profile, rules: own.clone(), ..NetworkSpec::default() };
        spec.dns.allow_encrypted = Some(true);
        let direction = if ingress { Direction::Ingress } else { Direction::Egress };
        let attempt = Attempt { direction, address, transport, port };
        let policy = Policy::new(&spec, vec![HOST]);
        let decision = policy.decide(Duration::ZERO, &attempt, &table);

        let ProfilePolicy { rules: profile_rules, default_egress: egress, default_ingress: in_default } = profile.policy();
        let all: Vec<Rule> = own.iter().cloned().chain(profile_rules).collect();
        let (action, index) = reference(&all, (egress, in_default), &attempt, &pinned);
        let found = match decision.decider {
            Decider::Rule { index } => Some(index),
            Decider::ProfileRule { index } => Some(own.len() + index),
            Decider::Default | Decider::EncryptedDns => None,
        };
        prop_assert_eq!((decision.action, found), (action, index));
    }

    /// No set of allow rules for groups, prefixes of other nets and names opens a metadata service: only `meta`, `any`, a prefix
    /// that holds it, or the default `allow` do.
    #[test]
    fn metadata_is_never_opened_by_accident(own in prop::collection::vec(rules(), 0..8), profile in profiles(), pin in names()) {
        let address: IpAddr = "169.254.169.254".parse().unwrap();
        let opens = |rule: &Rule| rule.action == Action::Allow && rule.direction == Direction::Egress && match &rule.target {
            Target::Any | Target::Group(AddressGroup::Meta) => true,
            Target::Cidr(cidr) => cidr.contains(address),
            _ => false,
        };
        let own: Vec<Rule> = own.into_iter().filter(|rule| !opens(rule)).collect();
        let profile = if profile == NetworkProfile::All { NetworkProfile::Host } else { profile };
        let mut pins = Pins::default();
        pins.insert(Duration::ZERO, &pin, address, Duration::from_secs(60));
        let policy = Policy::new(&NetworkSpec { profile, rules: own, ..NetworkSpec::default() }, vec![HOST]);
        let attempt = Attempt { direction: Direction::Egress, address, transport: Transport::Tcp, port: 80 };
        prop_assert!(!policy.decide(Duration::ZERO, &attempt, &pins).is_allowed());
    }
}
