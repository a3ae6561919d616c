//! Address classes: what an address is, in every form it can be written in. Used by the policy engine and by DNS rebinding
//! protection. Pure tables; never asks the host.
//!
//! An address has one *class*, the most specific one, and may have an *enclosing* class, the group its range belongs to: a cloud's
//! metadata service at `100.100.100.200` is `meta` inside `private`. A deny rule matches either, an allow rule only the class itself,
//! so that `allow@private` never opens a metadata service and `deny@private` never forgets one.
//!
//! IPv6 forms that carry an IPv4 address are judged by that address: v4-mapped `::ffff:0:0/96` *is* the IPv4 address; NAT64
//! `64:ff9b::/96` (RFC 6052), 6to4 `2002::/16` (RFC 3056) and the old v4-compatible `::/96` lead to it. Teredo (`2001::/32`) hides
//! one behind a server and counts as reserved.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use msb_protocol::network::AddressGroup;
use serde::Serialize;

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AddressClass {
    /// Globally routed.
    Public,
    /// Private networks (RFC 1918), carrier NAT (RFC 6598), unique local (RFC 4193), local-use NAT64 (RFC 8215).
    Private,
    /// The loopback of whoever connects, the host: `127.0.0.0/8`, `::1`, and `0.0.0.0` and `::`, which Linux takes for it.
    Loopback,
    /// `169.254.0.0/16`, `fe80::/10`.
    LinkLocal,
    /// A metadata service of a cloud.
    Meta,
    /// Multicast.
    Multicast,
    /// The host: the gateway's addresses and those of the host's interfaces.
    Host,
    /// Documentation, benchmarks, broadcast, future use and everything unassigned: matched by `any` and by prefixes only.
    Reserved,
}

impl AddressClass {
    /// The class as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.group().map_or("reserved", AddressGroup::as_str)
    }

    /// The group that rules name it by; reserved addresses have none.
    #[must_use]
    pub fn group(self) -> Option<AddressGroup> {
        Some(match self {
            Self::Public => AddressGroup::Public,
            Self::Private => AddressGroup::Private,
            Self::Loopback => AddressGroup::Loopback,
            Self::LinkLocal => AddressGroup::LinkLocal,
            Self::Meta => AddressGroup::Meta,
            Self::Multicast => AddressGroup::Multicast,
            Self::Host => AddressGroup::Host,
            Self::Reserved => return None,
        })
    }
}

/// An address with what was found out about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classified {
    /// The address in its canonical form: v4-mapped ones as IPv4.
    pub address: IpAddr,
    /// The IPv4 address that a translation would lead to.
    pub embedded: Option<Ipv4Addr>,
    /// What it is.
    pub class: AddressClass,
    /// The class of the range it lies in, if that is another.
    pub enclosing: Option<AddressClass>,
}

/// Metadata services that are single addresses. The link-local ones are prefixes, see [`class_v4`].
const META_V4: &[(Ipv4Addr, AddressClass)] = &[
    // Azure: wire server, DNS and DHCP, a public address that only exists inside.
    (Ipv4Addr::new(168, 63, 129, 16), AddressClass::Public),
    // Alibaba Cloud, inside the carrier NAT range.
    (Ipv4Addr::new(100, 100, 100, 200), AddressClass::Private),
    // Oracle Cloud's older endpoint, inside IETF protocol assignments.
    (Ipv4Addr::new(192, 0, 0, 192), AddressClass::Reserved),
    // Tencent Cloud, Scaleway.
    (Ipv4Addr::new(169, 254, 0, 23), AddressClass::LinkLocal),
    (Ipv4Addr::new(169, 254, 42, 42), AddressClass::LinkLocal),
];

const META_V6: &[(Ipv6Addr, AddressClass)] = &[
    // AWS: instance metadata, DNS, time, pod identity.
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), AddressClass::Private),
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x253), AddressClass::Private),
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x123), AddressClass::Private),
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23), AddressClass::Private),
    // Google Cloud, Scaleway.
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), AddressClass::Private),
    (Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42), AddressClass::Private),
    // OpenStack: 169.254.169.254 as an interface identifier.
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe), AddressClass::LinkLocal),
];

/// Classifies an address; `host` holds the gateway's addresses and those of the host's interfaces.
#[must_use]
pub fn classify(address: IpAddr, host: &[IpAddr]) -> Classified {
    let address = address.to_canonical();
    let (embedded, (class, enclosing)) = match address {
        IpAddr::V4(v4) => (None, class_v4(v4)),
        IpAddr::V6(v6) => match embedded_v4(v6) {
            Some(v4) => (Some(v4), class_v4(v4)),
            None => (None, class_v6(v6)),
        },
    };
    let is_host = host.iter().any(|own| {
        let own = own.to_canonical();
        own == address || embedded.is_some_and(|v4| own == IpAddr::V4(v4))
    });
    // A metadata service stays one even where the host has its address.
    if is_host && class != AddressClass::Meta {
        return Classified { address, embedded, class: AddressClass::Host, enclosing: Some(class) };
    }
    Classified { address, embedded, class, enclosing }
}

/// The IPv4 address that an IPv6 address leads to by translation. `::` and `::1` are not v4-compatible addresses.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let bits = address.to_bits();
    let low = Ipv4Addr::from_bits(bits as u32);
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => Some(low),
        [0x2002, high, low, ..] => Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))),
        [0, 0, 0, 0, 0, 0, high, last] if high != 0 || last > 1 => Some(low),
        // ::ffff:0:a.b.c.d, IPv4-translated (RFC 2765).
        [0, 0, 0, 0, 0xffff, 0, _, _] => Some(low),
        _ => None,
    }
}

/// RFC 6890 and the IANA registry of special IPv4 addresses.
fn class_v4(address: Ipv4Addr) -> (AddressClass, Option<AddressClass>) {
    use AddressClass::{LinkLocal, Loopback, Meta, Multicast, Private, Public, Reserved};
    if let Some((_, enclosing)) = META_V4.iter().find(|(meta, _)| *meta == address) {
        return (Meta, Some(*enclosing));
    }
    let class = match address.octets() {
        // Linux connects 0.0.0.0 to the loopback; the rest of 0.0.0.0/8 is "this network" and nothing a guest needs.
        [0 | 127, ..] => Loopback,
        [10, ..] | [192, 168, ..] | [172, 16..=31, ..] | [100, 64..=127, ..] => Private,
        // Metadata, DNS, time and credential endpoints of several clouds.
        [169, 254, 169 | 170, _] => return (Meta, Some(LinkLocal)),
        [169, 254, ..] => LinkLocal,
        // IETF assignments, documentation (three nets), 6to4 relays, benchmarks.
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [192, 88, 99, _] | [198, 18 | 19, ..] => Reserved,
        [224..=239, ..] => Multicast,
        [240..=255, ..] => Reserved,
        _ => Public,
    };
    (class, None)
}

/// RFC 6890 and the IANA registry of special IPv6 addresses, without the forms of [`embedded_v4`].
fn class_v6(address: Ipv6Addr) -> (AddressClass, Option<AddressClass>) {
    use AddressClass::{LinkLocal, Loopback, Meta, Multicast, Private, Public, Reserved};
    if let Some((_, enclosing)) = META_V6.iter().find(|(meta, _)| *meta == address) {
        return (Meta, Some(*enclosing));
    }
    let class = match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Loopback,
        [0xff00..=0xffff, ..] => Multicast,
        [0xfe80..=0xfebf, ..] => LinkLocal,
        // Unique local, old site local, local-use NAT64.
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] | [0x64, 0xff9b, 1, ..] => Private,
        // IETF protocol assignments with Teredo and ORCHID, documentation (two nets).
        [0x2001, 0..=0x01ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0x0fff, ..] => Reserved,
        [0x2000..=0x3fff, ..] => Public,
        _ => Reserved,
    };
    (class, None)
}

#[cfg(test)]
mod tests {
    use super::AddressClass::*;
    use super::*;

    /// Both ends of each range and their neighbours.
    #[test]
    fn every_form_has_its_class() {
        for (text, class, enclosing) in [
            ("0.0.0.0", Loopback, None),
            ("0.255.255.255", Loopback, None),
            ("1.0.0.0", Public, None),
            ("9.255.255.255", Public, None),
            ("10.0.0.0", Private, None),
            ("10.255.255.255", Private, None),
            ("11.0.0.0", Public, None),
            ("100.63.255.255", Public, None),
            ("100.64.0.0", Private, None),
            ("100.100.100.199", Private, None),
            ("100.100.100.200", Meta, Some(Private)),
            ("100.127.255.255", Private, None),
            ("100.128.0.0", Public, None),
            ("126.255.255.255", Public, None),
            ("127.0.0.1", Loopback, None),
            ("127.255.255.255", Loopback, None),
            ("128.0.0.0", Public, None),
            ("168.63.129.15", Public, None),
            ("168.63.129.16", Meta, Some(Public)),
            ("169.253.255.255", Public, None),
            ("169.254.0.0", LinkLocal, None),
            ("169.254.0.23", Meta, Some(LinkLocal)),
            ("169.254.168.255", LinkLocal, None),
            ("169.254.169.0", Meta, Some(LinkLocal)),
            ("169.254.169.254", Meta, Some(LinkLocal)),
            ("169.254.170.2", Meta, Some(LinkLocal)),
            ("169.254.171.0", LinkLocal, None),
            ("169.255.0.0", Public, None),
            ("172.15.255.255", Public, None),
            ("172.16.0.0", Private, None),
            ("172.31.255.255", Private, None),
            ("172.32.0.0", Public, None),
            ("192.0.0.192", Meta, Some(Reserved)),
            ("192.0.2.1", Reserved, None),
            ("192.167.255.255", Public, None),
            ("192.168.0.0", Private, None),
            ("192.169.0.0", Public, None),
            ("198.17.255.255", Public, None),
            ("198.18.0.0", Reserved, None),
            ("198.19.255.255", Reserved, None),
            ("198.20.0.0", Public, None),
            ("198.51.100.1", Reserved, None),
            ("203.0.113.1", Reserved, None),
            ("223.255.255.255", Public, None),
            ("224.0.0.0", Multicast, None),
            ("239.255.255.255", Multicast, None),
            ("240.0.0.0", Reserved, None),
            ("255.255.255.255", Reserved, None),
            ("::", Loopback, None),
            ("::1", Loopback, None),
            ("::2", Loopback, None),
            ("::7f00:1", Loopback, None),
            ("::8.8.8.8", Public, None),
            ("::ffff:127.0.0.1", Loopback, None),
            ("::ffff:0.0.0.0", Loopback, None),
            ("::ffff:169.254.169.254", Meta, Some(LinkLocal)),
            ("::ffff:10.0.0.1", Private, None),
            ("::ffff:8.8.8.8", Public, None),
            ("::ffff:0:10.0.0.1", Private, None),
            ("64:ff9b::7f00:1", Loopback, None),
            ("64:ff9b::a9fe:a9fe", Meta, Some(LinkLocal)),
            ("64:ff9b::808:808", Public, None),
            ("64:ff9b::", Loopback, None),
            ("64:ff9b:1::1", Private, None),
            ("2002:a00:1::1", Private, None),
            ("2002:a9fe:a9fe::", Meta, Some(LinkLocal)),
            ("2002:808:808::1", Public, None),
            ("100::1", Reserved, None),
            ("1fff:ffff::", Reserved, None),
            ("2000::1", Public, None),
            ("2001::1", Reserved, None),
            ("2001:1ff:ffff::", Reserved, None),
            ("2001:200::1", Public, None),
            ("2001:db7:ffff::", Public, None),
            ("2001:db8::1", Reserved, None),
            ("2001:db9::1", Public, None),
            ("2606:4700::1", Public, None),
            ("3fff::1", Reserved, None),
            ("3fff:1000::1", Public, None),
            ("4000::1", Reserved, None),
            ("fbff::1", Reserved, None),
            ("fc00::1", Private, None),
            ("fd00:ec2::253", Meta, Some(Private)),
            ("fd00:ec2::254", Meta, Some(Private)),
            ("fd00:ec2::255", Private, None),
            ("fd20:ce::254", Meta, Some(Private)),
            ("fdff:ffff::1", Private, None),
            ("fe00::1", Reserved, None),
            ("fe80::1", LinkLocal, None),
            ("fe80::a9fe:a9fe", Meta, Some(LinkLocal)),
            ("febf:ffff::1", LinkLocal, None),
            ("fec0::1", Private, None),
            ("ff02::1", Multicast, None),
        ] {
            let found = classify(text.parse().unwrap(), &[]);
            assert_eq!((found.class, found.enclosing), (class, enclosing), "{text}");
        }
    }

    #[test]
    fn the_host_is_the_host_in_every_form_but_metadata_stays_metadata() {
        let host: Vec<IpAddr> =
            ["172.16.0.1", "fd42::1", "8.8.8.8", "169.254.169.254"].iter().map(|text| text.parse().unwrap()).collect();
        for (text, class, enclosing) in [
            ("172.16.0.1", Host, Some(Private)),
            ("::ffff:172.16.0.1", Host, Some(Private)),
            ("64:ff9b::ac10:1", Host, Some(Private)),
            ("fd42::1", Host, Some(Private)),
            ("8.8.8.8", Host, Some(Public)),
            ("8.8.4.4", Public, None),
            ("169.254.169.254", Meta, Some(LinkLocal)),
        ] {
            let found = classify(text.parse().unwrap(), &host);
            assert_eq!((found.class, found.enclosing), (class, enclosing), "{text}");
        }
    }
}
