//! The guest's clocks: uptime for reports, and the wall clock, which follows the host's. Called by `init`, `boot` and `link`.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::sys;

/// A difference below which the clock is slewed and not set, in nanoseconds: programs see no jump.
const SLEW_LIMIT_NS: i128 = 100_000_000;
/// A difference that is not worth a correction, in nanoseconds: the way from the host takes about as long.
const TOLERANCE_NS: i128 = 1_000_000;

/// What to do about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Correction {
    /// Nothing.
    None,
    /// Run faster or slower until this many microseconds are made up.
    Slew(i32),
    /// Set the clock.
    Step,
}

/// Decides how to correct a clock that is `ahead_ns` behind the host (negative: ahead of it).
#[must_use]
pub fn correction(behind_ns: i128) -> Correction {
    if behind_ns.abs() < TOLERANCE_NS {
        Correction::None
    } else if behind_ns.abs() < SLEW_LIMIT_NS {
        // Below the limit the value fits.
        i32::try_from(behind_ns / 1000).map_or(Correction::Step, Correction::Slew)
    } else {
        Correction::Step
    }
}

/// Sets the wall clock.
///
/// # Errors
/// As clock_settime(2).
pub fn set(realtime_ns: u64) -> rustix::io::Result<()> {
    let seconds = i64::try_from(realtime_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanoseconds = i64::try_from(realtime_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: nanoseconds })
}

/// Brings the wall clock to the host's.
///
/// # Errors
/// In words, for the log.
pub fn synchronise(realtime_ns: u64) -> Result<Correction, String> {
    let now = clock_gettime(ClockId::Realtime);
    let now_ns = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    let correction = correction(i128::from(realtime_ns) - now_ns);
    match correction {
        Correction::None => {}
        Correction::Slew(offset_us) => {
            sys::slew_clock(offset_us).map_err(|errno| format!("cannot slew the clock: {errno}"))?
        }
        Correction::Step => set(realtime_ns).map_err(|errno| format!("cannot set the clock: {errno}"))?,
    }
    Ok(correction)
}

/// Time since the kernel's start in microseconds, sleep included.
#[must_use]
pub fn uptime_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_slewed_and_large_ones_set() {
        for (behind_ns, expected) in [
            (0, Correction::None),
            (-999_999, Correction::None),
            (2_000_000, Correction::Slew(2000)),
            (-50_000_000, Correction::Slew(-50_000)),
            (100_000_000, Correction::Step),
            (-3_600_000_000_000, Correction::Step),
            (i128::MAX, Correction::Step),
        ] {
            assert_eq!(correction(behind_ns), expected, "{behind_ns}");
        }
    }
}
