//! What host programs do: they connect, say where to, write, read on and go. Called by the muxer's events; never touches a ring.

use std::io;

use event_manager::{EventOps, EventSet};
use rustix::net::RecvFlags;

use super::{HOST_PORT_FIRST, Key, Muxer, Stage};

/// Most host programs that have connected and not yet said where to; the oldest gives way.
const HANDSHAKES_MAX: usize = 128;
/// Longest first line of a host program, newline included.
const HANDSHAKE_BYTES_MAX: usize = 32;

impl Muxer {
    pub(super) fn accept(&mut self, operations: &mut EventOps) {
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

    pub(super) fn on_stream_event(&mut self, slot: usize, events: EventSet, operations: &mut EventOps) {
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
    pub(super) fn after_flush(&mut self, slot: usize, operations: &mut EventOps) {
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
}

/// `CONNECT <port>` without its newline.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}
