//! What servers cost: the ledger's rows of a month and their sums.
//!
//! Rows are booked where runs are taken in; nothing here changes them. A day's cost is the sum of its rows.

use std::collections::BTreeMap;

use rust_decimal::Decimal;

use crate::auth::Caller;
use crate::model::ServerId;
use crate::model::cost::{MonthlyCosts, SourceTotal};
use crate::model::times::Month;
use crate::platform::clock::SharedClock;
use crate::store::{self, Store};

/// Why costs were not shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such server, or the caller may not see it.
    #[error("there is no such server")]
    NotFound,
    /// The sum is beyond 10^28.
    #[error("the costs of the month are beyond what can be summed up")]
    TooMuch,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Costs {
    store: Store,
    currency: String,
    clock: SharedClock,
}

impl Costs {
    /// Costs in `store`; `currency` is that of the rate card.
    pub fn new(store: Store, currency: String, clock: SharedClock) -> Self {
        Self { store, currency, clock }
    }

    /// A server's costs of a month; the current one if none is given.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn of_month(
        &self,
        caller: Caller,
        server: ServerId,
        month: Option<Month>,
    ) -> Result<MonthlyCosts, Error> {
        let company = self.store.company_of_server(server).await?;
        company.filter(|company| caller.may_see(*company)).ok_or(Error::NotFound)?;
        let month = month.unwrap_or_else(|| Month::of(self.clock.now_ms()));
        let (from, until) = month.bounds();
        let (rows, rows_truncated) = self.store.ledger(server, &from, &until).await?;
        let totals = self.totals(server, &from, &until).await?;
        let own = totals.iter().filter(|sum| sum.currency == self.currency);
        let total = own.map(|sum| Some(sum.amount)).fold(Some(Decimal::ZERO), add).ok_or(Error::TooMuch)?;
        Ok(MonthlyCosts {
            server_id: server.0,
            month: month.to_string(),
            currency: self.currency.clone(),
            total,
            totals,
            rows,
            rows_truncated,
        })
    }

    /// Sums over all rows; what the listing leaves out counts as well.
    async fn totals(&self, server: ServerId, from: &str, until: &str) -> Result<Vec<SourceTotal>, Error> {
        let mut sums: BTreeMap<(String, String), Option<Decimal>> = BTreeMap::new();
        let each = |source: &str, currency: &str, amount| {
            let sum = sums.entry((source.to_owned(), currency.to_owned())).or_insert(Some(Decimal::ZERO));
            *sum = add(*sum, Some(amount));
        };
        self.store.each_amount(server, from, until, each).await?;
        let totals = sums.into_iter().map(|((source, currency), amount)| {
            Ok(SourceTotal { source, currency, amount: amount.ok_or(Error::TooMuch)? })
        });
        totals.collect()
    }
}

/// `None` is beyond what a decimal can hold.
fn add(sum: Option<Decimal>, amount: Option<Decimal>) -> Option<Decimal> {
    sum?.checked_add(amount?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sqlx::{Connection as _, SqliteConnection};

    use super::*;
    use crate::model::Scope;
    use crate::platform::clock::ManualClock;

    const CALLER: Caller = Caller { key_id: 1, scope: Scope::All };

    async fn with_ledger(statement: &'static str) -> (tempfile::TempDir, Costs) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        let company = tx.add_company("acme", "age1x", "sha256:x", 1).await.expect("added").expect("new");
        tx.add_server(company, "host", "k", "0", 1).await.expect("added");
        tx.commit().await.expect("committed");
        let path = format!("sqlite://{}", folder.path().join(store::FILE_NAME).display());
        let mut raw = SqliteConnection::connect(&path).await.expect("opened");
        sqlx::query(statement).execute(&mut raw).await.expect("booked");
        (folder, Costs::new(store, "EUR".into(), ManualClock::at(1_795_348_800_000) as Arc<_>))
    }

    #[tokio::test]
    async fn the_total_of_a_month_is_the_sum_of_all_its_rows_however_many() {
        let (_folder, costs) = with_ledger(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
             INSERT INTO cost_ledger (server_id, ref_date, amount, currency, source, run_uid, metadata_json, booked_at_ms)
             SELECT 1, '2026-11-22', '0.000001', 'EUR', 'snapshot_storage', 'u' || i, '{}', 1 FROM n",
        )
        .await;
        let shown = costs.of_month(CALLER, ServerId(1), None).await.expect("read");
        assert!(shown.rows_truncated && shown.rows.len() == crate::store::ledger::ROWS_MAX);
        assert_eq!(shown.total, "0.03".parse().expect("decimal"));
        assert_eq!(shown.totals[0].amount, shown.total);
    }

    #[tokio::test]
    async fn amounts_of_another_currency_are_not_added_to_the_total() {
        let (_folder, costs) = with_ledger(
            "INSERT INTO cost_ledger (server_id, ref_date, amount, currency, source, run_uid, metadata_json, booked_at_ms)
             VALUES (1, '2026-11-21', '7', 'BRL', 's', 'a', '{}', 1), (1, '2026-11-22', '2', 'EUR', 's', 'b', '{}', 1)",
        )
        .await;
        let shown = costs.of_month(CALLER, ServerId(1), None).await.expect("read");
        assert_eq!(shown.total, Decimal::TWO);
        let totals: Vec<_> = shown.totals.iter().map(|sum| (sum.currency.as_str(), sum.amount)).collect();
        assert_eq!(totals, [("BRL", Decimal::from(7)), ("EUR", Decimal::TWO)]);
        assert!(!shown.rows_truncated);
    }
}
