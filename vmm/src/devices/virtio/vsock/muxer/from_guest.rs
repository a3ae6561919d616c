//! What the guest sends: every packet of the transmit ring is checked, and is a stream's or answered with RST. Called by the muxer's events.

use std::sync::{Arc, PoisonError};

use event_manager::EventOps;

use super::{HOST_CID, Key, Muxer, RESETS_MAX, Stage};
use crate::devices::virtio::ring::Chain;
use crate::devices::virtio::slices::SliceList;
use crate::devices::virtio::vsock::connection::{Delivery, PIECES_MAX};
use crate::devices::virtio::vsock::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};

impl Muxer {
    /// Works on the transmit ring, at most one ring's worth.
    pub(super) fn serve_transmit(&mut self, operations: &mut EventOps) {
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
}
