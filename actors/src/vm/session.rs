//! One stream to the agent: frames in, frames out, opened with the run it means. Runs beside the actors, never through them.
//!
//! Called by the control link (`vm::agent`) and by the daemon's API for exec, main and attach. What arrives is the guest's and
//! hostile: bounded by the frame codec, parsed to types, an error ends the stream.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::{Decoder, FrameError};
use msb_protocol::guest::{Assembler, GuestBody, HostBody, Open, OpenKind, Opened, encode_host};
use msb_protocol::id::BootId;
use msb_protocol::version::{GUEST_GENERATION, GUEST_GENERATION_MIN, negotiate};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};

use super::{AgentIo, Launcher};

/// Time for the agent to answer an `Open`.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes of one read at most.
const READ_LEN: usize = 64 << 10;
/// Bytes of the first read: most streams bring a few words and no more.
const READ_LEN_FIRST: usize = 4 << 10;

/// Why a stream to the agent ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The VM or its vsock device is gone.
    #[error("the stream to the sandbox broke: {0}")]
    Io(#[from] io::Error),
    /// The guest said something that is no message.
    #[error("the sandbox's agent broke the protocol: {0}")]
    Frame(#[from] FrameError),
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        Self::new(ErrorCode::ExecLost, error.to_string())
    }
}

/// The receiving half.
pub struct SessionReader {
    io: ReadHalf<Box<dyn AgentIo>>,
    read_len: usize,
    decoder: Decoder,
    assembler: Assembler,
}

/// The sending half.
pub struct SessionWriter {
    io: WriteHalf<Box<dyn AgentIo>>,
    buffer: Vec<u8>,
}

/// An open stream.
pub struct Session {
    /// What the agent said about itself.
    pub opened: Opened,
    /// The receiving half.
    pub reader: SessionReader,
    /// The sending half.
    pub writer: SessionWriter,
}

/// Opens a stream of one kind to the agent of one run.
///
/// # Errors
/// What the agent refused with, `agent_timeout`, `exec_lost` if the VM went away, or `unsupported_operation`.
pub async fn open(
    launcher: &dyn Launcher,
    run_dir: &Path,
    boot_id: BootId,
    kind: OpenKind,
) -> Result<Session, ApiError> {
    let opening = async {
        let io = launcher.connect(run_dir).await.map_err(SessionError::from)?;
        let (read, write) = tokio::io::split(io);
        let mut writer = SessionWriter { io: write, buffer: Vec::new() };
        let mut reader =
            SessionReader { io: read, read_len: READ_LEN_FIRST, decoder: Decoder::new(), assembler: Assembler::new() };
        let open = Open { generation: GUEST_GENERATION, boot_id: boot_id.0.as_bytes().to_vec(), kind: Some(kind) };
        writer.send(HostBody::Open(open)).await?;
        match reader.next().await? {
            Some(GuestBody::Opened(opened)) => {
                negotiate(GUEST_GENERATION, GUEST_GENERATION_MIN, opened.generation)?;
                Ok(Session { opened, reader, writer })
            }
            Some(GuestBody::Refused(failure)) => Err(ApiError::from(failure)),
            Some(_) => Err(SessionError::Frame(FrameError::Malformed).into()),
            None => Err(SessionError::Io(io::ErrorKind::UnexpectedEof.into()).into()),
        }
    };
    match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        Ok(outcome) => outcome,
        Err(_) => Err(ApiError::new(ErrorCode::AgentTimeout, "the sandbox's agent did not answer")),
    }
}

impl Session {
    /// The same stream, on which something comes at this interval and nobody waits for it ([`super::unhurried`]).
    ///
    /// # Errors
    /// What the reactor says; the stream is lost then.
    pub fn unhurried(self, interval: Duration) -> io::Result<Self> {
        let (mut reader, mut writer) = (self.reader, self.writer);
        (reader.io, writer.io) = tokio::io::split(reader.io.unsplit(writer.io).unhurried(interval)?);
        Ok(Self { opened: self.opened, reader, writer })
    }

    /// The stream itself, for a process that speaks with the agent in our place, and what was read of it already.
    ///
    /// # Errors
    /// `unsupported_operation` for a stream that is no socket; what the system says.
    pub fn hand_over(self) -> Result<(OwnedFd, Vec<u8>), ApiError> {
        let io = self.reader.io.unsplit(self.writer.io);
        let socket = io.socket().ok_or_else(|| {
            ApiError::new(ErrorCode::UnsupportedOperation, "this stream to the agent cannot be handed over")
        })?;
        let socket = socket.try_clone_to_owned().map_err(|error| ApiError::from(SessionError::Io(error)))?;
        Ok((socket, self.reader.decoder.into_rest()))
    }

    /// The stream without frames, for kinds that carry bare bytes after the answer.
    #[must_use]
    pub fn into_bytes(self) -> GuestBytes {
        GuestBytes { early: self.reader.decoder.into_rest(), read: 0, io: self.reader.io.unsplit(self.writer.io) }
    }
}

/// Bare bytes to and from the guest; shutting down is the end of one half.
pub struct GuestBytes {
    /// What arrived together with the answer, and how much of it was read.
    early: Vec<u8>,
    read: usize,
    io: Box<dyn AgentIo>,
}

impl AsyncRead for GuestBytes {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let rest = &this.early[this.read..];
        if rest.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let len = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..len]);
        this.read += len;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GuestBytes {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl SessionReader {
    /// The next message; `None` when the guest closed the stream between two messages. Safe to cancel.
    ///
    /// # Errors
    /// [`SessionError`]; the stream cannot be used any further.
    pub async fn next(&mut self) -> Result<Option<GuestBody>, SessionError> {
        loop {
            if let Some(body) = self.decoder.next_body()? {
                match self.assembler.guest(body)? {
                    Some(message) => return Ok(Some(message)),
                    None => continue,
                }
            }
            // Where it is read to is where it is decoded from; a read that is given up has taken nothing.
            match self.io.read(self.decoder.room(self.read_len)).await? {
                0 => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
                len => {
                    self.decoder.took(len);
                    if len >= self.read_len {
                        self.read_len = (self.read_len * 2).min(READ_LEN);
                    }
                }
            }
        }
    }
}

impl SessionWriter {
    /// Sends one message; waits while the guest does not take it.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send(&mut self, body: HostBody) -> Result<(), SessionError> {
        self.buffer.clear();
        encode_host(body, &mut self.buffer)?;
        self.io.write_all(&self.buffer).await?;
        self.io.flush().await?;
        Ok(())
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn close(&mut self) -> Result<(), SessionError> {
        Ok(self.io.shutdown().await?)
    }
}
