//! The guest's network interface: set up statically from what the host said, because everything about it is known and nobody else is on
//! the link. No DHCP, no router advertisements, no waiting for duplicate address detection. Called by `root::set_up`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use msb_protocol::guest::GuestNetwork;
use nix::net::if_::if_nametoindex;

use super::netlink::Netlink;
use super::{RootError, Trying};

const STAGE: &str = "network";
/// What the kernel calls the first network card.
const INTERFACE: &str = "eth0";

/// Kernel settings of the interface: nobody is asked for addresses, and without a link-local one there is nothing to detect or announce.
const SETTINGS: [(&str, &str); 3] = [("accept_ra", "0"), ("router_solicitations", "0"), ("addr_gen_mode", "1")];

/// Sets the interface up.
///
/// # Errors
/// No interface, an address of the wrong length, or what the kernel answers.
pub fn set_up(network: &GuestNetwork) -> Result<(), RootError> {
    let interface = if_nametoindex(INTERFACE).trying(STAGE, "there is no network card")?;
    for (name, value) in SETTINGS {
        match std::fs::write(format!("/proc/sys/net/ipv6/conf/{INTERFACE}/{name}"), value) {
            // A kernel of the user's own may lack one of them, or IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome.trying(STAGE, &format!("cannot set {name} of {INTERFACE}"))?,
        }
    }
    let netlink = Netlink::open().trying(STAGE, "cannot reach the kernel's routing tables")?;
    netlink.set_link(interface, network.mtu_bytes).trying(STAGE, &format!("cannot set {INTERFACE} up"))?;
    let families = [
        (ipv4(&network.ipv4), network.ipv4_prefix_len, ipv4(&network.gateway_ipv4)),
        (ipv6(&network.ipv6), network.ipv6_prefix_len, ipv6(&network.gateway_ipv6)),
    ];
    for (address, prefix_len, gateway) in families {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        let address = address.ok_or_else(wrong).trying(STAGE, "the address is none")?;
        let gateway = gateway.ok_or_else(wrong).trying(STAGE, "the gateway's address is none")?;
        let prefix_len = u8::try_from(prefix_len).map_err(|_| wrong()).trying(STAGE, "the prefix is none")?;
        let outcome = netlink
            .add_address(interface, address, prefix_len)
            .and_then(|()| netlink.add_default_route(interface, gateway));
        match outcome {
            // A kernel of the user's own without IPv6 still has IPv4.
            Err(error) if address.is_ipv6() && no_such_family(&error) => {}
            outcome => outcome.trying(STAGE, &format!("cannot give {INTERFACE} the address {address}"))?,
        }
    }
    Ok(())
}

fn no_such_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

fn ipv4(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).ok().map(|octets| Ipv4Addr::from(octets).into())
}

fn ipv6(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into())
}
