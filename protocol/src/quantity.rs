//! Sizes and durations as people write them, on the command line and in configuration files.

/// Why a text is no quantity; the message says what is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct QuantityError {
    text: String,
    expected: &'static str,
}

const SIZE: &str = "a size: a number with K, M, G or T, as in 512M or 1.5G (a bare number counts MiB)";
const DURATION: &str = "a duration: a number with ms, s, m, h or d, as in 90s or 5m (a bare number counts seconds)";

/// A size in bytes: binary units `K M G T`, with or without `iB` or `B`; a bare number counts MiB, as in `-m 512`.
///
/// # Errors
/// [`QuantityError`] for anything else, for negative numbers and for what does not fit.
pub fn parse_bytes(text: &str) -> Result<u64, QuantityError> {
    let (number, unit) = split(text, SIZE)?;
    let unit = unit.to_ascii_lowercase();
    let scale = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" if unit.is_empty() => 1u64 << 20,
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err(QuantityError { text: text.into(), expected: SIZE }),
    };
    scaled(text, number, scale, SIZE)
}

/// A size in whole MiB, rounded up.
///
/// # Errors
/// As [`parse_bytes`], and for what does not fit 32 bits.
pub fn parse_mib(text: &str) -> Result<u32, QuantityError> {
    let bytes = parse_bytes(text)?;
    u32::try_from(bytes.div_ceil(1 << 20)).map_err(|_| QuantityError { text: text.into(), expected: SIZE })
}

/// A duration in milliseconds: `ms s m h d`; a bare number counts seconds.
///
/// # Errors
/// [`QuantityError`] for anything else, for negative numbers and for what does not fit.
pub fn parse_duration_ms(text: &str) -> Result<u64, QuantityError> {
    let (number, unit) = split(text, DURATION)?;
    let scale = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(QuantityError { text: text.into(), expected: DURATION }),
    };
    scaled(text, number, scale, DURATION)
}

/// A size for people: the largest binary unit of which there is at least one, one decimal.
#[must_use]
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    for (name, scale) in UNITS {
        if bytes >= scale {
            let tenths = (u128::from(bytes) * 10 + u128::from(scale) / 2) / u128::from(scale);
            return if tenths % 10 == 0 {
                format!("{} {name}", tenths / 10)
            } else {
                format!("{}.{} {name}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} B")
}

fn split<'a>(text: &'a str, expected: &'static str) -> Result<(&'a str, &'a str), QuantityError> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let digits = number.bytes().filter(u8::is_ascii_digit).count();
    if digits == 0 || digits > 19 || number.matches('.').count() > 1 {
        return Err(QuantityError { text: text.into(), expected });
    }
    Ok((number, unit.trim_start()))
}

/// `number` is digits with at most one dot; decimals are kept to nine places, so no floating point rounds a size.
fn scaled(text: &str, number: &str, scale: u64, expected: &'static str) -> Result<u64, QuantityError> {
    let error = || QuantityError { text: text.into(), expected };
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| error())? };
    let decimals = &decimals[..decimals.len().min(9)];
    let fraction: u128 = if decimals.is_empty() { 0 } else { decimals.parse().map_err(|_| error())? };
    let places = u32::try_from(decimals.len()).unwrap_or(9);
    let value = whole * u128::from(scale) + fraction * u128::from(scale) / 10u128.pow(places);
    u64::try_from(value).map_err(|_| error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512", 512 << 20),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512mb", 512 << 20),
            ("1.5G", 3 << 29),
            ("64k", 64 << 10),
            ("100B", 100),
            ("2 T", 2 << 40),
            ("0", 0),
            (".5g", 1 << 29),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "x", "-1", "1X", "1.2.3", "M", ".", "1e3", "99999999999T", "ü"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_mib("1K"), Ok(1));
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("5", 5_000),
            ("5s", 5_000),
            ("250ms", 250),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0", 0),
        ] {
            assert_eq!(parse_duration_ms(text), Ok(ms), "{text}");
        }
        for bad in ["", "s", "-5s", "5y", "5 minutes"] {
            assert!(parse_duration_ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (8 << 30, "8 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(show_bytes(bytes), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_quantity_or_an_error_never_a_panic(text in ".{0,40}") {
            let _ = parse_bytes(&text);
            let _ = parse_duration_ms(&text);
        }
    }
}
