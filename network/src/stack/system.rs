//! The host's real sockets: non-blocking, close-on-exec, all watched by one epoll descriptor that the caller puts into its own event
//! loop. Used by `msb-vmm`; the simulator has its own host. Never binds a port: listeners come from outside.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, sockopt};

use super::host::{Close, Event, Host, SocketId, Source};

/// Listeners have this bit in their epoll data; sockets are counted from 0 and never reach it.
const LISTENER_BIT: u64 = 1 << 63;
/// Events taken from the kernel at once.
const EVENTS_AT_ONCE: usize = 256;

#[derive(Debug)]
enum Socket {
    Stream(TcpStream),
    Datagram(UdpSocket),
}

/// A listener of a published port, bound by the daemon.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// UDP.
    Udp(UdpSocket),
}

/// The host's sockets of one sandbox.
pub struct SystemHost {
    epoll: OwnedFd,
    sockets: HashMap<SocketId, Socket>,
    listeners: Vec<Listener>,
}

impl std::fmt::Debug for SystemHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SystemHost")
            .field("sockets", &self.sockets.len())
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}

impl SystemHost {
    /// A host with these listeners, in the order of the published ports.
    ///
    /// # Errors
    /// What epoll and fcntl say.
    pub fn new(listeners: Vec<Listener>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, listener) in listeners.iter().enumerate() {
            let data = epoll::EventData::new_u64(LISTENER_BIT | index as u64);
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            match listener {
                Listener::Tcp(listener) => {
                    listener.set_nonblocking(true)?;
                    epoll::add(&epoll, listener, data, flags)?;
                }
                Listener::Udp(socket) => {
                    socket.set_nonblocking(true)?;
                    epoll::add(&epoll, socket, data, flags)?;
                }
            }
        }
        Ok(Self { epoll, sockets: HashMap::new(), listeners })
    }

    fn watch(&self, id: SocketId, socket: impl AsFd) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(id.0), flags)?)
    }

    fn open(to: SocketAddr, kind: SocketType, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, protocol)?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
            Err(error) => Err(error.into()),
        }
    }

    fn datagram(&mut self, id: SocketId, to: SocketAddr, protocol: Option<Protocol>) -> io::Result<()> {
        let socket = UdpSocket::from(Self::open(to, SocketType::DGRAM, protocol)?);
        self.watch(id, &socket)?;
        self.sockets.insert(id, Socket::Datagram(socket));
        Ok(())
    }
}

impl AsFd for SystemHost {
    /// Readable when any socket is ready: the caller watches this one descriptor.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl Host for SystemHost {
    fn connect_tcp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        let socket = Self::open(to, SocketType::STREAM, None)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        let stream = TcpStream::from(socket);
        self.watch(id, &stream)?;
        self.sockets.insert(id, Socket::Stream(stream));
        Ok(())
    }

    fn connect_result(&mut self, id: SocketId) -> io::Result<()> {
        let Some(Socket::Stream(stream)) = self.sockets.get(&id) else { return Err(gone()) };
        match stream.take_error()? {
            Some(error) => Err(error),
            None => match stream.peer_addr() {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Err(io::ErrorKind::WouldBlock.into()),
                Err(error) => Err(error),
            },
        }
    }

    fn connect_udp(&mut self, id: SocketId, to: SocketAddr) -> io::Result<()> {
        self.datagram(id, to, None)
    }

    fn connect_ping(&mut self, id: SocketId, to: IpAddr) -> io::Result<()> {
        let protocol = if to.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
        self.datagram(id, SocketAddr::new(to, 0), Some(protocol))
    }

    fn accept(&mut self, listener: usize, id: SocketId) -> io::Result<SocketAddr> {
        let Some(Listener::Tcp(listener)) = self.listeners.get(listener) else { return Err(gone()) };
        let (stream, peer) = listener.accept()?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        self.watch(id, &stream)?;
        self.sockets.insert(id, Socket::Stream(stream));
        Ok(peer)
    }

    fn receive_from(&mut self, listener: usize, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let Some(Listener::Udp(socket)) = self.listeners.get(listener) else { return Err(gone()) };
        socket.recv_from(buffer)
    }

    fn send_to(&mut self, listener: usize, data: &[u8], to: SocketAddr) -> io::Result<usize> {
        let Some(Listener::Udp(socket)) = self.listeners.get(listener) else { return Err(gone()) };
        socket.send_to(data, to)
    }

    fn read(&mut self, id: SocketId, buffer: &mut [u8]) -> io::Result<usize> {
        match self.sockets.get_mut(&id) {
            Some(Socket::Stream(stream)) => stream.read(buffer),
            Some(Socket::Datagram(socket)) => socket.recv(buffer),
            None => Err(gone()),
        }
    }

    fn write(&mut self, id: SocketId, data: &[u8]) -> io::Result<usize> {
        match self.sockets.get_mut(&id) {
            Some(Socket::Stream(stream)) => stream.write(data),
            Some(Socket::Datagram(socket)) => socket.send(data),
            None => Err(gone()),
        }
    }

    fn shutdown_write(&mut self, id: SocketId) {
        if let Some(Socket::Stream(stream)) = self.sockets.get(&id) {
            // It fails only when the peer has gone already, which the next read tells.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn close(&mut self, id: SocketId, how: Close) {
        let Some(socket) = self.sockets.remove(&id) else { return };
        if let (Socket::Stream(stream), Close::Reset) = (&socket, how) {
            let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
        // Dropping closes it, and the kernel forgets it in the epoll set: nobody holds a duplicate.
    }

    fn take_events(&mut self, events: &mut Vec<Event>) {
        loop {
            // Not kept between calls: the kernel's event holds a pointer and must not move to another thread.
            let mut space = [const { MaybeUninit::uninit() }; EVENTS_AT_ONCE];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let Ok((taken, _)) = epoll::wait(&self.epoll, &mut space[..], Some(&now)) else { return };
            for event in &*taken {
                let flags = event.flags;
                let broken = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
                let data = event.data.u64();
                let source = match data & LISTENER_BIT {
                    0 => Source::Socket(SocketId(data)),
                    _ => Source::Listener((data & !LISTENER_BIT) as usize),
                };
                events.push(Event {
                    source,
                    readable: broken || flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP),
                    writable: broken || flags.contains(epoll::EventFlags::OUT),
                });
            }
            if taken.len() < EVENTS_AT_ONCE {
                return;
            }
        }
    }
}
