//! A connection that is looked at a few times a second and does not wake the service when something arrives. For what
//! each running VM sends each second and nobody waits for: beats, and samples, whose reader looks at all of its
//! connections itself. A wake costs the service more than the message that caused it, and all unhurried connections
//! are looked at in the same moment.
//!
//! Called by `vm::agent`, and for the moments of looking by `vm::samples`. Never carries anything that has to be
//! answered at once.

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
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(LOOK_INTERVAL_MS);

/// Bytes of one read: many beats.
const READ_LEN: usize = 4 << 10;

/// The first moment later than this, both counted from the same beginning, in which connections are looked at.
fn look_behind(time: Duration) -> Duration {
    let looks = time.as_nanos() / LOOK_INTERVAL.as_nanos() + 1;
    LOOK_INTERVAL * u32::try_from(looks).unwrap_or(u32::MAX)
}

/// The first one later than this time from now.
pub(super) fn look_after(pause: Duration) -> Instant {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    *EPOCH + look_behind(EPOCH.elapsed() + pause)
}

/// The connection.
#[derive(Debug)]
pub struct Unhurried {
    /// Not registered with the reactor: that is the point.
    stream: UnixStream,
    /// After something has come: nothing will for so long.
    pause: Duration,
    next_look: Pin<Box<Sleep>>,
    next_try: Pin<Box<Sleep>>,
}

impl Unhurried {
    /// Takes a connection, on which something comes at this interval, out of the reactor's sight.
    ///
    /// # Errors
    /// What the reactor says.
    pub fn new(stream: tokio::net::UnixStream, interval: Duration) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            // It stays non-blocking.
            stream: stream.into_std()?,
            pause: interval.saturating_sub(LOOK_INTERVAL),
            next_look: Box::pin(sleep_until(now)),
            next_try: Box::pin(sleep_until(now)),
        })
    }
}

/// Tries something, and again in each of the moments of looking, until the socket has room or bytes for it.
fn attempt<T>(
    at: &mut Pin<Box<Sleep>>,
    cx: &mut Context<'_>,
    mut action: impl FnMut() -> io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        ready!(at.as_mut().poll(cx));
        match action() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => at.as_mut().reset(look_after(Duration::ZERO)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

impl AsyncRead for Unhurried {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, pause, next_look: at, .. } = &mut *self;
        // A buffer of the caller's may be large, and would have to be cleared for a few bytes.
        let mut bytes = [0; READ_LEN];
        let len = buf.remaining().min(READ_LEN);
        let read = ready!(attempt(at, cx, || stream.read(&mut bytes[..len])))?;
        buf.put_slice(&bytes[..read]);
        // Less than there was room for is all that there was.
        if read < len {
            at.as_mut().reset(look_after(*pause));
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
        let mut unhurried = Unhurried::new(stream, Duration::ZERO).unwrap();
        let mut buffer = [0; 4];
        peer.write_all(b"ab").await.unwrap();
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 2, "the first look is at once");
        peer.write_all(b"cdefgh").await.unwrap();
        unhurried.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"cdef");
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 2);
        drop(peer);
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 0);
    }

    #[test]
    fn all_are_looked_at_in_the_same_moments() {
        for (time_ms, look_ms) in [(0, 250), (1, 250), (249, 250), (250, 500), (1_030, 1_250)] {
            let look = look_behind(Duration::from_millis(time_ms));
            assert_eq!(look, Duration::from_millis(look_ms), "behind {time_ms} ms");
        }
    }

    #[actix_rt::test]
    async fn what_comes_each_second_is_looked_for_once_a_second() {
        let second = Duration::from_secs(1);
        let (mut peer, stream) = tokio::net::UnixStream::pair().unwrap();
        let mut unhurried = Unhurried::new(stream, second).unwrap();
        peer.write_all(b"1").await.unwrap();
        let mut buffer = [0; 4];
        let began = Instant::now();
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 1);
        peer.write_all(b"2").await.unwrap();
        assert_eq!(unhurried.read(&mut buffer).await.unwrap(), 1);
        let waited = began.elapsed();
        assert!(waited > second / 2, "{waited:?}");
    }

    #[actix_rt::test]
    async fn a_peer_that_does_not_read_holds_the_writer_up_until_it_does() {
        let (mut peer, stream) = tokio::net::UnixStream::pair().unwrap();
        let mut unhurried = Unhurried::new(stream, Duration::ZERO).unwrap();
        let sent = vec![7; 1 << 20];
        let expected = sent.len();
        let writer = tokio::spawn(async move { unhurried.write_all(&sent).await });
        let mut received = vec![0; expected];
        peer.read_exact(&mut received).await.unwrap();
        writer.await.unwrap().unwrap();
    }
}
