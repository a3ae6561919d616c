//! Bytes over bare vsock, for the benchmark's table: what streams cost before the product puts anything on them.
//!
//! `vsock serve out|in PORT STREAMS MIB` in the guest takes so many connections; `vsock connect out|in SOCKET PORT STREAMS MIB` on the
//! host makes them through a sandbox's vsock socket, as soon as the guest listens. Together they carry that much out of the guest or
//! into it, in pieces of 64 KiB, and the host prints how many microseconds that took. Used by `cargo xtask bench --exact`; not installed.
#![expect(clippy::print_stdout, reason = "a program for the command line")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};

/// Bytes of one write.
const PIECE_LEN: usize = 64 << 10;
/// A guest that does not listen after so long never will.
const LISTEN_MAX: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", way, port, streams, mib] => serve(way == &"out", port.parse()?, streams.parse()?, mib.parse()?),
        ["connect", way, socket, port, streams, mib] => {
            connect(way == &"out", socket, port.parse()?, streams.parse()?, mib.parse()?)
        }
        _ => bail!("vsock serve out|in PORT STREAMS MIB, or vsock connect out|in SOCKET PORT STREAMS MIB"),
    }
}

fn serve(out: bool, port: u32, streams: usize, mib: usize) -> anyhow::Result<()> {
    let listener: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(i32::try_from(streams)?)?)?;
    together(streams, || Ok(File::from(rustix::net::accept(&listener)?)), |stream| carry(stream, out, mib, streams))
}

fn connect(out: bool, socket: &str, port: u32, streams: usize, mib: usize) -> anyhow::Result<()> {
    let until = Instant::now() + LISTEN_MAX;
    let mut connected = Vec::new();
    while connected.len() < streams {
        match reach(socket, port) {
            Ok(stream) => connected.push(stream),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    let began = Instant::now();
    let mut connected = connected.into_iter();
    together(streams, || connected.next().context("one for each"), |stream| carry(stream, !out, mib, streams))?;
    println!("{}", began.elapsed().as_micros());
    Ok(())
}

/// One connection by the words of a sandbox's vsock socket.
fn reach(socket: &str, port: u32) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.to_owned())?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "nobody listens there");
        answer.push(byte[0]);
    }
    Ok(stream)
}

/// Takes so many streams and gives each a thread.
fn together<S: Send>(
    streams: usize,
    mut take: impl FnMut() -> anyhow::Result<S>,
    work: impl Fn(S) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..streams {
            let (stream, work) = (take()?, &work);
            threads.push(scope.spawn(move || work(stream)));
        }
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })
}

/// One stream's share: written and its end awaited, or read to the last byte and said so with one of ours.
fn carry(mut stream: impl Read + Write, write: bool, mib: usize, streams: usize) -> anyhow::Result<()> {
    let (mut left, mut piece) = ((mib << 20) / streams, vec![7u8; PIECE_LEN]);
    while left > 0 {
        left -= if write {
            stream.write_all(&piece)?;
            PIECE_LEN
        } else {
            let count = stream.read(&mut piece)?;
            ensure!(count > 0, "the stream ended {left} bytes early");
            count
        };
    }
    if write {
        stream.read_exact(&mut [0])?
    } else {
        stream.write_all(&[0])?
    }
    Ok(())
}
