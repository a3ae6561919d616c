//! The link to the guest: where frames leave ([`FrameSink`], [`Outbox`]) and the smoltcp device made of it ([`Link`]). The device
//! carries IP packets; Ethernet headers are put on here, since both ends of the link are known for the VM's life and nobody else can
//! be on it. So there is no neighbour table that a guest could play with.

use std::collections::VecDeque;

use msb_protocol::network::NetworkAddresses;
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::EthernetProtocol;

use super::frame::{Builder, ETHERNET_HEADER_LEN};

/// Frames that wait when the guest has no room: answers that cannot be made again. Streams wait in their own buffers.
pub const BACKLOG_FRAMES_MAX: usize = 256;
/// Bytes of those frames.
pub const BACKLOG_BYTES_MAX: usize = 512 << 10;

/// Where frames to the guest go: the guest's receive queue.
pub trait FrameSink {
    /// Whether the guest has room for a frame of the link's full length.
    fn has_room(&mut self) -> bool;
    /// Gives a frame to the guest; called only after `has_room` said yes.
    fn send(&mut self, frame: &[u8]);
}

/// Frames on their way to the guest.
#[derive(Debug)]
pub(super) struct Outbox {
    backlog: VecDeque<Vec<u8>>,
    backlog_bytes: usize,
    scratch: Vec<u8>,
    header_v4: [u8; ETHERNET_HEADER_LEN],
    header_v6: [u8; ETHERNET_HEADER_LEN],
    capabilities: DeviceCapabilities,
    pub(super) frames: u64,
    pub(super) bytes: u64,
    pub(super) dropped: u64,
}

impl Outbox {
    /// An outbox; without `checksums` the guest takes TCP segments that have none (VIRTIO_NET_F_GUEST_CSUM).
    pub(super) fn new(link: &NetworkAddresses, builder: &Builder, checksums: bool) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(link.mtu_bytes);
        capabilities.checksum.ipv4 = Checksum::Tx;
        let mut outbox = Self {
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            scratch: Vec::new(),
            header_v4: builder.ethernet_header(EthernetProtocol::Ipv4),
            header_v6: builder.ethernet_header(EthernetProtocol::Ipv6),
            capabilities,
            frames: 0,
            bytes: 0,
            dropped: 0,
        };
        outbox.set_checksums(checksums);
        outbox
    }

    /// Whether TCP segments to the guest get checksums.
    pub(super) fn set_checksums(&mut self, needed: bool) {
        self.capabilities.checksum.tcp = if needed { Checksum::Tx } else { Checksum::None };
    }

    /// Sends a frame now, or later, or, when the guest has not read for long, never.
    pub(super) fn send(&mut self, sink: &mut dyn FrameSink, frame: &[u8]) {
        if self.backlog.is_empty() && sink.has_room() {
            self.count(frame.len());
            sink.send(frame);
        } else if self.backlog.len() < BACKLOG_FRAMES_MAX && self.backlog_bytes + frame.len() <= BACKLOG_BYTES_MAX {
            self.backlog_bytes += frame.len();
            self.backlog.push_back(frame.to_vec());
        } else {
            self.dropped += 1;
        }
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self, sink: &mut dyn FrameSink) {
        while !self.backlog.is_empty() && sink.has_room() {
            if let Some(frame) = self.backlog.pop_front() {
                self.backlog_bytes -= frame.len();
                self.count(frame.len());
                sink.send(&frame);
            }
        }
    }

    /// Whether a frame would go out now.
    pub(super) fn has_room(&self, sink: &mut dyn FrameSink) -> bool {
        self.backlog.is_empty() && sink.has_room()
    }

    pub(super) fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    fn count(&mut self, len: usize) {
        self.frames += 1;
        self.bytes += len as u64;
    }

    fn send_packet<R>(&mut self, sink: &mut dyn FrameSink, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut frame = std::mem::take(&mut self.scratch);
        frame.resize(ETHERNET_HEADER_LEN + len, 0);
        let result = fill(&mut frame[ETHERNET_HEADER_LEN..]);
        let header = if frame.get(ETHERNET_HEADER_LEN).is_some_and(|byte| byte >> 4 == 6) {
            &self.header_v6
        } else {
            &self.header_v4
        };
        frame[..ETHERNET_HEADER_LEN].copy_from_slice(header);
        self.send(sink, &frame);
        self.scratch = frame;
        result
    }
}

/// The outbox as a smoltcp device, for one call: one packet in at most.
pub(super) struct Link<'a> {
    pub(super) packet: Option<&'a [u8]>,
    pub(super) outbox: &'a mut Outbox,
    pub(super) sink: &'a mut dyn FrameSink,
}

impl Device for Link<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), Sending { outbox: self.outbox, sink: self.sink }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        let room = self.outbox.has_room(self.sink);
        room.then_some(Sending { outbox: self.outbox, sink: self.sink })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.outbox.capabilities.clone()
    }
}

pub(super) struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

pub(super) struct Sending<'a> {
    outbox: &'a mut Outbox,
    sink: &'a mut dyn FrameSink,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.outbox.send_packet(self.sink, len, fill)
    }
}
