//! What one connection may take in: how many channels, and how many bytes that the sandbox has not taken yet.
//!
//! ```text
//!  packet ──► Intake::pace ──► channel's queue ──► sandbox        Held counts a byte from the packet until the sandbox took it
//!               │ waits while much is held, but never for long
//! ```
//!
//! The library acknowledges bytes when they arrive, not when they are taken, and reads one packet after the other for all channels.
//! To stop reading would stop everything behind it: other channels, signals, and the very window adjustments without which the
//! process that should take the bytes cannot write. So a full intake slows reading down, more the fuller it is, and never stops it;
//! a sandbox that takes nothing for hours ends the connection. The wait is a pure function of what is held; time is the caller's.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Bytes that may be held without any wait.
pub const FREE_LEN: usize = 1 << 20;
/// Bytes from which on every packet waits the longest.
const SLOW_LEN: usize = 16 << 20;
/// Bytes that are held at most. At the longest wait it takes hours to get here.
pub const HELD_LEN_MAX: usize = 64 << 20;
/// The wait when the first byte too many is held.
const WAIT_MIN: Duration = Duration::from_millis(20);
/// The longest wait; short enough for a client's keepalives to be answered.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// What a packet costs beside its bytes: a client may send single bytes.
const PACKET_COST: usize = 128;

/// A connection reached the limit: what it sends is not taken by the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {HELD_LEN_MAX} bytes were sent that the sandbox did not take")]
pub struct Overrun;

/// One connection's account.
#[derive(Debug)]
pub struct Intake {
    channels: AtomicUsize,
    channels_max: usize,
    held: AtomicUsize,
    taken: Notify,
}

impl Intake {
    /// An empty account.
    #[must_use]
    pub fn new(channels_max: usize) -> Arc<Self> {
        Arc::new(Self { channels: AtomicUsize::new(0), channels_max, held: AtomicUsize::new(0), taken: Notify::new() })
    }

    /// Opens a channel; none if there are too many. It is closed by being dropped.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> Option<Slot> {
        let mut open = self.channels.load(Ordering::Relaxed);
        while open < self.channels_max {
            match self.channels.compare_exchange_weak(open, open + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(Slot { intake: Arc::clone(self) }),
                Err(now) => open = now,
            }
        }
        None
    }

    /// Channels that are open.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels.load(Ordering::Acquire)
    }

    /// Bytes that are held, with the packets' own cost.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    /// Waits before the next packet is read: until little enough is held, at most as long as [`wait_for`] says.
    ///
    /// # Errors
    /// [`Overrun`].
    pub async fn pace(&self) -> Result<(), Overrun> {
        let held = self.held();
        if held >= HELD_LEN_MAX {
            return Err(Overrun);
        }
        let Some(limit) = wait_for(held) else { return Ok(()) };
        let room = async {
            loop {
                let taken = self.taken.notified();
                if self.held() < FREE_LEN {
                    return;
                }
                taken.await;
            }
        };
        // Either is a reason to go on.
        let _ = tokio::time::timeout(limit, room).await;
        Ok(())
    }
}

/// How long the next packet waits at most while this much is held; none: not at all.
#[must_use]
pub fn wait_for(held: usize) -> Option<Duration> {
    let above = held.checked_sub(FREE_LEN)?;
    // Squared, so that a sandbox that is only a little slower is hardly noticed.
    let share = (above as f64 / (SLOW_LEN - FREE_LEN) as f64).min(1.0);
    Some(WAIT_MIN + (WAIT_MAX - WAIT_MIN).mul_f64(share * share))
}

/// An open channel.
#[derive(Debug)]
pub struct Slot {
    intake: Arc<Intake>,
}

impl Slot {
    /// Counts bytes of a packet until what is returned is dropped.
    #[must_use]
    pub fn hold(&self, len: usize) -> Held {
        let cost = len.saturating_add(PACKET_COST);
        self.intake.held.fetch_add(cost, Ordering::AcqRel);
        Held { intake: Arc::clone(&self.intake), cost }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.intake.channels.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Bytes that the sandbox has not taken yet.
#[derive(Debug)]
pub struct Held {
    intake: Arc<Intake>,
    cost: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.intake.held.fetch_sub(self.cost, Ordering::AcqRel);
        self.intake.taken.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn channels_are_counted_and_given_back() {
        let intake = Intake::new(2);
        let (first, second) = (intake.open().unwrap(), intake.open());
        assert!(second.is_some() && intake.open().is_none());
        drop(first);
        assert!(intake.open().is_some());
        drop(second);
        assert_eq!(intake.channels(), 0);
    }

    #[test]
    fn a_channel_that_closes_gives_back_what_it_held() {
        let intake = Intake::new(1);
        let slot = intake.open().unwrap();
        let held: Vec<_> = (0..10).map(|_| slot.hold(1000)).collect();
        assert_eq!(intake.held(), 10 * (1000 + PACKET_COST));
        drop((slot, held));
        assert_eq!((intake.held(), intake.channels()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_intake_slows_down_and_goes_on_as_soon_as_there_is_room() {
        let intake = Intake::new(1);
        let slot = intake.open().unwrap();
        let started = tokio::time::Instant::now();
        let small = slot.hold(1000);
        intake.pace().await.unwrap();
        assert_eq!(started.elapsed(), Duration::ZERO, "a little costs nothing");
        let large = slot.hold(8 << 20);
        intake.pace().await.unwrap();
        assert!(started.elapsed() >= WAIT_MIN && started.elapsed() <= WAIT_MAX, "{:?}", started.elapsed());
        let started = tokio::time::Instant::now();
        let (outcome, ()) = tokio::join!(intake.pace(), async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            drop(large);
        });
        outcome.unwrap();
        assert_eq!(started.elapsed(), Duration::from_millis(1));
        drop(small);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_that_takes_nothing_is_waited_for_for_hours() {
        let intake = Intake::new(1);
        let slot = intake.open().unwrap();
        let (started, mut held) = (tokio::time::Instant::now(), Vec::new());
        while intake.pace().await.is_ok() {
            held.push(slot.hold(32 << 10));
        }
        assert!(started.elapsed() > Duration::from_secs(3 * 3600), "{:?}", started.elapsed());
        assert!(intake.held() < HELD_LEN_MAX + (64 << 10));
        held.clear();
        intake.pace().await.unwrap();
    }

    proptest! {
        #[test]
        fn more_held_never_waits_less(a in 0usize..HELD_LEN_MAX, b in 0usize..HELD_LEN_MAX) {
            let (less, more) = (a.min(b), a.max(b));
            prop_assert!(wait_for(less).unwrap_or_default() <= wait_for(more).unwrap_or_default());
        }
    }
}
