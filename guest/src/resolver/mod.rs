//! Names to addresses as the guest's own files say: an address is itself, then /etc/hosts, then the name servers of
//! /etc/resolv.conf over UDP, and over TCP what does not fit. The agent is static and must not load the image's name service.
//! Called by `session::tcp` for each connection; nothing is kept, so a changed file counts at once.

pub mod files;
pub mod message;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;

use crate::failure::GuestError;
use crate::root::directory::RootDirectory;
use files::ResolvConf;
use message::Answer;

/// Largest hosts or resolv.conf file that is read, in bytes.
const FILE_LEN_MAX: usize = 1 << 20;
const DNS_PORT: u16 = 53;

/// The addresses of a host, IPv4 first; at least one.
///
/// # Errors
/// `connect_failed` if there is none or nobody answers in time, `connect_denied` if the resolver says so.
pub fn resolve(root: &RootDirectory, host: &str, until: Instant) -> Result<Vec<IpAddr>, GuestError> {
    if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(vec![address]);
    }
    let read = |path: &str| root.read(Path::new(path), FILE_LEN_MAX).unwrap_or_default();
    let known = files::hosts(&read("/etc/hosts"), host);
    if !known.is_empty() {
        return Ok(known);
    }
    if host.trim_end_matches('.').eq_ignore_ascii_case("localhost") {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    let conf = ResolvConf::parse(&read("/etc/resolv.conf"));
    let mut failed = false;
    for name in conf.candidates(host) {
        let mut found = Vec::new();
        for answer in ask_all(&conf, &name, until) {
            match answer {
                Answer::Addresses(addresses) => found.extend(addresses),
                Answer::Denied(reason) => {
                    let message = format!("the sandbox's resolver refuses '{host}': {reason}");
                    return Err(GuestError::new(ErrorCode::ConnectDenied, message));
                }
                Answer::Failed | Answer::Truncated => failed = true,
                Answer::NoSuchName => {}
            }
        }
        if !found.is_empty() {
            found.truncate(files::ADDRESSES_MAX);
            return Ok(found);
        }
    }
    let why = if failed { "no name server answers for it" } else { "the name does not exist" };
    Err(GuestError::new(ErrorCode::ConnectFailed, format!("cannot resolve '{host}' inside the sandbox: {why}")))
}

/// Asks for both kinds of addresses, one server after the other until one answers.
fn ask_all(conf: &ResolvConf, name: &str, until: Instant) -> [Answer; 2] {
    [message::TYPE_A, message::TYPE_AAAA].map(|kind| {
        for _ in 0..conf.attempts {
            for server in &conf.servers {
                let limit = conf.timeout.min(until.saturating_duration_since(Instant::now()));
                if limit.is_zero() {
                    return Answer::Failed;
                }
                match ask(SocketAddr::new(*server, DNS_PORT), name, kind, limit) {
                    Ok(Answer::Failed) | Err(_) => {}
                    Ok(answer) => return answer,
                }
            }
        }
        Answer::Failed
    })
}

fn ask(server: SocketAddr, name: &str, kind: u16, limit: Duration) -> io::Result<Answer> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let Some(question) = message::question(u16::from_ne_bytes(id), name, kind) else {
        return Ok(Answer::NoSuchName);
    };
    let until = Instant::now() + limit;
    let own: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(own)?;
    socket.connect(server)?;
    socket.send(&question)?;
    let mut buffer = vec![0; usize::from(message::UDP_LEN_MAX)];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let len = socket.recv(&mut buffer)?;
        match message::answer(&question, &buffer[..len]) {
            Some(Answer::Truncated) => return ask_by_tcp(server, &question, left),
            Some(answer) => return Ok(answer),
            None => {}
        }
    }
}

fn ask_by_tcp(server: SocketAddr, question: &[u8], limit: Duration) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let len = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), question].concat())?;
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut bytes)?;
    // Truncated over TCP too is no answer.
    Ok(message::answer(question, &bytes).filter(|answer| *answer != Answer::Truncated).unwrap_or(Answer::Failed))
}
