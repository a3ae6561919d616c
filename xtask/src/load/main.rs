//! `xtask-load`: the work that the benchmarks of disks and network do inside a guest, the same file on both sides of
//! each pair.
//!
//! Compiled by `cargo xtask bench` for itself alone, statically and without any library, so that it runs in every
//! Linux. It prints numbers on one line; whoever asked knows which. Times come from the guest's monotonic clock.
//!
//! ```text
//!  xtask-load disk PATH MIB read|write|sync random|sequential BLOCK COUNT
//!      nanoseconds for COUNT blocks past the page cache
//!  xtask-load time PROGRAM WORD…
//!      nanoseconds for a program that must succeed
//!  xtask-load connect ADDRESS SECONDS THREADS
//!      connections made, each with a byte both ways; nanoseconds
//!  xtask-load echo ADDRESS CONNECTIONS SECONDS
//!      connections lost, longest wait in milliseconds, round trips
//!  xtask-load hold ADDRESS CONNECTIONS BYTES
//!      connections that stand with so many bytes sent; then it waits
//!  xtask-load take ADDRESS MIB, xtask-load give ADDRESS MIB
//!      nanoseconds from the connection to the last byte, at the end that listens and at the other
//! ```
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool; it talks on its streams")]

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

type Outcome = Result<String, Box<dyn Error>>;

/// open(2): past the page cache, on x86.
const O_DIRECT: i32 = 0o40_000;
/// What O_DIRECT wants addresses and lengths to be multiples of.
const ALIGNMENT: usize = 4096;
/// Bytes of a message of `echo`.
const MESSAGE_BYTES: usize = 1024;
/// A connection that is silent for so long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Connections that one thread of `echo` has: it sends on all of them, then waits for all of them.
const ECHO_SHARE: usize = 64;
/// Bytes of a read and a write of `take` and `give`.
const BULK_BYTES: usize = 64 << 10;
/// How long `give` waits for somebody who listens.
const LISTENER_WAIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["disk", path, mib, access, order, block, count] => disk(path, mib, access, order, block, count),
        ["time", program, words @ ..] => time(program, words),
        ["connect", address, seconds, threads] => connect(address, seconds, threads),
        ["echo", address, connections, seconds] => echo(address, connections, seconds),
        ["hold", address, connections, bytes] => hold(address, connections, bytes),
        ["take", address, mib] => take(address, mib),
        ["give", address, mib] => give(address, mib),
        _ => Err("see the head of xtask/src/load/main.rs".into()),
    };
    match outcome {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("xtask-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A file of this size whose blocks are all allocated and on the disk.
fn whole_file(path: &str, bytes: u64) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let mut at = file.metadata()?.len();
    let piece: Vec<u8> = (0..1 << 20).map(|index: u32| index.wrapping_mul(31).to_le_bytes()[1] | 1).collect();
    while at < bytes {
        file.write_all_at(&piece, at)?;
        at += piece.len() as u64;
    }
    file.sync_all()?;
    OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path)
}

fn disk(path: &str, mib: &str, access: &str, order: &str, block: &str, count: &str) -> Outcome {
    let bytes = mib.parse::<u64>()? << 20;
    let (block, count) = (block.parse::<usize>()?, count.parse::<u64>()?);
    let file = whole_file(path, bytes)?;
    let mut space = vec![7; block + ALIGNMENT];
    let skip = space.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut space[skip..skip + block];
    let blocks = bytes / block as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let began = Instant::now();
    for number in 0..count {
        // xorshift: the same places in every run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let place = if order == "random" { state % blocks } else { number % blocks } * block as u64;
        match access {
            "read" => file.read_exact_at(buffer, place)?,
            "write" => file.write_all_at(buffer, place)?,
            "sync" => {
                file.write_all_at(buffer, place)?;
                file.sync_all()?;
            }
            _ => return Err("read, write or sync".into()),
        }
    }
    Ok(began.elapsed().as_nanos().to_string())
}

fn time(program: &str, words: &[&str]) -> Outcome {
    let began = Instant::now();
    let status = Command::new(program).args(words).stdout(Stdio::null()).status()?;
    let took = began.elapsed();
    if status.success() { Ok(took.as_nanos().to_string()) } else { Err(format!("{program}: {status}").into()) }
}

fn connect(address: &str, seconds: &str, threads: &str) -> Outcome {
    let address: SocketAddr = address.parse()?;
    let until = Duration::from_secs(seconds.parse()?);
    let began = Instant::now();
    let one = move || -> std::io::Result<u64> {
        let mut made = 0;
        while began.elapsed() < until {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            made += 1;
        }
        Ok(made)
    };
    let threads: Vec<_> = (0..threads.parse::<usize>()?).map(|_| std::thread::spawn(one)).collect();
    let mut made = 0;
    for thread in threads {
        made += thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(format!("{made} {}", began.elapsed().as_nanos()))
}

fn echo(address: &str, connections: &str, seconds: &str) -> Outcome {
    let address: SocketAddr = address.parse()?;
    let lasts = Duration::from_secs(seconds.parse()?);
    let mut streams = Vec::new();
    for _ in 0..connections.parse::<usize>()? {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        streams.push(stream);
    }
    let (longest_ms, trips) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    // Few threads, each with many connections: with one for each, the longest wait is that for the guest's processor.
    let one = |mut streams: Vec<TcpStream>| {
        let mut message = [0; MESSAGE_BYTES];
        let mut lost = 0;
        while began.elapsed() < lasts && !streams.is_empty() {
            let sent = Instant::now();
            let before = streams.len();
            streams.retain_mut(|stream| stream.write_all(&message).is_ok());
            streams.retain_mut(|stream| {
                let arrived = stream.read_exact(&mut message).is_ok();
                let waited_ms = u64::try_from(sent.elapsed().as_millis()).unwrap_or(u64::MAX);
                longest_ms.fetch_max(waited_ms, Ordering::Relaxed);
                trips.fetch_add(u64::from(arrived), Ordering::Relaxed);
                arrived
            });
            lost += before - streams.len();
        }
        lost
    };
    let lost: usize = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        while !streams.is_empty() {
            let share = streams.split_off(streams.len().saturating_sub(ECHO_SHARE));
            threads.push(scope.spawn(|| one(share)));
        }
        // A thread that panicked has lost all of its connections.
        threads.into_iter().map(|thread| thread.join().unwrap_or(ECHO_SHARE)).sum()
    });
    Ok(format!("{lost} {} {}", longest_ms.into_inner(), trips.into_inner()))
}

fn hold(address: &str, connections: &str, bytes: &str) -> Outcome {
    let address: SocketAddr = address.parse()?;
    let message = vec![1; bytes.parse()?];
    let mut streams = Vec::new();
    for _ in 0..connections.parse::<usize>()? {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nonblocking(true)?;
        // As much as there is room for: whoever is at the other end does not read.
        let mut sent = 0;
        while let Ok(count) = stream.write(&message[sent..]) {
            sent += count;
            if count == 0 {
                break;
            }
        }
        streams.push(stream);
    }
    println!("{}", streams.len());
    std::io::stdout().flush()?;
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn take(address: &str, mib: &str) -> Outcome {
    let bytes = mib.parse::<u64>()? << 20;
    let (mut stream, _) = TcpListener::bind(address)?.accept()?;
    let began = Instant::now();
    let mut buffer = vec![0; BULK_BYTES];
    let mut taken = 0;
    while taken < bytes {
        match stream.read(&mut buffer)? {
            0 => return Err(format!("{taken} bytes came").into()),
            count => taken += count as u64,
        }
    }
    Ok(began.elapsed().as_nanos().to_string())
}

fn give(address: &str, mib: &str) -> Outcome {
    let pieces = (mib.parse::<usize>()? << 20) / BULK_BYTES;
    let waited = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) if waited.elapsed() > LISTENER_WAIT => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let began = Instant::now();
    let buffer = vec![7; BULK_BYTES];
    for _ in 0..pieces {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other end closes when it has everything.
    while stream.read(&mut [0])? > 0 {}
    Ok(began.elapsed().as_nanos().to_string())
}
