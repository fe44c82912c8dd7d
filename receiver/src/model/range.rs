//! Ranges of the overview and their buckets.
//!
//! In: the word of the query. Out: how far back and how wide a bucket is; every range has 60 to 120.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How far back an overview looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Range {
    /// One hour in buckets of a minute.
    #[default]
    #[serde(rename = "1h")]
    Hour,
    /// A day in buckets of 15 minutes.
    #[serde(rename = "24h")]
    Day,
    /// A week in buckets of 2 hours.
    #[serde(rename = "7d")]
    Week,
    /// Thirty days in buckets of 6 hours.
    #[serde(rename = "30d")]
    Month,
}

impl Range {
    /// Length in minutes.
    pub fn minutes(self) -> i64 {
        match self {
            Self::Hour => 60,
            Self::Day => 24 * 60,
            Self::Week => 7 * 24 * 60,
            Self::Month => 30 * 24 * 60,
        }
    }

    /// Width of a bucket in minutes.
    pub fn bucket_minutes(self) -> i64 {
        match self {
            Self::Hour => 1,
            Self::Day => 15,
            Self::Week => 120,
            Self::Month => 360,
        }
    }

    /// Number of the first minute that is shown at `now_ms`, at the start of a bucket.
    pub fn first_minute(self, now_ms: i64) -> i64 {
        let now = now_ms.div_euclid(60_000);
        let bucket = self.bucket_minutes();
        // The bucket of now is the last one.
        (now.div_euclid(bucket) + 1) * bucket - self.minutes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bucket_holds_now_and_the_first_begins_a_whole_range_before_its_end() {
        for range in [Range::Hour, Range::Day, Range::Week, Range::Month] {
            for now_ms in [1_763_782_409_123_i64, 1_763_769_600_000, 1_763_769_599_999] {
                let first = range.first_minute(now_ms);
                assert_eq!(first % range.bucket_minutes(), 0);
                let now = now_ms / 60_000;
                assert!(first + range.minutes() > now && first + range.minutes() <= now + range.bucket_minutes());
            }
        }
    }
}
