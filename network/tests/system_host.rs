//! The host's real sockets, over loopback only: what the stack relies on holds.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use msb_network::stack::host::{Close, Event, Host, SocketId, Source};
use msb_network::stack::system::{Listener, SystemHost};

const ID: SocketId = SocketId(7);

/// Waits for an event that `wanted` accepts; the descriptor must become readable for it.
fn wait(host: &mut SystemHost, wanted: impl Fn(&Event) -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    let mut events = Vec::new();
    while Instant::now() < end {
        let fd = host.as_fd();
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        rustix::event::poll(&mut polled, Some(&second)).unwrap();
        host.take_events(&mut events);
        if events.iter().any(&wanted) {
            return;
        }
    }
    panic!("no such event: {events:?}");
}

fn readable(event: &Event) -> bool {
    event.source == Source::Socket(ID) && event.readable
}

fn writable(event: &Event) -> bool {
    event.source == Source::Socket(ID) && event.writable
}

fn connected() -> (SystemHost, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut host = SystemHost::new(Vec::new()).unwrap();
    host.connect_tcp(ID, listener.local_addr().unwrap()).unwrap();
    wait(&mut host, writable);
    host.connect_result(ID).unwrap();
    (host, listener.accept().unwrap().0)
}

#[test]
fn a_connection_carries_bytes_and_ends_half_by_half() {
    let (mut host, mut peer) = connected();
    let mut buffer = [0; 64];
    assert_eq!(host.read(ID, &mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(host.write(ID, b"ping").unwrap(), 4);
    host.shutdown_write(ID);
    let mut got = Vec::new();
    peer.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"ping");
    peer.write_all(b"pong").unwrap();
    wait(&mut host, readable);
    assert_eq!(host.read(ID, &mut buffer).unwrap(), 4);
    peer.shutdown(Shutdown::Write).unwrap();
    wait(&mut host, readable);
    assert_eq!(host.read(ID, &mut buffer).unwrap(), 0);
    host.close(ID, Close::Graceful);
    assert_eq!(host.read(ID, &mut buffer).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn a_reset_reaches_the_peer_as_one() {
    let (mut host, mut peer) = connected();
    host.close(ID, Close::Reset);
    assert_eq!(peer.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_refusal_is_told_by_the_result() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut host = SystemHost::new(Vec::new()).unwrap();
    let error = match host.connect_tcp(ID, free) {
        Err(error) => error,
        Ok(()) => {
            wait(&mut host, writable);
            host.connect_result(ID).unwrap_err()
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn listeners_are_edge_triggered_and_accept_until_nobody_waits() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut host = SystemHost::new(vec![Listener::Tcp(listener)]).unwrap();
    let visitors: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
    wait(&mut host, |event| event.source == Source::Listener(0));
    for (n, visitor) in visitors.iter().enumerate() {
        assert_eq!(host.accept(0, SocketId(n as u64)).unwrap(), visitor.local_addr().unwrap());
    }
    assert_eq!(host.accept(0, SocketId(9)).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn datagrams_and_their_refusal_come_through() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = peer.local_addr().unwrap();
    let mut host = SystemHost::new(Vec::new()).unwrap();
    host.connect_udp(ID, to).unwrap();
    host.write(ID, b"ping").unwrap();
    let mut buffer = [0; 64];
    let (len, from) = peer.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"ping");
    peer.send_to(b"pong", from).unwrap();
    wait(&mut host, readable);
    assert_eq!(host.read(ID, &mut buffer).unwrap(), 4);
    drop(peer);
    host.write(ID, b"ping").unwrap();
    wait(&mut host, readable);
    assert_eq!(host.read(ID, &mut buffer).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_published_udp_port_answers_from_its_own_address() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let mut host = SystemHost::new(vec![Listener::Udp(socket)]).unwrap();
    let visitor = UdpSocket::bind("127.0.0.1:0").unwrap();
    visitor.send_to(b"ping", address).unwrap();
    wait(&mut host, |event| event.source == Source::Listener(0));
    let mut buffer = [0; 64];
    let (len, from): (usize, SocketAddr) = host.receive_from(0, &mut buffer).unwrap();
    assert_eq!((len, from), (4, visitor.local_addr().unwrap()));
    host.send_to(0, b"pong", from).unwrap();
    assert_eq!(visitor.recv_from(&mut buffer).unwrap(), (4, address));
}
