//! A world on a turned clock: a guest (smoltcp on the other end of the link), a link with seeded loss, delay, reordering and
//! duplication, the stack under test, and a host whose peers follow scripts. Two runs of one seed are the same run.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use msb_network::random::Random;
use msb_network::stack::host::{Close, Event, Host, SocketId, Source};
use msb_network::stack::{FrameSink, Record, Stack, StackConfig};
use msb_protocol::network::{NetworkAddresses, NetworkSpec, VmNetwork};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

pub(crate) const MS: Duration = Duration::from_millis(1);
/// Bytes that a peer's socket holds before it says `WouldBlock`.
pub(crate) const PEER_BUFFER: usize = 256 << 10;

/// What a peer does.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// Gives back what it gets, and ends when the stack ended.
    Echo,
    /// Refuses.
    Refuse,
    /// Never answers.
    Silent,
    /// Has no route.
    NoRoute,
    /// Sends so many bytes, then ends.
    Source(usize),
    /// Says nothing and takes nothing.
    Deaf,
    /// Answers each datagram with this function.
    Datagrams(fn(&[u8]) -> Vec<u8>),
}

/// A socket of the host, seen from its peer.
#[derive(Debug)]
pub(crate) struct SimSocket {
    pub(crate) to: SocketAddr,
    pub(crate) peer: Peer,
    pub(crate) to_stack: VecDeque<u8>,
    pub(crate) datagrams: VecDeque<Vec<u8>>,
    pub(crate) from_stack: VecDeque<u8>,
    pub(crate) taken: usize,
    pub(crate) ended: bool,
    pub(crate) broken: bool,
    pub(crate) shut: bool,
    pub(crate) connected_at: Option<Duration>,
    told: bool,
    sent: usize,
}

/// The host.
#[derive(Default)]
pub(crate) struct SimHost {
    pub(crate) now: Duration,
    pub(crate) peers: HashMap<SocketAddr, Peer>,
    pub(crate) default_peer: Option<Peer>,
    pub(crate) connect_delay: Duration,
    pub(crate) sockets: BTreeMap<SocketId, SimSocket>,
    pub(crate) closed: BTreeMap<SocketId, (Close, usize)>,
    pub(crate) attempts: Vec<SocketAddr>,
    pub(crate) visitors: VecDeque<(SocketAddr, Peer)>,
    pub(crate) visits: VecDeque<(Vec<u8>, SocketAddr)>,
    pub(crate) visit_answers: Vec<(Vec<u8>, SocketAddr)>,
    pub(crate) events: Vec<Event>,
}

impl SimHost {
    fn open(&mut self, id: SocketId, to: SocketAddr, connected_at: Option<Duration>, peer: Peer) {
        let socket = SimSocket {
            to,
            peer,
            to_stack: VecDeque::new(),
            datagrams: VecDeque::new(),
            from_stack: VecDeque::new(),
            taken: 0,
            ended: false,
            broken: false,
            shut: false,
            connected_at,
            told: false,
            sent: 0,
        };
        self.sockets.insert(id, socket);
    }

    fn peer_of(&self, to: SocketAddr) -> Peer {
        self.peers.get(&to).or(self.default_peer.as_ref()).cloned().unwrap_or(Peer::Refuse)
    }

    /// Lets the peers act.
    pub(crate) fn advance(&mut self, now: Duration) {
        self.now = now;
        if !self.visitors.is_empty() || !self.visits.is_empty() {
            self.events.push(Event { source: Source::Listener(0), readable: true, writable: false });
        }
        for (id, socket) in &mut self.sockets {
            let source = Source::Socket(*id);
            if socket.connected_at.is_none_or(|at| at > now) {
                continue;
            }
            if !socket.told {
                socket.told = true;
                self.events.push(Event { source, readable: true, writable: true });
            }
            let before = (socket.to_stack.len(), socket.ended, socket.broken, socket.from_stack.len());
            match &socket.peer {
                Peer::Echo => {
                    let room = PEER_BUFFER.saturating_sub(socket.to_stack.len()).min(socket.from_stack.len());
                    socket.to_stack.extend(socket.from_stack.drain(..room));
                    socket.taken += room;
                    socket.ended = socket.shut && socket.from_stack.is_empty();
                }
                Peer::Source(len) => {
                    socket.from_stack.clear();
                    let room = (len - socket.sent).min(PEER_BUFFER - socket.to_stack.len());
                    let start = socket.sent;
                    socket.to_stack.extend((start..start + room).map(|n| n as u8));
                    socket.sent += room;
                    socket.ended = socket.sent == *len;
                }
                _ => {}
            }
            let readable = socket.to_stack.len() > before.0
                || socket.ended != before.1
                || socket.broken
                || !socket.datagrams.is_empty();
            let writable = socket.from_stack.len() < before.3;
            if readable || writable {
                self.events.push(Event { source, readable, writable });
            }
        }
    }

    /// The one socket that is connected to `to`.
    pub(crate) fn socket_to(&mut self, to: &str) -> (SocketId, &mut SimSocket) {
        let to: SocketAddr = to.parse().unwrap();
        let (id, socket) = self.sockets.iter_mut().find(|(_, socket)| socket.to == to).expect("a socket to there");
        (*id, socket)
    }

    /// When a connect ends.
    fn deadline(&self) -> Option<Duration> {
        self.sockets.values().filter(|socket| !socket.told).filter_map(|socket| socket.connected_at).min()
    }
}

fn would_block<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

impl Host for SimHost {
    fn connect_tcp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        self.attempts.push(to);
        let peer = self.peer_of(to);
        match peer {
            Peer::NoRoute => Err(io::ErrorKind::HostUnreachable.into()),
            Peer::Silent => {
                self.open(id, to, None, peer);
                Ok(())
            }
            peer => {
                self.open(id, to, Some(self.now + self.connect_delay), peer);
                Ok(())
            }
        }
    }

    fn connect_result(&mut self, id: SocketId) -> io::Result<()> {
        match &self.sockets[&id] {
            SimSocket { peer: Peer::Refuse, .. } => Err(io::ErrorKind::ConnectionRefused.into()),
            SimSocket { connected_at: Some(at), .. } if *at <= self.now => Ok(()),
            _ => would_block(),
        }
    }

    fn connect_udp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        self.attempts.push(to);
        let peer = self.peer_of(to);
        self.open(id, to, Some(self.now), peer);
        Ok(())
    }

    fn connect_ping(&mut self, id: SocketId, to: IpAddr) -> io::Result<()> {
        self.connect_udp(id, SocketAddr::new(to, 0))
    }

    fn accept(&mut self, _: usize, id: SocketId) -> io::Result<SocketAddr> {
        let Some((from, peer)) = self.visitors.pop_front() else { return would_block() };
        self.open(id, from, Some(self.now), peer);
        Ok(from)
    }

    fn receive_from(&mut self, _: usize, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let Some((data, from)) = self.visits.pop_front() else { return would_block() };
        buffer[..data.len()].copy_from_slice(&data);
        Ok((data.len(), from))
    }

    fn send_to(&mut self, _: usize, data: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.visit_answers.push((data.to_vec(), to));
        Ok(data.len())
    }

    fn read(&mut self, id: SocketId, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(socket) = self.sockets.get_mut(&id) else { return Err(io::ErrorKind::NotConnected.into()) };
        if socket.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if let Some(datagram) = socket.datagrams.pop_front() {
            buffer[..datagram.len()].copy_from_slice(&datagram);
            return Ok(datagram.len());
        }
        let len = buffer.len().min(socket.to_stack.len());
        for (place, byte) in buffer.iter_mut().zip(socket.to_stack.drain(..len)) {
            *place = byte;
        }
        if len == 0 && !socket.ended { would_block() } else { Ok(len) }
    }

    fn write(&mut self, id: SocketId, data: &[u8]) -> io::Result<usize> {
        let Some(socket) = self.sockets.get_mut(&id) else { return Err(io::ErrorKind::NotConnected.into()) };
        match &socket.peer {
            Peer::Datagrams(answer) => {
                let answer = answer(data);
                socket.taken += data.len();
                if !answer.is_empty() {
                    socket.datagrams.push_back(answer);
                    self.events.push(Event { source: Source::Socket(id), readable: true, writable: false });
                }
                return Ok(data.len());
            }
            Peer::Refuse => return Err(io::ErrorKind::ConnectionRefused.into()),
            _ => {}
        }
        let len = data.len().min(PEER_BUFFER.saturating_sub(socket.from_stack.len()));
        socket.from_stack.extend(&data[..len]);
        if len == 0 { would_block() } else { Ok(len) }
    }

    fn shutdown_write(&mut self, id: SocketId) {
        self.sockets.get_mut(&id).unwrap().shut = true;
    }

    fn close(&mut self, id: SocketId, how: Close) {
        if let Some(socket) = self.sockets.remove(&id) {
            self.closed.insert(id, (how, socket.taken + socket.from_stack.len()));
        }
    }

    fn take_events(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.events);
    }
}

/// What the link does to frames.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub(crate) loss_percent: u64,
    pub(crate) duplicate_percent: u64,
    pub(crate) delay: Duration,
    /// Each frame gets a further delay of up to this, so that frames overtake each other.
    pub(crate) jitter: Duration,
}

pub(crate) const CLEAN: Faults =
    Faults { loss_percent: 0, duplicate_percent: 0, delay: Duration::from_micros(10), jitter: Duration::ZERO };

/// One direction of the link.
pub(crate) struct Wire {
    frames: BTreeMap<(Duration, u64), Vec<u8>>,
    counter: u64,
    faults: Faults,
    random: Random,
    pub(crate) now: Duration,
    pub(crate) room: bool,
    pub(crate) seen: Vec<Vec<u8>>,
}

impl Wire {
    fn new(faults: Faults, seed: u64, name: &'static str) -> Self {
        let random = Random::new(seed, name);
        Self { frames: BTreeMap::new(), counter: 0, faults, random, now: Duration::ZERO, room: true, seen: Vec::new() }
    }

    pub(crate) fn push(&mut self, frame: &[u8]) {
        let percent = |random: &mut Random, of: u64| random.next_u64() % 100 < of;
        if self.seen.len() < 4096 {
            self.seen.push(frame[..frame.len().min(128)].to_vec());
        }
        if percent(&mut self.random, self.faults.loss_percent) {
            return;
        }
        let copies = 1 + usize::from(percent(&mut self.random, self.faults.duplicate_percent));
        for _ in 0..copies {
            let jitter_us = self.random.next_u64() % (self.faults.jitter.as_micros() as u64 + 1);
            let at = self.now + self.faults.delay + Duration::from_micros(jitter_us);
            self.frames.insert((at, self.counter), frame.to_vec());
            self.counter += 1;
        }
    }

    fn pop(&mut self, now: Duration) -> Option<Vec<u8>> {
        let entry = self.frames.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }

    fn deadline(&self) -> Option<Duration> {
        self.frames.keys().next().map(|(at, _)| *at)
    }
}

impl FrameSink for Wire {
    fn has_room(&mut self) -> bool {
        self.room
    }

    fn send(&mut self, frame: &[u8]) {
        assert!(self.room, "sent without room");
        self.push(frame);
    }
}

/// The guest's end of the link as a smoltcp device: packets without their Ethernet header.
#[derive(Default)]
struct GuestLink {
    rx: VecDeque<Vec<u8>>,
    tx: Vec<Vec<u8>>,
    mtu: usize,
}

struct Bytes(Vec<u8>);

impl RxToken for Bytes {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Out<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut packet = vec![0; len];
        let result = fill(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for GuestLink {
    type RxToken<'a> = Bytes;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Bytes, Out<'_>)> {
        Some((Bytes(self.rx.pop_front()?), Out(&mut self.tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Out<'_>> {
        Some(Out(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // The guest checks what the stack computed; the stack does not check the guest.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

/// The world.
pub(crate) struct World {
    pub(crate) now: Duration,
    pub(crate) stack: Stack<SimHost>,
    pub(crate) up: Wire,
    pub(crate) down: Wire,
    pub(crate) addresses: NetworkAddresses,
    pub(crate) sockets: SocketSet<'static>,
    guest: Interface,
    link: GuestLink,
    next_port: u16,
    guest_buffer: usize,
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(now.as_micros() as i64)
}

impl World {
    pub(crate) fn new(spec: NetworkSpec, host: SimHost) -> Self {
        Self::with(spec, host, CLEAN, 1, 256 << 10)
    }

    pub(crate) fn with(spec: NetworkSpec, host: SimHost, faults: Faults, seed: u64, guest_buffer: usize) -> Self {
        let addresses = spec.addresses();
        let network = VmNetwork {
            spec,
            addresses,
            nameservers: vec!["9.9.9.9:53".parse().unwrap()],
            host_addresses: vec!["5.5.5.5".parse().unwrap()],
        };
        let stack = Stack::new(StackConfig { network, seed, checksums: true }, host);
        let mut link = GuestLink { mtu: usize::from(addresses.mtu_bytes), ..GuestLink::default() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut guest = Interface::new(config, &mut link, Instant::ZERO);
        guest.update_ip_addrs(|list| {
            list.push(IpCidr::new(addresses.guest_ipv4.into(), 30)).unwrap();
            list.push(IpCidr::new(addresses.guest_ipv6.into(), 64)).unwrap();
        });
        guest.routes_mut().add_default_ipv4_route(addresses.gateway_ipv4).unwrap();
        guest.routes_mut().add_default_ipv6_route(addresses.gateway_ipv6).unwrap();
        Self {
            now: Duration::ZERO,
            stack,
            up: Wire::new(faults, seed, "up"),
            down: Wire::new(faults, seed, "down"),
            addresses,
            sockets: SocketSet::new(Vec::new()),
            guest,
            link,
            next_port: 40_000,
            guest_buffer,
        }
    }

    /// A frame of the guest around an IP packet.
    pub(crate) fn framed(&self, packet: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(14 + packet.len());
        frame.extend(self.addresses.gateway_mac.0);
        frame.extend(self.addresses.guest_mac.0);
        frame.extend(if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] });
        frame.extend(packet);
        frame
    }

    fn new_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; self.guest_buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    /// The guest connects.
    pub(crate) fn connect(&mut self, to: &str) -> SocketHandle {
        let handle = self.new_socket();
        self.next_port += 1;
        let to: SocketAddr = to.parse().unwrap();
        let port = self.next_port;
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(self.guest.context(), to, port).unwrap();
        handle
    }

    /// The guest listens.
    pub(crate) fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.new_socket();
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).listen(port).unwrap();
        handle
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(crate) fn state(&mut self, handle: SocketHandle) -> tcp::State {
        self.socket(handle).state()
    }

    /// A frame of the guest, past the link's faults.
    pub(crate) fn send_frame(&mut self, frame: &[u8]) {
        self.down.now = self.now;
        self.stack.ingress(self.now, frame, &mut self.down);
        self.stack.poll(self.now, &mut self.down);
    }

    /// Everything that happens now.
    pub(crate) fn settle(&mut self) {
        for _ in 0..64 {
            self.up.now = self.now;
            self.down.now = self.now;
            while let Some(frame) = self.down.pop(self.now) {
                self.link.rx.push_back(frame[14..].to_vec());
            }
            self.guest.poll(instant(self.now), &mut self.link, &mut self.sockets);
            for packet in std::mem::take(&mut self.link.tx) {
                let frame = self.framed(&packet);
                self.up.push(&frame);
            }
            let mut quiet = true;
            while let Some(frame) = self.up.pop(self.now) {
                quiet = false;
                self.stack.ingress(self.now, &frame, &mut self.down);
            }
            self.stack.host().advance(self.now);
            self.stack.poll(self.now, &mut self.down);
            self.stack.host().advance(self.now);
            let quiet = quiet && self.stack.host().events.is_empty();
            if quiet
                && self.down.deadline().is_none_or(|at| at > self.now)
                && self.stack.deadline().is_none_or(|at| at > self.now)
            {
                return;
            }
        }
    }

    /// Runs until `done` says so or the time is up; whether it was done.
    pub(crate) fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now + limit;
        loop {
            self.settle();
            if done(self) {
                return true;
            }
            let guest = self.guest.poll_at(instant(self.now), &self.sockets);
            let guest = guest.map(|at| Duration::from_micros(at.total_micros() as u64));
            let stack = self.stack.deadline();
            let host = self.stack.host().deadline();
            // The guest makes room again and tells so by a kick, which here is a look every tenth of a millisecond.
            let kick = self.stack.wants_room().then_some(self.now + Duration::from_micros(100));
            let next = [guest, stack, host, kick, self.up.deadline(), self.down.deadline()].into_iter().flatten().min();
            // A step is at least a microsecond: what is due now had its turn.
            let next = next.unwrap_or(end).max(self.now + Duration::from_micros(1));
            if next > end {
                self.now = end;
                self.settle();
                return done(self);
            }
            self.now = next;
        }
    }

    /// Runs for so long.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.run(time, |_| false);
    }

    pub(crate) fn records(&mut self) -> Vec<Record> {
        std::iter::from_fn(|| self.stack.take_record()).collect()
    }

    /// The frames to the guest since the last call, cut at 128 bytes.
    pub(crate) fn seen(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.down.seen)
    }
}
