//! What the stack needs of the host: non-blocking sockets behind a trait, so that the simulator can take their place.
//!
//! The stack names each socket; the host tells when one can be used again. Readiness is told once (edge-triggered): who was told
//! that a socket is readable reads until `WouldBlock`.

use std::io;
use std::net::{IpAddr, SocketAddr};

/// The stack's name of a socket. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub u64);

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A socket.
    Socket(SocketId),
    /// A listener, by its place in the list of published ports.
    Listener(usize),
}

/// Readiness of a source. Errors count as both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Of what.
    pub source: Source,
    /// Whether there is something to read, accept or learn.
    pub readable: bool,
    /// Whether there is room to write, or a connection was made or refused.
    pub writable: bool,
}

/// How a socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// What was written is still delivered.
    Graceful,
    /// The peer is told that the connection broke (RST).
    Reset,
}

/// The host's sockets. Nothing here blocks.
pub trait Host {
    /// Begins a TCP connection. A writable event follows, then [`Host::connect_result`].
    ///
    /// # Errors
    /// What connect(2) says at once.
    fn connect_tcp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()>;

    /// Whether a connection was made. `WouldBlock`: not yet.
    ///
    /// # Errors
    /// Why it was not made.
    fn connect_result(&mut self, id: SocketId) -> io::Result<()>;

    /// Opens a UDP socket connected to `to`.
    ///
    /// # Errors
    /// What socket(2) and connect(2) say.
    fn connect_udp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()>;

    /// Opens an unprivileged ICMP echo socket connected to `to` (`net.ipv4.ping_group_range`).
    ///
    /// # Errors
    /// What socket(2) and connect(2) say.
    fn connect_ping(&mut self, id: SocketId, to: IpAddr) -> io::Result<()>;

    /// Accepts a connection of a listener as `id`.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn accept(&mut self, listener: usize, id: SocketId) -> io::Result<SocketAddr>;

    /// Receives a datagram of a published UDP port.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn receive_from(&mut self, listener: usize, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)>;

    /// Sends a datagram from a published UDP port.
    ///
    /// # Errors
    /// What sendto(2) says.
    fn send_to(&mut self, listener: usize, data: &[u8], to: SocketAddr) -> io::Result<usize>;

    /// Reads; 0 is the end of a stream.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing.
    fn read(&mut self, id: SocketId, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room.
    fn write(&mut self, id: SocketId, data: &[u8]) -> io::Result<usize>;

    /// Ends the writing half of a stream.
    fn shutdown_write(&mut self, id: SocketId);

    /// Closes a socket; unknown ones are ignored.
    fn close(&mut self, id: SocketId, how: Close);

    /// Takes what became ready since the last call.
    fn take_events(&mut self, events: &mut Vec<Event>);
}
