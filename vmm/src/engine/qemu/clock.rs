//! The host's TSC frequency, which the guest is told: TCG hands the host's counter through, and a guest that has to calibrate it
//! against an emulated timer fails on a busy host, falls back to jiffies and spends a quarter of a second on its delay loop.

use std::time::{Duration, Instant};

use vmm_sys_util::rand::timestamp_cycles;

/// Time between the two readings: a reading is good to well below a microsecond, so this gives tens of parts per million.
const INTERVAL: Duration = Duration::from_millis(10);
/// Readings tried at each end; the one least disturbed by the scheduler counts.
const TRIES: usize = 5;
/// Frequencies outside of this are not believed, in kHz.
const PLAUSIBLE_KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// A moment on both clocks.
#[derive(Clone, Copy)]
struct Reading {
    cycles: u64,
    at: Instant,
}

/// The least disturbed of a few readings.
fn read() -> Reading {
    let tries = (0..TRIES).map(|_| {
        let before = timestamp_cycles();
        let at = Instant::now();
        let after = timestamp_cycles();
        (after.wrapping_sub(before), Reading { cycles: before + after.wrapping_sub(before) / 2, at })
    });
    tries.min_by_key(|(width, _)| *width).map_or(Reading { cycles: 0, at: Instant::now() }, |(_, reading)| reading)
}

/// Measures the frequency in kHz; takes [`INTERVAL`]. None if the counter is not usable as a clock.
pub(super) fn tsc_khz() -> Option<u64> {
    let start = read();
    std::thread::sleep(INTERVAL);
    let end = read();
    frequency_khz(end.cycles.checked_sub(start.cycles)?, end.at.duration_since(start.at))
}

fn frequency_khz(cycles: u64, elapsed: Duration) -> Option<u64> {
    let khz = u128::from(cycles) * 1_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(khz).ok().filter(|khz| PLAUSIBLE_KHZ.contains(khz))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_computed_and_nonsense_is_not_believed() {
        assert_eq!(frequency_khz(25_000_000, Duration::from_millis(10)), Some(2_500_000));
        assert_eq!(frequency_khz(0, Duration::from_millis(10)), None);
        assert_eq!(frequency_khz(u64::MAX, Duration::from_nanos(1)), None);
        let (first, second) = (tsc_khz().expect("a TSC"), tsc_khz().expect("a TSC"));
        assert!(first.abs_diff(second) * 1000 < first, "{first} and {second} kHz differ by more than a thousandth");
    }
}
