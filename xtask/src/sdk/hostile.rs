//! A sandbox that lies about its files: everything goes to the real service and back, but a copy out of a sandbox gets a tar stream made
//! here. So each SDK's unpacking meets, through its public face, what no copy may do. Called by `suite` for its places `hostile:…`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::json;
use tar::{EntryType, Header};

/// First byte of a binary message that is standard output.
const STDOUT: u8 = 1;

/// What is sent in place of the sandbox's own stream.
#[derive(Clone)]
pub(super) struct Lie {
    stream: Vec<u8>,
    /// Whether the end of the stream is told, or the connection just ends.
    is_ended: bool,
}

impl Lie {
    /// The lie of this name, for a copy to `root` that must not reach `outside`.
    pub(super) fn of(name: &str, root: &str, outside: &Path) -> Result<Self> {
        let outside = outside.to_string_lossy();
        let mut stream = Vec::new();
        let mut is_ended = true;
        entry(&mut stream, EntryType::Directory, root, "", b"")?;
        match name {
            "beside" => entry(&mut stream, EntryType::Regular, &format!("{root}/../evil"), "", b"evil")?,
            "absolute" => entry(&mut stream, EntryType::Regular, &format!("{outside}/evil"), "", b"evil")?,
            "another" => entry(&mut stream, EntryType::Regular, "evil", "", b"evil")?,
            "through-a-link" => {
                entry(&mut stream, EntryType::Symlink, &format!("{root}/link"), &outside, b"")?;
                entry(&mut stream, EntryType::Regular, &format!("{root}/link/evil"), "", b"evil")?;
            }
            "hard-link" => entry(&mut stream, EntryType::Link, &format!("{root}/evil"), "/etc/passwd", b"")?,
            "no-tar" => stream = vec![b'x'; 2048],
            "cut" => {
                entry(&mut stream, EntryType::Regular, &format!("{root}/file"), "", &[b'x'; 4096])?;
                stream.truncate(3 * 512);
                is_ended = false;
            }
            other => bail!("there is no lie {other}"),
        }
        stream.extend_from_slice(&[0; 1024]);
        if !is_ended {
            stream.truncate(3 * 512);
        }
        Ok(Self { stream, is_ended })
    }
}

/// An entry whose name may be anything.
fn entry(stream: &mut Vec<u8>, kind: EntryType, path: &str, link: &str, content: &[u8]) -> Result<()> {
    let mut header = Header::new_ustar();
    let fields = header.as_old_mut();
    if path.len() > fields.name.len() || link.len() > fields.linkname.len() {
        bail!("'{path}' or '{link}' is too long for a header");
    }
    fields.name[..path.len()].copy_from_slice(path.as_bytes());
    fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
    header.set_size(content.len() as u64);
    header.set_mtime(1);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    stream.extend_from_slice(header.as_bytes());
    stream.extend_from_slice(content);
    stream.resize(stream.len().next_multiple_of(512), 0);
    Ok(())
}

/// The protocol by which the Rust client asks for the agent's own stream (`msb_protocol::control`).
const STREAM_UPGRADE: &str = "msb-stream";

/// Stands between clients and the service until the process ends.
pub(super) fn stand_between(listener: UnixListener, service: PathBuf, lie: Lie) {
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (service, lie) = (service.clone(), lie.clone());
            // A connection that breaks is the client's to tell.
            std::thread::spawn(move || pass(client, &service, &lie));
        }
    });
}

fn pass(mut client: UnixStream, service: &Path, lie: &Lie) -> std::io::Result<()> {
    let mut service = UnixStream::connect(service)?;
    let request = head(&mut client)?;
    let text = String::from_utf8_lossy(&request);
    let is_archive = text.lines().next().is_some_and(|first| first.contains("/archive"));
    if is_archive && text.contains(STREAM_UPGRADE) {
        // It lies in WebSocket frames: as a service that hands no stream over.
        return client.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
    }
    service.write_all(&request)?;
    if !is_archive {
        let (mut from, mut to) = (client.try_clone()?, service.try_clone()?);
        let there = std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            to.shutdown(Shutdown::Write)
        });
        std::io::copy(&mut service, &mut client)?;
        let _ = client.shutdown(Shutdown::Both);
        let _ = there.join();
        return Ok(());
    }
    let answer = head(&mut service)?;
    client.write_all(&answer)?;
    client.write_all(&frame(0x82, &[&[STDOUT], lie.stream.as_slice()].concat()))?;
    if lie.is_ended {
        let end = json!({ "code": 0, "core_dumped": false, "oom_killed": false, "timed_out": false });
        client.write_all(&frame(0x81, json!({ "type": "exited", "end": end }).to_string().as_bytes()))?;
        // Until the client has read it and hangs up.
        std::io::copy(&mut client, &mut std::io::sink())?;
    }
    client.shutdown(Shutdown::Both)
}

/// Everything to the end of a head.
fn head(stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(head)
}

/// A WebSocket frame of a server (RFC 6455, section 5.2).
fn frame(first: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match u16::try_from(data.len()) {
        Ok(len) if len < 126 => frame.push(len.to_le_bytes()[0]),
        Ok(len) => {
            frame.push(126);
            frame.extend_from_slice(&len.to_be_bytes());
        }
        Err(_) => {
            frame.push(127);
            frame.extend_from_slice(&(data.len() as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(data);
    frame
}
