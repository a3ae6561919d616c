//! Time as a value that is passed in. Every wait of the daemon's rules goes through a [`Clock`], so that tests turn hours in
//! milliseconds. Timeouts of I/O alone (a peer that does not answer) use tokio's own time.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// A future that ends at a time.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The two times of the host, and waiting.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Milliseconds on a monotonic clock that stands still while the host sleeps.
    fn now_ms(&self) -> u64;
    /// The wall clock: for people, never for decisions.
    fn wall(&self) -> Timestamp;
    /// Ends when [`Clock::now_ms`] has reached `at_ms`.
    fn sleep_until(&self, at_ms: u64) -> Sleep;
}

/// The host's own clocks (`CLOCK_MONOTONIC`, `CLOCK_REALTIME`).
#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wall(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sleep_until(&self, at_ms: u64) -> Sleep {
        // tokio rounds up to its own millisecond; one more makes sure that `now_ms` has reached the mark when the sleeper looks.
        let until = self.origin + Duration::from_millis(at_ms.min(u64::from(u32::MAX) * 1_000) + 1);
        Box::pin(tokio::time::sleep_until(until))
    }
}
