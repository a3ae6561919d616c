//! One TCP connection: a smoltcp socket towards the guest, a socket of the host on the other side, and nothing between their buffers,
//! so that each side's pace is the other's (end-to-end flow control).
//!
//! ```text
//!  outbound   SYN ─► policy ─► host connects ─┬─ made ────► SYN is given to smoltcp ─► SYN-ACK ─► Open
//!                     │ denied: RST           └─ refused ─► RST        no route ─► ICMP unreachable
//!  inbound    accept ─► policy ─► smoltcp connects to the guest ─► Open        refused by the guest ─► the client gets RST
//!  Open       guest's FIN, all read and written ─► shutdown(write)             host's end of stream ─► FIN
//!             RST of either side ─► RST to the other                           both ended ─► gone
//! ```
//!
//! While the host connects, a connection is its SYN and no more: a flood of SYNs costs a hundred bytes and a descriptor each, up to
//! [`super::CONNECTING_COUNT_MAX`].

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;

use super::host::{Close, Host, SocketId};
use super::link::{FrameSink, Link, Outbox};
use crate::dns::message::QUERY_LEN_MAX;

/// Queries of one DNS connection that may wait for an answer.
const DNS_STREAM_PENDING_MAX: usize = 4;
/// Time without traffic after which a DNS connection is closed.
pub(super) const DNS_STREAM_IDLE: Duration = Duration::from_secs(10);
/// Time after which a guest that acknowledges nothing is given up.
const GUEST_SILENCE_MAX: Duration = Duration::from_secs(120);

/// How long an acknowledgement waits for an answer to go with, unless more than a full segment waits for it (RFC 9293, 3.8.6.3, allows
/// 500 ms).
const ACK_DELAY: Duration = Duration::from_millis(2);

/// How large a connection's buffers are. The sum over all connections stays under the 64 MiB that are promised: 32 x 512 KiB, then
/// 96 x 128 KiB, then 32 KiB each. A buffer takes memory only once data has filled it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tier {
    Large,
    Medium,
    Small,
}

/// Connections with large and with medium buffers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tiers {
    large: usize,
    medium: usize,
}

/// Connections that may have large buffers.
const LARGE_COUNT_MAX: usize = 32;
/// Connections that may have medium buffers.
const MEDIUM_COUNT_MAX: usize = 96;

impl Tiers {
    fn take(&mut self) -> Tier {
        if self.large < LARGE_COUNT_MAX {
            self.large += 1;
            Tier::Large
        } else if self.medium < MEDIUM_COUNT_MAX {
            self.medium += 1;
            Tier::Medium
        } else {
            Tier::Small
        }
    }

    pub(super) fn give_back(&mut self, tier: Tier) {
        match tier {
            Tier::Large => self.large -= 1,
            Tier::Medium => self.medium -= 1,
            Tier::Small => {}
        }
    }
}

impl Tier {
    /// Bytes of each of the two buffers.
    fn buffer_len(self) -> usize {
        match self {
            Self::Large => 256 << 10,
            Self::Medium => 64 << 10,
            Self::Small => 16 << 10,
        }
    }
}

/// A connection in the table.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: SocketId,
    pub(super) state: State,
    /// When smoltcp, or the patience with the host, wants a turn.
    pub(super) deadline: Option<Duration>,
    /// Whether it is in the queue of connections that have work.
    pub(super) queued: bool,
    /// Whether it came through a published port.
    pub(super) inbound: bool,
}

#[derive(Debug)]
pub(super) enum State {
    /// The host connects; this is the guest's SYN.
    Connecting { syn: Box<[u8]> },
    /// smoltcp has it.
    Open(Box<Open>),
}

pub(super) struct Open {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    pub(super) tier: Tier,
    pub(super) service: Service,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("tier", &self.tier).field("service", &self.service).finish_non_exhaustive()
    }
}

/// What is on the other side.
#[derive(Debug)]
pub(super) enum Service {
    Relay(Relay),
    Dns(DnsStream),
}

/// A socket of the host.
#[derive(Debug, Default)]
pub(super) struct Relay {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The host's stream has ended.
    ended: bool,
    /// The guest's end was passed on.
    shut: bool,
    /// The guest has ended its half by a FIN.
    guest_ended: bool,
}

/// The resolver, over TCP (RFC 7766): each message after its length.
#[derive(Debug, Default)]
pub(super) struct DnsStream {
    input: Vec<u8>,
    output: VecDeque<u8>,
    pending: usize,
    pub(super) used: Duration,
}

/// What a turn did to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It waits for an event or a time.
    Waits,
    /// It has more for a guest that has no room now.
    Blocked,
    /// It is over.
    Gone(Close),
}

/// What a turn needs beside the connection.
pub(super) struct Turn<'a, H: Host> {
    pub(super) now: Duration,
    pub(super) interface: &'a mut Interface,
    pub(super) outbox: &'a mut Outbox,
    pub(super) sink: &'a mut dyn FrameSink,
    pub(super) host: &'a mut H,
}

pub(super) fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

fn new_socket(tiers: &mut Tiers) -> (tcp::Socket<'static>, Tier) {
    let tier = tiers.take();
    let buffer = || tcp::SocketBuffer::new(vec![0; tier.buffer_len()]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    // What the peer sends goes out as it comes: whoever wants small writes gathered has done it before us.
    socket.set_nagle_enabled(false);
    // An answer that follows soon carries the acknowledgement: half as many frames for a guest that asks and is answered.
    socket.set_ack_delay(Some(ACK_DELAY.into()));
    socket.set_timeout(Some(GUEST_SILENCE_MAX.into()));
    (socket, tier)
}

impl Open {
    /// A connection that the guest opens: smoltcp listens for its SYN, which the caller then gives it.
    pub(super) fn listening(at: std::net::SocketAddr, service: Service, tiers: &mut Tiers) -> Option<Self> {
        let (mut socket, tier) = new_socket(tiers);
        if socket.listen(at).is_err() {
            tiers.give_back(tier);
            return None;
        }
        Some(Self::with(socket, tier, service))
    }

    /// A connection to the guest.
    pub(super) fn connecting(
        interface: &mut Interface,
        from: std::net::SocketAddr,
        to: std::net::SocketAddr,
        service: Service,
        tiers: &mut Tiers,
    ) -> Option<Self> {
        let (mut socket, tier) = new_socket(tiers);
        if socket.connect(interface.context(), to, from).is_err() {
            tiers.give_back(tier);
            return None;
        }
        Some(Self::with(socket, tier, service))
    }

    fn with(socket: tcp::Socket<'static>, tier: Tier, service: Service) -> Self {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self { sockets, handle, tier, service }
    }

    /// Gives a segment of the guest to smoltcp.
    pub(super) fn ingress<H: Host>(&mut self, turn: &mut Turn<'_, H>, packet: &[u8]) {
        let mut link = Link { packet: Some(packet), outbox: turn.outbox, sink: turn.sink };
        turn.interface.poll_ingress_single(instant(turn.now), &mut link, &mut self.sockets);
    }

    /// Sends what smoltcp has to send. Whether it was everything.
    fn egress<H: Host>(&mut self, turn: &mut Turn<'_, H>) -> bool {
        loop {
            let mut link = Link { packet: None, outbox: turn.outbox, sink: turn.sink };
            match turn.interface.poll_egress(instant(turn.now), &mut link, &mut self.sockets) {
                PollResult::SocketStateChanged => {}
                PollResult::None => break,
            }
        }
        turn.outbox.has_room(turn.sink)
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// When smoltcp wants a turn.
    pub(super) fn deadline(&mut self, now: Duration, interface: &mut Interface) -> Option<Duration> {
        let at = interface.poll_at(instant(now), &self.sockets)?;
        Some(Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)).max(now))
    }

    /// Breaks the connection: the guest gets RST.
    pub(super) fn abort<H: Host>(&mut self, turn: &mut Turn<'_, H>) {
        self.socket().abort();
        self.egress(turn);
    }

    /// Moves what can be moved, both ways. `queries` gets the messages of a DNS stream.
    pub(super) fn turn<H: Host>(&mut self, id: SocketId, turn: &mut Turn<'_, H>, queries: &mut Vec<Vec<u8>>) -> Fate {
        let socket = self.sockets.get_mut::<tcp::Socket<'static>>(self.handle);
        let broken = match &mut self.service {
            Service::Relay(relay) => relay.pump(id, socket, turn.host).is_err(),
            Service::Dns(stream) => stream.pump(turn.now, socket, queries).is_err(),
        };
        if broken {
            self.abort(turn);
            return Fate::Gone(Close::Reset);
        }
        let had_room = self.egress(turn);
        let state = self.socket().state();
        match state {
            // Every segment that smoltcp owed is out: a guest that sends its FIN again gets RST, and loses nothing by it.
            tcp::State::TimeWait => Fate::Gone(Close::Graceful),
            tcp::State::Closed => Fate::Gone(match &self.service {
                Service::Relay(relay) if relay.guest_ended && relay.ended => Close::Graceful,
                _ => Close::Reset,
            }),
            _ if !had_room => Fate::Blocked,
            _ => Fate::Waits,
        }
    }
}

impl Relay {
    /// A relay whose socket may be used at once: whether it can is tried, because the event that told it may have been used up.
    pub(super) fn ready() -> Self {
        Self { readable: true, writable: true, ..Self::default() }
    }

    /// Moves bytes until neither side can go on.
    ///
    /// # Errors
    /// The host's side broke.
    fn pump<H: Host>(&mut self, id: SocketId, socket: &mut tcp::Socket<'static>, host: &mut H) -> io::Result<()> {
        while self.writable && socket.can_recv() {
            let wrote = socket.recv(|data| match host.write(id, data) {
                Ok(len) => (len.min(data.len()), Ok(len)),
                Err(error) => (0, Err(error)),
            });
            match wrote {
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        use tcp::State::{CloseWait, Closing, LastAck, TimeWait};
        if matches!(socket.state(), CloseWait | Closing | LastAck | TimeWait) {
            self.guest_ended = true;
            if !self.shut && socket.recv_queue() == 0 {
                host.shutdown_write(id);
                self.shut = true;
            }
        }
        while self.readable && !self.ended && socket.can_send() {
            let read = socket.send(|room| match host.read(id, room) {
                Ok(len) => (len.min(room.len()), Ok(len)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => self.ended = true,
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        // smoltcp 0.14 in LAST-ACK takes a segment that acknowledges nothing new for a duplicate and does not look at its window. A
        // guest that ended first and then read slowly would open its window in vain, and the rest would wait a second for a probe.
        // So the FIN follows the data there, once that has arrived.
        if self.ended && socket.may_send() && (!self.guest_ended || socket.send_queue() == 0) {
            socket.close();
        }
        Ok(())
    }
}

impl DnsStream {
    pub(super) fn new(now: Duration) -> Self {
        Self { used: now, ..Self::default() }
    }

    /// Takes whole messages from the guest and gives answers to it.
    ///
    /// # Errors
    /// The guest sends what no client sends.
    fn pump(&mut self, now: Duration, socket: &mut tcp::Socket<'static>, queries: &mut Vec<Vec<u8>>) -> io::Result<()> {
        while socket.can_recv() && self.pending < DNS_STREAM_PENDING_MAX {
            let room = 2 + QUERY_LEN_MAX - self.input.len();
            let input = &mut self.input;
            let taken = socket.recv(|data| {
                let len = data.len().min(room);
                input.extend_from_slice(&data[..len]);
                (len, len)
            });
            if !matches!(taken, Ok(len) if len > 0) {
                break;
            }
            self.used = now;
            while let Some([high, low]) = self.input.first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes([*high, *low]));
                if len > QUERY_LEN_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if self.input.len() < 2 + len || self.pending == DNS_STREAM_PENDING_MAX {
                    break;
                }
                queries.push(self.input[2..2 + len].to_vec());
                self.input.drain(..2 + len);
                self.pending += 1;
            }
        }
        while !self.output.is_empty() && socket.can_send() {
            let (front, _) = self.output.as_slices();
            let Ok(sent) = socket.send_slice(front) else { break };
            self.output.drain(..sent);
        }
        let guest_ended = socket.state() == tcp::State::CloseWait && socket.recv_queue() == 0;
        let idle = now.saturating_sub(self.used) >= DNS_STREAM_IDLE;
        if self.output.is_empty() && self.pending == 0 && socket.send_queue() == 0 && (guest_ended || idle) {
            socket.close();
        }
        Ok(())
    }

    /// Gives an answer to the guest, or none where there is none to give.
    pub(super) fn answer(&mut self, now: Duration, bytes: Option<&[u8]>) {
        self.pending = self.pending.saturating_sub(1);
        self.used = now;
        if let Some(bytes) = bytes
            && let Ok(len) = u16::try_from(bytes.len())
        {
            self.output.extend(len.to_be_bytes());
            self.output.extend(bytes);
        }
    }
}
