//! The network of a sandbox as its creator asks for it ([`NetworkSpec`]) and as the VM process gets it ([`VmNetwork`]):
//! rules, published ports, DNS and addresses. What decides on packets is the `network` crate; this module never does.

mod name;
mod port;
mod profile;
mod rule;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use self::name::{DOMAIN_LABEL_LEN_MAX, DOMAIN_NAME_LEN_MAX, DomainName, DomainNameError};
pub use self::port::{PORTS_COUNT_MAX, PortError, PortTransport, PublishedPort};
pub use self::profile::ProfilePolicy;
pub use self::rule::{
    Action, AddressGroup, Cidr, Direction, PortRange, RULES_COUNT_MAX, Rule, RuleError, Target, Transport, parse_rules,
};
use crate::error::{ApiError, ErrorCode};

/// Connections and flows a sandbox may have at once when nobody says.
pub const CONNECTIONS_MAX_DEFAULT: u32 = 1024;
/// Most connections and flows anybody may allow.
pub const CONNECTIONS_MAX_LIMIT: u32 = 16 << 10;
/// Time for one DNS query with all its retries in milliseconds when nobody says.
pub const DNS_TIMEOUT_MS_DEFAULT: u32 = 5_000;
/// Most upstream name servers.
pub const NAMESERVERS_COUNT_MAX: usize = 8;
/// Largest IP packet between guest and host in bytes: no datagram a guest can send needs a fragment, and a bulk transfer
/// costs one frame per 64 KiB.
pub const MTU_BYTES: u16 = 65_535;

/// Which addresses a sandbox reaches when no rule of its own decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkProfile {
    /// DNS and public addresses.
    #[default]
    Public,
    /// What `public` reaches, and private networks.
    Private,
    /// What `public` reaches, and services of the host as `host.msb.internal`.
    Host,
    /// Everything, metadata services included.
    All,
    /// Nothing.
    None,
}

/// How names are resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DnsSpec {
    /// Whether answers that hold private or local addresses are refused.
    pub rebind_protection: bool,
    /// Upstream name servers in place of the host's own.
    #[schema(value_type = Vec<String>)]
    pub nameservers: Vec<SocketAddr>,
    /// Time for one query with all its retries in milliseconds.
    pub timeout_ms: u32,
    /// Whether DNS over TLS, QUIC and HTTPS is let through where the rules allow its address; no name rule sees into it. `None`:
    /// only with the profile `all`.
    pub allow_encrypted: Option<bool>,
}

impl Default for DnsSpec {
    fn default() -> Self {
        Self {
            rebind_protection: true,
            nameservers: Vec::new(),
            timeout_ms: DNS_TIMEOUT_MS_DEFAULT,
            allow_encrypted: None,
        }
    }
}

/// The network of a sandbox as its creator asks for it. Stored, so fields are only ever added, each with a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSpec {
    /// Whether there is a network device at all.
    pub enabled: bool,
    /// What holds where no rule decides.
    pub profile: NetworkProfile,
    /// Rules, first match wins, before those of the profile.
    #[schema(value_type = Vec<String>)]
    pub rules: Vec<Rule>,
    /// What happens to outbound connections that nothing decides, in place of the profile's word.
    pub default_egress: Option<Action>,
    /// What happens to inbound connections that nothing decides, in place of the profile's word.
    pub default_ingress: Option<Action>,
    /// Published ports.
    pub ports: Vec<PublishedPort>,
    /// How names are resolved.
    pub dns: DnsSpec,
    /// Connections and flows at once.
    pub connections_max: u32,
    /// The guest's IPv4 network comes from here, the first /30; `172.16.0.0/12` when nobody says.
    #[schema(value_type = Option<String>)]
    pub ipv4_pool: Option<Ipv4Addr>,
    /// The guest's IPv6 network comes from here, the first /64; `fd42:6d73:62::/48` when nobody says.
    #[schema(value_type = Option<String>)]
    pub ipv6_pool: Option<Ipv6Addr>,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            enabled: true,
            profile: NetworkProfile::Public,
            rules: Vec::new(),
            default_egress: None,
            default_ingress: None,
            ports: Vec::new(),
            dns: DnsSpec::default(),
            connections_max: CONNECTIONS_MAX_DEFAULT,
            ipv4_pool: None,
            ipv6_pool: None,
        }
    }
}

impl NetworkSpec {
    /// Checks what the types do not: counts, ranges, ports published twice.
    ///
    /// # Errors
    /// `invalid_config` naming the value.
    pub fn check(&self) -> Result<(), ApiError> {
        let refuse = |message: String| Err(ApiError::new(ErrorCode::InvalidConfig, message));
        if self.rules.len() > RULES_COUNT_MAX {
            return refuse(format!("a sandbox has at most {RULES_COUNT_MAX} network rules"));
        }
        if self.ports.len() > PORTS_COUNT_MAX {
            return refuse(format!("a sandbox has at most {PORTS_COUNT_MAX} published ports"));
        }
        for (index, port) in self.ports.iter().enumerate() {
            let same = |other: &&PublishedPort| {
                other.transport == port.transport && other.host_port == port.host_port && other.bind == port.bind
            };
            if port.host_port != 0 && self.ports[..index].iter().any(|other| same(&other)) {
                return refuse(format!("port {} is published twice", port.listen_address()));
            }
        }
        if self.dns.nameservers.len() > NAMESERVERS_COUNT_MAX {
            return refuse(format!("a sandbox has at most {NAMESERVERS_COUNT_MAX} name servers"));
        }
        if !(100..=60_000).contains(&self.dns.timeout_ms) {
            return refuse("the DNS timeout must be 100 to 60000 ms".into());
        }
        if !(1..=CONNECTIONS_MAX_LIMIT).contains(&self.connections_max) {
            return refuse(format!("connections_max must be 1 to {CONNECTIONS_MAX_LIMIT}"));
        }
        Ok(())
    }

    /// The guest's addresses. Every sandbox may have the same ones: each is alone behind its own network.
    #[must_use]
    pub fn addresses(&self) -> NetworkAddresses {
        let v4 = self.ipv4_pool.unwrap_or(Ipv4Addr::new(172, 16, 0, 0)).to_bits() & !3;
        let v6 = self.ipv6_pool.unwrap_or(Ipv6Addr::new(0xfd42, 0x6d73, 0x62, 0, 0, 0, 0, 0)).to_bits()
            & !u128::from(u64::MAX);
        NetworkAddresses {
            guest_mac: MacAddress([0x02, 0x6d, 0x73, 0x62, 0, 2]),
            gateway_mac: MacAddress([0x02, 0x6d, 0x73, 0x62, 0, 1]),
            gateway_ipv4: Ipv4Addr::from_bits(v4 | 1),
            guest_ipv4: Ipv4Addr::from_bits(v4 | 2),
            ipv4_prefix_len: 30,
            gateway_ipv6: Ipv6Addr::from_bits(v6 | 1),
            guest_ipv6: Ipv6Addr::from_bits(v6 | 2),
            ipv6_prefix_len: 64,
            mtu_bytes: MTU_BYTES,
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The addresses on the link between a guest and its gateway, which is `msb-vmm` itself. The agent sets them statically, without
/// duplicate address detection: there is nobody else on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkAddresses {
    /// The guest's Ethernet address, also in the device's configuration space.
    pub guest_mac: MacAddress,
    /// The gateway's Ethernet address.
    pub gateway_mac: MacAddress,
    /// The gateway, also the name server.
    #[schema(value_type = String)]
    pub gateway_ipv4: Ipv4Addr,
    /// The guest.
    #[schema(value_type = String)]
    pub guest_ipv4: Ipv4Addr,
    /// Length of the IPv4 prefix in bits.
    pub ipv4_prefix_len: u8,
    /// The gateway, also the name server.
    #[schema(value_type = String)]
    pub gateway_ipv6: Ipv6Addr,
    /// The guest.
    #[schema(value_type = String)]
    pub guest_ipv6: Ipv6Addr,
    /// Length of the IPv6 prefix in bits.
    pub ipv6_prefix_len: u8,
    /// Largest IP packet in bytes.
    pub mtu_bytes: u16,
}

/// The network as the VM process gets it. The listeners of `spec.ports` come beside it as descriptors, in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmNetwork {
    /// What the creator asked for; the host ports are those that were bound.
    pub spec: NetworkSpec,
    /// The link's addresses.
    pub addresses: NetworkAddresses,
    /// Name servers to ask: those of the spec, else the host's own.
    pub nameservers: Vec<SocketAddr>,
    /// Addresses of the host's own interfaces: they are the group `host`, whatever range they lie in.
    #[serde(default)]
    pub host_addresses: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_document_is_the_default_and_rules_are_text() {
        let spec: NetworkSpec = serde_json::from_str("{}").unwrap();
        assert_eq!(spec, NetworkSpec::default());
        let spec: NetworkSpec = serde_json::from_str(
            r#"{"profile":"none","rules":["allow@example.com:tcp:443"],"dns":{"timeout_ms":100}}"#,
        )
        .unwrap();
        assert_eq!((spec.rules.len(), spec.dns.rebind_protection), (1, true));
        spec.check().unwrap();
        let text = serde_json::from_str::<NetworkSpec>(r#"{"rules":["allow@pubilc"]}"#).unwrap_err().to_string();
        assert!(text.contains("unknown target 'pubilc'"), "{text}");
    }

    #[test]
    fn each_limit_holds_on_both_sides() {
        let message = |edit: &dyn Fn(&mut NetworkSpec)| {
            let mut spec = NetworkSpec::default();
            edit(&mut spec);
            spec.check().map_err(|error| error.message)
        };
        let rule: Rule = "deny@meta".parse().unwrap();
        assert!(message(&|s| s.rules = vec![rule.clone(); RULES_COUNT_MAX]).is_ok());
        assert!(message(&|s| s.rules = vec![rule.clone(); RULES_COUNT_MAX + 1]).is_err());
        assert!(message(&|s| s.dns.timeout_ms = 100).is_ok() && message(&|s| s.dns.timeout_ms = 99).is_err());
        assert!(message(&|s| s.dns.timeout_ms = 60_000).is_ok() && message(&|s| s.dns.timeout_ms = 60_001).is_err());
        assert!(
            message(&|s| s.connections_max = 0).is_err()
                && message(&|s| s.connections_max = CONNECTIONS_MAX_LIMIT).is_ok()
        );
        let port: PublishedPort = "80:80".parse().unwrap();
        assert!(message(&|s| s.ports = vec![port, port]).unwrap_err().contains("127.0.0.1:80 is published twice"));
        let free: PublishedPort = "0:80".parse().unwrap();
        assert!(message(&|s| s.ports = vec![free; PORTS_COUNT_MAX]).is_ok());
        assert!(message(&|s| s.ports = vec![free; PORTS_COUNT_MAX + 1]).is_err());
    }

    #[test]
    fn addresses_come_from_the_pools() {
        let addresses = NetworkSpec::default().addresses();
        assert_eq!(addresses.guest_ipv4.to_string(), "172.16.0.2");
        assert_eq!(addresses.gateway_ipv6.to_string(), "fd42:6d73:62::1");
        let spec = NetworkSpec { ipv4_pool: Some("10.9.8.7".parse().unwrap()), ..NetworkSpec::default() };
        assert_eq!(spec.addresses().gateway_ipv4.to_string(), "10.9.8.5");
        assert_eq!(addresses.guest_mac.to_string(), "02:6d:73:62:00:02");
    }
}
