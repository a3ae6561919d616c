//! The frame of every framed border: a big-endian u32 length, then that many bytes of body.
//!
//! Pure: it works on buffers, its callers do the reading and writing. It never allocates more than [`FRAME_LEN_MAX`]
//! for a frame, whatever length the peer claims.

use std::ops::Range;

use thiserror::Error;

/// Bytes of the length prefix.
pub const PREFIX_LEN: usize = 4;
/// Longest body in bytes. A longer one is a fault of the peer, which ends the connection.
pub const FRAME_LEN_MAX: usize = 1 << 20;
/// Largest piece of a byte stream (stdin, stdout) that one frame carries, so that frames of one stream
/// leave room for the message around the data.
pub const DATA_LEN_MAX: usize = 64 << 10;

/// Longest body in bytes of the one frame that may be longer: a `Launch` with its environment of up to a mebibyte, in JSON
/// (which writes some bytes as six).
pub const SPEC_LEN_MAX: usize = 8 << 20;

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The peer announced a body above the limit.
    #[error("frame of {len} bytes is above the limit of {FRAME_LEN_MAX}")]
    TooLong {
        /// The announced length in bytes.
        len: usize,
    },
    /// The connection ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The body is not the message that was expected.
    #[error("the frame's body is not a valid message")]
    Malformed,
}

/// Appends one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLong`] if the body is above the limit; `out` is then unchanged.
pub fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    let len = body.len();
    if len > FRAME_LEN_MAX {
        return Err(FrameError::TooLong { len });
    }
    out.reserve(PREFIX_LEN + len);
    // FRAME_LEN_MAX is far below u32::MAX, so this conversion cannot fail.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(body);
    Ok(())
}

/// Checks a prefix and gives the length of the body that follows.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn body_len(prefix: [u8; PREFIX_LEN]) -> Result<usize, FrameError> {
    let len = usize::try_from(u32::from_be_bytes(prefix)).unwrap_or(usize::MAX);
    if len > FRAME_LEN_MAX { Err(FrameError::TooLong { len }) } else { Ok(len) }
}

/// Collects bytes as they arrive and gives back whole bodies.
///
/// Holds at most one frame beyond what its caller pushed or read at once: callers push what one read gave them.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes that arrived are at `start..end`; what is behind is room for more.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    len_max: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::with_limit(FRAME_LEN_MAX)
    }
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty decoder that takes bodies of up to `len_max` bytes: for the border of a VM process ([`SPEC_LEN_MAX`]).
    #[must_use]
    pub fn with_limit(len_max: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0, len_max }
    }

    /// Takes bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.took(bytes.len());
    }

    /// At least `len` bytes of room to read into, so that nothing is copied here; [`Self::took`] says how many came.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.buffer.len() - self.end < len {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() - self.end < len {
            self.buffer.resize(self.end + len, 0);
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes were put into the room.
    pub fn took(&mut self, len: usize) {
        self.end = (self.end + len).min(self.buffer.len());
    }

    /// Whether a whole body has arrived (or one that is too long, which [`Self::next_body`] says).
    #[must_use]
    pub fn holds_body(&self) -> bool {
        let waiting = &self.buffer[self.start..self.end];
        waiting.first_chunk::<PREFIX_LEN>().is_some_and(|prefix| {
            let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
            len > self.len_max || waiting.len() - PREFIX_LEN >= len
        })
    }

    /// The next whole body, if it has arrived.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]: the connection cannot be read any further.
    pub fn next_body(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some(body) = self.waiting_body()? else { return Ok(None) };
        self.start = body.end;
        Ok(Some(&self.buffer[body]))
    }

    /// Where the next whole body is.
    fn waiting_body(&self) -> Result<Option<Range<usize>>, FrameError> {
        let waiting = &self.buffer[self.start..self.end];
        let Some(prefix) = waiting.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len > self.len_max {
            return Err(FrameError::TooLong { len });
        }
        if waiting.len() < PREFIX_LEN + len {
            return Ok(None);
        }
        let body_start = self.start + PREFIX_LEN;
        Ok(Some(body_start..body_start + len))
    }

    /// The next whole body as `look` sees it; it stays where it is if `look` sees nothing.
    ///
    /// # Errors
    /// As [`Self::next_body`].
    pub fn next_body_if<'a, T>(
        &'a mut self,
        look: impl FnOnce(&'a [u8]) -> Option<T>,
    ) -> Result<Option<T>, FrameError> {
        let Some(body) = self.waiting_body()? else { return Ok(None) };
        let end = body.end;
        let seen = look(&self.buffer[body]);
        if seen.is_some() {
            self.start = end;
        }
        Ok(seen)
    }

    /// What arrived after the last whole body, for a stream that carries no frames from here on.
    #[must_use]
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.truncate(self.end);
        self.buffer.drain(..self.start);
        self.buffer
    }

    /// Whether the stream may end here: nothing of an unfinished frame waits.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] if it may not.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.start == self.end { Ok(()) } else { Err(FrameError::Truncated) }
    }
}

/// Appends one frame with a protobuf body.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode_message(message: &impl prost::Message, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let len = message.encoded_len();
    if len > FRAME_LEN_MAX {
        return Err(FrameError::TooLong { len });
    }
    out.reserve(PREFIX_LEN + len);
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    // A Vec grows as needed, so encoding into it cannot run out of room.
    message.encode(out).map_err(|_| FrameError::TooLong { len })
}

/// Reads a protobuf body.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode_message<M: prost::Message + Default>(body: &[u8]) -> Result<M, FrameError> {
    M::decode(body).map_err(|_| FrameError::Malformed)
}

/// Appends one frame with a JSON body.
///
/// # Errors
/// [`FrameError::TooLong`], or [`FrameError::Malformed`] for a value JSON cannot hold.
pub fn encode_json(message: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode(&serde_json::to_vec(message).map_err(|_| FrameError::Malformed)?, out)
}

/// Appends one frame with a JSON body of up to [`SPEC_LEN_MAX`] bytes; its reader needs [`Decoder::with_limit`].
///
/// # Errors
/// As [`encode_json`].
pub fn encode_json_spec(message: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let body = serde_json::to_vec(message).map_err(|_| FrameError::Malformed)?;
    let len = body.len();
    if len > SPEC_LEN_MAX {
        return Err(FrameError::TooLong { len });
    }
    out.reserve(PREFIX_LEN + len);
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(&body);
    Ok(())
}

/// Reads a JSON body.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode_json<M: serde::de::DeserializeOwned>(body: &[u8]) -> Result<M, FrameError> {
    serde_json::from_slice(body).map_err(|_| FrameError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_limit_holds_on_both_sides() {
        let mut out = Vec::new();
        encode(&vec![7; FRAME_LEN_MAX], &mut out).unwrap();
        let mut decoder = Decoder::new();
        decoder.push(&out);
        assert_eq!(decoder.next_body().unwrap().unwrap().len(), FRAME_LEN_MAX);

        let mut untouched = Vec::new();
        let too_long = FrameError::TooLong { len: FRAME_LEN_MAX + 1 };
        assert_eq!(encode(&vec![7; FRAME_LEN_MAX + 1], &mut untouched), Err(too_long));
        assert!(untouched.is_empty());
        let mut decoder = Decoder::new();
        decoder.push(&u32::try_from(FRAME_LEN_MAX + 1).unwrap().to_be_bytes());
        assert_eq!(decoder.next_body(), Err(too_long));
    }

    #[test]
    fn only_the_border_of_a_vm_process_takes_longer_bodies() {
        let long = "x".repeat(2 << 20);
        let mut wire = Vec::new();
        encode_json_spec(&long, &mut wire).unwrap();
        let mut ordinary = Decoder::new();
        ordinary.push(&wire);
        assert!(matches!(ordinary.next_body(), Err(FrameError::TooLong { .. })));
        let mut wide = Decoder::with_limit(SPEC_LEN_MAX);
        wide.push(&wire);
        assert_eq!(decode_json::<String>(wide.next_body().unwrap().unwrap()).unwrap(), long);
        assert!(encode_json_spec(&"x".repeat(SPEC_LEN_MAX), &mut wire).is_err());
    }

    proptest! {
        #[test]
        fn bodies_arrive_whole_however_they_are_cut(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20), cut in 1usize..64) {
            let mut wire = Vec::new();
            for body in &bodies {
                encode(body, &mut wire).unwrap();
            }
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.push(piece);
                while let Some(body) = decoder.next_body().unwrap() {
                    seen.push(body.to_vec());
                }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn any_bytes_are_frames_or_an_error_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            while let Ok(Some(body)) = decoder.next_body() {
                let _ = decode_message::<crate::guest::HostMessage>(body);
                let _ = decode_message::<crate::guest::GuestMessage>(body);
                let _ = decode_json::<crate::vmm::Request>(body);
            }
        }
    }
}
