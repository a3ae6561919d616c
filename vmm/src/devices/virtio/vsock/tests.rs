//! The vsock device driven through its rings in plain memory, with Unix sockets as host programs and a minimal guest stack.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::{GuestPort, Vsock, VsockCounters, VsockOptions};
use crate::devices::virtio::device::{Activation, DeviceMemory, VirtioDevice};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};

const GUEST_CID: u64 = 3;
const RING_SIZE: u16 = 64;
/// Receive buffers: RING_SIZE / 2 of 4 KiB data behind a header, one page pair each.
const BUFFERS: u64 = 0x10_0000;
const BUFFER_STRIDE: u64 = 0x2000;
const BUFFER_BYTES: u32 = 4096 + 44;
const OUT: u64 = 0x40_0000;

/// A guest's vsock stack, as small as it can be, and the device under test.
struct Guest {
    memory: DeviceMemory,
    receive: DriverRing,
    transmit: DriverRing,
    /// Buffer address by head of the chain that holds it.
    buffers: HashMap<u16, u64>,
    inbox: VecDeque<(Header, Vec<u8>)>,
    /// Announced with every packet.
    allocated: u32,
    forwarded: u32,
    device: Vsock,
    counters: Arc<VsockCounters>,
    event_loop: LoopHandle,
    socket: PathBuf,
    /// The host's end of guest port 1025.
    link: UnixStream,
}

impl Guest {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("msb-vsock-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let socket = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&socket).expect("bind");
        let (link, device_end) = UnixStream::pair().expect("pair");
        let event_loop = LoopHandle::start("test-vsock").expect("loop");
        let options = VsockOptions {
            guest_cid: GUEST_CID,
            listener,
            guest_ports: vec![GuestPort { port: 1025, stream: device_end }],
            has_strangers: false,
            on_stop: None,
        };
        let mut device = Vsock::new(options, event_loop.clone()).expect("device");
        let memory = guest_memory(8);
        let receive = DriverRing::new(Arc::clone(&memory), 0x1000, RING_SIZE);
        let transmit = DriverRing::new(Arc::clone(&memory), 0x4000, RING_SIZE);
        device
            .activate(Activation {
                memory: Arc::clone(&memory),
                features: device.device_features(),
                queues: vec![receive.active_queue(0, true), transmit.active_queue(1, true)],
                interrupt: Arc::new(CountingInterrupt::default()),
            })
            .expect("activate");
        let counters = device.counters();
        let mut guest = Self {
            memory,
            receive,
            transmit,
            buffers: HashMap::new(),
            inbox: VecDeque::new(),
            allocated: 256 << 10,
            forwarded: 0,
            device,
            counters,
            event_loop,
            socket,
            link,
        };
        for index in 0..u64::from(RING_SIZE) / 2 {
            guest.post(BUFFERS + index * BUFFER_STRIDE);
        }
        guest.receive.kick();
        guest
    }

    /// Offers a receive buffer, header and data apart as Linux does.
    fn post(&mut self, address: u64) {
        let head =
            self.receive.add(&[Buffer::writable(address, 44), Buffer::writable(address + 44, BUFFER_BYTES - 44)]);
        self.buffers.insert(head, address);
    }

    /// Collects what the device sent and offers the buffers again.
    fn poll(&mut self) {
        let mut any = false;
        while let Some((head, length)) = self.receive.take_used() {
            let address = self.buffers.remove(&head).expect("a buffer we offered");
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("read");
            let header = Header::parse(bytes[..HEADER_BYTES].try_into().expect("a whole header"));
            assert_eq!(header.length as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.source_cid, header.destination_cid), (2, GUEST_CID));
            self.inbox.push_back((header, bytes[HEADER_BYTES..].to_vec()));
            self.post(address);
            any = true;
        }
        if any {
            self.receive.kick();
        }
    }

    /// The next packet for a stream, by the host's port; any stream if none is given.
    fn expect_packet(&mut self) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            self.poll();
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet came");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn expect_silence(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        self.poll();
        assert!(self.inbox.is_empty(), "unexpected {:?}", self.inbox.front().map(|packet| packet.0));
    }

    fn send_header(&mut self, header: &Header, data: &[u8]) {
        self.memory.write_slice(&header.encode(), GuestAddress(OUT)).expect("header");
        self.memory.write_slice(data, GuestAddress(OUT + 0x1000)).expect("data");
        let mut chain = vec![Buffer::readable(OUT, 44)];
        if !data.is_empty() {
            chain.push(Buffer::readable(OUT + 0x1000, u32::try_from(data.len()).expect("small")));
        }
        let head = self.transmit.add(&chain);
        self.transmit.kick();
        assert_eq!(self.transmit.wait_used().0, head);
    }

    fn header(&self, guest_port: u32, host_port: u32, operation: u16) -> Header {
        Header {
            source_cid: GUEST_CID,
            destination_cid: 2,
            source_port: guest_port,
            destination_port: host_port,
            length: 0,
            socket_type: TYPE_STREAM,
            operation,
            flags: 0,
            buffer_allocated: self.allocated,
            forwarded: self.forwarded,
        }
    }

    fn send(&mut self, guest_port: u32, host_port: u32, operation: u16, data: &[u8]) {
        let mut header = self.header(guest_port, host_port, operation);
        header.length = u32::try_from(data.len()).expect("small");
        self.send_header(&header, data);
    }

    fn shut_down(&mut self, guest_port: u32, host_port: u32, flags: u32) {
        let header = Header { flags, ..self.header(guest_port, host_port, op::SHUTDOWN) };
        self.send_header(&header, &[]);
    }

    /// A host program asks for guest port 1024 and the guest accepts; the program's socket and the host port.
    fn host_opens(&mut self) -> (UnixStream, u32) {
        let mut host = UnixStream::connect(&self.socket).expect("connect");
        host.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        host.write_all(b"CONNECT 1024\n").expect("write");
        let (request, _) = self.expect_packet();
        assert_eq!((request.operation, request.destination_port), (op::REQUEST, 1024));
        assert!(request.buffer_allocated >= 16 << 10);
        self.send(1024, request.source_port, op::RESPONSE, &[]);
        let mut answer = String::new();
        let mut byte = [0u8];
        while byte[0] != b'\n' {
            host.read_exact(&mut byte).expect("answer");
            answer.push(char::from(byte[0]));
        }
        assert_eq!(answer, format!("OK {}\n", request.source_port));
        (host, request.source_port)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.device.deactivate();
        self.event_loop.stop();
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn the_configuration_is_the_cid() {
    let guest = Guest::new();
    let mut cid = [0u8; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
}

#[test]
fn a_host_program_connects_and_bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    host.write_all(b"to the guest").expect("write");
    let (header, data) = guest.expect_packet();
    assert_eq!((header.operation, data.as_slice()), (op::RW, &b"to the guest"[..]));
    guest.send(1024, port, op::RW, b"to the host");
    let mut seen = [0u8; 11];
    host.read_exact(&mut seen).expect("read");
    assert_eq!(&seen, b"to the host");
    assert_eq!(guest.counters.guest_to_host_bytes.get(), 11);
    assert_eq!(guest.counters.host_to_guest_bytes.get(), 12);
}

#[test]
fn a_refused_connection_ends_without_an_ok() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(&guest.socket).expect("connect");
    host.write_all(b"CONNECT 77\n").expect("write");
    let (request, _) = guest.expect_packet();
    guest.send(77, request.source_port, op::RST, &[]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("end");
    assert!(all.is_empty());
}

#[test]
fn nonsense_instead_of_connect_closes_the_socket() {
    let guest = Guest::new();
    for line in ["HELLO\n", "CONNECT \n", "CONNECT 99999999999\n", "CONNECT -1\n", &"x".repeat(64)] {
        let mut host = UnixStream::connect(&guest.socket).expect("connect");
        host.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        host.write_all(line.as_bytes()).expect("write");
        let mut all = Vec::new();
        match host.read_to_end(&mut all) {
            Ok(_) => assert!(all.is_empty()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{line:?}"),
        }
    }
}

#[test]
fn the_guest_reaches_its_listed_port_once_and_no_other() {
    let mut guest = Guest::new();
    guest.send(5000, 1025, op::REQUEST, &[]);
    assert_eq!(guest.expect_packet().0.operation, op::RESPONSE);
    guest.send(5000, 1025, op::RW, b"hello");
    let mut seen = [0u8; 5];
    guest.link.read_exact(&mut seen).expect("read");
    assert_eq!(&seen, b"hello");
    guest.send(5001, 1025, op::REQUEST, &[]);
    let (answer, _) = guest.expect_packet();
    assert_eq!((answer.operation, answer.destination_port), (op::RST, 5001));
    guest.send(5002, 1026, op::REQUEST, &[]);
    assert_eq!(guest.expect_packet().0.operation, op::RST);
    guest.link.write_all(b"still here").expect("write");
    assert_eq!(guest.expect_packet().1, b"still here");
}

#[test]
fn foreign_cids_are_dropped_and_resets_are_never_answered() {
    let mut guest = Guest::new();
    for (source, destination) in [(4, 2), (3, 1), (3, 0), (3, u64::MAX)] {
        let header = Header { source_cid: source, destination_cid: destination, ..guest.header(9, 1025, op::REQUEST) };
        guest.send_header(&header, &[]);
    }
    guest.send(9, 1234, op::RST, &[]);
    guest.expect_silence();
    guest.send(9, 1234, op::RW, b"x");
    assert_eq!(guest.expect_packet().0.operation, op::RST);
}

#[test]
fn a_host_that_does_not_read_exhausts_the_guests_credit_and_nothing_else() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    let (mut other, other_port) = guest.host_opens();
    // Socket buffer and backlog together take this much without a reader.
    let mut sent = 0usize;
    let mut forwarded = 0u32;
    let piece = vec![7u8; 32 << 10];
    while sent + piece.len() <= forwarded as usize + (256 << 10) {
        guest.send(1024, port, op::RW, &piece);
        sent += piece.len();
        std::thread::sleep(Duration::from_millis(1));
        guest.poll();
        while let Some((header, _)) = guest.inbox.pop_front() {
            assert_eq!(header.operation, op::CREDIT_UPDATE);
            forwarded = header.forwarded;
        }
    }
    assert!(sent >= 256 << 10);
    // The other stream is not held up.
    guest.send(1024, other_port, op::RW, b"quick");
    let mut seen = [0u8; 5];
    other.read_exact(&mut seen).expect("read");
    // The reader wakes up and gets every byte, and the guest learns of the room.
    let mut all = vec![0u8; sent];
    host.read_exact(&mut all).expect("read");
    assert!(all.iter().all(|byte| *byte == 7));
    let deadline = Instant::now() + Duration::from_secs(5);
    while (sent as u32).wrapping_sub(forwarded) > 128 << 10 {
        guest.poll();
        while let Some((header, _)) = guest.inbox.pop_front() {
            forwarded = header.forwarded;
        }
        assert!(Instant::now() < deadline, "no credit came");
    }
}

#[test]
fn more_than_the_credit_is_the_end_of_the_stream() {
    let mut guest = Guest::new();
    let (host, port) = guest.host_opens();
    let piece = vec![1u8; 60 << 10];
    for _ in 0..64 {
        guest.send(1024, port, op::RW, &piece);
        guest.poll();
        if guest.inbox.iter().any(|(header, _)| header.operation == op::RST) {
            drop(host);
            return;
        }
    }
    panic!("3.8 MiB were taken without a reader");
}

#[test]
fn the_guests_credit_holds_the_host_back() {
    let mut guest = Guest::new();
    guest.allocated = 10_000;
    let (mut host, port) = guest.host_opens();
    host.set_nonblocking(true).expect("nonblocking");
    let _ = host.write(&vec![5u8; 100 << 10]);
    let mut seen = 0usize;
    let mut asked = false;
    for _ in 0..50 {
        guest.poll();
        while let Some((header, data)) = guest.inbox.pop_front() {
            seen += data.len();
            asked |= header.operation == op::CREDIT_REQUEST;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(seen, 10_000);
    assert!(asked, "the device asks for credit when it has none");
    guest.forwarded = 10_000;
    guest.send(1024, port, op::CREDIT_UPDATE, &[]);
    while seen < 20_000 {
        seen += guest.expect_packet().1.len();
    }
    assert_eq!(seen, 20_000);
}

#[test]
fn each_half_closes_by_itself() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    host.write_all(b"last words").expect("write");
    host.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(guest.expect_packet().1, b"last words");
    let (header, _) = guest.expect_packet();
    assert_eq!((header.operation, header.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    guest.send(1024, port, op::RW, b"answer");
    guest.shut_down(1024, port, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("read");
    assert_eq!(all, b"answer");
    assert_eq!(guest.expect_packet().0.operation, op::RST, "both halves are closed");
    guest.expect_silence();
}

#[test]
fn a_guest_that_closes_at_once_loses_nothing_and_its_host_sees_an_end_of_file() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    host.write_all(b"nobody reads this").expect("write");
    guest.send(1024, port, op::RW, b"bye");
    guest.shut_down(1024, port, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("an end of file, not a reset");
    assert_eq!(all, b"bye");
}

#[test]
fn a_slow_reader_gets_all_even_after_the_guest_gave_up() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    let piece = vec![3u8; 60 << 10];
    for _ in 0..4 {
        guest.send(1024, port, op::RW, &piece);
    }
    guest.shut_down(1024, port, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(1024, port, op::RST, &[]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("read");
    assert_eq!(all.len(), 240 << 10);
}

#[test]
fn a_host_program_that_vanishes_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (host, port) = guest.host_opens();
    drop(host);
    let (header, _) = guest.expect_packet();
    assert_eq!((header.operation, header.flags), (op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    guest.send(1024, port, op::RW, b"too late");
    guest.send(1024, port, op::RST, &[]);
    guest.expect_silence();
    guest.send(1024, port, op::RW, b"unknown now");
    assert_eq!(guest.expect_packet().0.operation, op::RST);
}

#[test]
fn a_reset_by_the_guest_ends_the_host_program() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.host_opens();
    guest.send(1024, port, op::RST, &[]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("end");
    assert!(all.is_empty());
}

#[test]
fn no_receive_buffers_means_waiting_not_losing() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.host_opens();
    let data: Vec<u8> = (0..200_000u32).map(|index| index as u8).collect();
    // More than all buffers hold, while the guest looks away.
    let sender = {
        let data = data.clone();
        std::thread::spawn(move || {
            host.write_all(&data).expect("write");
            host
        })
    };
    std::thread::sleep(Duration::from_millis(50));
    let mut seen = Vec::new();
    while seen.len() < data.len() {
        seen.extend(guest.expect_packet().1);
    }
    assert_eq!(seen, data);
    drop(sender.join().expect("sender"));
}

#[test]
fn a_thousand_streams_each_get_their_turn() {
    let mut guest = Guest::new();
    let mut hosts: Vec<(UnixStream, u32)> = (0..1000).map(|_| guest.host_opens()).collect();
    for (index, (host, _)) in hosts.iter_mut().enumerate() {
        host.write_all(&u32::try_from(index).expect("small").to_le_bytes()).expect("write");
    }
    let mut seen = HashMap::new();
    while seen.len() < hosts.len() {
        let (header, data) = guest.expect_packet();
        assert_eq!(header.operation, op::RW);
        seen.insert(header.source_port, u32::from_le_bytes(data.try_into().expect("four bytes")));
    }
    for (index, (_, port)) in hosts.iter().enumerate() {
        assert_eq!(seen[port], u32::try_from(index).expect("small"));
    }
    // One loud stream does not starve the others.
    let (mut loud, loud_port) = hosts.pop().expect("a stream");
    let (mut quiet, quiet_port) = hosts.pop().expect("a stream");
    let writer = std::thread::spawn(move || {
        let _ = loud.write_all(&vec![0; 200 << 10]);
        loud
    });
    std::thread::sleep(Duration::from_millis(20));
    quiet.write_all(b"quiet").expect("write");
    let mut loud_bytes = 0;
    loop {
        let (header, data) = guest.expect_packet();
        if header.source_port == quiet_port {
            break;
        }
        assert_eq!(header.source_port, loud_port);
        loud_bytes += data.len();
    }
    assert!(loud_bytes < 200 << 10, "the quiet stream came before the loud one was done");
    while loud_bytes < 200 << 10 {
        loud_bytes += guest.expect_packet().1.len();
    }
    drop(writer.join().expect("writer"));
}

#[test]
fn deactivation_closes_every_stream() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.host_opens();
    assert_eq!(guest.device.deactivate().len(), 2);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec(
            (0u16..9, 0u32..4, 0u32..4, any::<u32>(), any::<u32>(), 0u32..70_000, 0usize..200, any::<bool>()), 1..40),
    ) {
        let mut guest = Guest::new();
        let (host, port) = guest.host_opens();
        for (operation, from, to, allocated, forwarded, claimed, length, honest) in packets {
            let header = Header {
                source_port: [1024, 5000, 5001, 77][from as usize],
                destination_port: [port, 1025, 1026, 0][to as usize],
                length: if honest { u32::try_from(length).expect("small") } else { claimed },
                flags: claimed & 7,
                buffer_allocated: allocated,
                forwarded,
                ..guest.header(0, 0, operation)
            };
            guest.send_header(&header, &vec![1; length]);
            guest.poll();
        }
        guest.inbox.clear();
        // The device still works: whatever became of the stream, a packet for nobody is answered.
        guest.send(9999, 4321, op::RW, &[]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !matches!(guest.expect_packet().0, Header { operation: op::RST, destination_port: 9999, .. }) {
            prop_assert!(Instant::now() < deadline);
        }
        drop(host);
    }

    #[test]
    fn any_descriptors_are_answered(
        out in prop::collection::vec(prop::collection::vec((0x10_0000u64..0x90_0000, 0u32..0x3000, 0u16..8), 1..5), 1..10),
    ) {
        let mut guest = Guest::new();
        for chain in &out {
            let head = guest.transmit.add_raw(chain);
            guest.transmit.kick();
            prop_assert_eq!(guest.transmit.wait_used().0, head);
        }
        guest.poll();
        guest.inbox.clear();
        guest.send(9999, 4321, op::RW, &[]);
        while guest.expect_packet().0.destination_port != 9999 {}
    }
}
