//! Times and dates in the forms that people and ledgers use.
//!
//! In: milliseconds since the Unix epoch. Out: RFC 3339 in UTC with milliseconds, dates, months. Values
//! beyond what the calendar can hold are clamped, never an error: they come from agents' clocks.

use chrono::{DateTime, Datelike as _, Months, NaiveDate, SecondsFormat, Utc};

fn instant(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms).unwrap_or(if ms < 0 { DateTime::UNIX_EPOCH } else { DateTime::<Utc>::MAX_UTC })
}

/// `2026-11-22T04:03:29.000Z`.
pub fn rfc3339(ms: i64) -> String {
    instant(ms).to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// The day in UTC.
pub fn utc_date(ms: i64) -> NaiveDate {
    instant(ms).date_naive()
}

/// Days in the month of `date`.
pub fn days_in_month(date: NaiveDate) -> u32 {
    let first = date.with_day(1).unwrap_or(date);
    let next = first.checked_add_months(Months::new(1)).unwrap_or(first);
    u32::try_from((next - first).num_days()).unwrap_or(31).max(28)
}

/// A calendar month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Month(NaiveDate);

/// A text that is not a month.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a month; write it as YYYY-MM, such as 2026-11")]
pub struct NotAMonth(String);

impl Month {
    /// The month of a time.
    pub fn of(ms: i64) -> Self {
        let date = utc_date(ms);
        Self(date.with_day(1).unwrap_or(date))
    }

    /// Reads `YYYY-MM`.
    ///
    /// # Errors
    /// [`NotAMonth`] for every other text.
    pub fn parse(text: &str) -> Result<Self, NotAMonth> {
        let refused = || NotAMonth(text.chars().take(32).collect());
        if text.len() != 7 {
            return Err(refused());
        }
        let first = NaiveDate::parse_from_str(&format!("{text}-01"), "%Y-%m-%d").map_err(|_| refused())?;
        Ok(Self(first))
    }

    /// First day, and the first day after it, as `YYYY-MM-DD`.
    pub fn bounds(self) -> (String, String) {
        let next = self.0.checked_add_months(Months::new(1)).unwrap_or(NaiveDate::MAX);
        (self.0.to_string(), next.to_string())
    }
}

impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.format("%Y-%m"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_in_any_other_form_are_refused() {
        for text in ["", "2026", "2026-13", "2026-1", "26-01", "2026-01-01", "abcd-ef", "2026/01"] {
            assert!(Month::parse(text).is_err(), "{text}");
        }
        assert_eq!(Month::parse("2026-12").expect("a month").bounds(), ("2026-12-01".into(), "2027-01-01".into()));
    }

    #[test]
    fn february_knows_its_leap_years() {
        let day = |text: &str| text.parse().expect("a date");
        assert_eq!(days_in_month(day("2024-02-29")), 29);
        assert_eq!(days_in_month(day("2026-02-01")), 28);
        assert_eq!(days_in_month(day("2026-12-31")), 31);
    }

    #[test]
    fn absurd_times_of_an_agent_are_clamped() {
        assert_eq!(rfc3339(i64::MIN), "1970-01-01T00:00:00.000Z");
        assert!(rfc3339(i64::MAX).ends_with('Z'));
    }
}
