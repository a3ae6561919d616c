//! Messages that are longer than a frame, and those that are not: how both are put on the wire and together again. Part of the guest border ([`super`]).

use prost::Message;

use super::{GuestBody, GuestMessage, HostBody, HostMessage, MESSAGE_LEN_MAX};
use crate::frame::{self, FrameError};

/// One piece of a message that is longer than a frame. The pieces, put together, are an encoded message of the same side.
#[derive(Clone, PartialEq, Message)]
pub struct Part {
    /// The piece.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
    /// Whether the message is complete with it.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// Appends the frames of one message of the host: one, or parts if it does not fit.
///
/// # Errors
/// [`FrameError::TooLong`] above [`MESSAGE_LEN_MAX`].
pub fn encode_host(body: HostBody, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_parts(&HostMessage::from(body), out, |part| HostMessage::from(HostBody::Part(part)))
}

/// Appends the frames of one message of the guest: one, or parts if it does not fit.
///
/// # Errors
/// [`FrameError::TooLong`] above [`MESSAGE_LEN_MAX`].
pub fn encode_guest(body: GuestBody, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_parts(&GuestMessage::from(body), out, |part| GuestMessage::from(GuestBody::Part(part)))
}

fn encode_parts<M: Message>(message: &M, out: &mut Vec<u8>, wrap: impl Fn(Part) -> M) -> Result<(), FrameError> {
    let len = message.encoded_len();
    if len <= frame::FRAME_LEN_MAX {
        return frame::encode_message(message, out);
    }
    if len > MESSAGE_LEN_MAX {
        return Err(FrameError::TooLong { len });
    }
    let whole = message.encode_to_vec();
    let mut pieces = whole.chunks(frame::FRAME_LEN_MAX / 2).peekable();
    while let Some(piece) = pieces.next() {
        let part = Part { data: piece.to_vec(), last: pieces.peek().is_none() };
        frame::encode_message(&wrap(part), out)?;
    }
    Ok(())
}

/// Puts parts together again. One for each direction of each stream.
#[derive(Debug, Default)]
pub struct Assembler {
    waiting: Vec<u8>,
}

impl Assembler {
    /// An assembler with nothing waiting.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the next body begins a message: one between the parts of another cannot be understood.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes one frame's body from the host; gives the message when it is whole.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] for what is no message or holds none, [`FrameError::TooLong`] for parts beyond the limit.
    pub fn host(&mut self, body: &[u8]) -> Result<Option<HostBody>, FrameError> {
        match frame::decode_message::<HostMessage>(body)?.body {
            Some(HostBody::Part(part)) => match self.take(part)? {
                Some(whole) => match frame::decode_message::<HostMessage>(&whole)?.body {
                    Some(HostBody::Part(_)) | None => Err(FrameError::Malformed),
                    body => Ok(body),
                },
                None => Ok(None),
            },
            body => self.whole(body),
        }
    }

    /// Takes one frame's body from the guest; gives the message when it is whole.
    ///
    /// # Errors
    /// As [`Assembler::host`].
    pub fn guest(&mut self, body: &[u8]) -> Result<Option<GuestBody>, FrameError> {
        match frame::decode_message::<GuestMessage>(body)?.body {
            Some(GuestBody::Part(part)) => match self.take(part)? {
                Some(whole) => match frame::decode_message::<GuestMessage>(&whole)?.body {
                    Some(GuestBody::Part(_)) | None => Err(FrameError::Malformed),
                    body => Ok(body),
                },
                None => Ok(None),
            },
            body => self.whole(body),
        }
    }

    fn take(&mut self, part: Part) -> Result<Option<Vec<u8>>, FrameError> {
        let len = self.waiting.len() + part.data.len();
        if len > MESSAGE_LEN_MAX {
            self.waiting = Vec::new();
            return Err(FrameError::TooLong { len });
        }
        self.waiting.extend_from_slice(&part.data);
        Ok(part.last.then(|| std::mem::take(&mut self.waiting)))
    }

    fn whole<B>(&self, body: Option<B>) -> Result<Option<B>, FrameError> {
        // A message between the parts of another, or one this build does not know, cannot be understood.
        if self.waiting.is_empty() && body.is_some() { Ok(body) } else { Err(FrameError::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{EnvVar, GuestConfig, Ping, Welcome};
    use super::*;
    use crate::frame::Decoder;

    fn config_of(len: usize) -> HostBody {
        let env = vec![EnvVar { name: "BIG".into(), value: "x".repeat(len) }];
        HostBody::Welcome(Welcome { config: Some(GuestConfig { env, ..Default::default() }), ..Default::default() })
    }

    fn through_the_wire(body: HostBody) -> (usize, HostBody) {
        let mut wire = Vec::new();
        encode_host(body, &mut wire).unwrap();
        let (mut decoder, mut assembler, mut frames) = (Decoder::new(), Assembler::new(), 0);
        decoder.push(&wire);
        loop {
            let body = decoder.next_body().unwrap().expect("a whole message");
            frames += 1;
            if let Some(message) = assembler.host(body).unwrap() {
                decoder.finish().unwrap();
                return (frames, message);
            }
        }
    }

    #[test]
    fn small_messages_are_one_frame_and_large_ones_are_parts() {
        let small = config_of(10);
        assert_eq!(through_the_wire(small.clone()), (1, small));
        let large = config_of((3 << 20) / 2);
        let (frames, message) = through_the_wire(large.clone());
        assert!(frames > 1);
        assert_eq!(message, large);
    }

    #[test]
    fn parts_beyond_the_limit_are_refused_by_both_ends() {
        let mut wire = Vec::new();
        assert!(matches!(encode_host(config_of(MESSAGE_LEN_MAX), &mut wire), Err(FrameError::TooLong { .. })));
        let mut assembler = Assembler::new();
        let part = HostMessage::from(HostBody::Part(Part { data: vec![0; 512 << 10], last: false })).encode_to_vec();
        let outcome = (0..9).map(|_| assembler.host(&part)).find(Result::is_err);
        assert!(matches!(outcome, Some(Err(FrameError::TooLong { .. }))));
    }

    #[test]
    fn a_message_between_parts_and_an_empty_message_are_malformed() {
        let mut assembler = Assembler::new();
        assert_eq!(assembler.host(&[]), Err(FrameError::Malformed));
        let part = HostMessage::from(HostBody::Part(Part { data: vec![1], last: false })).encode_to_vec();
        assert_eq!(assembler.host(&part), Ok(None));
        let ping = HostMessage::from(HostBody::Ping(Ping { token: 1 })).encode_to_vec();
        assert_eq!(assembler.host(&ping), Err(FrameError::Malformed));
    }
}
