//! A connection that is looked at a few times a second and does not wake the service when something arrives. For what each running VM
//! sends each second and nobody waits for: beats and samples. A wake costs the service more than the message that caused it, and all
//! unhurried connections are looked at in the same moment.
//!
//! Called by `vm::agent` and `vm::samples`. Never carries anything that has to be answered at once.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Time between two looks: what a beat may be late by.
pub const LOOK_INTERVAL_MS: u64 = 250;
const LOOK_INTERVAL: Duration = Duration::from_millis(LOOK_INTERVAL_MS);

/// The next moment in which all connections are looked at.
fn next_look() -> Instant {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    let looks = EPOCH.elapsed().as_nanos() / LOOK_INTERVAL.as_nanos() + 1;
    *EPOCH + LOOK_INTERVAL * u32::try_from(looks).unwrap_or(u32::MAX)
}

/// The connection.
#[derive(Debug)]
pub struct Unhurried {
    /// Not registered with the reactor: that is the point.
    stream: UnixStream,
    next_look: Pin<Box<Sleep>>,
    next_try: Pin<Box<Sleep>>,
}

impl Unhurried {
    /// Takes a connection out of the reactor's sight.
    ///
    /// # Errors
    /// What the reactor says.
    pub fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            // It stays non-blocking.
            stream: stream.into_std()?,
            next_look: Box::pin(sleep_until(now)),
            next_try: Box::pin(sleep_until(now)),
        })
    }
}

/// Tries something in each of the moments that `at` waits for, until the socket has room or bytes for it.
fn attempt<T>(
    at: &mut Pin<Box<Sleep>>,
    cx: &mut Context<'_>,
    mut action: impl FnMut() -> io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        ready!(at.as_mut().poll(cx));
        match action() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => at.as_mut().reset(next_look()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

impl AsyncRead for Unhurried {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, next_look: at, .. } = &mut *self;
        let read = ready!(attempt(at, cx, || stream.read(buf.initialize_unfilled())))?;
        buf.advance(read);
        // All that there was, most times; a buffer that was filled says there is more.
        if buf.remaining() > 0 {
            at.as_mut().reset(next_look());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Unhurried {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, next_try: at, .. } = &mut *self;
        attempt(at, cx, || stream.write(data))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[actix_rt::test]
    async fn bytes_arrive_whole_at_the_next_look_and_the_end_is_seen() {
        let (mut peer, stream) = tokio::net::UnixStream::pair().unwrap();
        let mut unhurried = Unhurried::new(stream).unwrap();
        let mut buffer = [0; 4];
        peer.write_all(b"ab").await.unwrap();
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 2, "the first look is at once");
        let began = Instant::now();
        peer.write_all(b"cdefgh").await.unwrap();
        unhurried.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"cdef");
        assert!(began.elapsed() <= LOOK_INTERVAL * 2);
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 2);
        drop(peer);
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 0);
    }

    #[actix_rt::test]
    async fn all_are_looked_at_in_the_same_moment() {
        let first = next_look();
        tokio::time::sleep_until(first + LOOK_INTERVAL / 8).await;
        assert_eq!(next_look(), first + LOOK_INTERVAL);
    }

    #[actix_rt::test]
    async fn a_peer_that_does_not_read_holds_the_writer_up_until_it_does() {
        let (mut peer, stream) = tokio::net::UnixStream::pair().unwrap();
        let mut unhurried = Unhurried::new(stream).unwrap();
        let sent = vec![7; 1 << 20];
        let expected = sent.len();
        let writer = tokio::spawn(async move { unhurried.write_all(&sent).await });
        let mut received = vec![0; expected];
        peer.read_exact(&mut received).await.unwrap();
        writer.await.unwrap().unwrap();
    }
}
