//! The table of all streams and the worker on the device's rings.
//!
//! Everything here is bounded: streams, half-open handshakes, replies to nobody's packets, bytes kept for slow readers, and the work
//! done before other events get their turn. Streams with something for the guest stand in one queue and get one packet batch each
//! in turn, so none starves another. Sockets are watched edge-triggered and never re-registered: `Connection::readable` remembers.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::RecvFlags;
use virtio_queue::Queue;

use super::connection::{Connection, Delivery, Key, PIECES_MAX, Pending, Stage, discard_unread};
use super::device::VsockCounters;
use super::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::devices::virtio::device::{Activation, DeviceMemory};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::devices::virtio::slices::SliceList;
use crate::memory::transfer::{self, SLICES_MAX};
use crate::transport::mmio::saved::SavedQueue;

/// Prepared streams by port; taken when the guest connects.
pub(super) type PortTable = HashMap<u32, UnixStream>;

/// The host's CID (VIRTIO 1.2, 5.10.4).
const HOST_CID: u64 = 2;
/// Most streams at once.
const STREAMS_MAX: usize = 4096;
/// Most host programs that have connected and not yet said where to; the oldest gives way.
const HANDSHAKES_MAX: usize = 128;
/// Longest first line of a host program, newline included.
const HANDSHAKE_BYTES_MAX: usize = 32;
/// Replies to packets that belong to no stream; when so many wait, the transmit ring waits too.
const RESETS_MAX: usize = 256;
/// Memory for slow host readers: a new stream gets an eighth of what is left of this…
const BUFFER_BUDGET_BYTES: usize = 64 << 20;
/// …but not more than this, which keeps a fast stream from ever waiting for credit…
const STREAM_BUFFER_BYTES_MAX: usize = 256 << 10;
/// …and not less than this.
const STREAM_BUFFER_BYTES_MIN: usize = 16 << 10;
/// Receive buffers of the guest filled by one system call; Linux posts 4 KiB each.
const BATCH_BUFFERS_MAX: usize = 16;
/// Bytes for one stream in one turn.
const BATCH_BYTES_MAX: usize = 64 << 10;
/// Pieces of one receive buffer.
const BUFFER_PIECES_MAX: usize = 4;
/// Turns in a row before other events are looked at.
const TURNS_MAX: usize = 64;
/// Host ports of streams that the host opens start here, far from any port with a meaning.
const HOST_PORT_FIRST: u32 = 1 << 30;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const EVENT_KICK: u32 = 2;
const LISTENER: u32 = 3;
/// Streams are events from here on: token = slot + this.
const STREAM_FIRST: u32 = 16;

/// What a turn of one stream came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Turn {
    /// Something was sent, or there was nothing to send.
    Done,
    /// The guest offers no buffers.
    Starved,
}

/// A receive buffer of the guest, taken and not yet filled.
struct Taken<'memory> {
    head: u16,
    header: SliceList<'memory, BUFFER_PIECES_MAX>,
    room: usize,
}

/// The worker.
pub(super) struct Muxer {
    memory: DeviceMemory,
    receive: Ring,
    transmit: Ring,
    /// Used once, in a machine that was made of a saved one; else kept for its position.
    event: Option<Ring>,
    /// The driver has streams of another machine: it is told so before anything else.
    has_strangers: bool,
    /// It was told and has not taken it in yet: nobody is let in before.
    awaits_reset: bool,
    guest_cid: u64,
    listener: Arc<UnixListener>,
    /// Host programs may wait in the listener's queue although no event will say so.
    accept_later: bool,
    ports: Arc<Mutex<PortTable>>,
    counters: Arc<VsockCounters>,
    streams: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    handshakes: usize,
    ready: VecDeque<usize>,
    resets: VecDeque<Key>,
    transmit_waits: bool,
    next_host_port: u32,
    buffers_granted: usize,
    births: u64,
}

impl Muxer {
    pub(super) fn new(
        activation: Activation,
        guest_cid: u64,
        listener: Arc<UnixListener>,
        ports: Arc<Mutex<PortTable>>,
        counters: Arc<VsockCounters>,
        has_strangers: bool,
    ) -> Self {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut rings = queues.into_iter().map(|queue| Ring::new(queue, Arc::clone(&memory), Arc::clone(&interrupt)));
        let receive = rings.next().expect("the device checked that there are two");
        let transmit = rings.next().expect("the device checked that there are two");
        let event = rings.next();
        Self {
            memory,
            receive,
            transmit,
            event,
            has_strangers,
            awaits_reset: false,
            guest_cid,
            listener,
            accept_later: false,
            ports,
            counters,
            streams: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            handshakes: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            transmit_waits: false,
            next_host_port: if has_strangers { some_host_port() } else { HOST_PORT_FIRST },
            buffers_granted: 0,
            births: 0,
        }
    }

    // --- the table ---------------------------------------------------------------------------------------------------------

    /// Enters a stream and watches its socket.
    fn insert(&mut self, stream: UnixStream, stage: Stage, key: Key, operations: &mut EventOps) -> Option<usize> {
        if self.is_full() {
            self.evict_oldest(Stage::Closing, operations)?;
        }
        let left = BUFFER_BUDGET_BYTES.saturating_sub(self.buffers_granted);
        let allocated = (left / 8).clamp(STREAM_BUFFER_BYTES_MIN, STREAM_BUFFER_BYTES_MAX);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.streams.push(None);
            self.streams.len() - 1
        });
        let token = STREAM_FIRST + u32::try_from(slot).expect("at most STREAMS_MAX slots");
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if let Err(error) = operations.add(Events::with_data(&stream, token, interest)) {
            tracing::warn!(%error, "vsock stream cannot be watched");
            self.free.push(slot);
            return None;
        }
        if allocated == STREAM_BUFFER_BYTES_MAX {
            // While streams are few: what the guest may send fits the socket, so that nothing has to be kept and copied here. As a wish.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, allocated);
        }
        self.buffers_granted += allocated;
        self.births += 1;
        let allocated = u32::try_from(allocated).expect("at most STREAM_BUFFER_BYTES_MAX");
        self.streams[slot] = Some(Connection::new(stream, stage, key, allocated, self.births));
        if stage == Stage::Handshake {
            self.handshakes += 1;
        } else {
            self.by_key.insert(key, slot);
        }
        Some(slot)
    }

    fn is_full(&self) -> bool {
        self.streams.len() - self.free.len() >= STREAMS_MAX
    }

    /// Forgets a stream; the guest is told nothing.
    fn remove(&mut self, slot: usize, operations: &mut EventOps) {
        self.close_stream(slot, operations);
        let Some(connection) = self.streams.get_mut(slot).and_then(Option::take) else { return };
        if connection.stage == Stage::Handshake {
            self.handshakes -= 1;
        } else if self.by_key.get(&connection.key) == Some(&slot) {
            self.by_key.remove(&connection.key);
        }
        self.buffers_granted -= connection.allocated as usize;
        if connection.queued {
            self.ready.retain(|queued| *queued != slot);
        }
        self.free.push(slot);
        if self.accept_later {
            self.accept(operations);
        }
    }

    /// Closes the host's end of a stream.
    fn close_stream(&mut self, slot: usize, operations: &mut EventOps) {
        let Some(connection) = self.streams.get_mut(slot).and_then(Option::as_mut) else { return };
        if let Some(stream) = connection.stream.take() {
            let _ = operations.remove(Events::empty(&stream));
            discard_unread(&stream);
        }
    }

    /// Makes room by giving up the oldest stream of `stage`.
    fn evict_oldest(&mut self, stage: Stage, operations: &mut EventOps) -> Option<()> {
        let slot = self
            .streams
            .iter()
            .enumerate()
            .filter_map(|(slot, entry)| {
                entry.as_ref().filter(|connection| connection.stage == stage).map(|c| (c.born, slot))
            })
            .min()?
            .1;
        if stage == Stage::Closing && self.resets.len() < RESETS_MAX {
            let key = self.streams[slot].as_ref().expect("just found").key;
            self.resets.push_back(key);
        }
        self.remove(slot, operations);
        Some(())
    }

    /// Puts a stream into the queue of those with something for the guest, if it has something.
    fn enqueue(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.streams.get_mut(slot)
            && !connection.queued
            && connection.wants_guest()
        {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Ends a stream from our side: RST to the guest, end of file to the host.
    fn reset(&mut self, slot: usize, operations: &mut EventOps) {
        self.close_stream(slot, operations);
        let Some(Some(connection)) = self.streams.get_mut(slot) else { return };
        connection.stage = Stage::Closing;
        connection.pending = Pending { reset: true, ..Pending::default() };
        self.enqueue(slot);
    }

    /// Tells the driver that all its streams are gone (VIRTIO 1.2, 5.10.6.7). It gives the buffer back once it has closed them; one
    /// that offers none has nothing to be told.
    fn announce_reset(&mut self) {
        let Some(event) = &mut self.event else { return };
        let Some(chain) = event.pop() else { return };
        let head = chain.head_index();
        let mut bytes = SliceList::<BUFFER_PIECES_MAX>::new();
        for descriptor in chain.writable() {
            if bytes.push_descriptor(&self.memory, &descriptor).is_err() {
                return;
            }
        }
        bytes.truncate(EVENT_TRANSPORT_RESET.len());
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        bytes.write_front(&EVENT_TRANSPORT_RESET[..bytes.len()]);
        // The others lie in the ring already, so it is the next one that says that this one was taken in.
        event.request_next_kick();
        event.push_used(head, length);
        event.signal();
        self.awaits_reset = true;
    }

    // --- from host programs ------------------------------------------------------------------------------------------------

    fn accept(&mut self, operations: &mut EventOps) {
        if self.awaits_reset {
            // A stream that was opened now might be closed with the others.
            return;
        }
        self.accept_later = false;
        loop {
            if self.handshakes >= HANDSHAKES_MAX {
                // Whoever connects and says nothing for so long gives way to somebody who may.
                self.evict_oldest(Stage::Handshake, operations);
            }
            if self.is_full() && self.evict_oldest(Stage::Closing, operations).is_none() {
                self.accept_later = true;
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let key = Key { host_port: 0, guest_port: 0 };
                    // Watching begins with an event for a line that is already there.
                    if stream.set_nonblocking(true).is_ok() {
                        self.insert(stream, Stage::Handshake, key, operations);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of descriptors: wait until one of ours is closed.
                    tracing::warn!(%error, "vsock socket does not accept");
                    self.accept_later = true;
                    return;
                }
            }
        }
    }

    /// Reads `CONNECT <port>\n`, not a byte more.
    fn read_handshake(&mut self, slot: usize, operations: &mut EventOps) {
        let Some(Some(connection)) = self.streams.get_mut(slot) else { return };
        let Some(stream) = &connection.stream else { return };
        let mut line = [0u8; HANDSHAKE_BYTES_MAX];
        let seen = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((count, _)) => count,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => 0,
        };
        let end = line[..seen].iter().position(|byte| *byte == b'\n');
        let port = match end {
            Some(end) => parse_connect(&line[..end]),
            None if seen > 0 && seen < HANDSHAKE_BYTES_MAX && !connection.hangup => return,
            None => None,
        };
        let (Some(end), Some(guest_port)) = (end, port) else {
            self.remove(slot, operations);
            return;
        };
        // Cannot block or fall short: the bytes were just seen.
        let _ = rustix::net::recv(stream, &mut line[..=end], RecvFlags::DONTWAIT);
        self.handshakes -= 1;
        let key = self.free_key(guest_port);
        let connection = self.streams[slot].as_mut().expect("looked up above");
        connection.stage = Stage::Connecting;
        connection.key = key;
        connection.pending.request = true;
        self.by_key.insert(key, slot);
        self.enqueue(slot);
    }

    /// A host port that no stream to `guest_port` uses.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key { host_port: self.next_host_port, guest_port };
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(HOST_PORT_FIRST);
            // Ends: there are far fewer streams than ports.
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    fn on_stream_event(&mut self, slot: usize, events: EventSet, operations: &mut EventOps) {
        let Some(Some(connection)) = self.streams.get_mut(slot) else { return };
        if events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            connection.hangup = true;
            connection.readable = true;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.host_gone = true;
        }
        if events.contains(EventSet::IN) {
            connection.readable = true;
        }
        match connection.stage {
            Stage::Handshake => self.read_handshake(slot, operations),
            Stage::Connecting if connection.host_gone => self.reset(slot, operations),
            Stage::Connecting | Stage::Closing => {}
            Stage::Established | Stage::Draining => {
                if events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) && !connection.is_flushed() {
                    connection.flush();
                    self.after_flush(slot, operations);
                }
                self.enqueue(slot);
            }
        }
    }

    /// Once the host has everything the guest sent, ends what the guest has ended.
    fn after_flush(&mut self, slot: usize, operations: &mut EventOps) {
        let Some(Some(connection)) = self.streams.get_mut(slot) else { return };
        if !connection.is_flushed() {
            return;
        }
        match connection.stage {
            Stage::Draining => self.remove(slot, operations),
            Stage::Established | Stage::Closing if connection.guest_done && connection.guest_deaf => {
                self.reset(slot, operations);
            }
            Stage::Established if connection.guest_done => {
                connection.finish_host_writing();
                self.enqueue(slot);
            }
            _ => self.enqueue(slot),
        }
    }

    // --- from the guest ----------------------------------------------------------------------------------------------------

    /// Works on the transmit ring, at most one ring's worth.
    fn serve_transmit(&mut self, operations: &mut EventOps) {
        let mut budget = self.transmit.size();
        self.transmit.suppress_kicks();
        loop {
            if self.resets.len() >= RESETS_MAX {
                // The guest does not take our replies: it gets no further until it does.
                self.transmit_waits = true;
                break;
            }
            if budget == 0 {
                let _ = self.transmit.kick().notify();
                break;
            }
            budget -= 1;
            if let Some(chain) = self.transmit.pop() {
                let head = chain.head_index();
                self.on_packet(chain, operations);
                self.transmit.push_used(head, 0);
            } else if self.transmit.request_kicks() {
                self.transmit.suppress_kicks();
            } else {
                break;
            }
        }
        self.transmit.signal();
    }

    fn on_packet(&mut self, chain: Chain, operations: &mut EventOps) {
        let memory = Arc::clone(&self.memory);
        let mut bytes = SliceList::<PIECES_MAX>::new();
        for descriptor in chain.readable() {
            if bytes.push_descriptor(&memory, &descriptor).is_err() {
                self.counters.packets_dropped.add(1);
                return;
            }
        }
        let mut header = [0u8; HEADER_BYTES];
        if !bytes.read_front(&mut header) {
            self.counters.packets_dropped.add(1);
            return;
        }
        let header = Header::parse(&header);
        // 5.10.6.4.2: packets with a foreign CID are dropped without an answer.
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            self.counters.packets_dropped.add(1);
            return;
        }
        let key = Key { host_port: header.destination_port, guest_port: header.source_port };
        let slot = self.by_key.get(&key).copied();
        if header.socket_type != TYPE_STREAM || header.length as usize > bytes.len() {
            self.counters.packets_dropped.add(1);
            self.refuse(key, slot, header.operation, operations);
            return;
        }
        let Some(slot) = slot else {
            if header.operation == op::REQUEST {
                self.on_request(key, &header, operations);
            } else {
                self.refuse(key, None, header.operation, operations);
            }
            return;
        };
        let connection = self.streams[slot].as_mut().expect("by_key points at streams");
        connection.take_credit(header.buffer_allocated, header.forwarded);
        match (header.operation, connection.stage) {
            (op::RESPONSE, Stage::Connecting) => self.on_response(slot, operations),
            (op::RW, Stage::Established) if !connection.guest_done => {
                bytes.truncate(header.length as usize);
                self.counters.guest_to_host_bytes.add(u64::from(header.length));
                match connection.deliver(&mut bytes) {
                    Delivery::Taken => self.enqueue(slot),
                    Delivery::CreditViolation => self.reset(slot, operations),
                }
            }
            // The host's program is gone and the guest does not know yet.
            (op::RW, Stage::Closing) => {}
            (op::SHUTDOWN, Stage::Established | Stage::Closing) => self.on_shutdown(slot, header.flags, operations),
            (op::RST, _) => self.on_reset(slot, operations),
            (op::CREDIT_UPDATE, _) => self.enqueue(slot),
            (op::CREDIT_REQUEST, Stage::Established) => {
                connection.pending.credit_update = true;
                self.enqueue(slot);
            }
            (op::CREDIT_REQUEST, _) => {}
            _ => self.reset(slot, operations),
        }
    }

    /// Answers a packet that makes no sense with RST, as it ends its stream if it has one.
    fn refuse(&mut self, key: Key, slot: Option<usize>, operation: u16, operations: &mut EventOps) {
        match slot {
            Some(slot) => self.reset(slot, operations),
            // An RST is never answered with one: two such peers would never stop.
            None if operation != op::RST => self.resets.push_back(key),
            None => {}
        }
    }

    fn on_request(&mut self, key: Key, header: &Header, operations: &mut EventOps) {
        let stream = self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(&key.host_port);
        let slot = stream.and_then(|stream| self.insert(stream, Stage::Established, key, operations));
        let Some(slot) = slot else {
            self.resets.push_back(key);
            return;
        };
        self.counters.streams_opened.add(1);
        let connection = self.streams[slot].as_mut().expect("just inserted");
        connection.take_credit(header.buffer_allocated, header.forwarded);
        connection.pending.response = true;
        self.enqueue(slot);
    }

    fn on_response(&mut self, slot: usize, operations: &mut EventOps) {
        let connection = self.streams[slot].as_mut().expect("caller looked it up");
        let answer = format!("OK {}\n", connection.key.host_port);
        let sent = connection.stream.as_ref().map(|stream| {
            rustix::net::send(
                stream,
                answer.as_bytes(),
                rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
            )
        });
        if !matches!(sent, Some(Ok(count)) if count == answer.len()) {
            self.reset(slot, operations);
            return;
        }
        self.counters.streams_opened.add(1);
        connection.stage = Stage::Established;
        connection.readable = true;
        self.enqueue(slot);
    }

    fn on_shutdown(&mut self, slot: usize, flags: u32, operations: &mut EventOps) {
        let connection = self.streams[slot].as_mut().expect("caller looked it up");
        if flags & SHUTDOWN_SEND != 0 {
            connection.guest_done = true;
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            connection.stop_host_sending();
        }
        self.after_flush(slot, operations);
    }

    fn on_reset(&mut self, slot: usize, operations: &mut EventOps) {
        let connection = self.streams[slot].as_mut().expect("caller looked it up");
        if connection.stage == Stage::Established && connection.guest_done && !connection.is_flushed() {
            // The guest's kernel has given up waiting for a slow host reader; what was sent in order is still delivered.
            connection.stage = Stage::Draining;
            connection.stop_host_sending();
            let key = connection.key;
            self.by_key.remove(&key);
            return;
        }
        self.remove(slot, operations);
    }

    // --- to the guest ------------------------------------------------------------------------------------------------------

    /// Sends what waits, one turn per stream, until nothing waits, the guest has no buffers, or it is others' turn.
    fn serve_receive(&mut self, operations: &mut EventOps) {
        for _ in 0..TURNS_MAX {
            if let Some(key) = self.resets.front().copied() {
                let header = self.header(key, op::RST, 0, 0);
                if self.send_header(&header) == Turn::Starved {
                    break;
                }
                self.resets.pop_front();
                if self.transmit_waits {
                    self.transmit_waits = false;
                    let _ = self.transmit.kick().notify();
                }
                continue;
            }
            let Some(slot) = self.ready.pop_front() else { break };
            if let Some(Some(connection)) = self.streams.get_mut(slot) {
                connection.queued = false;
            }
            match self.take_turn(slot, operations) {
                Turn::Done => self.enqueue(slot),
                Turn::Starved => {
                    if let Some(Some(connection)) = self.streams.get_mut(slot) {
                        connection.queued = true;
                        self.ready.push_front(slot);
                    }
                    break;
                }
            }
        }
        self.receive.signal();
    }

    /// One packet, or one batch of data packets, of one stream.
    fn take_turn(&mut self, slot: usize, operations: &mut EventOps) -> Turn {
        let Some(Some(connection)) = self.streams.get(slot) else { return Turn::Done };
        let (key, pending) = (connection.key, connection.pending);
        let (operation, flags) = if pending.reset {
            (op::RST, 0)
        } else if pending.request {
            (op::REQUEST, 0)
        } else if pending.response {
            (op::RESPONSE, 0)
        } else if pending.shutdown {
            let send = if connection.host_done { SHUTDOWN_SEND } else { 0 };
            let receive = if connection.host_deaf || connection.host_gone { SHUTDOWN_RECEIVE } else { 0 };
            (op::SHUTDOWN, send | receive)
        } else if connection.stage == Stage::Established
            && connection.readable
            && !connection.guest_deaf
            && !connection.host_done
            && connection.credit() > 0
        {
            return self.send_data(slot, operations);
        } else if pending.credit_update {
            (op::CREDIT_UPDATE, 0)
        } else if pending.credit_request {
            (op::CREDIT_REQUEST, 0)
        } else {
            return Turn::Done;
        };
        let mut header = self.header(key, operation, flags, 0);
        header.buffer_allocated = connection.allocated;
        header.forwarded = connection.forwarded.0;
        if self.send_header(&header) == Turn::Starved {
            return Turn::Starved;
        }
        let connection = self.streams[slot].as_mut().expect("looked up above");
        connection.announced = Wrapping(header.forwarded);
        connection.pending.credit_update = false;
        match operation {
            op::RST => self.remove(slot, operations),
            op::REQUEST => connection.pending.request = false,
            op::RESPONSE => connection.pending.response = false,
            op::CREDIT_REQUEST => connection.pending.credit_request = false,
            op::SHUTDOWN => {
                connection.pending.shutdown = false;
                if connection.host_done && (connection.host_gone || connection.host_deaf) {
                    connection.stage = Stage::Closing;
                    self.close_stream(slot, operations);
                }
            }
            _ => {}
        }
        Turn::Done
    }

    /// Reads from a stream's socket straight into the guest's buffers.
    fn send_data(&mut self, slot: usize, operations: &mut EventOps) -> Turn {
        let memory = Arc::clone(&self.memory);
        let connection = self.streams[slot].as_ref().expect("caller looked it up");
        let wanted = BATCH_BYTES_MAX.min(connection.credit() as usize);
        let key = connection.key;

        let mut taken: [Option<Taken<'_>>; BATCH_BUFFERS_MAX] = [const { None }; BATCH_BUFFERS_MAX];
        let mut room = SliceList::<SLICES_MAX>::new();
        let mut count = 0usize;
        while count < BATCH_BUFFERS_MAX && room.len() < wanted {
            let Some(chain) = self.take_buffer() else { break };
            let head = chain.head_index();
            let Some((header, mut data)) = gather_buffer(chain, &memory) else {
                if count > 0 {
                    // It is met again as the first of a batch; rings can only be rewound in order.
                    self.receive.undo_pop(1);
                    break;
                }
                self.counters.packets_dropped.add(1);
                self.receive.push_used(head, 0);
                continue;
            };
            data.truncate(wanted - room.len());
            for slice in data.as_slices() {
                room.push(*slice).expect("16 buffers of 4 pieces fit 64");
            }
            taken[count] = Some(Taken { head, header, room: data.len() });
            count += 1;
        }
        if count == 0 {
            return Turn::Starved;
        }

        let connection = self.streams[slot].as_mut().expect("caller looked it up");
        let Some(stream) = &connection.stream else {
            self.receive.undo_pop(u16::try_from(count).expect("small"));
            return Turn::Done;
        };
        let received = match transfer::receive(stream.as_fd(), room.as_slices()) {
            Ok(0) => {
                connection.host_done = true;
                connection.readable = false;
                connection.pending.shutdown = true;
                0
            }
            Ok(received) => {
                // A short read has emptied the socket, and new bytes cause a new event. Not so after a hang-up: its event is spent.
                if received < room.len() && !connection.hangup {
                    connection.readable = false;
                }
                received
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connection.readable = false;
                0
            }
            Err(_) => {
                self.receive.undo_pop(u16::try_from(count).expect("small"));
                self.reset(slot, operations);
                return Turn::Done;
            }
        };

        connection.sent += Wrapping(u32::try_from(received).expect("at most BATCH_BYTES_MAX"));
        let (allocated, forwarded) = (connection.allocated, connection.forwarded);
        if received > 0 {
            connection.announced = forwarded;
            connection.pending.credit_update = false;
            self.counters.host_to_guest_bytes.add(received as u64);
        }
        let mut left = received;
        let mut filled = 0usize;
        for buffer in taken.iter_mut().take(count).flatten() {
            let length = left.min(buffer.room);
            if length == 0 {
                break;
            }
            left -= length;
            filled += 1;
            let length = u32::try_from(length).expect("at most BATCH_BYTES_MAX");
            let mut header = self.header(key, op::RW, 0, length);
            header.buffer_allocated = allocated;
            header.forwarded = forwarded.0;
            buffer.header.write_front(&header.encode());
            self.receive.push_used(buffer.head, HEADER_BYTES as u32 + length);
        }
        self.receive.undo_pop(u16::try_from(count - filled).expect("small"));
        Turn::Done
    }

    /// Sends a packet without data.
    fn send_header(&mut self, header: &Header) -> Turn {
        let memory = Arc::clone(&self.memory);
        loop {
            let Some(chain) = self.take_buffer() else { return Turn::Starved };
            let head = chain.head_index();
            let Some((mut place, _)) = gather_buffer(chain, &memory) else {
                self.counters.packets_dropped.add(1);
                self.receive.push_used(head, 0);
                continue;
            };
            place.write_front(&header.encode());
            self.receive.push_used(head, HEADER_BYTES as u32);
            return Turn::Done;
        }
    }

    /// The guest's next receive buffer; when there is none, a kick will come once there is.
    fn take_buffer(&mut self) -> Option<Chain> {
        if let Some(chain) = self.receive.pop() {
            return Some(chain);
        }
        // Buffers may have come between the look and the request for kicks.
        if self.receive.request_kicks() { self.receive.pop() } else { None }
    }

    fn header(&self, key: Key, operation: u16, flags: u32, length: u32) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: key.host_port,
            destination_port: key.guest_port,
            length,
            socket_type: TYPE_STREAM,
            operation,
            flags,
            buffer_allocated: 0,
            forwarded: 0,
        }
    }

    /// After any event: whatever became possible towards the guest.
    fn settle(&mut self, operations: &mut EventOps) {
        self.serve_receive(operations);
        // Work that is left over for want of turns, not of buffers, has no event of its own to wait for.
        if (!self.ready.is_empty() || !self.resets.is_empty()) && !self.is_starved() {
            let _ = self.receive.kick().notify();
        }
    }

    /// Whether the guest offers no receive buffer now.
    fn is_starved(&mut self) -> bool {
        match self.receive.pop() {
            Some(_) => {
                self.receive.undo_pop(1);
                false
            }
            None => !self.receive.request_kicks(),
        }
    }
}

/// A host port that most likely no stream of another machine had: its driver may still know the pair of ports of one.
fn some_host_port() -> u32 {
    let mut bytes = [0u8; 4];
    // The pool is ready long before any sandbox starts, so this does not fail.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    HOST_PORT_FIRST + (u32::from_ne_bytes(bytes) >> 3)
}

/// `CONNECT <port>` without its newline.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Splits a receive buffer into the place of the header and the room for data; none if it is malformed or too small for a byte.
fn gather_buffer<'memory>(
    chain: Chain,
    memory: &'memory DeviceMemory,
) -> Option<(SliceList<'memory, BUFFER_PIECES_MAX>, SliceList<'memory, BUFFER_PIECES_MAX>)> {
    let mut data = SliceList::<BUFFER_PIECES_MAX>::new();
    for descriptor in chain.writable() {
        data.push_descriptor(memory, &descriptor).ok()?;
    }
    if data.len() <= HEADER_BYTES {
        return None;
    }
    let mut header = data.clone();
    header.truncate(HEADER_BYTES);
    data.advance(HEADER_BYTES);
    Some((header, data))
}

impl MutEventSubscriber for Muxer {
    fn init(&mut self, operations: &mut EventOps) {
        let mut watched = vec![
            Events::with_data(self.receive.kick(), RECEIVE_KICK, EventSet::IN),
            Events::with_data(self.transmit.kick(), TRANSMIT_KICK, EventSet::IN),
            Events::with_data(&*self.listener, LISTENER, EventSet::IN | EventSet::EDGE_TRIGGERED),
        ];
        if let Some(event) = &self.event {
            watched.push(Events::with_data(event.kick(), EVENT_KICK, EventSet::IN));
        }
        for events in watched {
            if let Err(error) = operations.add(events) {
                tracing::error!(%error, "vsock cannot watch its queues");
            }
        }
        if std::mem::take(&mut self.has_strangers) {
            self.announce_reset();
        }
        self.accept(operations);
        self.serve_transmit(operations);
        self.settle(operations);
    }

    fn process(&mut self, events: Events, operations: &mut EventOps) {
        match events.data() {
            RECEIVE_KICK => {
                self.receive.kick().drain();
            }
            TRANSMIT_KICK => {
                self.transmit.kick().drain();
                self.serve_transmit(operations);
            }
            EVENT_KICK => {
                if let Some(event) = &self.event {
                    event.kick().drain();
                }
                // The guest's other buffers stay where they are: there is nothing else to report.
                if std::mem::take(&mut self.awaits_reset) {
                    self.accept(operations);
                }
            }
            LISTENER => self.accept(operations),
            token => {
                let slot = token.saturating_sub(STREAM_FIRST) as usize;
                self.on_stream_event(slot, events.event_set(), operations);
            }
        }
        self.settle(operations);
    }
}

impl Worker for Muxer {
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        let rings = [Some(&self.receive), Some(&self.transmit), self.event.as_ref()];
        Ok(rings.into_iter().flatten().map(|ring| ring.position(0)).collect())
    }

    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        let mut queues = vec![self.receive.into_queue(), self.transmit.into_queue()];
        queues.extend(self.event.map(Ring::into_queue));
        queues
    }
}
