//! Published ports: `[BIND:]HOST:GUEST[/tcp|/udp]`. Parsed by the CLI and the SDK, bound by `msbd`, served by `msb-vmm`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most published ports of a sandbox.
pub const PORTS_COUNT_MAX: usize = 128;

/// The transport of a published port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum PortTransport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PublishedPort {
    /// Address of the host to listen on.
    #[serde(default = "loopback")]
    #[schema(value_type = String)]
    pub bind: IpAddr,
    /// Port of the host; 0 before it is bound: any free one.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
    /// Transport.
    #[serde(default)]
    pub transport: PortTransport,
}

fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

impl PublishedPort {
    /// Where the host listens.
    #[must_use]
    pub fn listen_address(&self) -> SocketAddr {
        SocketAddr::new(self.bind, self.host_port)
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.listen_address(), self.guest_port)?;
        match self.transport {
            PortTransport::Tcp => Ok(()),
            PortTransport::Udp => f.write_str("/udp"),
        }
    }
}

/// Why a text is not a published port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("published port {text:?}: {reason}; write [BIND:]HOST:GUEST[/tcp|/udp]")]
pub struct PortError {
    /// The text, cut at 200 characters.
    pub text: String,
    /// What is wrong.
    pub reason: String,
}

impl FromStr for PublishedPort {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|reason| PortError { text: text.chars().take(200).collect(), reason })
    }
}

fn parse(text: &str) -> Result<PublishedPort, String> {
    let (addresses, transport) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.split('/').next().unwrap_or_default(), PortTransport::Tcp),
        Some((addresses, "udp")) => (addresses, PortTransport::Udp),
        Some((_, other)) => return Err(format!("unknown transport '{other}'")),
    };
    let (rest, guest) = addresses.rsplit_once(':').ok_or("it names one port only")?;
    let (bind, host) = match rest.rsplit_once(':') {
        None => (loopback(), rest),
        Some((bind, host)) => {
            let address = match bind.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
                Some(inner) => inner.parse().ok().filter(IpAddr::is_ipv6),
                None => bind.parse().ok().filter(IpAddr::is_ipv4),
            };
            (address.ok_or_else(|| format!("'{bind}' is not an address (IPv6 goes in brackets)"))?, host)
        }
    };
    let port = |text: &str, name: &str| {
        text.parse::<u16>().map_err(|_| format!("{name} '{text}' is not a port from 0 to 65535"))
    };
    let (host_port, guest_port) = (port(host, "the host's")?, port(guest, "the guest's")?);
    if guest_port == 0 {
        return Err("the guest's port cannot be 0".into());
    }
    Ok(PublishedPort { bind, host_port, guest_port, transport })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_parse_and_print() {
        for (text, printed) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("0:80/tcp", "127.0.0.1:0:80"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp"),
            ("[::1]:8080:80", "[::1]:8080:80"),
        ] {
            let port: PublishedPort = text.parse().unwrap();
            assert_eq!(port.to_string(), printed);
            assert_eq!(printed.parse::<PublishedPort>().unwrap(), port);
        }
        for (text, reason) in [
            ("80", "one port only"),
            ("80:0", "cannot be 0"),
            ("80:65536", "not a port"),
            ("x:80", "not a port"),
            ("::1:80:80", "brackets"),
            ("[1.2.3.4]:80:80", "brackets"),
            ("host:80:80", "not an address"),
            ("80:80/sctp", "unknown transport"),
        ] {
            let error = text.parse::<PublishedPort>().unwrap_err();
            assert!(error.reason.contains(reason), "{text}: {error}");
        }
    }
}
