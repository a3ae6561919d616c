//! The options of `run` and `create` that are about the network, and how they become a [`NetworkSpec`]. Grammar and limits are the
//! protocol's; here are only words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::{Args, ValueEnum};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::network::{Action, DnsSpec, NetworkProfile, NetworkSpec, PublishedPort, Rule, parse_rules};

use crate::failure::{Failure, invalid};
use crate::parse;

/// What a sandbox reaches where no rule of its own decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// DNS and public addresses
    Public,
    /// That, and private networks
    Private,
    /// That of public, and services of the host as host.msb.internal
    Host,
    /// Everything
    All,
    /// Nothing
    None,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    /// Lets it through
    Allow,
    /// Refuses it
    Deny,
}

/// Options about the network.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Network options")]
pub struct NetworkArgs {
    /// Publish a port of the sandbox on this host, on 127.0.0.1 if no address is given; port 0 takes any
    #[arg(short, long = "publish", visible_alias = "port", value_name = "[BIND:]HOST:GUEST[/tcp|/udp]")]
    pub publish: Vec<String>,
    /// What the sandbox reaches: public, private, host, all or none
    #[arg(long, value_name = "PROFILE", value_enum, hide_possible_values = true)]
    pub net: Option<Profile>,
    /// No network but loopback
    #[arg(
        long,
        conflicts_with_all = ["net", "publish", "net_rule", "net_default", "net_default_egress", "net_default_ingress"]
    )]
    pub no_net: bool,
    /// Rules, first match wins, as in deny@10.0.0.0/8,allow@api.example.com:tcp:443
    #[arg(long, value_name = "RULE[,RULE]")]
    pub net_rule: Vec<String>,
    /// What happens where no rule matches: allow or deny
    #[arg(
        long,
        value_enum,
        value_name = "ACTION",
        hide_possible_values = true,
        conflicts_with_all = ["net_default_egress", "net_default_ingress"]
    )]
    pub net_default: Option<Verdict>,
    /// The same, for connections that the sandbox opens
    #[arg(long, value_enum, value_name = "ACTION", hide_possible_values = true)]
    pub net_default_egress: Option<Verdict>,
    /// The same, for connections through published ports
    #[arg(long, value_enum, value_name = "ACTION", hide_possible_values = true)]
    pub net_default_ingress: Option<Verdict>,
    /// Ask this name server, in place of the host's own; several are tried in order
    #[arg(long, value_name = "ADDRESS[:PORT]", conflicts_with = "no_net")]
    pub dns_nameserver: Vec<String>,
    /// Time for a DNS query with its retries, as in 500ms (default 5s)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, conflicts_with = "no_net")]
    pub dns_timeout: Option<u64>,
    /// As --dns-timeout, in milliseconds
    #[arg(long, hide = true, value_name = "MS", conflicts_with = "dns_timeout")]
    pub dns_query_timeout_ms: Option<u64>,
    /// Let DNS over TLS, QUIC and HTTPS through, in which rules see no names
    #[arg(long, conflicts_with = "no_net")]
    pub dns_allow_encrypted: bool,
    /// Let DNS answers through that lead to private addresses
    #[arg(long, conflicts_with = "no_net")]
    pub no_dns_rebind_protection: bool,
    /// Connections at once (default 1024)
    #[arg(long, value_name = "COUNT", conflicts_with = "no_net")]
    pub max_connections: Option<u32>,
    /// Take the sandbox's IPv4 network from here, in place of 172.16.0.0
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_net")]
    pub net_ipv4_pool: Option<String>,
    /// Take the sandbox's IPv6 network from here, in place of fd42:6d73:62::
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_net")]
    pub net_ipv6_pool: Option<String>,
}

impl NetworkArgs {
    /// The network these options ask for.
    ///
    /// # Errors
    /// `invalid_config` naming the value.
    pub fn spec(&self) -> Result<NetworkSpec, Failure> {
        let mut spec = NetworkSpec { enabled: !self.no_net, ..NetworkSpec::default() };
        spec.profile = match self.net {
            None | Some(Profile::Public) => NetworkProfile::Public,
            Some(Profile::Private) => NetworkProfile::Private,
            Some(Profile::Host) => NetworkProfile::Host,
            Some(Profile::All) => NetworkProfile::All,
            Some(Profile::None) => NetworkProfile::None,
        };
        spec.rules = rules(&self.net_rule)?;
        spec.ports = self
            .publish
            .iter()
            .map(|text| text.parse::<PublishedPort>().map_err(|error| invalid(error.to_string())))
            .collect::<Result<_, _>>()?;
        let action = |verdict| match verdict {
            Verdict::Allow => Action::Allow,
            Verdict::Deny => Action::Deny,
        };
        spec.default_egress = self.net_default_egress.or(self.net_default).map(action);
        spec.default_ingress = self.net_default_ingress.or(self.net_default).map(action);
        spec.dns = self.dns()?;
        spec.connections_max = self.max_connections.unwrap_or(spec.connections_max);
        spec.ipv4_pool = self.net_ipv4_pool.as_deref().map(pool::<Ipv4Addr>).transpose()?;
        spec.ipv6_pool = self.net_ipv6_pool.as_deref().map(pool::<Ipv6Addr>).transpose()?;
        spec.check()?;
        Ok(spec)
    }

    fn dns(&self) -> Result<DnsSpec, Failure> {
        let mut dns = DnsSpec { rebind_protection: !self.no_dns_rebind_protection, ..DnsSpec::default() };
        dns.nameservers = self.dns_nameserver.iter().map(|text| name_server(text)).collect::<Result<_, _>>()?;
        if let Some(timeout_ms) = self.dns_timeout.or(self.dns_query_timeout_ms) {
            dns.timeout_ms = u32::try_from(timeout_ms).unwrap_or(u32::MAX);
        }
        dns.allow_encrypted = self.dns_allow_encrypted.then_some(true);
        Ok(dns)
    }
}

fn rules(texts: &[String]) -> Result<Vec<Rule>, Failure> {
    let mut rules = Vec::new();
    for text in texts {
        let parsed = parse_rules(text)
            .map_err(|error| ApiError::new(ErrorCode::InvalidConfig, error.to_string()).with_hint(error.hint))?;
        rules.extend(parsed);
    }
    Ok(rules)
}

fn name_server(text: &str) -> Result<SocketAddr, Failure> {
    let with_port = text.parse::<SocketAddr>().ok();
    let bare = || {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        inner.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, 53))
    };
    with_port
        .or_else(bare)
        .ok_or_else(|| invalid(format!("name server {text:?} is no address; write 9.9.9.9, 9.9.9.9:53 or [::1]:53")))
}

/// An address, or a prefix whose length says nothing new: the first /30 or /64 of it is taken.
fn pool<T: std::str::FromStr>(text: &str) -> Result<T, Failure> {
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.parse().map_err(|_| invalid(format!("network {text:?} is no address of its family")))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        network: NetworkArgs,
    }

    fn spec(words: &[&str]) -> Result<NetworkSpec, String> {
        let line = Line::try_parse_from(std::iter::once("x").chain(words.iter().copied()));
        let line = line.map_err(|error| error.to_string())?;
        line.network.spec().map_err(|failure| match failure {
            Failure::Api(error) => format!("{}: {} ({})", error.code, error.message, error.hint),
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn without_options_there_is_the_default_network() {
        assert_eq!(spec(&[]).unwrap(), NetworkSpec::default());
        assert!(!spec(&["--no-net"]).unwrap().enabled);
    }

    #[test]
    fn options_reach_their_fields() {
        let spec = spec(&[
            "-p",
            "8080:80",
            "--port",
            "[::1]:0:53/udp",
            "--net",
            "none",
            "--net-rule",
            "allow@api.example.com:tcp:443,deny@meta",
            "--net-rule",
            "allow@10.0.0.1",
            "--net-default-ingress",
            "deny",
            "--dns-nameserver",
            "9.9.9.9",
            "--dns-nameserver",
            "[::1]:5353",
            "--dns-timeout",
            "500ms",
            "--dns-allow-encrypted",
            "--no-dns-rebind-protection",
            "--max-connections",
            "10",
            "--net-ipv4-pool",
            "10.9.8.0/24",
            "--net-ipv6-pool",
            "fd00::",
        ])
        .unwrap();
        let ports: Vec<String> = spec.ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["127.0.0.1:8080:80", "[::1]:0:53/udp"]);
        assert_eq!((spec.profile, spec.rules.len()), (NetworkProfile::None, 3));
        assert_eq!((spec.default_egress, spec.default_ingress), (None, Some(Action::Deny)));
        assert_eq!(spec.dns.nameservers, ["9.9.9.9:53".parse().unwrap(), "[::1]:5353".parse().unwrap()]);
        assert_eq!((spec.dns.timeout_ms, spec.dns.rebind_protection), (500, false));
        assert_eq!((spec.dns.allow_encrypted, spec.connections_max), (Some(true), 10));
        assert_eq!(spec.addresses().guest_ipv4.to_string(), "10.9.8.2");
        assert_eq!(spec.addresses().guest_ipv6.to_string(), "fd00::2");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        for (words, needed) in [
            (&["-p", "80"][..], "names one port only"),
            (&["-p", "1.2.3.4.5:80:80"], "is not an address"),
            (&["--net-rule", "allow@pubilc"], "public"),
            (&["--net-rule", "allow@1.2.3.4:443"], "443"),
            (&["--dns-nameserver", "one.one"], "is no address"),
            (&["--max-connections", "0"], "connections_max"),
            (&["--net-ipv4-pool", "fd00::"], "no address of its family"),
            (&["-p", "80:80", "-p", "80:81"], "published twice"),
            (&["--no-net", "--net-default", "allow"], "cannot be used with"),
            (&["--no-net", "-p", "80:80"], "cannot be used with"),
            (&["--net", "pubic"], "public"),
        ] {
            let error = spec(words).unwrap_err();
            assert!(error.contains(needed), "{words:?}: {error}");
        }
    }
}
