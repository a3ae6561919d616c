//! Bytes over bare vsock, for the benchmark's table: what a stream costs before the product puts anything on it.
//!
//! `vsock send PORT MIB` in the guest waits for one connection and writes that much in pieces of 64 KiB; `vsock receive SOCKET PORT MIB`
//! on the host connects through a sandbox's vsock socket, reads it all and prints how long that took. Used by `cargo xtask bench --exact`;
//! not installed.
#![expect(clippy::print_stdout, reason = "a program for the command line")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};

/// Bytes of one write.
const PIECE_LEN: usize = 64 << 10;

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["send", port, mib] => send(port.parse()?, mib.parse()?),
        ["receive", socket, port, mib] => receive(socket, port.parse()?, mib.parse()?),
        _ => bail!("vsock send PORT MIB, or vsock receive SOCKET PORT MIB"),
    }
}

fn send(port: u32, mib: usize) -> anyhow::Result<()> {
    let listener: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(1)?)?;
    let mut stream = File::from(rustix::net::accept(&listener)?);
    let piece = vec![7u8; PIECE_LEN];
    for _ in 0..(mib << 20) / PIECE_LEN {
        stream.write_all(&piece)?;
    }
    Ok(())
}

fn receive(socket: &str, port: u32, mib: usize) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.to_owned())?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "nobody listens there");
        answer.push(byte[0]);
    }
    let began = Instant::now();
    let (mut left, mut piece) = (mib << 20, vec![0u8; PIECE_LEN]);
    while left > 0 {
        let count = stream.read(&mut piece)?;
        ensure!(count > 0, "the stream ended {left} bytes early");
        left -= count;
    }
    println!("FIGURE vsock_out {}", began.elapsed().as_micros());
    Ok(())
}
