//! A world of a test's own: two network namespaces joined by a veth pair. The service lives in one, and in the other are the hosts that a
//! guest talks to, under public addresses that lead nowhere else.
//!
//! ```text
//!  namespace "here"                    namespace "there"
//!  msbd, msb-vmm, the guest ── veth ── 93.184.216.34, .35, .53, 2606:2800:220:1::34: servers of the test
//! ```
//!
//! Used by the network's cases. Needs root and `ip` (iproute2); never sends a packet out of the pair.

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The host that is reached by name, in both families.
pub const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// The same over IPv6.
pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2606, 0x2800, 0x220, 1, 0, 0, 0, 0x34);
/// Another one.
pub const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 35);
/// The name server, on its port 53.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 53);

/// Types of DNS records (RFC 1035, section 3.2.2; RFC 3596, section 2.1).
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;

/// The two namespaces; gone when dropped.
pub struct World {
    here: String,
    there: String,
}

impl World {
    /// Makes the namespaces; none where this user may not.
    ///
    /// # Panics
    /// When root cannot.
    #[must_use]
    pub fn make() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let key = format!("msb-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let world = Self { here: format!("{key}-here"), there: format!("{key}-there") };
        let (here, there) = (&world.here, &world.there);
        for line in [
            format!("netns add {here}"),
            format!("netns add {there}"),
            format!("-n {here} link add world type veth peer name world netns {there}"),
            format!("-n {here} address add 10.99.0.1/24 dev world"),
            format!("-n {there} address add 10.99.0.2/24 dev world"),
            format!("-n {here} address add fd99::1/64 dev world nodad"),
            format!("-n {there} address add fd99::2/64 dev world nodad"),
            format!("-n {there} address add {HOST}/32 dev lo"),
            format!("-n {there} address add {OTHER_HOST}/32 dev lo"),
            format!("-n {there} address add {NAME_SERVER}/32 dev lo"),
            format!("-n {there} address add {HOST_V6}/128 dev lo nodad"),
            format!("-n {here} link set lo up"),
            format!("-n {there} link set lo up"),
            format!("-n {here} link set world up"),
            format!("-n {there} link set world up"),
            format!("-n {here} route add default via 10.99.0.2"),
            format!("-n {here} -6 route add default via fd99::2"),
        ] {
            let output = Command::new("ip").args(line.split(' ')).output().expect("ip of iproute2");
            assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // As systemd sets it on a host: echoes need no right of their own.
        let allowed = world.here(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"));
        allowed.expect("the range of groups that may send echoes");
        Some(world)
    }

    /// Does something in the namespace of the service: the first command of a home starts its service where it is itself.
    pub fn here<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        within(&self.here, action)
    }

    /// Does something where the hosts are. A socket stays where it was made.
    pub fn there<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        within(&self.there, action)
    }

    /// A TCP server of a host: `serve` has each connection, in a thread of its own.
    ///
    /// # Panics
    /// When the address cannot be bound.
    pub fn serve(&self, address: impl Into<IpAddr>, port: u16, serve: impl Fn(TcpStream) + Clone + Send + 'static) {
        let address = SocketAddr::new(address.into(), port);
        let listener = self.there(|| TcpListener::bind(address).expect("a listener"));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = serve.clone();
                std::thread::spawn(move || serve(stream));
            }
        });
    }

    /// A UDP server of a host: `answer` makes what goes back to whoever sent a datagram.
    ///
    /// # Panics
    /// When the address cannot be bound.
    pub fn answer(
        &self,
        address: impl Into<IpAddr>,
        port: u16,
        answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static,
    ) {
        let address = SocketAddr::new(address.into(), port);
        let socket = self.there(|| UdpSocket::bind(address).expect("a UDP socket"));
        std::thread::spawn(move || {
            let mut datagram = [0; 4096];
            while let Ok((len, from)) = socket.recv_from(&mut datagram) {
                if let Some(answer) = answer(&datagram[..len]) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
    }

    /// The name server: it knows these names, in one or both families, and says of every other that it does not exist.
    pub fn know(&self, names: &'static [(&'static str, &'static [IpAddr])]) {
        self.answer(NAME_SERVER, 53, move |query| answer_query(query, names));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in [&self.here, &self.there] {
            // What is left of it is a name under /run/netns, which says whose it was.
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

/// Does something in a thread that is in a namespace.
fn within<T: Send>(name: &str, action: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{name}")).expect("the namespace");
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
            action()
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Serves one HTTP request with a body, whatever was asked for.
pub fn serve_http(mut stream: TcpStream, body: &str) {
    use std::io::Read as _;
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(len) => request.extend_from_slice(&buffer[..len]),
        }
    }
    let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
}

/// Answers a query with one question (RFC 1035, section 4.1).
fn answer_query(query: &[u8], names: &[(&str, &[IpAddr])]) -> Option<Vec<u8>> {
    let (mut at, mut labels) = (12, Vec::new());
    while let Some(len) = query.get(at).copied().map(usize::from).filter(|len| *len > 0) {
        labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + len)?).to_ascii_lowercase());
        at += 1 + len;
    }
    let kind = u16::from_be_bytes([*query.get(at + 1)?, *query.get(at + 2)?]);
    let name = labels.join(".");
    let known = names.iter().find(|(known, _)| *known == name);
    let records: Vec<Vec<u8>> = known.map_or_else(Vec::new, |(_, addresses)| {
        let of_kind = |address: &IpAddr| match address {
            IpAddr::V4(address) if kind == TYPE_A => Some(address.octets().to_vec()),
            IpAddr::V6(address) if kind == TYPE_AAAA => Some(address.octets().to_vec()),
            _ => None,
        };
        addresses.iter().filter_map(of_kind).collect()
    });
    let mut answer = query.get(..2)?.to_vec();
    // An answer, recursion available; NXDOMAIN for a name that nobody knows.
    answer.extend_from_slice(&[0x81, if known.is_some() { 0x80 } else { 0x83 }, 0, 1]);
    answer.extend_from_slice(&u16::try_from(records.len()).ok()?.to_be_bytes());
    answer.extend_from_slice(&[0, 0, 0, 0]);
    answer.extend_from_slice(query.get(12..at + 5)?);
    for data in records {
        // The name of the question, its type, class IN, a minute.
        answer.extend_from_slice(&[0xc0, 12]);
        answer.extend_from_slice(&kind.to_be_bytes());
        answer.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
        answer.extend_from_slice(&u16::try_from(data.len()).ok()?.to_be_bytes());
        answer.extend_from_slice(&data);
    }
    Some(answer)
}
