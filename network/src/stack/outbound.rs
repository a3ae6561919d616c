//! What the guest opens: connections at their SYN, flows at their first packet. Here policy is asked, and here a denial is answered:
//! RST for TCP, ICMP administratively prohibited for the rest.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use msb_protocol::network::{Direction, Transport};

use super::frame::{DropReason, Unreachable, icmp_of};
use super::host::{Close, Host};
use super::tcp::{Connection, DnsStream, Open, Relay, Service, State, Turn};
use super::{
    CONNECT_TIMEOUT, CONNECTING_COUNT_MAX, ConnectionKey, DATAGRAMS_PER_TURN, Failure, Flow, FlowEnd, FlowKey,
    FlowKind, FrameSink, Owner, Stack, Way, outbound,
};

/// What a failed connect means for the guest.
fn failure_of(error: &io::Error) -> (Failure, Option<Unreachable>) {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => (Failure::Refused, None),
        io::ErrorKind::NetworkUnreachable => (Failure::Unreachable, Some(Unreachable::Network)),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkDown => (Failure::Unreachable, Some(Unreachable::Host)),
        io::ErrorKind::TimedOut => (Failure::TimedOut, Some(Unreachable::Host)),
        io::ErrorKind::PermissionDenied | io::ErrorKind::AddrNotAvailable => {
            (Failure::HostLimit, Some(Unreachable::Host))
        }
        // EMFILE, ENFILE and ENOBUFS have no kind of their own.
        _ if matches!(error.raw_os_error(), Some(23 | 24 | 105)) => (Failure::HostLimit, Some(Unreachable::Host)),
        _ => (Failure::Other, None),
    }
}

impl<H: Host> Stack<H> {
    pub(super) fn take_segment(
        &mut self,
        now: Duration,
        key: ConnectionKey,
        (opens, resets): (bool, bool),
        packet: &[u8],
        sink: &mut dyn FrameSink,
    ) {
        let Some(connection) = self.connections.get_mut(&key) else {
            if opens {
                self.open_connection(now, key, packet, sink);
            } else {
                self.reset(now, packet, sink);
            }
            return;
        };
        match &mut connection.state {
            // The guest repeats its SYN, perhaps as another attempt: the last one counts.
            State::Connecting { syn } if opens => *syn = packet.into(),
            State::Connecting { .. } if resets => self.remove_connection(key, Close::Reset),
            State::Connecting { .. } => {}
            State::Open(open) => {
                let mut turn =
                    Turn { now, interface: &mut self.interface, outbox: &mut self.outbox, sink, host: &mut self.host };
                open.ingress(&mut turn, packet);
                self.queue_connection(key);
            }
        }
    }

    fn open_connection(&mut self, now: Duration, key: ConnectionKey, syn: &[u8], sink: &mut dyn FrameSink) {
        let attempt = outbound(Transport::Tcp, key.peer);
        let to_resolver = key.peer.port() == 53;
        if !to_resolver {
            let decision = self.policy.decide(now, &attempt, &self.pins);
            if !decision.is_allowed() {
                self.denied(now, &attempt, decision);
                self.reset(now, syn, sink);
                return;
            }
        }
        if !self.has_capacity() {
            self.over_limit(now, &attempt);
            self.reset(now, syn, sink);
            return;
        }
        let id = self.new_id();
        if to_resolver {
            let service = Service::Dns(DnsStream::new(now));
            self.start(now, key, id, service, syn, sink);
            return;
        }
        if self.connecting_count >= CONNECTING_COUNT_MAX {
            // The guest tries again by itself, and by then others will have connected.
            self.counters.drop_frame(DropReason::Limit);
            return;
        }
        let to = SocketAddr::new(self.host_address(key.peer.ip()), key.peer.port());
        if let Err(error) = self.host.connect_tcp(id, to) {
            self.host.close(id, Close::Graceful);
            self.answer_failure(now, Way::Outbound, &error, syn, sink);
            return;
        }
        self.connecting_count += 1;
        let state = State::Connecting { syn: syn.into() };
        self.connections.insert(key, Connection { id, state, deadline: None, queued: false, inbound: false });
        self.owners.insert(id, Owner::Connection(key));
        self.set_timer(key, Some(now + CONNECT_TIMEOUT));
    }

    /// The host says that a connect has ended.
    pub(super) fn connected(&mut self, now: Duration, key: ConnectionKey, sink: &mut dyn FrameSink) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let id = connection.id;
        match self.host.connect_result(id) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.connect_failed(now, key, &error, sink),
            Ok(()) => {
                self.set_timer(key, None);
                let Some(connection) = self.connections.remove(&key) else { return };
                let State::Connecting { syn } = connection.state else { return };
                self.connecting_count -= 1;
                let relay = Relay::ready();
                self.start(now, key, id, Service::Relay(relay), &syn, sink);
            }
        }
    }

    /// Opens a connection towards the guest with the guest's own SYN.
    fn start(
        &mut self,
        now: Duration,
        key: ConnectionKey,
        id: super::SocketId,
        service: Service,
        syn: &[u8],
        sink: &mut dyn FrameSink,
    ) {
        let Some(mut open) = Open::listening(key.peer, service, &mut self.tiers) else {
            self.owners.remove(&id);
            self.host.close(id, Close::Reset);
            self.reset(now, syn, sink);
            return;
        };
        let mut turn =
            Turn { now, interface: &mut self.interface, outbox: &mut self.outbox, sink, host: &mut self.host };
        open.ingress(&mut turn, syn);
        *self.counters.opened.entry((Way::Outbound, Transport::Tcp.into())).or_default() += 1;
        let state = State::Open(Box::new(open));
        self.connections.insert(key, Connection { id, state, deadline: None, queued: false, inbound: false });
        self.owners.insert(id, Owner::Connection(key));
        self.queue_connection(key);
    }

    pub(super) fn connect_failed(
        &mut self,
        now: Duration,
        key: ConnectionKey,
        error: &io::Error,
        sink: &mut dyn FrameSink,
    ) {
        if let Some(connection) = self.connections.get_mut(&key)
            && let State::Connecting { syn } = &mut connection.state
        {
            let syn = std::mem::take(syn);
            self.answer_failure(now, Way::Outbound, error, &syn, sink);
        }
        self.remove_connection(key, Close::Graceful);
    }

    fn answer_failure(&mut self, now: Duration, way: Way, error: &io::Error, packet: &[u8], sink: &mut dyn FrameSink) {
        let (failure, unreachable) = failure_of(error);
        *self.counters.failed.entry((way, failure)).or_default() += 1;
        match unreachable {
            Some(why) => self.say_unreachable(packet, why, sink),
            None => self.reset(now, packet, sink),
        }
    }

    pub(super) fn take_datagram(
        &mut self,
        now: Duration,
        key: FlowKey,
        payload: &[u8],
        packet: &[u8],
        sink: &mut dyn FrameSink,
    ) {
        if !self.flows.contains_key(&key) {
            let attempt = outbound(Transport::Udp, key.peer);
            let to = SocketAddr::new(self.host_address(key.peer.ip()), key.peer.port());
            if !self.open_flow(now, key, &attempt, packet, sink, |host, id| host.connect_udp(id, to)) {
                return;
            }
        }
        self.write_flow(now, key, payload, packet, sink);
    }

    #[expect(clippy::too_many_arguments, reason = "each is one part of an echo request")]
    pub(super) fn take_echo(
        &mut self,
        now: Duration,
        identifier: u16,
        sequence: u16,
        peer: IpAddr,
        payload: &[u8],
        packet: &[u8],
        sink: &mut dyn FrameSink,
    ) {
        if self.is_gateway(peer) {
            if let Some(frame) = self.builder.echo_reply(peer, identifier, sequence, payload) {
                self.outbox.send(sink, &frame);
            }
            return;
        }
        let key = FlowKey { kind: FlowKind::Ping, guest_port: identifier, peer: SocketAddr::new(peer, 0) };
        if !self.flows.contains_key(&key) {
            let attempt = outbound(icmp_of(peer), key.peer);
            let to = self.host_address(peer);
            if !self.open_flow(now, key, &attempt, packet, sink, |host, id| host.connect_ping(id, to)) {
                return;
            }
        }
        // The kernel fills in identifier and checksum of its own (icmp(7), ping sockets).
        let mut request = Vec::with_capacity(8 + payload.len());
        request.extend([if peer.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0]);
        request.extend(sequence.to_be_bytes());
        request.extend(payload);
        self.write_flow(now, key, &request, packet, sink);
    }

    fn open_flow(
        &mut self,
        now: Duration,
        key: FlowKey,
        attempt: &crate::policy::Attempt,
        packet: &[u8],
        sink: &mut dyn FrameSink,
        connect: impl FnOnce(&mut H, super::SocketId) -> io::Result<()>,
    ) -> bool {
        let decision = self.policy.decide(now, attempt, &self.pins);
        if !decision.is_allowed() {
            self.denied(now, attempt, decision);
            self.say_unreachable(packet, Unreachable::Prohibited, sink);
            return false;
        }
        if !self.make_room_for_flow(key.kind) {
            self.over_limit(now, attempt);
            return false;
        }
        let id = self.new_id();
        if let Err(error) = connect(&mut self.host, id) {
            self.host.close(id, Close::Graceful);
            let (failure, unreachable) = failure_of(&error);
            *self.counters.failed.entry((Way::Outbound, failure)).or_default() += 1;
            self.say_unreachable(packet, unreachable.unwrap_or(Unreachable::Host), sink);
            return false;
        }
        self.insert_flow(now, key, FlowEnd::Own(id), Direction::Egress);
        self.owners.insert(id, Owner::Flow(key));
        true
    }

    pub(super) fn insert_flow(&mut self, now: Duration, key: FlowKey, end: FlowEnd, direction: Direction) {
        let transport = if key.kind == FlowKind::Udp { Transport::Udp } else { icmp_of(key.peer.ip()) };
        *self.counters.opened.entry((direction.into(), transport.into())).or_default() += 1;
        self.pings_count += usize::from(key.kind == FlowKind::Ping);
        self.flows.insert(key, Flow { end, used: now, readable: false, queued: false });
        self.next_sweep.get_or_insert(now + super::SWEEP_INTERVAL);
    }

    fn write_flow(&mut self, now: Duration, key: FlowKey, data: &[u8], packet: &[u8], sink: &mut dyn FrameSink) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        flow.used = now;
        let wrote = match flow.end {
            FlowEnd::Own(id) => self.host.write(id, data),
            FlowEnd::Published { listener, peer } => self.host.send_to(listener, data, peer),
        };
        // A datagram that finds no room is lost, as on any network; an error is told.
        if let Err(error) = wrote
            && !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        {
            let why = match error.kind() {
                io::ErrorKind::ConnectionRefused => Unreachable::Port,
                io::ErrorKind::NetworkUnreachable => Unreachable::Network,
                io::ErrorKind::PermissionDenied => Unreachable::Prohibited,
                _ => Unreachable::Host,
            };
            self.say_unreachable(packet, why, sink);
        }
    }

    /// Gives what peers of flows sent to the guest, as far as it has room.
    pub(super) fn turn_flows(&mut self, now: Duration, sink: &mut dyn FrameSink) {
        for _ in 0..self.flows_with_work.len() {
            let Some(key) = self.flows_with_work.pop_front() else { return };
            self.turn_flow(now, key, sink);
            self.queue_flow(key);
        }
    }

    fn turn_flow(&mut self, now: Duration, key: FlowKey, sink: &mut dyn FrameSink) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        flow.queued = false;
        let FlowEnd::Own(id) = flow.end else { return };
        for _ in 0..DATAGRAMS_PER_TURN {
            if !self.outbox.has_room(sink) {
                return;
            }
            match self.host.read(id, &mut self.buffer) {
                Ok(len) => {
                    flow.used = now;
                    let data = &self.buffer[..len.min(self.buffer.len())];
                    let frame = match key.kind {
                        FlowKind::Udp => self.builder.udp(key.peer, key.guest_port, data),
                        FlowKind::Ping => echo_of(data, key.peer.ip()).and_then(|(sequence, payload)| {
                            self.builder.echo_reply(key.peer.ip(), key.guest_port, sequence, payload)
                        }),
                    };
                    match frame {
                        Some(frame) => self.outbox.send(sink, &frame),
                        None => self.counters.drop_frame(DropReason::TooLong),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && key.kind == FlowKind::Udp => {
                    let quoted = self.builder.quoted_udp(key.guest_port, key.peer);
                    if let Some(frame) = self.builder.unreachable(&quoted, Unreachable::Port) {
                        self.outbox.send(sink, &frame);
                    }
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::Interrupted {
                        flow.readable = false;
                        return;
                    }
                }
            }
        }
    }
}

/// Sequence number and payload of an echo reply as a ping socket gives it.
fn echo_of(data: &[u8], peer: IpAddr) -> Option<(u16, &[u8])> {
    let header = data.first_chunk::<8>()?;
    let is_reply = header[0] == if peer.is_ipv4() { 0 } else { 129 };
    is_reply.then(|| (u16::from_be_bytes([header[6], header[7]]), &data[8..]))
}
