//! One stream between a host socket and a guest socket.
//!
//! ```text
//!  host opens:  Handshake ──"CONNECT p\n"──► Connecting ──RESPONSE──► Established
//!  guest opens: ────────────────────────────── REQUEST ─────────────► Established
//!
//!  Established ──guest SHUTDOWN both, backlog flushed──► RST to the guest, gone
//!       │  └────host end of file────► SHUTDOWN(send); both halves gone ──► Closing ──guest RST──► gone
//!       └──guest RST after its SHUTDOWN, backlog left──► Draining ──flushed──► gone
//! ```
//!
//! `counts` follow VIRTIO 1.2, 5.10.6.3: each side may have at most the other's `buf_alloc` bytes on the way.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use crate::devices::virtio::slices::SliceList;
use crate::memory::transfer;

/// Most pieces of guest memory in one packet.
pub(super) const PIECES_MAX: usize = 32;
/// A backlog that has emptied gives memory above this back.
const BACKLOG_KEPT_BYTES: usize = 4096;
/// Unread host data thrown away at a close, in pieces of [`DISCARD_PIECE_BYTES`]: enough for a socket's whole receive queue.
const DISCARD_PIECES_MAX: usize = 32;
const DISCARD_PIECE_BYTES: usize = 16 * 1024;

/// What identifies a stream between the two sides.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    /// A host program has connected and not yet said where to.
    Handshake,
    /// The guest was asked.
    Connecting,
    /// Bytes flow.
    Established,
    /// The guest's side is gone; the backlog still goes to the host.
    Draining,
    /// The host's side is gone; waits for the guest to agree.
    Closing,
}

/// Packets that wait for room in the guest's receive ring.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Pending {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) reset: bool,
    pub(super) shutdown: bool,
    pub(super) credit_update: bool,
    pub(super) credit_request: bool,
}

impl Pending {
    fn any(self) -> bool {
        self != Self::default()
    }
}

/// What happened to bytes for the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Delivery {
    /// Taken (by the socket or the backlog).
    Taken,
    /// More than the guest had credit for: its fault.
    CreditViolation,
}

/// One stream.
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) stage: Stage,
    /// The host's end; gone while Closing.
    pub(super) stream: Option<UnixStream>,
    pub(super) pending: Pending,
    /// Whether it is in the muxer's queue of streams with something for the guest.
    pub(super) queued: bool,
    /// Order of birth, to find the oldest.
    pub(super) born: u64,

    /// The socket may have bytes (edge-triggered: set by an event, cleared by a read that found none).
    pub(super) readable: bool,
    /// The host's writing side has ended; the socket reads 0 once it is empty.
    pub(super) hangup: bool,
    /// End of file was read.
    pub(super) host_done: bool,
    /// Both directions of the host's end are closed.
    pub(super) host_gone: bool,
    /// The guest does not want any more.
    pub(super) guest_deaf: bool,
    /// The guest's buffer, how much of it it has emptied in total, how much we sent in total.
    pub(super) peer_allocated: u32,
    pub(super) peer_forwarded: Wrapping<u32>,
    pub(super) sent: Wrapping<u32>,
    pub(super) credit_requested: bool,

    /// Our buffer as announced, and the totals of what came, what went on to the host, and what the guest knows of that.
    pub(super) allocated: u32,
    pub(super) received: Wrapping<u32>,
    pub(super) forwarded: Wrapping<u32>,
    pub(super) announced: Wrapping<u32>,
    backlog: VecDeque<u8>,
    /// The guest will not send any more.
    pub(super) guest_done: bool,
    /// The host does not want any more: bytes of the guest are dropped.
    pub(super) host_deaf: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, stage: Stage, key: Key, allocated: u32, born: u64) -> Self {
        Self {
            key,
            stage,
            stream: Some(stream),
            pending: Pending::default(),
            queued: false,
            born,
            readable: true,
            hangup: false,
            host_done: false,
            host_gone: false,
            guest_deaf: false,
            peer_allocated: 0,
            peer_forwarded: Wrapping(0),
            sent: Wrapping(0),
            credit_requested: false,
            allocated,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            backlog: VecDeque::new(),
            guest_done: false,
            host_deaf: false,
        }
    }

    /// Bytes the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.peer_allocated.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Whether the guest should be sent something, and takes notes to ask for credit where that is what is missing.
    pub(super) fn wants_guest(&mut self) -> bool {
        let has_data = self.stage == Stage::Established && self.readable && !self.guest_deaf && !self.host_done;
        if has_data && self.credit() == 0 && !self.credit_requested && !self.pending.request {
            self.credit_requested = true;
            self.pending.credit_request = true;
        }
        self.pending.any() || (has_data && self.credit() > 0)
    }

    /// Learns what the guest says about its buffer.
    pub(super) fn take_credit(&mut self, allocated: u32, forwarded: u32) {
        self.peer_allocated = allocated;
        self.peer_forwarded = Wrapping(forwarded);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Passes a packet's bytes on to the host; what the socket does not take waits here.
    pub(super) fn deliver(&mut self, bytes: &mut SliceList<'_, PIECES_MAX>) -> Delivery {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let on_the_way = (self.received - self.forwarded).0;
        if length > self.allocated.saturating_sub(on_the_way) {
            return Delivery::CreditViolation;
        }
        self.received += Wrapping(length);
        if self.backlog.is_empty() {
            self.send_directly(bytes);
        }
        if self.host_deaf {
            self.forwarded = self.received;
        } else {
            self.keep(bytes);
        }
        self.note_credit();
        Delivery::Taken
    }

    fn send_directly(&mut self, bytes: &mut SliceList<'_, PIECES_MAX>) {
        while !bytes.is_empty() && !self.host_deaf {
            let Some(stream) = &self.stream else {
                self.host_deaf = true;
                return;
            };
            match transfer::send(stream.as_fd(), bytes.as_slices()) {
                Ok(0) => return,
                Ok(count) => {
                    bytes.advance(count);
                    self.forwarded += Wrapping(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.become_host_deaf(),
            }
        }
    }

    /// Copies what is left of a packet to the backlog; bounded by the credit that was just checked.
    fn keep(&mut self, bytes: &mut SliceList<'_, PIECES_MAX>) {
        let mut piece = [0u8; 4096];
        while !bytes.is_empty() {
            let count = bytes.len().min(piece.len());
            bytes.read_front(&mut piece[..count]);
            self.backlog.extend(&piece[..count]);
        }
    }

    /// Sends the backlog on; to be called when the socket has room again.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() && !self.host_deaf {
            let Some(stream) = &self.stream else {
                self.become_host_deaf();
                break;
            };
            let (front, back) = self.backlog.as_slices();
            let pieces = [IoSlice::new(front), IoSlice::new(back)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(stream, &pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.forwarded += Wrapping(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.become_host_deaf(),
            }
        }
        if self.backlog.is_empty() && self.backlog.capacity() > BACKLOG_KEPT_BYTES {
            self.backlog = VecDeque::new();
        }
        self.note_credit();
    }

    /// Whether everything the guest sent has reached the host.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }

    fn become_host_deaf(&mut self) {
        self.host_deaf = true;
        self.backlog = VecDeque::new();
        self.forwarded = self.received;
        // Tell the guest, so that its writers fail instead of writing into nothing.
        if self.stage == Stage::Established {
            self.pending.shutdown = true;
        }
    }

    /// Announces room once half of the buffer has been emptied since the guest last heard of it: often enough that a sender never
    /// stalls, seldom enough not to cost a packet per packet.
    fn note_credit(&mut self) {
        if (self.forwarded - self.announced).0 >= self.allocated / 2 {
            self.pending.credit_update = true;
        }
    }

    /// Ends the host's reading side after the last byte (the guest has shut down its sending).
    pub(super) fn finish_host_writing(&self) {
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Ends the host's writing side (the guest does not receive any more): its writers get EPIPE.
    pub(super) fn stop_host_sending(&mut self) {
        self.guest_deaf = true;
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Read);
        }
    }
}

/// Throws unread bytes away before a close: a Unix socket closed with unread bytes gives its peer ECONNRESET in place of an end of
/// file, and the peer did nothing wrong.
pub(super) fn discard_unread(stream: &UnixStream) {
    let mut piece = [0u8; DISCARD_PIECE_BYTES];
    for _ in 0..DISCARD_PIECES_MAX {
        match rustix::net::recv(stream, &mut piece[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => {}
            _ => return,
        }
    }
}
