//! The header of a vsock packet (VIRTIO 1.2, section 5.10.6).
//!
//! Parsing cannot fail: every 44 bytes are a header; what its values mean is checked by the muxer.

/// Bytes of a header on the wire.
pub(super) const HEADER_BYTES: usize = 44;
/// The only type we speak: VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations (5.10.6); unknown ones survive as numbers and end their connection.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN flag: the sender will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// A header in the host's byte order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    pub(super) length: u32,
    pub(super) socket_type: u16,
    pub(super) operation: u16,
    pub(super) flags: u32,
    pub(super) buffer_allocated: u32,
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            socket_type: half(28),
            operation: half(30),
            flags: word(32),
            buffer_allocated: word(36),
            forwarded: word(40),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_allocated.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_queue::{Queue, QueueT};
    use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::testing::{Buffer, DriverRing, guest_memory};

    #[test]
    fn the_layout_agrees_with_an_independent_implementation() {
        assert_eq!(HEADER_BYTES, PKT_HEADER_SIZE);
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: 2,
            source_port: 0x1111_2222,
            destination_port: 1025,
            length: 0,
            socket_type: TYPE_STREAM,
            operation: op::CREDIT_UPDATE,
            flags: 3,
            buffer_allocated: 0x3333_4444,
            forwarded: 0x5555_6666,
        };
        let memory = guest_memory(1);
        memory.write_slice(&header.encode(), GuestAddress(0x8000)).expect("write");
        let mut driver = DriverRing::new(Arc::clone(&memory), 0x1000, 8);
        driver.add(&[Buffer::readable(0x8000, 44)]);
        let mut queue: Queue = driver.queue(false);
        let mut chain = queue.pop_descriptor_chain(&*memory).expect("chain");
        let packet = VsockPacket::from_tx_virtq_chain(&*memory, &mut chain, 1 << 16).expect("packet");
        assert_eq!(packet.src_cid(), header.source_cid);
        assert_eq!(packet.dst_cid(), header.destination_cid);
        assert_eq!(packet.src_port(), header.source_port);
        assert_eq!(packet.dst_port(), header.destination_port);
        assert_eq!(packet.type_(), header.socket_type);
        assert_eq!(packet.op(), header.operation);
        assert_eq!(packet.flags(), header.flags);
        assert_eq!(packet.buf_alloc(), header.buffer_allocated);
        assert_eq!(packet.fwd_cnt(), header.forwarded);
        assert_eq!(Header::parse(&header.encode()), header);
    }
}
