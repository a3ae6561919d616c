//! What the guest gets: streams with something for it take turns, each with one batch, straight from a socket into the guest's buffers. Called
//! by the muxer's events.

use std::io;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::sync::Arc;

use event_manager::EventOps;

use super::{BUFFER_PIECES_MAX, HOST_CID, Key, Muxer, Stage};
use crate::devices::virtio::device::DeviceMemory;
use crate::devices::virtio::ring::Chain;
use crate::devices::virtio::slices::SliceList;
use crate::devices::virtio::vsock::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::memory::transfer::{self, SLICES_MAX};

/// Receive buffers of the guest filled by one system call; Linux posts 4 KiB each.
const BATCH_BUFFERS_MAX: usize = 16;
/// Bytes for one stream in one turn.
const BATCH_BYTES_MAX: usize = 64 << 10;
/// Turns in a row before other events are looked at.
const TURNS_MAX: usize = 64;

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

impl Muxer {
    /// Sends what waits, one turn per stream, until nothing waits, the guest has no buffers, or it is others' turn.
    pub(super) fn serve_receive(&mut self, operations: &mut EventOps) {
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
    pub(super) fn settle(&mut self, operations: &mut EventOps) {
        self.serve_receive(operations);
        // Work that is left over for want of turns, not of buffers, has no event of its own to wait for.
        if (!self.ready.is_empty() || !self.resets.is_empty()) && !self.is_starved() {
            let _ = self.receive.kick().notify();
        }
    }

    /// Whether the guest offers no receive buffer now.
    pub(super) fn is_starved(&mut self) -> bool {
        match self.receive.pop() {
            Some(_) => {
                self.receive.undo_pop(1);
                false
            }
            None => !self.receive.request_kicks(),
        }
    }
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
