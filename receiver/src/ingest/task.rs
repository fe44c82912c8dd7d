//! The task that commits reports in groups.
//!
//! Inbox: submissions and pings. It takes all that wait, up to a bound, into one transaction. When that fails,
//! each submission is tried alone, so that one host's poison does not hold up the others.

use std::time::Duration;

use tokio::sync::mpsc;

use super::{Error, Message, Origin, Submission, Verdict, run};
use crate::lifecycle::{Drain, Pulse};
use crate::model::Actor;
use crate::model::cost::RateCard;
use crate::model::counters::SharedCounters;
use crate::model::report::{NumberedReport, Outcome, Report};
use crate::platform::causes::chain;
use crate::platform::clock::SharedClock;
use crate::sessions::{End, Sessions};
use crate::store::audit::Entry;
use crate::store::directives::{Answered, Kind};
use crate::store::reports::Seen;
use crate::store::{self, Store, Tx};

/// Submissions in one transaction. Each may hold 64 reports; together they stay well under a second.
const GROUP_MAX: usize = 64;
/// How long the task waits for stragglers once the drain has begun.
const STRAGGLER_TIME: Duration = Duration::from_millis(500);

/// See the module.
pub struct Worker {
    inbox: mpsc::Receiver<Message>,
    store: Store,
    sessions: Sessions,
    card: RateCard,
    clock: SharedClock,
    counters: SharedCounters,
}

/// What one submission came to, inside a transaction that is not yet committed.
#[derive(Default)]
struct Taken {
    verdict: Verdict,
    first: u64,
    repeated: u64,
    ignored_directives: u64,
    unreadable: u64,
    /// Runs that ended, whose progress is over.
    ended: Vec<String>,
}

impl Worker {
    pub(super) fn new(
        inbox: mpsc::Receiver<Message>,
        store: Store,
        sessions: Sessions,
        card: RateCard,
        clock: SharedClock,
        counters: SharedCounters,
    ) -> Self {
        Self { inbox, store, sessions, card, clock, counters }
    }

    /// Works until the drain has begun and nobody submits any more.
    pub async fn run(mut self, mut pulse: Pulse, drain: Drain) {
        loop {
            // Cancel-safe: `recv` loses no message, and `begun` holds no state.
            let message = tokio::select! {
                message = pulse.rest(self.inbox.recv()) => message,
                () = drain.begun() => tokio::time::timeout(STRAGGLER_TIME, self.inbox.recv()).await.ok().flatten(),
            };
            let Some(message) = message else { return };
            self.work(message).await;
        }
    }

    async fn work(&mut self, first: Message) {
        let (mut group, mut pings) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Reports(submission) => group.push(submission),
                Message::Ping(answer) => pings.push(answer),
            }
            next = if group.len() < GROUP_MAX { self.inbox.try_recv().ok() } else { None };
        }
        if !group.is_empty() {
            self.commit_group(group).await;
        }
        if !pings.is_empty() {
            let alive = match self.beat_pulse().await {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(
                        event = "ping_failed",
                        component = "ingest",
                        error = chain(&error),
                        "the writer cannot write"
                    );
                    false
                }
            };
            for answer in pings {
                let _ = answer.send(alive);
            }
        }
    }

    /// A write that needs the disk: a commit of nothing would succeed on a full one.
    async fn beat_pulse(&self) -> store::Result<()> {
        let mut tx = self.store.begin().await?;
        tx.beat_pulse(self.clock.now_ms()).await?;
        tx.commit().await
    }

    async fn commit_group(&self, group: Vec<Submission>) {
        match self.commit(&group).await {
            Ok(taken) => self.answer(group, taken),
            Err(error) if group.len() > 1 => {
                tracing::warn!(
                    event = "group_failed",
                    component = "ingest",
                    error = chain(&error),
                    "a group of reports failed; trying one by one"
                );
                for submission in group {
                    self.commit_alone(submission).await;
                }
            }
            Err(error) => self.refuse(group, &error),
        }
    }

    async fn commit_alone(&self, submission: Submission) {
        let alone = vec![submission];
        match self.commit(&alone).await {
            Ok(taken) => self.answer(alone, taken),
            Err(error) => self.refuse(alone, &error),
        }
    }

    fn refuse(&self, group: Vec<Submission>, error: &store::Error) {
        for submission in group {
            let server = submission.origin.server;
            tracing::error!(event = "reports_not_stored", component = "ingest", server_id = %server, error = chain(error), "not stored");
            // Nobody listens any more when the session has ended; the agent sends again.
            let _ = submission.answer.send(Err(Error::NotStored));
        }
    }

    fn answer(&self, group: Vec<Submission>, taken: Vec<Taken>) {
        self.counters.report_commits.raise();
        for (submission, taken) in group.into_iter().zip(taken) {
            let server = submission.origin.server;
            self.counters.reports_committed.add(taken.first);
            self.counters.reports_repeated.add(taken.repeated);
            self.counters.reports_unreadable.add(taken.unreadable);
            self.counters.directives_ignored.add(taken.ignored_directives);
            for run_uid in &taken.ended {
                self.sessions.forget_progress(server, run_uid);
            }
            let forked = taken.verdict.forked;
            // The session that brought the fork hears it first, from its answer.
            let _ = submission.answer.send(Ok(taken.verdict));
            if forked {
                self.counters.forks.raise();
                self.sessions.end(server, End::Quarantined);
            }
        }
    }

    /// One transaction for all of `group`.
    async fn commit(&self, group: &[Submission]) -> store::Result<Vec<Taken>> {
        let now_ms = self.clock.now_ms();
        let mut tx = self.store.begin().await?;
        let mut all = Vec::with_capacity(group.len());
        for submission in group {
            all.push(self.take(&mut tx, &submission.origin, &submission.reports, now_ms).await?);
        }
        tx.commit().await?;
        Ok(all)
    }

    async fn take(
        &self,
        tx: &mut Tx,
        origin: &Origin,
        reports: &[NumberedReport],
        now_ms: i64,
    ) -> store::Result<Taken> {
        let mut taken = Taken::default();
        taken.verdict.shown = origin.shown;
        for report in reports {
            match tx.note_report(origin.server, report, &origin.peer, now_ms).await? {
                Seen::First => {
                    taken.first += 1;
                    self.apply(tx, origin, report, now_ms, &mut taken).await?;
                }
                Seen::Again => taken.repeated += 1,
                Seen::Fork { sha256, peer } => {
                    quarantine(tx, origin, report, &sha256, &peer, now_ms).await?;
                    taken.verdict.forked = true;
                    // What was written behind the fork must stay at the host, where a person can look at it.
                    return Ok(taken);
                }
            }
            taken.verdict.shown = taken.verdict.shown.max(report.seq);
        }
        let committed = tx.advance_ack(origin.server, &origin.epoch).await?;
        let ack = committed.min(taken.verdict.shown);
        taken.verdict.ack = u64::try_from(ack).ok().filter(|ack| *ack > 0);
        Ok(taken)
    }

    async fn apply(
        &self,
        tx: &mut Tx,
        origin: &Origin,
        report: &NumberedReport,
        now_ms: i64,
        taken: &mut Taken,
    ) -> store::Result<()> {
        match &report.report {
            Report::Run(reported) => {
                let effect = run::take(tx, origin.server, reported, &self.card, now_ms).await?;
                taken.ignored_directives += u64::from(effect.ignored_directive);
                if effect.ended {
                    taken.ended.push(reported.run_uid.clone());
                }
                Ok(())
            }
            Report::Outcome(outcome) => {
                let known = take_outcome(tx, origin, outcome, now_ms).await?;
                taken.ignored_directives += u64::from(!known);
                Ok(())
            }
            Report::Usage(usage) => tx.put_usage(origin.server, usage, now_ms).await,
            Report::Key(key) => tx.put_repository_key(origin.server, key, now_ms).await,
            Report::Unreadable(unreadable) => {
                tracing::error!(
                    event = "report_unreadable", component = "ingest", server_id = %origin.server, tenant_id = %origin.company,
                    epoch = report.epoch, seq = report.seq, why = unreadable.why, "kept a report that cannot be read"
                );
                taken.unreadable += 1;
                tx.put_unreadable(origin.server, report, unreadable, now_ms).await
            }
        }
    }
}

/// Stores a host's answer; only the first one counts. False when the server has no such directive.
async fn take_outcome(tx: &mut Tx, origin: &Origin, outcome: &Outcome, now_ms: i64) -> store::Result<bool> {
    match tx.answer_directive(origin.server, outcome, now_ms).await? {
        Answered::Unknown => return Ok(false),
        Answered::First(Kind::Policy) => tx.answer_policy(origin.server, outcome).await?,
        Answered::First(Kind::Run) if !outcome.accepted => {
            let class = if outcome.code.is_empty() { "refused" } else { &outcome.code };
            tx.fail_queued_run(&outcome.directive_id, class, &outcome.message, now_ms).await?;
        }
        Answered::First(Kind::Run) | Answered::Before => {}
    }
    Ok(true)
}

async fn quarantine(
    tx: &mut Tx,
    origin: &Origin,
    report: &NumberedReport,
    stored_sha256: &str,
    stored_peer: &str,
    now_ms: i64,
) -> store::Result<()> {
    let (epoch, seq) = (&report.epoch, report.seq);
    let sha256 = hex::encode(&report.sha256);
    tracing::error!(
        event = "fork", component = "ingest", server_id = %origin.server, tenant_id = %origin.company, epoch, seq,
        first_peer = stored_peer, second_peer = origin.peer, "one report number came with two contents; quarantined"
    );
    tx.set_server_status(origin.server, "quarantined").await?;
    tx.append_audit(Entry {
        at_ms: now_ms,
        actor: Actor::Receiver.to_string(),
        company: Some(origin.company),
        action: "server_quarantined",
        subject: format!("server:{}", origin.server),
        details: serde_json::json!({
            "epoch": epoch, "seq": seq,
            "first": { "sha256": stored_sha256, "peer": stored_peer },
            "second": { "sha256": sha256, "peer": origin.peer },
        }),
    })
    .await
}
