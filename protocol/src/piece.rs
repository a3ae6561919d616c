//! The two messages that carry bulk, without copies: what stands in front of the bytes, and where they are in a frame's body.
//!
//! They are [`crate::guest::GuestBody::Output`] (and `MainOutput`) and [`crate::guest::HostBody::Stdin`], byte for byte as prost writes
//! them. A sender writes the head and then the bytes from where they lie; a receiver looks for the bytes in place, and asks an
//! [`crate::guest::Assembler`] for whatever is no such message. Pure, as [`crate::frame`] is; used at both ends of an agent's stream.

use std::ops::Range;

use bytes::BufMut;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::frame::DATA_LEN_MAX;
use crate::guest::OutputStream;

/// Field number of [`crate::guest::GuestBody::Output`].
pub const OUTPUT_TAG: u32 = 13;
/// Field number of [`crate::guest::GuestBody::MainOutput`].
pub const MAIN_OUTPUT_TAG: u32 = 5;
/// Field number of [`crate::guest::HostBody::Stdin`].
const STDIN_TAG: u32 = 5;
/// Field numbers inside: of [`crate::guest::Output`] and of [`crate::guest::Data`].
const STREAM_TAG: u32 = 1;
const OUTPUT_DATA_TAG: u32 = 2;
const STDIN_DATA_TAG: u32 = 1;
/// Longest head in bytes: the length, and at most two keys with lengths around one field of two bytes.
pub const HEAD_LEN_MAX: usize = 32;

/// What stands in a frame in front of its bytes.
#[derive(Clone, Debug)]
pub struct Head {
    bytes: [u8; HEAD_LEN_MAX],
    len: usize,
}

impl AsRef<[u8]> for Head {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The head of a frame with `len` bytes of output, at most [`DATA_LEN_MAX`]; `tag` says whose.
#[must_use]
pub fn output_head(tag: u32, stream: OutputStream, len: usize) -> Head {
    // Zero is what a field that is not there means, in a head and in prost's.
    let stream = (stream != OutputStream::Stdout).then_some(stream as u64);
    head(tag, stream, OUTPUT_DATA_TAG, len)
}

/// The head of a frame with `len` bytes of stdin, at most [`DATA_LEN_MAX`].
#[must_use]
pub fn stdin_head(len: usize) -> Head {
    head(STDIN_TAG, None, STDIN_DATA_TAG, len)
}

fn head(tag: u32, stream: Option<u64>, data_tag: u32, len: usize) -> Head {
    debug_assert!(len <= DATA_LEN_MAX, "a piece of {len} bytes");
    let stream_len = stream.map_or(0, |stream| key_len(STREAM_TAG) + encoded_len_varint(stream));
    let data_len = if len == 0 { 0 } else { key_len(data_tag) + encoded_len_varint(len as u64) + len };
    let message_len = stream_len + data_len;
    let body_len = key_len(tag) + encoded_len_varint(message_len as u64) + message_len;
    let mut bytes = [0; HEAD_LEN_MAX];
    let mut rest = &mut bytes[..];
    // A piece is far shorter than u32::MAX.
    rest.put_u32(u32::try_from(body_len).unwrap_or(u32::MAX));
    encode_key(tag, WireType::LengthDelimited, &mut rest);
    encode_varint(message_len as u64, &mut rest);
    if let Some(stream) = stream {
        encode_key(STREAM_TAG, WireType::Varint, &mut rest);
        encode_varint(stream, &mut rest);
    }
    if len > 0 {
        encode_key(data_tag, WireType::LengthDelimited, &mut rest);
        encode_varint(len as u64, &mut rest);
    }
    let len = HEAD_LEN_MAX - rest.len();
    Head { bytes, len }
}

/// Where the output is in a frame's body, if the body is output of a session and nothing else, written as [`output_head`] does.
#[must_use]
pub fn output_in(body: &[u8]) -> Option<(OutputStream, Range<usize>)> {
    let mut reader = Reader { body, at: 0 };
    reader.enter(OUTPUT_TAG)?;
    let stream = match reader.skip_key(STREAM_TAG, WireType::Varint) {
        Some(()) if reader.varint()? == OutputStream::Stderr as u64 => OutputStream::Stderr,
        Some(()) => return None,
        None => OutputStream::Stdout,
    };
    Some((stream, reader.bytes_to_the_end(OUTPUT_DATA_TAG)?))
}

/// Where the stdin is in a frame's body, if the body is stdin and nothing else, written as [`stdin_head`] does.
#[must_use]
pub fn stdin_in(body: &[u8]) -> Option<Range<usize>> {
    let mut reader = Reader { body, at: 0 };
    reader.enter(STDIN_TAG)?;
    reader.bytes_to_the_end(STDIN_DATA_TAG)
}

struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut rest = self.body.get(self.at..)?;
        let before = rest.len();
        let value = prost::encoding::decode_varint(&mut rest).ok()?;
        self.at += before - rest.len();
        Some(value)
    }

    /// Passes over a key if it is this one.
    fn skip_key(&mut self, tag: u32, kind: WireType) -> Option<()> {
        let before = self.at;
        if self.varint() == Some(u64::from(tag) << 3 | kind as u64) {
            return Some(());
        }
        self.at = before;
        None
    }

    /// Passes over key and length of a field that reaches to the end of the body.
    fn enter(&mut self, tag: u32) -> Option<()> {
        self.skip_key(tag, WireType::LengthDelimited)?;
        let len = self.varint()?;
        (len == (self.body.len() - self.at) as u64).then_some(())
    }

    fn bytes_to_the_end(&mut self, tag: u32) -> Option<Range<usize>> {
        if self.at == self.body.len() {
            return Some(self.at..self.at);
        }
        self.enter(tag)?;
        Some(self.at..self.body.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{Decoder, PREFIX_LEN};
    use crate::guest::{Assembler, Data, GuestBody, HostBody, Output, encode_guest, encode_host};

    fn lens() -> impl Strategy<Value = usize> {
        prop_oneof![Just(0usize), 1usize..300, Just(DATA_LEN_MAX)]
    }

    proptest! {
        #[test]
        fn heads_are_what_prost_writes_and_are_found_again(len in lens(), error in any::<bool>()) {
            let stream = if error { OutputStream::Stderr } else { OutputStream::Stdout };
            let data = vec![0xa5; len];
            let output = Output { stream: stream as i32, data: data.clone() };
            for (head, frames) in [
                (output_head(OUTPUT_TAG, stream, len), encoded(|out| encode_guest(GuestBody::Output(output.clone()), out))),
                (output_head(MAIN_OUTPUT_TAG, stream, len), encoded(|out| encode_guest(GuestBody::MainOutput(output.clone()), out))),
                (stdin_head(len), encoded(|out| encode_host(HostBody::Stdin(Data { data: data.clone() }), out))),
            ] {
                prop_assert_eq!([head.as_ref(), &data].concat(), frames);
            }
            let body = [output_head(OUTPUT_TAG, stream, len).as_ref(), &data].concat().split_off(PREFIX_LEN);
            let (found, range) = output_in(&body).unwrap();
            prop_assert_eq!((found, &body[range]), (stream, &data[..]));
            let body = [stdin_head(len).as_ref(), &data].concat().split_off(PREFIX_LEN);
            prop_assert_eq!(&body[stdin_in(&body).unwrap()], &data[..]);
        }

        #[test]
        fn what_is_found_in_any_bytes_is_what_prost_reads(body in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..4, Just(0x6a), Just(0x2a), Just(0x12), Just(0x0a)], 0..24)) {
            if let Some((stream, range)) = output_in(&body) {
                let data = body[range].to_vec();
                prop_assert_eq!(Assembler::new().guest(&body).unwrap(), Some(GuestBody::Output(Output { stream: stream as i32, data })));
            }
            if let Some(range) = stdin_in(&body) {
                let data = body[range].to_vec();
                prop_assert_eq!(Assembler::new().host(&body).unwrap(), Some(HostBody::Stdin(Data { data })));
            }
        }
    }

    fn encoded(encode: impl FnOnce(&mut Vec<u8>) -> Result<(), crate::frame::FrameError>) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out).unwrap();
        out
    }

    #[test]
    fn the_longest_piece_fits_a_frame() {
        let mut decoder = Decoder::new();
        decoder.push(
            &[output_head(OUTPUT_TAG, OutputStream::Stderr, DATA_LEN_MAX).as_ref(), &vec![1; DATA_LEN_MAX]].concat(),
        );
        let body = decoder.next_body().unwrap().unwrap();
        assert_eq!(output_in(body).unwrap().1.len(), DATA_LEN_MAX);
    }
}
