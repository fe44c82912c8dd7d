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
    /// Costs in `store`, all in one currency.
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
        let rows = self.store.ledger(server, &from, &until).await?;
        let mut sums: BTreeMap<&str, Decimal> = BTreeMap::new();
        let mut total = Decimal::ZERO;
        for row in &rows {
            let sum = sums.entry(&row.source).or_default();
            *sum = sum.checked_add(row.amount).ok_or(Error::TooMuch)?;
            total = total.checked_add(row.amount).ok_or(Error::TooMuch)?;
        }
        let totals =
            sums.into_iter().map(|(source, amount)| SourceTotal { source: source.to_owned(), amount }).collect();
        Ok(MonthlyCosts {
            server_id: server.0,
            month: month.to_string(),
            currency: self.currency.clone(),
            total,
            totals,
            rows,
        })
    }
}
