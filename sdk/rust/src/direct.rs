//! A stream to a sandbox's agent that the service handed over: frames of the guest border, straight between this process and the VM.
//!
//! ```text
//!  service ── answer with a descriptor ──► open ──► DirectReader ◄── output, end ── agent
//!     └── the connection, kept: its end is the session's      DirectWriter ── stdin, signals ──► agent
//! ```
//!
//! Used by [`crate::session`] in place of a WebSocket where the service can do it (`msb_protocol::control`, [`STREAM_UPGRADE`]). What the
//! agent says is a guest's: bounded by the frame codec, parsed to types, an error ends the session. Output is not copied here.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use msb_protocol::control::{ClientMessage, STREAM_UPGRADE, StreamAnswer};
use msb_protocol::frame::{self, Decoder, FRAME_LEN_MAX, PREFIX_LEN, SPEC_LEN_MAX};
use msb_protocol::guest::{self, Assembler, GuestBody, HostBody, OutputStream, StdinEof, encode_host};
use msb_protocol::piece;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::connection::{self, Connection};
use crate::error::Error;

/// Bytes of one read of the agent's stream.
const READ_LEN: usize = 256 << 10;
/// Bytes of one read of the service's answer.
const ANSWER_READ_LEN: usize = 4 << 10;

/// What came from the agent.
pub(crate) enum Incoming {
    /// Output, as it lay in the frame.
    Output(OutputStream, Bytes),
    /// Anything else.
    Message(GuestBody),
}

/// The receiving half, and the connection on which the service gave it.
pub(crate) struct DirectReader {
    stream: Arc<UnixStream>,
    service: UnixStream,
    buffer: BytesMut,
    assembler: Assembler,
}

/// The sending half.
pub(crate) struct DirectWriter {
    stream: Arc<UnixStream>,
}

/// Asks for a stream with `first`. None if the service hands none over: an older one, or one that cannot now.
///
/// # Errors
/// What the service refused the session itself with.
pub(crate) async fn open(
    connection: Connection,
    path: &str,
    first: &ClientMessage,
) -> Result<Option<(DirectReader, DirectWriter)>, Error> {
    let Ok((mut service, early)) = connection::upgrade_bytes(connection, path, STREAM_UPGRADE).await else {
        return Ok(None);
    };
    let mut request = Vec::new();
    frame::encode_json_spec(first, &mut request).map_err(Error::protocol)?;
    let lost = |error: std::io::Error| Error::unavailable(format!("the connection to msbd was lost: {error}"));
    service.write_all(&request).await.map_err(lost)?;
    let mut decoder = Decoder::with_limit(SPEC_LEN_MAX);
    decoder.push(&early);
    let mut stream = None;
    let mut answered = false;
    let buffer = loop {
        if let Some(body) = decoder.next_body().map_err(Error::protocol)? {
            if answered {
                break BytesMut::from(body);
            }
            match serde_json::from_slice(body).map_err(Error::protocol)? {
                StreamAnswer::Opened => answered = true,
                StreamAnswer::Refused { error } => return Err(Error::Api(error)),
            }
            continue;
        }
        let (read, descriptor) = receive(&service, decoder.room(ANSWER_READ_LEN)).await.map_err(lost)?;
        decoder.took(read);
        stream = stream.or(descriptor);
    };
    let stream = stream.ok_or_else(|| Error::protocol("it hands a stream over without its descriptor"))?;
    let stream = std::os::unix::net::UnixStream::from(stream);
    let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream)).map_err(lost)?;
    let stream = Arc::new(stream);
    let reader = DirectReader { stream: Arc::clone(&stream), service, buffer, assembler: Assembler::new() };
    Ok(Some((reader, DirectWriter { stream })))
}

/// Reads once, at least a byte, and takes a descriptor that comes along.
async fn receive(service: &UnixStream, room: &mut [u8]) -> std::io::Result<(usize, Option<OwnedFd>)> {
    let received = service.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = rustix::net::recvmsg(service, &mut [IoSliceMut::new(room)], &mut control, flags)?;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok((received.bytes, descriptor))
    });
    match received.await? {
        (0, _) => Err(ErrorKind::UnexpectedEof.into()),
        received => Ok(received),
    }
}

impl DirectReader {
    /// What comes next. Dropping the future loses nothing.
    ///
    /// # Errors
    /// In words, why nothing more can come.
    pub(crate) async fn next(&mut self) -> Result<Incoming, String> {
        loop {
            while let Some(body) = self.take_body()? {
                if self.assembler.is_idle()
                    && let Some((stream, range)) = piece::output_in(&body)
                {
                    return Ok(Incoming::Output(stream, body.slice(range)));
                }
                if let Some(message) = self.assembler.guest(&body).map_err(|error| error.to_string())? {
                    return Ok(Incoming::Message(message));
                }
            }
            self.buffer.reserve(READ_LEN);
            tokio::select! {
                biased;
                ready = self.stream.readable() => {
                    ready.map_err(|error| error.to_string())?;
                    match self.stream.try_read_buf(&mut self.buffer) {
                        Ok(0) => return Err("the sandbox closed the stream before the command ended".into()),
                        Ok(_) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error.to_string()),
                    }
                }
                // Nothing is ever said there.
                _ = self.service.read_u8() => return Err("the service closed it".into()),
            }
        }
    }

    fn take_body(&mut self) -> Result<Option<Bytes>, String> {
        let Some(prefix) = self.buffer.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let len = frame::body_len(*prefix).map_err(|error| error.to_string())?;
        debug_assert!(len <= FRAME_LEN_MAX);
        if self.buffer.len() < PREFIX_LEN + len {
            return Ok(None);
        }
        self.buffer.advance(PREFIX_LEN);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }
}

impl DirectWriter {
    /// Sends what a client says on a stream.
    ///
    /// # Errors
    /// The stream is gone, or the message is none that follows the first.
    pub(crate) async fn send(&mut self, message: &ClientMessage) -> std::io::Result<()> {
        let body = match message {
            ClientMessage::Signal { number } => HostBody::Signal(guest::Signal { number: *number }),
            ClientMessage::Resize { size } => {
                HostBody::Resize(guest::TerminalSize { rows: size.rows.into(), columns: size.columns.into() })
            }
            ClientMessage::StdinEof => HostBody::StdinEof(StdinEof {}),
            ClientMessage::Exec { .. } | ClientMessage::Archive { .. } | ClientMessage::Attach { .. } => {
                return Err(ErrorKind::InvalidInput.into());
            }
        };
        let mut frames = Vec::new();
        encode_host(body, &mut frames).map_err(std::io::Error::other)?;
        self.write(&frames, &[]).await
    }

    /// Sends stdin, at most [`frame::DATA_LEN_MAX`] bytes.
    ///
    /// # Errors
    /// The stream is gone.
    pub(crate) async fn stdin(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.write(piece::stdin_head(data.len()).as_ref(), data).await
    }

    async fn write(&mut self, mut first: &[u8], mut second: &[u8]) -> std::io::Result<()> {
        while !first.is_empty() || !second.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(count) => {
                    let of_first = count.min(first.len());
                    first = &first[of_first..];
                    second = &second[count - of_first..];
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
