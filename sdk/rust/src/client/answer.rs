//! What the service answers: one document, lines of documents, the bytes of an archive. Read by the calls of [`super::Client`].

use std::collections::VecDeque;
use std::marker::PhantomData;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use crate::connection::Connection;
use crate::error::Error;

/// Longest line of a streamed answer, in bytes.
const LINE_LEN_MAX: usize = 8 << 20;

/// The bytes of an archive as they come.
pub struct Archive {
    pub(super) body: Incoming,
    /// Held so that the connection lives as long as its answer.
    pub(super) _connection: Connection,
}

impl Archive {
    /// The next piece; `None` at the end of a whole archive.
    ///
    /// # Errors
    /// `daemon_unavailable` if it broke off: what came before is not an archive.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(Error::unavailable(format!("the archive broke off: {error}"))),
                None => return Ok(None),
            }
        }
    }
}

/// The values of a streamed answer, one JSON document a line.
pub struct JsonLines<T> {
    body: Incoming,
    buffer: BytesMut,
    ready: VecDeque<Bytes>,
    /// Held so that the connection lives as long as its answer.
    _connection: Option<Connection>,
    kind: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> JsonLines<T> {
    pub(super) fn new(response: Response<Incoming>, connection: Option<Connection>) -> Self {
        Self {
            body: response.into_body(),
            buffer: BytesMut::new(),
            ready: VecDeque::new(),
            _connection: connection,
            kind: PhantomData,
        }
    }

    /// The next value; `None` at the end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// `daemon_unavailable` if the connection is lost, `internal` for a line that is no such value.
    pub async fn next(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return parse(&line).map(Some);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    self.buffer.extend_from_slice(&data);
                    self.cut()?;
                }
                Some(Err(error)) => return Err(Error::unavailable(format!("the service's answer broke off: {error}"))),
                None if self.buffer.is_empty() => return Ok(None),
                None => self.ready.push_back(self.buffer.split().freeze()),
            }
        }
    }

    fn cut(&mut self) -> Result<(), Error> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            self.ready.push_back(self.buffer.split_to(end + 1).freeze());
        }
        if self.buffer.len() > LINE_LEN_MAX { Err(Error::protocol("a line without an end")) } else { Ok(()) }
    }
}

/// One document.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(Error::protocol)
}
