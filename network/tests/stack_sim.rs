//! The whole stack on a turned clock: what a guest sees of connections, flows, names and denials, and both sides of each limit.

mod sim;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use msb_network::stack::frame::DropReason;
use msb_network::stack::host::Close;
use msb_network::stack::{CONNECT_TIMEOUT, CONNECTING_COUNT_MAX, Failure, PINGS_COUNT_MAX, Protocol, UDP_IDLE, Way};
use msb_protocol::network::{NetworkProfile, NetworkSpec, parse_rules};
use proptest::prelude::*;
use sim::{CLEAN, Faults, MS, Peer, SimHost, World};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{
    Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    UdpPacket, UdpRepr,
};

const SECOND: Duration = Duration::from_secs(1);

fn spec(rules: &str) -> NetworkSpec {
    NetworkSpec { rules: parse_rules(rules).unwrap(), ..NetworkSpec::default() }
}

fn host(peers: &[(&str, Peer)]) -> SimHost {
    SimHost {
        peers: peers.iter().map(|(to, peer)| (to.parse().unwrap(), peer.clone())).collect(),
        ..SimHost::default()
    }
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr =
        Ipv4Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len: payload.len(), hop_limit: 64 };
    let mut packet = vec![0; 20 + payload.len()];
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &ChecksumCapabilities::default());
    packet[20..].copy_from_slice(payload);
    packet
}

fn udp_packet(world: &World, port: u16, to: &str, payload: &[u8]) -> Vec<u8> {
    let to: SocketAddr = to.parse().unwrap();
    let SocketAddr::V4(v4) = to else { panic!("IPv4 here") };
    let from = world.addresses.guest_ipv4;
    let mut datagram = vec![0; 8 + payload.len()];
    UdpRepr { src_port: port, dst_port: to.port() }.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &from.into(),
        &(*v4.ip()).into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    ipv4(from, *v4.ip(), IpProtocol::Udp, &datagram)
}

fn send_udp(world: &mut World, port: u16, to: &str, payload: &[u8]) {
    let packet = udp_packet(world, port, to, payload);
    let frame = world.framed(&packet);
    world.send_frame(&frame);
}

fn syn_packet(from: Ipv4Addr, port: u16, to: Ipv4Addr, to_port: u16) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: port,
        dst_port: to_port,
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(1),
        ack_number: None,
        window_len: 65_000,
        window_scale: Some(7),
        max_seg_size: Some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut segment = vec![0; repr.buffer_len()];
    repr.emit(
        &mut TcpPacket::new_unchecked(&mut segment[..]),
        &from.into(),
        &to.into(),
        &ChecksumCapabilities::default(),
    );
    ipv4(from, to, IpProtocol::Tcp, &segment)
}

/// Type and code of each ICMPv4 message to the guest, with the address it comes from.
fn icmp_seen(world: &mut World) -> Vec<(u8, u8, String)> {
    let is_icmp = |frame: &Vec<u8>| frame[12..14] == [8, 0] && frame[23] == 1;
    let source = |frame: &[u8]| Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]).to_string();
    world.seen().iter().filter(|frame| is_icmp(frame)).map(|frame| (frame[34], frame[35], source(frame))).collect()
}

/// Source port and payload of each UDP datagram to the guest, cut as frames are.
fn udp_seen(world: &mut World) -> Vec<(u16, Vec<u8>)> {
    let is_udp = |frame: &Vec<u8>| frame[12..14] == [8, 0] && frame[23] == 17;
    world
        .seen()
        .iter()
        .filter(|frame| is_udp(frame))
        .map(|frame| (u16::from_be_bytes([frame[34], frame[35]]), frame[42..].to_vec()))
        .collect()
}

/// Sends `len` bytes and half-closes, reads until the end; what came back.
fn exchange(world: &mut World, handle: smoltcp::iface::SocketHandle, len: usize, limit: Duration) -> Option<Vec<u8>> {
    let data: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
    let (mut sent, mut got, mut closed) = (0, Vec::new(), false);
    let done = world.run(limit, |world| {
        let socket = world.socket(handle);
        if sent < len && socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if sent == len && !closed && socket.may_send() {
            socket.close();
            closed = true;
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        closed && !socket.may_recv() && socket.recv_queue() == 0
    });
    done.then_some(got)
}

#[test]
fn bytes_go_there_and_back_with_half_close_over_both_families() {
    for to in ["1.2.3.4:80", "[2606:4700::5]:80"] {
        let mut world = World::new(spec(""), host(&[(to, Peer::Echo)]));
        let handle = world.connect(to);
        let got = exchange(&mut world, handle, 3 << 20, 10 * SECOND).expect("an end within the time");
        assert_eq!(got.len(), 3 << 20);
        assert!(got.iter().enumerate().all(|(n, byte)| *byte == (n * 7) as u8));
        world.pass(SECOND);
        assert_eq!(world.stack.counters().connections, 0);
        let closed: Vec<_> = world.stack.host().closed.values().copied().collect();
        assert_eq!(closed, [(Close::Graceful, 3 << 20)]);
        assert_eq!(world.stack.counters().opened[&(Way::Outbound, Protocol::Tcp)], 1);
    }
}

#[test]
fn the_guest_is_told_only_when_the_host_has_connected() {
    let mut world = World::new(spec(""), SimHost { connect_delay: 500 * MS, ..host(&[("1.2.3.4:80", Peer::Echo)]) });
    let handle = world.connect("1.2.3.4:80");
    world.pass(499 * MS);
    assert_eq!(world.state(handle), State::SynSent);
    // The guest repeats its SYN meanwhile; it is one attempt all the same.
    assert!(world.run(SECOND, |world| world.state(handle) == State::Established));
    assert_eq!(world.stack.host().attempts.len(), 1);
}

#[test]
fn refused_unreachable_and_silent_are_told_apart() {
    let peers = [("1.2.3.4:1", Peer::Refuse), ("1.2.3.4:2", Peer::NoRoute), ("1.2.3.4:3", Peer::Silent)];
    let mut world = World::new(spec(""), host(&peers));
    let refused = world.connect("1.2.3.4:1");
    world.pass(10 * MS);
    assert_eq!(world.state(refused), State::Closed);
    assert!(icmp_seen(&mut world).is_empty());
    world.connect("1.2.3.4:2");
    world.pass(10 * MS);
    assert_eq!(icmp_seen(&mut world), [(3, 1, "172.16.0.1".into())]);
    world.connect("1.2.3.4:3");
    let start = world.now;
    world.pass(CONNECT_TIMEOUT - MS);
    assert!(icmp_seen(&mut world).iter().all(|(kind, ..)| *kind != 3) || world.now > start);
    world.pass(2 * MS);
    let failed = &world.stack.counters().failed;
    assert_eq!(failed[&(Way::Outbound, Failure::Refused)], 1);
    assert_eq!(failed[&(Way::Outbound, Failure::TimedOut)], 1);
    assert!(failed[&(Way::Outbound, Failure::Unreachable)] >= 1);
}

#[test]
fn a_denied_connection_gets_rst_at_once_and_a_line_and_nothing_leaves() {
    let mut world =
        World::new(spec("deny@1.2.3.0/24:tcp:443"), SimHost { default_peer: Some(Peer::Echo), ..SimHost::default() });
    let targets =
        ["1.2.3.4:443", "10.0.0.1:80", "169.254.169.254:80", "172.16.0.1:22", "[fd00:ec2::254]:80", "5.5.5.5:80"];
    for target in targets {
        let handle = world.connect(target);
        world.pass(MS);
        assert_eq!(world.state(handle), State::Closed, "{target}");
    }
    assert!(world.stack.host().attempts.is_empty());
    let records: Vec<_> =
        world.records().iter().map(|r| (r.address.unwrap().to_string(), r.class.unwrap(), r.rule.clone())).collect();
    let row = |address: &str, class, rule: &str| (address.to_string(), class, rule.to_string());
    assert_eq!(
        records,
        [
            row("1.2.3.4", "public", "deny@1.2.3.0/24:tcp:443"),
            row("10.0.0.1", "private", "default"),
            row("169.254.169.254", "meta", "default"),
            row("172.16.0.1", "host", "default"),
            row("fd00:ec2::254", "meta", "default"),
            row("5.5.5.5", "host", "default"),
        ]
    );
    assert_eq!(world.stack.counters().denied[&(Way::Outbound, Protocol::Tcp)], 6);
}

#[test]
fn with_the_profile_host_the_gateway_is_the_hosts_loopback() {
    let spec = NetworkSpec { profile: NetworkProfile::Host, ..NetworkSpec::default() };
    let mut world = World::new(spec, host(&[("127.0.0.1:8080", Peer::Echo), ("[::1]:8080", Peer::Echo)]));
    for to in ["172.16.0.1:8080", "[fd42:6d73:62::1]:8080"] {
        let handle = world.connect(to);
        assert_eq!(exchange(&mut world, handle, 1000, SECOND).map(|got| got.len()), Some(1000));
    }
}

#[test]
fn resets_go_through_both_ways() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:80", Peer::Deaf)]));
    let handle = world.connect("1.2.3.4:80");
    assert!(world.run(SECOND, |world| world.state(handle) == State::Established));
    let (id, _) = world.stack.host().socket_to("1.2.3.4:80");
    world.socket(handle).abort();
    world.pass(10 * MS);
    assert_eq!(world.stack.host().closed[&id].0, Close::Reset);

    let handle = world.connect("1.2.3.4:80");
    assert!(world.run(SECOND, |world| world.state(handle) == State::Established));
    world.stack.host().socket_to("1.2.3.4:80").1.broken = true;
    world.pass(10 * MS);
    assert_eq!(world.state(handle), State::Closed);
    assert_eq!(world.stack.counters().connections, 0);
}

#[test]
fn the_host_may_end_first() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:80", Peer::Source(100_000))]));
    let handle = world.connect("1.2.3.4:80");
    let mut got = Vec::new();
    assert!(world.run(SECOND, |world| {
        let socket = world.socket(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        socket.state() == State::CloseWait
    }));
    assert_eq!(got.len(), 100_000);
    world.socket(handle).close();
    world.pass(SECOND);
    assert_eq!((world.stack.counters().connections, world.state(handle)), (0, State::Closed));
    assert!(world.stack.host().closed.values().all(|(how, _)| *how == Close::Graceful));
}

/// smoltcp 0.14 ignores a window that opens while it waits in LAST-ACK; the relay must not get there with data left.
#[test]
fn a_guest_that_ended_first_and_reads_slowly_waits_for_no_probe() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:80", Peer::Source(2 << 20))]));
    let handle = world.connect("1.2.3.4:80");
    let got = exchange(&mut world, handle, 0, 100 * MS).expect("no stall");
    assert_eq!(got.len(), 2 << 20);
}

#[test]
fn the_connection_limit_holds_on_both_sides() {
    let mut spec = spec("");
    spec.connections_max = 8;
    let mut world = World::new(spec, SimHost { default_peer: Some(Peer::Echo), ..SimHost::default() });
    let handles: Vec<_> = (0..8).map(|n| world.connect(&format!("1.2.3.4:{}", 80 + n))).collect();
    world.pass(10 * MS);
    for handle in &handles {
        assert_eq!(world.state(*handle), State::Established);
    }
    let ninth = world.connect("1.2.3.4:99");
    world.pass(10 * MS);
    assert_eq!(world.state(ninth), State::Closed);
    let records = world.records();
    assert_eq!((records.len(), records[0].verdict), (1, "limit"));
    world.socket(handles[0]).abort();
    world.pass(10 * MS);
    let tenth = world.connect("1.2.3.4:99");
    world.pass(10 * MS);
    assert_eq!(world.state(tenth), State::Established);
}

#[test]
fn a_flood_of_syns_costs_no_more_than_the_table() {
    let mut world = World::new(spec(""), SimHost { default_peer: Some(Peer::Silent), ..SimHost::default() });
    let from = world.addresses.guest_ipv4;
    for n in 0..65_000u32 {
        let packet = syn_packet(from, (n % 60_000) as u16 + 1, Ipv4Addr::from_bits(0x0102_0000 + n), 80);
        let frame = world.framed(&packet);
        world.down.now = world.now;
        world.stack.ingress(world.now, &frame, &mut world.down);
    }
    world.settle();
    assert_eq!(world.stack.host().sockets.len(), CONNECTING_COUNT_MAX);
    assert_eq!(world.stack.counters().dropped[&DropReason::Limit], 65_000 - CONNECTING_COUNT_MAX as u64);
    world.pass(CONNECT_TIMEOUT + SECOND);
    assert_eq!((world.stack.host().sockets.len(), world.stack.counters().connections), (0, 0));
}

#[test]
fn a_slow_reader_on_either_side_stalls_nobody_else() {
    let peers = [("1.2.3.4:1", Peer::Source(64 << 20)), ("1.2.3.4:2", Peer::Deaf), ("1.2.3.4:3", Peer::Echo)];
    let mut world = World::new(spec(""), host(&peers));
    let never_reads = world.connect("1.2.3.4:1");
    let never_heard = world.connect("1.2.3.4:2");
    let mut offered = 0;
    world.run(SECOND, |world| {
        let socket = world.socket(never_heard);
        while socket.can_send() {
            offered += socket.send_slice(&[0; 4096]).unwrap();
        }
        false
    });
    // What the guest could push in is what the buffers on the way hold: its own, the stack's, the peer's.
    assert!(offered <= 3 * (256 << 10), "{offered}");
    assert_eq!(world.socket(never_reads).recv_queue(), 256 << 10);
    let echo = world.connect("1.2.3.4:3");
    assert_eq!(exchange(&mut world, echo, 1 << 20, SECOND).map(|got| got.len()), Some(1 << 20));
    // The reader wakes up and nothing is missing.
    let mut got = 0;
    world.run(10 * SECOND, |world| {
        let socket = world.socket(never_reads);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got += bytes.len())).unwrap();
        }
        got == 64 << 20
    });
    assert_eq!(got, 64 << 20);
}

#[test]
fn a_guest_without_room_gets_everything_once_it_has_some() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:80", Peer::Source(4 << 20))]));
    let handle = world.connect("1.2.3.4:80");
    let (mut got, mut turns) = (0, 0u32);
    let done = world.run(60 * SECOND, |world| {
        turns += 1;
        world.down.room = turns % 3 != 0;
        let socket = world.socket(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got += bytes.len())).unwrap();
        }
        got == 4 << 20
    });
    assert!(done, "{got} bytes");
    world.down.room = false;
    for n in 0..10_000u16 {
        send_udp(&mut world, n + 1, "10.0.0.1:99", b"x");
    }
    assert!(world.stack.counters().dropped[&DropReason::GuestSlow] >= 9_000);
}

#[test]
fn datagrams_flow_both_ways_until_they_have_been_idle() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:99", Peer::Datagrams(|data| [b"re: ", data].concat()))]));
    send_udp(&mut world, 5000, "1.2.3.4:99", b"hello");
    world.settle();
    assert_eq!(udp_seen(&mut world), [(99, b"re: hello".to_vec())]);
    world.pass(UDP_IDLE - MS);
    assert_eq!(world.stack.counters().flows, 1);
    world.pass(6 * SECOND);
    assert_eq!((world.stack.counters().flows, world.stack.host().sockets.len()), (0, 0));
    // A long datagram passes whole.
    send_udp(&mut world, 5000, "1.2.3.4:99", &vec![7; 60_000]);
    world.settle();
    assert_eq!(world.stack.host().socket_to("1.2.3.4:99").1.taken, 60_000);
}

#[test]
fn denied_and_refused_datagrams_are_told_by_icmp() {
    let mut world = World::new(spec(""), host(&[("1.2.3.4:99", Peer::Refuse)]));
    send_udp(&mut world, 5000, "10.0.0.1:99", b"x");
    assert_eq!(icmp_seen(&mut world), [(3, 13, "172.16.0.1".into())]);
    send_udp(&mut world, 5000, "1.2.3.4:99", b"x");
    assert_eq!(icmp_seen(&mut world), [(3, 3, "1.2.3.4".into())]);
    send_udp(&mut world, 5000, "1.2.3.4:853", b"x");
    assert_eq!(icmp_seen(&mut world), [(3, 13, "172.16.0.1".into())]);
    send_udp(&mut world, 5353, "224.0.0.251:5353", b"x");
    assert!(icmp_seen(&mut world).is_empty(), "nothing is said about multicast");
    let rules: Vec<_> = world.records().into_iter().map(|record| record.rule).collect();
    assert_eq!(rules, ["default", "encrypted-dns", "default"]);
}

#[test]
fn a_full_table_gives_up_the_flow_that_was_idle_longest() {
    let mut spec = spec("");
    spec.connections_max = 4;
    let mut world =
        World::new(spec, SimHost { default_peer: Some(Peer::Datagrams(|_| Vec::new())), ..SimHost::default() });
    for port in 1..=5 {
        send_udp(&mut world, 5000, &format!("1.2.3.4:{port}"), b"x");
        world.pass(10 * MS);
    }
    let open: Vec<u16> = world.stack.host().sockets.values().map(|socket| socket.to.port()).collect();
    assert_eq!(open, [2, 3, 4, 5]);
}

#[test]
fn pings_go_out_come_back_and_are_bounded() {
    let answer = |request: &[u8]| [&[0, 0, 0, 0, 9, 9], &request[6..]].concat();
    let mut world = World::new(spec(""), SimHost { default_peer: Some(Peer::Datagrams(answer)), ..SimHost::default() });
    let ping = |world: &mut World, to: [u8; 4], ident: u16| {
        let repr = Icmpv4Repr::EchoRequest { ident, seq_no: 7, data: b"payload" };
        let mut icmp = vec![0; repr.buffer_len()];
        repr.emit(&mut Icmpv4Packet::new_unchecked(&mut icmp[..]), &ChecksumCapabilities::default());
        let packet = ipv4(world.addresses.guest_ipv4, to.into(), IpProtocol::Icmp, &icmp);
        let frame = world.framed(&packet);
        world.send_frame(&frame);
        world.settle();
    };
    for to in [[1, 2, 3, 4], [172, 16, 0, 1]] {
        ping(&mut world, to, 0x1234);
        let frames = world.seen();
        let icmp = Icmpv4Packet::new_checked(&frames.last().unwrap()[34..]).unwrap();
        let repr = Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default()).unwrap();
        assert_eq!(repr, Icmpv4Repr::EchoReply { ident: 0x1234, seq_no: 7, data: b"payload" }, "{to:?}");
    }
    ping(&mut world, [10, 0, 0, 1], 1);
    assert_eq!(icmp_seen(&mut world), [(3, 13, "172.16.0.1".into())]);
    for ident in 0..2 * PINGS_COUNT_MAX as u16 {
        ping(&mut world, [1, 2, 3, 4], ident);
    }
    assert_eq!(world.stack.counters().flows, PINGS_COUNT_MAX as u64);
}

/// A DNS query for the A record of a name.
fn dns_query(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// What an upstream server says: 1.2.3.4 for everything.
fn dns_answer(query: &[u8]) -> Vec<u8> {
    let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
    let mut bytes = query[..end].to_vec();
    bytes[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 2, 3, 4]);
    bytes
}

#[test]
fn a_name_rule_opens_what_the_name_led_to_and_nothing_else() {
    let spec = NetworkSpec { profile: NetworkProfile::None, ..spec("allow@api.example:tcp:443") };
    let mut world = World::new(
        spec,
        host(&[("9.9.9.9:53", Peer::Datagrams(dns_answer)), ("1.2.3.4:443", Peer::Echo), ("1.2.3.5:443", Peer::Echo)]),
    );
    let before = world.connect("1.2.3.4:443");
    world.pass(10 * MS);
    assert_eq!(world.state(before), State::Closed, "before the name was asked for");

    send_udp(&mut world, 5000, "172.16.0.1:53", &dns_query("other.example"));
    let answers = udp_seen(&mut world);
    assert_eq!((answers[0].0, answers[0].1[3] & 0xf), (53, 3), "NXDOMAIN");
    // Whoever is asked, we answer, as who was asked; but only for servers that policy allows.
    send_udp(&mut world, 5000, "172.16.0.1:53", &dns_query("api.example"));
    world.settle();
    let answers = udp_seen(&mut world);
    assert_eq!((answers[0].1[3] & 0xf, answers[0].1[7]), (0, 1), "one answer");
    let allowed = world.connect("1.2.3.4:443");
    let other_port = world.connect("1.2.3.4:80");
    let other_address = world.connect("1.2.3.5:443");
    world.pass(10 * MS);
    assert_eq!(world.state(allowed), State::Established);
    assert_eq!((world.state(other_port), world.state(other_address)), (State::Closed, State::Closed));
    let record = world.records().pop().unwrap();
    assert_eq!((record.address.unwrap().to_string(), record.rule.as_str()), ("1.2.3.5".into(), "default"));
    let explained = world.stack.explain(world.now, &"https://api.example".parse().unwrap());
    assert_eq!(explained.steps[1].about, "tcp 1.2.3.4:443 (public)");
}

#[test]
fn names_are_answered_over_tcp_too() {
    let mut world = World::new(spec("deny@bad.example"), host(&[("9.9.9.9:53", Peer::Datagrams(dns_answer))]));
    let handle = world.connect("172.16.0.1:53");
    assert!(world.run(SECOND, |world| world.state(handle) == State::Established));
    for name in ["good.example", "bad.example"] {
        let query = dns_query(name);
        let framed = [&(query.len() as u16).to_be_bytes()[..], &query].concat();
        world.socket(handle).send_slice(&framed).unwrap();
    }
    let mut got = Vec::new();
    world.run(SECOND, |world| {
        let socket = world.socket(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        false
    });
    let mut codes = Vec::new();
    let mut rest = &got[..];
    while let Some([high, low]) = rest.first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        codes.push(rest[5] & 0xf);
        rest = &rest[2 + len..];
    }
    codes.sort_unstable();
    assert_eq!(codes, [0, 3]);
    // An idle connection is closed by us; one that lies about lengths is broken.
    world.pass(11 * SECOND);
    assert_eq!(world.state(handle), State::CloseWait);
    let liar = world.connect("172.16.0.1:53");
    world.pass(10 * MS);
    world.socket(liar).send_slice(&[0xff, 0xff, 0]).unwrap();
    world.pass(10 * MS);
    assert_eq!(world.state(liar), State::Closed);
}

#[test]
fn a_published_port_leads_to_the_guest() {
    let mut spec = spec("deny:ingress@10.0.0.0/8");
    spec.ports = vec!["127.0.0.1:8080:80".parse().unwrap()];
    let visitor = |from: &str| (from.parse().unwrap(), Peer::Source(300_000));
    let mut world = World::new(spec, SimHost::default());
    let server = world.listen(80);
    world.stack.host().visitors.push_back(visitor("127.0.0.1:5555"));
    let mut got = 0;
    assert!(world.run(SECOND, |world| {
        let socket = world.socket(server);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got += bytes.len())).unwrap();
        }
        socket.state() == State::CloseWait
    }));
    assert_eq!(got, 300_000);
    let peer = world.socket(server).remote_endpoint().unwrap();
    assert_eq!(peer.addr.to_string(), "172.16.0.1");
    world.socket(server).close();
    world.pass(10 * MS);
    assert!(world.stack.host().closed.values().all(|(how, _)| *how == Close::Graceful));

    // Nobody listens any more: the visitor sees the refusal.
    world.stack.host().visitors.push_back(visitor("127.0.0.1:5556"));
    world.pass(10 * MS);
    assert_eq!(world.stack.host().closed.values().last().unwrap().0, Close::Reset);
    // Policy sees the visitor's own address.
    world.stack.host().visitors.push_back(visitor("10.1.1.1:5557"));
    world.pass(10 * MS);
    assert_eq!(world.stack.host().closed.len(), 3);
    let record = world.records().pop().unwrap();
    assert_eq!((record.rule.as_str(), record.port), ("deny:ingress@10.0.0.0/8", Some(80)));
}

#[test]
fn visitors_wait_in_the_backlog_while_the_table_is_full() {
    let mut spec = spec("");
    spec.connections_max = 1;
    spec.ports = vec!["127.0.0.1:8080:80".parse().unwrap()];
    let mut world = World::new(spec, SimHost::default());
    let first = world.listen(80);
    let second = world.listen(80);
    for port in [1, 2] {
        world.stack.host().visitors.push_back((SocketAddr::from(([127, 0, 0, 1], port)), Peer::Deaf));
    }
    world.pass(100 * MS);
    assert_eq!((world.state(first), world.state(second)), (State::Established, State::Listen));
    assert_eq!(world.stack.host().visitors.len(), 1);
    world.socket(first).abort();
    world.pass(100 * MS);
    assert_eq!(world.state(second), State::Established);
}

#[test]
fn a_published_udp_port_has_a_flow_for_each_peer() {
    let mut spec = spec("");
    spec.ports = vec!["127.0.0.1:8080:99/udp".parse().unwrap()];
    let mut world = World::new(spec, SimHost::default());
    let peers: Vec<SocketAddr> = (1..=2).map(|n| SocketAddr::from(([127, 0, 0, 1], n))).collect();
    for peer in &peers {
        world.stack.host().visits.push_back((b"hello".to_vec(), *peer));
    }
    world.settle();
    let seen = udp_seen(&mut world);
    assert_eq!(seen.len(), 2);
    assert_ne!(seen[0].0, seen[1].0);
    send_udp(&mut world, 99, &format!("172.16.0.1:{}", seen[1].0), b"answer");
    assert_eq!(world.stack.host().visit_answers, [(b"answer".to_vec(), peers[1])]);
    // Another port of the guest is not part of the flow.
    send_udp(&mut world, 98, &format!("172.16.0.1:{}", seen[1].0), b"answer");
    assert_eq!((world.stack.host().visit_answers.len(), icmp_seen(&mut world).len()), (1, 1));
    world.pass(UDP_IDLE + 6 * SECOND);
    assert_eq!(world.stack.counters().flows, 0);
}

#[test]
fn frames_that_are_not_the_guests_own_are_dropped_and_counted() {
    let mut world = World::new(spec(""), SimHost { default_peer: Some(Peer::Echo), ..SimHost::default() });
    let good = world.framed(&syn_packet(world.addresses.guest_ipv4, 1, Ipv4Addr::new(1, 2, 3, 4), 80));
    let mut cases: Vec<(Vec<u8>, DropReason)> = Vec::new();
    let mut edit = |reason, change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        cases.push((frame, reason));
    };
    edit(DropReason::Spoofed, &|frame| frame[6] ^= 4);
    edit(DropReason::Spoofed, &|frame| frame[29] ^= 1);
    edit(DropReason::Fragment, &|frame| frame[20] = 0x20);
    edit(DropReason::Fragment, &|frame| frame[21] = 1);
    edit(DropReason::Malformed, &|frame| frame.truncate(30));
    edit(DropReason::Malformed, &|frame| frame.truncate(13));
    edit(DropReason::Malformed, &|frame| frame[14] = 0x55);
    edit(DropReason::Malformed, &|frame| frame[46] = 0x10);
    edit(DropReason::Malformed, &|frame| frame[16] = 0xff);
    edit(DropReason::Unsupported, &|frame| frame[12] = 0x81);
    edit(DropReason::Unsupported, &|frame| frame[23] = 132);
    edit(DropReason::TooLong, &|frame| frame.resize(65_535 + 14 + 1, 0));
    for (frame, reason) in cases {
        let before = world.stack.counters().dropped.get(&reason).copied().unwrap_or(0);
        world.send_frame(&frame);
        assert_eq!(world.stack.counters().dropped[&reason], before + 1, "{reason:?}");
    }
    assert!(world.stack.host().attempts.is_empty() && world.seen().is_empty());
    // One byte less than too long is a frame with padding behind the packet.
    let mut padded = good.clone();
    padded.resize(65_535 + 14, 0);
    world.send_frame(&padded);
    assert_eq!(world.stack.host().attempts.len(), 1);
}

#[test]
fn the_gateway_answers_for_itself_only() {
    let mut world = World::new(spec(""), SimHost::default());
    let link = world.addresses;
    let arp = |target: [u8; 4]| {
        let mut frame =
            [&[0xff; 6][..], &link.guest_mac.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &link.guest_mac.0].concat();
        frame.extend(link.guest_ipv4.octets());
        frame.extend([0; 6]);
        frame.extend(target);
        frame
    };
    world.send_frame(&arp([172, 16, 0, 3]));
    assert!(world.seen().is_empty());
    world.send_frame(&arp([172, 16, 0, 1]));
    let reply = world.seen().remove(0);
    assert_eq!(
        (&reply[..6], &reply[20..22], &reply[22..28]),
        (&link.guest_mac.0[..], &[0u8, 2][..], &link.gateway_mac.0[..])
    );
    // A neighbour solicitation for the gateway, from the guest's address.
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(link.gateway_ipv6.octets());
    let mut packet = vec![0x60, 0, 0, 0, 0, 24, 58, 255];
    packet.extend(link.guest_ipv6.octets());
    packet.extend(link.gateway_ipv6.octets());
    packet.extend(&icmp);
    let frame = world.framed(&packet);
    world.send_frame(&frame);
    let reply = world.seen().remove(0);
    assert_eq!((reply[54], &reply[62..78]), (136, &link.gateway_ipv6.octets()[..]));
}

/// A transfer in each direction over links of several kinds, in the time of the world. The table is a snapshot: run with
/// `MSB_UPDATE_SNAPSHOTS=1` to write it anew, and look at the difference.
#[test]
fn throughput_under_loss_delay_reordering_and_duplication() {
    use std::fmt::Write;
    let len = 2 << 20;
    let mut table = String::from("loss duplicate delay_ms jitter_ms | to_host_kib_per_s to_guest_kib_per_s\n");
    for (loss_percent, duplicate_percent, delay_ms, jitter_ms) in [
        (0, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 10, 0),
        (0, 0, 1, 2),
        (0, 10, 1, 0),
        (1, 0, 1, 0),
        (5, 0, 1, 0),
        (2, 2, 5, 2),
    ] {
        let faults =
            Faults { loss_percent, duplicate_percent, delay: CLEAN.delay + delay_ms * MS, jitter: jitter_ms * MS };
        let rate =
            |world: &World, start: Duration| (len as u128 * 1_000_000 / 1024) / (world.now - start).as_micros().max(1);
        let mut world = World::with(
            spec(""),
            host(&[("1.2.3.4:1", Peer::Echo), ("1.2.3.4:2", Peer::Source(len))]),
            faults,
            11,
            256 << 10,
        );
        let handle = world.connect("1.2.3.4:1");
        let got = exchange(&mut world, handle, len, 600 * SECOND).expect("an end");
        assert!(got.len() == len && got.iter().enumerate().all(|(n, byte)| *byte == (n * 7) as u8));
        let up = rate(&world, Duration::ZERO);
        let start = world.now;
        let handle = world.connect("1.2.3.4:2");
        let got = exchange(&mut world, handle, 0, 600 * SECOND).expect("an end");
        assert!(got.len() == len && got.iter().enumerate().all(|(n, byte)| *byte == n as u8));
        let down = rate(&world, start);
        writeln!(table, "{loss_percent:>4} {duplicate_percent:>9} {delay_ms:>8} {jitter_ms:>9} | {up:>17} {down:>18}")
            .unwrap();
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/throughput.txt");
    if std::env::var_os("MSB_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(table, expected, "the table has changed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// No sequence of frames makes the stack panic, spin or grow: damaged ones of every kind, in any order.
    #[test]
    fn hostile_frames_break_nothing(frames in prop::collection::vec(
        (0usize..6, prop::collection::vec((0usize..120, any::<u8>()), 0..6), 0usize..200, prop::collection::vec(any::<u8>(), 0..80)), 1..40)
    ) {
        let mut spec = spec("");
        spec.connections_max = 16;
        let mut world = World::new(spec, SimHost { default_peer: Some(Peer::Echo), ..SimHost::default() });
        let from = world.addresses.guest_ipv4;
        for (kind, edits, cut, noise) in frames {
            let packet = match kind {
                0 => syn_packet(from, 1000, Ipv4Addr::new(1, 2, 3, 4), 80),
                1 => udp_packet(&world, 1000, "1.2.3.4:99", &noise),
                2 => udp_packet(&world, 1000, "172.16.0.1:53", &dns_query("www.example.com")),
                3 => ipv4(from, Ipv4Addr::new(1, 2, 3, 4), IpProtocol::Icmp, &noise),
                4 => [&[0x60, 0, 0, 0, 0, noise.len() as u8, 58, 255][..], &world.addresses.guest_ipv6.octets(),
                      &world.addresses.gateway_ipv6.octets(), &noise].concat(),
                _ => noise.clone(),
            };
            let mut frame = world.framed(&packet);
            for (at, value) in edits {
                let at = 12 + at % frame.len().saturating_sub(12).max(1);
                if let Some(byte) = frame.get_mut(at) {
                    *byte ^= value;
                }
            }
            frame.truncate(cut.max(1));
            world.send_frame(&frame);
            world.pass(MS);
        }
        let counters = world.stack.counters();
        prop_assert!(counters.connections + counters.flows <= 16);
        // Time passes, and everything but open connections has gone.
        world.pass(120 * SECOND);
        prop_assert_eq!(world.stack.counters().flows, 0);
    }
}
