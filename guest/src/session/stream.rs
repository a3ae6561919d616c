//! One framed stream to the host on a non-blocking descriptor, with a bounded outbox. Every stream of the agent is one of these;
//! on a test machine the descriptor is a socket pair. It never waits: its owner polls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use std::io::IoSlice;

use msb_protocol::frame::{DATA_LEN_MAX, Decoder, FrameError};
use msb_protocol::guest::{Assembler, GuestBody, HostBody, OutputStream, encode_guest};
use msb_protocol::piece::{self, HEAD_LEN_MAX, MAIN_OUTPUT_TAG, OUTPUT_TAG};
use rustix::io::Errno;

/// Bytes of the outbox above which an owner must stop producing output.
pub const OUTBOX_HIGH: usize = 128 << 10;
/// Bytes that one read takes at most.
const READ_LEN: usize = 64 << 10;
/// Bytes of output that make one frame: with its head it fits a packet of Linux's vsock (64 KiB), else a few bytes would go in one of their own.
pub const PIECE_LEN: usize = DATA_LEN_MAX - HEAD_LEN_MAX;
/// Bytes that the first read takes: most streams bring a few words and no more.
const READ_LEN_FIRST: usize = 4 << 10;

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
    read_len: usize,
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
        let (decoder, assembler) = (Decoder::new(), Assembler::new());
        Ok(Self { socket, decoder, assembler, read_len: READ_LEN_FIRST, outbox: Vec::new(), written: 0 })
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

    /// Reads once; afterwards [`Self::next_stdin`] and [`Self::next_message`] give what has arrived.
    ///
    /// # Errors
    /// [`StreamError::Closed`] at the end, [`StreamError::Socket`].
    pub fn receive(&mut self) -> Result<(), StreamError> {
        let room = self.decoder.room(self.read_len);
        let room_len = room.len().min(READ_LEN);
        match rustix::io::read(&self.socket, &mut room[..room_len]) {
            Ok(0) => Err(StreamError::Closed),
            Ok(len) => {
                self.decoder.took(len);
                if len == room_len {
                    self.read_len = (self.read_len * 2).min(READ_LEN);
                }
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The bytes of the next message that has arrived whole, if it is stdin: where they lie, without a copy.
    ///
    /// # Errors
    /// [`StreamError::Protocol`]: nothing after it can be understood.
    pub fn next_stdin(&mut self) -> Result<Option<&[u8]>, StreamError> {
        if !self.assembler.is_idle() {
            return Ok(None);
        }
        Ok(self.decoder.next_body_if(|body| piece::stdin_in(body).map(|range| &body[range]))?)
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

    /// Sends output of a process, at most [`DATA_LEN_MAX`] bytes; what the socket does not take is queued.
    pub fn send_output(&mut self, stream: OutputStream, data: &[u8]) {
        self.send_piece(OUTPUT_TAG, stream, data);
    }

    /// The same with output of the main workload for the log.
    pub fn send_main_output(&mut self, stream: OutputStream, data: &[u8]) {
        self.send_piece(MAIN_OUTPUT_TAG, stream, data);
    }

    fn send_piece(&mut self, tag: u32, stream: OutputStream, data: &[u8]) {
        let data = &data[..data.len().min(DATA_LEN_MAX)];
        let head = piece::output_head(tag, stream, data.len());
        let head = head.as_ref();
        let sent = if self.backlog() > 0 {
            0
        } else {
            // From where it lies. What failed fails again at the next flush, which tells it.
            rustix::io::writev(&self.socket, &[IoSlice::new(head), IoSlice::new(data)]).unwrap_or(0)
        };
        self.outbox.extend_from_slice(&head[sent.min(head.len())..]);
        self.outbox.extend_from_slice(&data[sent.saturating_sub(head.len())..]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use msb_protocol::frame;
    use msb_protocol::guest::HostMessage;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn output_arrives_whole_however_little_the_socket_takes(lens in prop::collection::vec(0usize..=DATA_LEN_MAX, 1..12)) {
            let (ours, host) = std::os::unix::net::UnixStream::pair().unwrap();
            host.set_nonblocking(true).unwrap();
            let mut stream = FrameStream::new(ours.into()).unwrap();
            let (mut decoder, mut assembler, mut seen, mut read) = (Decoder::new(), Assembler::new(), Vec::new(), vec![0; 50_000]);
            let mut hear = || {
                while let Ok(len) = rustix::io::read(&host, &mut read[..]) {
                    decoder.push(&read[..len]);
                    while let Some(body) = decoder.next_body().unwrap() {
                        match assembler.guest(body).unwrap() {
                            Some(GuestBody::Output(output)) => seen.push(output.data),
                            other => panic!("{other:?}"),
                        }
                    }
                }
            };
            let sent: Vec<Vec<u8>> = lens.iter().enumerate().map(|(at, len)| vec![u8::try_from(at).unwrap(); *len]).collect();
            for data in &sent {
                stream.send_output(OutputStream::Stdout, data);
            }
            while stream.backlog() > 0 {
                hear();
                stream.flush().unwrap();
            }
            hear();
            prop_assert_eq!(seen, sent);
        }

        #[test]
        fn any_bytes_from_the_host_are_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
            let (ours, host) = std::os::unix::net::UnixStream::pair().unwrap();
            let mut stream = FrameStream::new(ours.into()).unwrap();
            rustix::io::write(&host, &bytes).unwrap();
            stream.receive().unwrap();
            while let Ok(Some(_)) = stream.next_message() {}
        }
    }

    #[test]
    fn the_end_and_garbage_are_told_apart() {
        let (ours, host) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut stream = FrameStream::new(ours.into()).unwrap();
        stream.receive().unwrap();
        assert!(matches!(stream.next_message(), Ok(None)));
        let mut wire = Vec::new();
        let ping = HostBody::Ping(msb_protocol::guest::Ping { token: 9 });
        frame::encode_message(&HostMessage::from(ping.clone()), &mut wire).unwrap();
        wire.extend_from_slice(&[0xff; 8]);
        rustix::io::write(&host, &wire).unwrap();
        stream.receive().unwrap();
        assert_eq!(stream.next_message().unwrap(), Some(ping));
        assert!(matches!(stream.next_message(), Err(StreamError::Protocol(_))));
        drop(host);
        assert!(matches!(stream.receive(), Err(StreamError::Closed)));
    }
}
