//! The outermost stream: a file that can be skipped in, or a pipe; plain, gzip or zstd.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use crate::compression::{Compression, Decoder, SNIFF_BYTES, sniff};
use crate::error::ImageError;
use crate::tar_stream::SkipRead;

/// Read ahead on streams.
const BUFFER_BYTES: usize = 256 << 10;

/// Where an archive comes from.
pub enum LoadSource<'a> {
    /// A file. Where it is a regular one, what the store already has is not even read.
    File(File),
    /// Anything else: a pipe, a request's body.
    Stream(Box<dyn Read + 'a>),
}

/// An opened source.
pub(super) enum Input<'a> {
    Seekable { file: File, position: u64, length: u64 },
    Stream(Box<Decoder<BufReader<Box<dyn Read + 'a>>>>),
}

impl<'a> Input<'a> {
    pub(super) fn open(source: LoadSource<'a>) -> Result<Self, ImageError> {
        let stream: Box<dyn Read + 'a> = match source {
            LoadSource::Stream(stream) => stream,
            LoadSource::File(mut file) => match file.metadata() {
                Ok(metadata) if metadata.is_dir() => {
                    return Err(ImageError::Archive("it is a directory, not a tar file".into()));
                }
                Ok(metadata) if metadata.is_file() => {
                    let position = file.stream_position().map_err(ImageError::Source)?;
                    let mut head = [0; SNIFF_BYTES];
                    let mut filled = 0;
                    while filled < head.len() {
                        match file.read(&mut head[filled..]).map_err(ImageError::Source)? {
                            0 => break,
                            count => filled += count,
                        }
                    }
                    file.seek(SeekFrom::Start(position)).map_err(ImageError::Source)?;
                    if sniff(&head[..filled]) == Ok(Compression::None) {
                        return Ok(Self::Seekable { file, position, length: metadata.len() });
                    }
                    Box::new(file)
                }
                _ => Box::new(file),
            },
        };
        let mut stream = BufReader::with_capacity(BUFFER_BYTES, stream);
        // One fill is enough for the magic unless a pipe gives single bytes; then the tar reader tells what is wrong.
        let head = stream.fill_buf().map_err(ImageError::Source)?;
        let compression = sniff(head)
            .map_err(|name| ImageError::Archive(format!("it is compressed with {name}; use gzip, zstd or none")))?;
        let decoder = Decoder::new(stream, compression).map_err(ImageError::Source)?;
        Ok(Self::Stream(Box::new(decoder)))
    }
}

impl Input<'_> {
    /// A second look at the same archive, for a source that can give one; the first is not disturbed.
    pub(super) fn preview(&self) -> Option<Input<'static>> {
        let Self::Seekable { file, position, length } = self else { return None };
        let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        let mut preview = Input::Seekable { file: own, position: 0, length: *length };
        preview.skip(*position).ok()?;
        Some(preview)
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Seekable { file, position, .. } => {
                let count = file.read(buffer)?;
                *position += count as u64;
                Ok(count)
            }
            Self::Stream(stream) => stream.read(buffer),
        }
    }
}

impl SkipRead for Input<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match self {
            // Small gaps are cheaper to read than to seek over, but this is once per entry either way.
            Self::Seekable { file, position, length } => {
                let target = position.checked_add(count).ok_or(io::ErrorKind::UnexpectedEof)?;
                if target > *length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                file.seek(SeekFrom::Start(target))?;
                *position = target;
                Ok(())
            }
            Self::Stream(stream) => {
                let mut left = count;
                let mut sink = vec![0; usize::try_from(count).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES)];
                while left > 0 {
                    let want = sink.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    match stream.read(&mut sink[..want]) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(read) => left -= read as u64,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            }
        }
    }
}
