//! Logins that were refused, of all connections of one server together: how long the next refusal is held back, and whether it is
//! worth a line in the log. Pure; time is a parameter.

use std::time::{Duration, Instant};

/// Refusals are counted in windows of this length.
const WINDOW: Duration = Duration::from_secs(60);
/// Refusals in a window that cost nothing beyond the usual delay: an ordinary client offers all its keys.
const FREE: u32 = 16;
/// Refusals in a window from which on each costs the most.
const MANY: u32 = 128;
/// What a refusal costs above [`FREE`].
const DELAY: Duration = Duration::from_secs(1);
/// What one costs above [`MANY`].
const DELAY_MAX: Duration = Duration::from_secs(5);
/// Lines of the log in a window.
const LINES: u32 = 10;

/// What to do about one refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Time to hold it back.
    pub delay: Duration,
    /// Whether to log it, and how many were not logged before.
    pub log: Option<u32>,
}

/// The count.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rejections {
    since: Option<Instant>,
    count: u32,
    lines: u32,
    unlogged: u32,
}

impl Rejections {
    /// One more.
    pub(crate) fn count(&mut self, now: Instant) -> Verdict {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            *self = Self { since: Some(now), unlogged: self.unlogged, ..Self::default() };
        }
        self.count = self.count.saturating_add(1);
        let delay = match self.count {
            count if count <= FREE => Duration::ZERO,
            count if count <= MANY => DELAY,
            _ => DELAY_MAX,
        };
        let log = if self.lines < LINES {
            self.lines += 1;
            Some(std::mem::take(&mut self.unlogged))
        } else {
            self.unlogged = self.unlogged.saturating_add(1);
            None
        };
        Verdict { delay, log }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_free_many_cost_and_the_log_stays_short() {
        let (mut rejections, now) = (Rejections::default(), Instant::now());
        let verdicts: Vec<Verdict> = (0..200).map(|_| rejections.count(now)).collect();
        assert_eq!([verdicts[0].delay, verdicts[16].delay, verdicts[199].delay], [Duration::ZERO, DELAY, DELAY_MAX]);
        assert_eq!(verdicts.iter().filter(|verdict| verdict.log.is_some()).count(), 10);
        let later = rejections.count(now + WINDOW);
        assert_eq!(later, Verdict { delay: Duration::ZERO, log: Some(190) });
    }
}
