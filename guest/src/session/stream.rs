//! One framed stream to the host on a non-blocking descriptor, with a bounded outbox. Every stream of the agent is one of these;
//! on a test machine the descriptor is a socket pair. It never waits: its owner polls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use msb_protocol::frame::{self, Decoder, FrameError};
use msb_protocol::guest::{Assembler, GuestBody, HostBody, OutputStream, encode_guest};
use rustix::io::Errno;

/// Bytes of the outbox above which an owner must stop producing output.
pub const OUTBOX_HIGH: usize = 128 << 10;
/// Bytes that one read takes.
pub const READ_LEN: usize = 64 << 10;

/// Why a stream is over.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer closed it.
    #[error("the host closed the stream")]
    Closed,
    /// The socket failed.
    #[error("the stream failed: {0}")]
    Socket(#[from] Errno),
    /// The peer sent what is no frame or no message.
    #[error("the host broke the protocol: {0}")]
    Protocol(#[from] FrameError),
}

/// A framed stream.
#[derive(Debug)]
pub struct FrameStream {
    socket: OwnedFd,
    decoder: Decoder,
    assembler: Assembler,
    outbox: Vec<u8>,
    written: usize,
}

impl FrameStream {
    /// Takes a connected socket and makes it non-blocking.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn new(socket: OwnedFd) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, decoder: Decoder::new(), assembler: Assembler::new(), outbox: Vec::new(), written: 0 })
    }

    /// The socket, to poll it.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Bytes that wait to be written.
    pub fn backlog(&self) -> usize {
        self.outbox.len() - self.written
    }

    /// Whether an owner may produce more output.
    pub fn has_room(&self) -> bool {
        self.backlog() < OUTBOX_HIGH
    }

    /// Reads once; afterwards [`Self::next_message`] gives what has arrived.
    ///
    /// # Errors
    /// [`StreamError::Closed`] at the end, [`StreamError::Socket`].
    pub fn receive(&mut self, scratch: &mut [u8]) -> Result<(), StreamError> {
        match rustix::io::read(&self.socket, &mut *scratch) {
            Ok(0) => Err(StreamError::Closed),
            Ok(len) => {
                self.decoder.push(&scratch[..len]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next message that has arrived whole.
    ///
    /// # Errors
    /// [`StreamError::Protocol`]: nothing after it can be understood.
    pub fn next_message(&mut self) -> Result<Option<HostBody>, StreamError> {
        while let Some(body) = self.decoder.next_body()? {
            if let Some(message) = self.assembler.host(body)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    /// Whether a whole frame has arrived and waits: no event will announce it again.
    pub fn holds_message(&self) -> bool {
        self.decoder.holds_body()
    }

    /// Queues a message. Owners keep the outbox small by [`Self::has_room`]; what is sent without asking is small and rare.
    pub fn send(&mut self, body: GuestBody) {
        // The agent makes no message near the limit, and a message that cannot be sent has no receiver to tell.
        let _ = encode_guest(body, &mut self.outbox);
    }

    /// Queues output of a process, at most [`frame::DATA_LEN_MAX`] bytes.
    pub fn send_output(&mut self, stream: OutputStream, data: &[u8]) {
        encode_output(OUTPUT_TAG, stream, data, &mut self.outbox);
    }

    /// Queues output of the main workload for the log, at most [`frame::DATA_LEN_MAX`] bytes.
    pub fn send_main_output(&mut self, stream: OutputStream, data: &[u8]) {
        encode_output(MAIN_OUTPUT_TAG, stream, data, &mut self.outbox);
    }

    /// Writes what the socket takes.
    ///
    /// # Errors
    /// [`StreamError::Socket`].
    pub fn flush(&mut self) -> Result<(), StreamError> {
        while self.written < self.outbox.len() {
            // A closed peer is EPIPE and no signal: the runtime ignores SIGPIPE.
            match rustix::io::write(&self.socket, &self.outbox[self.written..]) {
                Ok(len) => self.written += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        if self.written == self.outbox.len() {
            self.outbox.clear();
            self.written = 0;
        } else if self.written >= OUTBOX_HIGH {
            self.outbox.drain(..self.written);
            self.written = 0;
        }
        Ok(())
    }

    /// The socket and what was read beyond the last message, for a stream that carries no frames from here on. What waits in the
    /// outbox must have been flushed.
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, Vec<u8>) {
        (self.socket, self.decoder.into_rest())
    }

    /// Gives up what waits.
    pub fn discard(&mut self) {
        self.outbox = Vec::new();
        self.written = 0;
    }
}

/// Field number of `GuestBody::Output`.
pub const OUTPUT_TAG: u32 = 13;
/// Field number of `GuestBody::MainOutput`.
pub const MAIN_OUTPUT_TAG: u32 = 5;

/// Appends the frame of one piece of output: what `encode_guest` would write, with one copy of the data in place of three.
pub fn encode_output(tag: u32, stream: OutputStream, data: &[u8], out: &mut Vec<u8>) {
    use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
    let data = &data[..data.len().min(frame::DATA_LEN_MAX)];
    // Lengths are at most DATA_LEN_MAX and a few bytes, so the conversions below lose nothing.
    let stream_len = if stream == OutputStream::Stdout { 0 } else { 2 };
    let data_len = if data.is_empty() { 0 } else { key_len(2) + encoded_len_varint(data.len() as u64) + data.len() };
    let output_len = stream_len + data_len;
    let body_len = key_len(tag) + encoded_len_varint(output_len as u64) + output_len;
    out.reserve(frame::PREFIX_LEN + body_len);
    out.extend_from_slice(&u32::try_from(body_len).unwrap_or(u32::MAX).to_be_bytes());
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(output_len as u64, out);
    if stream != OutputStream::Stdout {
        encode_key(1, WireType::Varint, out);
        encode_varint(stream as u64, out);
    }
    if !data.is_empty() {
        encode_key(2, WireType::LengthDelimited, out);
        encode_varint(data.len() as u64, out);
        out.extend_from_slice(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use msb_protocol::guest::{HostMessage, Output};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn output_is_encoded_as_prost_does(len in prop_oneof![Just(0usize), 1usize..300, Just(frame::DATA_LEN_MAX)], error in any::<bool>()) {
            let stream = if error { OutputStream::Stderr } else { OutputStream::Stdout };
            let data = vec![0xa5; len];
            for (tag, body) in [
                (OUTPUT_TAG, GuestBody::Output(Output { stream: stream as i32, data: data.clone() })),
                (MAIN_OUTPUT_TAG, GuestBody::MainOutput(Output { stream: stream as i32, data: data.clone() })),
            ] {
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                encode_output(tag, stream, &data, &mut ours);
                encode_guest(body, &mut theirs).unwrap();
                prop_assert_eq!(ours, theirs);
            }
        }

        #[test]
        fn any_bytes_from_the_host_are_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
            let (ours, host) = std::os::unix::net::UnixStream::pair().unwrap();
            let mut stream = FrameStream::new(ours.into()).unwrap();
            rustix::io::write(&host, &bytes).unwrap();
            let mut scratch = vec![0; READ_LEN];
            stream.receive(&mut scratch).unwrap();
            while let Ok(Some(_)) = stream.next_message() {}
        }
    }

    #[test]
    fn the_end_and_garbage_are_told_apart() {
        let (ours, host) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut stream = FrameStream::new(ours.into()).unwrap();
        let mut scratch = vec![0; READ_LEN];
        stream.receive(&mut scratch).unwrap();
        assert!(matches!(stream.next_message(), Ok(None)));
        let mut wire = Vec::new();
        let ping = HostBody::Ping(msb_protocol::guest::Ping { token: 9 });
        frame::encode_message(&HostMessage::from(ping.clone()), &mut wire).unwrap();
        wire.extend_from_slice(&[0xff; 8]);
        rustix::io::write(&host, &wire).unwrap();
        stream.receive(&mut scratch).unwrap();
        assert_eq!(stream.next_message().unwrap(), Some(ping));
        assert!(matches!(stream.next_message(), Err(StreamError::Protocol(_))));
        drop(host);
        assert!(matches!(stream.receive(&mut scratch), Err(StreamError::Closed)));
    }
}
