//! Durations as people write them: `30s`, `15m`, `7days`.
//!
//! In: a text. Out: a [`Duration`]. One number and one unit only, so that a text has one reading.

use std::time::Duration;

/// A text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a duration; write a whole number and a unit, such as 30s, 15m, 12h or 7days")]
pub struct NotASpan(String);

/// Reads a duration; units are ms, s, m, h, d (or their words).
///
/// # Errors
/// [`NotASpan`] for every other text, and for one beyond 100 years.
pub fn parse(text: &str) -> Result<Duration, NotASpan> {
    let refused = || NotASpan(text.chars().take(64).collect());
    let text_trimmed = text.trim();
    let split = text_trimmed.find(|c: char| !c.is_ascii_digit()).ok_or_else(refused)?;
    let (number, unit) = text_trimmed.split_at(split);
    let number: u64 = number.parse().map_err(|_| refused())?;
    let unit_ms: u64 = match unit.trim() {
        "ms" => 1,
        "s" | "sec" | "second" | "seconds" => 1_000,
        "m" | "min" | "minute" | "minutes" => 60_000,
        "h" | "hour" | "hours" => 3_600_000,
        "d" | "day" | "days" => 86_400_000,
        _ => return Err(refused()),
    };
    let span_ms = number.checked_mul(unit_ms).filter(|ms| *ms <= 100 * 366 * 86_400_000).ok_or_else(refused)?;
    Ok(Duration::from_millis(span_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_without_one_reading_are_refused() {
        for text in ["", "30", "s", "-1s", "1.5h", "1h30m", "1 fortnight", "99999999999999999999s", "99999999days"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn spans_are_read_with_short_and_long_units() {
        assert_eq!(parse("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse("7days"), parse("7d"));
        assert_eq!(parse(" 15 min "), Ok(Duration::from_secs(900)));
    }
}
