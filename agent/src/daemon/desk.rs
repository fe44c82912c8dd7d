//! Answers people on the host: status, runs, plans, and runs that they start and follow.

use std::path::PathBuf;

use hestner_proto::words::{RunKind, Verb};
use tokio::sync::{mpsc, watch};

use super::known::reach;
use super::runs::{Heard, Runs, Wish};
use super::settings::Settings;
use crate::control::{self, Answer, Call};
use crate::identity::Keeper;
use crate::lifecycle::{Drain, Tasks};
use crate::policy::Policies;
use crate::report::RunRecord;
use crate::repository::{Location, Mode};
use crate::run::launcher::Runner;
use crate::run::messages::{Event, Request};
use crate::run::plan::read_grants;
use crate::session::Link;
use crate::status::{RepositoryStatus, ServiceStatus, Status};
use crate::store::Store;

/// What a follower of a run may leave unread.
const HEARD_WAITING: usize = 32;

/// Answers people on the host.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) settings: Settings,
    pub(super) settings_path: PathBuf,
    pub(super) keeper: Keeper,
    pub(super) policies: Policies,
    pub(super) store: Store,
    pub(super) runs: Runs,
    pub(super) runs_active: watch::Receiver<usize>,
    pub(super) link: watch::Receiver<Link>,
}

impl Desk {
    pub(super) async fn run(self, mut calls: mpsc::Receiver<Call>, tasks: Tasks, drain: Drain) {
        loop {
            let call = tokio::select! {
                () = drain.cancelled() => return,
                Some(call) = calls.recv() => call,
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
        };
        // A caller that has left needs no answer.
        let _ = answers.send(last).await;
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
        let event = match Runner::launch(&self.settings_path, &Request::Plan { service }).await {
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
                },
                Heard::Ended(record) => Answer::Ended(record),
            });
        }
    }

    async fn status(&self) -> Status {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            runs_active: *self.runs_active.borrow(),
            separated: false,
            ..Status::default()
        };
        let link = self.link.borrow().clone();
        (status.connected, status.disconnected_because) = (link.connected, link.because);
        match self.store.waiting().await {
            Ok(waiting) => status.outbox_reports = waiting,
            Err(error) => status.problems.push(error.to_string()),
        }
        // The runner reads the settings anew for each run, so this does as well.
        let settings = Settings::read(&self.settings_path).unwrap_or_else(|error| {
            status.problems.push(error.to_string());
            self.settings.clone()
        });
        if let Err(failure) = read_grants(&settings.grants) {
            status.problems.push(failure.message);
        }
        for service in &settings.services {
            let policy = self.policies.load(&service.name).ok().flatten();
            status.services.push(ServiceStatus {
                name: service.name.clone(),
                consistency: reach(service, &settings).await,
                destination: policy.as_ref().map_or(service.destination.clone(), |p| p.destination.clone()),
                cron: policy.map(|p| p.cron).unwrap_or_default(),
            });
        }
        if let Ok(identity) = self.keeper.load() {
            status.enrolled = true;
            (status.company_id, status.server_id) = (identity.id.company_id, identity.id.server_id);
            status.certificate_expires_at_ms = identity.not_after.timestamp_millis();
            status.repositories = repositories(&settings, identity.id.server_id);
        }
        status
    }
}

fn refused(code: &str, message: &str, next_step: &str) -> Answer {
    Answer::Refused { code: code.to_owned(), message: message.to_owned(), next_step: next_step.to_owned() }
}

/// Repositories that exist.
fn repositories(settings: &Settings, server_id: i64) -> Vec<RepositoryStatus> {
    let all = settings.destinations.iter().flat_map(|d| [Mode::Encrypted, Mode::Open].map(|mode| (d, mode)));
    let located =
        all.map(|(d, mode)| (mode, Location::new(d, mode, server_id, &settings.state_dir, &settings.repository)));
    let existing = located.filter(|(_, location)| location.path().join("config").exists());
    let status = |(mode, location): (Mode, Location)| RepositoryStatus {
        path: location.path().display().to_string(),
        password_file: location.password_file().display().to_string(),
        mode: mode.as_str().to_owned(),
        destination: location.destination,
    };
    existing.map(status).collect()
}
