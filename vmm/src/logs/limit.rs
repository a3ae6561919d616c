//! A limit on log lines that a guest can cause: so many per period, the rest only counted.

use std::time::{Duration, Instant};

/// Lets `burst` events through per `period`.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    period: Duration,
    window: Option<Instant>,
    used: u32,
    suppressed: u64,
}

impl RateLimit {
    /// `burst` events per `period`.
    pub const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, window: None, used: 0, suppressed: 0 }
    }

    /// Whether the event at `now` may be logged; `Some(n)` says how many were not since the last that was.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|start| now.duration_since(start) >= self.period) {
            self.window = Some(now);
            self.used = 0;
        }
        if self.used < self.burst {
            self.used += 1;
            return Some(std::mem::take(&mut self.suppressed));
        }
        self.suppressed += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_pass_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut limit = RateLimit::new(2, Duration::from_secs(1));
        assert_eq!(limit.allow(start), Some(0));
        assert_eq!(limit.allow(start), Some(0));
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start + Duration::from_secs(1)), Some(2));
    }
}
