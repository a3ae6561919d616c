//! Archives as bodies: a writer that blocks becomes an answer, a request becomes a reader that blocks. Neither is ever held as a whole.

use std::future::Future;
use std::io::Write;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use msb_protocol::error::ApiError;
use tokio::sync::mpsc;

use super::failure::Failure;

/// Pieces of a body that wait for the other side.
const PIECES_LEN: usize = 16;
/// Largest piece of an archive on its way to a client, in bytes.
const PIECE_LEN_MAX: usize = 256 << 10;

/// An answer that `write` writes. What fails before the first byte is an error with its status; what fails later breaks the answer
/// off, so that no client takes a part for the whole.
pub(super) async fn answer<F>(
    content_type: &'static str,
    write: impl FnOnce(Box<dyn Write + Send>) -> F,
) -> Result<Response, Failure>
where
    F: Future<Output = Result<(), ApiError>> + Send + 'static,
{
    let (pieces, mut waiting) = mpsc::channel::<std::io::Result<Bytes>>(PIECES_LEN);
    let out = std::io::BufWriter::with_capacity(PIECE_LEN_MAX, BodyWriter { pieces });
    let writing = tokio::spawn(write(Box::new(out)));
    // The first piece says that everything asked for was found.
    let Some(first) = waiting.recv().await else {
        return match writing.await.map_err(ApiError::internal)? {
            Ok(()) => Err(Failure(ApiError::internal("an archive without a byte"))),
            Err(error) => Err(Failure(error)),
        };
    };
    let pieces =
        futures_util::stream::unfold((Some(first), waiting, Some(writing)), |(first, mut waiting, writing)| async {
            if let Some(piece) = first {
                return Some((piece, (None, waiting, writing)));
            }
            if let Some(piece) = waiting.recv().await {
                return Some((piece, (None, waiting, writing)));
            }
            match writing?.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "an archive broke off");
                    Some((Err(std::io::Error::other(error)), (None, waiting, None)))
                }
                Err(error) => Some((Err(std::io::Error::other(error)), (None, waiting, None))),
            }
        });
    Ok(([(CONTENT_TYPE, content_type)], Body::from_stream(pieces)).into_response())
}

/// A request's body for a reader that blocks. What that leaves unread is passed over, so that the client gets to read its answer.
pub(super) fn reader(body: Body) -> BodyReader {
    let (pieces, waiting) = mpsc::channel(PIECES_LEN);
    let mut body = body.into_data_stream();
    tokio::spawn(async move {
        let mut wanted = true;
        while let Some(piece) = body.next().await {
            wanted = wanted && pieces.send(piece.map_err(std::io::Error::other)).await.is_ok();
        }
    });
    BodyReader { pieces: waiting, rest: Bytes::new() }
}

/// An answer's body for a writer that blocks. A client that went away is a broken pipe.
struct BodyWriter {
    pieces: mpsc::Sender<std::io::Result<Bytes>>,
}

impl Write for BodyWriter {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let piece = Bytes::copy_from_slice(buffer);
        self.pieces.blocking_send(Ok(piece)).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A request's body for a reader that blocks. A body that breaks off is an error and never an early end.
pub(super) struct BodyReader {
    pieces: mpsc::Receiver<std::io::Result<Bytes>>,
    rest: Bytes,
}

impl std::io::Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece?,
                None => return Ok(0),
            }
        }
        let len = self.rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&self.rest.split_to(len));
        Ok(len)
    }
}
