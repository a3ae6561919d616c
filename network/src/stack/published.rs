//! Published ports: who connects to the host is connected to the guest. The listeners are the daemon's; connections wait in their
//! backlog until the stack has room for them. The guest sees the gateway as the peer.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use msb_protocol::network::{Direction, PortTransport, PublishedPort, Transport};

use super::host::{Close, Host};
use super::tcp::{Connection, Open, Relay, Service, State};
use super::{ACCEPTS_PER_TURN, ConnectionKey, Failure, FlowEnd, FlowKey, FlowKind, FrameSink, Owner, Stack, Way};
use crate::policy::Attempt;

/// First of the ports that the gateway connects from.
const EPHEMERAL_FIRST: u16 = 32_768;

impl<H: Host> Stack<H> {
    /// Serves every listener at which somebody may wait. Whether more wait that could be served.
    pub(super) fn accept(&mut self, now: Duration, sink: &mut dyn FrameSink) -> bool {
        let mut more = false;
        for index in 0..self.publications.len() {
            if !self.publications[index].ready {
                continue;
            }
            let port = self.publications[index].port;
            let served = match port.transport {
                PortTransport::Tcp => self.accept_connections(now, index, port),
                PortTransport::Udp => self.receive_datagrams(now, index, port, sink),
            };
            match served {
                Served::All => self.publications[index].ready = false,
                Served::MoreLater => {}
                Served::MoreNow => more = true,
            }
        }
        more
    }

    fn accept_connections(&mut self, now: Duration, index: usize, port: PublishedPort) -> Served {
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.has_capacity() {
                return Served::MoreLater;
            }
            let id = self.new_id();
            let peer = match self.host.accept(index, id) {
                Ok(peer) => peer,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Served::All,
                // The visitor left before it was let in.
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(_) => {
                    *self.counters.failed.entry((Way::Inbound, Failure::HostLimit)).or_default() += 1;
                    return Served::MoreLater;
                }
            };
            let attempt = Attempt {
                direction: Direction::Ingress,
                address: peer.ip(),
                transport: Transport::Tcp,
                port: port.guest_port,
            };
            let decision = self.policy.decide(now, &attempt, &self.pins);
            if !decision.is_allowed() {
                self.denied(now, &attempt, decision);
                self.host.close(id, Close::Reset);
                continue;
            }
            let (gateway, guest) = self.ends(port);
            let from = self.free_port(|stack, from| {
                let from = SocketAddr::new(gateway, from);
                !stack.connections.contains_key(&ConnectionKey { guest_port: port.guest_port, peer: from })
            });
            let from = SocketAddr::new(gateway, from);
            let to = SocketAddr::new(guest, port.guest_port);
            let service = Service::Relay(Relay::ready());
            let Some(open) = Open::connecting(&mut self.interface, from, to, service, &mut self.tiers) else {
                self.host.close(id, Close::Reset);
                continue;
            };
            *self.counters.opened.entry((Way::Inbound, Transport::Tcp.into())).or_default() += 1;
            let key = ConnectionKey { guest_port: port.guest_port, peer: from };
            let state = State::Open(Box::new(open));
            self.connections.insert(key, Connection { id, state, deadline: None, queued: false, inbound: true });
            self.owners.insert(id, Owner::Connection(key));
            self.queue_connection(key);
        }
        Served::MoreNow
    }

    fn receive_datagrams(
        &mut self,
        now: Duration,
        index: usize,
        port: PublishedPort,
        sink: &mut dyn FrameSink,
    ) -> Served {
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.outbox.has_room(sink) {
                return Served::MoreLater;
            }
            let (len, peer) = match self.host.receive_from(index, &mut self.buffer) {
                Ok(received) => received,
                // A port error about what we sent to some peer; the next datagram has nothing to do with it.
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(_) => return Served::All,
            };
            let Some(key) = self.flow_of_visitor(now, index, port, peer) else { continue };
            let data = &self.buffer[..len.min(self.buffer.len())];
            match self.builder.udp(key.peer, key.guest_port, data) {
                Some(frame) => self.outbox.send(sink, &frame),
                None => self.counters.drop_frame(super::frame::DropReason::TooLong),
            }
        }
        Served::MoreNow
    }

    /// The flow of a peer of a published UDP port, opened if policy allows it.
    fn flow_of_visitor(
        &mut self,
        now: Duration,
        index: usize,
        port: PublishedPort,
        peer: SocketAddr,
    ) -> Option<FlowKey> {
        if let Some(key) = self.visitors.get(&(index, peer)).copied() {
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.used = now;
            }
            return Some(key);
        }
        let attempt = Attempt {
            direction: Direction::Ingress,
            address: peer.ip(),
            transport: Transport::Udp,
            port: port.guest_port,
        };
        let decision = self.policy.decide(now, &attempt, &self.pins);
        if !decision.is_allowed() {
            self.denied(now, &attempt, decision);
            return None;
        }
        if !self.make_room_for_flow(FlowKind::Udp) {
            self.over_limit(now, &attempt);
            return None;
        }
        let (gateway, _) = self.ends(port);
        let key_of =
            |from| FlowKey { kind: FlowKind::Udp, guest_port: port.guest_port, peer: SocketAddr::new(gateway, from) };
        let from = self.free_port(|stack, from| !stack.flows.contains_key(&key_of(from)));
        let key = key_of(from);
        self.insert_flow(now, key, FlowEnd::Published { listener: index, peer }, Direction::Ingress);
        self.visitors.insert((index, peer), key);
        Some(key)
    }

    /// The gateway's and the guest's address for a published port: of the family it is bound in.
    fn ends(&self, port: PublishedPort) -> (IpAddr, IpAddr) {
        let link = &self.network.addresses;
        if port.bind.is_ipv4() {
            (IpAddr::V4(link.gateway_ipv4), IpAddr::V4(link.guest_ipv4))
        } else {
            (IpAddr::V6(link.gateway_ipv6), IpAddr::V6(link.guest_ipv6))
        }
    }

    /// A port of the gateway that is free. The tables hold at most half as many entries as there are ports, so one is found soon.
    fn free_port(&mut self, is_free: impl Fn(&Self, u16) -> bool) -> u16 {
        let start = self.random.next_u16();
        let mut port = start | EPHEMERAL_FIRST;
        while !is_free(self, port) {
            port = port.wrapping_add(1) | EPHEMERAL_FIRST;
        }
        port
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// Nobody waits any more.
    All,
    /// Somebody waits, for room.
    MoreLater,
    /// Somebody waits, and it was enough for one turn.
    MoreNow,
}
