//! A server at a glance: its standing, its series, its last run and the policy that is due next.
//!
//! Series come from stored minute samples, so they survive a restart and lag by one flush at most; whether the
//! server is online and when it was last heard of come from the sessions, which know it at once.

use super::{Error, Fleet, RunFilter};
use crate::auth::Caller;
use crate::model::ServerId;
use crate::model::range::Range;
use crate::model::server::Overview;

impl Fleet {
    /// The overview of a server over a range that ends now. Series come from stored samples.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn overview(&self, caller: Caller, server: ServerId, range: Range) -> Result<Overview, Error> {
        self.visible(caller, server).await?;
        let now_ms = self.clock.now_ms();
        let row = self.store.server(server).await?.ok_or(Error::NotFound("server"))?;
        let last = self.store.runs(server, &RunFilter { limit: 1, ..RunFilter::default() }).await?;
        let policies = self.policies(caller, server).await?;
        let due = policies.into_iter().filter(|policy| policy.next_run_at.is_some());
        Ok(Overview {
            server: self.with_session(row),
            range,
            bucket_seconds: range.bucket_minutes() * 60,
            series: self.store.series(server, range, now_ms).await?,
            last_run: last.into_iter().next().map(|run| self.with_progress(run)),
            // RFC 3339 in UTC with a fixed number of digits sorts as it reads.
            next_policy: due.min_by(|a, b| a.next_run_at.cmp(&b.next_run_at)),
        })
    }
}
