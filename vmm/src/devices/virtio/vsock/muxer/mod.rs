//! The table of all streams and the worker on the device's rings.
//!
//! ```text
//!  host programs ──► from_host ──► streams ──► to_guest ──► receive ring
//!                                     ▲
//!                                     └── from_guest ◄── transmit ring
//! ```
//!
//! Everything here is bounded: streams, half-open handshakes, replies to nobody's packets, bytes kept for slow readers, and the work
//! done before other events get their turn. Streams with something for the guest stand in one queue and get one packet batch each
//! in turn, so none starves another. Sockets are watched edge-triggered and never re-registered: `Connection::readable` remembers.

mod from_guest;
mod from_host;
mod to_guest;

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::Queue;

use super::connection::{Connection, Key, Pending, Stage, discard_unread};
use super::device::VsockCounters;
use crate::devices::virtio::device::{Activation, DeviceMemory};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::slices::SliceList;
use crate::transport::mmio::saved::SavedQueue;

/// Prepared streams by port; taken when the guest connects.
pub(super) type PortTable = HashMap<u32, UnixStream>;

/// The host's CID (VIRTIO 1.2, 5.10.4).
const HOST_CID: u64 = 2;
/// Most streams at once.
const STREAMS_MAX: usize = 4096;
/// Memory for slow host readers: a new stream gets an eighth of what is left of this…
const BUFFER_BUDGET_BYTES: usize = 64 << 20;
/// …but not more than this, which keeps a fast stream from ever waiting for credit…
const STREAM_BUFFER_BYTES_MAX: usize = 256 << 10;
/// …and not less than this.
const STREAM_BUFFER_BYTES_MIN: usize = 16 << 10;
/// Replies to packets that belong to no stream; when so many wait, the transmit ring waits too.
const RESETS_MAX: usize = 256;
/// Pieces of one receive buffer.
const BUFFER_PIECES_MAX: usize = 4;
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
}

/// A host port that most likely no stream of another machine had: its driver may still know the pair of ports of one.
fn some_host_port() -> u32 {
    let mut bytes = [0u8; 4];
    // The pool is ready long before any sandbox starts, so this does not fail.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    HOST_PORT_FIRST + (u32::from_ne_bytes(bytes) >> 3)
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
