//! A channel between the stream and the thread that reads or writes files, with the blocking faces of `std::io`. Used by `copy`.

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc::{Receiver, Sender};

/// What goes through.
pub(super) enum Piece {
    /// Bytes.
    Data(Bytes),
    /// The stream ended whole; a channel that closes without it broke off.
    End,
}

/// The reading face.
pub(super) struct ChannelReader {
    pieces: Receiver<Piece>,
    now: Bytes,
    over: bool,
}

impl ChannelReader {
    pub(super) fn new(pieces: Receiver<Piece>) -> Self {
        Self { pieces, now: Bytes::new(), over: false }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            if self.over {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.now = data,
                Some(Piece::End) => self.over = true,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let len = self.now.len().min(buffer.len());
        self.now.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// The writing face.
pub(super) struct ChannelWriter<'a> {
    pieces: &'a Sender<Piece>,
}

impl<'a> ChannelWriter<'a> {
    pub(super) fn new(pieces: &'a Sender<Piece>) -> Self {
        Self { pieces }
    }
}

impl Write for ChannelWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let piece = Piece::Data(Bytes::copy_from_slice(data));
        self.pieces.blocking_send(piece).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
