//! The samples of one VM, over a connection of their own: nobody waits for them, so they do not wake the service ([`super::unhurried`]).
//!
//! Run by the driver of a VM as a task of its own, beside `vm::agent`. What arrives is the VM process's: bounded by the frame codec,
//! parsed to types, an error ends the connection and another one is made.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use msb_protocol::frame::{Decoder, decode_json, encode_json};
use msb_protocol::id::BootId;
use msb_protocol::vmm::{CONTROL_SOCKET, Event, Message, Request, RequestFrame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::unhurried::Unhurried;
use super::{EventSink, VmEvent};

/// Wait before the connection is made again.
const REOPEN_AFTER: Duration = Duration::from_secs(2);
/// Bytes of one read: several samples.
const READ_LEN: usize = 4 << 10;

/// Hands samples on until the VM's events have no receiver any more.
pub(super) async fn run(run_dir: PathBuf, boot_id: BootId, interval_ms: u64, events: EventSink) {
    if interval_ms == 0 {
        return;
    }
    loop {
        let reading = read(&run_dir, boot_id, interval_ms, &events);
        tokio::select! {
            ended = reading => if let Err(error) = ended {
                tracing::debug!(%boot_id, %error, "no samples come from the VM process");
            },
            () = events.closed() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(REOPEN_AFTER) => {}
            () = events.closed() => return,
        }
    }
}

async fn read(run_dir: &Path, boot_id: BootId, sample_interval_ms: u64, events: &EventSink) -> io::Result<()> {
    let mut stream = UnixStream::connect(run_dir.join(CONTROL_SOCKET)).await?;
    let mut wire = Vec::new();
    encode_json(&RequestFrame { id: 1, request: Request::Subscribe { sample_interval_ms } }, &mut wire)
        .map_err(io::Error::other)?;
    stream.write_all(&wire).await?;
    let mut samples =
        Samples { boot_id, events, decoder: Decoder::new(), buffer: Vec::with_capacity(READ_LEN), taken: 0 };
    // The first comes at once: whoever asks for metrics right after a create has some.
    while samples.taken == 0 {
        if !samples.take(&mut stream).await? {
            return Ok(());
        }
    }
    let mut stream = Unhurried::new(stream, Duration::from_millis(sample_interval_ms))?;
    while samples.take(&mut stream).await? {}
    Ok(())
}

/// What is read and handed on.
struct Samples<'a> {
    boot_id: BootId,
    events: &'a EventSink,
    decoder: Decoder,
    buffer: Vec<u8>,
    taken: u64,
}

impl Samples<'_> {
    /// Hands on what one read brings; false when nothing more will come, or nobody takes it.
    async fn take(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
        self.buffer.clear();
        if stream.read_buf(&mut self.buffer).await? == 0 {
            return Ok(false);
        }
        self.decoder.push(&self.buffer);
        while let Some(body) = self.decoder.next_body().map_err(io::Error::other)? {
            match decode_json::<Message>(body).map_err(io::Error::other)? {
                Message::Event { event: Event::Sampled { boot_id, sample } } if boot_id == self.boot_id => {
                    self.taken += 1;
                    if self.events.send(VmEvent::Sampled(sample)).await.is_err() {
                        return Ok(false);
                    }
                }
                // Taken, or of another run.
                Message::Reply { .. } | Message::Event { .. } => {}
            }
        }
        Ok(true)
    }
}
