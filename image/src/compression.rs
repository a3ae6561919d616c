//! Compression of archives and layers, told by magic bytes and never by a media type or a file name.
//!
//! Called by the archive reader (outer compression) and the layer importer. Decoders stop at the ratio and size limits, so that a
//! small input cannot ask for unbounded work.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

use crate::limits::{Limits, RATIO_GRACE_BYTES, ZSTD_WINDOW_LOG};

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, RFC 1952.
    Gzip,
    /// Zstandard, RFC 8878.
    Zstd,
}

impl Compression {
    /// Media type of a layer compressed like this (OCI image-spec, layer.md).
    #[must_use]
    pub(crate) fn layer_media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// Bytes that [`sniff`] wants to see.
pub(crate) const SNIFF_BYTES: usize = 6;

/// Names the compression of a stream that starts with `head`.
///
/// # Errors
/// The name of a compression that is known but not supported.
pub(crate) fn sniff(head: &[u8]) -> Result<Compression, &'static str> {
    match head {
        [0x1f, 0x8b, 0x08, ..] => Ok(Compression::Gzip),
        // A zstd frame, or one of the sixteen skippable frames that may come before it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err("xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Err("bzip2"),
        [0x04, 0x22, 0x4d, 0x18, ..] => Err("lz4"),
        _ => Ok(Compression::None),
    }
}

/// A decoder over any buffered source.
pub(crate) enum Decoder<R: BufRead> {
    None(R),
    Gzip(Box<flate2::bufread::MultiGzDecoder<R>>),
    Zstd(Box<zstd::Decoder<'static, R>>),
}

impl<R: BufRead> Decoder<R> {
    pub(crate) fn new(source: R, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(source),
            Compression::Gzip => Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(source)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Self::Zstd(Box::new(decoder))
            }
        })
    }

    /// The source, to learn what was left unread behind the compressed stream.
    pub(crate) fn source(&mut self) -> &mut R {
        match self {
            Self::None(source) => source,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None(source) => source.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// Decides whether `unpacked` bytes out of `packed` ones are still believable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BombGuard {
    ratio_max: u64,
    unpacked_max: u64,
}

/// Why a [`BombGuard`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bomb {
    Ratio(u64),
    Size(u64),
}

impl BombGuard {
    pub(crate) fn new(limits: &Limits, unpacked_max: u64) -> Self {
        Self { ratio_max: limits.compression_ratio, unpacked_max }
    }

    pub(crate) fn check(&self, packed: u64, unpacked: u64) -> Result<(), Bomb> {
        if unpacked > self.unpacked_max {
            return Err(Bomb::Size(self.unpacked_max));
        }
        if unpacked > RATIO_GRACE_BYTES && unpacked / packed.max(1) > self.ratio_max {
            return Err(Bomb::Ratio(self.ratio_max));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_told_by_magic() {
        assert_eq!(sniff(&[0x1f, 0x8b, 8, 0]), Ok(Compression::Gzip));
        assert_eq!(sniff(&[0x28, 0xb5, 0x2f, 0xfd, 0]), Ok(Compression::Zstd));
        assert_eq!(sniff(&[0x50, 0x2a, 0x4d, 0x18]), Ok(Compression::Zstd));
        assert_eq!(sniff(b"\xfd7zXZ\0"), Err("xz"));
        assert_eq!(sniff(b"BZh9"), Err("bzip2"));
        assert_eq!(sniff(b"bin/"), Ok(Compression::None));
        assert_eq!(sniff(b""), Ok(Compression::None));
    }

    #[test]
    fn the_guard_allows_the_limit_and_refuses_one_step_more() {
        let guard = BombGuard::new(&Limits { compression_ratio: 10, ..Limits::default() }, 1 << 30);
        assert_eq!(guard.check(1, RATIO_GRACE_BYTES), Ok(()));
        assert_eq!(guard.check(1, RATIO_GRACE_BYTES + 1), Err(Bomb::Ratio(10)));
        assert_eq!(guard.check(10 << 20, 100 << 20), Ok(()));
        assert_eq!(guard.check(10 << 20, 110 << 20), Err(Bomb::Ratio(10)));
        assert_eq!(guard.check(1 << 30, 1 << 30), Ok(()));
        assert_eq!(guard.check(1 << 30, (1 << 30) + 1), Err(Bomb::Size(1 << 30)));
    }
}
