//! The few requests of rtnetlink(7) that set an interface up: link, addresses, default routes. One request, one acknowledgement.
//! Called by `root::network` alone; it parses nothing but acknowledgements.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// Numbers of linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/if_addr.h.
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const HEADER_BYTES: usize = 16;

/// A socket to the kernel's routing tables.
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// As socket(2).
    pub(super) fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?))
    }

    /// Sets an interface up with this MTU.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn set_link(&self, interface: u32, mtu_bytes: u32) -> io::Result<()> {
        // ifinfomsg: family, padding, type, index, flags, which of them change.
        let mut body = vec![0u8; 4];
        for word in [interface, IFF_UP, IFF_UP] {
            body.extend(word.to_ne_bytes());
        }
        attribute(&mut body, IFLA_MTU, &mtu_bytes.to_ne_bytes());
        self.request(RTM_NEWLINK, 0, &body)
    }

    /// Gives an interface an address, usable at once: nobody else is on the link, so nothing is asked before.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn add_address(&self, interface: u32, address: IpAddr, prefix_len: u8) -> io::Result<()> {
        // ifaddrmsg: family, prefix, flags, scope, index.
        let mut body = vec![family(address), prefix_len, IFA_F_NODAD, 0];
        body.extend(interface.to_ne_bytes());
        let bytes = octets(address);
        attribute(&mut body, IFA_LOCAL, &bytes);
        attribute(&mut body, IFA_ADDRESS, &bytes);
        self.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body)
    }

    /// Sends everything else to a gateway.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn add_default_route(&self, interface: u32, gateway: IpAddr) -> io::Result<()> {
        // rtmsg: family, two prefixes, type of service, table, who says so, scope, type, flags.
        let mut body = vec![family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
        attribute(&mut body, RTA_GATEWAY, &octets(gateway));
        attribute(&mut body, RTA_OIF, &interface.to_ne_bytes());
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body)
    }

    fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        send(&self.0, &message(kind, flags | NLM_F_REQUEST | NLM_F_ACK, body), SendFlags::empty())?;
        let mut answer = [0u8; 4096];
        let (length, _) = recv(&self.0, &mut answer[..], RecvFlags::empty())?;
        acknowledgement(&answer[..length])
    }
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port: one request is under way at a time.
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn acknowledgement(answer: &[u8]) -> io::Result<()> {
    let nonsense = || io::Error::other("the kernel answered with something else than an acknowledgement");
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code =
        answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(nonsense()),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_padded_and_know_their_length() {
        let mut body = vec![0; 4];
        attribute(&mut body, 7, b"abcde");
        assert_eq!(body, [0, 0, 0, 0, 9, 0, 7, 0, b'a', b'b', b'c', b'd', b'e', 0, 0, 0]);
        let message = message(RTM_NEWADDR, 5, &body);
        assert_eq!(message.len(), 32);
        assert_eq!(message[..8], [32, 0, 0, 0, 20, 0, 5, 0]);
    }

    #[test]
    fn answers_are_told_apart() {
        let mut answer = message(NLMSG_ERROR, 0, &[0; 20]);
        assert!(acknowledgement(&answer).is_ok());
        answer[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(acknowledgement(&answer).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(acknowledgement(&answer[..10]).is_err());
        assert!(acknowledgement(&[]).is_err());
    }
}
