//! Any frames of a guest, on a turned clock, with a host whose sockets echo, refuse or stay silent: nothing panics or spins, every frame
//! back is a frame of this link, no table grows beyond its limit, and a policy that denies everything is never got around.
#![no_main]

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use msb_network::stack::host::{Close, Event, Host, SocketId, Source};
use msb_network::stack::{FrameSink, Stack, StackConfig};
use msb_protocol::network::{NetworkAddresses, NetworkProfile, NetworkSpec, VmNetwork};

/// Connections and flows at once.
const CONNECTIONS_MAX: u32 = 8;
/// Polls after which a stack that always has more to do would be a stack that spins.
const POLLS_MAX: usize = 10_000;

/// A socket and the bytes that its peer has not given back yet.
#[derive(Default)]
struct Echo {
    bytes: Vec<u8>,
    ended: bool,
}

/// A host: even ports echo, odd ones are silent, the rest refuse.
#[derive(Default)]
struct EchoHost {
    sockets: HashMap<SocketId, Echo>,
    events: Vec<Event>,
    opened: usize,
}

impl EchoHost {
    fn open(&mut self, id: SocketId, port: u16) -> io::Result<()> {
        self.opened += 1;
        match port % 3 {
            0 => return Err(io::ErrorKind::ConnectionRefused.into()),
            1 => self.told(id),
            _ => {}
        }
        self.sockets.insert(id, Echo::default());
        Ok(())
    }

    fn told(&mut self, id: SocketId) {
        self.events.push(Event { source: Source::Socket(id), readable: true, writable: true });
    }
}

impl Host for EchoHost {
    fn connect_tcp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        self.open(id, to.port())
    }
    fn connect_result(&mut self, id: SocketId) -> io::Result<()> {
        self.sockets.get(&id).map(|_| ()).ok_or(io::ErrorKind::NotConnected.into())
    }
    fn connect_udp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        self.open(id, to.port())
    }
    fn connect_ping(&mut self, id: SocketId, _: IpAddr) -> io::Result<()> {
        self.open(id, 1)
    }
    fn accept(&mut self, _: usize, _: SocketId) -> io::Result<SocketAddr> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn receive_from(&mut self, _: usize, _: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send_to(&mut self, _: usize, data: &[u8], _: SocketAddr) -> io::Result<usize> {
        Ok(data.len())
    }
    fn read(&mut self, id: SocketId, buffer: &mut [u8]) -> io::Result<usize> {
        let socket = self.sockets.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let length = socket.bytes.len().min(buffer.len());
        if length == 0 && !socket.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        buffer[..length].copy_from_slice(&socket.bytes[..length]);
        socket.bytes.drain(..length);
        Ok(length)
    }
    fn write(&mut self, id: SocketId, data: &[u8]) -> io::Result<usize> {
        let socket = self.sockets.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let length = data.len().min(65_536usize.saturating_sub(socket.bytes.len()));
        if length == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.bytes.extend_from_slice(&data[..length]);
        self.told(id);
        Ok(length)
    }
    fn shutdown_write(&mut self, id: SocketId) {
        if let Some(socket) = self.sockets.get_mut(&id) {
            socket.ended = true;
        }
        self.told(id);
    }
    fn close(&mut self, id: SocketId, _: Close) {
        self.sockets.remove(&id);
    }
    fn take_events(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.events);
    }
}

/// The guest's side: takes everything, or nothing.
struct Sink {
    link: NetworkAddresses,
    open: bool,
}

impl FrameSink for Sink {
    fn has_room(&mut self) -> bool {
        self.open
    }
    fn send(&mut self, frame: &[u8]) {
        assert!(self.open && frame.len() <= usize::from(self.link.mtu_bytes) + 14);
        assert_eq!((&frame[..6], &frame[6..12]), (&self.link.guest_mac.0[..], &self.link.gateway_mac.0[..]));
    }
}

fuzz_target!(|data: &[u8]| {
    for profile in [NetworkProfile::All, NetworkProfile::None] {
        let spec = NetworkSpec { profile, connections_max: CONNECTIONS_MAX, ..NetworkSpec::default() };
        let link = spec.addresses();
        let network = VmNetwork {
            spec,
            addresses: link,
            nameservers: vec!["9.9.9.9:53".parse().expect("an address")],
            host_addresses: Vec::new(),
        };
        let mut stack = Stack::new(StackConfig { network, seed: 1, checksums: true }, EchoHost::default());
        let mut now = Duration::ZERO;
        let mut rest = data;
        // A turn: its manner, milliseconds until the next, the frame's length (little-endian), the frame.
        for _ in 0..64 {
            let Some((&[manner, wait_low, wait_high, len_low, len_high], left)) = rest.split_first_chunk() else {
                break;
            };
            let wait_ms = u16::from_le_bytes([wait_low, wait_high]);
            let (bytes, left) = left.split_at(left.len().min(u16::from_le_bytes([len_low, len_high]).into()));
            rest = left;
            let mut sink = Sink { link, open: manner & 8 == 0 };
            let frame = if manner & 1 == 0 { honest(bytes, &link) } else { bytes.to_vec() };
            stack.ingress(now, &frame, &mut sink);
            settle(&mut stack, now, &mut sink);
            now += Duration::from_millis(wait_ms.into());
            while stack.take_record().is_some() {}
        }
        let counters = stack.counters();
        assert!(counters.connections + counters.flows <= u64::from(CONNECTIONS_MAX));
        let opened = stack.host().opened;
        assert!(profile != NetworkProfile::None || opened == 0, "{opened} sockets against the policy");
        // An hour later nothing is left of what nobody spoke of again.
        let mut sink = Sink { link, open: true };
        for _ in 0..60 {
            now += Duration::from_secs(60);
            settle(&mut stack, now, &mut sink);
        }
        assert_eq!(stack.counters().flows, 0);
    }
});

/// Polls until there is nothing to do at once.
fn settle(stack: &mut Stack<EchoHost>, now: Duration, sink: &mut Sink) {
    for _ in 0..POLLS_MAX {
        stack.poll(now, sink);
        if stack.deadline().is_none_or(|at| at > now) || !sink.open {
            return;
        }
    }
    panic!("the stack always has more to do");
}

/// The bytes with the headers of this link, as far as a packet needs them to be looked into: past the first checks.
fn honest(bytes: &[u8], link: &NetworkAddresses) -> Vec<u8> {
    let mut frame = bytes.to_vec();
    frame.truncate(usize::from(link.mtu_bytes) + 14);
    if frame.len() < 14 {
        return frame;
    }
    frame[..6].copy_from_slice(&link.gateway_mac.0);
    frame[6..12].copy_from_slice(&link.guest_mac.0);
    let length = frame.len() - 14;
    match (frame[14..].first().map(|first| first >> 4), length) {
        (Some(6), 40..) => {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[18..20].copy_from_slice(&u16::try_from(length - 40).expect("below the MTU").to_be_bytes());
            frame[22..38].copy_from_slice(&link.guest_ipv6.octets());
        }
        (Some(_), 20..) => {
            frame[12..14].copy_from_slice(&[8, 0]);
            frame[14] = 0x45;
            frame[16..18].copy_from_slice(&u16::try_from(length).expect("below the MTU").to_be_bytes());
            frame[20..22].copy_from_slice(&[0, 0]);
            frame[26..30].copy_from_slice(&link.guest_ipv4.octets());
        }
        _ => {}
    }
    frame
}
