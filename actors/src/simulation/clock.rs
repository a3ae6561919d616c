//! A clock that stands still until it is turned.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::oneshot;

use crate::clock::{Clock, Sleep};

/// Time by hand.
#[derive(Debug, Default)]
pub struct TurnedClock {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    now_ms: u64,
    wall_shift_ms: i64,
    next: u64,
    sleepers: BTreeMap<(u64, u64), oneshot::Sender<()>>,
}

impl TurnedClock {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves time on and wakes whoever waited for it, in order.
    pub fn turn(&self, by_ms: u64) {
        let mut inner = self.lock();
        inner.now_ms += by_ms;
        let after = (inner.now_ms + 1, 0);
        let later = inner.sleepers.split_off(&after);
        let due = std::mem::replace(&mut inner.sleepers, later);
        drop(inner);
        for sleeper in due.into_values() {
            // One that was cancelled meanwhile is gone.
            let _ = sleeper.send(());
        }
    }

    /// Moves the wall clock alone, as an administrator or NTP does.
    pub fn jump_wall(&self, by_ms: i64) {
        self.lock().wall_shift_ms += by_ms;
    }

    /// When the next sleeper is due.
    #[must_use]
    pub fn next_due_ms(&self) -> Option<u64> {
        self.lock().sleepers.keys().next().map(|(at, _)| *at)
    }
}

impl Clock for TurnedClock {
    fn now_ms(&self) -> u64 {
        self.lock().now_ms
    }

    fn wall(&self) -> Timestamp {
        let inner = self.lock();
        let ms = i64::try_from(inner.now_ms).unwrap_or(i64::MAX).saturating_add(inner.wall_shift_ms);
        Timestamp::UNIX_EPOCH
            .checked_add(SignedDuration::from_hours(24 * 365 * 50))
            .and_then(|at| at.checked_add(SignedDuration::from_millis(ms)))
            .unwrap_or_default()
    }

    fn sleep_until(&self, at_ms: u64) -> Sleep {
        let mut inner = self.lock();
        if at_ms <= inner.now_ms {
            return Box::pin(std::future::ready(()));
        }
        let (wake, woken) = oneshot::channel();
        let key = (at_ms, inner.next);
        inner.next += 1;
        // Sleepers nobody waits for any more are swept now and then, so that hours of beats do not pile up.
        if inner.next.is_multiple_of(4_096) {
            inner.sleepers.retain(|_, sleeper| !sleeper.is_closed());
        }
        inner.sleepers.insert(key, wake);
        Box::pin(async move {
            // A clock that is gone never comes to this time.
            if woken.await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }
}
