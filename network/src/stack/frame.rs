//! Frames: what the guest sends is checked and cut into its parts ([`parse`]), and what the stack says itself is put together
//! ([`Builder`]). Ethernet II, ARP (RFC 826), neighbour discovery (RFC 4861), IPv4, IPv6, UDP, ICMP; TCP goes to smoltcp as it is.
//!
//! Guarantee: no frame makes [`parse`] panic or allocate, and a frame that passes has lengths that agree with each other, comes from
//! the guest's own Ethernet and IP address, and is no fragment. Checksums of the guest's frames are not checked: they come through
//! memory, not over a wire, and Linux leaves them out (VIRTIO_NET_F_CSUM).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use msb_protocol::network::{NetworkAddresses, Transport};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable,
    Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
    Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr, RawHardwareAddress, TcpPacket, UdpPacket, UdpRepr,
};

/// Length of an Ethernet header in bytes.
pub const ETHERNET_HEADER_LEN: usize = 14;
/// Time to live of what we send ourselves.
const HOP_LIMIT: u8 = 64;

/// Why a frame is dropped. Each has its own counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// Lengths or versions that do not agree.
    Malformed,
    /// An Ethernet or IP source that is not the guest's.
    Spoofed,
    /// A fragment: the link's MTU leaves no need for one.
    Fragment,
    /// A protocol or message that nobody here speaks.
    Unsupported,
    /// Longer than the link's MTU.
    TooLong,
    /// A table is full.
    Limit,
    /// The guest does not read what it is sent.
    GuestSlow,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::Spoofed,
        Self::Fragment,
        Self::Unsupported,
        Self::TooLong,
        Self::Limit,
        Self::GuestSlow,
    ];

    /// The word of the metric's attribute.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Spoofed => "spoofed",
            Self::Fragment => "fragment",
            Self::Unsupported => "unsupported",
            Self::TooLong => "too_long",
            Self::Limit => "limit",
            Self::GuestSlow => "guest_slow",
        }
    }
}

/// What a frame of the guest is.
#[derive(Debug, PartialEq, Eq)]
pub enum Ingress<'a> {
    /// A TCP segment.
    Tcp {
        /// The guest's port.
        guest_port: u16,
        /// Where it goes.
        peer: SocketAddr,
        /// Whether it opens a connection: SYN and nothing else.
        opens: bool,
        /// Whether it breaks one: RST.
        resets: bool,
        /// The IP packet.
        packet: &'a [u8],
    },
    /// A UDP datagram.
    Udp {
        /// The guest's port.
        guest_port: u16,
        /// Where it goes.
        peer: SocketAddr,
        /// Its payload.
        payload: &'a [u8],
        /// The IP packet, for an ICMP error.
        packet: &'a [u8],
    },
    /// An ICMP echo request.
    Echo {
        /// Its identifier.
        identifier: u16,
        /// Its sequence number.
        sequence: u16,
        /// Where it goes.
        peer: IpAddr,
        /// Its payload.
        payload: &'a [u8],
        /// The IP packet, for an ICMP error.
        packet: &'a [u8],
    },
    /// An ARP request for the gateway.
    ArpRequest,
    /// A neighbour solicitation for the gateway.
    NeighborSolicitation {
        /// Who asks; unspecified: nobody yet.
        from: Ipv6Addr,
        /// The address that is asked for.
        target: Ipv6Addr,
    },
    /// What guests say as a matter of course and nobody needs to answer: ARP for others, router solicitations, group reports.
    Chatter,
}

/// Parses a frame of the guest.
///
/// # Errors
/// Why it is dropped.
pub fn parse<'a>(frame: &'a [u8], link: &NetworkAddresses) -> Result<Ingress<'a>, DropReason> {
    if frame.len() > usize::from(link.mtu_bytes) + ETHERNET_HEADER_LEN {
        return Err(DropReason::TooLong);
    }
    let ethernet = EthernetFrame::new_checked(frame).map_err(|_| DropReason::Malformed)?;
    if ethernet.src_addr().0 != link.guest_mac.0 {
        return Err(DropReason::Spoofed);
    }
    let to = ethernet.dst_addr();
    if to.0 != link.gateway_mac.0 && !to.is_broadcast() && !to.is_multicast() {
        return Ok(Ingress::Chatter);
    }
    match ethernet.ethertype() {
        EthernetProtocol::Arp => parse_arp(ethernet.payload(), link),
        EthernetProtocol::Ipv4 => parse_ipv4(ethernet.payload(), link),
        EthernetProtocol::Ipv6 => parse_ipv6(ethernet.payload(), link),
        EthernetProtocol::Unknown(_) => Err(DropReason::Unsupported),
    }
}

fn parse_arp<'a>(payload: &[u8], link: &NetworkAddresses) -> Result<Ingress<'a>, DropReason> {
    let packet = ArpPacket::new_checked(payload).map_err(|_| DropReason::Malformed)?;
    let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } =
        ArpRepr::parse(&packet).map_err(|_| DropReason::Malformed)?
    else {
        return Err(DropReason::Malformed);
    };
    let own = source_protocol_addr == link.guest_ipv4 || source_protocol_addr.is_unspecified();
    if source_hardware_addr.0 != link.guest_mac.0 || !own {
        return Err(DropReason::Spoofed);
    }
    match operation {
        ArpOperation::Request if target_protocol_addr == link.gateway_ipv4 => Ok(Ingress::ArpRequest),
        _ => Ok(Ingress::Chatter),
    }
}

fn parse_ipv4<'a>(bytes: &'a [u8], link: &NetworkAddresses) -> Result<Ingress<'a>, DropReason> {
    let packet = Ipv4Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
    let header_len = usize::from(packet.header_len());
    let total_len = usize::from(packet.total_len());
    if packet.version() != 4 || header_len < 20 || total_len < header_len || total_len > bytes.len() {
        return Err(DropReason::Malformed);
    }
    if packet.src_addr() != link.guest_ipv4 {
        return Err(DropReason::Spoofed);
    }
    if packet.more_frags() || packet.frag_offset() != 0 {
        return Err(DropReason::Fragment);
    }
    let whole = &bytes[..total_len];
    let payload = &whole[header_len..];
    let peer = IpAddr::V4(packet.dst_addr());
    match packet.next_header() {
        IpProtocol::Tcp => parse_tcp(whole, payload, peer),
        IpProtocol::Udp => parse_udp(whole, payload, peer),
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(payload).map_err(|_| DropReason::Malformed)?;
            match Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::ignored()) {
                Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) => {
                    Ok(Ingress::Echo { identifier: ident, sequence: seq_no, peer, payload: data, packet: whole })
                }
                // Errors about what we sent: the guest closed a port. The flow ends by itself.
                Ok(Icmpv4Repr::DstUnreachable { .. } | Icmpv4Repr::TimeExceeded { .. }) => Ok(Ingress::Chatter),
                _ => Err(DropReason::Unsupported),
            }
        }
        IpProtocol::Igmp => Ok(Ingress::Chatter),
        _ => Err(DropReason::Unsupported),
    }
}

fn parse_ipv6<'a>(bytes: &'a [u8], link: &NetworkAddresses) -> Result<Ingress<'a>, DropReason> {
    let packet = Ipv6Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
    let total_len = packet.total_len();
    if packet.version() != 6 || total_len > bytes.len() {
        return Err(DropReason::Malformed);
    }
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    let link_local = from.is_unicast_link_local() || from.is_unspecified();
    if from != link.guest_ipv6 && !link_local {
        return Err(DropReason::Spoofed);
    }
    let whole = &bytes[..total_len];
    let payload = &whole[40..];
    let peer = IpAddr::V6(to);
    if packet.next_header() == IpProtocol::Icmpv6 {
        let icmp = Icmpv6Packet::new_checked(payload).map_err(|_| DropReason::Malformed)?;
        return match Icmpv6Repr::parse(&from, &to, &icmp, &ChecksumCapabilities::ignored()) {
            Ok(Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. }))
                if target_addr == link.gateway_ipv6 =>
            {
                Ok(Ingress::NeighborSolicitation { from, target: target_addr })
            }
            Ok(Icmpv6Repr::EchoRequest { ident, seq_no, data }) if !link_local => {
                Ok(Ingress::Echo { identifier: ident, sequence: seq_no, peer, payload: data, packet: whole })
            }
            Ok(Icmpv6Repr::Ndisc(_) | Icmpv6Repr::DstUnreachable { .. } | Icmpv6Repr::TimeExceeded { .. }) => {
                Ok(Ingress::Chatter)
            }
            // Group reports and what else belongs to the link.
            _ if to.is_multicast() => Ok(Ingress::Chatter),
            _ => Err(DropReason::Unsupported),
        };
    }
    // Group reports come behind a hop-by-hop header.
    if packet.next_header() == IpProtocol::HopByHop && to.is_multicast() {
        return Ok(Ingress::Chatter);
    }
    if packet.next_header() == IpProtocol::Ipv6Frag {
        return Err(DropReason::Fragment);
    }
    // The gateway routes nothing from an address that has no way back.
    if link_local {
        return if to.is_multicast() { Ok(Ingress::Chatter) } else { Err(DropReason::Spoofed) };
    }
    match packet.next_header() {
        IpProtocol::Tcp => parse_tcp(whole, payload, peer),
        IpProtocol::Udp => parse_udp(whole, payload, peer),
        _ => Err(DropReason::Unsupported),
    }
}

fn parse_tcp<'a>(packet: &'a [u8], payload: &'a [u8], peer: IpAddr) -> Result<Ingress<'a>, DropReason> {
    let segment = TcpPacket::new_checked(payload).map_err(|_| DropReason::Malformed)?;
    if segment.src_port() == 0 || segment.dst_port() == 0 {
        return Err(DropReason::Malformed);
    }
    Ok(Ingress::Tcp {
        guest_port: segment.src_port(),
        peer: SocketAddr::new(peer, segment.dst_port()),
        opens: segment.syn() && !segment.ack() && !segment.rst() && !segment.fin(),
        resets: segment.rst(),
        packet,
    })
}

fn parse_udp<'a>(packet: &'a [u8], payload: &'a [u8], peer: IpAddr) -> Result<Ingress<'a>, DropReason> {
    let datagram = UdpPacket::new_checked(payload).map_err(|_| DropReason::Malformed)?;
    if datagram.src_port() == 0 || datagram.dst_port() == 0 {
        return Err(DropReason::Malformed);
    }
    Ok(Ingress::Udp {
        guest_port: datagram.src_port(),
        peer: SocketAddr::new(peer, datagram.dst_port()),
        payload: datagram.payload(),
        packet,
    })
}

/// Why something cannot be reached, as ICMP tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// Policy.
    Prohibited,
    /// No route.
    Network,
    /// No answer, or no neighbour.
    Host,
    /// Nobody listens there.
    Port,
}

/// Makes the frames that the stack sends by itself.
#[derive(Clone, Debug)]
pub struct Builder {
    link: NetworkAddresses,
    checksums: ChecksumCapabilities,
}

impl Builder {
    /// Frames from the gateway to the guest; all checksums are computed.
    #[must_use]
    pub fn new(link: NetworkAddresses) -> Self {
        Self { link, checksums: ChecksumCapabilities::default() }
    }

    /// The Ethernet header of every frame to the guest that holds an IP packet.
    #[must_use]
    pub fn ethernet_header(&self, protocol: EthernetProtocol) -> [u8; ETHERNET_HEADER_LEN] {
        let mut header = [0; ETHERNET_HEADER_LEN];
        let mut frame = EthernetFrame::new_unchecked(&mut header[..]);
        frame.set_dst_addr(EthernetAddress(self.link.guest_mac.0));
        frame.set_src_addr(EthernetAddress(self.link.gateway_mac.0));
        frame.set_ethertype(protocol);
        header
    }

    fn frame(&self, protocol: EthernetProtocol, payload_len: usize) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET_HEADER_LEN + payload_len];
        frame[..ETHERNET_HEADER_LEN].copy_from_slice(&self.ethernet_header(protocol));
        frame
    }

    /// An ARP reply: the gateway is here.
    #[must_use]
    pub fn arp_reply(&self) -> Vec<u8> {
        let repr = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(self.link.gateway_mac.0),
            source_protocol_addr: self.link.gateway_ipv4,
            target_hardware_addr: EthernetAddress(self.link.guest_mac.0),
            target_protocol_addr: self.link.guest_ipv4,
        };
        let mut frame = self.frame(EthernetProtocol::Arp, repr.buffer_len());
        repr.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]));
        frame
    }

    /// A neighbour advertisement for `target`, to who asked.
    #[must_use]
    pub fn neighbor_advertisement(&self, from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let anonymous = from.is_unspecified();
        let to = if anonymous { Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1) } else { from };
        let mut flags = NdiscNeighborFlags::OVERRIDE | NdiscNeighborFlags::ROUTER;
        if !anonymous {
            flags |= NdiscNeighborFlags::SOLICITED;
        }
        let repr = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
            flags,
            target_addr: target,
            lladdr: Some(RawHardwareAddress::from_bytes(&self.link.gateway_mac.0)),
        });
        // RFC 4861, section 7.1.2: a hop limit of 255 proves that no router passed it on.
        self.icmpv6(target, to, 255, &repr)
    }

    /// A UDP datagram to the guest; none if it is longer than a datagram can be.
    #[must_use]
    pub fn udp(&self, from: SocketAddr, guest_port: u16, payload: &[u8]) -> Option<Vec<u8>> {
        let udp = UdpRepr { src_port: from.port(), dst_port: guest_port };
        let udp_len = 8 + payload.len();
        let room = usize::from(self.link.mtu_bytes) - if from.is_ipv4() { 20 } else { 40 };
        if udp_len > room {
            return None;
        }
        Some(match from.ip() {
            IpAddr::V4(from) => {
                let to = self.link.guest_ipv4;
                let (mut frame, at) = self.ipv4(from, to, IpProtocol::Udp, udp_len);
                let mut packet = UdpPacket::new_unchecked(&mut frame[at..]);
                let fill = |buffer: &mut [u8]| buffer.copy_from_slice(payload);
                udp.emit(&mut packet, &from.into(), &to.into(), payload.len(), fill, &self.checksums);
                frame
            }
            IpAddr::V6(from) => {
                let to = self.link.guest_ipv6;
                let (mut frame, at) = self.ipv6(from, to, HOP_LIMIT, IpProtocol::Udp, udp_len);
                let mut packet = UdpPacket::new_unchecked(&mut frame[at..]);
                let fill = |buffer: &mut [u8]| buffer.copy_from_slice(payload);
                udp.emit(&mut packet, &from.into(), &to.into(), payload.len(), fill, &self.checksums);
                frame
            }
        })
    }

    /// An ICMP echo reply to the guest; none if it is too long.
    #[must_use]
    pub fn echo_reply(&self, from: IpAddr, identifier: u16, sequence: u16, payload: &[u8]) -> Option<Vec<u8>> {
        if payload.len() + 48 > usize::from(self.link.mtu_bytes) {
            return None;
        }
        Some(match from {
            IpAddr::V4(from) => {
                self.icmpv4(from, &Icmpv4Repr::EchoReply { ident: identifier, seq_no: sequence, data: payload })
            }
            IpAddr::V6(from) => {
                let repr = Icmpv6Repr::EchoReply { ident: identifier, seq_no: sequence, data: payload };
                self.icmpv6(from, self.link.guest_ipv6, HOP_LIMIT, &repr)
            }
        })
    }

    /// An ICMP error about a packet of the guest; none for what deserves none (RFC 1122, section 3.2.2).
    #[must_use]
    pub fn unreachable(&self, packet: &[u8], why: Unreachable) -> Option<Vec<u8>> {
        match packet.first()? >> 4 {
            4 => {
                let original = Ipv4Packet::new_checked(packet).ok()?;
                let (to, header_len) = (original.dst_addr(), usize::from(original.header_len()));
                if to.is_multicast() || to.is_broadcast() {
                    return None;
                }
                let header = Ipv4Repr {
                    src_addr: original.src_addr(),
                    dst_addr: to,
                    next_header: original.next_header(),
                    payload_len: packet.len().checked_sub(header_len)?,
                    hop_limit: original.hop_limit(),
                };
                let data = &packet[header_len..packet.len().min(header_len + 8)];
                let reason = match why {
                    Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
                    Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
                    Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                    Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                };
                // A port error comes from the port's own host, the others from the gateway.
                let from = if why == Unreachable::Port { to } else { self.link.gateway_ipv4 };
                Some(self.icmpv4(from, &Icmpv4Repr::DstUnreachable { reason, header, data }))
            }
            6 => {
                let original = Ipv6Packet::new_checked(packet).ok()?;
                let to = original.dst_addr();
                if to.is_multicast() {
                    return None;
                }
                let header = Ipv6Repr {
                    src_addr: original.src_addr(),
                    dst_addr: to,
                    next_header: original.next_header(),
                    payload_len: packet.len().checked_sub(40)?,
                    hop_limit: original.hop_limit(),
                };
                let data = &packet[40..packet.len().min(40 + 8)];
                let reason = match why {
                    Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
                    Unreachable::Network => Icmpv6DstUnreachable::NoRoute,
                    Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                    Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                };
                let from = if why == Unreachable::Port { to } else { self.link.gateway_ipv6 };
                Some(self.icmpv6(
                    from,
                    self.link.guest_ipv6,
                    HOP_LIMIT,
                    &Icmpv6Repr::DstUnreachable { reason, header, data },
                ))
            }
            _ => None,
        }
    }

    /// The first bytes of a UDP datagram that the guest sent on a flow, as an ICMP error quotes them.
    #[must_use]
    pub fn quoted_udp(&self, guest_port: u16, to: SocketAddr) -> Vec<u8> {
        let udp = UdpRepr { src_port: guest_port, dst_port: to.port() };
        let frame = match to.ip() {
            IpAddr::V4(to) => {
                let from = self.link.guest_ipv4;
                let (mut frame, at) = self.ipv4(from, to, IpProtocol::Udp, 8);
                let mut packet = UdpPacket::new_unchecked(&mut frame[at..]);
                udp.emit(&mut packet, &from.into(), &to.into(), 0, |_| {}, &self.checksums);
                frame
            }
            IpAddr::V6(to) => {
                let from = self.link.guest_ipv6;
                let (mut frame, at) = self.ipv6(from, to, HOP_LIMIT, IpProtocol::Udp, 8);
                let mut packet = UdpPacket::new_unchecked(&mut frame[at..]);
                udp.emit(&mut packet, &from.into(), &to.into(), 0, |_| {}, &self.checksums);
                frame
            }
        };
        frame[ETHERNET_HEADER_LEN..].to_vec()
    }

    fn ipv4(&self, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload_len: usize) -> (Vec<u8>, usize) {
        let ip = Ipv4Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len, hop_limit: HOP_LIMIT };
        let mut frame = self.frame(EthernetProtocol::Ipv4, 20 + payload_len);
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]), &self.checksums);
        (frame, ETHERNET_HEADER_LEN + 20)
    }

    fn ipv6(
        &self,
        from: Ipv6Addr,
        to: Ipv6Addr,
        hop_limit: u8,
        protocol: IpProtocol,
        payload_len: usize,
    ) -> (Vec<u8>, usize) {
        let ip = Ipv6Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len, hop_limit };
        let mut frame = self.frame(EthernetProtocol::Ipv6, 40 + payload_len);
        ip.emit(&mut Ipv6Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]));
        (frame, ETHERNET_HEADER_LEN + 40)
    }

    fn icmpv4(&self, from: Ipv4Addr, repr: &Icmpv4Repr<'_>) -> Vec<u8> {
        let (mut frame, at) = self.ipv4(from, self.link.guest_ipv4, IpProtocol::Icmp, repr.buffer_len());
        repr.emit(&mut Icmpv4Packet::new_unchecked(&mut frame[at..]), &self.checksums);
        frame
    }

    fn icmpv6(&self, from: Ipv6Addr, to: Ipv6Addr, hop_limit: u8, repr: &Icmpv6Repr<'_>) -> Vec<u8> {
        let (mut frame, at) = self.ipv6(from, to, hop_limit, IpProtocol::Icmpv6, repr.buffer_len());
        repr.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(&mut frame[at..]), &self.checksums);
        frame
    }
}

/// The ICMP transport of an address family.
#[must_use]
pub fn icmp_of(address: IpAddr) -> Transport {
    if address.is_ipv4() { Transport::Icmpv4 } else { Transport::Icmpv6 }
}
