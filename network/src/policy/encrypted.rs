//! Encrypted DNS: what would hide names from name rules. DNS over TLS and QUIC by port, DNS over HTTPS by the public resolvers that
//! are known for it, by name and by address. The list makes no promise about a resolver nobody knows; an allow-list does.
//! Used by the policy engine when encrypted DNS is not allowed; never resolves or connects.

use std::net::IpAddr;

use msb_protocol::network::{DomainName, Transport};

/// Ports of DNS over TLS (RFC 7858) and over QUIC (RFC 9250, and its drafts').
const PORTS: &[(Transport, u16)] =
    &[(Transport::Tcp, 853), (Transport::Udp, 853), (Transport::Udp, 784), (Transport::Udp, 8853)];

/// Names of resolvers that answer over HTTPS, with everything below them, and the name by which Firefox asks whether it may use one.
const NAMES: &[&str] = &[
    "use-application-dns.net",
    "dns.google",
    "dns64.dns.google",
    "8888.google",
    "cloudflare-dns.com",
    "one.one.one.one",
    "1dot1dot1dot1.cloudflare-dns.com",
    "cloudflare-gateway.com",
    "dns.quad9.net",
    "dns9.quad9.net",
    "dns10.quad9.net",
    "dns11.quad9.net",
    "dns.adguard.com",
    "dns.adguard-dns.com",
    "dns.nextdns.io",
    "doh.opendns.com",
    "dns.opendns.com",
    "doh.cleanbrowsing.org",
    "doh.dns.sb",
    "dns.alidns.com",
    "doh.pub",
    "dns.mullvad.net",
    "freedns.controld.com",
    "dns.controld.com",
    "doh.libredns.gr",
    "doh.mullvad.net",
    "dns0.eu",
    "doh.applied-privacy.net",
    "dns.switch.ch",
    "doh.xfinity.com",
    "dns.digitale-gesellschaft.ch",
];

/// Their addresses; port 443 of these is DNS over HTTPS.
const ADDRESSES: &[&str] = &[
    "8.8.8.8",
    "8.8.4.4",
    "2001:4860:4860::8888",
    "2001:4860:4860::8844",
    "1.1.1.1",
    "1.0.0.1",
    "1.1.1.2",
    "1.0.0.2",
    "1.1.1.3",
    "1.0.0.3",
    "2606:4700:4700::1111",
    "2606:4700:4700::1001",
    "2606:4700:4700::1112",
    "2606:4700:4700::1002",
    "2606:4700:4700::1113",
    "2606:4700:4700::1003",
    "9.9.9.9",
    "149.112.112.112",
    "9.9.9.10",
    "149.112.112.10",
    "9.9.9.11",
    "149.112.112.11",
    "2620:fe::fe",
    "2620:fe::9",
    "2620:fe::10",
    "2620:fe::11",
    "94.140.14.14",
    "94.140.15.15",
    "2a10:50c0::ad1:ff",
    "2a10:50c0::ad2:ff",
    "208.67.222.222",
    "208.67.220.220",
    "185.228.168.9",
    "185.228.169.9",
    "223.5.5.5",
    "223.6.6.6",
    "194.242.2.2",
    "76.76.2.0",
    "76.76.10.0",
    "193.110.81.0",
    "185.253.5.0",
];

/// What is known about encrypted DNS, parsed once.
#[derive(Clone, Debug)]
pub(super) struct EncryptedDns {
    names: Vec<DomainName>,
    addresses: Vec<IpAddr>,
}

impl EncryptedDns {
    pub(super) fn new() -> Self {
        let mut addresses: Vec<IpAddr> = ADDRESSES.iter().filter_map(|text| text.parse().ok()).collect();
        addresses.sort_unstable();
        Self { names: NAMES.iter().filter_map(|text| text.parse().ok()).collect(), addresses }
    }

    /// Whether a connection to here would be encrypted DNS.
    pub(super) fn is_endpoint(&self, address: IpAddr, transport: Transport, port: u16) -> bool {
        PORTS.contains(&(transport, port)) || (port == 443 && self.addresses.binary_search(&address).is_ok())
    }

    /// Whether the name is one of a resolver over HTTPS.
    pub(super) fn is_resolver(&self, name: &DomainName) -> bool {
        self.names.iter().any(|known| name.is_within(known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_parses_and_ports_matter() {
        let known = EncryptedDns::new();
        assert_eq!((known.names.len(), known.addresses.len()), (NAMES.len(), ADDRESSES.len()));
        let google: IpAddr = "8.8.8.8".parse().unwrap();
        let other: IpAddr = "9.9.9.12".parse().unwrap();
        assert!(known.is_endpoint(google, Transport::Tcp, 443) && known.is_endpoint(google, Transport::Udp, 443));
        assert!(!known.is_endpoint(google, Transport::Tcp, 80) && !known.is_endpoint(other, Transport::Tcp, 443));
        assert!(known.is_endpoint(other, Transport::Tcp, 853) && known.is_endpoint(other, Transport::Udp, 8853));
        assert!(!known.is_endpoint(other, Transport::Tcp, 8853));
        assert!(
            known.is_resolver(&"abc.dns.nextdns.io".parse().unwrap())
                && !known.is_resolver(&"nextdns.io".parse().unwrap())
        );
    }
}
