//! The rate card and the formula of a day's storage cost.
//!
//! `storage_gb * price_gb_month / days_in_month` (GB = 10^9 bytes), rounded half to even to 6 decimals.
//! A ledger row is the difference between that and what is booked for the day already, so the sum of a
//! day's rows always equals the formula of its last run. Money is decimal, never float.

use chrono::NaiveDate;
use rust_decimal::{Decimal, RoundingStrategy};
use serde::Serialize;
use utoipa::ToSchema;

use super::times;

/// Source of the rows that this module computes.
pub const SNAPSHOT_STORAGE: &str = "snapshot_storage";
/// Decimals of a booked amount.
const AMOUNT_DECIMALS: u32 = 6;
const BYTES_PER_GB: i64 = 1_000_000_000;

/// What things cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateCard {
    /// ISO 4217 code of all amounts.
    pub currency: String,
    /// Price of one GB for one month.
    pub storage_gb_month: Decimal,
}

/// A row to be booked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booking {
    /// The day, `YYYY-MM-DD`.
    pub ref_date: String,
    /// What is added to the day; may be negative.
    pub amount: Decimal,
    /// ISO 4217 code of the amount.
    pub currency: String,
    /// Stored GB.
    pub gb: Decimal,
    /// Days of the month.
    pub days: u32,
    /// What had been booked before.
    pub booked_before: Decimal,
}

/// The day a finished run is booked on: the agent's word, but never before the day its server was enrolled nor
/// after the day of receipt. An agent's clock must not reach into months that are closed.
pub fn ref_date(finished_at_ms: i64, enrolled_at_ms: i64, received_at_ms: i64) -> NaiveDate {
    let received = times::utc_date(received_at_ms);
    if finished_at_ms <= 0 {
        return received;
    }
    times::utc_date(finished_at_ms).max(times::utc_date(enrolled_at_ms)).min(received)
}

/// The row that brings a day from `booked_before` to the cost of `stored_bytes`; `None` only for numbers
/// beyond 10^28.
pub fn storage_booking(card: &RateCard, date: NaiveDate, stored_bytes: i64, booked_before: Decimal) -> Option<Booking> {
    let days = times::days_in_month(date);
    let gb = Decimal::from(stored_bytes).checked_div(Decimal::from(BYTES_PER_GB))?;
    let whole = gb.checked_mul(card.storage_gb_month)?.checked_div(Decimal::from(days))?;
    let target = whole.round_dp_with_strategy(AMOUNT_DECIMALS, RoundingStrategy::MidpointNearestEven);
    let amount = target.checked_sub(booked_before)?;
    let currency = card.currency.clone();
    Some(Booking { ref_date: date.to_string(), amount, currency, gb: gb.normalize(), days, booked_before })
}

/// A row of the ledger as REST shows it. Amounts are decimal strings.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LedgerRow {
    /// The row.
    pub id: i64,
    /// The server it is about.
    pub server_id: i64,
    /// The day, `YYYY-MM-DD`.
    pub ref_date: String,
    /// What the row adds to the day.
    #[schema(value_type = String, example = "0.001667")]
    pub amount: Decimal,
    /// ISO 4217 code of the amount.
    pub currency: String,
    /// What caused it, such as `snapshot_storage`.
    pub source: String,
    /// The run that caused it, if one did.
    pub run_uid: Option<String>,
    /// The numbers the amount was computed from.
    #[schema(value_type = Object)]
    pub metadata: serde_json::Value,
    /// When it was booked, RFC 3339.
    pub booked_at: String,
}

/// Sum of one source's rows in one currency.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SourceTotal {
    /// The source.
    pub source: String,
    /// ISO 4217 code of the sum.
    pub currency: String,
    /// The sum.
    #[schema(value_type = String)]
    pub amount: Decimal,
}

/// A server's costs of one month.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MonthlyCosts {
    /// The server.
    pub server_id: i64,
    /// `YYYY-MM`.
    pub month: String,
    /// ISO 4217 code of the rate card.
    pub currency: String,
    /// Sum of all rows in `currency`, whether listed or not.
    #[schema(value_type = String)]
    pub total: Decimal,
    /// Sums of all rows by source and currency.
    pub totals: Vec<SourceTotal>,
    /// The rows, oldest first; at most 10,000.
    pub rows: Vec<LedgerRow>,
    /// Whether there are more rows than are listed.
    pub rows_truncated: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn card(price: &str) -> RateCard {
        RateCard { currency: "EUR".into(), storage_gb_month: price.parse().expect("a price") }
    }

    #[test]
    fn a_run_that_finishes_in_the_future_is_booked_on_the_day_of_receipt() {
        let received = 1_763_782_409_000;
        assert_eq!(ref_date(received + 10 * 86_400_000, 1, received), times::utc_date(received));
        assert_eq!(ref_date(0, 1, received), times::utc_date(received));
        assert_eq!(ref_date(received - 86_400_000, 1, received), times::utc_date(received - 86_400_000));
    }

    #[test]
    fn a_run_that_finished_before_its_server_was_enrolled_is_booked_on_the_day_of_enrolment() {
        let received = 1_763_782_409_000;
        let enrolled = received - 2 * 86_400_000;
        assert_eq!(ref_date(received - 400 * 86_400_000, enrolled, received), times::utc_date(enrolled));
        // A receiver whose clock was set back since books on its own day, not in the future.
        assert_eq!(ref_date(1, received + 86_400_000, received), times::utc_date(received));
    }

    #[test]
    fn half_a_millionth_goes_to_the_even_side() {
        let day = "2026-06-01".parse().expect("a day");
        // 0.015 a GB and month over 30 days is 0.0005 a GB; 1 MB then costs 0.0000005, 3 MB 0.0000015.
        let amount = |bytes| storage_booking(&card("0.015"), day, bytes, Decimal::ZERO).expect("small").amount;
        assert_eq!(amount(1_000_000), "0.000000".parse().expect("decimal"));
        assert_eq!(amount(3_000_000), "0.000002".parse().expect("decimal"));
    }

    proptest! {
        #[test]
        fn rows_of_a_day_sum_to_the_formula_of_its_last_run(
            sizes in prop::collection::vec(0_i64..1_000_000_000_000_000, 1..20), cents in 0_i64..10_000,
        ) {
            let card = RateCard { currency: "EUR".into(), storage_gb_month: Decimal::new(cents, 4) };
            let day = "2026-11-22".parse().expect("a day");
            let mut sum = Decimal::ZERO;
            for size in &sizes {
                sum += storage_booking(&card, day, *size, sum).expect("in range").amount;
            }
            let last = storage_booking(&card, day, *sizes.last().expect("one"), Decimal::ZERO).expect("in range");
            prop_assert_eq!(sum, last.amount);
        }
    }
}
