//! Answers people on the host: status, runs, plans, and runs that they start and follow.

use hestner_proto::words::{RunKind, Verb};
use tokio::sync::{mpsc, watch};

use super::known::{Knowing, reach_of};
use super::runs::{Heard, NotWaiting, Runs, Wish};
use super::waiting::Word;
use crate::control::{self, Answer, Call};
use crate::identity::Keeper;
use crate::lifecycle::{Drain, Pulse, Tasks};
use crate::policy::Policies;
use crate::report::RunRecord;
use crate::run::launcher::{Launch, Runner};
use crate::run::messages::{Event, Request};
use crate::run::plan::read_grants;
use crate::session::Link;
use crate::status::{ServiceStatus, Status, WaitingRun};
use crate::store::Store;

/// What a follower of a run may leave unread.
const HEARD_WAITING: usize = 32;

/// Answers people on the host.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) knowing: Knowing,
    pub(super) launch: Launch,
    pub(super) keeper: Keeper,
    pub(super) policies: Policies,
    pub(super) store: Store,
    pub(super) runs: Runs,
    pub(super) runs_active: watch::Receiver<usize>,
    pub(super) link: watch::Receiver<Link>,
}

impl Desk {
    pub(super) async fn run(self, mut calls: mpsc::Receiver<Call>, mut pulse: Pulse, tasks: Tasks, drain: Drain) {
        loop {
            let call = tokio::select! {
                () = drain.cancelled() => return,
                Some(call) = pulse.rest(calls.recv()) => call,
            };
            let desk = self.clone();
            tasks.spawn_ending(async move { desk.answer(call).await });
        }
    }

    async fn answer(&self, Call { request, answers }: Call) {
        let last = match request {
            control::Request::Status => Answer::Status(Box::new(self.status().await)),
            control::Request::Runs { limit } => self.list(limit).await,
            control::Request::Plan { service } => self.plan(service).await,
            control::Request::Snapshot { service } => return self.snapshot(service, answers).await,
            control::Request::Waiting => Answer::Waiting(self.runs.waiting()),
            control::Request::Wait { run_uid } => {
                let found = self.runs.waiting().into_iter().find(|run| run.run_uid == run_uid);
                self.waits(&run_uid, found).await
            }
            control::Request::Confirm { run_uid } => {
                let found = self.runs.say(&run_uid, Word::Confirmed).await;
                self.waits(&run_uid, found).await
            }
            control::Request::Refuse { run_uid, by } => {
                let found = self.runs.say(&run_uid, Word::Refused { by }).await;
                self.waits(&run_uid, found).await
            }
        };
        // A caller that has left needs no answer.
        let _ = answers.send(last).await;
    }

    /// The run that a word was said on, or why there is none that waits for it.
    async fn waits(&self, run_uid: &str, found: Option<WaitingRun>) -> Answer {
        if let Some(run) = found {
            return Answer::Waiting(vec![run]);
        }
        let shown = "`hestner-agent confirm --list` shows what waits";
        match self.runs.why_not_waiting(run_uid).await {
            Ok(NotWaiting::Unknown) => refused("unknown_run", &format!("there is no run {run_uid}"), shown),
            Ok(NotWaiting::Ended) => {
                refused("run_ended", &format!("run {run_uid} has ended"), "`hestner-agent runs` shows how; ask again")
            }
            Ok(NotWaiting::Confirmed) => {
                let next_step = "nothing: it begins when its turn comes; `hestner-agent runs` shows its end";
                refused("run_confirmed", &format!("run {run_uid} was confirmed already"), next_step)
            }
            Ok(NotWaiting::Needless) => {
                refused("run_not_waiting", &format!("run {run_uid} does not wait to be confirmed"), shown)
            }
            Err(error) => refused("state_unusable", &error.to_string(), "look at the state folder's disk"),
        }
    }

    async fn list(&self, limit: u32) -> Answer {
        match self.store.newest_runs(limit).await {
            Ok(rows) => Answer::Runs(
                rows.iter().filter_map(|row| serde_json::from_str::<RunRecord>(&row.record).ok()).collect(),
            ),
            Err(error) => refused("state_unusable", &error.to_string(), "look at the state folder's disk"),
        }
    }

    async fn plan(&self, service: String) -> Answer {
        let event = match Runner::launch(&self.launch, &Request::Plan { service }).await {
            Ok(mut runner) => runner.next().await,
            Err(error) => return refused("runner_not_started", &error.to_string(), "read the agent's log"),
        };
        match event {
            Some(Event::Planned(lines)) => Answer::Plan(lines),
            Some(Event::Finished(end)) => Answer::Ended(Box::new(end.record)),
            _ => refused("runner_not_started", "the runner ended without an answer", "read the agent's log"),
        }
    }

    async fn snapshot(&self, service: String, answers: mpsc::Sender<Answer>) {
        let wish =
            Wish { service, verb: Verb::Snapshot.to_string(), kind: RunKind::Manual, directive_id: String::new() };
        let (follower, mut heard) = mpsc::channel(HEARD_WAITING);
        let run_uid = match self.runs.start(wish, Some(follower)).await {
            Ok(run_uid) => run_uid,
            Err(failure) => {
                let _ =
                    answers.send(refused(failure.class.as_str(), &failure.message, failure.class.next_step())).await;
                return;
            }
        };
        let mut next = Some(Answer::Started { run_uid });
        while let Some(answer) = next {
            // A caller that has left does not end the run.
            if answers.send(answer).await.is_err() {
                return;
            }
            next = heard.recv().await.map(|heard| match heard {
                Heard::Progress(p) => Answer::Progress {
                    phase: p.phase,
                    bytes: (p.bytes_done, p.bytes_total),
                    files: (p.files_done, p.files_total),
                    seconds_remaining: p.seconds_remaining,
                    bytes_per_second: p.bytes_per_second,
                },
                Heard::Waits(run) => Answer::Waiting(vec![run]),
                Heard::Ended(record) => Answer::Ended(record),
            });
        }
    }

    async fn status(&self) -> Status {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            runs_active: *self.runs_active.borrow(),
            runs_waiting: self.runs.waiting().len(),
            separated: self.launch.is_separated(),
            ..Status::default()
        };
        let link = self.link.borrow().clone();
        (status.connected, status.disconnected_because) = (link.connected, link.because);
        status.clock_skew_ms = link.skew_ms;
        status.recovery_fingerprint_named = link.recovery_key_named;
        match self.store.waiting().await {
            Ok(waiting) => status.outbox_reports = waiting,
            Err(error) => status.problems.push(error.to_string()),
        }
        // The runner reads the settings anew for each run, so this does as well.
        let (settings, problem) = self.knowing.settings();
        let description = self.knowing.description().await;
        // The runner may name the same problem of the settings.
        status.problems.extend(problem.into_iter().chain(description.problems.iter().cloned()));
        status.problems.dedup();
        status.worker_limits_off.clone_from(&description.worker_limits_off);
        status.recovery_fingerprint = description.recovery_fingerprint.clone();
        status.problems.extend(refused_recovery_key(&status));
        if let Err(failure) = read_grants(&settings.grants) {
            status.problems.push(failure.message);
        }
        for service in &settings.services {
            let policy = self.policies.load(&service.name).ok().flatten();
            status.services.push(ServiceStatus {
                name: service.name.clone(),
                consistency: reach_of(&description, &service.name),
                destination: policy.as_ref().map_or(service.destination.clone(), |p| p.destination.clone()),
                cron: policy.map(|p| p.cron).unwrap_or_default(),
            });
        }
        if let Ok(identity) = self.keeper.load() {
            status.enrolled = true;
            (status.company_id, status.server_id) = (identity.id.company_id, identity.id.server_id);
            status.certificate_expires_at_ms = identity.not_after.timestamp_millis();
            status.repositories = description.repositories;
        }
        status
    }
}

/// The receiver takes another key for the company's than the one that was typed here.
fn refused_recovery_key(status: &Status) -> Option<String> {
    let (typed, named) = (&status.recovery_fingerprint, &status.recovery_fingerprint_named);
    (!typed.is_empty() && !named.is_empty() && typed != named).then(|| {
        format!(
            "recovery_key_refused: the receiver names a recovery key with the fingerprint {named}, and {typed} was typed \
             on this host; keys go on being wrapped for the typed one"
        )
    })
}

fn refused(code: &str, message: &str, next_step: &str) -> Answer {
    Answer::Refused { code: code.to_owned(), message: message.to_owned(), next_step: next_step.to_owned() }
}
