//! A sandbox's network on the daemon's side: its published ports, bound before the boot and held until it rests, and what the VM process
//! must know of the host's own network.
//!
//! ```text
//!  bind (before the boot) ─► duplicates to msb-vmm with the launch ─► it alone accepts while it runs
//!     └─ asleep: watched here, the first visitor starts the sandbox      └─ a new daemon gets duplicates back when it adopts
//!     └─ stopped, crashed, removed: closed
//! ```
//!
//! Called by `sandbox::actor` and `sandbox::plan`. It never accepts a connection and never reads a datagram.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::Poll;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::GuestNetwork;
use msb_protocol::network::{NAMESERVERS_COUNT_MAX, NetworkSpec, PortTransport, PublishedPort, VmNetwork};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Connections that may wait at a published port: as many as the host allows.
const BACKLOG: i32 = 4096;
/// The longest resolv.conf that is read, in bytes.
const RESOLV_CONF_LEN_MAX: usize = 64 << 10;
/// Where the host's name servers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Addresses of the host that the policy is told of.
const HOST_ADDRESSES_MAX: usize = 4096;

/// Published ports, bound. Clones are the same sockets.
#[derive(Clone, Debug, Default)]
pub struct BoundPorts {
    ports: Vec<PublishedPort>,
    listeners: Vec<Arc<OwnedFd>>,
}

impl BoundPorts {
    /// Binds ports. `known` are those of the same sandbox's last run: a port that the system chose stays what it was, if it can.
    ///
    /// # Errors
    /// `port_in_use` naming the port, `permission_denied` for a privileged one, `invalid_config` for an address that is not the host's.
    pub fn bind(wanted: &[PublishedPort], known: &[PublishedPort]) -> Result<Self, ApiError> {
        let mut bound = Self::default();
        for (index, port) in wanted.iter().enumerate() {
            let mut port = *port;
            let last = known.get(index).filter(|known| {
                (known.bind, known.guest_port, known.transport) == (port.bind, port.guest_port, port.transport)
            });
            let again = last.filter(|known| port.host_port == 0 && known.host_port != 0);
            let listener = match again.map(listen) {
                Some(Ok(listener)) => listener,
                _ => listen(&port).map_err(|error| refusal(&port, &error))?,
            };
            port.host_port = local_port(&listener).map_err(|error| refusal(&port, &error))?;
            bound.ports.push(port);
            bound.listeners.push(Arc::new(listener));
        }
        Ok(bound)
    }

    /// Takes over the listeners that a VM process has given back, in the order of `wanted`. None if they do not fit.
    #[must_use]
    pub fn adopt(wanted: &[PublishedPort], listeners: Vec<OwnedFd>) -> Option<Self> {
        if wanted.len() != listeners.len() {
            return None;
        }
        let mut ports = wanted.to_vec();
        for (port, listener) in ports.iter_mut().zip(&listeners) {
            port.host_port = local_port(listener).ok()?;
        }
        Some(Self { ports, listeners: listeners.into_iter().map(Arc::new).collect() })
    }

    /// The ports with the host ports that were bound.
    #[must_use]
    pub fn ports(&self) -> &[PublishedPort] {
        &self.ports
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listeners.is_empty()
    }

    /// The listeners, for the VM process.
    #[must_use]
    pub fn listeners(&self) -> Vec<Arc<OwnedFd>> {
        self.listeners.clone()
    }

    #[expect(deprecated, reason = "the other way is unsafe code; each socket is owned here and outlives its watcher")]
    /// Watches for a visitor at one of them, without letting anybody in.
    ///
    /// # Errors
    /// A socket that cannot be watched.
    pub fn watch(&self) -> io::Result<PortWatch> {
        let watched =
            self.listeners.iter().map(|listener| AsyncFd::with_interest(listener.clone(), Interest::READABLE));
        Ok(PortWatch(Arc::new(watched.collect::<io::Result<_>>()?)))
    }
}

/// Ports that are watched. Once this and the [`BoundPorts`] are dropped they are closed, whoever still waits for a visitor.
#[derive(Debug)]
pub struct PortWatch(Arc<Vec<AsyncFd<Arc<OwnedFd>>>>);

impl PortWatch {
    /// Waits until somebody is at one of them: true. False, some time after, if nobody is to be waited for any more.
    pub fn visited(&self) -> impl Future<Output = bool> + Send + use<> {
        let watched = Arc::downgrade(&self.0);
        poll_fn(move |cx| match watched.upgrade() {
            Some(sockets) if sockets.iter().any(|socket| socket.poll_read_ready(cx).is_ready()) => Poll::Ready(true),
            Some(_) => Poll::Pending,
            None => Poll::Ready(false),
        })
    }
}

fn listen(port: &PublishedPort) -> io::Result<OwnedFd> {
    let address = port.listen_address();
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match port.transport {
        PortTransport::Tcp => SocketType::STREAM,
        PortTransport::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    if family == AddressFamily::INET6 {
        // `[::]:80` and `0.0.0.0:80` are two ports.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if port.transport == PortTransport::Tcp {
        // Connections of an earlier run that are still closing take nobody's port. For UDP it would share the port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if port.transport == PortTransport::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

fn local_port(socket: impl AsFd) -> io::Result<u16> {
    let address = SocketAddr::try_from(rustix::net::getsockname(socket)?)?;
    Ok(address.port())
}

fn refusal(port: &PublishedPort, error: &io::Error) -> ApiError {
    let transport = match port.transport {
        PortTransport::Tcp => "TCP",
        PortTransport::Udp => "UDP",
    };
    let place = format!("{transport} port {}", port.listen_address());
    match error.kind() {
        io::ErrorKind::AddrInUse => ApiError::new(ErrorCode::PortInUse, format!("{place} is in use"))
            .with_hint("choose another host port, 0 for any, or stop what listens there"),
        io::ErrorKind::PermissionDenied => {
            ApiError::new(ErrorCode::PermissionDenied, format!("{place} may not be bound by this user"))
                .with_hint("choose a host port from 1024 on")
        }
        io::ErrorKind::AddrNotAvailable => {
            ApiError::new(ErrorCode::InvalidConfig, format!("{place}: this host has no such address"))
                .with_hint("bind an address of this host, or leave it out for 127.0.0.1")
        }
        _ => ApiError::internal(format!("{place} cannot be bound: {error}")),
    }
}

/// The network of a VM; none where the spec wants none. `ports` are those that were bound.
#[must_use]
pub fn vm_network(spec: &NetworkSpec, ports: &[PublishedPort]) -> Option<VmNetwork> {
    if !spec.enabled {
        return None;
    }
    let nameservers = if spec.dns.nameservers.is_empty() {
        let text = std::fs::read(RESOLV_CONF).unwrap_or_default();
        nameservers(&String::from_utf8_lossy(&text[..text.len().min(RESOLV_CONF_LEN_MAX)]))
    } else {
        spec.dns.nameservers.clone()
    };
    Some(VmNetwork {
        spec: NetworkSpec { ports: ports.to_vec(), ..spec.clone() },
        addresses: spec.addresses(),
        nameservers,
        host_addresses: host_addresses(),
    })
}

/// How the agent sets the interface up.
#[must_use]
pub fn guest_network(spec: &NetworkSpec) -> Option<GuestNetwork> {
    let link = spec.addresses();
    spec.enabled.then(|| GuestNetwork {
        ipv4: link.guest_ipv4.octets().to_vec(),
        ipv4_prefix_len: link.ipv4_prefix_len.into(),
        gateway_ipv4: link.gateway_ipv4.octets().to_vec(),
        ipv6: link.guest_ipv6.octets().to_vec(),
        ipv6_prefix_len: link.ipv6_prefix_len.into(),
        gateway_ipv6: link.gateway_ipv6.octets().to_vec(),
        mtu_bytes: link.mtu_bytes.into(),
    })
}

/// The guest's resolv.conf.
#[must_use]
pub fn resolv_conf(spec: &NetworkSpec) -> String {
    if spec.enabled {
        format!("nameserver {}\n", spec.addresses().gateway_ipv4)
    } else {
        "# no name servers: this sandbox has loopback only\n".into()
    }
}

/// The name servers that a resolv.conf names; one on a link (`fe80::1%eth0`) is left out.
fn nameservers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, 53))
        .take(NAMESERVERS_COUNT_MAX)
        .collect()
}

/// Addresses of the host's interfaces; its loopback is its own class.
fn host_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let mut addresses: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses.truncate(HOST_ADDRESSES_MAX);
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> PublishedPort {
        text.parse().unwrap()
    }

    #[test]
    fn a_free_port_is_found_kept_and_refused_to_others() {
        for text in ["0:80", "0:80/udp", "[::1]:0:80"] {
            let wanted = [port(text)];
            let bound = BoundPorts::bind(&wanted, &[]).unwrap();
            let got = bound.ports()[0];
            assert_ne!(got.host_port, 0, "{text}");
            let error = BoundPorts::bind(&[got], &[]).unwrap_err();
            assert_eq!(error.code, ErrorCode::PortInUse, "{text}");
            assert!(error.message.contains(&got.host_port.to_string()), "{}", error.message);
            drop(bound);
            let again = BoundPorts::bind(&wanted, &[got]).unwrap();
            assert_eq!(again.ports(), [got], "{text}: the system's choice stays");
        }
        assert_eq!(BoundPorts::bind(&[port("192.0.2.1:8080:80")], &[]).unwrap_err().code, ErrorCode::InvalidConfig);
    }

    #[test]
    fn what_a_vm_gives_back_is_adopted_in_order() {
        let wanted = [port("0:80"), port("0:81/udp")];
        let bound = BoundPorts::bind(&wanted, &[]).unwrap();
        let back: Vec<OwnedFd> = bound.listeners().iter().map(|listener| listener.try_clone().unwrap()).collect();
        assert!(BoundPorts::adopt(&wanted[..1], back).is_none());
        let back: Vec<OwnedFd> = bound.listeners().iter().map(|listener| listener.try_clone().unwrap()).collect();
        assert_eq!(BoundPorts::adopt(&wanted, back).unwrap().ports(), bound.ports());
    }

    #[tokio::test]
    async fn a_visitor_is_noticed_and_left_waiting() {
        let bound = BoundPorts::bind(&[port("0:80"), port("0:81")], &[]).unwrap();
        let address = bound.ports()[1].listen_address();
        let watch = bound.watch().unwrap();
        let visit = tokio::spawn(watch.visited());
        let visitor = tokio::net::TcpStream::connect(address).await.unwrap();
        assert!(visit.await.unwrap());
        let listener = std::net::TcpListener::from(bound.listeners()[1].try_clone().unwrap());
        let (_, from) = listener.accept().unwrap();
        assert_eq!(from, visitor.local_addr().unwrap());
    }

    #[tokio::test]
    async fn ports_that_are_let_go_of_are_closed_whoever_waits_for_a_visitor() {
        let bound = BoundPorts::bind(&[port("0:80")], &[]).unwrap();
        let address = bound.ports()[0].listen_address();
        let watch = bound.watch().unwrap();
        let visited = watch.visited();
        drop((watch, bound));
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(!visited.await);
    }

    #[test]
    fn name_servers_are_read_from_what_people_write() {
        let text = "# x\nsearch example.com\nnameserver 10.0.0.1\n nameserver\t::1 \nnameserver fe80::1%eth0\nnameserver bad\noptions ndots:5\n";
        assert_eq!(nameservers(text), ["10.0.0.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    }

    #[test]
    fn without_a_network_nothing_is_set_up() {
        let none = NetworkSpec { enabled: false, ..NetworkSpec::default() };
        assert!(vm_network(&none, &[]).is_none() && guest_network(&none).is_none());
        assert!(resolv_conf(&none).starts_with('#'));
        let some = NetworkSpec::default();
        assert_eq!(resolv_conf(&some), "nameserver 172.16.0.1\n");
        let network = vm_network(&some, &[]).unwrap();
        assert!(!network.host_addresses.contains(&IpAddr::from([127, 0, 0, 1])));
        assert_eq!(guest_network(&some).unwrap().ipv4, [172, 16, 0, 2]);
    }
}
