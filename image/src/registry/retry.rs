//! When a failed request is tried again, and after how long. Pure: time and chance are parameters.

use std::time::Duration;

/// How patient a pull is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries in a row without any progress before it gives up.
    pub tries: u32,
    /// First wait; each further one is twice as long.
    pub first: Duration,
    /// Longest wait of its own choosing.
    pub longest: Duration,
    /// Longest wait that a registry may ask for with `Retry-After`; more is a failure that says so.
    pub longest_asked: Duration,
    /// Silence on a connection that counts as a failure.
    pub silence: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            tries: 6,
            first: Duration::from_millis(500),
            longest: Duration::from_secs(20),
            longest_asked: Duration::from_secs(120),
            silence: Duration::from_secs(30),
        }
    }
}

impl RetryPolicy {
    /// The wait after `failures` failures in a row (1 or more), or `None` if there is no further try. `chance` in 0..1 spreads the
    /// waits of many clients.
    #[must_use]
    pub fn wait(&self, failures: u32, asked: Option<Duration>, chance: f64) -> Option<Duration> {
        if failures >= self.tries || asked.is_some_and(|asked| asked > self.longest_asked) {
            return None;
        }
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(self.longest);
        // From three quarters to all of it.
        let own = doubled.mul_f64(0.75 + 0.25 * chance.clamp(0.0, 1.0));
        Some(asked.unwrap_or_default().max(own))
    }
}

/// Whether an answer of this status may be another one next time.
pub(crate) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 520..=599)
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date in the one form that is still written.
pub(crate) fn retry_after(header: &str, now_unix_s: u64) -> Option<Duration> {
    if let Ok(seconds) = header.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = http_date(header.trim())?;
    Some(Duration::from_secs(at.saturating_sub(now_unix_s)))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let day: u64 = day.parse().ok().filter(|day| (1..=31).contains(day))?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = year.parse().ok().filter(|year| (1970..=9999).contains(year))?;
    let mut clock = time.split(':').map(|part| part.parse::<u64>().ok());
    let (hours, minutes, seconds) = (clock.next()??, clock.next()??, clock.next()??);
    if hours > 23 || minutes > 59 || seconds > 60 {
        return None;
    }
    // Days from the civil date, with the year beginning in March so that the leap day is its last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    // 719,468 days lie between the first of March of year 0 and 1970.
    Some((days.checked_sub(719_468)?) * 86_400 + hours * 3_600 + minutes * 60 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_end() {
        let policy = RetryPolicy::default();
        let waits: Vec<_> = (1..=6).map(|failures| policy.wait(failures, None, 1.0)).collect();
        let ms = |ms: u64| Some(Duration::from_millis(ms));
        assert_eq!(waits, [ms(500), ms(1_000), ms(2_000), ms(4_000), ms(8_000), None]);
        assert_eq!(policy.wait(1, None, 0.0), ms(375));
        let patient = RetryPolicy { tries: 100, ..policy };
        assert_eq!(patient.wait(50, None, 1.0), Some(patient.longest));
    }

    #[test]
    fn what_the_registry_asks_for_is_waited_unless_it_is_too_much() {
        let policy = RetryPolicy::default();
        let s = Duration::from_secs;
        assert_eq!(policy.wait(1, Some(s(60)), 0.0), Some(s(60)));
        assert_eq!(policy.wait(1, Some(s(121)), 0.0), None);
        assert_eq!(policy.wait(4, Some(s(1)), 1.0), Some(s(4)));
    }

    #[test]
    fn only_passing_failures_are_tried_again() {
        for status in [429, 500, 502, 503, 504, 408, 524] {
            assert!(is_passing(status), "{status}");
        }
        for status in [200, 400, 401, 403, 404, 416, 501] {
            assert!(!is_passing(status), "{status}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let s = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(retry_after("120", 0), s(120));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_770), s(7));
        assert_eq!(retry_after("Thu, 29 Feb 2024 00:00:00 GMT", 1_709_164_799), s(1));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", 800_000_000), s(0));
        for bad in ["", "soon", "-1", "Sun, 06 Nov 1994 08:49:37 CET", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(retry_after(bad, 0), None, "{bad}");
        }
    }
}
