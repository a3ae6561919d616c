//! The stack of a sandbox: frames of the guest and sockets of the host, and the policy between them.
//!
//! ```text
//!        guest's frames                                                            host
//!  ──► ingress ─► parse ─┬─ ARP, ND ──► answer                                       │
//!                        ├─ TCP ──────► connections ─ smoltcp socket ─ relay ────► TCP socket
//!                        ├─ UDP, echo ► flows ───────────────────────────────────► UDP, ping socket
//!                        ├─ port 53 ──► resolver ─────────────────────────────────► upstream sockets
//!                        └─ denied ───► RST, ICMP prohibited, decision log            │
//!  ◄── poll ◄── outbox ◄── what is ready of all these ◄── published ports ◄────── listeners
//! ```
//!
//! `msb-vmm`'s network device calls [`Stack::ingress`] for each frame, [`Stack::poll`] after a batch, when the host's descriptor is
//! readable, when the guest has made room and at [`Stack::deadline`]. Each connection is a smoltcp socket in a set of its own, found by
//! its addresses and ports, so that a frame costs the same with one connection and with a thousand. Nothing here blocks, and every
//! table, buffer and turn is bounded. It never sends to an address that policy did not allow, but to the upstream name servers.

mod counters;
mod flow;
pub mod frame;
pub mod host;
mod link;
mod names;
mod outbound;
mod published;
mod record;
pub mod system;
mod tcp;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use msb_protocol::network::{Direction, PortTransport, PublishedPort, Transport, VmNetwork};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketSet};
use smoltcp::wire::{HardwareAddress, IpCidr};

pub use self::counters::{Counters, Failure, Protocol, Way};
pub use self::flow::{PING_IDLE, PINGS_COUNT_MAX, UDP_IDLE};
pub use self::link::{BACKLOG_BYTES_MAX, BACKLOG_FRAMES_MAX, FrameSink};
pub use self::record::{RECORDS_BURST, RECORDS_PER_SECOND, Record};

use self::flow::{DATAGRAMS_PER_TURN, Flow, FlowEnd, FlowKey, FlowKind, SWEEP_INTERVAL};
use self::frame::{Builder, DropReason, Ingress, Unreachable, parse};
use self::host::{Close, Event, Host, SocketId, Source};
use self::link::{Link, Outbox};
use self::names::Names;
use self::record::RecordQueue;
use self::tcp::{Connection, Fate, State, Tiers, Turn, instant};
use crate::dns::{Resolver, ResolverConfig};
use crate::policy::explain::{Explanation, Question};
use crate::policy::pins::Pins;
use crate::policy::{Attempt, Decision, Policy};
use crate::random::Random;

/// Connections that may wait for the host to connect.
pub const CONNECTING_COUNT_MAX: usize = 256;
/// Time that the host has to connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections that one turn accepts from one listener.
const ACCEPTS_PER_TURN: usize = 64;

/// A TCP connection as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ConnectionKey {
    guest_port: u16,
    peer: SocketAddr,
}

/// Whose socket it is.
#[derive(Clone, Copy, Debug)]
enum Owner {
    Connection(ConnectionKey),
    Flow(FlowKey),
    Upstream(crate::dns::QueryId),
}

/// A published port and whether somebody waits at it.
#[derive(Debug)]
struct Publication {
    port: PublishedPort,
    ready: bool,
}

/// What a stack is made of.
#[derive(Clone, Debug)]
pub struct StackConfig {
    /// The network as the daemon gave it.
    pub network: VmNetwork,
    /// A number from the operating system's random source.
    pub seed: u64,
    /// Whether TCP segments to the guest need checksums (no VIRTIO_NET_F_GUEST_CSUM).
    pub checksums: bool,
}

/// The network of one sandbox.
pub struct Stack<H: Host> {
    network: VmNetwork,
    host: H,
    policy: Policy,
    pins: Pins,
    names: Names,
    builder: Builder,
    interface: Interface,
    outbox: Outbox,
    connections: HashMap<ConnectionKey, Connection>,
    connecting_count: usize,
    tiers: Tiers,
    flows: HashMap<FlowKey, Flow>,
    /// Flows of peers of published UDP ports.
    visitors: HashMap<(usize, SocketAddr), FlowKey>,
    pings_count: usize,
    owners: HashMap<SocketId, Owner>,
    timers: BTreeSet<(Duration, SocketId)>,
    connections_with_work: VecDeque<ConnectionKey>,
    flows_with_work: VecDeque<FlowKey>,
    publications: Vec<Publication>,
    next_socket: u64,
    next_sweep: Option<Duration>,
    /// Whether the last poll left work that could be done at once.
    again: bool,
    random: Random,
    events: Vec<Event>,
    buffer: Vec<u8>,
    records: RecordQueue,
    counters: Counters,
}

impl<H: Host> std::fmt::Debug for Stack<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("connections", &self.connections.len())
            .field("flows", &self.flows.len())
            .finish_non_exhaustive()
    }
}

impl<H: Host> Stack<H> {
    /// A stack without connections, at time 0.
    #[must_use]
    pub fn new(config: StackConfig, host: H) -> Self {
        let StackConfig { network, seed, checksums } = config;
        let link = network.addresses;
        let gateway = vec![IpAddr::V4(link.gateway_ipv4), IpAddr::V6(link.gateway_ipv6)];
        let host_addresses: Vec<IpAddr> = gateway.iter().chain(&network.host_addresses).copied().collect();
        let builder = Builder::new(link);
        let mut outbox = Outbox::new(&link, &builder, checksums);
        let interface = new_interface(&link, &mut outbox, Random::new(seed, "tcp").next_u64());
        let resolver = Resolver::new(
            ResolverConfig {
                servers: network.nameservers.clone(),
                timeout: Duration::from_millis(network.spec.dns.timeout_ms.into()),
                rebind_protection: network.spec.dns.rebind_protection,
                gateway,
            },
            Random::new(seed, "dns"),
        );
        Self {
            policy: Policy::new(&network.spec, host_addresses),
            pins: Pins::default(),
            names: Names::new(resolver),
            builder,
            interface,
            outbox,
            connections: HashMap::new(),
            connecting_count: 0,
            tiers: Tiers::default(),
            flows: HashMap::new(),
            visitors: HashMap::new(),
            pings_count: 0,
            owners: HashMap::new(),
            timers: BTreeSet::new(),
            connections_with_work: VecDeque::new(),
            flows_with_work: VecDeque::new(),
            // A listener may have had visitors before us.
            publications: network.spec.ports.iter().map(|port| Publication { port: *port, ready: true }).collect(),
            next_socket: 0,
            next_sweep: None,
            again: false,
            random: Random::new(seed, "ports"),
            events: Vec::new(),
            buffer: vec![0; usize::from(u16::MAX) + 1],
            records: RecordQueue::new(),
            counters: Counters::default(),
            network,
            host,
        }
    }

    /// The host's sockets; [`system::SystemHost`] has the descriptor to watch.
    pub fn host(&mut self) -> &mut H {
        &mut self.host
    }

    /// Takes one frame of the guest. What it causes happens now or in the next [`Stack::poll`].
    pub fn ingress(&mut self, now: Duration, frame: &[u8], sink: &mut dyn FrameSink) {
        self.counters.frames_sent += 1;
        self.counters.bytes_sent += frame.len() as u64;
        let link = self.network.addresses;
        match parse(frame, &link) {
            Err(reason) => self.counters.drop_frame(reason),
            Ok(Ingress::Chatter) => {}
            Ok(Ingress::ArpRequest) => {
                let reply = self.builder.arp_reply();
                self.outbox.send(sink, &reply);
            }
            Ok(Ingress::NeighborSolicitation { from, target }) => {
                let reply = self.builder.neighbor_advertisement(from, target);
                self.outbox.send(sink, &reply);
            }
            Ok(Ingress::Tcp { guest_port, peer, opens, resets, packet }) => {
                self.take_segment(now, ConnectionKey { guest_port, peer }, (opens, resets), packet, sink);
            }
            Ok(Ingress::Udp { guest_port, peer, payload, .. }) if peer.port() == 53 => {
                self.take_query(now, guest_port, peer, payload, sink);
            }
            Ok(Ingress::Udp { guest_port, peer, payload, packet }) => {
                let key = FlowKey { kind: FlowKind::Udp, guest_port, peer };
                self.take_datagram(now, key, payload, packet, sink);
            }
            Ok(Ingress::Echo { identifier, sequence, peer, payload, packet }) => {
                self.take_echo(now, identifier, sequence, peer, payload, packet, sink);
            }
        }
    }

    /// Does everything that can be done now.
    pub fn poll(&mut self, now: Duration, sink: &mut dyn FrameSink) {
        self.outbox.flush(sink);
        let mut events = std::mem::take(&mut self.events);
        self.host.take_events(&mut events);
        for event in events.drain(..) {
            self.take_event(now, event, sink);
        }
        self.events = events;
        let more = self.accept(now, sink);
        self.wake_timers(now, sink);
        self.names.resolver.tick(now);
        self.serve_names(now, sink);
        self.turn_connections(now, sink);
        self.turn_flows(now, sink);
        self.sweep(now);
        let has_work = more || !self.connections_with_work.is_empty() || !self.flows_with_work.is_empty();
        self.again = has_work && self.outbox.has_room(sink);
        self.counters.connections = self.connections.len() as u64;
        self.counters.flows = self.flows.len() as u64;
        self.counters.frames_received = self.outbox.frames;
        self.counters.bytes_received = self.outbox.bytes;
        self.counters.records_suppressed = self.records.suppressed;
        if self.outbox.dropped > 0 {
            self.counters.dropped.insert(DropReason::GuestSlow, self.outbox.dropped);
        }
    }

    /// When [`Stack::poll`] must be called though nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        if self.again {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.first().map(|(at, _)| *at);
        [timer, self.names.resolver.deadline(), self.next_sweep].into_iter().flatten().min()
    }

    /// Whether something waits for room in the guest's receive queue: the caller then asks to be told of it.
    #[must_use]
    pub fn wants_room(&self) -> bool {
        let visitors = self
            .publications
            .iter()
            .any(|publication| publication.ready && publication.port.transport == PortTransport::Udp);
        visitors
            || self.outbox.backlog_len() > 0
            || !self.connections_with_work.is_empty()
            || !self.flows_with_work.is_empty()
    }

    /// The next line of the decision log.
    pub fn take_record(&mut self) -> Option<Record> {
        self.records.take()
    }

    /// What was counted up to the last [`Stack::poll`].
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether the guest needs checksums in the segments it gets; it does unless its driver took VIRTIO_NET_F_GUEST_CSUM.
    pub fn set_checksums(&mut self, needed: bool) {
        self.outbox.set_checksums(needed);
    }

    /// Connections and flows through published ports that are open now.
    #[must_use]
    pub fn inbound_open(&self) -> usize {
        self.connections.values().filter(|connection| connection.inbound).count() + self.visitors.len()
    }

    /// What policy would say about a connection, without sending anything.
    #[must_use]
    pub fn explain(&self, now: Duration, question: &Question) -> Explanation {
        self.policy.explain(now, question, &self.pins)
    }

    /// The policy, for `inspect`.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    fn new_id(&mut self) -> SocketId {
        let id = SocketId(self.next_socket);
        self.next_socket += 1;
        id
    }

    /// Whether one more connection or flow may be.
    fn has_capacity(&self) -> bool {
        self.connections.len() + self.flows.len() < self.network.spec.connections_max as usize
    }

    fn take_event(&mut self, now: Duration, event: Event, sink: &mut dyn FrameSink) {
        match event.source {
            Source::Listener(index) => {
                if let Some(publication) = self.publications.get_mut(index) {
                    publication.ready |= event.readable;
                }
            }
            Source::Socket(id) => match self.owners.get(&id).copied() {
                Some(Owner::Connection(key)) => self.connection_ready(now, key, event, sink),
                Some(Owner::Flow(key)) => {
                    if let Some(flow) = self.flows.get_mut(&key) {
                        flow.readable |= event.readable;
                    }
                    self.queue_flow(key);
                }
                Some(Owner::Upstream(query)) => self.upstream_ready(now, id, query, event),
                None => {}
            },
        }
    }

    fn connection_ready(&mut self, now: Duration, key: ConnectionKey, event: Event, sink: &mut dyn FrameSink) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match &mut connection.state {
            State::Connecting { .. } if event.writable => self.connected(now, key, sink),
            State::Connecting { .. } => {}
            State::Open(open) => {
                if let tcp::Service::Relay(relay) = &mut open.service {
                    relay.readable |= event.readable;
                    relay.writable |= event.writable;
                }
                self.queue_connection(key);
            }
        }
    }

    fn queue_connection(&mut self, key: ConnectionKey) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.queued
        {
            connection.queued = true;
            self.connections_with_work.push_back(key);
        }
    }

    fn queue_flow(&mut self, key: FlowKey) {
        if let Some(flow) = self.flows.get_mut(&key)
            && flow.readable
            && !flow.queued
        {
            flow.queued = true;
            self.flows_with_work.push_back(key);
        }
    }

    fn set_timer(&mut self, key: ConnectionKey, deadline: Option<Duration>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.deadline == deadline {
            return;
        }
        if let Some(old) = std::mem::replace(&mut connection.deadline, deadline) {
            self.timers.remove(&(old, connection.id));
        }
        if let Some(at) = deadline {
            self.timers.insert((at, connection.id));
        }
    }

    fn wake_timers(&mut self, now: Duration, sink: &mut dyn FrameSink) {
        while let Some((at, id)) = self.timers.first().copied() {
            if at > now {
                return;
            }
            self.timers.remove(&(at, id));
            let Some(Owner::Connection(key)) = self.owners.get(&id).copied() else { continue };
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.deadline = None;
            match connection.state {
                State::Connecting { .. } => self.connect_failed(now, key, &io::ErrorKind::TimedOut.into(), sink),
                State::Open(_) => self.queue_connection(key),
            }
        }
    }

    /// Gives every connection that has work one turn; those that the guest has no room for stay in the queue.
    fn turn_connections(&mut self, now: Duration, sink: &mut dyn FrameSink) {
        // Answers of the resolver can give work to connections that had their turn; twice is enough, the rest waits for the next poll.
        for _ in 0..2 {
            for _ in 0..self.connections_with_work.len() {
                let Some(key) = self.connections_with_work.pop_front() else { break };
                self.turn_connection(now, key, sink);
            }
            self.serve_names(now, sink);
            if self.connections_with_work.is_empty() || !self.outbox.has_room(sink) {
                return;
            }
        }
    }

    fn turn_connection(&mut self, now: Duration, key: ConnectionKey, sink: &mut dyn FrameSink) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.queued = false;
        let id = connection.id;
        let State::Open(open) = &mut connection.state else { return };
        let mut queries = Vec::new();
        let mut turn =
            Turn { now, interface: &mut self.interface, outbox: &mut self.outbox, sink, host: &mut self.host };
        let fate = open.turn(id, &mut turn, &mut queries);
        match fate {
            Fate::Gone(how) => self.remove_connection(key, how),
            Fate::Blocked => {
                self.set_timer(key, None);
                self.queue_connection(key);
            }
            Fate::Waits => {
                let mut deadline = open.deadline(now, &mut self.interface);
                if let tcp::Service::Dns(stream) = &open.service {
                    deadline =
                        Some(deadline.map_or(stream.used + tcp::DNS_STREAM_IDLE, |at| {
                            at.min(stream.used + tcp::DNS_STREAM_IDLE)
                        }));
                }
                // A deadline that has come would make the caller spin where smoltcp has just had its turn.
                self.set_timer(key, deadline.map(|at| at.max(now + Duration::from_millis(1))));
            }
        }
        for query in queries {
            self.take_stream_query(now, key, &query);
        }
    }

    fn remove_connection(&mut self, key: ConnectionKey, how: Close) {
        self.set_timer(key, None);
        let Some(connection) = self.connections.remove(&key) else { return };
        self.owners.remove(&connection.id);
        match &connection.state {
            State::Connecting { .. } => self.connecting_count -= 1,
            State::Open(open) => self.tiers.give_back(open.tier),
        }
        self.host.close(connection.id, how);
        // There is room for a visitor that had to wait.
        for publication in &mut self.publications {
            publication.ready |= publication.port.transport == PortTransport::Tcp;
        }
    }

    /// Says RST to a segment, as a host does where no connection is.
    fn reset(&mut self, now: Duration, packet: &[u8], sink: &mut dyn FrameSink) {
        let mut nothing = SocketSet::new(Vec::new());
        let mut link = Link { packet: Some(packet), outbox: &mut self.outbox, sink };
        self.interface.poll_ingress_single(instant(now), &mut link, &mut nothing);
    }

    fn say_unreachable(&mut self, packet: &[u8], why: Unreachable, sink: &mut dyn FrameSink) {
        if let Some(frame) = self.builder.unreachable(packet, why) {
            self.outbox.send(sink, &frame);
        }
    }

    /// Counts and records a denial.
    fn denied(&mut self, now: Duration, attempt: &Attempt, decision: Decision) {
        *self.counters.denied.entry((attempt.direction.into(), attempt.transport.into())).or_default() += 1;
        let record = self.record_of(now, "deny", attempt, Some(decision));
        self.records.push(record);
    }

    /// Counts and records that a table is full.
    fn over_limit(&mut self, now: Duration, attempt: &Attempt) {
        *self.counters.failed.entry((attempt.direction.into(), Failure::Limit)).or_default() += 1;
        let record = self.record_of(now, "limit", attempt, None);
        self.records.push(record);
    }

    fn record_of(&self, now: Duration, verdict: &'static str, attempt: &Attempt, decision: Option<Decision>) -> Record {
        let class = self.policy.classify(attempt.address).class.as_str();
        Record {
            at: now,
            verdict,
            direction: attempt.direction,
            transport: attempt.transport,
            address: Some(attempt.address),
            port: (attempt.port != 0).then_some(attempt.port),
            class: Some(class),
            name: self.pins.names_of(now, attempt.address).next().map(ToString::to_string),
            record_type: None,
            decider: decision.map(|decision| decision.decider),
            rule: decision.map_or_else(String::new, |decision| self.policy.decider_text(decision.decider)),
            suppressed: 0,
        }
    }

    /// Where the host connects to for an address of the guest's world: the gateway is the host's loopback.
    fn host_address(&self, address: IpAddr) -> IpAddr {
        let link = &self.network.addresses;
        match address {
            IpAddr::V4(v4) if v4 == link.gateway_ipv4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(v6) if v6 == link.gateway_ipv6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
            other => other.to_canonical(),
        }
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        let link = &self.network.addresses;
        address == IpAddr::V4(link.gateway_ipv4) || address == IpAddr::V6(link.gateway_ipv6)
    }

    /// Ends flows that have been idle.
    fn sweep(&mut self, now: Duration) {
        if self.flows.is_empty() {
            self.next_sweep = None;
            return;
        }
        match self.next_sweep {
            Some(at) if at > now => {}
            None => self.next_sweep = Some(now + SWEEP_INTERVAL),
            Some(_) => {
                let idle: Vec<FlowKey> =
                    self.flows.iter().filter(|(key, flow)| flow.idle_at(key) <= now).map(|(key, _)| *key).collect();
                for key in idle {
                    self.remove_flow(key);
                }
                self.next_sweep = (!self.flows.is_empty()).then_some(now + SWEEP_INTERVAL);
            }
        }
    }

    fn remove_flow(&mut self, key: FlowKey) {
        let Some(flow) = self.flows.remove(&key) else { return };
        self.pings_count -= usize::from(key.kind == FlowKind::Ping);
        match flow.end {
            FlowEnd::Own(id) => {
                self.owners.remove(&id);
                self.host.close(id, Close::Graceful);
            }
            FlowEnd::Published { listener, peer } => drop(self.visitors.remove(&(listener, peer))),
        }
    }

    /// Makes room for one more flow by ending the one that was idle longest. Whether there is room.
    fn make_room_for_flow(&mut self, kind: FlowKind) -> bool {
        let full = kind == FlowKind::Ping && self.pings_count >= PINGS_COUNT_MAX;
        if !full && self.has_capacity() {
            return true;
        }
        let candidates = self.flows.iter().filter(|(key, _)| !full || key.kind == FlowKind::Ping);
        let Some(key) = candidates.min_by_key(|(key, flow)| (flow.used, **key)).map(|(key, _)| *key) else {
            return false;
        };
        self.remove_flow(key);
        true
    }
}

fn new_interface(link: &msb_protocol::network::NetworkAddresses, outbox: &mut Outbox, seed: u64) -> Interface {
    struct Nowhere;
    impl FrameSink for Nowhere {
        fn has_room(&mut self) -> bool {
            false
        }
        fn send(&mut self, _: &[u8]) {}
    }
    let mut config = InterfaceConfig::new(HardwareAddress::Ip);
    config.random_seed = seed;
    let mut device = Link { packet: None, outbox, sink: &mut Nowhere };
    let mut interface = Interface::new(config, &mut device, instant(Duration::ZERO));
    interface.update_ip_addrs(|addresses| {
        // The interface's table has room for two addresses at least.
        let _ = addresses.push(IpCidr::new(link.gateway_ipv4.into(), link.ipv4_prefix_len));
        let _ = addresses.push(IpCidr::new(link.gateway_ipv6.into(), link.ipv6_prefix_len));
    });
    interface.set_any_ip(true);
    interface
}

/// The attempt of a connection or flow that the guest opens.
fn outbound(transport: Transport, peer: SocketAddr) -> Attempt {
    Attempt { direction: Direction::Egress, address: peer.ip(), transport, port: peer.port() }
}
