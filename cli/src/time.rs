//! Times for people, in their own zone. Machines get RFC 3339 from the types themselves.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::failure::{Failure, invalid};

/// A time as `2026-01-02 03:04:05` in a zone.
#[must_use]
pub fn local(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned_datetime(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A time with its milliseconds and its offset from UTC, for log lines.
#[must_use]
pub fn precise(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned_datetime(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S.%3f%:z").to_string()
}

/// A duration in words, to the second: `2m 5s`.
#[must_use]
pub fn duration(milliseconds: u64) -> String {
    let whole = if milliseconds >= 1_000 { milliseconds / 1_000 * 1_000 } else { milliseconds };
    humantime::format_duration(std::time::Duration::from_millis(whole)).to_string()
}

/// A point in time as people write it: RFC 3339, a date with or without a time in the local zone, or a duration before `now`.
///
/// # Errors
/// `invalid_config` for anything else.
pub fn point(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, Failure> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(local) = text.parse::<jiff::civil::DateTime>()
        && let Ok(zoned) = local.to_zoned_datetime(zone.clone())
    {
        return Ok(zoned.timestamp());
    }
    let refuse =
        || invalid(format!("{text:?} is no time: write 2026-01-02T03:04:05Z, 2026-01-02, or a duration such as 5m"));
    let milliseconds = msb_protocol::quantity::parse_duration_ms(text).map_err(|_| refuse())?;
    let milliseconds = i64::try_from(milliseconds).map_err(|_| refuse())?;
    now.checked_sub(jiff::SignedDuration::from_millis(milliseconds)).map_err(|_| refuse())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap_or_else(|_| TimeZone::fixed(jiff::tz::offset(1)))
    }

    #[test]
    fn times_are_shown_in_the_zone_of_the_reader() {
        let winter: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
        let fixed = TimeZone::fixed(jiff::tz::offset(-5));
        assert_eq!(local(winter, &fixed), "2026-01-01 22:04:05");
        assert_eq!(precise(winter, &fixed), "2026-01-01T22:04:05.678-05:00");
        assert_eq!(local(winter, &zone()), "2026-01-02 04:04:05");
    }

    #[test]
    fn points_in_time_are_read_as_people_write_them() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        for (text, expected) in [
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            ("2026-01-01T00:00:00+02:00", "2025-12-31T22:00:00Z"),
            ("2026-01-01T00:00:00", "2025-12-31T23:00:00Z"),
            ("2026-01-01", "2025-12-31T23:00:00Z"),
            ("5m", "2026-01-02T02:59:05Z"),
            ("30", "2026-01-02T03:03:35Z"),
        ] {
            assert_eq!(point(text, now, &zone()).unwrap().to_string(), expected, "{text}");
        }
        for bad in ["", "yesterday", "-5m", "2026-13-01", "99999999999999999d"] {
            assert!(point(bad, now, &zone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_shown_to_the_second() {
        assert_eq!(
            (duration(125_900).as_str(), duration(900).as_str(), duration(0).as_str()),
            ("2m 5s", "900ms", "0s")
        );
    }
}
