//! When the next health check is due and what its outcomes mean: pure. The actor runs the checks (`actor::care`).
//!
//! ```text
//!             success                     `retries` failures in a row
//!   starting ─────────► healthy ◄───────► unhealthy
//!      └── `retries` failures in a row, those within the start period not counted ──►┘
//! ```

use msb_protocol::health::{HealthCheck, HealthStatus};

/// The health of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthWatch {
    check: HealthCheck,
    began_ms: u64,
    due_ms: u64,
    under_way: bool,
    streak: u32,
    status: HealthStatus,
}

impl HealthWatch {
    /// The watch of a run that became ready now; the first check is an interval away.
    #[must_use]
    pub fn new(check: HealthCheck, now_ms: u64) -> Self {
        let due_ms = now_ms.saturating_add(check.interval_ms);
        Self { check, began_ms: now_ms, due_ms, under_way: false, streak: 0, status: HealthStatus::Starting }
    }

    /// When the next check is due; `None` while one is under way.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        (!self.under_way).then_some(self.due_ms)
    }

    /// A check begins: two never run at once.
    pub fn begin(&mut self) {
        self.under_way = true;
    }

    /// A check ended. The status, if it changed.
    pub fn finish(&mut self, success: bool, now_ms: u64) -> Option<HealthStatus> {
        self.under_way = false;
        self.due_ms = now_ms.saturating_add(self.check.interval_ms);
        let starting_up =
            self.status == HealthStatus::Starting && now_ms < self.began_ms.saturating_add(self.check.start_period_ms);
        let before = self.status;
        if success {
            (self.streak, self.status) = (0, HealthStatus::Healthy);
        } else if !starting_up {
            self.streak = self.streak.saturating_add(1);
            if self.streak >= self.check.retries {
                self.status = HealthStatus::Unhealthy;
            }
        }
        (self.status != before).then_some(self.status)
    }

    /// What the checks say.
    #[must_use]
    pub fn status(&self) -> HealthStatus {
        self.status
    }

    /// Failures in a row.
    #[must_use]
    pub fn failing_streak(&self) -> u32 {
        self.streak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch() -> HealthWatch {
        let check = HealthCheck {
            interval_ms: 1_000,
            retries: 2,
            start_period_ms: 5_000,
            ..HealthCheck::new(vec!["true".into()])
        };
        HealthWatch::new(check, 100)
    }

    #[test]
    fn outcomes_in_a_table() {
        use HealthStatus::{Healthy, Starting, Unhealthy};
        // (outcomes with their times, the status after the last, the streak)
        for (outcomes, status, streak) in [
            (&[][..], Starting, 0),
            (&[(false, 1_100), (false, 2_100), (false, 5_099)], Starting, 0),
            (&[(false, 5_100)], Starting, 1),
            (&[(false, 5_100), (false, 6_100)], Unhealthy, 2),
            (&[(true, 1_100)], Healthy, 0),
            // Once a check succeeded, the start is over.
            (&[(true, 1_100), (false, 2_100), (false, 3_100)], Unhealthy, 2),
            (&[(true, 1_100), (false, 2_100), (true, 3_100), (false, 4_100)], Healthy, 1),
            (&[(false, 5_100), (false, 6_100), (false, 7_100), (true, 8_100)], Healthy, 0),
        ] {
            let mut watch = watch();
            for (success, now_ms) in outcomes {
                let before = watch.status();
                watch.begin();
                let told = watch.finish(*success, *now_ms);
                assert_eq!(told, (watch.status() != before).then(|| watch.status()), "{outcomes:?}");
            }
            assert_eq!((watch.status(), watch.failing_streak()), (status, streak), "{outcomes:?}");
        }
    }

    #[test]
    fn the_interval_counts_from_the_end_of_the_check_before_and_no_two_overlap() {
        let mut watch = watch();
        assert_eq!(watch.due_ms(), Some(1_100));
        watch.begin();
        assert_eq!(watch.due_ms(), None);
        watch.finish(true, 1_900);
        assert_eq!(watch.due_ms(), Some(2_900));
    }
}
