//! Which artifacts of a service retention no longer keeps. Pure.
//!
//! An artifact stays while any rule keeps it: it is younger than `days`, or among the newest `count`, or
//! the newest good one of all. Only artifacts of runs that ended as `success` are looked at; removing
//! what failed runs left is recovery's work.

use chrono::{DateTime, TimeDelta, Utc};

/// An artifact as retention sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Id in the repository.
    pub snapshot_id: String,
    /// The run.
    pub run_uid: String,
    /// When it was taken.
    pub time: DateTime<Utc>,
}

/// The rules of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// 0: this rule keeps nothing.
    pub days: u32,
    /// 0: this rule keeps nothing. Both 0: everything is kept.
    pub count: u32,
}

/// What may go, oldest first.
pub fn expired(mut all: Vec<Candidate>, rules: Rules, now: DateTime<Utc>) -> Vec<Candidate> {
    if rules.days == 0 && rules.count == 0 {
        return Vec::new();
    }
    all.sort_by_key(|c| std::cmp::Reverse(c.time));
    let keep_newest = rules.count.max(1) as usize;
    let old = |c: &Candidate| now - c.time >= TimeDelta::days(i64::from(rules.days));
    let mut gone: Vec<Candidate> = all.into_iter().skip(keep_newest).filter(old).collect();
    gone.reverse();
    gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap()
    }

    fn aged(hours: &[i64]) -> Vec<Candidate> {
        let one = |h: &i64| Candidate {
            snapshot_id: h.to_string(),
            run_uid: h.to_string(),
            time: now() - TimeDelta::hours(*h),
        };
        hours.iter().map(one).collect()
    }

    fn gone(hours: &[i64], days: u32, count: u32) -> Vec<String> {
        expired(aged(hours), Rules { days, count }, now()).into_iter().map(|c| c.snapshot_id).collect()
    }

    #[test]
    fn what_either_rule_keeps_stays() {
        assert_eq!(gone(&[1, 25, 49, 73], 2, 1), ["73", "49"]);
        assert_eq!(gone(&[1, 25, 49, 73], 2, 3), ["73"]);
        assert_eq!(gone(&[1, 25, 49, 73], 0, 2), ["73", "49"]);
    }

    #[test]
    fn no_rule_keeps_everything() {
        assert!(gone(&[1, 9999], 0, 0).is_empty());
    }

    #[test]
    fn newest_stays_however_old_it_is() {
        assert_eq!(gone(&[99_999, 100_000], 1, 0), ["100000"]);
    }

    proptest! {
        #[test]
        fn never_removes_the_newest_nor_more_than_the_rules_say(hours in prop::collection::vec(0..5000_i64, 0..30), days in 0..60_u32, count in 0..10_u32) {
            let gone = expired(aged(&hours), Rules { days, count }, now());
            prop_assert!(hours.is_empty() || gone.len() < hours.len());
            for c in &gone {
                prop_assert!(now() - c.time >= TimeDelta::days(i64::from(days)));
            }
            prop_assert!(hours.len() - gone.len() >= (count as usize).min(hours.len()));
        }
    }
}
